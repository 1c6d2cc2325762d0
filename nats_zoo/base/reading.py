"""Strict reading of plain data that somebody else may have written: JSON's objects, lists, numbers and strings."""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import NatsError, short

MAX_KEY = 256  # characters of a key: error messages quote it


@dataclass(frozen=True)
class Reader:
    """Takes values of the kind that is expected; an error names the source, the key, what was expected and found.

        >>> Reader("costs.json").number(3, "batch", "a positive integer", least=1, kinds=(int,))
        3

    Attributes:
        source: what error messages call the data, such as a file's path.
        error: the class of errors, which all methods raise.
    """

    source: str
    error: type[NatsError] = NatsError

    def wrong(self, key: str, expected: str, found: Any) -> NatsError:
        """Give the error to raise."""
        return self.error(f"{self._where(key)}: expected {expected}, found {short(found)}")

    def _where(self, key: str) -> str:
        return f"{self.source}: {key}" if key else self.source

    def object(self, value: Any, key: str) -> dict[str, Any]:
        """An object whose keys can be printed in a line."""
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            found = type(value).__name__
            raise self.error(f"{self._where(key)}: expected an object with string keys, found {found}")
        for name in value:
            if len(name) > MAX_KEY or not name.isprintable():  # a line break would break an error message in two
                raise self.wrong(key, f"keys of at most {MAX_KEY} printable characters", name)
        return dict(value)

    def keys(self, value: Any, key: str, needed: Sequence[str], others: Iterable[str] = ()) -> dict[str, Any]:
        """An object with the needed keys, perhaps the others, and no further ones."""
        data, known = self.object(value, key), (*needed, *others)
        for name in data:
            if name not in known:
                expected = f"expected only {', '.join(known)}"
                raise self.error(f"{self._where(key)}: unknown key {short(name)}, {expected}")
        for name in needed:
            if name not in data:
                raise self.error(f"{self._where(key)}: key {name!r} is missing")
        return data

    def sequence(self, value: Any, key: str, expected: str, length: int | None = None) -> Sequence[Any]:
        """A list of this length; None: of any but 0."""
        if not isinstance(value, list | tuple) or len(value) != (length or len(value) or 1):
            raise self.wrong(key, expected, value)
        return value

    def number(
        self,
        value: Any,
        key: str,
        expected: str,
        *,
        least: float = -math.inf,
        most: float = sys.float_info.max,
        kinds: tuple[type, ...] = (int, float),
    ) -> Any:
        """A finite number from `least` to `most`, of one of the kinds: true is no integer."""
        if type(value) not in kinds or not max(least, -sys.float_info.max) <= value <= most:  # NaN is refused, too
            raise self.wrong(key, expected, value)
        return value

    def text(self, value: Any, key: str) -> str:
        """A string that is not empty and can be printed in a line."""
        if not isinstance(value, str) or not value or not value.isprintable():
            raise self.wrong(key, "a line of text", value)
        return value

    def one_of(self, value: Any, key: str, known: Iterable[str]) -> str:
        """One of the known strings."""
        names = tuple(known)
        if not isinstance(value, str) or value not in names:
            raise self.wrong(key, f"one of {', '.join(names)}", value)
        return value
