"""Effective receptive fields: exact supports of linear stacks, the radius of known shapes, and timm's networks."""

import copy
import math

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import EffectiveSEModule, SEModule
from torch import nn

from nats_zoo import Genotype, NatsError, RegroupedConv2d
from nats_zoo.networks.erf import effective_receptive_field, erf_radius, plain_and_nats_fields

SIDE = 65


def stack(*dilations):
    """3x3 convolutions with random weights at these dilations, one after the other, with batch norms and ReLUs."""
    torch.manual_seed(0)
    layers = []
    for index, dilation in enumerate(dilations):
        conv = nn.Conv2d(3 if index == 0 else 4, 4, 3, padding=dilation, dilation=dilation)
        layers += [conv, nn.BatchNorm2d(4), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def reachable(*dilations, shape=(SIDE, SIDE)):
    """Pixels that taps at these dilations reach from the centre: all sums of one offset per layer."""
    offsets = {(0, 0)}
    for height, width in dilations:
        offsets = {(y + i * height, x + j * width) for y, x in offsets for i in (-1, 0, 1) for j in (-1, 0, 1)}
    field = np.zeros(shape, bool)
    for y, x in offsets:
        field[shape[0] // 2 + y, shape[1] // 2 + x] = True
    return field


dilations = st.tuples(st.integers(1, 5), st.integers(1, 5))


@settings(max_examples=30)
@given(st.lists(dilations, min_size=1, max_size=3))
def test_the_support_of_dilated_convolutions_is_the_analytic_one(dilations):
    field = effective_receptive_field(stack(*dilations), SIDE)
    assert field.shape == (SIDE, SIDE)
    assert np.array_equal(field.numpy() > 0, reachable(*dilations))
    wider = [(height, width + 1) for height, width in dilations]
    assert not np.array_equal(field.numpy() > 0, reachable(*wider))


def test_the_field_of_one_convolution_is_its_kernel():
    conv = nn.Conv2d(3, 5, 3, padding=(2, 1), dilation=(2, 1))
    field = effective_receptive_field(nn.Sequential(conv, nn.SiLU()), (9, 11))
    expected = torch.zeros(9, 11)
    # the gradient of the sum over output channels, then |.| summed over input channels
    expected[2:7:2, 4:7] = conv.weight.detach().sum(0).abs().sum(0)
    torch.testing.assert_close(field, expected)


def test_a_wide_run_widens_the_field_and_leaves_its_height_alone():
    runs = [(8, 1, 1), (8, 1, 3)]
    conv = RegroupedConv2d(3, 16, 3, padding=1, runs=runs)
    plain, nats = plain_and_nats_fields(nn.Sequential(conv, nn.ReLU()), (33, 33))
    assert np.array_equal(plain.numpy() > 0, reachable((1, 1), shape=(33, 33)))
    assert np.array_equal(nats.numpy() > 0, reachable((1, 1), shape=(33, 33)) | reachable((1, 3), shape=(33, 33)))
    before, after = erf_radius(plain), erf_radius(nats)
    assert after.width > 1.5 * before.width
    assert after.height < 1.1 * before.height
    assert isinstance(conv, RegroupedConv2d)


# --- the radius -------------------------------------------------------------------------------------------------------


def grid(shape):
    rows, columns = (torch.arange(n) + 0.5 for n in shape)
    return rows[:, None], columns[None, :]


@given(st.floats(4, 20), st.floats(4, 20), st.floats(0.3, 0.95))
def test_extent_of_a_gaussian(height, width, share):
    shape = (301, 281)
    rows, columns = grid(shape)
    field = torch.exp(-(((rows - 151) / height) ** 2 + ((columns - 140) / width) ** 2) / 2)
    extent = erf_radius(field, share)
    assert extent.height == pytest.approx(height, rel=0.01)
    assert extent.width == pytest.approx(width, rel=0.01)
    assert extent.centre == pytest.approx((151, 140), abs=0.01)
    assert extent.share == share
    low, high = sorted((height, width))
    round_radius = math.sqrt(-2 * math.log(1 - share))
    assert low * round_radius - 1 < extent.radius < high * round_radius + 1
    assert not extent.is_cut


def test_radius_of_a_round_gaussian():
    rows, columns = grid((201, 201))
    field = torch.exp(-((rows - 100) ** 2 + (columns - 100) ** 2) / (2 * 15**2))
    assert erf_radius(field, 0.9).radius == pytest.approx(15 * math.sqrt(-2 * math.log(0.1)), rel=0.01)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e30])
@pytest.mark.parametrize(("height", "width"), [(80, 80), (40, 90)])
def test_extent_of_a_box(height, width, scale):
    field = torch.zeros(200, 220)
    field[60 : 60 + height, 70 : 70 + width] = scale
    extent = erf_radius(field, 0.5)
    assert extent.height == pytest.approx(math.sqrt((height**2 - 1) / 12))
    assert extent.width == pytest.approx(math.sqrt((width**2 - 1) / 12))
    assert extent.centre == pytest.approx((60 + height / 2, 70 + width / 2))
    if height == width:  # the circle with half of the area lies inside
        assert extent.radius == pytest.approx(math.sqrt(0.5 * height * width / math.pi), abs=1)


def test_one_pixel_has_no_extent():
    field = torch.zeros(9, 9)
    field[4, 2] = 3
    extent = erf_radius(field)
    assert (extent.radius, extent.height, extent.width, extent.centre) == (0, 0, 0, (4.5, 2.5))


def test_a_field_that_the_image_cuts_says_so():
    rows, columns = grid((64, 64))
    for deviation, is_cut in ((6, False), (20, True)):
        extent = erf_radius(torch.exp(-((rows - 32) ** 2 + (columns - 32) ** 2) / (2 * deviation**2)))
        assert extent.is_cut == is_cut
        assert ("at least" in str(extent)) == is_cut


# --- networks ---------------------------------------------------------------------------------------------------------

RUNS = {f"layer{stage}.1.conv2": [(32 * 2 ** (stage - 1), 1, 3)] * 2 for stage in (2, 3)}


@pytest.fixture(scope="module")
def network(randomise_bn):
    torch.manual_seed(0)
    genotype = Genotype("resnet18", RUNS)
    model = timm.create_model("nats_resnet18", genotype=genotype, features_only=True, zero_init_last=False)
    return randomise_bn(model, torch.Generator().manual_seed(0))


def linear_twin(network):
    """The same weights in a ResNet that timm builds without activations, average pooling for maximum pooling."""
    twin = timm.create_model(
        "nats_resnet18", genotype=Genotype("resnet18", RUNS), features_only=True, act_layer=nn.Identity
    )
    twin.load_state_dict(network.state_dict())
    twin.maxpool = nn.AvgPool2d(3, 2, 1)
    return twin.eval()


@pytest.mark.parametrize("level", [2, 3, -1])
def test_the_field_of_a_resnet_is_the_gradient_without_activations(network, level):
    images = torch.randn(1, 3, 128, 160, requires_grad=True)  # any, for it is linear
    maps = linear_twin(network)(images)[level]
    (gradient,) = torch.autograd.grad(maps[0, :, maps.shape[2] // 2, maps.shape[3] // 2].sum(), images)
    field = effective_receptive_field(network, (128, 160), level=level)
    torch.testing.assert_close(field, gradient[0].abs().sum(0), rtol=1e-3, atol=1e-5 * field.max().item())


def test_the_callers_network_stays_as_it_is(network):
    network.train()
    before, kinds = copy.deepcopy(network.state_dict()), [type(module) for module in network.modules()]
    plain_and_nats_fields(network, 64)
    assert [type(module) for module in network.modules()] == kinds
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(module.training for module in network.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())


def test_the_plain_field_is_that_of_timms_network(network):
    plain = timm.create_model("resnet18", features_only=True)
    plain.load_state_dict(network.state_dict())
    fields = plain_and_nats_fields(network, 160, level=2)
    torch.testing.assert_close(fields[0], effective_receptive_field(plain, 160, level=2))
    assert not torch.allclose(fields[1], fields[0])
    rows, columns = ([field.sum(axis).nonzero() for field in fields] for axis in (1, 0))
    assert torch.equal(rows[0], rows[1])  # all dilations are (1, 3): as high as before, and wider
    assert len(columns[1]) > len(columns[0])


def test_maximum_pooling_favours_no_corner():
    conv = nn.Conv2d(1, 1, 1, bias=False)
    field = effective_receptive_field(nn.Sequential(nn.ReLU(), conv, nn.MaxPool2d(3, 1, 1)), 7, in_channels=1)
    expected = torch.zeros(7, 7)
    expected[2:5, 2:5] = conv.weight.abs().item() / 9
    torch.testing.assert_close(field, expected)


@pytest.mark.parametrize("gate", [SEModule, EffectiveSEModule])
def test_gates_that_pool_the_image_are_left_out(gate):
    convs = stack((1, 1), (1, 2))
    gated = nn.Sequential(convs[:3], gate(4), convs[3:])
    torch.testing.assert_close(effective_receptive_field(gated, 33), effective_receptive_field(convs, 33))


@pytest.mark.parametrize("feature_cls", ["list", "hook", "getter", "fx"])
def test_every_kind_of_feature_extractor(feature_cls):
    torch.manual_seed(0)
    names = dict(zero_init_last=False, out_indices=(2, 3))
    expected = effective_receptive_field(timm.create_model("resnet18", features_only=True, **names), 96)
    torch.manual_seed(0)
    model = timm.create_model("resnet18", features_only=True, feature_cls=feature_cls, **names)
    torch.testing.assert_close(effective_receptive_field(model, 96), expected)


def test_what_gives_no_map_is_refused():
    logits = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(NatsError, match=r"expected a map .* found \(1, 4\)"):
        effective_receptive_field(logits, 16)
    dead = nn.Conv2d(3, 4, 3)
    nn.init.zeros_(dead.weight)
    with pytest.raises(NatsError, match="adds up to 0"):
        effective_receptive_field(dead, 16)
