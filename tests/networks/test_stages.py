"""searchable_convs: what can be regrouped, by the stages that timm's feature_info tells of, not by names."""

import copy

import pytest
import timm
import torch
import torchvision
from timm.layers import Conv2dSame, StdConv2d
from torch import nn

from nats_zoo import Genotype, RegroupedConv2d, transform
from nats_zoo.networks.stages import searchable_convs

# Pixels; None: 256.
FAMILIES = {
    "resnet18": None,
    "regnetx_002": None,
    "resnetv2_18": None,
    "densenet121": None,
    "vgg11": None,
    "dla46x_c": None,
    "hrnet_w18_small": None,
    "cs3darknet_focus_s": None,
    "cspresnet50": None,
    "repvgg_a0": None,
    "tresnet_m": None,  # feature_info names '' for its first map
    "selecsls42": None,
    "legacy_xception": None,
    "mobilenetv3_small_050": None,
    "tf_efficientnet_b0": None,
    "ghostnet_050": None,
    "convnext_atto": None,
    "inception_next_atto": None,
    "twins_svt_small": 224,  # feature_info names modules that the network has not
    "coat_tiny": 224,  # convolutions that several blocks share, registered before all of them
    "shvit_s1": None,  # all in blocks that rebuild them
}


def create(name, **options):
    with torch.device("meta"):
        return timm.create_model(name, **options).eval()


def names_of(stages):
    return [name for names in stages.values() for name in names]


@torch.no_grad()
def strides_of_outputs(model, size):
    """Stride of the map that each convolution gives, by name, in the order in which they run."""
    strides = {}

    def note(name):
        def hook(module, inputs, output):
            strides[name] = size // output.shape[-1]

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note(name))
    model(torch.empty(1, 3, size, size, device="meta"))
    return strides


# --- stages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_stages_convolutions_lie_between_its_map_and_the_one_before(name):
    model = create(name)
    stages = searchable_convs(model)
    strides = strides_of_outputs(copy.deepcopy(model), FAMILIES[name] or 256)
    first = model.feature_info[0]["reduction"].bit_length() - 2  # stride 2 is stage 0
    maps = dict(enumerate((info["reduction"] for info in model.feature_info), start=first))
    assert list(stages) == sorted(stages)
    for stage, convs in stages.items():
        for conv in convs:
            assert maps.get(stage - 1, 1) <= strides[conv] <= maps[stage], conv


@pytest.mark.parametrize("name", FAMILIES)
def test_they_are_in_network_order_and_transform_takes_each(name):
    model = create(name)
    stages = searchable_convs(model)
    order = [conv for conv, _ in model.named_modules()]
    for convs in stages.values():
        assert convs == sorted(convs, key=order.index)
    names = names_of(stages)
    assert len(set(names)) == len(names)
    dilated = {conv: [(model.get_submodule(conv).out_channels, 2, 2)] for conv in names}
    transform(model, Genotype(name, dilated))
    assert sum(isinstance(module, RegroupedConv2d) for module in model.modules()) == len(names)
    assert searchable_convs(model) == stages


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "hrnet_w18_small", "convnext_atto", "tf_efficientnet_b0"])
def test_none_is_missing(name):
    model = create(name)
    wide = [conv for conv, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size[0] in (3, 5, 7)]
    assert sorted(names_of(searchable_convs(model))) == sorted(wide)


def test_resnet():
    stages = searchable_convs(create("resnet18"))
    assert stages[0] == ["conv1"]
    for stage in (1, 2, 3, 4):
        assert stages[stage] == [f"layer{stage}.{block}.conv{conv}" for block in (0, 1) for conv in (1, 2)]


def test_what_comes_after_the_last_map_is_left_out():
    names = names_of(searchable_convs(create("vgg11")))
    assert "pre_logits.fc1" not in names  # 7x7
    assert names[-1].startswith("features.")
    last_blocks = [name for name in names_of(searchable_convs(create("ghostnet_050"))) if name.startswith("blocks.8.")]
    assert last_blocks == []  # timm's last map is that of blocks.7


@pytest.mark.parametrize(("name", "output_stride"), [("resnet18", 8), ("resnet18", 16), ("regnetx_002", 8)])
def test_output_stride_keeps_the_numbers(name, output_stride):
    assert searchable_convs(create(name, output_stride=output_stride)) == searchable_convs(create(name))


def test_networks_of_one_resolution_have_a_stage_per_map():
    stages = searchable_convs(create("convmixer_768_32"))
    assert len(stages) == 32


# --- features_only ----------------------------------------------------------------------------------------------------


def shape(conv):
    return conv.in_channels, conv.out_channels, conv.kernel_size, conv.groups


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("resnet18", "layer1."),
        ("convnext_atto", "stages_0."),
        ("densenet121", "features_denseblock1."),
        ("vgg11", "features_"),
        ("cspresnet50", "stages_0."),
        ("repvgg_a0", "stages_0."),
        ("legacy_xception", "body.block1."),
        ("mobilenetv3_small_050", "blocks."),
        ("visformer_tiny", "model.stage1."),  # wrapped whole
        ("pnasnet5large", "body.cell_stem_0."),
    ],
)
def test_features_only_has_the_same_by_its_own_names(name, start):
    plain, body = create(name), create(name, features_only=True)
    stages, own = searchable_convs(plain), searchable_convs(body)
    assert any(conv.startswith(start) for conv in names_of(own))
    assert list(own) == list(stages)
    for stage, convs in stages.items():
        found = [shape(body.get_submodule(conv)) for conv in own[stage]]
        assert found == [shape(plain.get_submodule(conv)) for conv in convs]


@pytest.mark.parametrize(
    ("name", "out_indices", "last"),
    [
        ("resnet18", (1, 2), 2),
        ("resnet18", (-1,), 4),
        ("gcvit_xxtiny", (0, 1), 2),  # its first blocks look at smaller maps of their own
    ],
)
def test_features_only_has_no_more_stages_than_maps(name, out_indices, last):
    stages = searchable_convs(create(name))
    found = searchable_convs(create(name, features_only=True, out_indices=out_indices))
    expected = {stage: len(convs) for stage, convs in stages.items() if stage <= last}
    assert {stage: len(convs) for stage, convs in found.items()} == expected


# --- any module -------------------------------------------------------------------------------------------------------


def test_without_feature_info_all_is_one_stage():
    model = torchvision.models.resnet18()
    assert searchable_convs(model) == {
        0: [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    }
    assert searchable_convs(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())) == {0: ["0"]}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "mixer_s32_224"])
def test_networks_without_any(name):
    assert searchable_convs(create(name)) == {}


class Rebuilding(nn.Sequential):
    def fuse(self):
        return nn.Identity()


def test_what_can_be_regrouped_and_what_can_not():
    model = nn.ModuleDict(
        {
            "plain": nn.Conv2d(4, 8, 3),
            "one_axis": nn.Conv2d(4, 8, (1, 7)),
            "depthwise": nn.Conv2d(8, 8, 5, groups=8, padding="same"),
            "same": Conv2dSame(4, 8, 3, stride=2),
            "regrouped": RegroupedConv2d(4, 8, 3, runs=[(8, 2, 2)]),
            "pointwise": nn.Conv2d(4, 8, 1),
            "even": nn.Conv2d(4, 8, 2),
            "even_axis": nn.Conv2d(4, 8, (3, 4)),
            "reflected": nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"),
            "standardised": StdConv2d(4, 8, 3),
            "transposed": nn.ConvTranspose2d(4, 8, 3),
            "of_sequences": nn.Conv1d(4, 8, 3),
            "linear": nn.Linear(4, 8),
            "rebuilt": nn.Sequential(Rebuilding(nn.Conv2d(4, 8, 3))),
        }
    )
    assert searchable_convs(model) == {0: ["plain", "one_axis", "depthwise", "same", "regrouped"]}


@pytest.mark.parametrize("name", ["hrnet_w18_small", "coat_tiny"])
def test_the_network_stays_as_it_was(name):
    """Where one pass decides, it runs on a copy: whatever the network's type and mode, and without its weights."""
    model = create(name).double().train()
    parameters = [id(parameter) for parameter in model.parameters()]
    assert searchable_convs(model) == searchable_convs(create(name))
    assert model.training
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert not any(module._forward_hooks for module in model.modules())
