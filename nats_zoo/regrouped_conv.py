"""A convolution whose output channels run at several dilations.

Same weight, same parameters, same multiply-adds as the plain convolution; only where the taps lie differs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, get_same_padding, register_notrace_module
from torch import Tensor, nn

from .errors import GenotypeError
from .genotype import Dilation, Run

# Up to this many runs, slicing the convolutions' outputs and concatenating them in channel order is one copy and
# no index; beyond, an index_select is faster than so many small slices.
MAX_SLICES = 64


class _Branch(NamedTuple):
    """All output channels of one dilation: they execute as one convolution (merge)."""

    padding: tuple[int, int]
    dilation: Dilation
    groups: int
    out_slices: tuple[tuple[int, int], ...]  # half-open channel ranges of the weight, in order
    in_slices: tuple[tuple[int, int], ...]  # the same of the input; empty: the whole input


class RegroupedConv2d(nn.Conv2d):
    """A Conv2d whose output channel c is `conv2d(x, weight[c])` at the dilation of c's run.

    Channels stay in their order, the state dict is the plain convolution's, output size and tap centre too: the
    padding grows by (d - 1) * d0 * (k - 1) / 2 for a run's dilation d and the convolution's own dilation d0, which d
    multiplies. With one dilation only it is one convolution.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as for `nn.Conv2d`; padding
            as numbers, zeros only.
        runs: `(channels, dilation_h, dilation_w)` in output-channel order, adding up to `out_channels`. With
            `groups` > 1 they end on cardinality-group boundaries.
        gains: a factor on the kernel per run, or None.
        name: what error messages call this convolution.

    Shape:
        input (N, in_channels, H, W), output (N, out_channels, H', W') with the plain convolution's H' and W'.

    Raises:
        GenotypeError: runs that do not fit the convolution, or a padding that can not grow symmetrically.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        runs: Sequence[Sequence[int]],
        gains: Sequence[float] | None = None,
        name: str = "convolution",
        device=None,
        dtype=None,
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device=device, dtype=dtype
        )
        self.runs = tuple(Run(*run) for run in runs)
        self.gains = tuple(gains) if gains is not None and any(gain != 1.0 for gain in gains) else None
        _check_runs(self, self.runs, name)
        self._branches = _plan_branches(self, self.runs, name)
        self._order = _channel_order(self._branches)
        self.register_buffer("_gain", None, persistent=False)
        self.register_buffer("_restore", None, persistent=False)
        self._fill_buffers(device, dtype)

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        runs: Sequence[Sequence[int]],
        gains: Sequence[float] | None = None,
        name: str = "convolution",
    ) -> "RegroupedConv2d":
        """Regroup an existing convolution; the result shares its weight and bias.

        Args:
            conv: an `nn.Conv2d`, timm's `Conv2dSame`, or a RegroupedConv2d, whose runs are then replaced.
            runs, gains, name: as for the class.

        Raises:
            GenotypeError: another kind of convolution, a padding mode other than zeros, or runs that do not fit.
        """
        target = _regrouped_class(conv, name)
        # Built on meta and given the very parameters: no second copy of the weight, not even for a moment.
        regrouped = target(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            _explicit_padding(conv, name),
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            runs=runs,
            gains=gains,
            name=name,
            device="meta",
        )
        regrouped.weight, regrouped.bias = conv.weight, conv.bias
        regrouped._fill_buffers(conv.weight.device, conv.weight.dtype)
        return regrouped.train(conv.training)

    def init_non_persistent_buffers(self) -> None:
        """Fill the buffers that no state dict carries; timm calls it after a module left the meta device."""
        self._fill_buffers(self.weight.device, self.weight.dtype)

    def _fill_buffers(self, device, dtype) -> None:
        if self.gains is not None:
            per_run = torch.tensor(self.gains, dtype=dtype, device=device)
            channels = torch.tensor([run.channels for run in self.runs], device=device)
            if per_run.is_meta:  # repeat_interleave needs values
                self._gain = torch.empty(self.out_channels, 1, 1, 1, dtype=dtype, device=device)
            else:
                self._gain = per_run.repeat_interleave(channels).view(-1, 1, 1, 1)
        if len(self._branches) > 1 and len(self._order) > MAX_SLICES:
            self._restore = torch.tensor(_restoring_permutation(self._branches), device=device)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self._gain is None else self.weight * self._gain
        return self.convolve(x, weight, self.bias)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Run another kernel and bias of the same shapes at this module's dilations; gains are not applied."""
        if len(self._branches) == 1:
            return self._convolve(x, weight, bias, self._branches[0])
        outputs = [self._run_branch(x, weight, bias, branch) for branch in self._branches]
        if self._restore is not None:
            return torch.cat(outputs, 1).index_select(1, self._restore)
        return torch.cat([outputs[branch][:, start:stop] for branch, start, stop in self._order], 1)

    def _run_branch(self, x: Tensor, weight: Tensor, bias: Tensor | None, branch: _Branch) -> Tensor:
        inputs = _take(x, branch.in_slices, 1) if branch.in_slices else x
        part = None if bias is None else _take(bias, branch.out_slices, 0)
        return self._convolve(inputs, _take(weight, branch.out_slices, 0), part, branch)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, branch: _Branch) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, branch.padding, branch.dilation, branch.groups)

    def extra_repr(self) -> str:
        counts: dict[Dilation, int] = {}
        for run in self.runs:
            counts[run.dilation] = counts.get(run.dilation, 0) + run.channels
        return super().extra_repr() + ", dilations=" + str({f"{h}x{w}": n for (h, w), n in counts.items()})


@register_notrace_module  # its padding depends on the input's size, which fx can not follow
class RegroupedConv2dSame(RegroupedConv2d):
    """RegroupedConv2d with timm's Conv2dSame padding: computed from the input's size, then grown per dilation."""

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, branch: _Branch) -> Tensor:
        pads = []
        for axis in (1, 0):  # F.pad counts from the last axis
            total = get_same_padding(x.shape[2 + axis], self.kernel_size[axis], self.stride[axis], self.dilation[axis])
            grown = branch.padding[axis]
            pads += [total // 2 + grown, total - total // 2 + grown]
        return F.conv2d(F.pad(x, pads), weight, bias, self.stride, (0, 0), branch.dilation, branch.groups)


def _take(tensor: Tensor, slices: tuple[tuple[int, int], ...], dim: int) -> Tensor:
    if len(slices) == 1:
        return tensor.narrow(dim, slices[0][0], slices[0][1] - slices[0][0])
    return torch.cat([tensor.narrow(dim, start, stop - start) for start, stop in slices], dim)


def _regrouped_class(conv: nn.Conv2d, name: str) -> type[RegroupedConv2d]:
    if isinstance(conv, RegroupedConv2d):
        return type(conv)
    if type(conv) is Conv2dSame:
        return RegroupedConv2dSame
    if type(conv) is nn.Conv2d:
        return RegroupedConv2d
    # A subclass may standardise its weight or pad in its own way, which a regrouped copy would silently drop.
    raise GenotypeError(f"{name}: {type(conv).__name__} can not be regrouped, only Conv2d and timm's Conv2dSame can")


def _explicit_padding(conv: nn.Conv2d, name: str) -> tuple[int, int]:
    if conv.padding_mode != "zeros":
        raise GenotypeError(f"{name}: padding mode {conv.padding_mode!r} can not be regrouped, expected 'zeros'")
    if conv.padding == "same":
        return tuple(_halved((k - 1) * d, name) for k, d in zip(conv.kernel_size, conv.dilation, strict=True))
    return (0, 0) if conv.padding == "valid" else conv.padding


def _halved(total: int, name: str) -> int:
    if total % 2:
        raise GenotypeError(f"{name}: its padding would have to grow by {total}/2 on each side, no whole number")
    return total // 2


def _check_runs(conv: nn.Conv2d, runs: tuple[Run, ...], name: str) -> None:
    total = sum(run.channels for run in runs)
    if total != conv.out_channels:
        raise GenotypeError(f"{name}: its runs add up to {total} channels, expected {conv.out_channels}")
    per_group = conv.out_channels // conv.groups
    stop = 0
    for run in runs:
        stop += run.channels
        if conv.groups > 1 and stop % per_group:
            raise GenotypeError(
                f"{name}: a run ends at channel {stop}, inside a cardinality group; expected a multiple of {per_group}"
            )


def _plan_branches(conv: nn.Conv2d, runs: tuple[Run, ...], name: str) -> tuple[_Branch, ...]:
    slices: dict[Dilation, list[tuple[int, int]]] = {}
    start = 0
    for run in runs:
        ranges = slices.setdefault(run.dilation, [])
        if ranges and ranges[-1][1] == start:
            ranges[-1] = (ranges[-1][0], start + run.channels)
        else:
            ranges.append((start, start + run.channels))
        start += run.channels
    return tuple(_plan_branch(conv, dilation, tuple(ranges), name) for dilation, ranges in slices.items())


def _plan_branch(conv: nn.Conv2d, dilation: Dilation, ranges: tuple[tuple[int, int], ...], name: str) -> _Branch:
    growth = [
        _halved((d - 1) * d0 * (k - 1), name)
        for d, d0, k in zip(dilation, conv.dilation, conv.kernel_size, strict=True)
    ]
    per_group_out = conv.out_channels // conv.groups
    per_group_in = conv.in_channels // conv.groups
    cardinality_groups = [(start // per_group_out, stop // per_group_out) for start, stop in ranges]
    whole_input = conv.groups == 1 or cardinality_groups == [(0, conv.groups)]
    return _Branch(
        padding=(conv.padding[0] + growth[0], conv.padding[1] + growth[1]),
        dilation=(dilation[0] * conv.dilation[0], dilation[1] * conv.dilation[1]),
        groups=1 if conv.groups == 1 else sum(stop - start for start, stop in cardinality_groups),
        out_slices=ranges,
        in_slices=() if whole_input else tuple((a * per_group_in, b * per_group_in) for a, b in cardinality_groups),
    )


def _channel_order(branches: tuple[_Branch, ...]) -> tuple[tuple[int, int, int], ...]:
    """(branch, start, stop): which slices of the branches' outputs, concatenated, are the channels in their order."""
    pieces = []
    for index, branch in enumerate(branches):
        offset = 0
        for start, stop in branch.out_slices:
            pieces.append((start, index, offset, offset + stop - start))
            offset += stop - start
    return tuple((index, begin, end) for _, index, begin, end in sorted(pieces))


def _restoring_permutation(branches: tuple[_Branch, ...]) -> list[int]:
    """Where each output channel lies in the concatenation of the branches' outputs."""
    concatenated = [c for branch in branches for start, stop in branch.out_slices for c in range(start, stop)]
    return sorted(range(len(concatenated)), key=concatenated.__getitem__)
