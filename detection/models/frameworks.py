"""torchvision's detection frameworks, put together from a DetectorConfig."""

from typing import Any

from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from .backbone import BackboneWithFPN
from .cascade_rcnn import CascadeRCNN
from .config import FRAMEWORKS, DetectorConfig

ROI_RESOLUTION = 7
MASK_RESOLUTION = 14
MASK_LAYERS = 4
ASPECT_RATIOS = (0.5, 1.0, 2.0)
OCTAVES = (2**0, 2 ** (1 / 3), 2 ** (2 / 3))  # RetinaNet's three sizes of anchors per level


def build_framework(config: DetectorConfig, body: nn.Module) -> nn.Module:
    """Build a framework's modules around a feature extractor, nothing frozen yet.

    Args:
        config: of which the genotype and the backbone's name are not looked at.
        body: see `create_body`.

    Example:
        >>> detector = build_framework(DetectorConfig("retinanet", "resnet18", 3), create_body("resnet18"))
        >>> type(detector).__name__
        'RetinaNet'
    """
    backbone = BackboneWithFPN(body, config.fpn_channels, FRAMEWORKS[config.framework].first_stride)
    return _BUILDERS[config.framework](config, backbone)


def _faster_rcnn(config: DetectorConfig, backbone: BackboneWithFPN) -> FasterRCNN:
    return FasterRCNN(backbone, **_of_images(config), **_of_proposals(config), **_of_boxes(config))


def _mask_rcnn(config: DetectorConfig, backbone: BackboneWithFPN) -> MaskRCNN:
    return MaskRCNN(
        backbone, **_of_images(config), **_of_proposals(config), **_of_boxes(config), **_of_masks(config)
    )  # fmt: skip


def _cascade_rcnn(config: DetectorConfig, backbone: BackboneWithFPN) -> CascadeRCNN:
    masks = {}
    if config.masks:  # the pool is MaskRCNN's own default
        pool = MultiScaleRoIAlign(featmap_names=["0", "1", "2", "3"], output_size=MASK_RESOLUTION, sampling_ratio=2)
        masks = {"mask_roi_pool": pool, **_of_masks(config)}
    return CascadeRCNN(
        backbone,
        config.num_classes,
        representation_size=config.head_size,
        box_batch_size_per_image=config.roi_samples,
        **_of_images(config),
        **_of_proposals(config),
        **{f"box_{key}": value for key, value in _of_detections(config).items()},
        **masks,
    )


def _retinanet(config: DetectorConfig, backbone: BackboneWithFPN) -> RetinaNet:
    sizes = tuple(tuple(int(size * octave) for octave in OCTAVES) for size in _anchor_sizes(config))
    anchors = AnchorGenerator(sizes, (ASPECT_RATIOS,) * len(sizes))
    return RetinaNet(
        backbone, config.num_classes, anchor_generator=anchors, **_of_images(config), **_of_detections(config)
    )  # fmt: skip


def _fcos(config: DetectorConfig, backbone: BackboneWithFPN) -> FCOS:
    sizes = tuple((size,) for size in _anchor_sizes(config))
    points = AnchorGenerator(sizes, ((1.0,),) * len(sizes))
    return FCOS(backbone, config.num_classes, anchor_generator=points, **_of_images(config), **_of_detections(config))


_BUILDERS = {
    "fasterrcnn": _faster_rcnn,
    "maskrcnn": _mask_rcnn,
    "cascade_rcnn": _cascade_rcnn,
    "retinanet": _retinanet,
    "fcos": _fcos,
}


def _anchor_sizes(config: DetectorConfig) -> tuple[int, ...]:
    assert config.anchor_sizes is not None, "DetectorConfig fills them in"
    return config.anchor_sizes


def _of_images(config: DetectorConfig) -> dict[str, Any]:
    return {
        "min_size": config.min_size,
        "max_size": config.max_size,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
    }


def _of_proposals(config: DetectorConfig) -> dict[str, Any]:
    sizes = tuple((size,) for size in _anchor_sizes(config))
    return {"rpn_anchor_generator": AnchorGenerator(sizes, (ASPECT_RATIOS,) * len(sizes))}


def _of_boxes(config: DetectorConfig) -> dict[str, Any]:
    pooled = config.fpn_channels * ROI_RESOLUTION**2
    return {
        "box_batch_size_per_image": config.roi_samples,
        "box_head": TwoMLPHead(pooled, config.head_size),
        "box_predictor": FastRCNNPredictor(config.head_size, config.num_classes),
        **{f"box_{key}": value for key, value in _of_detections(config).items()},
    }


def _of_masks(config: DetectorConfig) -> dict[str, Any]:
    channels = config.mask_channels
    return {
        "mask_head": MaskRCNNHeads(config.fpn_channels, (channels,) * MASK_LAYERS, dilation=1),
        "mask_predictor": MaskRCNNPredictor(channels, channels, config.num_classes),
    }


def _of_detections(config: DetectorConfig) -> dict[str, Any]:
    """Collect what differs from torchvision's defaults."""
    values = {
        "score_thresh": config.score_thresh,
        "nms_thresh": config.nms_thresh,
        "detections_per_img": config.detections,
    }
    return {key: value for key, value in values.items() if value is not None}
