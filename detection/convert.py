"""torchvision's detector checkpoints as detectors of this library: the same modules, so the same outputs."""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import get_weight
from torchvision.models.detection import (
    FasterRCNN_ResNet50_FPN_Weights,
    MaskRCNN_ResNet50_FPN_Weights,
    RetinaNet_ResNet50_FPN_Weights,
)
from torchvision.ops.misc import FrozenBatchNorm2d

from ..errors import NatsError, one_line
from .detector_config import DetectorConfig
from .detectors import build_detector

# Published checkpoints that were trained, and in torchvision run, with an epsilon of 0 in the backbone's batch norms.
_WITHOUT_EPSILON = (
    FasterRCNN_ResNet50_FPN_Weights.COCO_V1,
    MaskRCNN_ResNet50_FPN_Weights.COCO_V1,
    RetinaNet_ResNet50_FPN_Weights.COCO_V1,
)
_COCO_NAMES = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]  # by COCO's own ids, "N/A" where there is none
_ANCHORS_PER_PLACE = 9  # RetinaNet
_EPSILON = 1e-5  # of torchvision's batch norms


def from_torchvision(
    checkpoint: str | os.PathLike,
    backbone: str = "resnet50",
    classes: Sequence[str] | None = None,
    epsilon: float | None = None,
) -> nn.Module:
    """A detector with the weights of a torchvision checkpoint, in evaluation mode.

    Args:
        checkpoint: a file (.pth, of torchvision's builders `fasterrcnn_resnet50_fpn`, `maskrcnn_...`, `retinanet_...`
            and `fcos_...` or of its reference training, or .safetensors of such tensors), or the name of weights that
            torchvision downloads (`FasterRCNN_ResNet50_FPN_Weights.COCO_V1`).
        backbone: timm name of a ResNet with the same layers.
        classes: names of the labels 1, 2, ...; None: COCO's, if there are 91.
        epsilon: of the backbone's batch norms in torchvision; None: 0 for published checkpoints that were trained so,
            else 1e-5. Another epsilon than 1e-5 goes into the running variances.

    Raises:
        NatsError: no such file or weights, or not the layout of one of these frameworks on this backbone.
    """
    state = _read(checkpoint)
    config = _config(state, backbone, classes, str(checkpoint))
    detector = build_detector(config)
    try:
        detector.load_state_dict(state)
    except RuntimeError as error:
        raise NatsError(f"{checkpoint}: is no {config.framework} on {backbone}: {_first_difference(error)}") from error
    _shift_variances(detector.backbone.body, (_epsilon_of(checkpoint) if epsilon is None else epsilon) - _EPSILON)
    return detector.eval()


def _read(checkpoint: str | os.PathLike) -> dict[str, Tensor]:
    path = Path(checkpoint)
    if not path.exists():
        return _download(str(checkpoint))
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # torchvision's reference training saves its own
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, ValueError, OSError, EOFError) as error:
        raise NatsError(f"{path}: expected a checkpoint of tensors: {one_line(error)[:200]}") from error
    except Exception as error:  # pickle's own: weights_only refuses whatever is not plain data
        raise NatsError(f"{path}: expected a checkpoint of tensors, found other objects in it") from error
    state = state.get("model", state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise NatsError(f"{path}: expected a state dict, or an object with one under 'model'")
    return state


def _download(name: str) -> dict[str, Tensor]:
    try:
        weights = get_weight(name)
    except ValueError as error:
        raise NatsError(
            f"{name}: neither a file nor torchvision's weights (as FasterRCNN_ResNet50_FPN_Weights.COCO_V1)"
        ) from error
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: the file that came has another hash
        raise NatsError(f"{name}: can not be downloaded: {one_line(error)}") from error


def _config(state: Mapping[str, Tensor], backbone: str, classes: Sequence[str] | None, source: str) -> DetectorConfig:
    framework, outputs = _framework(state, source)
    num_classes, rest = divmod(len(state[outputs]), _ANCHORS_PER_PLACE if framework == "retinanet" else 1)
    if rest:
        raise NatsError(f"{source}: {outputs}: expected {_ANCHORS_PER_PLACE} anchors per place, as RetinaNet has")
    if classes is None:
        classes = _coco_classes() if num_classes == len(_COCO_NAMES) else ()
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
    """The framework, and the weight whose rows are its classes."""
    rows = {
        "retinanet": "head.classification_head.cls_logits.weight",
        "fcos": "head.classification_head.cls_logits.weight",
        "fasterrcnn": "roi_heads.box_predictor.cls_score.weight",
        "maskrcnn": "roi_heads.box_predictor.cls_score.weight",
    }
    particular = {
        "fcos": "head.regression_head.bbox_ctrness.weight",
        "retinanet": "head.regression_head.bbox_reg.weight",
        "maskrcnn": "roi_heads.mask_predictor.mask_fcn_logits.weight",
        "fasterrcnn": "roi_heads.box_head.fc6.weight",
    }
    for framework, name in particular.items():
        if name in state and rows[framework] in state:
            return framework, rows[framework]
    raise NatsError(
        f"{source}: expected the tensors of torchvision's fasterrcnn_resnet50_fpn, maskrcnn_resnet50_fpn,"
        f" retinanet_resnet50_fpn or fcos_resnet50_fpn, found {', '.join(list(state)[:3])}, ..."
    )


def _widths(state: Mapping[str, Tensor], framework: str) -> dict[str, int]:
    pyramid = state.get("backbone.fpn.inner_blocks.0.0.weight", state.get("backbone.fpn.inner_blocks.0.weight"))
    widths: dict[str, Any] = {} if pyramid is None else {"fpn_channels": len(pyramid)}
    if framework in ("fasterrcnn", "maskrcnn"):
        widths["head_size"] = len(state["roi_heads.box_head.fc6.weight"])
    if framework == "maskrcnn":
        widths["mask_channels"] = state["roi_heads.mask_predictor.mask_fcn_logits.weight"].shape[1]
    return widths


def _coco_classes() -> tuple[str, ...]:
    """COCO's names by its ids 1 to 90; the ten that COCO left out are named by their number."""
    return tuple(name if name != "N/A" else f"N/A {number}" for number, name in enumerate(_COCO_NAMES) if number)


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
