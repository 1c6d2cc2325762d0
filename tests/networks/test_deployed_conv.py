"""DeployedConv2d against the convolution that it stands for, channel by channel."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nats_zoo import RegroupedConv2d
from nats_zoo.networks.deployed_conv import DeployedConv2d, RowsConv2d

IC16 = [(2, h, w) for h in range(1, 5) for w in range(1, 5)]


@torch.no_grad()
@given(data=st.data())
def test_equals_the_oracle(convolve_per_channel, data):
    """Any kernel, stride, padding, dilation of its own, runs and gains, on maps smaller than the dilations too."""
    kernel = data.draw(st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3])))
    stride = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 2)))
    own = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    same = tuple((k - 1) * d // 2 for k, d in zip(kernel, own, strict=True))
    padding = data.draw(st.sampled_from([same, (0, 0), (1, 2)]))
    runs = data.draw(
        st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=6)
    )
    gains = data.draw(st.lists(st.floats(0.5, 2), min_size=len(runs), max_size=len(runs)))
    size = data.draw(st.tuples(st.integers(9, 12), st.integers(9, 12)) | st.just((3, 2)))
    if padding != same and size == (3, 2):
        size = (12, 12)  # a kernel larger than its padded input is an error of the plain convolution too
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    conv = nn.Conv2d(
        3, sum(run[0] for run in runs), kernel, stride, padding, own, bias=data.draw(st.booleans())
    ).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    deployed = RegroupedConv2d.from_conv(conv, runs, gains).fuse()
    assert isinstance(deployed, DeployedConv2d)
    expected = convolve_per_channel(conv, x, runs, gains)
    torch.testing.assert_close(deployed(x), expected)


def deploy(runs=IC16, **options):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, sum(run[0] for run in runs), 3, padding=1, bias=True, **options)
    return RegroupedConv2d.from_conv(conv, runs)


def test_dilations_of_one_width_are_one_convolution():
    steps = deploy().fuse().steps
    assert [type(step) for step in steps] == [RowsConv2d] * 4
    assert [[conv.dilation for conv in step.convs] for step in steps] == [[(1, 1)], [(1, 2)], [(1, 3)], [(1, 4)]]


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_multiply_adds_are_the_plain_ones(stride):
    deployed = deploy(stride=stride).fuse()
    assert sum(conv.weight.numel() for conv in deployed.modules() if isinstance(conv, nn.Conv2d)) == 32 * 8 * 9
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        deployed.to("meta")(torch.empty(1, 8, 12, 12))
    assert counter.get_total_flops() == 2 * 32 * 8 * 9 * (12 // stride) ** 2


def test_wide_dilations_are_not_shared():
    assert [type(step) for step in deploy([(16, 1, 1), (16, 2, 1)]).fuse().steps] == [nn.Conv2d] * 2
    assert [type(step) for step in deploy([(8, 1, 1), (8, 2, 1)]).fuse().steps] == [RowsConv2d]


def test_a_single_dilation_of_its_width_stays_one_convolution():
    (step,) = deploy([(4, 1, 1), (4, 1, 1)]).fuse().steps
    assert type(step) is nn.Conv2d
    assert [type(step) for step in deploy([(4, 1, 1), (4, 2, 2)]).fuse().steps] == [nn.Conv2d] * 2


@torch.no_grad()
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("order", ["sorted", "mixed"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_compilers_and_tracers(order, stride):
    runs = IC16 if order == "mixed" else sorted(IC16, key=lambda run: (run[2], run[1]))
    deployed = deploy(runs, stride=stride).fuse()
    x = torch.randn(2, 8, 13, 11)
    y = deployed(x)
    torch.testing.assert_close(torch.jit.script(deployed)(x), y)
    torch.testing.assert_close(torch.jit.trace(deployed, x)(torch.cat([x, x])), torch.cat([y, y]))
    graph = torch.fx.symbolic_trace(deployed)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    torch.testing.assert_close(graph(x), y)
    torch.testing.assert_close(torch.compile(deployed, backend="aot_eager", fullgraph=True)(x), y)
    batch, height = torch.export.Dim("batch", max=99), torch.export.Dim("height", min=5, max=999)
    exported = torch.export.export(deployed, (x,), dynamic_shapes=({0: batch, 2: height},))
    taller = torch.randn(3, 8, 17, 11)
    torch.testing.assert_close(exported.module()(taller), deployed(taller))


@torch.no_grad()
def test_channels_last_and_half_precision():
    deployed = deploy().fuse()
    x = torch.randn(2, 8, 13, 11)
    y = deployed(x)
    torch.testing.assert_close(deployed(x.to(memory_format=torch.channels_last)), y)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(deployed(x).float(), y, atol=0.05, rtol=0.05)
    deployed.bfloat16()
    torch.testing.assert_close(deployed(x.bfloat16()).float(), y, atol=0.05, rtol=0.05)
