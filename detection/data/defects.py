"""What can be wrong with a data set, and how it is said: one line that names the file, the entry and the key."""

import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeGuard

from ...base.errors import NatsError, one_line


class DataError(NatsError):
    """A data set or a results file that can not be used.

    Example:
        >>> try:
        ...     CocoDataset("instances_val.json", "images")
        ... except DataError as error:
        ...     print(error)  # instances_val.json: image 7: file_name: expected an image file 'images/7.jpg'
    """

    def __init__(self, message: str):
        if message.startswith("Caught "):
            # A DataLoader hands on its worker's error as a whole traceback in one string; the error itself ends it.
            message = message.rpartition("DataError: ")[2].rstrip()
        super().__init__(message)


@dataclass(frozen=True)
class Defect:
    """An image or an object that can not be used.

    Attributes:
        reason: what it is counted under, short: "missing image file", "degenerate box".
        message: one line that names the file, the entry, the key and what was expected.
    """

    reason: str
    message: str


class BadEntry(DataError):
    """Raised by what checks one entry; `reason` is what the entry is counted under when it is left out."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def defect(self) -> Defect:
        """The same as data; a name with a line break in it does not break the line."""
        return Defect(self.reason, one_line(self))


def count(defects: Iterable[Defect]) -> dict[str, int]:
    """How many defects there are, by reason, in order of appearance."""
    return dict(Counter(defect.reason for defect in defects))


def listed(counts: dict[str, int]) -> str:
    """Counts by reason as text: "3 with missing image file, 1 with degenerate box"."""
    return ", ".join(f"{number:,} with {reason}" for reason, number in counts.items())


def is_finite_number(value: object) -> bool:
    """Whether a JSON value is a number, neither NaN nor infinite nor beyond float64."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_positive_int(value: object) -> TypeGuard[int]:
    """Whether a JSON value is an integer above 0; true is none."""
    return type(value) is int and value > 0
