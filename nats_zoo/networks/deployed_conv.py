"""The deployment form of a regrouped convolution: few wide convolutions instead of many narrow ones.

A convolution that gives a handful of channels leaves most of a processor's vector lanes idle: 16 dilations of four
channels each take four times as long as the plain 64 channels. Narrow dilations (dh, dw) that share dw are therefore
computed together, by one convolution a single row high, as wide as the kernel, with dilation dw. It gives each row of
the kernel as channels of its own; adding these up, each shifted by its multiple of dh rows, is what dh means:

    y[c, i, j] = sum_r z[r, c, i + (r - kh // 2) * dh, j],    z[r] = conv2d(x, w[:, :, r], dilation dw)

At stride s, output row i reads input row s * i + (r - kh // 2) * dh: a row of one of the s images that every s-th input
row makes, at a fixed distance. So each of these images has a convolution, of the kernel rows that read it. The
multiply-adds are the plain convolution's, the output to write is kh times as large, and there are s convolutions for
each dw.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from ..genotype.runs import Dilation, Runs
from .geometry import Geometry, argsort, split_channels

# How many channels oneDNN computes at a time: the float32 lanes of AVX-512.
VECTOR = 16
# How much wider than the channels their vectors must be, for sharing columns to repay its additions.
WASTE = 1.5


class _Part(NamedTuple):
    """The output channels of one dilation."""

    dilation: Dilation
    channels: list[int]


class DeployedConv2d(nn.Module):
    """What a RegroupedConv2d computes, for inference only: gains folded, kernels stored as they are used.

        >>> conv = RegroupedConv2d(8, 64, 3, padding=1, runs=[(48, 1, 1), (16, 1, 3)])
        >>> deployed = DeployedConv2d(*conv.plain_kernel(), conv.runs, conv.stride, conv.padding, conv.dilation)

    Args:
        weight: (out_channels, in_channels, kh, kw), gains applied.
        bias: (out_channels,) or None.
        runs: as RegroupedConv2d's.
        stride, padding, dilation: the plain convolution's, by axis.
        share_columns: compute narrow dilations together where that repays in torch; else each by a convolution.

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
        runs: Sequence[Sequence[int]],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        share_columns: bool = True,
    ):
        super().__init__()
        self.runs = Runs(runs)
        geometry = Geometry((weight.shape[2], weight.shape[3]), stride, padding, dilation)
        own = self.runs.per_channel()
        parts = [_Part(d, [c for c, of in enumerate(own) if of == d]) for d in sorted(set(own), key=sort_key)]
        groups = list(_share_columns(parts, geometry)) if share_columns else [[part] for part in parts]
        self.steps = nn.ModuleList(_build_step(group, weight, bias, geometry) for group in groups)
        self._sizes, self._order = _plan_order([[c for part in group for c in part.channels] for group in groups])
        self.act: nn.Module = nn.Identity()  # of each step's output, see `take_activation`

    def take_activation(self, act: nn.Module) -> bool:
        """Apply a ReLU that follows to each step's output, where runtimes fuse it with the convolution.

        Returns:
            Whether that is done: not of another activation, nor of a single step, which it follows as it is.
        """
        if type(act) is not nn.ReLU or len(self.steps) == 1:
            return False
        self.act = act
        return True

    def forward(self, x: Tensor) -> Tensor:
        pieces: list[Tensor] = []
        for i, step in enumerate(self.steps):
            output = self.act(step(x))
            # A split's piece, a view, is never handed out: timm's BasicBlock adds the shortcut to it in place.
            pieces.extend(split_channels(output, self._sizes[i]) if len(self._sizes[i]) > 1 else [output])
        return pieces[0] if len(pieces) == 1 else torch.cat([pieces[i] for i in self._order], 1)

    def extra_repr(self) -> str:
        return f"runs={[tuple(run) for run in self.runs]}"


class _Addition(NamedTuple):
    """Channels `start` to `stop` of the output get those of an image's convolution from `source` on, so many rows
    further down."""

    image: int
    source: int
    start: int
    stop: int
    rows: int


class RowsConv2d(nn.Module):
    """Several dilations (dh, dw) with the same dw, by convolutions of a single row and shifted sums of their channels.

    Args:
        weight: (channels, in_channels, kh, kw), the dilations' channels one after the other.
        bias: (channels,) or None.
        sizes: channels of each dilation.
        dilations_h: dh of each dilation, times the convolution's own.
        stride: by axis.
        padding_w, dilation_w: along the width.

    Shape:
        input (N, in_channels, H, W), output (N, channels, ceil(H / stride), W').
    """

    _additions: list[_Addition]

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        sizes: Sequence[int],
        dilations_h: Sequence[int],
        stride: tuple[int, int],
        padding_w: int,
        dilation_w: int,
    ):
        super().__init__()
        self.channels = weight.shape[0]
        # The central row needs no shift: all channels of it, at the head of the first image's convolution.
        centre = weight.shape[2] // 2
        kernels: dict[int, list[Tensor]] = {0: [weight[:, :, centre]]}  # by the first row of an image
        self._additions = []
        for start, stop, row, shift in _kernel_rows(sizes, dilations_h, centre):
            rows, phase = divmod(shift, stride[0])
            own = kernels.setdefault(phase, [])
            image = list(kernels).index(phase)
            self._additions.append(_Addition(image, sum(map(len, own)), start, stop, rows))
            own.append(weight[start:stop, :, row])
        self._phases = list(kernels)
        self.convs = nn.ModuleList()
        for phase, own in kernels.items():
            kernel = torch.cat(own).unsqueeze(2)
            own_bias = None if bias is None or phase else F.pad(bias, (0, len(kernel) - len(bias)))
            self.convs.append(_conv(kernel, own_bias, stride, (0, padding_w), (1, dilation_w)))

    def forward(self, x: Tensor) -> Tensor:
        images: list[Tensor] = []
        for i, conv in enumerate(self.convs):
            phase = self._phases[i]
            # rows `phase`, `phase + stride`, ...; padded, so that every image has equally many
            images.append(conv(F.pad(x, (0, 0, -phase, phase)) if phase else x))
        return _add_shifted_rows(images, self.channels, self._additions)


def _kernel_rows(sizes: Sequence[int], dilations_h: Sequence[int], centre: int) -> Iterator[tuple[int, int, int, int]]:
    """First and last (exclusive) channel, row of the kernel, and its distance from the centre, in input rows."""
    start = 0
    for size, dilation in zip(sizes, dilations_h, strict=True):
        for row in range(2 * centre + 1):
            if row != centre:
                yield start, start + size, row, (row - centre) * dilation
        start += size


def _add_shifted_rows(images: list[Tensor], channels: int, additions: list[_Addition]) -> Tensor:
    """Sum over the kernel's rows; the first of the images, (N, at least channels, H, W), is overwritten.

    Returns:
        (N, channels, H, W)
    """
    if not torch.jit.is_scripting():  # noqa: SIM102 (what follows is nothing that TorchScript could compile)
        if torch.compiler.is_compiling():
            return _sum_of_shifted_rows(images, channels, additions)
    y = images[0][:, :channels]
    for addition in additions:
        z = images[addition.image][:, addition.source : addition.source + addition.stop - addition.start]
        target = y[:, addition.start : addition.stop, max(-addition.rows, 0) :]
        z = z[:, :, max(addition.rows, 0) :][:, :, : target.shape[2]]
        target[:, :, : z.shape[2]].add_(z)
    return y


torch.fx.wrap("_add_shifted_rows")  # fx would drop the additions in place as dead code


def _sum_of_shifted_rows(images: list[Tensor], channels: int, additions: list[_Addition]) -> Tensor:
    """`_add_shifted_rows` without writing in place, which compilers would have to undo."""
    centre = images[0][:, :channels]
    height = centre.shape[2]
    parts: dict[tuple[int, int], Tensor] = {}
    for image, source, start, stop, rows in additions:
        above, below = max(-rows, 0), max(rows, 0)
        z = F.pad(images[image][:, source : source + stop - start], (0, 0, above, below))
        total = parts.get((start, stop), centre[:, start:stop])
        parts[start, stop] = total + z[:, :, below : below + height]
    return torch.cat(list(parts.values()), 1)


def sort_key(dilation: Dilation) -> tuple[int, int]:
    """Key of the order of dilations in which channels need not be put back in order.

    >>> sorted([(1, 3), (3, 1), (1, 1)], key=sort_key)
    [(1, 1), (3, 1), (1, 3)]
    """
    return dilation[1], dilation[0]


def _share_columns(parts: list[_Part], geometry: Geometry) -> Iterator[list[_Part]]:
    """Which dilations are computed together: those with the same dw, where that is possible and repays."""
    for dilation_w in dict.fromkeys(part.dilation[1] for part in parts):
        group = [part for part in parts if part.dilation[1] == dilation_w]
        channels = sum(len(part.channels) for part in group)
        blocks = sum(math.ceil(len(part.channels) / VECTOR) * VECTOR for part in group)
        is_worthwhile = geometry.kernel_size[0] > 1 and blocks >= WASTE * channels
        if is_worthwhile and geometry.centres_rows():
            yield group
        else:
            yield from ([part] for part in group)


def _build_step(group: list[_Part], weight: Tensor, bias: Tensor | None, geometry: Geometry) -> nn.Module:
    channels = [c for part in group for c in part.channels]
    weight, bias = weight[channels], None if bias is None else bias[channels]
    first = group[0].dilation
    padding, dilation = geometry.padding_at(first), geometry.dilation_at(first)
    if len(group) == 1:
        return _conv(weight, bias, geometry.stride, padding, dilation)
    sizes = [len(part.channels) for part in group]
    dilations_h = [geometry.dilation_at(part.dilation)[0] for part in group]
    return RowsConv2d(weight, bias, sizes, dilations_h, geometry.stride, padding[1], dilation[1])


def _conv(
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> nn.Conv2d:
    out_channels, in_channels = weight.shape[:2]
    kernel_size = (weight.shape[2], weight.shape[3])
    conv = nn.Conv2d(
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias=bias is not None, device="meta"
    )
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
