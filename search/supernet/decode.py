"""From a supernet to a genotype, and to the network that the genotype stands for."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...genotype.genotype import Genotype
from ...genotype.runs import Runs
from ...networks.regrouped_conv import RegroupedConv2d
from .searched_conv import SearchedConv2d


def likeliest(searched: Mapping[str, SearchedConv2d]) -> dict[str, Tensor]:
    """Each group's candidate, (groups,): ind_i = argmax_g alpha_i^g; in a sensitivity search the current one."""
    return {name: conv.chosen() for name, conv in searched.items()}


def decode(
    searched: Mapping[str, SearchedConv2d],
    architecture: str,
    provenance: Mapping[str, Any],
    chosen: Mapping[str, Tensor] | None = None,
) -> Genotype:
    """The genotype of a supernet; channels stay in place, each on its group's dilation.

    Args:
        searched: the supernet's searched convolutions by the genotype's names.
        architecture: timm's name of the plain network.
        provenance: where it comes from.
        chosen: the candidate that each group of each convolution takes, (groups,) indices; None: the likeliest.

    Example:
        >>> searched = build_supernet(body, searched_convs(body, find_space("C")), groups=16)
        >>> decode(searched, "resnet50", {"seed": 3}).save("genotype.json")
    """
    chosen = likeliest(searched) if chosen is None else chosen
    convs = {name: chosen_runs(conv, chosen[name]) for name, conv in searched.items()}
    return Genotype(architecture=architecture, convs=convs, provenance=provenance)


def chosen_runs(conv: SearchedConv2d, chosen: Tensor) -> Runs:
    """The runs of a searched convolution for a candidate per group."""
    return Runs.of((conv.candidates[index] for index in chosen.tolist()), each=conv.group_size)


@torch.no_grad()
def decode_network(
    body: nn.Module, searched: Mapping[str, SearchedConv2d], chosen: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """Turn a supernet into its decoded network, in place: what the supernet computes at one-hot alpha.

    Each output channel keeps its chosen dilation, with that candidate's own kernel row and batch norm statistics.

    Args:
        body: the supernet.
        searched: its searched convolutions, by the names that `chosen` has for them.
        chosen: as `decode` takes it.

    Returns:
        The same network; its searched convolutions are RegroupedConv2d.

    Example:
        >>> genotype = decode(searched, "resnet50", {})
        >>> network = decode_network(body, searched)
    """
    chosen = likeliest(searched) if chosen is None else chosen
    places = {module: name for name, module in body.named_modules()}
    for name, conv in searched.items():
        channels = conv.per_channel(chosen[name])
        for norm in conv.norms:
            mean, var = conv.statistics_rows(channels)
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(var)
        plain = conv.to_plain()
        kernel = conv.kernel_rows(channels).clone()
        plain.weight = nn.Parameter(kernel, requires_grad=conv.kernels.requires_grad)
        runs = chosen_runs(conv, chosen[name])
        body.set_submodule(places[conv], RegroupedConv2d.from_conv(plain, runs, name=name))
    return body
