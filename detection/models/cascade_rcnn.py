"""Cascade R-CNN (Cai and Vasconcelos, 2018, arXiv 1712.00726), as torchvision would have it.

Several box heads in a row: each takes the boxes that the one before has refined, and is trained to a higher IoU.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference, maskrcnn_loss
from torchvision.ops import MultiScaleRoIAlign, box_iou, clip_boxes_to_image, remove_small_boxes

IOU_THRESHOLDS = (0.5, 0.6, 0.7)
REGRESSION_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
SMOOTH_L1_BETA = 1 / 9  # torchvision's
MIN_SIDE = 0.01  # pixels: torchvision's least side of a box

Features: TypeAlias = dict[str, Tensor]  # a pyramid's levels, each (N, channels, H, W)
Sizes: TypeAlias = list[tuple[int, int]]  # height and width of each image
Objects: TypeAlias = list[dict[str, Tensor]]  # of each image: boxes, labels, and masks or scores


class CascadeRCNN(FasterRCNN):
    """Cascade R-CNN: torchvision's FasterRCNN with several stages of box heads, and masks if parts for them are given.

    Args:
        backbone: as FasterRCNN takes it.
        num_classes: classes including the background, label 0.
        representation_size: width of the default box heads.
        box_roi_pool: pools the regions; default: as FasterRCNN's.
        box_heads: one per stage, of pooled regions; default: torchvision's TwoMLPHead.
        box_predictors: one per stage, of a head's outputs; default: CascadePredictor.
        iou_thresholds: of each stage: proposals that overlap an object at least as much are its foreground.
        bbox_reg_weights: of each stage: what its regression targets are multiplied by.
        mask_roi_pool, mask_head, mask_predictor: all three or none, as MaskRCNN has them.
        box_score_thresh, box_nms_thresh, box_detections_per_img, box_batch_size_per_image, box_positive_fraction: as
            FasterRCNN's; the last two are of the first stage, the others take all the boxes it hands on.
        **kwargs: FasterRCNN's options of images and of proposals.

    Raises:
        TypeError: another of FasterRCNN's options of boxes; here these are given for each stage.
        ValueError: see CascadeRoIHeads.

    Example:
        >>> backbone = BackboneWithFPN(create_body("nats_resnet50"))
        >>> detector = CascadeRCNN(backbone, num_classes=91, iou_thresholds=(0.5, 0.6, 0.7))
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        representation_size: int = 1024,
        box_roi_pool: nn.Module | None = None,
        box_heads: Sequence[nn.Module] | None = None,
        box_predictors: Sequence[nn.Module] | None = None,
        iou_thresholds: Sequence[float] = IOU_THRESHOLDS,
        bbox_reg_weights: Sequence[tuple[float, float, float, float]] = REGRESSION_WEIGHTS,
        box_score_thresh: float = 0.05,
        box_nms_thresh: float = 0.5,
        box_detections_per_img: int = 100,
        box_batch_size_per_image: int = 512,
        box_positive_fraction: float = 0.25,
        mask_roi_pool: nn.Module | None = None,
        mask_head: nn.Module | None = None,
        mask_predictor: nn.Module | None = None,
        **kwargs: Any,
    ):
        foreign = sorted(key for key in kwargs if key.startswith("box_"))
        if foreign:
            raise TypeError(f"{foreign[0]}: no option of CascadeRCNN, whose stages have iou_thresholds and box_heads")
        stages = range(len(iou_thresholds))
        if box_roi_pool is None:
            box_roi_pool = MultiScaleRoIAlign(featmap_names=["0", "1", "2", "3"], output_size=7, sampling_ratio=2)
        if box_heads is None:
            pooled = backbone.out_channels * box_roi_pool.output_size[0] * box_roi_pool.output_size[1]
            box_heads = [TwoMLPHead(pooled, representation_size) for _ in stages]
        if box_predictors is None:
            box_predictors = [CascadePredictor(representation_size, num_classes) for _ in stages]
        roi_heads = CascadeRoIHeads(
            box_roi_pool,
            box_heads,
            box_predictors,
            iou_thresholds=iou_thresholds,
            bbox_reg_weights=bbox_reg_weights,
            batch_size_per_image=box_batch_size_per_image,
            positive_fraction=box_positive_fraction,
            score_thresh=box_score_thresh,
            nms_thresh=box_nms_thresh,
            detections_per_img=box_detections_per_img,
            mask_roi_pool=mask_roi_pool,
            mask_head=mask_head,
            mask_predictor=mask_predictor,
        )
        super().__init__(
            backbone, box_roi_pool=box_roi_pool, box_head=box_heads[0], box_predictor=box_predictors[0], **kwargs
        )
        self.roi_heads = roi_heads


class CascadePredictor(nn.Module):
    """Class scores and one box for all classes, from a box head's outputs.

    Shape:
        input (N, in_channels); outputs (N, num_classes) logits and (N, 4) regression.

    Example:
        >>> logits, regression = CascadePredictor(1024, num_classes=91)(torch.rand(8, 1024))
        >>> logits.shape, regression.shape
        (torch.Size([8, 91]), torch.Size([8, 4]))
    """

    def __init__(self, in_channels: int, num_classes: int):
        super().__init__()
        self.cls_score = nn.Linear(in_channels, num_classes)
        self.bbox_pred = nn.Linear(in_channels, 4)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        features = features.flatten(start_dim=1)
        return self.cls_score(features), self.bbox_pred(features)


class CascadeRoIHeads(RoIHeads):
    """The heads of Cascade R-CNN, in the place of torchvision's RoIHeads.

    In training the first stage samples from the proposals, as in Faster R-CNN; each further one takes all the boxes
    that the stage before made of those, without a gradient, and matches them to objects at its own IoU. The stages'
    losses, `loss_classifier_1`, `loss_box_reg_1` and so on, have weight 1 each, as in detectron2; the gradient that
    they send into the pooled features is divided by the number of stages. In inference the classes' probabilities are
    averaged over the stages and the boxes are the last stage's.

    Masks are trained on the foreground that the first stage has sampled, which is the most varied, and found in the
    final boxes.

    Args:
        box_head, box_predictor: one module per stage.
        iou_thresholds, bbox_reg_weights: one per stage, see CascadeRCNN.
        **kwargs: RoIHeads' further arguments; its parts for masks all or none.

    Raises:
        ValueError: not as many of each, none at all, or some of the three parts for masks but not all.

    Example:
        >>> heads = CascadeRCNN(backbone, num_classes=91).roi_heads
        >>> heads.num_stages
        3
    """

    def __init__(
        self,
        box_roi_pool: nn.Module,
        box_head: Sequence[nn.Module],
        box_predictor: Sequence[nn.Module],
        *,
        iou_thresholds: Sequence[float],
        bbox_reg_weights: Sequence[tuple[float, float, float, float]],
        **kwargs: Any,
    ):
        _check_parts(
            {
                "box_heads": box_head,
                "box_predictors": box_predictor,
                "iou_thresholds": iou_thresholds,
                "bbox_reg_weights": bbox_reg_weights,
            },
            {key: kwargs.get(key) for key in ("mask_roi_pool", "mask_head", "mask_predictor")},
        )
        super().__init__(
            box_roi_pool,
            nn.ModuleList(box_head),
            nn.ModuleList(box_predictor),
            fg_iou_thresh=iou_thresholds[0],
            bg_iou_thresh=iou_thresholds[0],
            bbox_reg_weights=bbox_reg_weights[-1],  # by which the last stage's boxes are decoded in the end
            **kwargs,
        )
        self.num_stages = len(iou_thresholds)
        self.matchers = [Matcher(iou, iou) for iou in iou_thresholds]
        self.box_coders = [BoxCoder(weights) for weights in bbox_reg_weights]

    def forward(
        self, features: Features, proposals: list[Tensor], image_shapes: Sizes, targets: Objects | None = None
    ) -> tuple[Objects, dict[str, Tensor]]:
        """As torchvision's RoIHeads: detections in evaluation, losses in training."""
        if self.training:
            if targets is None:
                raise ValueError("targets: expected one for each image in training")
            return [], self._losses(features, proposals, image_shapes, targets)
        return self._detections(features, proposals, image_shapes), {}

    def _losses(
        self, features: Features, proposals: list[Tensor], image_shapes: Sizes, targets: Objects
    ) -> dict[str, Tensor]:
        proposals, matched, labels, _ = self.select_training_samples(list(proposals), targets)
        losses = self._mask_loss(features, proposals, image_shapes, targets, matched, labels) if self.has_mask() else {}
        for stage in range(self.num_stages):
            if stage:
                matched, labels = self._match(stage, proposals, targets)
            logits, regression = self._run_stage(stage, features, proposals, image_shapes)
            wanted = self._regression_targets(stage, proposals, targets, matched)
            losses[f"loss_classifier_{stage + 1}"], losses[f"loss_box_reg_{stage + 1}"] = cascade_loss(
                logits, regression, torch.cat(labels), wanted
            )
            if stage + 1 < self.num_stages:
                refined = self._refine(stage, regression, proposals, image_shapes)
                proposals = [boxes[remove_small_boxes(boxes, MIN_SIDE)] for boxes in refined]
        return losses

    def _detections(self, features: Features, proposals: list[Tensor], image_shapes: Sizes) -> Objects:
        logits, regression = self._run_stage(0, features, proposals, image_shapes)
        probabilities = _full_precision(logits).softmax(-1)
        for stage in range(1, self.num_stages):
            proposals = self._refine(stage - 1, regression, proposals, image_shapes)
            logits, regression = self._run_stage(stage, features, proposals, image_shapes)
            probabilities = probabilities + _full_precision(logits).softmax(-1)
        # RoIHeads takes logits, and a box for each class
        mean = (probabilities / self.num_stages).log()
        boxes = _full_precision(regression).repeat(1, mean.shape[-1])
        found = self.postprocess_detections(mean, boxes, proposals, image_shapes)
        detections = [
            {"boxes": boxes, "labels": labels, "scores": scores}
            for boxes, scores, labels in zip(*found, strict=True)
        ]  # fmt: skip
        if self.has_mask():
            self._add_masks(features, detections, image_shapes)
        return detections

    def _run_stage(
        self, stage: int, features: Features, proposals: list[Tensor], image_shapes: Sizes
    ) -> tuple[Tensor, Tensor]:
        pooled = self.box_roi_pool(features, proposals, image_shapes)
        if self.training:
            pooled = _ScaledGradient.apply(pooled, 1 / self.num_stages)
        return self.box_predictor[stage](self.box_head[stage](pooled))

    @torch.no_grad()
    def _refine(self, stage: int, regression: Tensor, proposals: list[Tensor], image_shapes: Sizes) -> list[Tensor]:
        """The boxes that a stage made of its proposals, inside the images."""
        boxes = self.box_coders[stage].decode(_full_precision(regression), proposals).reshape(-1, 4)
        boxes = boxes.nan_to_num()  # of heads that have diverged: the next stage can not pool at NaN
        parts = boxes.split([len(one) for one in proposals])
        return [clip_boxes_to_image(part, shape) for part, shape in zip(parts, image_shapes, strict=True)]

    def _match(self, stage: int, proposals: list[Tensor], targets: Objects) -> tuple[list[Tensor], list[Tensor]]:
        """For each box, the object it overlaps most (0 if none at all) and that object's label (0: background)."""
        matched, labels = [], []
        for boxes, target in zip(proposals, targets, strict=True):
            index = torch.full((len(boxes),), Matcher.BELOW_LOW_THRESHOLD, device=boxes.device)
            if len(target["boxes"]) and len(boxes):
                index = self.matchers[stage](box_iou(target["boxes"].to(boxes.dtype), boxes))
            matched.append(index.clamp(min=0))
            found = index >= 0
            label = torch.zeros_like(index)
            label[found] = target["labels"][index[found]].to(label.dtype)
            labels.append(label)
        return matched, labels

    def _regression_targets(
        self, stage: int, proposals: list[Tensor], targets: Objects, matched: list[Tensor]
    ) -> Tensor:
        boxes = [target["boxes"].to(one.dtype) for one, target in zip(proposals, targets, strict=True)]
        nothing = proposals[0].new_zeros(1, 4)  # stands in where there are no objects; the background has no box loss
        wanted = [(box if len(box) else nothing)[index] for box, index in zip(boxes, matched, strict=True)]
        return torch.cat(self.box_coders[stage].encode(wanted, proposals))

    def _mask_loss(
        self,
        features: Features,
        proposals: list[Tensor],
        image_shapes: Sizes,
        targets: Objects,
        matched: list[Tensor],
        labels: list[Tensor],
    ) -> dict[str, Tensor]:
        foreground = [label > 0 for label in labels]
        boxes = [one[positive] for one, positive in zip(proposals, foreground, strict=True)]
        objects = [index[positive] for index, positive in zip(matched, foreground, strict=True)]
        logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes)))
        masks, classes = [target["masks"] for target in targets], [target["labels"] for target in targets]
        return {"loss_mask": maskrcnn_loss(logits, boxes, masks, classes, objects)}

    def _add_masks(self, features: Features, detections: Objects, image_shapes: Sizes) -> None:
        boxes = [detection["boxes"] for detection in detections]
        logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes)))
        probabilities = maskrcnn_inference(logits, [detection["labels"] for detection in detections])
        for detection, masks in zip(detections, probabilities, strict=True):
            detection["masks"] = masks


def cascade_loss(logits: Tensor, regression: Tensor, labels: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Faster R-CNN's losses with one box for all classes.

    Args:
        logits: (N, classes).
        regression: (N, 4).
        labels: (N,), 0 for the background.
        wanted: (N, 4), what the foreground's regression should be.

    Returns:
        The mean cross entropy, and smooth L1 over the foreground divided by N.

    Example:
        >>> labels = torch.tensor([0, 2])
        >>> classification, boxes = cascade_loss(torch.zeros(2, 3), torch.zeros(2, 4), labels, torch.zeros(2, 4))
        >>> round(classification.item(), 3), boxes.item()
        (1.099, 0.0)
    """
    foreground = labels > 0
    number = max(1, len(labels))
    of_boxes = F.smooth_l1_loss(regression[foreground], wanted[foreground], beta=SMOOTH_L1_BETA, reduction="sum")
    return F.cross_entropy(logits, labels, reduction="sum") / number, of_boxes / number


def _check_parts(of_boxes: dict[str, Sequence[Any]], of_masks: dict[str, nn.Module | None]) -> None:
    """ValueError unless there is one of each per stage for boxes, and all or nothing for masks."""
    lengths = {key: len(parts) for key, parts in of_boxes.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        found = ", ".join(f"{key}: {length}" for key, length in lengths.items())
        raise ValueError(f"expected one of each per stage of Cascade R-CNN, and at least one stage; found {found}")
    missing = [key for key, part in of_masks.items() if part is None]
    if missing and len(missing) < len(of_masks):
        raise ValueError(f"{missing[0]}: is missing; masks need all of {', '.join(of_masks)}")


def _full_precision(values: Tensor) -> Tensor:
    """In float32 if they are in a lower precision, as under autocast; float64 stays."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class _ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None
