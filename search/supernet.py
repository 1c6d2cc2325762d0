"""The supernet: searched convolutions that run all their candidate dilations at once, mixed by alpha."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..batch_norm import evaluation_mode
from ..genotype import Dilation
from ..regrouped_conv import RegroupedConv2d
from .space import SearchError, count_groups


class MixtureConv2d(nn.Module):
    """One searched convolution in mixture mode, with its batch norm's statistics per candidate.

    For the channels of group i: y_i = sum_g softmax(alpha_i)_g * norm_g(conv(x, w_g, dilation g)), the paper's
    mixture, where norm_g subtracts candidate g's own frozen mean and divides by its own standard deviation. The
    following batch norm keeps its affine part only (see `build_supernet`).

    The probability and the normalisation are factors per output channel, so they are multiplied into the kernel: one
    convolution per candidate, and no candidate's output needs to be kept for the backward pass.

    Args:
        conv: the pretrained convolution; every candidate starts with a copy of its kernel.
        candidates: dilations (height, width); they multiply the convolution's own.
        num_groups: groups of output channels, each with a row of alpha.
        eps: of the following batch norm.
        name: what error messages call it.

    Shape:
        as the convolution; alpha is (num_groups, candidates).
    """

    def __init__(self, conv: nn.Conv2d, candidates: tuple[Dilation, ...], num_groups: int, eps: float, name: str):
        super().__init__()
        self.candidates = candidates
        self.num_groups = num_groups
        self.eps = eps
        # One single-dilation RegroupedConv2d per candidate: stride, padding growth and Conv2dSame are its business.
        runs = [[(conv.out_channels, *dilation)] for dilation in candidates]
        self.branches = nn.ModuleList(RegroupedConv2d.from_conv(conv, run, name=name) for run in runs)
        for branch in self.branches:
            branch.weight = nn.Parameter(conv.weight.detach().clone(), requires_grad=conv.weight.requires_grad)
        self.alpha = nn.Parameter(conv.weight.new_zeros(num_groups, len(candidates)))
        shape = (len(candidates), conv.out_channels)
        self.register_buffer("mean", conv.weight.new_zeros(shape))
        self.register_buffer("var", conv.weight.new_ones(shape))
        self.moments: list[Moments] | None = None

    @property
    def out_channels(self) -> int:
        return self.branches[0].out_channels

    def probabilities(self) -> Tensor:
        """softmax(alpha) of every output channel: (out_channels, candidates)."""
        return self.alpha.softmax(1).repeat_interleave(self.out_channels // self.num_groups, 0)

    def forward(self, x: Tensor) -> Tensor:
        if self.moments is not None:
            self._measure(x)
        probabilities = self.probabilities()
        std = (self.var + self.eps).sqrt()
        output = None
        for index, branch in enumerate(self.branches):
            scale = probabilities[:, index] / std[index]
            bias = self._bias(branch, index) * scale
            candidate = branch.convolve(x, branch.weight * scale.view(-1, 1, 1, 1), bias)
            output = candidate if output is None else output + candidate
        return output

    def _bias(self, branch: RegroupedConv2d, index: int) -> Tensor:
        return -self.mean[index] if branch.bias is None else branch.bias - self.mean[index]

    @torch.no_grad()
    def _measure(self, x: Tensor) -> None:
        """Take each candidate's statistics on this input, and normalise by what was measured so far."""
        for index, (branch, moments) in enumerate(zip(self.branches, self.moments, strict=True)):
            moments.update(branch(x))
            self.mean[index], self.var[index] = moments.mean, moments.var


class Moments:
    """Mean and variance per channel of all that it was shown, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.sum: Tensor | float = 0.0
        self.sum_of_squares: Tensor | float = 0.0

    def update(self, y: Tensor) -> None:
        """Add a batch (N, C, H, W)."""
        y = y.double()
        self.count += y.numel() // y.shape[1]
        self.sum = self.sum + y.sum((0, 2, 3))
        self.sum_of_squares = self.sum_of_squares + y.square().sum((0, 2, 3))

    @property
    def mean(self) -> Tensor:
        return self.sum / self.count

    @property
    def var(self) -> Tensor:
        return (self.sum_of_squares / self.count - self.mean**2).clamp_min(0)


def build_supernet(
    body: nn.Module,
    convs: Mapping[str, tuple[Dilation, ...]],
    groups: int | None = None,
    channels_per_group: int | None = None,
    probe_size: int = 64,
) -> dict[str, MixtureConv2d]:
    """Turn a network into a supernet, in place.

    Each convolution becomes a MixtureConv2d, and the (frozen) batch norm behind it keeps its affine part only: its
    statistics move into the candidates. Candidates start with the batch norm's own statistics; `calibrate` measures
    each one's.

    Args:
        body: a network with frozen batch norms, or in evaluation mode.
        convs: candidates by convolution name.
        groups, channels_per_group: how output channels are grouped; exactly one of the two.
        probe_size: side in pixels of the image that is sent through to see which batch norm follows which convolution.

    Returns:
        The searched convolutions by name, in network order.

    Raises:
        SearchError: no such convolution, a split that does not fit, or no batch norm behind a convolution.
    """
    modules = dict(body.named_modules())
    for name in convs:
        if not isinstance(modules.get(name), nn.Conv2d):
            raise SearchError(f"{name}: the network has no convolution of this name")
    sizes = {name: count_groups(modules[name], name, groups, channels_per_group) for name in convs}
    norms = following_norms(body, list(convs), probe_size)
    mixtures = {}
    for name, candidates in convs.items():
        norm = norms[name]
        mixture = MixtureConv2d(modules[name], candidates, sizes[name], norm.eps, name)
        mixture.mean[:], mixture.var[:] = norm.running_mean, norm.running_var
        norm.running_mean.zero_()
        norm.running_var.fill_(1 - norm.eps)  # batch norms divide by sqrt(var + eps)
        body.set_submodule(name, mixture)
        mixtures[name] = mixture
    return mixtures


def following_norms(body: nn.Module, names: list[str], probe_size: int = 64) -> dict[str, nn.Module]:
    """The module with running statistics that takes each convolution's output; seen by sending an image through.

    Raises:
        SearchError: a convolution whose output goes elsewhere.
    """
    modules = dict(body.named_modules())
    outputs: dict[int, str] = {}
    kept, norms = [], {}

    def remember(name: str):
        def hook(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
            outputs[id(output)] = name
            kept.append(output)  # an id is a tensor's only while it lives

        return hook

    def look(module: nn.Module, inputs: tuple) -> None:
        if inputs and id(inputs[0]) in outputs:
            norms[outputs[id(inputs[0])]] = module

    handles = [modules[name].register_forward_hook(remember(name)) for name in names]
    handles += [m.register_forward_pre_hook(look) for m in modules.values() if hasattr(m, "running_mean")]
    parameter = next(body.parameters())
    try:
        with torch.no_grad(), evaluation_mode(body):
            body(parameter.new_zeros(1, 3, probe_size, probe_size))
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in names if name not in norms]
    if missing:
        raise SearchError(f"{missing[0]}: no batch norm takes its output, so its candidates can not be calibrated")
    return norms


@torch.no_grad()
def calibrate(body: nn.Module, mixtures: Iterable[MixtureConv2d], batches: Iterable[Tensor]) -> None:
    """Remeasure every candidate's own mean and variance on training images (BN mode `calibrated`).

    Args:
        body: the supernet.
        mixtures: its searched convolutions.
        batches: images (N, 3, H, W) as the backbone sees them.
    """
    mixtures = list(mixtures)
    for mixture in mixtures:
        mixture.moments = [Moments() for _ in mixture.candidates]
    try:
        with evaluation_mode(body):
            for images in batches:
                body(images)
    finally:
        for mixture in mixtures:
            mixture.moments = None


def entropy(mixtures: Iterable[MixtureConv2d]) -> float:
    """Mean entropy of softmax(alpha) over all groups, relative to uniform: 1 at the start, 0 when decided."""
    ratios = []
    for mixture in mixtures:
        p = mixture.alpha.detach().float().softmax(1)
        uniform = math.log(max(p.shape[1], 2))  # a single candidate is decided: 0 / log 2
        ratios.append(-(p * p.clamp_min(1e-12).log()).sum(1) / uniform)
    return torch.cat(ratios).mean().item()


def share_changed(mixtures: Iterable[MixtureConv2d]) -> float:
    """Share of the searched output channels whose likeliest candidate is not the plain dilation."""
    changed = total = 0.0
    for mixture in mixtures:
        changed += (mixture.alpha.argmax(1) != 0).float().mean().item() * mixture.out_channels
        total += mixture.out_channels
    return changed / total


def alpha_dict(mixtures: Mapping[str, MixtureConv2d]) -> dict[str, list[list[float]]]:
    """alpha of every searched convolution as nested lists, for the log."""
    return {name: mixture.alpha.detach().float().cpu().tolist() for name, mixture in mixtures.items()}
