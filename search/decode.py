"""From alpha to a genotype, and from a supernet to the network that it stands for."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..genotype import Dilation, Genotype, runs_from_channels
from ..regrouped_conv import RegroupedConv2d
from .supernet import MixtureConv2d, following_norms


def decode(mixtures: Mapping[str, MixtureConv2d], architecture: str, provenance: Mapping[str, Any]) -> Genotype:
    """The genotype: every group takes its likeliest candidate, ind_i = argmax_g alpha_i^g, channels stay in place.

    Args:
        mixtures: the supernet's searched convolutions by name.
        architecture: timm's name of the plain network.
        provenance: where it comes from.
    """
    convs = {name: runs_from_channels(chosen_dilations(mixture)) for name, mixture in mixtures.items()}
    return Genotype(architecture=architecture, convs=convs, provenance=provenance)


def chosen_dilations(mixture: MixtureConv2d) -> list[Dilation]:
    """The dilation of each output channel."""
    return [mixture.candidates[index] for index in _chosen(mixture).tolist()]


@torch.no_grad()
def decode_network(body: nn.Module, mixtures: Mapping[str, MixtureConv2d]) -> nn.Module:
    """Turn a supernet into its decoded network, in place: what the supernet computes at one-hot alpha.

    Each output channel keeps its chosen dilation, with that candidate's own kernel row and batch norm statistics.

    Args:
        body: the supernet.
        mixtures: its searched convolutions by name.

    Returns:
        The same network; its searched convolutions are RegroupedConv2d.
    """
    norms = following_norms(body, list(mixtures))
    for name, mixture in mixtures.items():
        chosen = _chosen(mixture)
        conv = RegroupedConv2d.from_conv(mixture.branches[0], runs_from_channels(chosen_dilations(mixture)), name=name)
        kernels = torch.stack([branch.weight for branch in mixture.branches])
        conv.weight = nn.Parameter(_pick(kernels, chosen), requires_grad=conv.weight.requires_grad)
        norms[name].running_mean.copy_(_pick(mixture.mean, chosen))
        norms[name].running_var.copy_(_pick(mixture.var, chosen))
        body.set_submodule(name, conv)
    return body


def _chosen(mixture: MixtureConv2d) -> Tensor:
    """Index of each output channel's candidate; on a tie the first, which is the plain dilation."""
    return mixture.alpha.argmax(1).repeat_interleave(mixture.out_channels // mixture.num_groups)


def _pick(per_candidate: Tensor, chosen: Tensor) -> Tensor:
    """Row c of the result is row c of candidate chosen[c]: (candidates, C, ...) -> (C, ...)."""
    return per_candidate[chosen, torch.arange(len(chosen), device=chosen.device)].clone()
