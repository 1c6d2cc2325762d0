"""torchvision's detector checkpoints, with random weights in their layout, give equal outputs in our detectors."""

import argparse
import json
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.ops.misc import FrozenBatchNorm2d

from nats_zoo import NatsError
from nats_zoo.cli import commands as cli
from nats_zoo.detection import from_pretrained
from nats_zoo.detection.models.convert import from_torchvision

PUBLISHED = {
    "fasterrcnn": "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth",
    "maskrcnn": "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth",
    "retinanet": "retinanet_resnet50_fpn_coco-eeacb38b.pth",
}
CLASSES = {"fasterrcnn": FasterRCNN, "maskrcnn": MaskRCNN, "retinanet": RetinaNet, "fcos": FCOS}


def torchvision_detector(framework, num_classes=91):
    """As the published ones are built, but on a ResNet-18."""
    torch.manual_seed(0)
    options = {"backbone_name": "resnet18", "weights": None, "trainable_layers": 3, "norm_layer": FrozenBatchNorm2d}
    if framework in ("retinanet", "fcos"):
        options |= {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)}
    detector = CLASSES[framework](resnet_fpn_backbone(**options), num_classes)
    for module in detector.modules():
        if isinstance(module, FrozenBatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 1e-4, 1e-2)  # an epsilon of 1e-5 shows
            nn.init.uniform_(module.weight, 0.01, 0.1)
    return detector.eval()


def images():
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(3, 80, 64, generator=generator), torch.rand(3, 64, 70, generator=generator)]


@torch.no_grad()
def run(detector):
    """At a size that a test can afford, and of the surest ten."""
    parts = getattr(detector, "roi_heads", detector)
    parts.score_thresh, parts.detections_per_img = 0.0, 10
    detector.transform.min_size, detector.transform.max_size = (64,), 96
    return detector(images())


def difference(one, other):
    pairs = list(zip(one, other, strict=True))
    if any(a["boxes"].shape != b["boxes"].shape for a, b in pairs):
        return float("inf")
    return max((a[key].double() - b[key].double()).abs().max().item() for a, b in pairs for key in a)


def old_names(state):
    """The names under which the published checkpoints hold their tensors: from before torchvision 0.14."""
    patterns = [
        (r"(fpn\.(?:inner|layer)_blocks\.\d)\.0\.", r"\1."),
        (r"(mask_head)\.(\d)\.0\.", lambda match: f"{match[1]}.mask_fcn{int(match[2]) + 1}."),
        (r"(rpn\.head\.conv)\.0\.0\.", r"\1."),
        (r"(_head\.conv)\.(\d)\.0\.", lambda match: f"{match[1]}.{2 * int(match[2])}."),
    ]
    for pattern, replacement in patterns:
        state = {re.sub(pattern, replacement, name): tensor for name, tensor in state.items()}
    return state


@pytest.mark.parametrize("framework", PUBLISHED)
def test_a_published_checkpoint_gives_equal_outputs(framework, tmp_path):
    theirs = torchvision_detector(framework)
    overwrite_eps(theirs, 0.0)  # as torchvision does with these three
    state = old_names(theirs.state_dict())
    assert state.keys() != theirs.state_dict().keys()
    torch.save(state, tmp_path / PUBLISHED[framework])
    ours = from_torchvision(tmp_path / PUBLISHED[framework], "resnet18")

    expected = run(theirs)
    assert all(len(output["boxes"]) for output in expected)
    assert difference(run(ours), expected) < 1e-3
    assert ours.config.classes[0] == "person"
    assert len(set(ours.config.classes)) == 90
    assert ours.config.category_ids[-1] == 90

    ignorant = from_torchvision(tmp_path / PUBLISHED[framework], "resnet18", epsilon=1e-5)
    assert difference(run(ignorant), expected) > 1e-2


KINDS = ["state dict", "reference training", "safetensors"]


@pytest.mark.parametrize(
    ("framework", "kind"),
    [*((framework, "state dict") for framework in CLASSES), *(("fcos", kind) for kind in KINDS[1:])],
)
def test_a_checkpoint_of_ones_own_gives_equal_outputs(framework, kind, tmp_path):
    theirs = torchvision_detector(framework, num_classes=4)
    path = tmp_path / ("mine.safetensors" if kind == "safetensors" else "model_25.pth")
    if kind == "safetensors":
        save_file(theirs.state_dict(), path)
    elif kind == "state dict":
        torch.save(theirs.state_dict(), path)
    else:
        torch.save({"model": theirs.state_dict(), "args": argparse.Namespace(lr=0.02), "epoch": 25}, path)
    ours = from_torchvision(path, "resnet18", ["cat", "dog", "owl"])
    assert (ours.config.framework, ours.config.num_classes) == (framework, 4)
    assert difference(run(ours), run(theirs)) == 0
    with torch.no_grad():
        ours.backbone.fpn.inner_blocks[0][0].weight.mul_(1.1)
    assert difference(run(ours), run(theirs)) > 0


def test_the_command_writes_a_detector_folder(tmp_path, capsys):
    theirs = torchvision_detector("fasterrcnn", num_classes=3)
    torch.save(theirs.state_dict(), tmp_path / "mine.pth")
    arguments = [str(tmp_path / "mine.pth"), "--backbone", "resnet18", "--classes", '["cat", "dog"]']
    assert cli.main(["convert", *arguments, "--output", str(tmp_path / "out")]) == 0
    assert "fasterrcnn on resnet18, 2 classes" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["classes"] == ["cat", "dog"]
    assert difference(run(from_pretrained(tmp_path / "out")), run(theirs)) == 0


def bad(kind, path):
    state = {} if kind == "no detector" else torchvision_detector("fasterrcnn", num_classes=3).state_dict()
    if kind == "no detector":
        torch.save(nn.Linear(2, 2).state_dict(), path)
    elif kind == "other objects":
        torch.save(nn.Linear(2, 2), path)
    elif kind == "truncated":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:1000])
    elif kind == "text":
        path.write_text("weights")
    elif kind == "a list":
        torch.save([1, 2], path)
    elif kind == "one tensor short":
        del state["rpn.head.cls_logits.bias"]
        torch.save(state, path)
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("no detector", "expected the tensors of torchvision's fasterrcnn_resnet50_fpn.* found weight, bias"),
        ("other objects", "expected a checkpoint of tensors"),
        ("truncated", "expected a checkpoint of tensors"),
        ("text", "expected a checkpoint of tensors"),
        ("a list", "expected a state dict"),
        ("one tensor short", "is no fasterrcnn on resnet18: Missing .*rpn.head.cls_logits.bias"),
    ],
)
def test_a_file_that_is_none_is_one_line(kind, words, tmp_path):
    path = bad(kind, tmp_path / "model.pth")
    with pytest.raises(NatsError, match=words) as error:
        from_torchvision(path, "resnet18")
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_another_backbone_names_a_tensor(tmp_path):
    torch.save(torchvision_detector("fasterrcnn", num_classes=3).state_dict(), tmp_path / "model.pth")
    with pytest.raises(NatsError, match=r"is no fasterrcnn on resnet50: .*backbone\.body"):
        from_torchvision(tmp_path / "model.pth")
    with pytest.raises(NatsError, match="classes: expected 2 names"):
        from_torchvision(tmp_path / "model.pth", "resnet18", ["cat"])


def test_names_of_torchvisions_weights_are_looked_up(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    theirs = torchvision_detector("fasterrcnn")
    overwrite_eps(theirs, 0.0)
    cached = tmp_path / "hub" / "checkpoints" / PUBLISHED["fasterrcnn"]
    cached.parent.mkdir(parents=True)
    torch.save(theirs.state_dict(), cached)
    ours = from_torchvision("FasterRCNN_ResNet50_FPN_Weights.COCO_V1", "resnet18")
    assert difference(run(ours), run(theirs)) < 1e-3
    with pytest.raises(NatsError, match="neither a file nor torchvision's weights"):
        from_torchvision("NoSuch_Weights.COCO_V1")
