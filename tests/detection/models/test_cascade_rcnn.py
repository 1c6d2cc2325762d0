"""Cascade R-CNN against torchvision's own heads, against hand computations, and on an image that it learns."""

import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign, box_iou, clip_boxes_to_image

from nats_zoo.detection import create_detector, from_pretrained, save_detector
from nats_zoo.detection.data.drawn import draw_image, draw_objects
from nats_zoo.detection.models.cascade_rcnn import CascadePredictor, CascadeRCNN, CascadeRoIHeads, cascade_loss

CLASSES, CHANNELS, WIDTH = 4, 8, 16
SIZE = 64  # pixels, of the images
IMAGES = [(SIZE, SIZE), (SIZE, SIZE)]
IOUS = (0.5, 0.6, 0.7)
WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
STAGES = len(IOUS)
ONE_STAGE = {"iou_thresholds": IOUS[:1], "bbox_reg_weights": WEIGHTS[:1]}


class Backbone(nn.Module):
    """Two convolutions, and their output at four sizes."""

    out_channels = CHANNELS

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, CHANNELS, 3, stride=2, padding=1)
        self.second = nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2, padding=1)

    def forward(self, images):
        maps = [self.second(self.first(images).relu()).relu()]
        for _ in range(3):
            maps.append(F.max_pool2d(maps[-1], 2))
        return {str(level): one for level, one in enumerate(maps)}


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def common_options(**options):
    """Of torchvision's detectors and of ours: small images, and nothing of the boxes at its default."""
    anchors = AnchorGenerator(((8,), (16,), (32,), (48,)), ((0.5, 1.0, 2.0),) * 4)
    values = dict(
        min_size=SIZE,
        max_size=SIZE,
        rpn_anchor_generator=anchors,
        box_score_thresh=0.2,
        box_nms_thresh=0.4,
        box_detections_per_img=7,
        box_batch_size_per_image=24,
        box_positive_fraction=0.5,
    )
    return values | options


def mask_parts():
    return {
        "mask_roi_pool": MultiScaleRoIAlign(["0", "1"], output_size=7, sampling_ratio=2),
        "mask_head": MaskRCNNHeads(CHANNELS, (CHANNELS,), 1),
        "mask_predictor": MaskRCNNPredictor(CHANNELS, CHANNELS, CLASSES),
    }


def cascade(masks=False, **options) -> CascadeRCNN:
    torch.manual_seed(0)
    parts = mask_parts() if masks else {}
    return CascadeRCNN(Backbone(), CLASSES, representation_size=WIDTH, **parts, **common_options(**options))


def heads(**options) -> CascadeRoIHeads:
    """With weights large enough for the stages to move boxes visibly."""
    model = cascade(**options).roi_heads
    with torch.no_grad():
        for predictor in model.box_predictor:
            predictor.bbox_pred.weight.mul_(8)
            predictor.cls_score.weight.mul_(8)
    return model


def constant_heads(offsets, logits, **options) -> CascadeRoIHeads:
    """Each stage gives the same regression and the same logits for all boxes."""
    model = cascade(**options).roi_heads
    for predictor, offset, logit in zip(model.box_predictor, offsets, logits, strict=True):
        for layer, values in ((predictor.bbox_pred, offset), (predictor.cls_score, logit)):
            nn.init.zeros_(layer.weight)
            layer.bias.data = torch.tensor(values)
    return model


def some_features() -> dict[str, torch.Tensor]:
    generator = seeded(1)
    sides = [SIZE // 4 >> level for level in range(4)]
    return {str(level): torch.rand(2, CHANNELS, n, n, generator=generator) for level, n in enumerate(sides)}


def some_boxes(number: int, seed: int) -> torch.Tensor:
    corners = torch.rand(number, 2, 2, generator=seeded(seed)) * (SIZE - 10)
    return torch.cat([corners.amin(1), corners.amax(1) + 8], dim=1)


def some_targets(objects: int = 3) -> list[dict[str, torch.Tensor]]:
    targets = []
    for seed in (10, 11):
        boxes = some_boxes(objects, seed)
        masks = torch.zeros(objects, SIZE, SIZE, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        targets.append({"boxes": boxes, "labels": torch.arange(objects) % (CLASSES - 1) + 1, "masks": masks})
    return targets


def some_proposals(targets) -> list[torch.Tensor]:
    """Ones anywhere, and ones that overlap objects more or less."""
    generator = seeded(3)
    near = [target["boxes"].repeat(6, 1) for target in targets]
    near = [box + 3 * torch.randn(box.shape, generator=generator) for box in near]
    near = [torch.cat([box[:, :2], torch.maximum(box[:, 2:], box[:, :2] + 2)], dim=1) for box in near]
    near = [clip_boxes_to_image(box, (SIZE, SIZE)) for box in near]
    return [torch.cat([box, some_boxes(6, 20 + index)]) for index, box in enumerate(near)]


def some_images() -> list[torch.Tensor]:
    return list(torch.rand(2, 3, SIZE, SIZE, generator=seeded(2)))


def losses_of(model, *inputs) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)  # the sampler's
    found = model.train()(*inputs)
    return found[1] if isinstance(found, tuple) else found


def gradients(loss, model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def same(found, wanted) -> bool:
    """Whether two dicts of tensors have equal keys and, up to rounding, values."""
    return found.keys() == wanted.keys() and all(
        found[key].shape == wanted[key].shape and torch.allclose(found[key], wanted[key], rtol=1e-4, atol=1e-5)
        for key in found
    )


# One stage is Faster R-CNN whose classes share a box


def torchvision_twin(model: CascadeRCNN) -> FasterRCNN:
    """torchvision's detector with a one-stage cascade's weights, the box's four numbers given to every class."""
    masks = model.roi_heads.has_mask()
    box_parts = {
        "box_head": TwoMLPHead(CHANNELS * 49, WIDTH),
        "box_predictor": FastRCNNPredictor(WIDTH, CLASSES),
        "box_roi_pool": MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=7, sampling_ratio=2),
    }
    builder = MaskRCNN if masks else FasterRCNN
    twin = builder(Backbone(), **box_parts, **(mask_parts() if masks else {}), **common_options())
    weights = {}
    for key, value in model.state_dict().items():
        name = key.replace("box_head.0.", "box_head.").replace("box_predictor.0.", "box_predictor.")
        weights[name] = value.repeat(CLASSES, *(1,) * (value.ndim - 1)) if "predictor.bbox_pred" in name else value
    twin.load_state_dict(weights)
    assert type(twin.roi_heads) is RoIHeads
    return twin


@pytest.fixture(params=[False, True], ids=["boxes", "masks"])
def pair(request):
    model = cascade(masks=request.param, **ONE_STAGE)
    with torch.no_grad():
        model.roi_heads.box_predictor[0].bbox_pred.weight.mul_(8)
        model.roi_heads.box_predictor[0].cls_score.weight.mul_(8)
    return model, torchvision_twin(model)


def paired_losses(pair):
    ours, theirs = (losses_of(model, some_images(), some_targets()) for model in pair)
    return {key.removesuffix("_1"): value for key, value in ours.items()}, theirs


def paired_detections(pair):
    with torch.no_grad():
        return [model.eval()(some_images()) for model in pair]


def test_one_stage_has_torchvisions_losses_and_gradients(pair):
    ours, theirs = paired_losses(pair)
    assert same(ours, theirs)
    assert all(value > 0 for value in ours.values())
    model, twin = pair
    for part in ("backbone", "rpn"):
        mine = gradients(sum(paired_losses(pair)[0].values()), model)
        wanted = gradients(sum(paired_losses(pair)[1].values()), twin)
        keep = [name for name in wanted if name.startswith(part)]
        assert keep
        assert same({name: mine[name] for name in keep}, {name: wanted[name] for name in keep})


def test_one_stage_has_torchvisions_detections(pair):
    ours, theirs = paired_detections(pair)
    assert all(same(found, wanted) for found, wanted in zip(ours, theirs, strict=True))
    assert all(len(found["boxes"]) for found in ours)


@pytest.mark.parametrize("layer", ["bbox_pred", "cls_score"])
def test_with_another_weight_it_has_not(pair, layer):
    with torch.no_grad():
        getattr(pair[0].roi_heads.box_predictor[0], layer).weight[1] += 0.2
    assert not same(*paired_losses(pair))
    ours, theirs = paired_detections(pair)
    assert not any(same(found, wanted) for found, wanted in zip(ours, theirs, strict=True))


# Three stages, in training


def training_by_hand(model, features, proposals, targets, detach=True):
    """The losses of all stages, written out for heads that sample all of their proposals; no gradient is scaled.

    Args:
        detach: False: the wrong way, with gradients through the boxes that a stage hands on.
    """
    boxes = [torch.cat([one, target["boxes"]]) for one, target in zip(proposals, targets, strict=True)]
    losses = {}
    for stage in range(STAGES):
        labels, wanted = [], []
        for one, target in zip(boxes, targets, strict=True):
            overlap, index = box_iou(one, target["boxes"]).max(dim=1)
            labels.append(torch.where(overlap >= IOUS[stage], target["labels"][index], 0))
            wanted.append(BoxCoder(WEIGHTS[stage]).encode_single(target["boxes"][index], one))
        labels, wanted = torch.cat(labels), torch.cat(wanted)
        pooled = model.box_roi_pool(features, boxes, IMAGES)
        logits, regression = model.box_predictor[stage](model.box_head[stage](pooled))
        losses[f"loss_classifier_{stage + 1}"] = F.cross_entropy(logits, labels)
        of_boxes = F.smooth_l1_loss(regression, wanted, beta=1 / 9, reduction="none").sum(1)
        losses[f"loss_box_reg_{stage + 1}"] = of_boxes[labels > 0].sum() / len(labels)
        refined = BoxCoder(WEIGHTS[stage]).decode_single(regression, torch.cat(boxes))
        refined = refined.detach() if detach else refined
        boxes = [clip_boxes_to_image(one, (SIZE, SIZE)) for one in refined.split([len(one) for one in boxes])]
        boxes = [one[((one[:, 2:] - one[:, :2]) >= 0.01).all(1)] for one in boxes]
    return losses


@pytest.fixture
def sampled_whole():
    """Heads whose first stage takes all proposals, and their inputs but for the images' sizes."""
    targets = some_targets()
    model = heads(box_batch_size_per_image=1000, box_positive_fraction=1.0)
    features = {key: value.requires_grad_() for key, value in some_features().items()}
    return model, features, some_proposals(targets), targets


def test_losses_of_all_stages_are_those_computed_by_hand(sampled_whole):
    model, features, proposals, targets = sampled_whole
    found = losses_of(model, features, proposals, IMAGES, targets)
    assert same(found, training_by_hand(model, features, proposals, targets))
    assert all(value > 0 for value in found.values())
    model.box_coders[1] = BoxCoder(WEIGHTS[0])
    assert not same(
        losses_of(model, features, proposals, IMAGES, targets),
        training_by_hand(model, features, proposals, targets),
    )


def test_features_get_a_third_of_the_gradient_and_the_heads_all_of_it(sampled_whole):
    model, features, proposals, targets = sampled_whole

    def both(losses):
        for value in features.values():
            value.grad = None
        of_heads = gradients(sum(losses.values()), model)
        return of_heads, {key: value.grad for key, value in features.items() if value.grad is not None}

    of_heads, of_features = both(losses_of(model, features, proposals, IMAGES, targets))
    whole_heads, whole_features = both(training_by_hand(model, features, proposals, targets))
    assert same(of_heads, whole_heads)
    assert of_features
    assert same(of_features, {key: value / 3 for key, value in whole_features.items()})
    assert not same(of_features, whole_features)


def test_no_gradient_flows_through_the_boxes_of_a_stage(sampled_whole):
    """The twin is a hand computation that lets it flow, whose first stage learns from the second's targets."""
    model, features, proposals, targets = sampled_whole
    later = ("loss_box_reg_2", "loss_box_reg_3", "loss_classifier_2", "loss_classifier_3")
    first = ("box_head.0", "box_predictor.0")

    def reaches_the_first_stage(losses):
        found = gradients(sum(losses[key] for key in later), model)
        return any(value.abs().max() > 0 for name, value in found.items() if name.startswith(first))

    assert not reaches_the_first_stage(losses_of(model, features, proposals, IMAGES, targets))
    assert reaches_the_first_stage(training_by_hand(model, features, proposals, targets, detach=False))


def test_stages_match_at_their_own_iou():
    """Boxes of 40 pixels' width on an object of 40 by 40: the IoU is the height over 40."""
    background, foreground = 0.7, 0.1  # probabilities that every stage gives
    logits = [math.log(background)] + [math.log(foreground)] * 3
    model = constant_heads([[0.0] * 4] * STAGES, [logits] * STAGES, box_batch_size_per_image=50)
    heights = [20.5, 23.5, 24.5, 27.5, 28.5, 10.0]
    target = {"boxes": torch.tensor([[8.0, 8, 48, 48]]), "labels": torch.tensor([2])}
    proposals = torch.tensor([[8.0, 8, 48, 8 + height] for height in heights])
    features = {key: value[:1] for key, value in some_features().items()}
    losses = losses_of(model, features, [proposals], IMAGES[:1], [target])

    number = len(heights) + 1  # and the object itself
    for stage, (iou, (_, y, _, h)) in enumerate(zip(IOUS, WEIGHTS, strict=True), start=1):
        matched = [height for height in [*heights, 40.0] if height / 40 >= iou]
        assert len(matched) == {1: 6, 2: 4, 3: 2}[stage]
        entropy = -len(matched) * math.log(foreground) - (number - len(matched)) * math.log(background)
        # the object's centre lies (40 - height) / 2 below the box's
        wanted = [v for height in matched for v in (y * (20 / height - 0.5), h * math.log(40 / height))]
        smooth_l1 = sum(v - 1 / 18 if v > 1 / 9 else v * v * 4.5 for v in wanted)
        assert losses[f"loss_classifier_{stage}"].item() == pytest.approx(entropy / number, rel=1e-4)
        assert losses[f"loss_box_reg_{stage}"].item() == pytest.approx(smooth_l1 / number, rel=1e-4)


def test_stages_take_the_label_of_the_object_they_overlap_most():
    """Two objects side by side; the first stage's shift carries the boxes from one to the other."""
    sure = [[-9.0, 9, -9, -9], [-9.0, -9, 9, -9], [-9.0, -9, 9, -9]]  # label 1, then label 2
    model = constant_heads([[10.0, 0, 0, 0], [0.0] * 4, [0.0] * 4], sure)
    targets = [{"boxes": torch.tensor([[4.0, 8, 24, 28], [24.0, 8, 44, 28]]), "labels": torch.tensor([1, 2])}]
    proposals = [torch.tensor([[4.0, 8, 24, 28]]).repeat(20, 1)]
    model.fg_bg_sampler.batch_size_per_image = 100
    features = {key: value[:1] for key, value in some_features().items()}
    losses = losses_of(model, features, proposals, IMAGES[:1], targets)
    # of 22 boxes one, the second object's own, is wrong in the first stage, and background in the others
    for stage in range(1, STAGES + 1):
        assert losses[f"loss_classifier_{stage}"].item() == pytest.approx(18 / 22, rel=1e-3)


def seen_by_pooling(model) -> list[list[torch.Tensor]]:
    """Filled with the boxes of each stage."""
    seen = []
    model.box_roi_pool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    return seen


@pytest.mark.parametrize("training", [True, False])
def test_boxes_between_stages_are_decoded_with_a_stages_own_weights(training):
    """A regression of 4 is a shift by 4/10, 4/20, 4/30 of the width in turn."""
    model = constant_heads([[4.0, 0, 0, 0]] * STAGES, [[0.0] * CLASSES] * STAGES, box_nms_thresh=1.0)
    seen = seen_by_pooling(model)
    box = torch.tensor([[5.0, 10, 25, 30]])
    features = {key: value[:1] for key, value in some_features().items()}
    target = {"boxes": torch.tensor([[5.0, 10, 25, 30]]), "labels": torch.tensor([1])}
    found, _ = model.train(training)(features, [box], IMAGES[:1], [target] if training else None)
    lefts = [boxes[0][:, 0] for boxes in seen]
    assert len(lefts) == STAGES
    for left, wanted in zip(lefts, (5, 13, 17), strict=True):
        torch.testing.assert_close(left, torch.full_like(left, wanted))
    if not training:
        last = 17 + 20 * 4 / 30
        wanted = torch.tensor([[last, 10, last + 20, 30]]).expand(CLASSES - 1, 4)
        torch.testing.assert_close(found[0]["boxes"], wanted)


@pytest.mark.parametrize("training", [True, False])
def test_boxes_between_stages_lie_inside_the_images(training):
    shapes = [(SIZE, 40), (48, SIZE)]
    sides = torch.tensor([[width, height] * 2 for height, width in shapes])
    targets = some_targets()
    for target, side in zip(targets, sides, strict=True):
        target["boxes"] = torch.minimum(target["boxes"], side - torch.tensor([9, 9, 1, 1]))
    model = constant_heads([[9.0, -9, 3, 3]] * STAGES, [[0.0] * CLASSES] * STAGES)
    seen = seen_by_pooling(model)
    model.train(training)(some_features(), some_proposals(targets), shapes, targets if training else None)
    assert len(seen) == STAGES
    for boxes in seen[1:]:
        for one, side in zip(boxes, sides, strict=True):
            assert len(one)
            assert (one >= 0).all()
            assert (one <= side).all()
            assert (one == side).any()  # that is, something was clipped


def test_a_stage_of_whose_boxes_none_are_left_has_zero_losses():
    model = constant_heads([[500.0, 0, 0, 0]] * STAGES, [[0.0] * CLASSES] * STAGES)
    losses = losses_of(model, some_features(), some_proposals(some_targets()), IMAGES, some_targets())
    assert losses["loss_classifier_1"] > 0
    for stage in (2, 3):
        assert losses[f"loss_classifier_{stage}"] == losses[f"loss_box_reg_{stage}"] == 0
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())  # what distributed training needs


@pytest.mark.parametrize(("side", "kept"), [(0.02, True), (0.005, False)])
def test_boxes_without_area_are_not_handed_on(side, kept):
    """The first stage shrinks boxes of 20 pixels: its last two numbers are 5 times the logarithm of the ratio."""
    shrink = WEIGHTS[0][2] * math.log(side / 20)
    model = constant_heads([[0.0, 0, shrink, shrink], [0.0] * 4, [0.0] * 4], [[0.0] * CLASSES] * STAGES)
    seen = seen_by_pooling(model)
    target = {"boxes": torch.tensor([[5.0, 10, 25, 30]]), "labels": torch.tensor([1])}
    features = {key: value[:1] for key, value in some_features().items()}
    losses_of(model, features, [target["boxes"]], IMAGES[:1], [target])
    assert [len(boxes[0]) for boxes in seen] == [2, 2 * kept, 2 * kept]


def test_labels_may_be_of_any_integer_type(sampled_whole):
    model, features, proposals, targets = sampled_whole
    narrow = [target | {"labels": target["labels"].to(torch.int32)} for target in targets]
    wanted = losses_of(model, features, proposals, IMAGES, targets)
    assert same(losses_of(model, features, proposals, IMAGES, narrow), wanted)


def test_float64_is_kept(sampled_whole):
    model, features, proposals, targets = sampled_whole
    features = {key: value.detach().double() for key, value in features.items()}
    proposals = [boxes.double() for boxes in proposals]
    targets = [target | {"boxes": target["boxes"].double()} for target in targets]
    found = losses_of(model.double(), features, proposals, IMAGES, targets)
    wanted = training_by_hand(model, features, proposals, targets)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        (one, _), _ = model.eval()(features, proposals, IMAGES)
    assert len(one["boxes"])
    assert one["boxes"].dtype is one["scores"].dtype is torch.float64


# Evaluation


def test_scores_are_the_mean_of_the_stages_probabilities():
    logits = [[0.0, 2.0, -1.0, 0.5], [1.0, -1.0, 0.0, 3.0], [0.3, 0.2, 5.0, -2.0]]
    model = constant_heads([[0.0] * 4] * STAGES, logits, box_score_thresh=0.0).eval()
    features = {key: value[:1] for key, value in some_features().items()}
    (found,), _ = model(features, [torch.tensor([[5.0, 10, 25, 30]])], IMAGES[:1])
    mean = torch.tensor(logits).softmax(dim=1).mean(dim=0)
    wanted = {label: mean[label].item() for label in range(1, CLASSES)}
    assert dict(zip(found["labels"].tolist(), found["scores"].tolist(), strict=True)) == pytest.approx(wanted)
    mean_of_logits = torch.tensor(logits).mean(dim=0).softmax(dim=0)
    assert not torch.allclose(mean, mean_of_logits, atol=0.01)


@torch.no_grad()
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("numbers", [(0, 0), (0, 5)])
def test_images_may_have_no_proposals(numbers, masks):
    model = heads(masks=masks).eval()
    proposals = [some_boxes(number, 20) for number in numbers]
    found, _ = model(some_features(), proposals, IMAGES)
    for number, one in zip(numbers, found, strict=True):
        assert one["boxes"].shape[1:] == (4,)
        assert (len(one["boxes"]) > 0) == (number > 0)
        assert len(one["boxes"]) == len(one["labels"]) == len(one["scores"])
        assert not masks or one["masks"].shape[:2] == (len(one["boxes"]), 1)


@torch.no_grad()
def test_a_head_that_gives_nan_finds_nothing():
    model = heads().eval()
    model.box_predictor[0].bbox_pred.bias.fill_(math.nan)
    seen = seen_by_pooling(model)
    found, _ = model(some_features(), [some_boxes(5, 20), some_boxes(5, 21)], IMAGES)
    assert [len(one["boxes"]) for one in found] == [0, 0]
    assert all(one.isfinite().all() for boxes in seen for one in boxes)


# Masks


def test_masks_are_trained_on_the_first_stages_foreground():
    """A second stage that has carried all boxes away leaves the loss as it is: torchvision's of one stage."""
    logits = [[0.0] * CLASSES] * STAGES
    away = constant_heads([[40.0, 0, 0, 0]] * STAGES, logits, masks=True)
    single = constant_heads([[0.0] * 4], logits[:1], masks=True, **ONE_STAGE)
    for part in ("mask_head", "mask_predictor"):
        getattr(single, part).load_state_dict(getattr(away, part).state_dict())
    targets = some_targets()
    inputs = some_features(), some_proposals(targets), IMAGES, targets
    found = losses_of(away, *inputs)["loss_mask"]
    assert found > 0
    torch.testing.assert_close(found, losses_of(single, *inputs)["loss_mask"])
    seen = []
    away.mask_roi_pool.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[1]))
    losses_of(away, *inputs)
    for boxes, target in zip(seen, targets, strict=True):
        assert len(boxes) > 3  # more than the objects themselves
        assert (box_iou(boxes, target["boxes"]).amax(dim=1) >= IOUS[0]).all()


def test_mask_gradients_reach_the_features_unscaled():
    model, targets = heads(masks=True), some_targets()
    single = heads(masks=True, **ONE_STAGE)
    for part in ("mask_head", "mask_predictor"):
        getattr(single, part).load_state_dict(getattr(model, part).state_dict())
    found = []
    for one in (model, single):
        features = {key: value.requires_grad_() for key, value in some_features().items()}
        losses_of(one, features, some_proposals(targets), IMAGES, targets)["loss_mask"].backward()
        found.append(features["0"].grad)
    torch.testing.assert_close(*found)
    assert found[0].abs().max() > 0


@torch.no_grad()
def test_outputs_have_masks_at_the_images_size():
    found = cascade(masks=True).eval()([torch.rand(3, 50, 70, generator=seeded(0))])[0]
    assert found["masks"].shape == (len(found["boxes"]), 1, 50, 70)
    assert len(found["boxes"])
    assert 0 <= found["masks"].min() < found["masks"].max() <= 1
    assert "masks" not in cascade().eval()(some_images())[0]


def test_training_masks_needs_masks():
    targets = [{key: value for key, value in target.items() if key != "masks"} for target in some_targets()]
    with pytest.raises(ValueError, match="masks"):
        losses_of(cascade(masks=True), some_images(), targets)


# Whole detectors


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("empty", [(0,), (0, 1)], ids=["one", "all"])
def test_images_without_objects_train(masks, empty):
    targets = some_targets()
    for index in empty:
        targets[index] = some_targets(objects=0)[index]
    model = cascade(masks=masks)
    losses = losses_of(model, some_images(), targets)
    assert len(losses) == 2 * STAGES + 2 + masks
    assert all(value.isfinite() for value in losses.values())
    if len(empty) == len(targets):
        assert all(losses[f"loss_box_reg_{stage}"] == 0 for stage in range(1, STAGES + 1))
    found = gradients(sum(losses.values()), model)
    assert len(found) == len(list(model.parameters()))
    assert all(value.isfinite().all() for value in found.values())


def test_bf16_autocast():
    """Losses are float32 and near those in full precision; so are the boxes, which bf16 would round to 1/4 pixel."""
    model, targets = cascade(masks=True), some_targets()
    whole = losses_of(model, some_images(), targets)
    with torch.autocast("cpu", torch.bfloat16):
        losses = losses_of(model, some_images(), targets)
        seen = seen_by_pooling(model.roi_heads)
        found = model.eval()(some_images())
    assert all(value.dtype is torch.float32 for value in losses.values())
    assert all(losses[key].item() == pytest.approx(whole[key].item(), rel=0.1, abs=0.05) for key in whole)
    assert all(value.isfinite().all() for value in gradients(sum(losses.values()), model).values())
    for between in seen[1:]:
        assert (torch.cat(between) != torch.cat(between).to(torch.bfloat16)).any()
    boxes = torch.cat([one["boxes"] for one in found])
    assert len(boxes)
    assert boxes.dtype is torch.float32
    assert (boxes != boxes.to(torch.bfloat16)).any()


def test_channels_last_gives_the_same():
    model = cascade(masks=True)
    losses = losses_of(model, some_images(), some_targets())
    with torch.no_grad():
        wanted = model.eval()(some_images())
        model.to(memory_format=torch.channels_last)
        found = model(some_images())
    assert same(losses_of(model, some_images(), some_targets()), losses)
    assert all(same(one, other) for one, other in zip(found, wanted, strict=True))
    assert len(found[0]["boxes"])


def test_overfits_a_drawn_image():
    rng = np.random.default_rng(3)
    size = 96
    (drawn,) = next(found for _ in range(100) if len(found := draw_objects(size, 10, rng)) == 1)
    pixels, (mask,) = draw_image([drawn], size, rng)
    image = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    x, y, w, h = drawn.box
    box = torch.tensor([[x, y, x + w, y + h]], dtype=torch.float32)
    target = {"boxes": box, "labels": torch.tensor([drawn.label]), "masks": torch.from_numpy(mask)[None]}
    proposals = {"rpn_pre_nms_top_n_train": 200, "rpn_post_nms_top_n_train": 100, "box_batch_size_per_image": 16}
    model = cascade(masks=True, min_size=size, max_size=size, **proposals)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(80):
        optimizer.param_groups[0]["lr"] = 0.01 if step < 60 else 0.002
        loss = sum(model.train()([image], [target]).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = model.eval()([image])[0]
    assert found["scores"][0] > 0.4  # the best one; chance is 0.25
    assert found["labels"][0] == drawn.label
    assert box_iou(found["boxes"][:1], box).item() > 0.7
    drawn_mask, found_mask = torch.from_numpy(mask) > 0, found["masks"][0, 0] > 0.5
    assert (drawn_mask & found_mask).sum() / (drawn_mask | found_mask).sum() > 0.7


HEADS_KEYS = {
    *(
        f"box_head.{stage}.{layer}.{kind}"
        for stage in range(3)
        for layer in ("fc6", "fc7")
        for kind in ("weight", "bias")
    ),
    *(
        f"box_predictor.{stage}.{layer}.{kind}"
        for stage in range(3)
        for layer in ("cls_score", "bbox_pred")
        for kind in ("weight", "bias")
    ),
}
MASK_KEYS = {
    *(f"mask_head.{layer}.0.{kind}" for layer in range(4) for kind in ("weight", "bias")),
    *(f"mask_predictor.{layer}.{kind}" for layer in ("conv5_mask", "mask_fcn_logits") for kind in ("weight", "bias")),
}


@pytest.mark.parametrize("masks", [False, True])
def test_created_by_name_saved_and_loaded(masks, tmp_path):
    """With the keys and shapes that detector folders have on disk."""
    sizes = {"fpn_channels": 8, "head_size": WIDTH, "mask_channels": 8, "min_size": SIZE, "max_size": SIZE}
    detector = create_detector(
        "cascade_rcnn",
        "resnet18",
        5,
        weights=None,
        masks=masks,
        roi_samples=9,
        detections=6,
        score_thresh=0.01,
        **sizes,
    )
    assert isinstance(detector, CascadeRCNN)
    assert detector.config.masks is masks
    model = detector.roi_heads
    state = {key.removeprefix("roi_heads."): value for key, value in detector.state_dict().items() if "roi_h" in key}
    assert state.keys() == (HEADS_KEYS | MASK_KEYS if masks else HEADS_KEYS)
    assert state["box_predictor.2.bbox_pred.weight"].shape == (4, WIDTH)
    assert state["box_predictor.2.cls_score.weight"].shape == (5, WIDTH)
    assert (model.fg_bg_sampler.batch_size_per_image, model.detections_per_img, model.score_thresh) == (9, 6, 0.01)

    save_detector(detector, tmp_path / "folder")
    loaded = from_pretrained(tmp_path / "folder")
    images = some_images()
    with torch.no_grad():
        found, wanted = loaded.eval()(images), detector.eval()(images)
    assert all(same(one, other) for one, other in zip(found, wanted, strict=True))
    assert len(wanted[0]["boxes"]) == 6
    assert ("masks" in wanted[0]) is masks


def test_defaults_are_fasterrcnns():
    ours, theirs = (inspect.signature(one).parameters for one in (CascadeRCNN, FasterRCNN))
    shared = {name for name in ours.keys() & theirs.keys() if name.startswith("box_")}
    assert shared >= {"box_score_thresh", "box_nms_thresh", "box_batch_size_per_image", "box_positive_fraction"}
    assert all(ours[name].default == theirs[name].default for name in shared)
    model = CascadeRCNN(Backbone(), CLASSES).roi_heads
    wanted = FasterRCNN(Backbone(), CLASSES).roi_heads
    assert [str(head) for head in model.box_head] == [str(wanted.box_head)] * STAGES
    assert str(model.box_roi_pool) == str(wanted.box_roi_pool)


# Bad arguments


def test_unequal_numbers_of_parts_are_named():
    predictors = [CascadePredictor(WIDTH, CLASSES) for _ in range(2)]
    with pytest.raises(ValueError, match=r"box_heads: 3, box_predictors: 2, iou_thresholds: 3, bbox_reg_weights: 3"):
        cascade(box_predictors=predictors)
    with pytest.raises(ValueError, match="iou_thresholds: 2, bbox_reg_weights: 3"):
        cascade(iou_thresholds=(0.5, 0.6))
    with pytest.raises(ValueError, match="at least one stage"):
        cascade(iou_thresholds=(), bbox_reg_weights=())


@pytest.mark.parametrize("missing", ["mask_roi_pool", "mask_head", "mask_predictor"])
def test_a_missing_part_for_masks_is_named(missing):
    parts = mask_parts() | {missing: None}
    with pytest.raises(ValueError, match=f"^{missing}: is missing"):
        cascade(**parts)


def test_options_of_a_single_stage_are_refused():
    with pytest.raises(TypeError, match="box_fg_iou_thresh"):
        cascade(box_fg_iou_thresh=0.6)


def test_the_loss_without_boxes_is_zero():
    losses = cascade_loss(torch.zeros(0, 3), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    assert losses == (0, 0)
