"""The supernet: a network whose searched convolutions hold all their candidate dilations."""

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from ...genotype.runs import Dilation
from ...networks.batch_norm import evaluation_mode
from ..space import SearchError, count_groups
from .searched_conv import MixtureConv2d, Moments, SampledConv2d, SearchedConv2d, SensitivityConv2d, relative_entropy

Mode = Literal["mixture", "sampled", "sensitivity"]
Norm = Literal["calibrated", "live", "frozen"]
MODES: dict[str, type[SearchedConv2d]] = {
    "mixture": MixtureConv2d,
    "sampled": SampledConv2d,
    "sensitivity": SensitivityConv2d,
}


def is_tied(mode: Mode, kernels: Literal["tied", "untied"] | None) -> bool:
    """Whether candidates share their kernel; None: the mode's own way, untied in the paper's mixture, else tied."""
    return (kernels or ("untied" if mode == "mixture" else "tied")) == "tied"


def build_supernet(
    body: nn.Module,
    convs: Mapping[str, tuple[Dilation, ...]],
    groups: int | None = None,
    channels_per_group: int | None = None,
    mode: Mode = "mixture",
    kernels: Literal["tied", "untied"] | None = None,
    norm: Norm = "calibrated",
    probe_size: int = 64,
) -> dict[str, SearchedConv2d]:
    """Turn a network into a supernet, in place.

    Each convolution becomes a SearchedConv2d of the mode. With the norm `calibrated`, the (frozen) batch norm behind it
    keeps its affine part only: its statistics move into the candidates, which start with the batch norm's own;
    `calibrate` measures each one's. With `live` and `frozen` the batch norm stays as it is, and normalises what comes
    out for all candidates alike.

    Args:
        body: a network with frozen batch norms, or in evaluation mode; or with live ones.
        convs: candidates by convolution name.
        groups, channels_per_group: how output channels are grouped; exactly one of the two.
        mode: how candidates are weighed against each other.
        kernels: whether candidates share their kernel; None: as `is_tied` says.
        norm: whose statistics normalise a candidate's output.
        probe_size: side in pixels of the image that is sent through to see which batch norm follows which convolution.

    Returns:
        The searched convolutions by name, in network order.

    Raises:
        SearchError: no such convolution, a split that does not fit, or no batch norm behind a convolution that is to
            be calibrated.

    Example:
        >>> body = timm.create_model("resnet50", pretrained=True).eval()
        >>> searched = build_supernet(body, searched_convs(body, find_space("C")), groups=16, mode="sampled")
    """
    modules = dict(body.named_modules())
    for name in convs:
        if not isinstance(modules.get(name), nn.Conv2d):
            raise SearchError(f"{name}: the network has no convolution of this name")
    sizes = {name: count_groups(modules[name], name, groups, channels_per_group) for name in convs}
    norms = following_norms(body, list(convs), probe_size) if norm == "calibrated" else {}
    searched = {}
    for name, candidates in convs.items():
        eps = norms[name].eps if norms else None
        tied = is_tied(mode, kernels)
        searched[name] = MODES[mode](modules[name], candidates, sizes[name], tied=tied, eps=eps, name=name)
        if norms:
            _take_statistics(searched[name], norms[name])
        body.set_submodule(name, searched[name])
    return searched


def _take_statistics(conv: SearchedConv2d, norm: nn.Module) -> None:
    conv.norms = (norm,)
    conv.mean[:], conv.var[:] = norm.running_mean, norm.running_var
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)  # batch norms divide by sqrt(var + eps)


def following_norms(body: nn.Module, names: list[str], probe_size: int = 64) -> dict[str, nn.Module]:
    """The module with running statistics that takes each convolution's output; seen by sending an image through.

    Raises:
        SearchError: a convolution whose output goes elsewhere.
    """
    modules = dict(body.named_modules())
    outputs: dict[int, str] = {}
    kept, norms = [], {}

    def remember(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
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
        raise SearchError(
            f"{missing[0]}: no batch norm takes its output, so its candidates can not be calibrated; see norm"
        )
    return norms


@torch.no_grad()
def calibrate(
    body: nn.Module,
    searched: Iterable[SearchedConv2d],
    batches: Iterable[Tensor],
    before_batch: Callable[[], None] = lambda: None,
) -> None:
    """Remeasure every candidate's own mean and variance on training images (BN mode `calibrated`).

    Args:
        body: the supernet.
        searched: its searched convolutions.
        batches: images (N, 3, H, W) as the backbone sees them.
        before_batch: called before each of them; in sampled mode it draws the candidates.

    Example:
        >>> calibrate(body, searched.values(), batches, before_batch=lambda: draw_pairs(searched.values(), seed))
    """
    searched = list(searched)
    for conv in searched:
        conv.moments = [Moments() for _ in conv.candidates]
    try:
        with evaluation_mode(body):
            for images in batches:
                before_batch()
                body(images)
    finally:
        for conv in searched:
            conv.moments = None


def draw_pairs(searched: Iterable[SearchedConv2d], *seeds: int) -> None:
    """Draw the candidates of a sampled supernet's groups, as a function of the seeds; nothing to do in other modes.

    Example:
        >>> draw_pairs(searched.values(), seed, step)
        >>> body(images)
    """
    generator = torch.Generator()
    for number, conv in enumerate(searched):
        if isinstance(conv, SampledConv2d):
            generator.manual_seed(_mixed(*seeds, number))
            conv.draw(generator)


def _mixed(*seeds: int) -> int:
    """One seed out of several, different for every tuple of small numbers."""
    mixed = 0
    for seed in seeds:
        mixed = (mixed * 1_000_003 + seed + 1) % 2**63
    return mixed


def mean_entropy(searched: Iterable[SearchedConv2d]) -> Tensor:
    """Mean relative entropy over all groups of all convolutions: a scalar with a gradient."""
    return torch.cat([relative_entropy(conv.log_probabilities()) for conv in searched]).mean()


@torch.no_grad()
def entropy(searched: Iterable[SearchedConv2d]) -> float:
    """The same as a number."""
    return mean_entropy(searched).item()


@torch.no_grad()
def share_changed(searched: Iterable[SearchedConv2d]) -> float:
    """Share of the searched output channels whose chosen candidate is not the plain dilation."""
    changed = total = 0.0
    for conv in searched:
        changed += (conv.chosen() != 0).float().mean().item() * conv.out_channels
        total += conv.out_channels
    return changed / total


def alpha_dict(searched: Mapping[str, SearchedConv2d]) -> dict[str, list[list[float]]]:
    """alpha of every searched convolution as nested lists, for the log."""
    return {name: conv.alpha.detach().float().cpu().tolist() for name, conv in searched.items()}
