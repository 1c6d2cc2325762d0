"""Inception Convolution's checkpoints, made here in their layout, against one convolution per dilation."""

import json
import math
import random
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import nats_zoo
from nats_zoo import NatsError, cli
from nats_zoo.models.ic_conv import from_ic_conv_checkpoint

PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "ic_conv"
KEYS = [f"({h}, {w})" for h in range(4) for w in range(4)]


class SmallConvs(nn.Module):
    """One convolution per dilation with channels, on all inputs or (`split`) on those of its cardinality groups."""

    def __init__(self, plain, pattern, split):
        super().__init__()
        unit, depth = plain.out_channels // plain.groups, plain.in_channels // plain.groups
        self.conv_list, self.inputs, start = nn.ModuleList(), [], 0
        for key, count in pattern.items():
            if count == 0:
                continue
            dilation = tuple(int(part) + 1 for part in key.strip("()").split(","))
            inputs, outputs = plain.in_channels, count
            if plain.groups > 1:
                inputs, outputs = depth * count if split else plain.in_channels, unit * count
            groups = count if split else math.gcd(count, plain.groups)
            self.inputs.append(slice(depth * start, depth * (start + count)) if split else slice(None))
            geometry = dict(stride=plain.stride, padding=dilation, dilation=dilation, groups=groups, bias=False)
            self.conv_list.append(nn.Conv2d(inputs, outputs, 3, **geometry))
            start += count

    def forward(self, x):
        return torch.cat([conv(x[:, part]) for conv, part in zip(self.conv_list, self.inputs, strict=True)], 1)


def draw_pattern(convs, seed=0):
    """All 16 keys for each convolution, as the published files have them, some with no channels."""
    rng, pattern = random.Random(seed), []
    for conv in convs:
        units = conv.groups if conv.groups > 1 else conv.out_channels
        used = rng.sample(range(16), 4)
        counts = [rng.randint(1, units // 4) for _ in used[1:]]
        by_key = dict(zip(used, [units - sum(counts), *counts], strict=True))
        pattern.append({key: by_key.get(index, 0) for index, key in enumerate(KEYS)})
    return pattern


@pytest.fixture
def make(tmp_path, randomise_bn):
    """`make(architecture, pattern_file=None, ...)`: their network, and its pattern file."""

    def make(architecture="resnet50", pattern_file=None, split=False, **options):
        torch.manual_seed(0)
        theirs = timm.create_model(architecture, zero_init_last=False, **options)
        convs = {name: m for name, m in theirs.named_modules() if name.startswith("layer") and name.endswith("conv2")}
        if pattern_file is None:
            pattern_file = tmp_path / "pattern.json"
            pattern_file.write_text(json.dumps(draw_pattern(convs.values())))
        for (name, conv), pattern in zip(convs.items(), json.loads(pattern_file.read_text()), strict=True):
            theirs.set_submodule(name, SmallConvs(conv, pattern, split))
        return randomise_bn(theirs, torch.Generator().manual_seed(0)).eval(), pattern_file

    return make


@pytest.fixture
def images():
    return torch.randn(2, 3, 96, 80, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def difference(ours, expected, images):
    return ((ours(images) - expected).abs().max() / expected.abs().max()).item()


def assert_equal(theirs, ours, images):
    """Their outputs, and no longer with one dilation changed; their very kernels."""
    with torch.no_grad():
        expected = theirs(images)
    assert difference(ours, expected, images) < 1e-6
    name, conv = next((name, m) for name, m in ours.named_modules() if isinstance(m, nats_zoo.RegroupedConv2d))
    state = theirs.state_dict()
    pieces = [state[f"{name}.conv_list.{index}.weight"] for index in range(len(conv.runs))]
    assert torch.equal(conv.weight, torch.cat(pieces))
    runs = [[conv.runs[0].channels, conv.runs[0].dilation_h, conv.runs[0].dilation_w + 1], *conv.runs[1:]]
    ours.set_submodule(name, nats_zoo.RegroupedConv2d.from_conv(conv, runs))
    assert difference(ours, expected, images) > 1e-3


WRAPPINGS = {
    "state dict": lambda state: state,
    "state_dict, module.": lambda state: {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}},
    "model": lambda state: {"model": state},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_classifier_equals_one_convolution_per_dilation(wrapping, make, images, tmp_path):
    theirs, pattern = make()
    torch.save(WRAPPINGS[wrapping](theirs.state_dict()), tmp_path / "ckpt.pth.tar")
    ours = from_ic_conv_checkpoint(pattern, tmp_path / "ckpt.pth.tar")
    assert ours.genotype == nats_zoo.Genotype(
        "resnet50",
        ours.genotype.convs,
        provenance={**ours.genotype.provenance, "method": "ic_conv", "weights": "ckpt.pth.tar"},
    )
    assert_equal(theirs, ours, images)


@pytest.mark.parametrize("architecture", ["resnet50", "resnet101"])
@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="no published pattern files here")
def test_published_patterns(architecture, make, images, tmp_path):
    theirs, pattern = make(architecture, PUBLISHED / f"ic_{architecture}_k9.json")
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "ckpt.pth.tar")
    assert_equal(theirs, from_ic_conv_checkpoint(pattern, tmp_path / "ckpt.pth.tar", architecture), images)


def test_the_command_writes_a_detectors_backbone_as_a_folder(make, images, tmp_path, capsys):
    theirs, pattern = make(num_classes=0)
    state = {f"backbone.{key}": value for key, value in theirs.state_dict().items() if "num_batches" not in key}
    state |= {"neck.fpn_convs.0.conv.weight": torch.zeros(2, 2), "bbox_head.fc_cls.bias": torch.zeros(2)}
    torch.save({"meta": {"epoch": 12}, "state_dict": state}, tmp_path / "ckpt.pth")
    arguments = ["--pattern", str(pattern), "--checkpoint", str(tmp_path / "ckpt.pth")]
    assert cli.main(["convert", "ic_conv", *arguments, "--output", str(tmp_path / "out")]) == 0
    assert f"no classifier: {tmp_path / 'out'}" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_args"]["genotype"]["provenance"]["weights"] == "ckpt.pth"
    assert "tv_in1k" not in json.dumps(config)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Inception Convolution's" in card
    assert "bsd" not in card
    assert_equal(theirs, nats_zoo.from_pretrained(tmp_path / "out").eval(), images)


def test_a_pattern_alone_becomes_a_genotype_file(make, tmp_path):
    pattern = make()[1]
    arguments = ["--pattern", str(pattern), "--output", str(tmp_path / "genotype.json")]
    assert cli.main(["convert", "ic_conv", *arguments]) == 0
    assert nats_zoo.Genotype.load(tmp_path / "genotype.json") == nats_zoo.Genotype.from_ic_conv(pattern, "resnet50")


def test_grouped_convolutions_by_their_shapes(make, images, tmp_path):
    """Small ones of whole cardinality groups are one kernel; small ones over all inputs are none."""
    theirs, pattern = make("resnext50_32x4d", split=True)
    torch.save(theirs.state_dict(), tmp_path / "split.pth")
    assert_equal(theirs, from_ic_conv_checkpoint(pattern, tmp_path / "split.pth", "resnext50_32x4d"), images)

    theirs, pattern = make("resnext50_32x4d", split=False)
    torch.save(theirs.state_dict(), tmp_path / "whole.pth")
    with pytest.raises(NatsError, match=r"layer1\.0\.conv2\.conv_list\.0\.weight.*groups of its own over all inputs"):
        from_ic_conv_checkpoint(pattern, tmp_path / "whole.pth", "resnext50_32x4d")
    pattern.write_text(json.dumps([{"(0, 0)": 16, "(0, 1)": 16}] * 16))
    theirs, pattern = make("resnext50_32x4d", pattern, split=True)
    torch.save(theirs.state_dict(), tmp_path / "unclear.pth")
    with pytest.raises(NatsError, match=r"layer1\.0\.conv2: .*may each spread over all 32: no shape tells"):
        from_ic_conv_checkpoint(pattern, tmp_path / "unclear.pth", "resnext50_32x4d")


def damage(kind, state):
    if kind == "a piece is missing":
        del state["layer2.1.conv2.conv_list.2.weight"]
    elif kind == "a piece too many":
        state["layer2.1.conv2.conv_list.4.weight"] = torch.zeros(1, 128, 3, 3)
    elif kind == "another pattern's":
        pieces = [f"layer3.0.conv2.conv_list.{index}.weight" for index in (0, 1)]
        state[pieces[0]], state[pieces[1]] = state[pieces[1]], state[pieces[0]]
    elif kind == "another network's":
        state["layer4.2.conv3.weight"] = state["layer4.2.conv3.weight"][:1024]
    elif kind == "no dilations":
        state = timm.create_model("resnet50").state_dict()
    elif kind == "objects":
        return {"state_dict": state, "hook": nn.ReLU()}
    return state


DAMAGES = {
    "a piece is missing": r"layer2\.1\.conv2\.conv_list\.2\.weight: expected .* found no such tensor",
    "a piece too many": r"layer2\.1\.conv2\.conv_list\.4\.weight.*: expected no such tensor, found \(1, 128, 3, 3\)",
    "another pattern's": r"layer3\.0\.conv2\.conv_list\.0\.weight: expected .*, found \(",
    "another network's": r"layer4\.2\.conv3\.weight.*: expected \(2048, 512, 1, 1\), found \(1024, 512, 1, 1\)",
    "no dilations": r"layer1\.0\.conv2\.conv_list\.0\.weight: expected .* found no such tensor",
    "objects": "expected a checkpoint of tensors, found other objects",
}


@pytest.mark.parametrize(("kind", "words"), DAMAGES.items(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_one_line(kind, words, make, tmp_path, capsys):
    theirs, pattern = make()
    path = tmp_path / "ckpt.pth.tar"
    torch.save(damage(kind, theirs.state_dict()), path)
    with pytest.raises(NatsError, match=words) as error:
        from_ic_conv_checkpoint(pattern, path)
    assert str(error.value).startswith(str(path))
    arguments = ["--pattern", str(pattern), "--checkpoint", str(path), "--output", str(tmp_path / "out")]
    assert cli.main(["convert", "ic_conv", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ic_conv"], "pattern: expected"),
        (["ic_conv", "--pattern", "p.json", "--epsilon", "0"], "epsilon: are for detectors"),
        (["model.pth", "--pattern", "p.json"], "are for nats convert ic_conv"),
    ],
)
def test_options_of_the_other_kind_are_refused(arguments, words, capsys):
    assert cli.main(["convert", *arguments]) == 2
    assert words in capsys.readouterr().err
