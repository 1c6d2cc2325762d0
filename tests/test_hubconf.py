"""hubconf.py in a bare checkout: processes that can not see an installed nats_zoo load it through torch.hub."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from nats_zoo.genotype import resolve_genotype
from nats_zoo.nats_resnet import DEFAULT_GENOTYPES

ROOT = Path(__file__).resolve().parents[1]
SITE_PACKAGES = Path(torch.__file__).parents[1]
GENOTYPE = {"format": 1, "architecture": "resnet18", "convs": {"layer2.0.conv2": [[100, 1, 1], [28, 3, 1]]}}

LOAD = """
import json, sys
from pathlib import Path
import search
import torch

checkout, genotype = sys.argv[1], json.loads(sys.argv[2])
paths, decoy = list(sys.path), search
model = torch.hub.load(checkout, "nats_resnet18", source="local", genotype=genotype, num_classes=3)
features = torch.hub.load(
    checkout, "nats_resnet18", source="local", genotype=genotype, features_only=True, out_indices=(1, 4)
)
leaked = "detection" in sys.modules

import nats_zoo, nats_zoo.detection, nats_zoo.search
import detection
print(json.dumps(dict(
    outputs=list(model.eval()(torch.zeros(1, 3, 32, 32)).shape),
    maps=len(features(torch.zeros(1, 3, 64, 64))),
    genotype=model.genotype.to_dict(),
    packages={m.__name__: str(Path(m.__file__).parent) for m in (nats_zoo, nats_zoo.detection, nats_zoo.search)},
    decoys=[search.NAME, detection.NAME, search is decoy],
    leaked=leaked,
    paths_restored=sys.path == paths,
    finders=[type(finder).__name__ for finder in sys.meta_path].count("_CheckoutFinder"),
)))
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkout")
    for name in ("nats_zoo", "detection", "search"):
        shutil.copytree(ROOT / name, path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "hubconf.py", path)
    return path


@pytest.fixture(scope="module")
def decoys(tmp_path_factory) -> Path:
    """Packages of a user's own, with the names of two of our folders."""
    path = tmp_path_factory.mktemp("decoys")
    for name in ("search", "detection"):
        (path / name).mkdir()
        (path / name / "__init__.py").write_text(f"NAME = 'decoy {name}'\n")
    return path


def run_python(script: str, *arguments: str | Path, path: list[Path], cwd: Path) -> subprocess.CompletedProcess:
    """Run a script in a Python that sees `path` and then the installed packages, but no editable install."""
    # -S leaves out site-packages and with it the *.pth files, by which an editable install is found.
    command = [sys.executable, "-S", "-c", script, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*path, SITE_PACKAGES]))}
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def test_a_bare_checkout_loads_beside_packages_of_the_same_names(checkout, decoys, tmp_path):
    result = run_python(LOAD, checkout, json.dumps(GENOTYPE), path=[decoys], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["outputs"] == [1, 3]
    assert found["maps"] == 2
    assert found["genotype"] == GENOTYPE
    assert found["packages"] == {
        "nats_zoo": str(checkout / "nats_zoo"),
        "nats_zoo.detection": str(checkout / "detection"),
        "nats_zoo.search": str(checkout / "search"),
    }
    assert found["decoys"] == ["decoy search", "decoy detection", True]
    assert not found["leaked"]
    assert found["paths_restored"]
    assert found["finders"] == 1


def test_a_missing_package_is_named(checkout, tmp_path):
    script = """
import sys
sys.modules["timm"] = None  # as if it were not installed
import torch
torch.hub.load(sys.argv[1], "nats_resnet18", source="local")
"""
    result = run_python(script, checkout, path=[], cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "RuntimeError: Missing dependencies: timm"


def test_an_installed_package_imported_before_stays_whole(checkout, tmp_path):
    """Its detection and search must not come from another version, that of the checkout."""
    installed = tmp_path / "installed"
    shutil.copytree(checkout / "nats_zoo", installed / "nats_zoo")
    for name in ("detection", "search"):
        shutil.copytree(checkout / name, installed / "nats_zoo" / name)
    script = """
import json, sys
import nats_zoo, torch
torch.hub.load(sys.argv[1], "nats_resnet18", source="local", genotype=json.loads(sys.argv[2]))
import nats_zoo.detection, nats_zoo.search
print(nats_zoo.detection.__file__, nats_zoo.search.__file__)
"""
    result = run_python(script, checkout, json.dumps(GENOTYPE), path=[installed], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [
        str(installed / f"nats_zoo/{name}/__init__.py") for name in ("detection", "search")
    ]


@pytest.fixture(scope="module")
def entries():
    """What torch.hub.list offers: everything callable without an underscore."""
    spec = importlib.util.spec_from_file_location("hubconf", ROOT / "hubconf.py")
    hubconf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hubconf)
    return {name: entry for name, entry in vars(hubconf).items() if callable(entry) and not name.startswith("_")}


def test_the_entry_points_are_the_variants(entries):
    assert set(entries) == set(timm.list_models("nats_*", module="nats_resnet"))
    assert all(entry.__name__ == name for name, entry in entries.items())


@pytest.mark.parametrize("architecture", DEFAULT_GENOTYPES)
def test_the_help_of_an_entry_point_says_where_its_genotype_comes_from(architecture, entries):
    """torch.hub.help prints the docstring as it is; titles are the architecture's name, written out."""
    text = entries[f"nats_{architecture}"].__doc__
    title, blank, *arguments = text.splitlines()
    assert re.sub(r"\W", "", title).lower().startswith(architecture.replace("_", ""))
    assert blank == ""
    assert max(map(len, arguments)) <= 120
    for name in ("pretrained:", "genotype:", "**kwargs:"):
        assert f"\n        {name}" in text
    provenance = resolve_genotype(DEFAULT_GENOTYPES[architecture]).provenance
    words = " ".join(text.split())
    if provenance["method"] == "transfer":
        source = {"resnet18": "ResNet-18", "resnet50": "ResNet-50"}[provenance["source_architecture"]]
        assert f"transferred from that of {source}, not searched" in words
    else:
        assert "which was searched" in words


def test_an_entry_point_builds_its_variant(entries):
    with torch.device("meta"):
        for architecture in ("resnext50_32x4d", "resnet50d"):
            model = entries[f"nats_{architecture}"](num_classes=3)
            assert model.genotype == resolve_genotype(DEFAULT_GENOTYPES[architecture])
            assert model.num_classes == 3
