"""NATS ResNets: timm's ResNets with searched dilations.

Efficient Neural Architecture Transformation Search in Channel-Level for Object Detection
- https://arxiv.org/abs/1909.02293

A variant is timm's ResNet of the same name with some of its convolutions regrouped by a genotype: same parameters,
same multiply-adds, same state dict, so that timm's ImageNet weights load strictly. Made as detection backbones: the
logits of a regrouped classifier are not ImageNet-accurate before fine-tuning.

The default genotypes of ResNet-18 and ResNet-50 were searched, as their provenance says. The other variants' were
transferred from those two (see `Genotype.transfer`), not searched.
"""

import os
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from timm.models import DefaultCfg, build_model_with_cfg, get_arch_pretrained_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from ..base.names import VARIANT_PREFIX
from ..folders.find_genotype import find_genotype
from ..genotype.catalogue import DEFAULT_GENOTYPES, default_genotype
from ..genotype.genotype import Genotype
from ..networks.transform import check_architecture, transform
from .model_args import RecordsGenotype, check_saved_args, check_saved_size, prepare_saved_weights

__all__ = ["DEFAULT_GENOTYPES", "NatsResNet", "default_genotype"]


# The old training recipe, on which detection papers' baselines stand.
DEFAULT_TAG = "tv_in1k"


class NatsResNet(RecordsGenotype, ResNet):
    """timm's ResNet, transformed by a genotype in its constructor.

    Args:
        architecture: timm's name of the plain network.
        genotype: a Genotype, its JSON form, a published name or a file's path; None: the architecture's default.
        **kwargs: as for timm's ResNet.

    Attributes:
        genotype: the genotype it runs.

    Example:
        >>> model = timm.create_model("nats_resnet50.tv_in1k", pretrained=True, genotype="mine.json")
        >>> type(model).__name__, model.genotype.architecture
        ('NatsResNet', 'resnet50')
    """

    def __init__(
        self,
        *args: Any,
        architecture: str,
        genotype: Genotype | Mapping | str | os.PathLike | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.genotype = find_genotype(default_genotype(architecture) if genotype is None else genotype)
        check_architecture(self.genotype, architecture)
        transform(self, self.genotype)


def _derive_cfgs(architecture: str) -> DefaultCfg:
    """Take the plain architecture's pretrained cfgs under the same tags, `tv_in1k` first: first is timm's default."""
    cfgs = {cfg.tag or "": replace(cfg, architecture=None) for cfg in get_arch_pretrained_cfgs(architecture).values()}
    tags = sorted(cfgs, key=lambda tag: tag != DEFAULT_TAG)
    return DefaultCfg(tags=deque(tags), cfgs=cfgs, is_pretrained=True)


default_cfgs = {VARIANT_PREFIX + name: _derive_cfgs(name) for name in DEFAULT_GENOTYPES}


def _create_nats_resnet(variant: str, pretrained: bool = False, **kwargs: Any) -> NatsResNet:
    architecture = variant.removeprefix(VARIANT_PREFIX)
    if check_saved_args(kwargs):
        check_saved_size(lambda: build_model_with_cfg(NatsResNet, variant, False, architecture=architecture, **kwargs))
        if pretrained:
            prepare_saved_weights(kwargs)
    return build_model_with_cfg(NatsResNet, variant, pretrained, architecture=architecture, **kwargs)


@register_model
def nats_resnet18(pretrained: bool = False, **kwargs: Any) -> NatsResNet:
    """ResNet-18. Its default genotype was searched.

    Example:
        >>> model = timm.create_model("nats_resnet18", pretrained=True)
    """
    model_args = dict(block=BasicBlock, layers=(2, 2, 2, 2))
    return _create_nats_resnet("nats_resnet18", pretrained, **dict(model_args, **kwargs))


@register_model
def nats_resnet34(pretrained: bool = False, **kwargs: Any) -> NatsResNet:
    """ResNet-34.

    Its default genotype is transferred from ResNet-18's, `resnet18_c_n4_bccd`, not searched.

    Example:
        >>> model = timm.create_model("nats_resnet34", pretrained=True)
    """
    model_args = dict(block=BasicBlock, layers=(3, 4, 6, 3))
    return _create_nats_resnet("nats_resnet34", pretrained, **dict(model_args, **kwargs))


@register_model
def nats_resnet50(pretrained: bool = False, **kwargs: Any) -> NatsResNet:
    """ResNet-50. Its default genotype was searched.

    Example:
        >>> model = timm.create_model("nats_resnet50", pretrained=True)
    """
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3))
    return _create_nats_resnet("nats_resnet50", pretrained, **dict(model_args, **kwargs))


@register_model
def nats_resnet101(pretrained: bool = False, **kwargs: Any) -> NatsResNet:
    """ResNet-101.

    Its default genotype is transferred from ResNet-50's, `resnet50_c_n16_bccd`, not searched.

    Example:
        >>> model = timm.create_model("nats_resnet101", pretrained=True)
    """
    model_args = dict(block=Bottleneck, layers=(3, 4, 23, 3))
    return _create_nats_resnet("nats_resnet101", pretrained, **dict(model_args, **kwargs))


@register_model
def nats_resnet152(pretrained: bool = False, **kwargs: Any) -> NatsResNet:
    """ResNet-152.

    Its default genotype is transferred from ResNet-50's, `resnet50_c_n16_bccd`, not searched.

    Example:
        >>> model = timm.create_model("nats_resnet152", pretrained=True)
    """
    model_args = dict(block=Bottleneck, layers=(3, 8, 36, 3))
    return _create_nats_resnet("nats_resnet152", pretrained, **dict(model_args, **kwargs))


@register_model
def nats_resnext50_32x4d(pretrained: bool = False, **kwargs: Any) -> NatsResNet:
    """ResNeXt-50 32x4d.

    Its default genotype is transferred from ResNet-50's, `resnet50_c_n16_bccd`, not searched.

    Example:
        >>> model = timm.create_model("nats_resnext50_32x4d", pretrained=True)
    """
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3), cardinality=32, base_width=4)
    return _create_nats_resnet("nats_resnext50_32x4d", pretrained, **dict(model_args, **kwargs))


@register_model
def nats_resnext101_32x4d(pretrained: bool = False, **kwargs: Any) -> NatsResNet:
    """ResNeXt-101 32x4d.

    Its default genotype is transferred from ResNet-50's, `resnet50_c_n16_bccd`, not searched.

    Example:
        >>> model = timm.create_model("nats_resnext101_32x4d", pretrained=True)
    """
    model_args = dict(block=Bottleneck, layers=(3, 4, 23, 3), cardinality=32, base_width=4)
    return _create_nats_resnet("nats_resnext101_32x4d", pretrained, **dict(model_args, **kwargs))


@register_model
def nats_resnext101_32x8d(pretrained: bool = False, **kwargs: Any) -> NatsResNet:
    """ResNeXt-101 32x8d.

    Its default genotype is transferred from ResNet-50's, `resnet50_c_n16_bccd`, not searched.

    Example:
        >>> model = timm.create_model("nats_resnext101_32x8d", pretrained=True)
    """
    model_args = dict(block=Bottleneck, layers=(3, 4, 23, 3), cardinality=32, base_width=8)
    return _create_nats_resnet("nats_resnext101_32x8d", pretrained, **dict(model_args, **kwargs))


@register_model
def nats_wide_resnet50_2(pretrained: bool = False, **kwargs: Any) -> NatsResNet:
    """Wide ResNet-50-2, with 3x3 convolutions twice as wide.

    Its default genotype is transferred from ResNet-50's, `resnet50_c_n16_bccd`, not searched.

    Example:
        >>> model = timm.create_model("nats_wide_resnet50_2", pretrained=True)
    """
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3), base_width=128)
    return _create_nats_resnet("nats_wide_resnet50_2", pretrained, **dict(model_args, **kwargs))


@register_model
def nats_resnet50d(pretrained: bool = False, **kwargs: Any) -> NatsResNet:
    """ResNet-50-D, with a stem of three 3x3 convolutions and average pooling in the shortcuts.

    Its default genotype is transferred from ResNet-50's, `resnet50_c_n16_bccd`, not searched.

    Example:
        >>> model = timm.create_model("nats_resnet50d", pretrained=True)
    """
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3), stem_width=32, stem_type="deep", avg_down=True)
    return _create_nats_resnet("nats_resnet50d", pretrained, **dict(model_args, **kwargs))


@register_model
def nats_seresnet50(pretrained: bool = False, **kwargs: Any) -> NatsResNet:
    """SE-ResNet-50, with squeeze and excitation.

    Its default genotype is transferred from ResNet-50's, `resnet50_c_n16_bccd`, not searched.

    Example:
        >>> model = timm.create_model("nats_seresnet50", pretrained=True)
    """
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3), block_args=dict(attn_layer="se"))
    return _create_nats_resnet("nats_seresnet50", pretrained, **dict(model_args, **kwargs))
