"""Which convolutions of a network can be regrouped, stage by stage."""

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .regrouped_conv import can_regroup

PROBE_SIZE = 256  # pixels: a multiple of 32, so that every stage's map divides it


def searchable_convs(model: nn.Module) -> dict[int, list[str]]:
    """The convolutions that can be regrouped, by stage.

    Stages come from timm's `feature_info`: the map at stride 4 is that of stage 1 (ResNet's layer1), stride 8 of
    stage 2, stride 16 of stage 3, stride 32 of stage 4; stage 0 and below is the stem. With `output_stride` the later
    stages keep their numbers. A convolution belongs to the first stage whose map comes after it in network order; what
    comes after the last map (a classifier's own convolutions) is left out. Where `feature_info` names modules that the
    network has not (HRNet, whose branches run beside each other), the size of each convolution's output decides.

    Args:
        model: a timm network, plain or regrouped, `features_only` or not; or any other module, which without
            `feature_info` is one stage, 0.

    Returns:
        Names as in `model.named_modules()`, in network order, by stage number. Stages without such convolutions are
        left out. Convolutions of 1x1, with a padding mode other than zeros, with a kernel of even size, or of a class
        with a forward of its own (weight standardisation) can not be regrouped.
    """
    convs = [name for name, module in model.named_modules() if can_regroup(module)]
    info = _feature_info(model)
    if not info:
        return {0: convs} if convs else {}
    stage_of = _stages_by_order(model, info) or _stages_by_size(model, info)
    stages: dict[int, list[str]] = {}
    for name in convs:
        if name in stage_of:
            stages.setdefault(stage_of[name], []).append(name)
    return dict(sorted(stages.items()))


def _feature_info(model: nn.Module) -> list[Mapping]:
    info = getattr(model, "feature_info", None) or []
    return list(getattr(info, "info", info))  # features_only wraps the list


def _first_stage(info: list[Mapping]) -> int:
    return int(math.log2(info[0]["reduction"])) - 1


def _stages_by_order(model: nn.Module, info: list[Mapping]) -> dict[str, int] | None:
    """Stage of each module by where the maps lie among the modules; None if `feature_info` names unknown ones."""
    names = [name for name, _ in model.named_modules()]
    places = {name: place for place, name in enumerate(names)}
    stage_of: dict[str, int] = {}
    start = 0
    for stage, entry in enumerate(info, start=_first_stage(info)):
        module = entry["module"]
        if module == "":  # the network itself: its map is not at any one place
            continue
        if module not in places:
            module = module.replace(".", "_")  # features_only flattens sequences so
        if module not in places:
            return None
        stop = max(places[name] for name in names if name == module or name.startswith(f"{module}."))
        stage_of |= dict.fromkeys(names[start : stop + 1], stage)
        start = max(start, stop + 1)
    return stage_of


@torch.no_grad()
def _stages_by_size(model: nn.Module, info: list[Mapping]) -> dict[str, int]:
    """Stage of each module by the size of the map that it gives, seen in one pass without data."""
    stages = {entry["reduction"]: stage for stage, entry in enumerate(info, start=_first_stage(info))}
    stage_of: dict[str, int] = {}
    probe = copy.deepcopy(model).to("meta").eval()

    def note(name: str):
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            stage_of[name] = stages.get(PROBE_SIZE // output.shape[-1], -1)

        return hook

    for name, module in probe.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note(name))
    channels = next(module.in_channels for module in probe.modules() if isinstance(module, nn.Conv2d))
    probe(torch.empty(1, channels, PROBE_SIZE, PROBE_SIZE, device="meta"))
    return {name: stage for name, stage in stage_of.items() if stage >= 0}
