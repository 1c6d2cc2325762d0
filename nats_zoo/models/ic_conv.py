"""Inception Convolution's checkpoints (arXiv 2012.13587) as backbones of this library: the same weights, rearranged.

Its module runs one small convolution per dilation, `NAME.conv_list.I`, on all input channels, and concatenates their
outputs. So their kernels, one after the other, are the kernel of the plain convolution `NAME`.
"""

import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..base.errors import NatsError, short
from ..folders.checkpoint import read_checkpoint
from ..genotype.genotype import Genotype
from ..genotype.runs import Runs
from ..version import __version__
from .named import NamedNetwork

PREFIXES = ("module.", "backbone.", "module.")  # of a wrapped network, of a detector's backbone


def from_ic_conv_checkpoint(
    pattern: str | os.PathLike, checkpoint: str | os.PathLike, architecture: str = "resnet50"
) -> nn.Module:
    """A backbone with the weights of one of Inception Convolution's checkpoints, in evaluation mode.

    Args:
        pattern: its pattern file, see `Genotype.from_ic_conv`.
        checkpoint: a file of torch.save's or .safetensors, of the classifier, or of a detector whose backbone it is
            (then the result has no classifier). The state dict may lie under `state_dict` or `model`, and its keys may
            begin with `module.` or `backbone.`.
        architecture: timm's name of the plain ResNet.

    Raises:
        NatsError: a file that can not be read, or naming the tensor that is missing, superfluous or of another shape;
            so is a grouped convolution whose small ones read all inputs, each in groups of its own: no regrouped
            convolution computes that.

    Example:
        >>> model = from_ic_conv_checkpoint("ic_resnet50_k9.json", "ic_resnet50_k9.pth.tar")
        >>> nats_zoo.save_backbone(model, "backbone")
    """
    genotype = Genotype.from_ic_conv(pattern, architecture)
    provenance = {**genotype.provenance, "weights": Path(checkpoint).name, "version": __version__}
    state = read_checkpoint(checkpoint, ("state_dict", "model"))
    for prefix in PREFIXES:
        state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)} or state
    head = state.get("fc.weight")
    if head is not None and head.ndim != 2:
        raise NatsError(f"{checkpoint}: fc.weight: expected a matrix, found a tensor of {head.ndim} dimensions")
    network = NamedNetwork(architecture, genotype=replace(genotype, provenance=provenance))
    # The network's own tag would say where weights, mean and deviation of another training come from.
    overlay = dict(tag="", hf_hub_id=None, url="", license=None)
    model = network.create(num_classes=0 if head is None else len(head), pretrained_cfg_overlay=overlay)
    _check_inputs(model, genotype, str(checkpoint))
    for name, runs in genotype.convs.items():
        conv = model.get_submodule(name)
        assert isinstance(conv, nn.Conv2d), "the genotype fits it"
        _join_pieces(state, name, runs, conv, str(checkpoint))
    expected = model.state_dict()
    for name in sorted(expected.keys() | state.keys()):
        shapes = [tuple(tensors[name].shape) if name in tensors else "no such tensor" for tensors in (expected, state)]
        if name.endswith(".num_batches_tracked") and name not in state:  # older ones have none
            state[name] = expected[name]
        elif shapes[0] != shapes[1]:
            raise NatsError(f"{checkpoint}: {short(name)}: expected {shapes[0]}, found {shapes[1]}")
    model.load_state_dict(state)
    return model


def _check_inputs(model: nn.Module, genotype: Genotype, source: str) -> None:
    """Refuse grouped convolutions whose kernels would fit although each may read all inputs.

    A kernel as deep as a cardinality group belongs to a small convolution that reads the inputs of its own groups only,
    or all inputs in as many groups as the plain one, of which its channels are then a multiple. One that is none tells.
    """
    dilated = {name: runs for name, runs in genotype.convs.items() if len(runs) > 1}
    grouped = {name: model.get_submodule(name).groups for name in dilated if model.get_submodule(name).groups > 1}
    if grouped and all(run.channels % groups == 0 for name, groups in grouped.items() for run in dilated[name]):
        name, groups = next(iter(grouped.items()))
        raise NatsError(
            f"{source}: {name}: expected small convolutions of whole cardinality groups, found ones that may each"
            f" spread over all {groups}: no shape tells"
        )


def _join_pieces(state: dict[str, Tensor], name: str, runs: Runs, conv: nn.Conv2d, source: str) -> None:
    """Replace the kernels of a convolution's dilations by that of the plain one.

    Args:
        state: the checkpoint's tensors; is changed.
        name: the convolution's.
        runs: its runs, a small convolution each.
        conv: it, regrouped.
        source: what error messages call the checkpoint.
    """
    if len(runs) == 1 and f"{name}.weight" in state:  # left as it was
        return
    pieces = []
    for index, run in enumerate(runs):
        key, shape = f"{name}.conv_list.{index}.weight", (run.channels, *conv.weight.shape[1:])
        piece = state.pop(key, None)
        wanted = f"expected {shape}, as the pattern's {run.channels} channels at {run.dilation_h}x{run.dilation_w}"
        if piece is None:
            raise NatsError(f"{source}: {key}: {wanted}, found no such tensor")
        if conv.groups > 1 and piece.ndim == 4 and piece.shape[1] != shape[1] and len(piece) == run.channels:
            raise NatsError(f"{source}: {key}: {wanted}, found {tuple(piece.shape)}: groups of its own over all inputs")
        if tuple(piece.shape) != shape:
            raise NatsError(f"{source}: {key}: {wanted}, found {tuple(piece.shape)}")
        pieces.append(piece)
    state[f"{name}.weight"] = torch.cat(pieces)
