#!/usr/bin/env python3
"""Run tests against the installed wheel, at the dependencies' lowest and at their newest versions.

    python scripts/environments.py --floors python3.10 --newest python3.13 -- tests/models/test_nats_resnet.py -k deploy

For each of the two interpreters a virtual environment is made in --folder, in which the wheel of this checkout is
installed with its `test` extra: in `floors` each dependency at the lower bound that pyproject.toml gives it, in
`newest` as new as the package index has them. The tests are this checkout's, run from another folder, so that only the
wheel can be imported. An environment that is there already is brought up to date rather than made anew.

An environment takes several GB (torch brings CUDA's libraries) and, the first time, minutes to download.
"""

import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("test", "tracking", "video", "export", "benchmarks")
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(?:\[[\w,-]+\])?>=(?P<floor>[\d.]+)")
BUILT_FROM = ("nats_zoo", "detection", "search", "recipes", "pyproject.toml", "README.md", "LICENSE")


def main() -> int:
    """Make the environments and run the tests; returns 0 if all passed, 1 if some did not."""
    options = _parse_options()
    pythons = {"floors": options.floors, "newest": options.newest}
    folder = Path(options.folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    wheel = build_wheel(folder)
    failed = []
    for name, python in pythons.items():
        if python is None:
            continue
        environment = Environment(folder / name, python)
        environment.install(wheel, floors() if name == "floors" else None)
        print(f"\n{name}: {environment.describe()}", flush=True)
        if environment.run_tests(options.tests) != 0:
            failed.append(name)
    print(f"\nfailed: {', '.join(failed)}" if failed else "\nall passed")
    return 1 if failed else 0


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--floors", metavar="PYTHON", help="interpreter for the lowest versions; default: not tested")
    parser.add_argument("--newest", metavar="PYTHON", help="interpreter for the newest versions; default: not tested")
    parser.add_argument("--folder", default=str(ROOT / ".venv-environments"), help="default: %(default)s")
    parser.add_argument(
        "tests", nargs="*", metavar="-- TESTS", help="test files of this checkout (default: all) and options of pytest"
    )
    options = parser.parse_args()
    if options.floors is None and options.newest is None:
        parser.error("expected --floors PYTHON, --newest PYTHON or both")
    return options


def floors() -> dict[str, str]:
    """The lower bounds in pyproject.toml, by the package's name: of the dependencies and of the extras for tests.

    Raises:
        SystemExit: a requirement without one.
    """
    project = _read_project()
    requirements = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional"][extra])]
    bounds = {}
    for requirement in requirements:
        if requirement.startswith(f"{project['name']}["):  # an extra that takes in others
            continue
        match = REQUIREMENT.fullmatch(requirement)
        if match is None:
            raise SystemExit(f"pyproject.toml: {requirement!r}: expected a lower bound and nothing else, NAME>=VERSION")
        bounds[match["name"]] = match["floor"]
    return bounds


def _read_project() -> dict:
    try:
        toml = importlib.import_module("tomllib")
    except ModuleNotFoundError:  # Python 3.10
        toml = importlib.import_module("pip._vendor.tomli")
    project = toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {**project, "optional": project["optional-dependencies"]}


def build_wheel(folder: Path) -> Path:
    """Build the wheel from a copy of the checkout: building writes into its tree."""
    shutil.rmtree(folder / "wheel", ignore_errors=True)
    with tempfile.TemporaryDirectory() as temporary:
        for name in BUILT_FROM:
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, Path(temporary) / name)
        _pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", folder / "wheel", temporary)
    (wheel,) = (folder / "wheel").iterdir()
    print(f"wheel: {wheel.name}, {wheel.stat().st_size / 1024:.0f} KiB", flush=True)
    return wheel


class Environment:
    """A virtual environment.

    Args:
        folder: is created, with the interpreter `python`, unless it is there.
        python: name or path of the interpreter.
    """

    def __init__(self, folder: Path, python: str):
        self.folder = folder
        self.python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        if not self.python.exists():
            subprocess.run([python, "-m", "venv", folder], check=True)
            _pip(self.python, "install", "--upgrade", "pip")

    def install(self, wheel: Path, versions: dict[str, str] | None) -> None:
        """Install the wheel with its test extra, dependencies at exactly these versions; None: at the newest."""
        # The version of our own package may be the same as before.
        _pip(self.python, "install", "--no-deps", "--force-reinstall", wheel)
        arguments = ["--upgrade", "--upgrade-strategy", "eager"]
        if versions is not None:
            constraints = self.folder / "floors.txt"
            constraints.write_text("".join(f"{name}=={version}\n" for name, version in versions.items()))
            arguments = ["--constraint", str(constraints)]
        _pip(self.python, "install", f"{wheel}[test]", *arguments)

    def describe(self) -> str:
        """The versions of Python and of the packages that pyproject.toml names."""
        script = (
            "import json, platform, sys; from importlib.metadata import version\n"
            "print(json.dumps({'python': platform.python_version(), **{n: version(n) for n in sys.argv[1:]}}))"
        )
        command = [self.python, "-c", script, *floors()]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        return ", ".join(f"{name} {version}" for name, version in found.items())

    def run_tests(self, arguments: list[str]) -> int:
        """Run pytest on this checkout's tests from a folder from which only they can be imported; its exit code."""
        tests = [_in_checkout(argument) for argument in arguments]
        if not any(map(_is_test, arguments)):
            tests.append(str(ROOT / "tests"))
        command = [self.python, "-m", "pytest", f"--rootdir={ROOT}", f"--config-file={ROOT / 'pyproject.toml'}"]
        with tempfile.TemporaryDirectory() as folder:
            # `-m` puts the working folder on the path, and the tests import each other.
            (Path(folder) / "tests").symlink_to(ROOT / "tests")
            return subprocess.run([*command, "-p", "no:cacheprovider", *tests], cwd=folder, check=False).returncode


def _in_checkout(argument: str) -> str:
    """A test file's path, with what stands behind its ::, from any folder; options of pytest stay as they are."""
    return str(ROOT / argument) if _is_test(argument) else argument


def _is_test(argument: str) -> bool:
    return (ROOT / argument.partition("::")[0]).is_file()


def _pip(python: str | Path, *arguments: str | Path) -> None:
    command = [python, "-m", "pip", "--disable-pip-version-check", arguments[0], "--quiet", *arguments[1:]]
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(f"pip {' '.join(map(str, arguments))}:\n{result.stderr}")


if __name__ == "__main__":
    sys.exit(main())
