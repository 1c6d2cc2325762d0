"""Any timm network with `features_only` as a backbone with a feature pyramid for torchvision's detectors."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace

import timm
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7

from ...base.errors import NatsError
from ...genotype.genotype import Genotype
from ...models.named import PRETRAINED, RANDOM, find_network

PYRAMID_STRIDES = [4, 8, 16, 32]


class BackboneWithFPN(nn.Module):
    """A timm feature extractor and a feature pyramid of five levels on its maps.

    Args:
        body: a timm `features_only` network that returns exactly the maps at strides 4, 8, 16 and 32.
        out_channels: channels of every level of the pyramid.
        first_stride: 4 for R-CNNs, or 8 for RetinaNet and FCOS, which leave the finest map out.

    Shape:
        input (N, 3, H, W); output an ordered dict of (N, out_channels, H/s, W/s) under torchvision's keys, which its
        detectors pool from: for a first stride of 4 '0' to '3' for s = 4, 8, 16, 32, and 'pool' for s = 64; for one of
        8 '0' to '2' for s = 8, 16, 32, and 'p6' and 'p7', computed from the level before, for s = 64 and 128.

    Example:
        >>> backbone = BackboneWithFPN(create_body("resnet18"))
        >>> {key: tuple(level.shape) for key, level in backbone(torch.rand(1, 3, 64, 64)).items()}
        {'0': (1, 256, 16, 16), '1': (1, 256, 8, 8), '2': (1, 256, 4, 4), '3': (1, 256, 2, 2), 'pool': (1, 256, 1, 1)}
    """

    def __init__(self, body: nn.Module, out_channels: int = 256, first_stride: int = 4):
        super().__init__()
        self.body = body
        self.out_channels = out_channels
        self._first_level = PYRAMID_STRIDES.index(first_stride)
        coarser = LastLevelP6P7(out_channels, out_channels) if self._first_level else LastLevelMaxPool()
        channels = body.feature_info.channels()[self._first_level :]
        self.fpn = FeaturePyramidNetwork(channels, out_channels, extra_blocks=coarser)
        self._channels_last_axis = getattr(body, "output_fmt", "NCHW") == "NHWC"

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.body(images)[self._first_level :]
        if self._channels_last_axis:
            features = [feature.permute(0, 3, 1, 2).contiguous() for feature in features]
        return self.fpn(OrderedDict((str(level), feature) for level, feature in enumerate(features)))


def create_body(name: str, genotype: Genotype | None = None, weights: str | None = None) -> nn.Module:
    """Create a timm `features_only` network that returns its maps at strides 4, 8, 16 and 32.

    Args:
        name: a timm model name, with a tag if wanted (`resnet50.tv_in1k`), plain or a nats variant.
        genotype: what the nats variant runs; given with a plain name, the variant of that name is built, or the plain
            network regrouped where there is none.
        weights: "pretrained" for timm's ImageNet weights; the folder, safetensors file or Hub repository of a timm
            model of the same (plain) architecture, or of a detector on it, whose backbone is taken; None for random
            ones.

    Returns:
        The network; its `genotype` is the Genotype it runs, or None.

    Raises:
        NatsError: no such model, no such maps, or weights that do not fit.

    Example:
        >>> body = create_body("nats_resnet50", weights="pretrained")
        >>> body.feature_info.reduction()
        [4, 8, 16, 32]
    """
    if not timm.is_model(name.partition(".")[0]):
        raise NatsError(f"backbone: timm has no model {name!r}")
    network = find_network(name, genotype)
    if weights != PRETRAINED:
        network = replace(network, tag="")
    strides, indices = network.map_strides(), network.map_indices()
    if [strides[index] for index in indices] != PYRAMID_STRIDES:
        found = list(strides.values())
        raise NatsError(f"backbone {name}: its maps have strides {found}, expected {PYRAMID_STRIDES} among them")
    if network.has_fixed_size():
        raise NatsError(f"backbone {name}: takes images of one size only, a detector's images have any")
    return network.build(weights or RANDOM, features_only=True, out_indices=indices)


def freeze_stages(body: nn.Module, trainable_layers: int) -> None:
    """Stop the gradient of all but the last stages, counted as torchvision does.

    Args:
        body: a timm `features_only` network.
        trainable_layers: how many stages from the end stay trainable. A ResNet has five (the stem is one), so 5 or
            more trains everything and 3 trains layer2 to layer4.

    Raises:
        NatsError: a network whose stages can not be told apart.

    Example:
        >>> freeze_stages(body, trainable_layers=3)
        >>> body.layer1[0].conv1.weight.requires_grad, body.layer2[0].conv1.weight.requires_grad
        (False, True)
    """
    if trainable_layers >= len(body.feature_info.info):
        return
    stages = _stages(body)
    for stage in stages[: len(stages) - trainable_layers]:
        for module in stage:
            module.requires_grad_(False)


def _stages(body: nn.Module) -> list[list[nn.Module]]:
    """Parts of the body in the order in which they run, cut after each module that timm lists in its feature info."""
    last = max(body.feature_info.out_indices)  # what comes behind it, timm leaves out
    ends = {info["module"].replace(".", "_") for info in body.feature_info.info if info["index"] <= last}
    parts = dict(_parts(body, ends))
    if not ends <= parts.keys():
        raise NatsError(f"trainable_layers: the stages of {type(body).__name__} can not be told apart; train all of it")
    stages: list[list[nn.Module]] = [[]]
    for name, part in parts.items():
        stages[-1].append(part)
        if name in ends:
            stages.append([])
    return [stage for stage in stages if stage]


def _parts(module: nn.Module, ends: set[str], prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Children by name, and instead of a Sequential in which stages end, its own; `_` where timm has a dot."""
    for name, child in module.named_children():
        inner = f"{prefix}{name}_"
        if isinstance(child, nn.Sequential) and any(end.startswith(inner) for end in ends):
            yield from _parts(child, ends, inner)
        else:
            yield prefix + name, child
