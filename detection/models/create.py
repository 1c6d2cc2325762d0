"""torchvision's detectors on timm backbones, described by a config that travels with the weights."""

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...base.errors import NatsError
from ...folders.find_genotype import find_genotype
from ...genotype.genotype import Genotype
from ...networks.batch_norm import recalibrate_bn
from .backbone import create_body, freeze_stages
from .config import TRAINABLE_LAYERS, DetectorConfig
from .frameworks import build_framework
from .mixed_precision import keep_boxes_exact

ALL_LAYERS = 99  # more stages than any network has


def create_detector(
    framework: str = "fasterrcnn",
    backbone: str = "nats_resnet50",
    num_classes: int = 91,
    genotype: Genotype | Mapping | str | os.PathLike | None = None,
    weights: str | None = "pretrained",
    *,
    trainable_layers: int | None = None,
    norm: str | None = None,
    calibration: Iterable | None = None,
    **options: Any,
) -> nn.Module:
    """Build a torchvision detector on a timm backbone.

    Args:
        framework: "fasterrcnn", "maskrcnn", "cascade_rcnn", "retinanet" or "fcos".
        backbone: any timm model with feature maps at strides 4, 8, 16 and 32, plain or a nats variant.
        num_classes: classes including the background, label 0.
        genotype: the backbone's genotype, whatever `find_genotype` takes: a name, a file, the folder of a search, a
            repository; None: the variant's default, or a plain network for a plain name.
        weights: the backbone's: "pretrained" for timm's ImageNet weights, a folder, safetensors file or Hub
            repository of a timm model of the same architecture or a detector on it, or None for random ones.
        trainable_layers: stages trained, from the end; None: 3 of a pretrained backbone, all of a random one.
        norm: "frozen", "live" or "sync" batch norm; None: frozen in a pretrained backbone, live in a random one.
        calibration: training batches, lists of (3, H, W) images in 0..1 or tuples that begin with one; the backbone's
            batch norms are recalibrated on them, at training size, before they are frozen. A regrouped pretrained
            backbone needs it: other dilations have other statistics.
        **options: those of `DetectorOptions`, such as fpn_channels and min_size; and of `DetectorConfig` classes,
            category_ids, image_mean and image_std (default: those the weights were trained with).

    Returns:
        The detector. Training: `detector(images, targets)` gives a dict of losses; evaluation: `detector(images)` a
        list of dicts with boxes (XYXY, pixels), labels, scores and, from one with masks, masks (N, 1, H, W) in 0..1.
        Its `config` is a DetectorConfig.

    Raises:
        NatsError: an unknown framework, backbone, option or weights, or freezing of random weights.

    Example:
        >>> detector = create_detector("fasterrcnn", "nats_resnet50", num_classes=3, genotype="runs/search")
        >>> losses = detector([torch.rand(3, 480, 640)], [{"boxes": torch.tensor([[9., 9., 99., 99.]]),
        ...                                                "labels": torch.tensor([1])}])
    """
    if trainable_layers is None:
        trainable_layers = ALL_LAYERS if weights is None else TRAINABLE_LAYERS
    body = create_body(backbone, None if genotype is None else find_genotype(genotype), weights)
    config = DetectorConfig.from_dict(
        {
            "framework": framework,
            "backbone": backbone,
            "num_classes": num_classes,
            "genotype": body.genotype.to_dict() if body.genotype else None,
            "trainable_layers": trainable_layers,
            "norm": norm or ("live" if weights is None else "frozen"),
            "image_mean": body.pretrained_cfg["mean"],
            "image_std": body.pretrained_cfg["std"],
            **options,
        },
        source="create_detector",
    )
    detector = assemble(config, body)
    if calibration is not None:
        recalibrate_backbone(detector, calibration)
    freeze(detector)
    if weights is None and (config.norm == "frozen" or not all(p.requires_grad for p in body.parameters())):
        raise NatsError(
            "weights: freezing batch norms or stages of a random backbone ruins it; freeze only loaded ones"
        )
    return detector


def build_detector(config: DetectorConfig) -> nn.Module:
    """Build a detector of this config with random weights, to load a state dict into.

    Example:
        >>> detector = build_detector(read_detector_config("runs/nats/best"))
        >>> detector.load_state_dict(load_weights("runs/nats/best/model.safetensors"))
        <All keys matched successfully>
    """
    genotype = None if config.genotype is None else Genotype.from_dict(config.genotype, source="config: genotype")
    return freeze(assemble(config, create_body(config.backbone, genotype)))


def assemble(config: DetectorConfig, body: nn.Module) -> nn.Module:
    """Put a framework's modules around a feature extractor; nothing frozen yet. Boxes stay float32 under autocast.

    Example:
        >>> detector = assemble(DetectorConfig("fcos", "resnet18", 3), create_body("resnet18"))
        >>> detector.config.framework
        'fcos'
    """
    detector = build_framework(config, body)
    detector.config = config  # type: ignore[assignment]  # torch declares no attributes that are no tensors
    keep_boxes_exact(detector)
    return detector


def freeze(detector: nn.Module) -> nn.Module:
    """Freeze the batch norms and stages that the detector's config says; statistics must be right by now.

    Example:
        >>> detector = freeze(assemble(DetectorConfig("fcos", "resnet18", 3, norm="frozen"), create_body("resnet18")))
    """
    config: DetectorConfig = detector.config
    backbone = detector.backbone
    if config.norm == "frozen":
        backbone.body = freeze_batch_norm_2d(backbone.body)
    freeze_stages(backbone.body, config.trainable_layers)
    return detector


def resized_batches(detector: nn.Module, loader: Iterable) -> Iterator[Tensor]:
    """Yield the tensors (N, 3, H, W) that the backbone sees: normalised and resized by the detector's own transform.

    Example:
        >>> tensors = next(resized_batches(detector, [[torch.rand(3, 480, 640)]]))
        >>> tensors.shape  # of min_size 800
        torch.Size([1, 3, 800, 1088])
    """
    device = next(detector.parameters()).device
    for batch in loader:
        images = batch[0] if isinstance(batch, tuple) else batch
        yield detector.transform([image.to(device) for image in images])[0].tensors


def recalibrate_backbone(detector: nn.Module, loader: Iterable) -> None:
    """Remeasure the live batch norms of a detector's backbone; nothing to do in one without batch norm.

    Example:
        >>> recalibrate_backbone(detector, [[torch.rand(3, 480, 640)] for _ in range(10)])
    """
    body = detector.backbone.body
    if any(isinstance(module, _BatchNorm) for module in body.modules()):
        recalibrate_bn(body, resized_batches(detector, loader))
