"""Reading JSON and YAML within limits; files and folders that are whole or absent: written beside, then renamed.

A file that is read may be someone else's: damaged, or made to take all memory or time. So its bytes, its nesting and
its numbers' digits are limited unless a caller lifts that (for COCO's annotations, which are large and many).
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from .errors import NatsError, one_line, short

MAX_BYTES = 8 * 2**20  # of a JSON file: configs and genotypes have kilobytes
MAX_LEVELS = 80  # of lists and objects within each other: they are read, written and compared recursively
MAX_DIGITS = 4300  # of an integer, as Python's own limit, which its first 3.10 releases lack: conversion is quadratic
MAX_YAML_BYTES = 2**20  # a pure Python parser reads it, in some seconds
MAX_YAML_LEVELS = 16
MAX_YAML_VALUES = 50_000  # each takes about 2 kB while it is read
MAX_PLAIN_CHARACTERS = 1000  # of a YAML value without quotes, which may be a number in YAML's base 60
DIGEST_BYTES = 2**20  # in memory at a time


class TooLargeError(ValueError):
    """A file has more bytes than its reader takes.

    try:
        content = read_limited("log.jsonl", 2**20)
    except TooLargeError as error:
        print(error)
    """


def read_limited(path: str | os.PathLike, most_bytes: int | None) -> bytes:
    """Read a file's bytes; of a larger one no more is read than shows that it is.

        >>> content = read_limited("log.jsonl", 2**20)

    Raises:
        OSError: it can not be read.
        TooLargeError: it has over `most_bytes` bytes.
    """
    with open(path, "rb") as file:
        content = file.read(-1 if most_bytes is None else most_bytes + 1)
    if most_bytes is not None and len(content) > most_bytes:
        raise TooLargeError(f"it has more than {most_bytes} bytes")
    return content


def _read_content(path: str | os.PathLike, most_bytes: int | None, error: type[NatsError]) -> bytes:
    try:
        return read_limited(path, most_bytes)
    except OSError as problem:
        raise error(f"{path}: can not be read: {problem.strerror}") from problem
    except TooLargeError as problem:
        raise error(f"{path}: too large, expected at most {most_bytes} bytes") from problem


def read_json(
    path: str | os.PathLike,
    error: type[NatsError] = NatsError,
    most_bytes: int | None = MAX_BYTES,
    most_levels: int | None = MAX_LEVELS,
) -> Any:
    """Read a JSON file in which no object has a key twice.

        >>> read_json("runs/a/run.json")["epochs"]
        12

    Args:
        path: the file.
        error: the class of what is raised.
        most_bytes: a larger file is refused, unread; None: any size is read, and of a key that comes twice the last
            one counts.
        most_levels: of lists and objects within each other; None: as many as Python reads.

    Raises:
        NatsError: of class `error`; the file can not be read, is too large, or is not JSON of this kind.
    """
    content = _read_content(path, most_bytes, error)
    if not content.strip():
        raise error(f"{path}: not JSON: the file is empty")
    data = parse_json(content, str(path), error, strict=most_bytes is not None)
    if most_levels is not None and is_deeper(data, most_levels):
        raise error(f"{path}: nested too deeply, expected at most {most_levels} levels")
    return data


def parse_json(content: bytes, source: str, error: type[NatsError] = NatsError, strict: bool = True) -> Any:
    """Parse JSON text.

        >>> parse_json(b'{"a": 1}', "line 1")
        {'a': 1}

    Args:
        content: UTF-8.
        source: what error messages call it.
        error: the class of what is raised.
        strict: refuse an object with the same key twice, and integers of over MAX_DIGITS digits on any Python.

    Raises:
        NatsError: of class `error`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise error(f"{source}: key {short(_first_repeated(key for key, _ in pairs))} appears twice in one object")
        return found

    hooks: dict[str, Any] = {"object_pairs_hook": unique, "parse_int": _parse_int} if strict else {}
    try:
        return json.loads(content.decode("utf-8-sig"), **hooks)
    except RecursionError as problem:
        raise error(f"{source}: not JSON of a kind read here: nested too deeply") from problem
    except NatsError:  # from the hook
        raise
    except UnicodeDecodeError as problem:
        raise error(f"{source}: not JSON: not UTF-8 text") from problem
    except ValueError as problem:  # not JSON, or an integer with more digits than Python converts
        raise error(f"{source}: not JSON: {problem}") from problem


def _first_repeated(keys: Iterable[Any]) -> Any:
    seen = set()
    for key in keys:
        if key in seen:
            return key
        seen.add(key)
    return None


def _parse_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits, expected at most {MAX_DIGITS}")
    return int(digits)


def is_deeper(value: Any, levels: int) -> bool:
    """Tell whether lists and objects lie within each other on more than so many levels.

    >>> is_deeper([[1]], 1), is_deeper([[1]], 2)
    (True, False)
    """
    if not isinstance(value, list | dict):
        return False
    return levels == 0 or any(
        is_deeper(item, levels - 1) for item in (value.values() if isinstance(value, dict) else value)
    )


def read_yaml(path: str | os.PathLike, error: type[NatsError] = NatsError) -> Any:
    """Read a YAML file of plain data: no tags of Python's, no aliases, no key twice in one mapping.

    Aliases are refused because a few lines of them stand for gigabytes (the "billion laughs").

        >>> read_yaml("space.yaml")
        {2: [1, 2, [1, 3]]}

    Args:
        path: the file; at most MAX_YAML_BYTES, and MAX_YAML_LEVELS of lists and mappings within each other.
        error: the class of what is raised.

    Raises:
        NatsError: of class `error`; the file can not be read, is too large, or is not YAML of this kind.
    """
    content = _read_content(path, MAX_YAML_BYTES, error)
    loader = None
    try:
        loader = _LimitedLoader(content.decode("utf-8-sig"))
        return loader.get_single_data()
    except RecursionError as problem:
        raise error(f"{path}: not YAML of a kind read here: nested too deeply") from problem
    except Exception as problem:  # PyYAML lets through what dates, numbers and keys of the wrong kind raise
        raise error(f"{path}: not YAML of a kind read here: {one_line(problem)[:400]}") from problem
    finally:
        if loader is not None:
            loader.dispose()


class _LimitedLoader(yaml.SafeLoader):
    """PyYAML's loader of plain data, which refuses what takes unbounded time or memory."""

    _level = 0
    _values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        self._values += 1
        if problem := self._problem(event):
            raise yaml.YAMLError(f"line {event.start_mark.line + 1}: {problem}")
        self._level += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._level -= 1

    def _problem(self, event: yaml.Event) -> str | None:
        if isinstance(event, yaml.AliasEvent):
            return f"an alias, *{event.anchor[:40]}; write it out"
        if isinstance(event, yaml.ScalarEvent) and event.implicit[0] and len(event.value) > MAX_PLAIN_CHARACTERS:
            return f"over {MAX_PLAIN_CHARACTERS} characters without quotes"
        if self._level > MAX_YAML_LEVELS:
            return f"nested too deeply, expected at most {MAX_YAML_LEVELS} levels"
        return f"over {MAX_YAML_VALUES} values" if self._values > MAX_YAML_VALUES else None

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        found = super().construct_mapping(node, deep)
        if len(found) != len(node.value):
            twice = _first_repeated(self.construct_object(key, deep) for key, _ in node.value)
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: key {short(twice)} appears twice")
        return found


def file_digest(path: str | os.PathLike, algorithm: str, prefix: bytes = b"") -> str:
    """Hash a file: hexadecimal digits, with `prefix` before its content; it may be larger than memory.

    >>> len(file_digest("model.safetensors", "sha256"))
    64
    """
    digest = hashlib.new(algorithm, prefix, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(DIGEST_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a path to write to; it takes the place of `path` when the block ends well, else it vanishes.

    >>> with atomic_file("chart.png") as scratch:
    ...     figure.savefig(scratch)
    """
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
    """Yield a folder to fill; it replaces `path` when the block ends well, else it vanishes.

    >>> with atomic_folder("runs/a/best") as scratch:
    ...     write_json(scratch / "config.json", {})
    """
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
    """Write a text file atomically.

    >>> write_text("note.txt", "whole or absent")
    """
    with atomic_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8", newline="\n")  # the same bytes on Windows


def write_json(path: str | os.PathLike, data: Any) -> None:
    """Write data as indented JSON, atomically.

    >>> write_json("run.json", {"epochs": 12})
    """
    write_text(path, json.dumps(data, indent=2) + "\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def output_file(path: str | os.PathLike) -> Path:
    """The path of a file to be written, seen to be possible before the work for it begins; NatsError if it is not."""
    target = Path(path)
    if not target.parent.is_dir():
        raise NatsError(f"output: {path}: there is no folder {target.parent}")
    if target.is_dir():
        raise NatsError(f"output: {path}: expected a file, found a folder")
    return target
