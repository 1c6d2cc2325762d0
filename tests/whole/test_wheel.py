"""Wheel and sdist, built and installed without network: what is inside, and that it works from another folder."""

import email
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from nats_zoo.cli.recipes import recipe_names
from tests.whole.test_hubconf import GENOTYPE, ROOT, run_python

FOLDERS = {
    "nats_zoo": "nats_zoo",
    "detection": "nats_zoo/detection",
    "search": "nats_zoo/search",
    "recipes": "nats_zoo/recipes",
}
KINDS = {".py", ".json", ".yaml", ".j2", ".typed"}
LARGEST_WHEEL = 600 * 1024  # bytes; text alone
LARGEST_SDIST = 4 * 2**20  # the pictures of docs/
# Of the checkout's top level; data, weights and runs may lie there too.
OTHER_FOLDERS = ("tests", "docs", "benchmarks", "scripts", ".ci", ".github")
FILES = ("*.py", "*.md", "*.toml", "*.in", "*.cff", "LICENSE", "Makefile")

USE = """
import importlib, json, pkgutil
import nats_zoo, nats_zoo.detection, nats_zoo.search
from nats_zoo.cli import main

files = [module.__file__ for module in (nats_zoo, nats_zoo.detection, nats_zoo.search)]
codes = [main(["recipes"]), main(["recipes", "small_data", "coco_fasterrcnn_r50_1x"])]
modules = [info.name for info in pkgutil.walk_packages(nats_zoo.__path__, "nats_zoo.") if "__main__" not in info.name]
for module in modules:
    importlib.import_module(module)
genotypes, version = nats_zoo.published_genotypes(), nats_zoo.__version__
print(json.dumps(dict(files=files, genotypes=genotypes, version=version, codes=codes, modules=modules)))
"""


def run(*command: str | Path, cwd: Path | None = None) -> None:
    command = [sys.executable, *map(str, command)]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def pip(*arguments: str | Path) -> None:
    run("-m", "pip", "--disable-pip-version-check", *arguments)


def build_wheel(source: Path, folder: Path) -> Path:
    pip("wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", folder, source)
    (path,) = folder.iterdir()
    return path


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the checkout (building writes into its tree), with one genotype more."""
    path = tmp_path_factory.mktemp("source") / "checkout"
    for name in (*FOLDERS, *OTHER_FOLDERS):
        shutil.copytree(ROOT / name, path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for pattern in FILES:
        for file in ROOT.glob(pattern):
            shutil.copy(file, path)
    (path / "nats_zoo" / "genotype" / "published" / "probe.json").write_text(json.dumps(GENOTYPE))
    return path


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run("-c", "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])", folder, cwd=source)
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    shutil.unpack_archive(sdist, folder, filter="data")
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_every_module_genotype_and_recipe_and_nothing_else(source, wheel):
    expected = {
        f"{place}/{file.relative_to(source / name).as_posix()}"
        for name, place in FOLDERS.items()
        for file in (source / name).rglob("*")
        if file.suffix in KINDS
    }
    names = {name for name in contents(wheel) if ".dist-info/" not in name}
    assert names == expected
    assert {
        "nats_zoo/genotype/published/probe.json",
        "nats_zoo/recipes/small_data.yaml",
        "nats_zoo/py.typed",
        "nats_zoo/detection/py.typed",
        "nats_zoo/search/py.typed",
    } <= names
    assert wheel.stat().st_size < LARGEST_WHEEL


def test_the_wheel_says_what_it_needs(wheel):
    """hubconf.py, which reads pyproject.toml by itself, finds the same dependencies."""
    found = contents(wheel)
    (name,) = (name for name in found if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(found[name])
    assert metadata["License-Expression"] == "Apache-2.0"
    assert name.replace("METADATA", "licenses/LICENSE") in found
    assert {"test", "dev", "export", "tracking", "video"} <= set(metadata.get_all("Provides-Extra"))
    lines = [line.partition(";")[0] for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    needed = dict(re.fullmatch(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", line).groups() for line in lines)
    spec = importlib.util.spec_from_file_location("hubconf", ROOT / "hubconf.py")
    hubconf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hubconf)
    assert hubconf._requirements() == needed


def test_the_installed_wheel_works_from_another_folder(source, wheel, tmp_path):
    target = tmp_path / "target"
    pip("install", "--no-deps", "--no-index", "--target", target, wheel)
    result = run_python(USE, path=[target], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    *printed, last = result.stdout.splitlines()
    found = json.loads(last)
    places = ("nats_zoo", "nats_zoo/detection", "nats_zoo/search")
    assert found["files"] == [str(target / place / "__init__.py") for place in places]
    assert found["genotypes"] == sorted(
        path.stem for path in (source / "nats_zoo" / "genotype" / "published").iterdir()
    )
    assert f"-{found['version']}-" in wheel.name
    assert "nats = nats_zoo.cli:main" in next(target.glob("nats_zoo-*.dist-info/entry_points.txt")).read_text()
    assert found["codes"] == [0, 0]
    files = [path.relative_to(target).with_suffix("") for path in (target / "nats_zoo").rglob("*.py")]
    names = {".".join(file.parts).removesuffix(".__init__") for file in files} - {"nats_zoo", "nats_zoo.__main__"}
    assert set(found["modules"]) == names  # each a package's or a module's, and all were imported
    assert [line.split()[0] for line in printed[: len(recipe_names())]] == recipe_names()
    for name in ("small_data", "coco_fasterrcnn_r50_1x"):  # where the commands at their heads look for them
        assert (tmp_path / f"recipes/{name}.yaml").read_text() == (ROOT / f"recipes/{name}.yaml").read_text()


def test_the_sdist_builds_the_same_wheel(unpacked, wheel, tmp_path):
    assert contents(build_wheel(unpacked, tmp_path / "again")) == contents(wheel)


def test_the_sdist_has_all_of_the_checkout(source, sdist):
    """So all that the tests need; setuptools adds what it knows of the package."""
    files = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    files = {path for path in files if not path.startswith(("build/", "nats_zoo.egg-info/"))}
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    added = {path for path in packed if not path.startswith("nats_zoo.egg-info/")} - {"PKG-INFO", "setup.cfg"}
    assert added == files
    assert sdist.stat().st_size < LARGEST_SDIST
