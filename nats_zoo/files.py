"""Reading JSON with errors for people; files and folders that are whole or absent: written beside, then renamed."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import NatsError


def read_json(
    path: str | os.PathLike,
    error: type[NatsError] = NatsError,
    most_bytes: int | None = None,
    object_pairs_hook: Callable | None = None,
) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        error: the class of what is raised.
        most_bytes: a larger file is refused, unread.
        object_pairs_hook: as for `json.loads`.

    Raises:
        NatsError: of class `error`; the file can not be read, is too large, or is not JSON.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(-1 if most_bytes is None else most_bytes + 1)
    except OSError as problem:
        raise error(f"{path}: can not be read: {problem.strerror}") from problem
    if most_bytes is not None and len(content) > most_bytes:
        raise error(f"{path}: too large, expected at most {most_bytes} bytes")
    if not content.strip():
        raise error(f"{path}: not JSON: the file is empty")
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=object_pairs_hook)
    except RecursionError as problem:
        raise error(f"{path}: not JSON of a kind read here: nested too deeply") from problem
    except NatsError:  # from the hook
        raise
    except UnicodeDecodeError as problem:
        raise error(f"{path}: not JSON: not UTF-8 text") from problem
    except ValueError as problem:  # not JSON, or an integer with more digits than Python converts
        raise error(f"{path}: not JSON: {problem}") from problem


@contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a path to write to; it takes the place of `path` when the block ends well, else it vanishes."""
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=path.suffix)
    os.close(handle)
    scratch = Path(name)
    try:
        yield scratch
        scratch.chmod(0o666 & ~_umask())  # mkstemp is private to its owner, a result is not
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a folder to fill; it replaces `path` when the block ends well, else it vanishes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix="."))
    new, old = scratch / "new", scratch / "old"
    new.mkdir()
    try:
        yield new
        _put_in_place(new, path, old)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _put_in_place(new: Path, path: Path, old: Path) -> None:
    """Rename `new` to `path`; what was there becomes `old`, or comes back if that fails."""
    if not path.exists():
        os.replace(new, path)
        return
    os.replace(path, old)
    try:
        os.replace(new, path)
    except BaseException:  # a Ctrl-C too
        os.replace(old, path)
        raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file atomically."""
    with atomic_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, data: Any) -> None:
    """Write data as indented JSON, atomically."""
    write_text(path, json.dumps(data, indent=2) + "\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
