"""Sampled mode: what two drawn candidates compute, how they are drawn, and alpha's gradient over all pairs."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import Conv2dSame
from torch import nn

from nats_zoo.search import MixtureConv2d, SampledConv2d, draw_pairs

CANDIDATES = ((1, 1), (2, 2), (1, 3), (3, 1))
GROUPS = 4
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
CONVS = {
    "stride 1": lambda: nn.Conv2d(6, 8, 3, padding=1, bias=False),
    "stride 2": lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False),
    "bias": lambda: nn.Conv2d(6, 8, 3, padding=1),
    "cardinality": lambda: nn.Conv2d(8, 16, 3, padding=1, groups=8, bias=False),
    "same padding": lambda: Conv2dSame(6, 8, 3, stride=2, bias=False),
}


def searched(kind, conv, tied=True, eps=1e-5, seed=4, spread=1.0):
    """Random alpha, kernels and statistics; the same ones for every class."""
    module = kind(conv.double(), CANDIDATES, GROUPS, tied=tied, eps=eps)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        module.alpha.normal_(0, spread, generator=rng)
        module.kernels.normal_(generator=rng)
        if eps is not None:
            module.mean.normal_(generator=rng)
            module.var.uniform_(0.5, 2, generator=rng)
    return module


def images(conv, seed=6):
    return torch.randn(2, conv.in_channels, 12, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- forward ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("eps", [1e-5, None])
@pytest.mark.parametrize("kind", CONVS)
def test_each_group_mixes_its_two_candidates_by_their_probabilities(kind, eps, tied, convolve_per_channel):
    conv = CONVS[kind]()
    sampled = searched(SampledConv2d, conv, tied, eps)
    sampled.pair = torch.tensor([[0, 2], [3, 1], [1, 0], [2, 3]])
    x = images(conv)
    expected = torch.zeros_like(conv(x))
    size = conv.out_channels // GROUPS
    p = sampled.alpha.softmax(1)
    for i, pair in enumerate(sampled.pair.tolist()):
        channels = slice(i * size, (i + 1) * size)
        for g in pair:
            conv.weight.data = sampled.kernel(g).detach()
            y = convolve_per_channel(conv, x, [[conv.out_channels, *CANDIDATES[g]]])[:, channels]
            if eps is not None:
                mean, var = (statistic[g, channels].view(-1, 1, 1) for statistic in (sampled.mean, sampled.var))
                y = (y - mean) / (var + eps).sqrt()
            expected[:, channels] += p[i, g] / p[i, pair].sum() * y
    torch.testing.assert_close(sampled(x), expected, **CLOSE)
    sampled.pair[1, 1] = 0  # one group with another candidate: another output
    assert (sampled(x) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("kind", CONVS)
def test_gradients_of_kernels_are_the_numerical_ones(kind):
    conv = CONVS[kind]()
    sampled = searched(SampledConv2d, conv, tied=False)
    sampled.pair = torch.tensor([[0, 2], [3, 1], [1, 0], [2, 3]])
    x = images(conv)[:1, :, :5, :6]

    def function(kernels):
        return torch.func.functional_call(sampled, {"kernels": kernels}, x).square()

    assert torch.autograd.gradcheck(function, [sampled.kernels], fast_mode=True)


def test_a_forward_pass_without_a_draw_is_an_error():
    with pytest.raises(RuntimeError, match="draw"):
        searched(SampledConv2d, CONVS["bias"]())(torch.zeros(1, 6, 8, 8, dtype=torch.float64))


def test_a_single_candidate_is_no_choice():
    conv = CONVS["bias"]().double()
    sampled = SampledConv2d(conv, ((1, 1),), GROUPS, tied=True, eps=None)
    draw_pairs([sampled], 0)
    x = images(conv)
    torch.testing.assert_close(sampled(x), conv(x), **CLOSE)


# --- backward ---------------------------------------------------------------------------------------------------------


def pair_probability(p, a, b):
    """Of drawing a and b without replacement in proportion to p, in either order."""
    return p[:, a] * p[:, b] / (1 - p[:, a]) + p[:, b] * p[:, a] / (1 - p[:, b])


def expected_gradient(sampled, x, upstream):
    """alpha's gradient of the loss <upstream, y>, averaged over all pairs; groups do not depend on each other."""
    p = (sampled.alpha.detach() / sampled.temperature).softmax(1)
    total, certain = torch.zeros_like(sampled.alpha), 0.0
    for a, b in itertools.combinations(range(len(CANDIDATES)), 2):
        sampled.pair = torch.tensor([[a, b]] * GROUPS)
        (gradient,) = torch.autograd.grad((sampled(x) * upstream).sum(), sampled.alpha)
        total += pair_probability(p, a, b)[:, None] * gradient
        certain += pair_probability(p, a, b)
    torch.testing.assert_close(certain, torch.ones(GROUPS, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    return total


def setting(spread=1.0, temperature=1.0, tied=True):
    conv = CONVS["stride 1"]()
    sampled = searched(SampledConv2d, conv, tied, spread=spread)
    mixture = searched(MixtureConv2d, conv, tied, spread=spread)
    sampled.temperature = mixture.temperature = temperature
    x = images(conv)
    upstream = torch.randn(conv(x).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (mixtures,) = torch.autograd.grad((mixture(x) * upstream).sum(), mixture.alpha)
    return sampled, x, upstream, mixtures


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_over_all_pairs_alphas_gradient_is_the_mixtures(spread, temperature, tied):
    sampled, x, upstream, mixtures = setting(spread, temperature, tied)
    # 1 - p has few digits where a group is all but decided.
    torch.testing.assert_close(expected_gradient(sampled, x, upstream), mixtures, rtol=1e-6, atol=1e-8)


class UncorrectedConv2d(SampledConv2d):
    """With q's own derivative."""

    def mixing_weights(self):
        scores = self.alpha.gather(1, self.pair)
        return (scores[:, 0] - scores[:, 1]).sigmoid()


def test_without_the_correction_it_is_not():
    sampled, x, upstream, mixtures = setting(spread=3.0)
    uncorrected = searched(UncorrectedConv2d, CONVS["stride 1"](), spread=3.0)
    uncorrected.load_state_dict(sampled.state_dict())
    biased = expected_gradient(uncorrected, x, upstream)
    assert ((biased - mixtures).abs() > 0.1 * mixtures.abs()).float().mean() > 0.5


def test_the_correction_leaves_the_forward_pass_alone():
    sampled = searched(SampledConv2d, CONVS["stride 1"]())
    uncorrected = searched(UncorrectedConv2d, CONVS["stride 1"]())
    uncorrected.load_state_dict(sampled.state_dict())
    sampled.pair = uncorrected.pair = torch.tensor([[0, 2], [3, 1], [1, 0], [2, 3]])
    torch.testing.assert_close(sampled.mixing_weights(), uncorrected.mixing_weights(), **CLOSE)


# --- draws ------------------------------------------------------------------------------------------------------------


def test_pairs_are_drawn_without_replacement_in_proportion_to_p():
    sampled = searched(SampledConv2d, CONVS["bias"]())
    draws = 4000
    counts = torch.zeros(GROUPS, len(CANDIDATES), len(CANDIDATES), dtype=torch.float64)
    for step in range(draws):
        draw_pairs([sampled], 7, step)
        for group, (a, b) in enumerate(sampled.pair.tolist()):
            counts[group, a, b] += 1
    p = sampled.alpha.detach().softmax(1)
    expected = p[:, :, None] * p[:, None, :] / (1 - p[:, :, None])  # first a, then b of what is left
    expected.diagonal(dim1=1, dim2=2).zero_()
    error = (counts / draws - expected).abs()
    assert (error <= 5 * (expected * (1 - expected) / draws).sqrt()).all()


@given(seed=st.integers(0, 10_000), step=st.integers(0, 100_000))
def test_draws_are_a_function_of_seed_and_step_and_differ_between_convolutions(seed, step):
    convs = [searched(SampledConv2d, CONVS["bias"]()) for _ in range(6)]
    draw_pairs(convs, seed, step)
    pairs = torch.stack([conv.pair for conv in convs])
    torch.rand(3)  # other random numbers are none of its business
    draw_pairs(convs, seed, step)
    assert torch.equal(torch.stack([conv.pair for conv in convs]), pairs)
    assert len({tuple(pair.flatten().tolist()) for pair in pairs}) > 1


def test_a_decided_group_draws_its_candidate_every_time():
    sampled = searched(SampledConv2d, CONVS["bias"]())
    with torch.no_grad():
        sampled.alpha[:, 2] = 1e4
    for step in range(20):
        draw_pairs([sampled], step)
        assert (sampled.pair[:, 0] == 2).all()
        assert (sampled.pair[:, 1] != 2).all()
        torch.testing.assert_close(sampled.mixing_weights().detach(), torch.ones(GROUPS, dtype=torch.float64))
