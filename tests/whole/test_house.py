"""The house: rooms on floors, imports that only go down, no circles, and where each module is tested.

An import counts wherever it stands, inside functions and under TYPE_CHECKING too.
"""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.paths import ROOT

PACKAGES = {"nats_zoo": "nats_zoo", "nats_zoo.detection": "detection", "nats_zoo.search": "search"}  # where they lie

# From the ground up. A room imports itself and what lies on lower floors; rooms of one floor do not know each other.
FLOORS = (
    ("nats_zoo.version",),
    ("nats_zoo.base",),
    ("nats_zoo.genotype", "nats_zoo.hub"),
    ("nats_zoo.networks", "nats_zoo.folders"),
    ("nats_zoo.models", "nats_zoo.pictures"),
    ("nats_zoo.publishing",),
    ("nats_zoo",),  # the faces of the packages stand above their rooms
    ("nats_zoo.detection.metrics", "nats_zoo.detection.pictures"),
    ("nats_zoo.detection.data", "nats_zoo.detection.models"),
    ("nats_zoo.detection.data_report", "nats_zoo.detection.runs"),
    ("nats_zoo.detection.evaluation", "nats_zoo.detection.prediction"),
    ("nats_zoo.detection.training",),
    ("nats_zoo.detection",),
    ("nats_zoo.search.space",),
    ("nats_zoo.search.config", "nats_zoo.search.supernet"),
    ("nats_zoo.search.choosing", "nats_zoo.search.controls", "nats_zoo.search.report"),
    ("nats_zoo.search.run",),
    ("nats_zoo.search.demo",),
    ("nats_zoo.search",),
    ("nats_zoo.cli", "nats_zoo.__main__"),
)
# Upward on purpose: `python -m nats_zoo` is the command.
EXCEPTIONS = {("nats_zoo.__main__", "nats_zoo.cli")}
MAX_MODULES = 14  # in a folder
MAX_LINES = 500  # of a file, unless its docstring says why: "One file, as ..."

# Where a module is tested that has no test file of its name: in a file that says a name of it, or in that test.
TESTED_IN = {
    "__main__": "cli/test_commands.py::test_a_reader_that_goes_away_is_no_error",
    "base.errors": "whole/test_security.py",
    "base.files": "whole/test_security.py",
    "base.names": "hub/test_download.py",
    "base.run_facts": "publishing/test_card.py",
    "cli.command": "cli/test_commands.py::test_each_command_explains_its_options",
    "cli.detection": "cli/test_commands.py::test_bad_options_are_refused_in_one_line",
    "cli.exchange": "cli/test_zoo.py::test_export_writes_what_the_network_gives",
    "cli.search": "cli/test_profile.py::test_any_network_any_convolutions_and_a_space_of_ones_own",
    "cli.start": "whole/test_wheel.py::test_the_installed_wheel_works_from_another_folder",
    "cli.recipes": "whole/test_wheel.py",
    "folders.find_genotype": "models/test_named.py",
    "folders.limits": "whole/test_security.py",
    "folders.model_folder": "whole/test_security.py",
    "folders.weights": "publishing/test_backbone.py::test_weights_that_do_not_fit_name_the_tensor",
    "folders.weights_file": "publishing/test_backbone.py",
    "genotype.catalogue": "models/test_nats_resnet.py",
    "genotype.provenance": "cli/test_zoo.py",
    "hub.client": "hub/test_download.py",
    "hub.errors": "whole/test_security.py",
    "models.model_args": "models/test_nats_any.py::test_timm_arguments",
    "models.saved": "publishing/test_backbone.py",
    "models.transform": "networks/test_transform.py",
    "models.zoo": "cli/test_zoo.py",
    "networks.geometry": "networks/test_regrouped_conv.py",
    "networks.ic_conv": "genotype/test_genotype.py",
    "pictures.erf_picture": "pictures/test_genotype_chart.py",
    "pictures.style": "search/run/test_sensitivity.py",
    "publishing.card_options": "publishing/test_card.py",
    "publishing.collection": "publishing/test_publish.py::test_a_collection_is_a_table",
    "publishing.genotype": "publishing/test_publish.py",
    "version": "whole/test_wheel.py::test_the_installed_wheel_works_from_another_folder",
    "detection.data.annotations": "detection/data_report/test_report.py",
    "detection.data.augment": "detection/data/test_dataset.py",
    "detection.data.defects": "detection/data/test_checking.py",
    "detection.data.formats.coco": "detection/data/test_dataset.py",
    "detection.data.images": "detection/prediction/test_predict.py",
    "detection.data_report.check": "detection/data_report/test_report.py::test_exit_codes",
    "detection.data_report.samples": "detection/data_report/test_report.py",
    "detection.evaluation.error_sheets": "detection/evaluation/test_evaluate.py::test_a_report_without_objects",
    "detection.evaluation.errors": "detection/evaluation/test_evaluate.py",
    "detection.evaluation.predict": "detection/evaluation/test_coco.py",
    "detection.evaluation.report": "detection/evaluation/test_evaluate.py",
    "detection.metrics": "detection/evaluation/test_coco.py",
    "detection.models.backbone": "detection/models/test_create.py",
    "detection.models.config": "detection/models/test_create.py",
    "detection.models.mixed_precision": "detection/prediction/test_predict.py",
    "detection.pictures.label_placement": "detection/pictures/test_drawing.py",
    "detection.prediction.pipeline": "detection/prediction/test_predict.py",
    "detection.pictures.sheet": "detection/pictures/test_drawing.py",
    "detection.runs.config": "cli/test_commands.py::test_bad_options_are_refused_in_one_line",
    "detection.runs.curves": "pictures/test_genotype_chart.py",
    "detection.runs.facts": "detection/training/test_initial.py"
    "::test_training_goes_on_from_a_detector_on_the_hub_and_remembers_which",
    "detection.runs.loop": "detection/training/test_trainer.py",
    "detection.runs.processes": "whole/test_scale_out.py::test_a_launcher_can_end_processes_that_wait_in_vain",
    "detection.runs.setup": "detection/training/test_trainer.py",
    "detection.training.config": "detection/training/test_trainer.py",
    "search.choosing.profile": "search/choosing/test_cost.py",
    "search.config": "search/run/test_searcher.py",
    "search.demo": "cli/test_commands.py::test_each_command_explains_its_options",
    "search.report.outcome": "search/report/test_page.py",
    "search.report.pictures": "pictures/test_genotype_chart.py",
    "search.run.provenance": "search/run/test_searcher.py::test_a_genotype_says_where_it_comes_from",
    "search.run.start": "search/run/test_searcher.py",
    "search.run.trials": "search/run/test_searcher.py::test_two_processes_come_to_the_same_genotype_in_other_modes",
    "search.supernet.decode": "search/supernet/test_build.py",
}


class Import(NamedTuple):
    """`source` imports `name` of `target`, both modules of the house, in this line."""

    source: str
    target: str
    name: str
    line: int


def find_modules(root: Path) -> dict[str, Path]:
    """The files of the three packages by the names that their modules are imported by."""
    modules = {}
    for package, folder in PACKAGES.items():
        for file in sorted((root / folder).rglob("*.py")):
            parts = [package, *file.relative_to(root / folder).with_suffix("").parts]
            modules[".".join(parts).removesuffix(".__init__")] = file
    return modules


def find_imports(modules: Mapping[str, Path]) -> Iterator[Import]:
    """Every import between modules, in order; a module that is named through its room counts, not the room."""
    for source, file in modules.items():
        package = source if file.name == "__init__.py" else source.rpartition(".")[0]
        for node in ast.walk(_parse(file)):
            if isinstance(node, ast.Import):
                found = [(alias.name, "") for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
                base = ".".join([*above, *filter(None, [node.module])])
                found = [(base, alias.name) for alias in node.names]
            else:
                continue
            for base, name in found:
                target = f"{base}.{name}" if f"{base}.{name}" in modules else base
                if target in modules and target != source:
                    yield Import(source, target, name, node.lineno)


def _parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def upward(imports: Iterable[Import]) -> list[str]:
    """The imports that go neither to a lower floor nor stay in their room; the packages' faces may import anything."""
    return [
        f"{source}, line {line}: imports {target}, which lies no lower"
        for source, target, _, line in imports
        if source not in PACKAGES
        and (source, target) not in EXCEPTIONS
        and room_of(source) != room_of(target)
        and floor_of(source) <= floor_of(target)
    ]


def room_of(module: str) -> str:
    """The longest room whose name the module's begins with; for a module of no room this is its package's face."""
    return max((r for rooms in FLOORS for r in rooms if f"{module}.".startswith(f"{r}.")), key=len)


def floor_of(module: str) -> int:
    return next(floor for floor, rooms in enumerate(FLOORS) if room_of(module) in rooms)


def circles(imports: Iterable[Import]) -> list[list[str]]:
    """Groups of modules that import each other, over others too; the packages' faces are left out."""
    targets: dict[str, set[str]] = {}
    for source, target, *_ in imports:
        targets.setdefault(source, set()).update({target} if source not in PACKAGES else ())
    reached = {source: _reach(source, targets) for source in targets}
    groups = {tuple(sorted(m for m in reached[a] if a in reached.get(m, ()))) for a in reached if a in reached[a]}
    return [list(group) for group in sorted(groups)]


def _reach(start: str, targets: Mapping[str, set[str]]) -> set[str]:
    reached: set[str] = set()
    waiting = [start]
    while waiting:
        new = targets.get(waiting.pop(), set()) - reached
        reached |= new
        waiting += new
    return reached


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


MODULES = find_modules(ROOT)
IMPORTS = list(find_imports(MODULES))


# --- the house as it is -----------------------------------------------------------------------------------------------


def test_imports_only_go_down():
    assert upward(IMPORTS) == []


def test_no_modules_import_each_other_in_a_circle():
    assert circles(IMPORTS) == []


def test_private_names_stay_in_their_module():
    assert [found for found in IMPORTS if is_private(found.name) or is_private(found.target.rpartition(".")[2])] == []


def test_every_module_lies_in_a_room():
    astray = [module for module in MODULES if room_of(module) in PACKAGES and module not in PACKAGES]
    assert astray == []


def test_every_floor_is_there():
    """So that a room that has been renamed leaves no line behind that holds nothing."""
    assert [room for rooms in FLOORS for room in rooms if room not in MODULES] == []


def test_the_picture_of_the_floors_shows_them_all():
    """The lines of CONTRIBUTING.md, from the top down, are the floors."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    picture = text[text.index("    nats_zoo.cli") : text.index("Where does a change go?")].splitlines()
    rooms, package = [], ""
    for line in filter(None, map(str.strip, picture)):
        if line.startswith("---"):
            package = line.strip("-").split(":")[0].split()[0]
        else:
            names = line.split("   ")[0].split(" | ")
            rooms.append({f"{package}.{name}".strip(".") for name in names})
    floors = [set(floor) - {"nats_zoo.__main__"} for floor in reversed(FLOORS) if not set(floor) & {*PACKAGES}]
    assert rooms == floors


def test_no_folder_is_crowded():
    folders = [file.parent for file in MODULES.values()]
    assert {str(folder) for folder in folders if folders.count(folder) > MAX_MODULES} == set()


def test_no_file_is_long_without_a_reason():
    long = [file for file in MODULES.values() if len(file.read_text(encoding="utf-8").splitlines()) > MAX_LINES]
    assert [str(file) for file in long if "One file, as" not in (ast.get_docstring(_parse(file)) or "")] == []


def test_each_module_has_a_test_file_of_its_name_or_says_where_it_is_tested():
    missing = [module.partition(".")[2] for module, file in MODULES.items() if file.name != "__init__.py"]
    missing = [module for module in missing if not _mirror(module).exists()]
    assert sorted(set(missing) - set(TESTED_IN)) == [], "no test file of their names, nor a line in TESTED_IN"
    assert sorted(set(TESTED_IN) - set(missing)) == [], "lines too many in TESTED_IN"
    astray = [f"{module}: {place}" for module, place in TESTED_IN.items() if not _is_tested(module, place)]
    assert astray == []


def _mirror(module: str) -> Path:
    """The place of a module's own test file: tests/ROOM/test_MODULE.py."""
    *room, name = module.split(".")
    return ROOT.joinpath("tests", *room, f"test_{name}.py")


def _is_tested(module: str, place: str) -> bool:
    """Whether that test is there, or the file says a public name that the module defines."""
    file, _, test = place.partition("::")
    if not (ROOT / "tests" / file).is_file():
        return False
    text = (ROOT / "tests" / file).read_text(encoding="utf-8")
    if test:
        return f"def {test}(" in text
    return any(re.search(rf"\b{name}\b", text) for name in _public_names(MODULES[f"nats_zoo.{module}"]))


def _public_names(file: Path) -> list[str]:
    names = []
    for node in _parse(file).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return [name for name in names if not name.startswith("_")]


# --- the checks themselves --------------------------------------------------------------------------------------------


@pytest.fixture
def plant(tmp_path):
    """`plant({module: text, ...})`: the imports in a house of a few files, rooms as ours; it keeps what it has."""

    def plant(files):
        for folder in ("nats_zoo/base", "nats_zoo/hub", "detection/data", "search/run"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            for place in (tmp_path / folder, (tmp_path / folder).parent):
                (place / "__init__.py").touch()
        for module, text in files.items():
            (tmp_path / f"{module}.py").write_text(text)
        return list(find_imports(find_modules(tmp_path)))

    return plant


@pytest.mark.parametrize(
    "text",
    [
        "from ..hub import client",
        "from ..hub.client import pull",
        "from nats_zoo.hub.client import split_revision",
        "import nats_zoo.hub.client",
        "from nats_zoo import hub",
        "def late():\n    from ..hub.client import pull\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..hub.client import pull\n",
        "try:\n    from ..detection.data import files\nexcept ImportError:\n    pass\n",
        "from .. import publish",
    ],
)
def test_a_planted_upward_import_is_found(plant, text):
    plant({"nats_zoo/hub/client": "from ..base.errors import Down\n", "detection/data/files": ""})
    assert upward(plant({"nats_zoo/base/errors": "Down = 1\n"})) == []
    [found] = upward(plant({"nats_zoo/base/errors": text}))
    assert found.startswith("nats_zoo.base.errors, line ")


def test_rooms_of_one_floor_do_not_import_each_other(plant):
    [found] = upward(plant({"nats_zoo/genotype": "from .hub import client\n", "nats_zoo/hub/client": ""}))
    assert found == "nats_zoo.genotype, line 1: imports nats_zoo.hub.client, which lies no lower"


def test_the_faces_of_the_packages_import_what_they_show(plant):
    imports = plant({"nats_zoo/__init__": "from .base.errors import Down\n", "nats_zoo/base/errors": "Down = 1\n"})
    assert imports
    assert upward(imports) == circles(imports) == []


@pytest.mark.parametrize("late", ["from .b import x\n", "def f():\n    from . import b\n"])
def test_a_planted_circle_is_found(plant, late):
    plant({"search/run/b": "from .c import y\n", "search/run/c": "from ..run import d\n", "search/run/d": ""})
    assert circles(plant({"search/run/a": late})) == []
    found = plant({"search/run/d": "import nats_zoo.search.run.b\n"})
    assert circles(found) == [[f"nats_zoo.search.run.{name}" for name in "bcd"]]
    assert upward(found) == []  # all in one room


def test_a_planted_private_name_is_found(plant):
    [found] = plant({"search/run/a": "from .b import _inside\n", "search/run/b": ""})
    assert is_private(found.name)
    assert not is_private("__version__")
