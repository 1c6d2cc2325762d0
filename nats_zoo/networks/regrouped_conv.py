"""A convolution whose output channels run at several dilations.

Same weight, same parameters, same multiply-adds as the plain convolution; only where the taps lie differs.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, get_same_padding, register_notrace_module
from torch import Tensor, nn

from ..base.errors import GenotypeError
from ..genotype.runs import Dilation, Runs
from .geometry import Geometry, argsort, halved, split_channels


class _Branch(NamedTuple):
    """All output channels of one dilation: they execute as one convolution (merge)."""

    pieces: list[int]  # which runs, neighbours of one dilation counted as one
    channels: list[int]  # output channels of each of them
    padding: tuple[int, int]
    dilation: tuple[int, int]  # the convolution's own times the runs'
    groups: int


class RegroupedConv2d(nn.Conv2d):
    """A Conv2d whose output channel c is `conv2d(x, weight[c])` at the dilation of c's run.

    Channels stay in their order, the state dict is the plain convolution's, output size and tap centre too: the
    padding grows by (d - 1) * d0 * (k - 1) / 2 for a run's dilation d and the convolution's own dilation d0, which d
    multiplies. With one dilation only it is one convolution.

        >>> conv = RegroupedConv2d(3, 8, 3, padding=1, runs=[(6, 1, 1), (2, 1, 3)])
        >>> conv(torch.zeros(1, 3, 16, 16)).shape
        torch.Size([1, 8, 16, 16])

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
        GenotypeError: runs or gains that do not fit the convolution, or a padding that can not grow symmetrically.
    """

    is_deployed = False  # then its weight need no longer be the plain convolution's
    shares_columns = True  # its deployment form may compute narrow dilations together

    # What TorchScript can not tell from the values alone.
    _branches: list[_Branch]
    _in_sizes: list[int]

    if TYPE_CHECKING:  # TorchScript tells these by their values
        _gain: Tensor | None
        padding: tuple[int, int]

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device=device, dtype=dtype
        )
        self.runs = Runs(runs)
        self.gains = tuple(gains) if gains is not None and any(gain != 1.0 for gain in gains) else None
        _check_runs(self, self.runs, name)
        if gains is not None and len(gains) != len(self.runs):
            raise GenotypeError(f"{name}: {len(gains)} gains for {len(self.runs)} runs, expected one per run")
        pieces = self.runs.merged()
        self._branches = [_plan_branch(self, dilation, pieces, name) for dilation in pieces.counts()]
        self._sizes = [piece.channels for piece in pieces]
        self._in_sizes = [n * self.in_channels // self.out_channels for n in self._sizes] if groups > 1 else []
        self._order = argsort([piece for branch in self._branches for piece in branch.pieces])
        self.register_buffer("_gain", None, persistent=False)
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

    def to_plain(self) -> nn.Conv2d:
        """The plain convolution that this one was made from: the same weight and bias, dilations and gains dropped."""
        target = Conv2dSame if isinstance(self, RegroupedConv2dSame) else nn.Conv2d
        shape = (self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding)
        plain = target(*shape, self.dilation, self.groups, self.bias is not None, device="meta")
        plain.weight, plain.bias = self.weight, self.bias
        return plain.train(self.training)

    @torch.no_grad()
    def plain_kernel(self) -> tuple[Tensor, Tensor | None]:
        """Weight (out_channels, in_channels / groups, kh, kw) with gains, and bias, both in output-channel order."""
        return self.weight if self._gain is None else self.weight * self._gain, self.bias

    def fuse(self) -> nn.Module:
        """Deployment form, for `timm.utils.reparameterize_model`, which puts what is returned in this one's place.

        Gains are folded, and kernels are stored as they are used instead of being gathered on every call. Kernels
        that are few, in a grouped convolution, or padded by the input's size stay in a RegroupedConv2d.
        """
        from .deployed_conv import DeployedConv2d  # which builds on this module

        weight, bias = self.plain_kernel()
        if self.groups == 1 and type(self) is RegroupedConv2d:
            geometry = (self.stride, self.padding, self.dilation)
            return DeployedConv2d(weight, bias, self.runs, *geometry, self.shares_columns)
        self.is_deployed = True
        if self.gains is not None:
            self.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
            self.gains, self._gain = None, None
        return self

    def init_non_persistent_buffers(self) -> None:
        """Fill the buffers that no state dict carries; timm calls it after a module left the meta device."""
        self._fill_buffers(self.weight.device, self.weight.dtype)

    def _fill_buffers(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        if self.gains is not None:
            per_run = torch.tensor(self.gains, dtype=dtype, device=device)
            channels = torch.tensor([run.channels for run in self.runs], device=device)
            if per_run.is_meta:  # repeat_interleave needs values
                self._gain = torch.empty(self.out_channels, 1, 1, 1, dtype=dtype, device=device)
            else:
                self._gain = per_run.repeat_interleave(channels).view(-1, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self._gain is None else self.weight * self._gain
        return self.convolve(x, weight, self.bias)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Run another kernel and bias of the same shapes at this module's dilations; gains are not applied."""
        if len(self._branches) == 1:
            return self._convolve(x, weight, bias, self._branches[0])
        weights = _gather(weight, self._sizes, self._branches, 0)
        biases = None if bias is None else _gather(bias, self._sizes, self._branches, 0)
        inputs = [x] * len(weights) if self.groups == 1 else _gather(x, self._in_sizes, self._branches, 1)
        pieces: list[Tensor] = []
        for i, branch in enumerate(self._branches):
            output = self._convolve(inputs[i], weights[i], None if biases is None else biases[i], branch)
            pieces.extend(split_channels(output, branch.channels, 1))
        return torch.cat([pieces[i] for i in self._order], 1)

    def convolve_part(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        """Run kernels of any number of output channels, in `groups` cardinality groups, at this module's one dilation.

        For modules with a single dilation; gains are not applied.
        """
        return self._convolve(x, weight, bias, self._branches[0]._replace(groups=groups))

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, branch: _Branch) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, branch.padding, branch.dilation, branch.groups)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dilations={ {str(d): n for d, n in self.runs.counts().items()} }"


@register_notrace_module  # its padding depends on the input's size, which fx can not follow
class RegroupedConv2dSame(RegroupedConv2d):
    """RegroupedConv2d with timm's Conv2dSame padding: computed from the input's size, then grown per dilation.

    >>> type(RegroupedConv2d.from_conv(Conv2dSame(3, 8, 3, stride=2), [(8, 1, 3)])).__name__
    'RegroupedConv2dSame'
    """

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, branch: _Branch) -> Tensor:
        rows = get_same_padding(x.shape[2], self.kernel_size[0], self.stride[0], self.dilation[0])
        columns = get_same_padding(x.shape[3], self.kernel_size[1], self.stride[1], self.dilation[1])
        height, width = branch.padding
        # F.pad counts from the last axis
        pads = [columns // 2 + width, columns - columns // 2 + width, rows // 2 + height, rows - rows // 2 + height]
        return F.conv2d(F.pad(x, pads), weight, bias, self.stride, (0, 0), branch.dilation, branch.groups)


def _gather(tensor: Tensor, sizes: list[int], branches: list[_Branch], dim: int) -> list[Tensor]:
    """Each branch's pieces of a tensor that is cut into `sizes` along `dim`, concatenated."""
    parts = split_channels(tensor, sizes, dim)
    gathered: list[Tensor] = []
    for branch in branches:
        own = [parts[i] for i in branch.pieces]
        gathered.append(own[0] if len(own) == 1 else torch.cat(own, dim))
    return gathered


def can_regroup(module: nn.Module) -> bool:
    """Tell whether `RegroupedConv2d.from_conv` takes a module, and a dilation moves its taps.

    >>> can_regroup(nn.Conv2d(3, 8, 3)), can_regroup(nn.Conv2d(3, 8, 1))
    (True, False)
    """
    if not (type(module) in (nn.Conv2d, Conv2dSame) or isinstance(module, RegroupedConv2d)):
        return False
    is_odd = all(k % 2 == 1 for k in module.kernel_size)
    return module.padding_mode == "zeros" and is_odd and max(module.kernel_size) > 1


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
        height, width = (halved((k - 1) * d, name) for k, d in zip(conv.kernel_size, conv.dilation, strict=True))
        return height, width
    return (0, 0) if isinstance(conv.padding, str) else conv.padding


def _check_runs(conv: nn.Conv2d, runs: Runs, name: str) -> None:
    if any(min(run) < 1 for run in runs):
        raise GenotypeError(f"{name}: channels and dilations of a run must be positive")
    if runs.channels != conv.out_channels:
        raise GenotypeError(f"{name}: its runs add up to {runs.channels} channels, expected {conv.out_channels}")
    per_group = conv.out_channels // conv.groups
    stop = 0
    for run in runs:
        stop += run.channels
        if conv.groups > 1 and stop % per_group:
            raise GenotypeError(
                f"{name}: a run ends at channel {stop}, inside a cardinality group; expected a multiple of {per_group}"
            )


def _plan_branch(conv: RegroupedConv2d, dilation: Dilation, pieces: Runs, name: str) -> _Branch:
    geometry = Geometry(conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    own = [index for index, piece in enumerate(pieces) if piece.dilation == dilation]
    channels = [pieces[index].channels for index in own]
    return _Branch(
        pieces=own,
        channels=channels,
        padding=geometry.padding_at(dilation, name),
        dilation=geometry.dilation_at(dilation),
        groups=conv.groups * sum(channels) // conv.out_channels if conv.groups > 1 else 1,
    )
