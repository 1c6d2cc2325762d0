#!/usr/bin/env python3
"""Build what a release uploads, check it, try it in a fresh environment, and say how to upload it.

    python scripts/release_check.py

Needs the packages build and twine, and the package index: the wheel's dependencies go into a new virtual environment
(several GB, as torch brings CUDA's libraries); --borrow takes this interpreter's instead.
"""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Do all of it; returns 0, or raises SystemExit with the step that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--borrow", action="store_true", help="use this interpreter's dependencies")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="folder for sdist and wheel, emptied first")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        scratch = Path(name)
        files = build(scratch, options.output)
        _step("metadata and README", sys.executable, "-m", "twine", "check", "--strict", *files)
        python = install(scratch / "environment", next(file for file in files if file.suffix == ".whl"), options.borrow)
        # From another folder, so that only the wheel can be imported.
        _step("every command", python, ROOT / "scripts" / "smoke.py", cwd=scratch)
    print("\nReady. Upload:", *(f"  {file.name}  {file.stat().st_size / 1024:.0f} KiB" for file in files), sep="\n")
    print(f"\n    python -m twine upload {' '.join(str(file) for file in files)}")
    return 0


def build(scratch: Path, output: Path) -> list[Path]:
    """sdist and, from it, the wheel, of what git tracks: building writes into its tree."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    source = scratch / "source"
    for name in filter(None, listed.stdout.split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    shutil.rmtree(output, ignore_errors=True)
    _step("sdist and wheel", sys.executable, "-m", "build", "--outdir", output, source, quiet=True)
    return sorted(output.iterdir())


def install(folder: Path, wheel: Path, borrow: bool) -> Path:
    """The interpreter of a new environment that has the wheel."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if borrow:
        place = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        # An editable install of the package is not seen there: its own .pth file is not followed.
        (Path(place.stdout.strip()) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    _step("installation", python, "-m", "pip", "install", "--quiet", *(["--no-deps"] if borrow else []), wheel)
    return python


def _step(what: str, *command: str | Path, cwd: Path = ROOT, quiet: bool = False) -> None:
    print(f"\n== {what}", flush=True)
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} if quiet else {}
    done = subprocess.run([str(part) for part in command], cwd=cwd, check=False, **output)
    if done.returncode != 0:
        raise SystemExit(f"{done.stdout or ''}\nrelease_check: {what}: failed")


if __name__ == "__main__":
    sys.exit(main())
