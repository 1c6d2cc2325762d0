"""Dilations and runs: which output channels of a convolution have which dilation."""

import re
from collections import Counter
from collections.abc import Iterable
from itertools import groupby
from typing import Any, Literal, NamedTuple

from ..base.errors import NatsError, short

MAX_CHANNELS = 2**20  # far beyond any network, as the next is beyond any feature map:
MAX_DILATION = 1024  # they keep a damaged file from asking for gigabytes
KINDS = ("plain", "isotropic", "wide", "tall")


class Dilation(NamedTuple):
    """How far apart a kernel's taps lie; equal to the plain tuple `(height, width)`.

    Its methods take plain tuples too, called on the class: `sorted(pairs, key=Dilation.order)`.

        >>> str(Dilation(1, 3)), Dilation.parse("1x3") == (1, 3)
        ('1x3', True)
    """

    height: int
    width: int

    def __repr__(self) -> str:
        return tuple.__repr__(self)

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"

    @classmethod
    def parse(cls, text: str) -> "Dilation":
        """Read text such as '1x3'.

        Raises:
            NatsError: text of another form, or a dilation beyond MAX_DILATION.
        """
        found = re.fullmatch(r"([1-9][0-9]{0,3})x([1-9][0-9]{0,3})", text)
        if not found:
            raise NatsError(f"dilation: expected HEIGHTxWIDTH such as 1x3, found {short(text)}")
        return cls.check((int(found[1]), int(found[2])))

    @classmethod
    def check(cls, value: Any) -> "Dilation":
        """Take a height and a width, in a list or tuple.

        Raises:
            NatsError: something else, or numbers beyond 1 to MAX_DILATION.
        """
        # type() and not isinstance(): True is an int to Python
        is_pair = isinstance(value, list | tuple) and [type(d) for d in value] == [int, int]
        if not is_pair or not 1 <= min(value) <= max(value) <= MAX_DILATION:
            expected = f"a height and a width from 1 to {MAX_DILATION}"
            raise NatsError(f"dilation: expected {expected}, found {short(value)}")
        return cls(*value)

    def kind(self) -> Literal["plain", "isotropic", "wide", "tall"]:
        """Tell what it does to a kernel: nothing, or it widens it equally, or along one axis more than the other."""
        height, width = self
        if height == width:
            return "plain" if height == 1 else "isotropic"
        return "wide" if width > height else "tall"

    def name(self) -> str:
        """Give the name in pictures and reports: `1`, `2`, `3` when it is isotropic, else height×width: `1×3`."""
        height, width = self
        return str(height) if height == width else f"{height}×{width}"

    def order(self) -> tuple[bool, int, int]:
        """Key to sort by, in tables: isotropic ones first."""
        height, width = self
        return height != width, height, width


PLAIN = Dilation(1, 1)


class Run(NamedTuple):
    """Consecutive output channels with one dilation.

    >>> Run(80, 1, 3).dilation == (1, 3)
    True
    """

    channels: int
    dilation_h: int
    dilation_w: int

    @property
    def dilation(self) -> Dilation:
        return Dilation(self.dilation_h, self.dilation_w)


class Runs(tuple[Run, ...]):
    """All runs of a convolution, in output-channel order; equal to the plain tuple of them.

        >>> runs = Runs([(2, 1, 1), (1, 1, 3)])
        >>> runs.channels, runs.counts() == {(1, 1): 2, (1, 3): 1}, Runs.of(runs.per_channel()) == runs
        (3, True, True)

    Args:
        runs: (channels, dilation_h, dilation_w) each.
    """

    __slots__ = ()

    def __new__(cls, runs: Iterable[Iterable[int]] = ()) -> "Runs":
        return super().__new__(cls, (Run(*run) for run in runs))

    @classmethod
    def of(cls, dilations: Iterable[tuple[int, int]], each: int = 1) -> "Runs":
        """The fewest runs for one dilation per output channel, or per group of `each` channels."""
        return cls((each * len(list(same)), *dilation) for dilation, same in groupby(dilations))

    @property
    def channels(self) -> int:
        return sum(run.channels for run in self)

    def counts(self) -> Counter[Dilation]:
        """Output channels per dilation, in order of appearance."""
        counts: Counter[Dilation] = Counter()
        for run in self:
            counts[run.dilation] += run.channels
        return counts

    def per_channel(self) -> list[Dilation]:
        """The dilation of each output channel."""
        return [dilation for run in self for dilation in [run.dilation] * run.channels]

    def merged(self) -> "Runs":
        """The same with neighbouring runs of one dilation as one."""
        groups = groupby(self, key=lambda run: run.dilation)
        return Runs((sum(run.channels for run in same), *dilation) for dilation, same in groups)
