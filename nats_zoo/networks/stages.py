"""Which convolutions of a network can be regrouped, stage by stage."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ..base.errors import GenotypeError
from ..genotype.genotype import Genotype
from .regrouped_conv import can_regroup
from .timm_network import meta_network
from .transform import refuse_foreign_hooks

PROBE_SIZE = 256  # pixels: a multiple of 32, so that every stage's map divides it
# Where timm's features_only wrappers hold the network, if they do not take it apart.
_WRAPPER_PREFIXES = ("", "body.", "model.", "graph_module.")


def searchable_convs(model: nn.Module) -> dict[int, list[str]]:
    """List the convolutions that can be regrouped, by stage.

        >>> searchable_convs(timm.create_model("resnet18"))[4]
        ['layer4.0.conv1', 'layer4.0.conv2', 'layer4.1.conv1', 'layer4.1.conv2']

    Stages come from timm's `feature_info`: the map at stride 4 is that of stage 1 (ResNet's layer1), stride 8 of
    stage 2, stride 16 of stage 3, stride 32 of stage 4; stage 0 and below is the stem. With `output_stride` the later
    stages keep their numbers, so maps are counted, from the first one's stride; a network that lists several maps of
    one stride (ConvMixer, each block's) has as many stages. A convolution belongs to the first stage whose map comes
    after it in network order; what comes after the last map (a classifier's own convolutions, GhostNet's last blocks)
    is left out. Where `feature_info` does not tell where the maps lie (HRNet, whose branches run beside each other;
    CoaT), the size of each convolution's output decides: it belongs to the first stage whose map is no larger.

    Args:
        model: a timm network, plain or regrouped, `features_only` or not; or any other module, which without
            `feature_info` is one stage, 0.

    Returns:
        Names as in `model.named_modules()`, in network order, by stage number. Stages without such convolutions are
        left out. What `transform` refuses is left out: convolutions with a padding mode other than zeros, of a class
        with a forward of its own (weight standardisation), or in a block that rebuilds them for deployment (MobileOne).
        So is what it takes but a dilation does not suit: 1x1 kernels, which none changes, and those of even size, which
        not every dilation fits.
    """
    convs = list(_regroupable(model))
    info = _feature_info(model)
    if not convs or not info:
        return {0: convs} if convs else {}
    stage_of = _stages_by_order(model, info)
    if stage_of is None:
        stage_of = _stages_by_size(model, info)
    stages: dict[int, list[str]] = {}
    for name in convs:
        if name in stage_of:
            stages.setdefault(stage_of[name], []).append(name)
    return dict(sorted(stages.items()))


def _regroupable(model: nn.Module) -> Iterator[str]:
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if can_regroup(module) and not _is_rebuilt(modules, name):
            yield name


def _is_rebuilt(modules: dict[str, nn.Module], name: str) -> bool:
    try:
        refuse_foreign_hooks(modules, name, name)
    except GenotypeError:
        return True
    return False


def _feature_info(model: nn.Module) -> list[Mapping]:
    """timm's description of the maps, as far as the network computes them."""
    info: Any = getattr(model, "feature_info", None) or []
    if not hasattr(info, "out_indices"):
        return list(info)
    return info.info[: 1 + max(index % len(info.info) for index in info.out_indices)]  # features_only drops the rest


def _numbered(info: list[Mapping]) -> Iterator[tuple[int, Mapping]]:
    return enumerate(info, start=int(math.log2(info[0]["reduction"])) - 1)


def _stages_by_order(model: nn.Module, info: list[Mapping]) -> dict[str, int] | None:
    """Stage of each module by where the maps lie among the modules; None if they can not be told apart there."""
    names = [name for name, _ in model.named_modules()]
    places = {name: place for place, name in enumerate(names)}
    stage_of: dict[str, int] = {}
    start = 0
    for stage, entry in _numbered(info):
        if entry["module"] == "":  # the network itself: its map is not at any one place
            continue
        module = _place(entry["module"], places)
        if module is None:
            return None
        stop = 1 + max(places[name] for name in names if name == module or name.startswith(f"{module}."))
        if stop <= start:  # not in network order
            return None
        stage_of |= dict.fromkeys(names[start:stop], stage)
        start = stop
    return stage_of


def _place(module: str, places: Mapping[str, int]) -> str | None:
    """The name under which a module of `feature_info` is found, in a features_only wrapper too."""
    flat = module.replace(".", "_")  # some wrappers flatten sequences so
    return next(
        (name for prefix in _WRAPPER_PREFIXES for name in (prefix + module, prefix + flat) if name in places), None
    )


@torch.no_grad()
def _stages_by_size(model: nn.Module, info: list[Mapping]) -> dict[str, int]:
    """Stage of each convolution by the size of the map that it gives, seen in one pass without data."""
    meta = {tensor: torch.empty_like(tensor, device="meta") for tensor in model.buffers()}
    meta |= {p: nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in model.parameters()}
    probe = copy.deepcopy(model, {id(tensor): empty for tensor, empty in meta.items()}).eval()  # no copy of the weights
    images = _probe_images(probe)
    widths = {stage: images.shape[-1] // entry["reduction"] for stage, entry in _numbered(info)}
    stage_of: dict[str, int] = {}

    def note(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            stage_of[name] = next((stage for stage, width in widths.items() if width <= output.shape[-1]), max(widths))

        return hook

    for name, module in probe.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note(name))
    probe(images)
    return stage_of


def _probe_images(model: nn.Module) -> Tensor:
    """One image as the network takes it, on the meta device."""
    conv = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    cfg = getattr(model, "pretrained_cfg", None) or {}
    size = cfg["input_size"][1:] if cfg.get("fixed_input_size") else (PROBE_SIZE, PROBE_SIZE)
    return torch.empty(1, conv.in_channels, *size, dtype=conv.weight.dtype, device="meta")


def split_stage(conv: str) -> tuple[str, str]:
    """Split a convolution's name behind its stage: a stage's name ends with the first part that ends with a digit.

    >>> split_stage("layer2.0.conv2")
    ('layer2', '0.conv2')
    """
    parts = conv.split(".")
    end = next((i for i, part in enumerate(parts[:-1], start=1) if part[-1:].isdigit()), 0)
    return ".".join(parts[:end]), ".".join(parts[end:])


def genotype_stages(genotype: Genotype) -> dict[str, list[str]]:
    """List a genotype's convolutions by the title of their stage, both in order of appearance.

        >>> genotype_stages(Genotype("resnet18", {"layer4.1.conv2": [[512, 1, 3]]}))
        {'layer4': ['layer4.1.conv2']}

    Stages are read off the convolutions' names (`layer2`, `s2`, `blocks.2`); where those tell none (VGG's
    `features.5`), they are timm's.
    """
    titles = {conv: split_stage(conv)[0] for conv in genotype.convs}
    if not any(titles.values()):
        titles |= _timm_stages(genotype)
    stages: dict[str, list[str]] = {}
    for conv, title in titles.items():
        stages.setdefault(title, []).append(conv)
    return stages


def _timm_stages(genotype: Genotype) -> dict[str, str]:
    """Stages of the genotype's convolutions in timm's network; none if timm has no such network."""
    if not timm.is_model(genotype.architecture):
        return {}
    stages = searchable_convs(meta_network(genotype.architecture))
    return {conv: f"stage {stage}" for stage, convs in stages.items() for conv in convs if conv in genotype.convs}
