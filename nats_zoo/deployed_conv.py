"""The deployment form of a regrouped convolution: few wide convolutions instead of many narrow ones.

A convolution that gives a handful of channels leaves most of a processor's vector lanes idle: 16 dilations of four
channels each take four times as long as the plain 64 channels. Dilations (dh, dw) that share dw are therefore computed
together, by one convolution a single row high, as wide as the kernel, with dilation dw. It gives each row of the kernel
as channels of its own; adding these up, each shifted by its multiple of dh rows, is what the dilation dh means:

    y[c, i, j] = sum_r z[r, c, i + (r - kh // 2) * dh, j],    z[r] = conv2d(x, w[:, :, r], dilation dw)

Same multiply-adds, kh times the output to write, and as many convolutions as there are different dw.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from .genotype import Dilation, Run
from .regrouped_conv import argsort, split_channels


class _Part(NamedTuple):
    """The output channels of one dilation."""

    dilation: Dilation
    channels: list[int]


class _Geometry(NamedTuple):
    """Of the plain convolution, by axis (height, width)."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def padding_at(self, dilation: Dilation) -> tuple[int, int]:
        """What keeps output size and tap centre at another dilation."""
        rows, columns = (
            p + (d - 1) * d0 * (k - 1) // 2
            for p, d, d0, k in zip(self.padding, dilation, self.dilation, self.kernel_size, strict=True)
        )
        return rows, columns

    def dilation_at(self, dilation: Dilation) -> tuple[int, int]:
        """A run's dilation multiplies the convolution's own."""
        return dilation[0] * self.dilation[0], dilation[1] * self.dilation[1]

    def keeps_rows(self) -> bool:
        """Whether the output has the input's rows, so that shifting output rows is shifting input rows."""
        return self.stride[0] == 1 and 2 * self.padding[0] == (self.kernel_size[0] - 1) * self.dilation[0]


class DeployedConv2d(nn.Module):
    """What a RegroupedConv2d computes, for inference only: gains folded, kernels stored as they are used.

    Args:
        weight: (out_channels, in_channels, kh, kw), gains applied.
        bias: (out_channels,) or None.
        runs: as RegroupedConv2d's.
        stride, padding, dilation: the plain convolution's, by axis.

    Shape:
        input (N, in_channels, H, W), output (N, out_channels, H', W') as the RegroupedConv2d's, channels in its order.
    """

    is_deployed = True

    # What TorchScript can not tell from the values alone.
    _sizes: list[list[int]]
    _order: list[int]

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        runs: Sequence[Run],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
    ):
        super().__init__()
        self.runs = tuple(runs)
        geometry = _Geometry(tuple(weight.shape[2:]), stride, padding, dilation)
        groups = list(_share_columns(_parts(self.runs), geometry))
        self.steps = nn.ModuleList(_build_step(group, weight, bias, geometry) for group in groups)
        self._sizes, self._order = _plan_order([[c for part in group for c in part.channels] for group in groups])

    def forward(self, x: Tensor) -> Tensor:
        pieces: list[Tensor] = []
        for i, step in enumerate(self.steps):
            pieces.extend(split_channels(step(x), self._sizes[i]))
        return pieces[0] if len(pieces) == 1 else torch.cat([pieces[i] for i in self._order], 1)

    def extra_repr(self) -> str:
        return f"runs={[tuple(run) for run in self.runs]}"


class RowsConv2d(nn.Module):
    """Several dilations (dh, dw) with the same dw, as one convolution of a single row and shifted sums of its channels.

    Args:
        weight: (channels, in_channels, kh, kw), the dilations' channels one after the other.
        bias: (channels,) or None.
        sizes: channels of each dilation.
        dilations_h: dh of each dilation, times the convolution's own.
        stride_w, padding_w, dilation_w: along the width.

    Shape:
        input (N, in_channels, H, W), output (N, channels, H, W').
    """

    _parts: list[tuple[int, int, int]]

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        sizes: Sequence[int],
        dilations_h: Sequence[int],
        stride_w: int,
        padding_w: int,
        dilation_w: int,
    ):
        super().__init__()
        channels, in_channels, self.rows, width = weight.shape
        self.channels = channels
        stops = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        self._parts = [(stop - size, stop, d) for stop, size, d in zip(stops, sizes, dilations_h, strict=True)]
        rows = weight.permute(2, 0, 1, 3).reshape(self.rows * channels, in_channels, 1, width)
        if bias is not None:  # it belongs to the sum: once, on the row that is not shifted
            bias = F.pad(bias, (self.rows // 2 * channels,) * 2)
        self.conv = _conv(rows, bias, (1, stride_w), (0, padding_w), (1, dilation_w))

    def forward(self, x: Tensor) -> Tensor:
        return _add_shifted_rows(self.conv(x), self.rows, self.channels, self._parts)


def _add_shifted_rows(z: Tensor, rows: int, channels: int, parts: list[tuple[int, int, int]]) -> Tensor:
    """Sum over the kernel's rows: (N, rows * channels, H, W) -> (N, channels, H, W); `z` is overwritten.

    Args:
        parts: first and last (exclusive) channel of each dilation, and its dh.
    """
    centre = rows // 2
    if not torch.jit.is_scripting():  # noqa: SIM102 (what follows is nothing that TorchScript could compile)
        if torch.compiler.is_compiling():  # without writing in place, which compilers have to undo
            return torch.cat([_sum_of_rows(z, rows, channels, part) for part in parts], 1)
    y = z[:, centre * channels : (centre + 1) * channels]
    for start, stop, dilation in parts:
        for row in range(1, centre + 1):
            shift = row * dilation
            above, below = (centre - row) * channels, (centre + row) * channels
            y[:, start:stop, shift:].add_(z[:, above + start : above + stop, :-shift])
            y[:, start:stop, :-shift].add_(z[:, below + start : below + stop, shift:])
    return y


torch.fx.wrap("_add_shifted_rows")  # fx would drop the additions in place as dead code


def _sum_of_rows(z: Tensor, rows: int, channels: int, part: tuple[int, int, int]) -> Tensor:
    """`_add_shifted_rows` for one dilation, without writing in place."""
    start, stop, dilation = part
    centre = rows // 2
    y = z[:, centre * channels + start : centre * channels + stop]
    for row in range(1, centre + 1):
        shift, height = row * dilation, z.shape[2]
        above, below = (centre - row) * channels, (centre + row) * channels
        y = y + F.pad(z[:, above + start : above + stop], (0, 0, shift, 0))[:, :, :height]
        y = y + F.pad(z[:, below + start : below + stop], (0, 0, 0, shift))[:, :, shift:]
    return y


def sort_key(dilation: Dilation) -> tuple[int, int]:
    """Channels in this order of their dilations have nothing to be put back in order."""
    return dilation[1], dilation[0]


def _parts(runs: Sequence[Run]) -> list[_Part]:
    """The channels of each dilation, in the order of `sort_key`."""
    channels: dict[Dilation, list[int]] = {}
    start = 0
    for run in runs:
        channels.setdefault(run.dilation, []).extend(range(start, start + run.channels))
        start += run.channels
    return [_Part(dilation, channels[dilation]) for dilation in sorted(channels, key=sort_key)]


def _share_columns(parts: list[_Part], geometry: _Geometry) -> Iterator[list[_Part]]:
    """Which dilations are computed together: those with the same dw, where that is possible."""
    if not geometry.keeps_rows():
        yield from ([part] for part in parts)
        return
    for dilation_w in dict.fromkeys(part.dilation[1] for part in parts):
        yield [part for part in parts if part.dilation[1] == dilation_w]


def _build_step(group: list[_Part], weight: Tensor, bias: Tensor | None, geometry: _Geometry) -> nn.Module:
    channels = [c for part in group for c in part.channels]
    weight, bias = weight[channels], None if bias is None else bias[channels]
    first = group[0].dilation
    padding, dilation = geometry.padding_at(first), geometry.dilation_at(first)
    if len(group) == 1:
        return _conv(weight, bias, geometry.stride, padding, dilation)
    sizes = [len(part.channels) for part in group]
    dilations_h = [geometry.dilation_at(part.dilation)[0] for part in group]
    return RowsConv2d(weight, bias, sizes, dilations_h, geometry.stride[1], padding[1], dilation[1])


def _conv(weight: Tensor, bias: Tensor | None, stride, padding, dilation) -> nn.Conv2d:
    out_channels, in_channels = weight.shape[:2]
    options = dict(stride=stride, padding=padding, dilation=dilation, bias=bias is not None, device="meta")
    conv = nn.Conv2d(in_channels, out_channels, tuple(weight.shape[2:]), **options)
    conv.weight = nn.Parameter(weight.contiguous())
    if bias is not None:
        conv.bias = nn.Parameter(bias)
    return conv


def _plan_order(groups: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """How to put channels that come in groups back into the order 0, 1, 2, ...

    Returns:
        Sizes of the pieces to cut each group into, and the order of the pieces.
    """
    sizes: list[list[int]] = []
    starts: list[int] = []
    for channels in groups:
        sizes.append([])
        for i, channel in enumerate(channels):
            follows = i > 0 and channel == channels[i - 1] + 1
            if follows:
                sizes[-1][-1] += 1
            else:
                sizes[-1].append(1)
                starts.append(channel)
    return sizes, argsort(starts)
