"""The wheel, built and installed without network: all three packages and the genotypes are inside."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.test_hubconf import GENOTYPE, ROOT, run_python

FOLDERS = {"nats_zoo": "nats_zoo", "detection": "nats_zoo/detection", "search": "nats_zoo/search"}

IMPORT = """
import json
import nats_zoo, nats_zoo.detection, nats_zoo.search
files = [module.__file__ for module in (nats_zoo, nats_zoo.detection, nats_zoo.search)]
print(json.dumps(dict(files=files, genotypes=nats_zoo.published_genotypes(), version=nats_zoo.__version__)))
"""


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what the wheel is built from (building writes into its tree), with one genotype more."""
    path = tmp_path_factory.mktemp("source")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, path)
    (path / "nats_zoo" / "genotypes" / "probe.json").write_text(json.dumps(GENOTYPE))
    return path


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    pip("wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", source / "dist", source)
    (path,) = (source / "dist").iterdir()
    return path


def test_the_wheel_holds_every_module_and_genotype_and_nothing_else(source, wheel):
    expected = {
        f"{place}/{file.relative_to(source / name).as_posix()}"
        for name, place in FOLDERS.items()
        for pattern in ("*.py", "*.json")
        for file in (source / name).rglob(pattern)
    }
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert "nats_zoo/genotypes/probe.json" in expected


def test_the_installed_wheel_imports_from_another_folder(source, wheel, tmp_path):
    target = tmp_path / "target"
    pip("install", "--no-deps", "--no-index", "--target", target, wheel)
    result = run_python(IMPORT, path=[target], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    places = ("nats_zoo", "nats_zoo/detection", "nats_zoo/search")
    assert found["files"] == [str(target / place / "__init__.py") for place in places]
    assert found["genotypes"] == sorted(path.stem for path in (source / "nats_zoo" / "genotypes").iterdir())
    assert f"-{found['version']}-" in wheel.name
    assert "nats = nats_zoo.cli:main" in next(target.glob("nats_zoo-*.dist-info/entry_points.txt")).read_text()
