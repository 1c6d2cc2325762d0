"""torchvision's detector checkpoints as detectors of this library: the same modules, so the same outputs."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import get_weight
from torchvision.models.detection import (
    FasterRCNN_ResNet50_FPN_Weights,
    MaskRCNN_ResNet50_FPN_Weights,
    RetinaNet_ResNet50_FPN_Weights,
)
from torchvision.ops.misc import FrozenBatchNorm2d

from ...base.errors import NatsError, one_line
from ...folders.checkpoint import read_checkpoint
from ...folders.limits import on_meta
from .config import DetectorConfig
from .create import build_detector

# Published checkpoints that were trained, and in torchvision run, with an epsilon of 0 in the backbone's batch norms.
_WITHOUT_EPSILON = (
    FasterRCNN_ResNet50_FPN_Weights.COCO_V1,
    MaskRCNN_ResNet50_FPN_Weights.COCO_V1,
    RetinaNet_ResNet50_FPN_Weights.COCO_V1,
)
_COCO_NAMES = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]  # by COCO's own ids, "N/A" where there is none
_ANCHORS_PER_PLACE = 9  # RetinaNet
# Weights whose sizes are a config's widths and classes.
_PYRAMID, _OLD_PYRAMID = "backbone.fpn.inner_blocks.0.0.weight", "backbone.fpn.inner_blocks.0.weight"
_HEAD, _MASKS = "roi_heads.box_head.fc6.weight", "roi_heads.mask_predictor.mask_fcn_logits.weight"
_DENSE_CLASSES, _BOX_CLASSES = "head.classification_head.cls_logits.weight", "roi_heads.box_predictor.cls_score.weight"
_WIDTHS = (_PYRAMID, _OLD_PYRAMID, _HEAD, _MASKS, _DENSE_CLASSES, _BOX_CLASSES)
_EPSILON = 1e-5  # of torchvision's batch norms


def from_torchvision(
    checkpoint: str | os.PathLike,
    backbone: str = "resnet50",
    classes: Sequence[str] | None = None,
    epsilon: float | None = None,
) -> nn.Module:
    """Convert a torchvision checkpoint into a detector with its weights and the same outputs, in evaluation mode.

    Args:
        checkpoint: a .pth file of fasterrcnn_resnet50_fpn, maskrcnn_resnet50_fpn, retinanet_resnet50_fpn or
            fcos_resnet50_fpn, of torchvision's reference training or with the state dict alone, or a .safetensors file;
            or the name of weights that torchvision downloads (FasterRCNN_ResNet50_FPN_Weights.COCO_V1).
        backbone: timm name of a ResNet with the same layers.
        classes: names of the labels 1, 2, ...; default: COCO's, if there are 90.
        epsilon: of the backbone's batch norms in torchvision; default: 0 for published checkpoints that were trained
            so, else 1e-5. Another epsilon than 1e-5 goes into the running variances.

    Raises:
        NatsError: no such file or weights, or not the layout of one of these frameworks on this backbone.

    Example:
        >>> detector = from_torchvision("FasterRCNN_ResNet50_FPN_Weights.COCO_V1")
        >>> save_detector(detector, "runs/coco")
    """
    state = read_checkpoint(checkpoint) if Path(checkpoint).exists() else _download(str(checkpoint))
    config = _config(state, backbone, classes, str(checkpoint))
    with on_meta(f"{checkpoint} on {backbone}"):
        expected = build_detector(config)
    try:  # on the meta device first: a network of another size takes no memory there
        expected.load_state_dict({name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()})
    except RuntimeError as error:
        raise NatsError(f"{checkpoint}: is no {config.framework} on {backbone}: {_first_difference(error)}") from error
    detector = build_detector(config)
    detector.load_state_dict(state)
    _shift_variances(detector.backbone.body, (_epsilon_of(checkpoint) if epsilon is None else epsilon) - _EPSILON)
    return detector.eval()


def _download(name: str) -> dict[str, Tensor]:
    try:
        weights = get_weight(name)
    except ValueError as error:
        raise NatsError(
            f"{name}: neither a file nor torchvision's weights (as FasterRCNN_ResNet50_FPN_Weights.COCO_V1)"
        ) from error
    try:
        return weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: the file that came has another hash
        raise NatsError(f"{name}: can not be downloaded: {one_line(error)[:300]}") from error
    except Exception as error:  # pickle's own: the file in torch's cache, whose hash nobody checks, is not plain data
        raise NatsError(f"{name}: expected a checkpoint of tensors in {torch.hub.get_dir()}, found others") from error


def _config(state: Mapping[str, Tensor], backbone: str, classes: Sequence[str] | None, source: str) -> DetectorConfig:
    framework, outputs = _framework(state, source)
    if framework == "maskrcnn" and _HEAD not in state:
        raise NatsError(f"{source}: {_HEAD} is missing, expected a box head of two layers")
    for name in _WIDTHS:
        if name in state and state[name].ndim < 2:
            raise NatsError(f"{source}: {name}: expected a weight, found a tensor of {state[name].ndim} dimensions")
    num_classes, rest = divmod(len(state[outputs]), _ANCHORS_PER_PLACE if framework == "retinanet" else 1)
    if rest:
        raise NatsError(f"{source}: {outputs}: expected {_ANCHORS_PER_PLACE} anchors per place, as RetinaNet has")
    if classes is None:
        # COCO's names by its ids 1 to 90; the ten that COCO left out are named by their number
        coco = (name if name != "N/A" else f"N/A {number}" for number, name in enumerate(_COCO_NAMES) if number)
        classes = tuple(coco) if num_classes == len(_COCO_NAMES) else ()
    if classes and len(classes) != num_classes - 1:
        raise NatsError(f"classes: expected {num_classes - 1} names, without the background, found {len(classes)}")
    return DetectorConfig(
        framework=framework,
        backbone=backbone,
        num_classes=num_classes,
        classes=tuple(classes),
        category_ids=tuple(range(1, num_classes)) if classes else (),
        **_widths(state, framework),
    )


def _framework(state: Mapping[str, Tensor], source: str) -> tuple[str, str]:
    """Tell the framework, and the weight whose rows are its classes."""
    rows = {
        "retinanet": _DENSE_CLASSES,
        "fcos": _DENSE_CLASSES,
        "fasterrcnn": _BOX_CLASSES,
        "maskrcnn": _BOX_CLASSES,
    }
    particular = {
        "fcos": "head.regression_head.bbox_ctrness.weight",
        "retinanet": "head.regression_head.bbox_reg.weight",
        "maskrcnn": _MASKS,
        "fasterrcnn": _HEAD,
    }
    for framework, name in particular.items():
        if name in state and rows[framework] in state:
            return framework, rows[framework]
    raise NatsError(
        f"{source}: expected the tensors of torchvision's fasterrcnn_resnet50_fpn, maskrcnn_resnet50_fpn,"
        f" retinanet_resnet50_fpn or fcos_resnet50_fpn, found {', '.join(name[:60] for name in list(state)[:3])}, ..."
    )


def _widths(state: Mapping[str, Tensor], framework: str) -> dict[str, Any]:
    pyramid = state.get(_PYRAMID, state.get(_OLD_PYRAMID))
    widths: dict[str, Any] = {} if pyramid is None else {"fpn_channels": len(pyramid)}
    if framework in ("fasterrcnn", "maskrcnn"):
        widths["head_size"] = len(state[_HEAD])
    if framework == "maskrcnn":
        widths["mask_channels"] = state[_MASKS].shape[1]
    return widths


def _epsilon_of(checkpoint: str | os.PathLike) -> float:
    names = {name for weights in _WITHOUT_EPSILON for name in (str(weights), os.path.basename(weights.url))}
    return 0.0 if os.path.basename(checkpoint) in names else _EPSILON


@torch.no_grad()
def _shift_variances(body: nn.Module, shift: float) -> None:
    """Running variances such that they and our epsilon give what they and the checkpoint's epsilon gave."""
    for module in body.modules():
        if shift and isinstance(module, FrozenBatchNorm2d):
            module.running_var.add_(shift)


def _first_difference(error: RuntimeError) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return (lines[1] if len(lines) > 1 else lines[0]).split(",")[0].rstrip(". ")
