"""What several test files share: random batch norms, random runs, and the oracle of a regrouped convolution."""

import math
import os
import random

# Before torch is imported, for the processes that tests start too: two workers with two threads each get in each
# other's way on two cores, and a resumed run equals an uninterrupted one to the bit only with the same, single, thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from hypothesis import settings
from timm.layers import Conv2dSame
from torch.nn.modules.batchnorm import _BatchNorm

settings.register_profile("nats_zoo", deadline=None, print_blob=True)  # a busy machine is no failure
settings.load_profile("nats_zoo")


@pytest.fixture(scope="module")
def one_thread():
    """One thread for a module's runs, as in the processes that they are compared with: others add in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_accelerate():
    """accelerate keeps the precision of a process's first Accelerator; forget it before and after a test.

    It also writes into the environment, which other tests have as it was.
    """
    before = dict(os.environ)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def randomise_bn():
    """`randomise_bn(model, generator)`: random statistics and affine parameters in every batch norm of a network.

    Those of a fresh network hide errors: all channels alike, and zero where timm's zero_init_last was left on.
    """

    @torch.no_grad()
    def randomise(model, generator):
        for norm in (module for module in model.modules() if isinstance(module, _BatchNorm)):
            norm.running_mean.normal_(0, 0.3, generator=generator)
            norm.running_var.uniform_(0.5, 1.5, generator=generator)
            norm.weight.uniform_(0.5, 1.5, generator=generator)
            norm.bias.normal_(0, 0.3, generator=generator)
        return model

    return randomise


@pytest.fixture(scope="session")
def draw_runs():
    """`draw_runs(conv, seed)`: random runs of dilations 1..3 for a convolution, ending on cardinality groups."""

    def draw(conv, seed):
        rng = random.Random(seed)
        units = conv.groups if conv.groups > 1 else conv.out_channels
        cuts = sorted(rng.sample(range(1, units), min(4, units - 1)))
        per_unit = conv.out_channels // units
        return [
            [(stop - start) * per_unit, rng.randint(1, 3), rng.randint(1, 3)]
            for start, stop in zip([0, *cuts], [*cuts, units], strict=True)
        ]

    return draw


@pytest.fixture(scope="session")
def convolve_per_channel():
    """`convolve_per_channel(conv, x, runs, gains=None)`: what a plain convolution, regrouped, must compute.

    Every output channel by itself, as one plain convolution with padding grown on both sides.
    """

    def convolve(conv, x, runs, gains=None):
        gains = [1.0] * len(runs) if gains is None else gains
        channels = [(run[1:], gain) for run, gain in zip(runs, gains, strict=True) for _ in range(run[0])]
        outputs = [_one_channel(conv, x, c, dilation, gain) for c, (dilation, gain) in enumerate(channels)]
        return torch.cat(outputs, 1)

    return convolve


def _one_channel(conv, x, c, dilation, gain):
    per_group_in = conv.in_channels // conv.groups
    first = c // (conv.out_channels // conv.groups) * per_group_in
    padding = []
    for axis in (1, 0):
        d0, k = conv.dilation[axis], conv.kernel_size[axis]
        grown = (dilation[axis] - 1) * d0 * (k - 1) // 2
        before, after = _plain_padding(conv, x.shape[2 + axis], axis)
        padding += [before + grown, after + grown]
    padded = F.pad(x[:, first : first + per_group_in], padding)
    bias = None if conv.bias is None else conv.bias[c : c + 1]
    total_dilation = (dilation[0] * conv.dilation[0], dilation[1] * conv.dilation[1])
    return F.conv2d(padded, conv.weight[c : c + 1] * gain, bias, conv.stride, 0, total_dilation)


def _plain_padding(conv, size, axis):
    stride, reach = conv.stride[axis], (conv.kernel_size[axis] - 1) * conv.dilation[axis]
    if isinstance(conv, Conv2dSame):
        total = max((math.ceil(size / stride) - 1) * stride + reach + 1 - size, 0)
    else:
        total = reach if conv.padding == "same" else 2 * conv.padding[axis]
    return total // 2, total - total // 2
