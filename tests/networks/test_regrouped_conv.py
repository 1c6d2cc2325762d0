"""RegroupedConv2d against an oracle that convolves every output channel by itself, and in every way torch runs it."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Conv2dSame, StdConv2d, create_conv2d
from torch import nn
from torch.utils.checkpoint import checkpoint

from nats_zoo.base.errors import GenotypeError
from nats_zoo.genotype.runs import Run
from nats_zoo.networks.geometry import MAX_SPLIT
from nats_zoo.networks.regrouped_conv import RegroupedConv2d
from tests.support.marks import needs_onnx

SIZE = (17, 14)  # odd and even
SCATTERED = [(3, 1, 1), (2, 2, 2), (4, 1, 1), (1, 1, 3), (2, 2, 2)]  # 12 channels
CONTIGUOUS = [(4, 1, 1), (3, 2, 1), (5, 1, 3)]
# More runs than one split takes; neighbours differ, so that none of them merge.
MANY = [(1, 1 + c % 3, 1 + c % 2) for c in range(2 * MAX_SPLIT + 8)]

CASES = {
    "scattered": (nn.Conv2d(5, 12, 3, padding=1), SCATTERED),
    "contiguous": (nn.Conv2d(5, 12, 3, padding=1, bias=False), CONTIGUOUS),
    "neighbours alike": (nn.Conv2d(5, 12, 3, padding=1), [(4, 2, 2), (4, 2, 2), (4, 1, 1)]),
    "one dilation": (nn.Conv2d(5, 12, 3, padding=1), [(4, 2, 3), (8, 2, 3)]),
    "stride 2": (nn.Conv2d(5, 12, 3, stride=2, padding=1), SCATTERED),
    "kernel 5": (nn.Conv2d(5, 12, 5, stride=(1, 2), padding=2), SCATTERED),
    "kernel 3x1": (nn.Conv2d(5, 12, (3, 1), padding=(1, 0)), SCATTERED),
    "no padding": (nn.Conv2d(5, 12, 3), SCATTERED),
    "padding same": (nn.Conv2d(5, 12, 3, padding="same", dilation=(1, 2)), SCATTERED),
    "own dilation": (nn.Conv2d(5, 12, 3, padding=2, dilation=2), SCATTERED),
    "grouped": (nn.Conv2d(8, 12, 3, padding=1, groups=4), [(3, 1, 1), (3, 3, 3), (6, 1, 1)]),
    "grouped, contiguous": (nn.Conv2d(8, 12, 3, padding=1, groups=4, bias=False), [(6, 1, 2), (6, 3, 1)]),
    "grouped, more inputs": (nn.Conv2d(12, 4, 3, padding=1, groups=4), [(1, 2, 2), (2, 1, 1), (1, 2, 2)]),
    "depthwise": (nn.Conv2d(12, 12, 3, stride=2, padding=1, groups=12), SCATTERED),
    "depth multiplier": (nn.Conv2d(4, 12, 3, padding=1, groups=4), [(3, 2, 2), (3, 1, 1), (6, 2, 2)]),
    "many runs": (nn.Conv2d(3, len(MANY), 3, padding=1), MANY),
    "many runs, depthwise": (nn.Conv2d(len(MANY), len(MANY), 3, padding=1, groups=len(MANY)), MANY),
    "same, stride 2": (Conv2dSame(5, 12, 3, stride=2), SCATTERED),
    "same, stride 1": (Conv2dSame(5, 12, 5, bias=False), SCATTERED),
    "same, depthwise": (Conv2dSame(12, 12, 3, stride=2, groups=12), SCATTERED),
    "same, own dilation": (Conv2dSame(5, 12, 3, dilation=2), SCATTERED),
}
all_cases = pytest.mark.parametrize(("conv", "runs"), CASES.values(), ids=CASES)
# Enough for what does not depend on the geometry: dense, grouped, split in several, Conv2dSame.
few_cases = pytest.mark.parametrize(
    ("conv", "runs"), [CASES[name] for name in ("scattered", "grouped", "many runs", "same, stride 2")]
)


def gains_of(runs):
    return [1.0 + 0.25 * index for index in range(len(runs))]


def random_input(conv, size=SIZE, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, conv.in_channels, *size, generator=generator, dtype=dtype)


def perturb(runs, index):
    """The same runs with one dilation changed."""
    changed = list(runs)
    channels, height, width = changed[index]
    changed[index] = (channels, height + 1, width)
    return changed


# --- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_gains", [False, True], ids=["", "gains"])
@all_cases
def test_equals_oracle(conv, runs, with_gains, convolve_per_channel):
    conv = copy.deepcopy(conv).double()
    gains = gains_of(runs) if with_gains else None
    x = random_input(conv)
    y = RegroupedConv2d.from_conv(conv, runs, gains)(x)
    assert y.shape == conv(x).shape
    torch.testing.assert_close(y, convolve_per_channel(conv, x, runs, gains))
    for index in range(min(len(runs), 6)):
        assert not torch.allclose(y, convolve_per_channel(conv, x, perturb(runs, index), gains))
    if with_gains:
        assert not torch.allclose(y, convolve_per_channel(conv, x, runs))


@st.composite
def convs_and_runs(draw):
    groups, per_group = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    kernel = draw(st.sampled_from([1, 3, 5, (3, 1), (1, 5)]))
    conv = draw(st.sampled_from([nn.Conv2d, Conv2dSame]))(
        groups * draw(st.integers(1, 3)),
        groups * per_group,
        kernel,
        stride=draw(st.sampled_from([1, 2, (2, 1)])),
        padding=draw(st.integers(0, 2)),
        dilation=draw(st.sampled_from([1, 2])),
        groups=groups,
        bias=draw(st.booleans()),
    )
    unit = per_group if groups > 1 else 1
    dilation = st.integers(1, 3)
    chosen = [(draw(dilation), draw(dilation)) for _ in range(conv.out_channels // unit)]
    return conv.double(), [(unit, *dilation) for dilation in chosen]


@settings(max_examples=60)
@given(conv_and_runs=convs_and_runs(), height=st.integers(13, 16), width=st.integers(13, 16), data=st.data())
def test_equals_oracle_for_any_convolution(conv_and_runs, height, width, data, convolve_per_channel):
    conv, runs = conv_and_runs
    x = random_input(conv, (height, width))
    y = RegroupedConv2d.from_conv(conv, runs)(x)
    assert y.shape == conv(x).shape
    torch.testing.assert_close(y, convolve_per_channel(conv, x, runs))
    index = data.draw(st.integers(0, len(runs) - 1))
    differs = not torch.allclose(y, convolve_per_channel(conv, x, perturb(runs, index)))
    assert differs == (conv.kernel_size[0] > 1)  # a kernel one pixel high has no dilation there


@pytest.mark.parametrize("size", list(itertools.product([15, 16], repeat=2)))
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_conv2d_same_for_odd_and_even_sizes(size, stride, convolve_per_channel):
    conv = Conv2dSame(3, 12, 3, stride=stride).double()
    x = random_input(conv, size)
    y = RegroupedConv2d.from_conv(conv, SCATTERED)(x)
    assert y.shape[2:] == tuple(-(-side // stride) for side in size)
    torch.testing.assert_close(y, convolve_per_channel(conv, x, SCATTERED))
    # Symmetric padding of the same total is something else where the total is odd.
    if stride == 2 and size[0] % 2 == 0:
        shifted = nn.Conv2d(3, 12, 3, stride, padding=1).double()
        shifted.load_state_dict(conv.state_dict())
        assert not torch.allclose(y, convolve_per_channel(shifted, x, SCATTERED))


@all_cases
def test_dilation_one_everywhere_is_bit_equal_to_plain(conv, runs):
    x = random_input(conv, dtype=torch.float32)
    for plain_runs in ([(conv.out_channels, 1, 1)], [(run[0], 1, 1) for run in runs]):
        assert torch.equal(RegroupedConv2d.from_conv(conv, plain_runs)(x), conv(x))


def test_one_dilation_is_bit_equal_to_one_convolution():
    conv = nn.Conv2d(5, 12, 3, padding=1)
    x = random_input(conv, dtype=torch.float32)
    y = RegroupedConv2d.from_conv(conv, [(4, 2, 3), (8, 2, 3)])(x)
    assert torch.equal(y, F.conv2d(x, conv.weight, conv.bias, 1, (2, 3), (2, 3)))


def test_convolve_takes_another_kernel_and_applies_no_gain(convolve_per_channel):
    conv, other = (nn.Conv2d(5, 12, 3, padding=1).double() for _ in range(2))
    regrouped = RegroupedConv2d.from_conv(conv, SCATTERED, gains_of(SCATTERED))
    x = random_input(conv)
    y = regrouped.convolve(x, other.weight, other.bias)
    torch.testing.assert_close(y, convolve_per_channel(other, x, SCATTERED))


def test_regrouping_again_replaces_the_runs(convolve_per_channel):
    conv = Conv2dSame(5, 12, 3, stride=2).double()
    x = random_input(conv)
    again = RegroupedConv2d.from_conv(RegroupedConv2d.from_conv(conv, CONTIGUOUS, [2.0, 1.0, 1.0]), SCATTERED)
    torch.testing.assert_close(again(x), convolve_per_channel(conv, x, SCATTERED))


# --- state dict and buffers -------------------------------------------------------------------------------------------


@all_cases
def test_state_dict_is_the_plain_one(conv, runs):
    regrouped = RegroupedConv2d.from_conv(conv, runs, gains_of(runs))
    assert regrouped.weight is conv.weight
    assert regrouped.bias is conv.bias
    assert {k: v.shape for k, v in regrouped.state_dict().items()} == {k: v.shape for k, v in conv.state_dict().items()}
    fresh = copy.deepcopy(conv)
    nn.init.normal_(fresh.weight)
    copy.deepcopy(regrouped).load_state_dict(fresh.state_dict(), strict=True)
    fresh.load_state_dict(regrouped.state_dict(), strict=True)


@pytest.mark.parametrize("training", [True, False])
def test_from_conv_keeps_mode_device_and_dtype(training):
    conv = nn.Conv2d(5, 12, 3, padding=1, dtype=torch.bfloat16).train(training)
    regrouped = RegroupedConv2d.from_conv(conv, SCATTERED, gains_of(SCATTERED))
    assert regrouped.training == training
    assert {t.dtype for t in [*regrouped.parameters(), *regrouped.buffers()]} == {torch.bfloat16}
    assert "dilations={'1x1': 7, '2x2': 4, '1x3': 1}" in repr(regrouped)


@pytest.mark.parametrize("via", ["constructor", "from_conv", "context"])
def test_meta_device_then_to_empty(via):
    runs, gains = MANY, gains_of(MANY)
    conv = nn.Conv2d(3, len(runs), 3, padding=1)
    expected = RegroupedConv2d.from_conv(conv, runs, gains)
    if via == "constructor":
        module = RegroupedConv2d(3, len(runs), 3, padding=1, runs=runs, gains=gains, device="meta")
    elif via == "from_conv":
        module = RegroupedConv2d.from_conv(copy.deepcopy(conv).to("meta"), runs, gains)
    else:
        with torch.device("meta"):
            module = RegroupedConv2d(3, len(runs), 3, padding=1, runs=runs, gains=gains)
    assert all(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()])
    assert module(torch.empty(1, 3, 8, 8, device="meta")).shape == (1, len(runs), 8, 8)
    module = module.to_empty(device="cpu")
    module.init_non_persistent_buffers()
    module.load_state_dict(conv.state_dict(), strict=True)
    x = random_input(conv, dtype=torch.float32)
    assert torch.equal(module(x), expected(x))


@few_cases
def test_deepcopy_is_independent(conv, runs):
    regrouped = RegroupedConv2d.from_conv(conv, runs, gains_of(runs))
    x = random_input(conv, dtype=torch.float32)
    y = regrouped(x)
    twin = copy.deepcopy(regrouped)
    assert torch.equal(twin(x), y)
    nn.init.zeros_(twin.weight)
    assert not torch.equal(twin(x), y)
    assert torch.equal(regrouped(x), y)


# --- gradients --------------------------------------------------------------------------------------------------------


def gradients(forward, conv, x):
    """Of x and of the parameters, for a random weighting of the outputs."""
    x = x.clone().requires_grad_()
    conv.zero_grad()
    y = forward(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype))
    return [tensor.grad for tensor in (x, *conv.parameters())]


@all_cases
def test_gradients_equal_the_oracles(conv, runs, convolve_per_channel):
    conv = copy.deepcopy(conv).double()
    gains = gains_of(runs)
    x = random_input(conv, (9, 8))
    regrouped = RegroupedConv2d.from_conv(conv, runs, gains)
    found = gradients(regrouped, conv, x)
    torch.testing.assert_close(found, gradients(lambda x: convolve_per_channel(conv, x, runs, gains), conv, x))
    wrong = gradients(lambda x: convolve_per_channel(conv, x, perturb(runs, 0), gains), conv, x)
    assert not torch.allclose(found[1], wrong[1])


@pytest.mark.parametrize("use_reentrant", [True, False])
@few_cases
def test_checkpoint_gives_the_same_gradients(conv, runs, use_reentrant):
    regrouped = RegroupedConv2d.from_conv(copy.deepcopy(conv), runs, gains_of(runs))
    x = random_input(conv, dtype=torch.float32)
    direct = gradients(regrouped, regrouped, x)
    again = gradients(lambda x: checkpoint(regrouped, x, use_reentrant=use_reentrant), regrouped, x)
    torch.testing.assert_close(again, direct)


# --- ways to run it ---------------------------------------------------------------------------------------------------


@few_cases
def test_autocast(conv, runs):
    regrouped = RegroupedConv2d.from_conv(copy.deepcopy(conv), runs, gains_of(runs))
    x = random_input(conv, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = regrouped(x)
    assert y.dtype == torch.bfloat16
    exact = regrouped(x)
    assert (y - exact).abs().max() < 0.02 * exact.abs().max()
    y.float().square().mean().backward()
    assert regrouped.weight.grad.dtype == torch.float32
    assert (regrouped.weight.grad.abs().sum(dim=(1, 2, 3)) > 0).all()


@few_cases
def test_channels_last(conv, runs):
    regrouped = RegroupedConv2d.from_conv(copy.deepcopy(conv), runs)
    x = random_input(conv, dtype=torch.float32)
    y = regrouped(x)
    last = regrouped.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, y)


class ConvBnRelu(nn.Module):
    """A small network, as tracers and exporters meet the convolution in practice: as a child."""

    def __init__(self, conv):
        super().__init__()
        self.conv, self.bn, self.act = conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


@pytest.fixture
def network(request, randomise_bn):
    """A network in eval mode with a regrouped convolution, and its input."""
    conv, runs = CASES[request.param]
    regrouped = RegroupedConv2d.from_conv(copy.deepcopy(conv), runs, gains_of(runs))
    model = randomise_bn(ConvBnRelu(regrouped), torch.Generator().manual_seed(0)).eval()
    return model, random_input(conv, dtype=torch.float32)


def networks(*cases):
    return pytest.mark.parametrize("network", cases, indirect=True)


@networks("scattered", "grouped", "many runs")
def test_fx_trace(network):
    model, x = network
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


def test_fx_feature_extraction_keeps_conv2d_same_whole(randomise_bn):
    from timm.models._features_fx import create_feature_extractor

    conv, runs = CASES["same, stride 2"]
    model = ConvBnRelu(RegroupedConv2d.from_conv(copy.deepcopy(conv), runs))
    model = randomise_bn(model, torch.Generator().manual_seed(0)).eval()
    x = random_input(conv, dtype=torch.float32)
    assert torch.equal(create_feature_extractor(model, {"act": "out"})(x)["out"], model(x))


@networks("scattered", "grouped", "many runs", "same, stride 2")
def test_export(network):
    model, x = network
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), model(x))
    assert set(exported.state_dict) == set(model.state_dict())


def test_export_with_dynamic_size():
    conv, runs = CASES["scattered"]
    regrouped = RegroupedConv2d.from_conv(copy.deepcopy(conv), runs)
    sides = {2: torch.export.Dim("h", min=8, max=64), 3: torch.export.Dim("w", min=8, max=64)}
    exported = torch.export.export(regrouped, (random_input(conv, dtype=torch.float32),), dynamic_shapes=(sides,))
    x = random_input(conv, (31, 12), torch.float32)
    torch.testing.assert_close(exported.module()(x), regrouped(x))


@networks("scattered", "grouped", "same, stride 2")
def test_compile_without_graph_break(network):
    torch.compiler.reset()
    model, x = network
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(gradients(compiled, model, x), gradients(model, model, x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@networks("scattered", "grouped", "many runs", "same, stride 2")
def test_torchscript(network):
    model, x = network
    assert torch.equal(torch.jit.script(model)(x), model(x))
    assert torch.equal(torch.jit.trace(model, x)(x), model(x))


@needs_onnx
@networks("many runs", "same, stride 2")
def test_onnx(network, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = network
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False, input_names=["x"], output_names=["y"])
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (y,) = session.run(["y"], {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x).detach(), rtol=1e-4, atol=1e-4)


# --- refusals ---------------------------------------------------------------------------------------------------------


class MyConv2d(nn.Conv2d):
    """A subclass that may do anything with its weight."""


REFUSED = {
    "padding mode": (nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), [(8, 1, 1)], "'reflect'"),
    "standardised weight": (StdConv2d(4, 8, 3, padding=1), [(8, 1, 1)], "StdConv2d"),
    "own subclass": (MyConv2d(4, 8, 3, padding=1), [(8, 1, 1)], "MyConv2d"),
    "mixed kernels": (create_conv2d(4, 8, [3, 5]), [(8, 1, 1)], "MixedConv2d"),
    "transposed": (nn.ConvTranspose2d(4, 8, 3), [(8, 1, 1)], "ConvTranspose2d"),
    "even kernel": (nn.Conv2d(4, 8, 2), [(4, 1, 1), (4, 2, 2)], "no whole number"),
    "even kernel of one axis": (nn.Conv2d(4, 8, (3, 4), padding=1), [(4, 1, 1), (4, 1, 2)], "no whole number"),
    "even kernel, padding same": (nn.Conv2d(4, 8, 2, padding="same"), [(8, 1, 1)], "no whole number"),
    "too few channels": (nn.Conv2d(4, 8, 3), [(4, 1, 1), (3, 2, 2)], "7 channels, expected 8"),
    "too many channels": (nn.Conv2d(4, 8, 3), [(4, 1, 1), (5, 2, 2)], "9 channels, expected 8"),
    "dilation zero": (nn.Conv2d(4, 8, 3), [(8, 0, 1)], "positive"),
    "negative channels": (nn.Conv2d(4, 8, 3), [(-1, 1, 1), (9, 1, 1)], "positive"),
    "cut cardinality group": (nn.Conv2d(4, 8, 3, groups=2), [(3, 1, 1), (5, 2, 2)], "channel 3.*multiple of 4"),
    "cut group, one dilation": (nn.Conv2d(4, 8, 3, groups=2), [(2, 1, 1), (6, 1, 1)], "channel 2.*multiple of 4"),
}


@pytest.mark.parametrize(("conv", "runs", "words"), REFUSED.values(), ids=REFUSED)
def test_refuses_by_name(conv, runs, words):
    with pytest.raises(GenotypeError, match=rf"^layer1\.0\.conv2: .*{words}") as error:
        RegroupedConv2d.from_conv(conv, runs, name="layer1.0.conv2")
    assert "\n" not in str(error.value)


def test_even_growth_of_an_even_kernel_is_allowed(convolve_per_channel):
    """Dilation 3 of a kernel of 2 adds one pixel on each side."""
    conv = nn.Conv2d(4, 8, 2, stride=2).double()
    runs = [(4, 1, 1), (4, 3, 3)]
    x = random_input(conv)
    torch.testing.assert_close(RegroupedConv2d.from_conv(conv, runs)(x), convolve_per_channel(conv, x, runs))


@pytest.mark.parametrize("gains", [[], [1.0], [1.0, 2.0, 3.0]])
def test_refuses_gains_that_are_not_one_per_run(gains):
    with pytest.raises(GenotypeError, match="expected one per run"):
        RegroupedConv2d.from_conv(nn.Conv2d(4, 8, 3), [(4, 1, 1), (4, 2, 2)], gains)


def test_runs_are_kept_as_given():
    regrouped = RegroupedConv2d.from_conv(nn.Conv2d(4, 8, 3), [[4, 2, 2], [4, 2, 2]])
    assert regrouped.runs == (Run(4, 2, 2), Run(4, 2, 2))
