"""Dilations and runs: which output channels of a convolution have which dilation."""

from collections.abc import Iterable
from typing import NamedTuple

from ..base.errors import NatsError

MAX_CHANNELS = 2**20  # far beyond any network, as the next is beyond any feature map:
MAX_DILATION = 1024  # they keep a damaged file from asking for gigabytes
Dilation = tuple[int, int]
PLAIN: Dilation = (1, 1)


def parse_dilation(text: str) -> Dilation:
    """(height, width) from text such as '1x3'.

    Raises:
        NatsError: text of another form.
    """
    height, cross, width = text.partition("x")
    if not (cross and height.isdecimal() and width.isdecimal()):
        raise NatsError(f"dilation: expected HEIGHTxWIDTH such as 1x3, found {text!r}")
    dilation = (int(height), int(width))
    check_dilation(dilation)
    return dilation


def dilation_text(dilation: Dilation) -> str:
    """'1x3' for (1, 3)."""
    return f"{dilation[0]}x{dilation[1]}"


def check_dilation(dilation: Dilation) -> None:
    if len(dilation) != 2 or any(type(d) is not int or not 1 <= d <= MAX_DILATION for d in dilation):
        raise NatsError(f"dilation: expected a height and a width from 1 to {MAX_DILATION}, found {dilation}")


class Run(NamedTuple):
    """Consecutive output channels with one dilation."""

    channels: int
    dilation_h: int
    dilation_w: int

    @property
    def dilation(self) -> Dilation:
        return (self.dilation_h, self.dilation_w)


def runs_from_channels(dilations: Iterable[Dilation]) -> tuple[Run, ...]:
    """Runs from one dilation per output channel; neighbours with the same dilation become one run."""
    runs: list[Run] = []
    for dilation in dilations:
        if runs and runs[-1].dilation == dilation:
            runs[-1] = runs[-1]._replace(channels=runs[-1].channels + 1)
        else:
            runs.append(Run(1, *dilation))
    return tuple(runs)


def dilation_order(dilation: Dilation) -> tuple[bool, Dilation]:
    return (dilation[0] != dilation[1], dilation)  # isotropic ones first
