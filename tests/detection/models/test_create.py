"""Detectors on timm backbones: pyramids, freezing, weights, calibration, and equality with torchvision's own."""

import json
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.detection import (
    fasterrcnn_resnet50_fpn,
    fcos_resnet50_fpn,
    maskrcnn_resnet50_fpn,
    retinanet_resnet50_fpn,
)
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from nats_zoo import Genotype, NatsError, recalibrate_bn
from nats_zoo.detection import DetectorConfig, create_detector, save_detector
from nats_zoo.detection.models.backbone import create_body, freeze_stages
from nats_zoo.detection.models.config import FRAMEWORKS
from nats_zoo.folders.find_genotype import find_genotype
from nats_zoo.genotype.catalogue import default_genotype
from tests.support.paths import SHARED_WEIGHTS

TIN_64 = SHARED_WEIGHTS / "resnet18.tin_64"
SIZES = {"min_size": 64, "max_size": 96, "anchor_sizes": (8, 16, 32, 64, 128)}
TINY = {"num_classes": 4, "fpn_channels": 16, "head_size": 16, "roi_samples": 32, **SIZES}
CONVS = {f"layer{stage}.{block}.conv2": 32 * 2**stage for stage in (1, 2, 3, 4) for block in (0, 1)}
PLAIN = Genotype("resnet18", {name: [[24, 1, 1], [channels - 24, 1, 1]] for name, channels in CONVS.items()})
OTHER = Genotype("resnet18", {**PLAIN.convs, "layer3.1.conv2": [[24, 1, 1], [232, 1, 2]]})


def batch() -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Two images of unequal sizes with one and two boxes."""
    generator = torch.Generator().manual_seed(3)
    images = [torch.rand(3, 80, 64, generator=generator), torch.rand(3, 64, 70, generator=generator)]
    boxes = [[[4.0, 4, 40, 50]], [[30.0, 10, 60, 60], [2, 2, 14, 20]]]
    labels = [[1], [3, 2]]
    return images, [
        {"boxes": torch.tensor(b), "labels": torch.tensor(label)} for b, label in zip(boxes, labels, strict=True)
    ]


def seeded_detector(backbone: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return create_detector("fasterrcnn", backbone, **{**TINY, **kwargs})


def train_once(detector: nn.Module) -> dict[str, torch.Tensor]:
    """Losses, and their gradients in the parameters."""
    detector.train()
    torch.manual_seed(1)  # proposals are sampled
    losses = detector(*batch())
    sum(losses.values()).backward()
    return {name: loss.detach() for name, loss in losses.items()}


@torch.no_grad()
def run(detector: nn.Module) -> list[dict[str, torch.Tensor]]:
    return detector.eval()(batch()[0])


def is_equal(one: list[dict[str, torch.Tensor]], other: list[dict[str, torch.Tensor]]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs)


def randomise_norms(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return model


def save_timm_folder(folder: Path, name: str = "resnet18", **cfg) -> Path:
    """A timm classifier with random weights and BN statistics, as a folder that `local-dir:` reads."""
    torch.manual_seed(7)
    arguments = {"zero_init_last": False} if "resnet" in name else {}
    model = randomise_norms(timm.create_model(name, num_classes=5, pretrained_cfg_overlay=cfg, **arguments))
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    (folder / "pytorch_model.bin").unlink(missing_ok=True)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """A folder of a ResNet-18 trained with a normalisation of its own."""
    folder = tmp_path_factory.mktemp("resnet18")
    return str(save_timm_folder(folder, mean=(0.5, 0.25, 0.125), std=(0.5, 0.2, 0.1)))


# --- pyramid and training ---------------------------------------------------------------------------------------------

# mambaout's maps are channels-last
FAMILIES = ["resnet18", "nats_resnet18", "convnext_atto", "regnetx_002", "mobilenetv3_small_050", "mambaout_femto"]


@pytest.mark.parametrize("backbone", FAMILIES)
def test_a_training_step_gives_every_parameter_a_gradient(backbone):
    detector = seeded_detector(backbone, genotype=OTHER if backbone == "nats_resnet18" else None, weights=None)
    losses = train_once(detector)
    assert losses.keys() == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())
    for name, parameter in detector.named_parameters():
        assert parameter.requires_grad, name
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name

    with torch.no_grad():
        pyramid = detector.backbone(torch.zeros(1, 3, 64, 128))
    assert {key: tuple(level.shape) for key, level in pyramid.items()} == {
        "0": (1, 16, 16, 32),
        "1": (1, 16, 8, 16),
        "2": (1, 16, 4, 8),
        "3": (1, 16, 2, 4),
        "pool": (1, 16, 1, 2),
    }


@pytest.mark.parametrize("backbone", ["resnet50", "convnext_atto", "dla34", "vgg11_bn", "hrnet_w18_small"])
def test_the_body_returns_the_maps_at_the_four_strides(backbone):
    with torch.device("meta"):
        body = create_body(backbone)
        sizes = [tuple(feature.shape[-2:]) for feature in body.eval()(torch.zeros(1, 3, 64, 96))]
    assert sizes == [(16, 24), (8, 12), (4, 6), (2, 3)]


def test_a_detector_in_evaluation_returns_boxes_labels_and_scores(weights):
    for output in run(seeded_detector("resnet18", weights=weights)):
        assert output["boxes"].shape == (len(output["scores"]), 4)
        assert set(output["labels"].tolist()) <= {1, 2, 3}


BUILDERS = {
    "fasterrcnn": fasterrcnn_resnet50_fpn,
    "maskrcnn": maskrcnn_resnet50_fpn,
    "retinanet": retinanet_resnet50_fpn,
    "fcos": fcos_resnet50_fpn,
}


def batch_with_masks():
    images, targets = batch()
    for image, target in zip(images, targets, strict=True):
        masks = torch.zeros(len(target["boxes"]), *image.shape[1:], dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, target["boxes"].int().tolist(), strict=True):
            mask[top:bottom, left : (left + right) // 2] = 1
        target["masks"] = masks
    return images, targets


@pytest.fixture(scope="module", params=BUILDERS)
def pair(request):
    """A torchvision builder's detector, and ours of the same framework with the same weights."""
    torch.manual_seed(0)
    options = {"min_size": 64, "max_size": 96}
    prefix = "box_" if "rcnn" in request.param else ""
    few = {f"{prefix}score_thresh": 0.0, f"{prefix}detections_per_img": 10}  # random weights are sure of nothing
    theirs = BUILDERS[request.param](weights=None, weights_backbone=None, num_classes=4, **options, **few)
    randomise_norms(theirs.backbone)
    with torch.no_grad():
        for weight in theirs.backbone.fpn.parameters():
            weight.mul_(0.1)  # else sixteen random blocks saturate every score
    ours = create_detector(
        request.param, "resnet50", num_classes=4, weights=None, score_thresh=0.0, detections=10, **options
    )
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def losses_of(detector):
    detector.train()
    torch.manual_seed(1)  # proposals are sampled
    return detector(*batch_with_masks())


def test_it_equals_torchvisions_own_builder_with_the_same_weights(pair):
    ours, theirs = (run(detector) for detector in pair)
    assert all(len(output["boxes"]) for output in ours)
    assert is_equal(ours, theirs)
    state = {name: tensor.clone() for name, tensor in pair[0].state_dict().items()}
    ours, theirs = (losses_of(detector) for detector in pair)
    assert is_equal([ours], [theirs])
    assert all(loss > 0 for loss in ours.values())
    for detector in pair:
        detector.load_state_dict(state)  # live statistics moved


def test_another_dilation_is_another_detector(pair):
    ours, theirs = pair
    conv = ours.backbone.body.layer3[1].conv2
    conv.dilation, conv.padding = (1, 2), (1, 2)
    try:
        assert not is_equal(run(ours), run(theirs))
    finally:
        conv.dilation, conv.padding = (1, 1), (1, 1)
    assert is_equal(run(ours), run(theirs))


@pytest.mark.parametrize("framework", BUILDERS)
def test_trained_stages_and_frozen_norms_are_torchvisions(framework, weights):
    """With loaded weights, as torchvision's builders freeze what they loaded."""
    theirs = BUILDERS[framework](weights=None, weights_backbone=None, num_classes=4)
    expected = [name for name, _ in theirs.named_parameters() if not name.startswith("backbone.body")]
    ours = create_detector(framework, "resnet18", num_classes=4, weights=weights)
    trained = [name for name, parameter in ours.named_parameters() if parameter.requires_grad]
    assert [name for name in trained if not name.startswith("backbone.body")] == expected
    assert {name.split(".")[2] for name in trained if name.startswith("backbone.body")} == {
        "layer2",
        "layer3",
        "layer4",
    }
    assert not any(isinstance(module, _BatchNorm) for module in ours.backbone.modules())


# --- normalisation ----------------------------------------------------------------------------------------------------


def test_normalisation_is_the_weights_own_unless_told_otherwise(weights):
    detector = seeded_detector("resnet18", weights=weights)
    assert detector.config.image_mean == tuple(detector.transform.image_mean) == (0.5, 0.25, 0.125)
    assert detector.config.image_std == tuple(detector.transform.image_std) == (0.5, 0.2, 0.1)
    seen = detector.transform.normalize(torch.full((3, 2, 2), 0.75))
    assert torch.allclose(seen[:, 0, 0], torch.tensor([0.5, 2.5, 6.25]))
    assert seeded_detector("resnet18", weights=weights, image_mean=(0.0, 0.0, 0.0)).transform.image_mean == [0, 0, 0]


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenetv3_small_050", "xception41"])
def test_normalisation_of_random_weights_is_timms(backbone):
    cfg = timm.get_pretrained_cfg(backbone)
    config = seeded_detector(backbone, weights=None).config
    assert (config.image_mean, config.image_std) == (cfg.mean, cfg.std)


# --- freezing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable_layers", [0, 1, 2, 3, 4, 5])
def test_stages_are_frozen_as_torchvision_freezes_them(trainable_layers):
    with torch.device("meta"):
        ours = create_body("resnet18")
        freeze_stages(ours, trainable_layers)
        options = {"norm_layer": nn.BatchNorm2d, "trainable_layers": trainable_layers}
        theirs = resnet_fpn_backbone(backbone_name="resnet18", weights=None, **options).body
    trainable = [{name for name, p in body.named_parameters() if p.requires_grad} for body in (ours, theirs)]
    assert trainable[0] == trainable[1]


def test_a_backbone_can_be_frozen_whole(weights):
    detector = seeded_detector("resnet18", weights=weights, trainable_layers=0)
    assert detector.config.trainable_layers == 0
    assert not any(parameter.requires_grad for parameter in detector.backbone.body.parameters())
    assert all(parameter.requires_grad for parameter in detector.backbone.fpn.parameters())
    train_once(detector)


def test_a_pretrained_backbone_trains_three_stages_and_keeps_its_norms(weights):
    detector = seeded_detector("resnet18", weights=weights)
    body = detector.backbone.body
    assert not any(isinstance(module, _BatchNorm) for module in body.modules())
    before = {name: tensor.clone() for name, tensor in body.state_dict().items()}
    train_once(detector)
    torch.optim.SGD([p for p in detector.parameters() if p.requires_grad], lr=1.0).step()

    changed = {name for name, tensor in body.state_dict().items() if not torch.equal(tensor, before[name])}
    convolutions = {name for name, _ in timm.create_model("resnet18").named_parameters() if "conv" in name}
    downsampling = {f"layer{stage}.0.downsample.0.weight" for stage in (2, 3, 4)}
    assert changed == {name for name in convolutions if name.startswith(("layer2", "layer3", "layer4"))} | downsampling


def test_live_norms_keep_measuring(weights):
    detector = seeded_detector("resnet18", weights=weights, norm="live")
    assert detector.config.norm == "live"
    before = detector.backbone.body.layer4[1].bn2.running_mean.clone()
    train_once(detector)
    assert not torch.equal(detector.backbone.body.layer4[1].bn2.running_mean, before)


@pytest.mark.parametrize(
    ("backbone", "trainable_layers", "frozen"),
    [
        ("convnext_atto", 3, {"stem_0", "stem_1", "stages_0"}),
        ("convnext_atto", 4, set()),
        ("regnetx_002", 3, {"stem", "s1"}),
        ("mobilenetv3_small_050", 3, {"conv_stem", "bn1", "blocks.0"}),
        ("efficientnet_b0", 3, {"conv_stem", "bn1", "blocks.0", "blocks.1"}),
        ("dla34", 3, {"base_layer", "level0", "level1", "level2"}),
        ("hrnet_w18_small", 5, set()),
    ],
)
def test_stages_of_other_families_are_frozen_from_the_stem_on(backbone, trainable_layers, frozen):
    with torch.device("meta"):
        body = create_body(backbone)
    freeze_stages(body, trainable_layers)
    for name, parameter in body.named_parameters():
        assert parameter.requires_grad != name.startswith(tuple(f"{part}." for part in frozen)), name


def test_a_network_whose_stages_can_not_be_told_apart_is_not_frozen_anyhow():
    with torch.device("meta"):
        body = create_body("hrnet_w18_small")
    with pytest.raises(NatsError, match="trainable_layers: the stages of HighResolutionNetFeatures"):
        freeze_stages(body, 3)
    assert all(parameter.requires_grad for parameter in body.parameters())


@pytest.mark.parametrize("options", [{"norm": "frozen"}, {"trainable_layers": 4}, {"trainable_layers": 0}])
def test_random_weights_are_not_frozen(options):
    with pytest.raises(NatsError, match="weights: freezing batch norms or stages of a random backbone ruins it"):
        seeded_detector("resnet18", weights=None, **options)


def test_random_weights_are_all_trained_if_asked_by_number():
    assert all(p.requires_grad for p in seeded_detector("resnet18", weights=None, trainable_layers=5).parameters())


# --- weights ----------------------------------------------------------------------------------------------------------


def check_loaded(detector: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    found = detector.backbone.body.state_dict()
    assert {name for name in tensors if not name.startswith("fc.") and "batches_tracked" not in name} <= found.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, tensors[name].to(tensor.dtype)), name


@pytest.mark.parametrize("genotype", [None, OTHER], ids=["plain", "regrouped"])
def test_every_tensor_of_the_backbone_is_the_folders(weights, genotype):
    check_loaded(
        seeded_detector("resnet18", weights=weights, genotype=genotype), load_file(f"{weights}/model.safetensors")
    )


def test_weights_come_from_a_single_file_or_a_detectors_folder_too(weights, tmp_path):
    tensors = load_file(f"{weights}/model.safetensors")
    from_file = seeded_detector("nats_resnet18", weights=f"{weights}/model.safetensors", genotype=OTHER)
    check_loaded(from_file, tensors)
    assert from_file.config.image_mean == timm.get_pretrained_cfg("resnet18").mean

    other_mean = seeded_detector("nats_resnet18", weights=weights, genotype=OTHER, image_mean=(0.25, 0.5, 0.5))
    from_detector = seeded_detector("resnet18", weights=str(save_detector(other_mean, tmp_path / "detector")))
    check_loaded(from_detector, tensors)
    assert from_detector.config.image_mean == (0.25, 0.5, 0.5)


@pytest.mark.skipif(not TIN_64.is_dir(), reason="no shared weights")
def test_the_shared_weights_load_as_they_are():
    detector = seeded_detector("nats_resnet18", weights=str(TIN_64), genotype=OTHER)
    check_loaded(detector, load_file(TIN_64 / "model.safetensors"))


def test_weights_of_other_families_load(tmp_path):
    folder = str(save_timm_folder(tmp_path / "mobilenet", "mobilenetv3_small_050"))
    body = seeded_detector("mobilenetv3_small_050", weights=folder).backbone.body
    tensors = load_file(f"{folder}/model.safetensors")
    for name, tensor in body.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name


def damage(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")


BAD_WEIGHTS = {
    "another shape": (
        lambda f: damage(f, **{"conv_stem.weight": torch.zeros(16, 3, 7, 7)}),
        r"conv_stem\.weight is \(16, 3, 7, 7\), expected \(16, 3, 3, 3\)",
    ),
    "a missing tensor": (
        lambda f: damage(f, **{"bn1.bias": None}),
        r"bn1\.bias is missing, expected \(16,\)",
    ),
    "no safetensors": (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04pickle"), "not a safetensors file"),
    "no file": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: not JSON"),
    "config of something else": (lambda f: (f / "config.json").write_text("{}"), "config.json: .*'pretrained_cfg'"),
}


@pytest.mark.parametrize("kind", BAD_WEIGHTS)
def test_weights_that_do_not_fit_are_refused(tmp_path, kind):
    spoil, words = BAD_WEIGHTS[kind]
    folder = save_timm_folder(tmp_path / "mobilenet", "mobilenetv3_small_050")
    spoil(folder)
    with pytest.raises(NatsError, match=words) as error:
        seeded_detector("mobilenetv3_small_050", weights=str(folder))
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("architecture", ["resnet34", "resnet50", "convnext_atto"])
def test_weights_of_another_architecture_are_refused(weights, architecture):
    with pytest.raises(NatsError, match=r"weights of another network: [\w.]+ is .*, expected \("):
        create_body(architecture, weights=weights)


def test_weights_that_are_nowhere_are_refused(tmp_path):
    for source in (str(tmp_path / "nothing"), str(tmp_path / "nothing.safetensors")):
        with pytest.raises(NatsError, match="nothing"):
            create_body("resnet18", weights=source)


# --- calibration ------------------------------------------------------------------------------------------------------


def norm_statistics(body: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in body.state_dict().items() if "running" in name}


@pytest.mark.parametrize("norm", ["frozen", "live"])
def test_norms_are_recalibrated_at_training_size_before_they_are_frozen(weights, norm):
    images, targets = batch()
    batches = [(images, targets), (images[:1], targets[:1])]
    transform = GeneralizedRCNNTransform(64, 96, [0.5, 0.25, 0.125], [0.5, 0.2, 0.1])
    by_hand = create_body("resnet18", OTHER, weights)
    recalibrate_bn(by_hand, [transform(part)[0].tensors for part, _ in batches])

    detector = seeded_detector("resnet18", genotype=OTHER, weights=weights, norm=norm, calibration=batches)
    found, expected = norm_statistics(detector.backbone.body), norm_statistics(by_hand)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
    loaded = load_file(f"{weights}/model.safetensors")
    assert not any(torch.equal(tensor, loaded[name]) for name, tensor in found.items())
    assert any(isinstance(module, _BatchNorm) for module in detector.backbone.body.modules()) == (norm == "live")


def test_calibration_takes_bare_lists_of_images_and_needs_one(weights):
    images, targets = batch()
    bare, tuples = (
        seeded_detector("resnet18", weights=weights, calibration=batches) for batches in ([images], [(images, targets)])
    )
    assert is_equal([norm_statistics(bare.backbone.body)], [norm_statistics(tuples.backbone.body)])
    with pytest.raises(NatsError, match="no batch"):
        seeded_detector("resnet18", weights=weights, calibration=[])


def test_a_network_without_batch_norm_needs_no_calibration(tmp_path):
    folder = str(save_timm_folder(tmp_path / "convnext", "convnext_atto"))
    plain, calibrated = (
        seeded_detector("convnext_atto", weights=folder, calibration=batches) for batches in (None, [batch()[0]])
    )
    assert is_equal([plain.state_dict()], [calibrated.state_dict()])


# --- genotypes --------------------------------------------------------------------------------------------------------


def test_only_dilations_tell_a_regrouped_detector_from_the_plain_one(weights):
    plain, regrouped, twin = (seeded_detector("resnet18", genotype=g, weights=weights) for g in (None, PLAIN, OTHER))
    assert is_equal([plain.state_dict()], [regrouped.state_dict()])
    assert is_equal([plain.state_dict()], [twin.state_dict()])
    outputs = [run(detector) for detector in (plain, regrouped, twin)]
    losses = [[train_once(detector)] for detector in (plain, regrouped, twin)]
    assert len(outputs[0][0]["boxes"])
    assert is_equal(outputs[0], outputs[1])
    assert is_equal(losses[0], losses[1])
    assert not is_equal(outputs[0], outputs[2])
    assert not is_equal(losses[0], losses[2])


def test_the_config_carries_the_genotype_itself(weights, tmp_path):
    OTHER.save(tmp_path / "mine.json")
    sources = {"resnet18": OTHER.to_dict(), "nats_resnet18": str(tmp_path / "mine.json")}
    for backbone, genotype in sources.items():
        config = seeded_detector(backbone, genotype=genotype, weights=None).config
        assert Genotype.from_dict(config.genotype) == OTHER
    assert seeded_detector("resnet18", weights=weights).config.genotype is None


# --- errors -----------------------------------------------------------------------------------------------------------

BAD_OPTIONS = [
    ({"framework": "yolo"}, "framework: 'yolo' is unknown, expected one of fasterrcnn"),
    ({"backbone": "resnet19"}, "timm has no model 'resnet19'"),
    ({"backbone": "hf-hub:org/name"}, "timm has no model"),
    ({"backbone": "vit_tiny_patch16_224"}, r"vit_tiny_patch16_224: .*expected \[4, 8, 16, 32\]"),
    ({"backbone": "swin_tiny_patch4_window7_224"}, "swin_tiny_patch4_window7_224: takes images of one size only"),
    ({"backbone": "xcit_nano_12_p8_224"}, r"strides \[8, 8, 8\]"),
    ({"backbone": "resnet18.no_such_tag", "weights": "pretrained"}, "resnet18.no_such_tag"),
    ({"num_clases": 4}, "create_detector: unknown key 'num_clases'"),
    ({"num_classes": 0}, "num_classes: expected a positive number, found 0"),
    ({"num_classes": "4"}, "num_classes: expected an integer, found '4'"),
    ({"num_classes": True}, "num_classes: expected an integer, found True"),
    ({"norm": "thawed"}, "norm: expected one of frozen, live, sync, found 'thawed'"),
    ({"trainable_layers": -1}, "trainable_layers: expected 0 or more, found -1"),
    ({"min_size": 0}, "min_size: expected a positive number"),
    ({"anchor_sizes": (32, 64)}, "anchor_sizes: expected 5, one per level, found 2"),
    ({"image_mean": 0.5}, "image_mean: expected a list of numbers, found 0.5"),
    ({"masks": True}, "masks: fasterrcnn never finds masks"),
    ({"framework": "maskrcnn", "masks": False}, "masks: maskrcnn always finds masks"),
    ({"framework": "fcos", "fpn_channels": 48}, "fpn_channels: expected a multiple of 32, .* fcos .*, found 48"),
]


@pytest.mark.parametrize(("options", "words"), BAD_OPTIONS, ids=lambda value: str(value)[:40])
def test_what_can_not_be_built_is_one_line(options, words):
    with pytest.raises(NatsError, match=words) as error:
        create_detector(**{"backbone": "resnet18", "weights": None, **TINY, **options})
    assert "\n" not in str(error.value)


def test_a_genotype_of_another_network_is_refused():
    for backbone in ("resnet34", "resnet50"):
        with pytest.raises(NatsError, match="resnet"):
            seeded_detector(backbone, genotype=OTHER, weights=None)


def test_a_variant_runs_its_published_default_unless_told_otherwise():
    with torch.device("meta"):
        assert create_body("nats_resnet18").genotype == find_genotype(default_genotype("resnet18"))


# --- config -----------------------------------------------------------------------------------------------------------

SIZE = st.integers(1, 2000)
NAMES = st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=200)


@st.composite
def configs(draw):
    names = draw(st.lists(NAMES, max_size=5))
    ids = draw(st.just([]) | st.lists(st.integers(-(2**53), 2**53), min_size=len(names), max_size=len(names)))
    return draw(
        st.builds(
            DetectorConfig,
            framework=st.sampled_from(sorted(FRAMEWORKS)),
            backbone=NAMES,
            num_classes=st.just(len(names) + 1) if names or ids else SIZE,
            genotype=st.sampled_from([None, OTHER.to_dict()]),
            fpn_channels=st.integers(1, 100).map(lambda size: 32 * size),
            score_thresh=st.none() | st.floats(0, 1),
            nms_thresh=st.none() | st.integers(0, 1),
            detections=st.none() | SIZE,
            trainable_layers=st.integers(0, 99),
            norm=st.sampled_from(["frozen", "live", "sync"]),
            min_size=SIZE,
            max_size=SIZE,
            anchor_sizes=st.none() | st.tuples(*[SIZE] * 5),
            image_mean=st.tuples(*[st.floats(0, 1)] * 3),
            classes=st.just(tuple(names)),
            category_ids=st.just(tuple(ids)),
        )
    )


@given(configs())
def test_a_config_survives_json(config):
    assert DetectorConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


CONFIG = {"framework": "fasterrcnn", "backbone": "resnet18", "num_classes": 4}
WRONG_VALUES = {
    "framework": [None, 1, "yolo"],
    "backbone": [None, 1, ["resnet18"]],
    "num_classes": [None, "4", 4.0, True, 0, -1],
    "genotype": ["c_resnet18.json", 3, []],
    "masks": ["yes", 1, True],
    "mask_channels": [None, 0],
    "score_thresh": ["0.5", True, 1.5, -0.1],
    "nms_thresh": ["0.5", 2],
    "detections": [0, 1.5, "many"],
    "fpn_channels": [None, "16", 0],
    "head_size": ["16", 1.5, 0],
    "trainable_layers": [None, "3", -1],
    "norm": [None, True, "thawed"],
    "min_size": ["800", 0],
    "max_size": ["1333", 0],
    "anchor_sizes": [32, [32], ["32"] * 5, [32.5] * 5, [0, 1, 2, 3, 4]],
    "image_mean": [0.5, ["0.5"] * 3, "abc"],
    "image_std": [None, [None] * 3],
    "classes": ["car", [1], [["car"]]],
    "category_ids": [1, ["1"], [1.5]],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG_VALUES.items() for value in values])
def test_a_wrong_value_names_file_and_key(key, value):
    with pytest.raises(NatsError, match=rf"^some/config\.json: {key}: ") as error:
        DetectorConfig.from_dict({**CONFIG, key: value}, source="some/config.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", CONFIG)
def test_a_missing_key_is_named(key):
    with pytest.raises(NatsError, match=rf"^config\.json: key '{key}' is missing"):
        DetectorConfig.from_dict({name: value for name, value in CONFIG.items() if name != key})


def test_an_unknown_key_is_named():
    with pytest.raises(NatsError, match=r"^config\.json: unknown key 'colour'"):
        DetectorConfig.from_dict({**CONFIG, "colour": "red"})


def test_a_genotype_is_found_by_every_name_that_commands_take(tmp_path):
    (tmp_path / "search").mkdir()
    OTHER.save(tmp_path / "search" / "genotype.json")
    for genotype in (OTHER, OTHER.to_dict(), str(tmp_path / "search"), tmp_path / "search" / "genotype.json"):
        detector = create_detector(backbone="resnet18", genotype=genotype, weights=None, **TINY)
        assert detector.backbone.body.genotype == OTHER
        assert Genotype.from_dict(detector.config.genotype) == OTHER
