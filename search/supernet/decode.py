"""From a supernet to a genotype, and to the network that the genotype stands for."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...genotype.genotype import Genotype
from ...genotype.runs import Runs
from ...networks.regrouped_conv import RegroupedConv2d
from .searched_conv import SearchedConv2d

Chooser = Callable[[str, SearchedConv2d], Tensor]


def likeliest(name: str, conv: SearchedConv2d) -> Tensor:
    """Each group's candidate, (groups,): ind_i = argmax_g alpha_i^g; in a sensitivity search the current one."""
    return conv.chosen()


def decode(
    searched: Mapping[str, SearchedConv2d],
    architecture: str,
    provenance: Mapping[str, Any],
    choose: Chooser = likeliest,
    names: Mapping[str, str] | None = None,
) -> Genotype:
    """The genotype of a supernet; channels stay in place, each on its group's dilation.

    Args:
        searched: the supernet's searched convolutions by name.
        architecture: timm's name of the plain network.
        provenance: where it comes from.
        choose: which candidate each group of a convolution takes.
        names: what the genotype calls the convolutions; None: as the supernet does.
    """
    convs = {(names or {}).get(name, name): chosen_runs(conv, choose(name, conv)) for name, conv in searched.items()}
    return Genotype(architecture=architecture, convs=convs, provenance=provenance)


def chosen_runs(conv: SearchedConv2d, chosen: Tensor) -> Runs:
    """The runs of a searched convolution for a candidate per group."""
    return Runs.of((conv.candidates[index] for index in chosen.tolist()), each=conv.group_size)


@torch.no_grad()
def decode_network(body: nn.Module, searched: Mapping[str, SearchedConv2d], choose: Chooser = likeliest) -> nn.Module:
    """Turn a supernet into its decoded network, in place: what the supernet computes at one-hot alpha.

    Each output channel keeps its chosen dilation, with that candidate's own kernel row and batch norm statistics.

    Args:
        body: the supernet.
        searched: its searched convolutions by name.
        choose: which candidate each group of a convolution takes.

    Returns:
        The same network; its searched convolutions are RegroupedConv2d.
    """
    for name, conv in searched.items():
        chosen = choose(name, conv)
        channels = conv.per_channel(chosen)
        for norm in conv.norms:
            mean, var = conv.statistics_rows(channels)
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(var)
        plain = conv.to_plain()
        kernel = conv.kernel_rows(channels).clone()
        plain.weight = nn.Parameter(kernel, requires_grad=conv.kernels.requires_grad)
        body.set_submodule(name, RegroupedConv2d.from_conv(plain, chosen_runs(conv, chosen), name=name))
    return body
