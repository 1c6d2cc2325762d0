"""Which candidate each group takes: against all assignments there are."""

import math
import time
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nats_zoo.search.choosing.choose import MAX_SETS, choose
from nats_zoo.search.space import SearchError

# Whole numbers make ties, and sums that are exact in any order.
SCORES = st.integers(-4, 0).map(float)
LINEAR = (0.9, 1.3, 1.1, 2.0)


@st.composite
def matrices(draw, max_groups=5, max_candidates=4):
    groups, candidates = draw(st.integers(1, max_groups)), draw(st.integers(1, max_candidates))
    rows = [draw(st.lists(SCORES, min_size=candidates, max_size=candidates)) for _ in range(groups)]
    return torch.tensor(rows)


def total(log_p, assignment):
    return sum(log_p[i, g].item() for i, g in enumerate(assignment))


def affine_cost(counts):
    """A share of the plain time per group, and a price for each dilation in use."""
    n = sum(counts)
    return sum(0.1 + slope * count / n for slope, count in zip(LINEAR, counts, strict=False) if count)


def count(assignment, candidates):
    return [assignment.count(g) for g in range(candidates)]


@given(matrices())
def test_without_options_each_group_takes_its_first_likeliest_candidate(log_p):
    rows = log_p.tolist()
    assert choose(log_p).tolist() == [row.index(max(row)) for row in rows]
    assert choose(log_p, cost=affine_cost).tolist() == choose(log_p).tolist()


@given(matrices(), st.integers(1, 5))
def test_the_best_of_all_assignments_with_at_most_k_candidates(log_p, k):
    groups, candidates = log_p.shape
    allowed = [a for a in product(range(candidates), repeat=groups) if len(set(a)) <= k]
    chosen = tuple(choose(log_p, k).tolist())
    best = max(total(log_p, a) for a in allowed)
    assert chosen in allowed
    assert total(log_p, chosen) == best
    # ties: fewer dilations first, then the earlier ones, and within them each group's first
    equals = [a for a in allowed if total(log_p, a) == best]
    assert chosen == min(equals, key=lambda a: (len(set(a)), sorted(set(a)), a))


@given(matrices(), st.integers(1, 4) | st.none(), st.sampled_from([0.25, 1.0, 4.0]))
def test_cost_against_the_likeliest_assignment_in_each_set(log_p, k, weight):
    groups, candidates = log_p.shape

    def likeliest_in(members):
        return tuple(max(members, key=lambda g: (log_p[i, g].item(), -g)) for i in range(groups))

    subsets = [
        [g for g in range(candidates) if bits >> g & 1]
        for bits in range(1, 2**candidates)
        if k is None or bits.bit_count() <= k
    ]
    scores = [total(log_p, a) - weight * affine_cost(count(a, candidates)) for a in map(likeliest_in, subsets)]
    chosen = choose(log_p, k, affine_cost, weight).tolist()
    assert tuple(chosen) in {likeliest_in(members) for members in subsets}
    assert total(log_p, chosen) - weight * affine_cost(count(chosen, candidates)) == pytest.approx(max(scores))


def test_the_weight_trades_likelihood_for_time():
    log_p = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3], [0.3, 0.3, 0.4]]).log()
    seen = []

    def cost(counts):
        seen.append(tuple(counts))
        return 1.0 * sum(c > 0 for c in counts)  # each dilation costs as much as the plain convolution

    assert choose(log_p, cost=cost, cost_weight=0.01).tolist() == [1, 0, 2]
    assert len(set(choose(log_p, cost=cost, cost_weight=0.4).tolist())) == 2
    assert len(set(choose(log_p, cost=cost, cost_weight=10.0).tolist())) == 1
    assert all(sum(counts) == 3 for counts in seen)


def test_candidates_that_only_cost_are_left():
    log_p = torch.zeros(4, 3)
    assert choose(log_p, cost=lambda counts: counts[0] + 0.5 * counts[2], cost_weight=1.0).tolist() == [1] * 4


def test_a_tie_of_sums_does_not_depend_on_their_order():
    # 0.1 + 0.2 + 0.3 in two orders, which differ in floating point
    log_p = torch.tensor([[-0.3, -0.1, -9.0], [-0.2, -0.2, -9.0], [-0.1, -0.3, -9.0]], dtype=torch.float64)
    assert choose(log_p, 1).tolist() == [0, 0, 0]
    assert choose(log_p.flip(0), 1).tolist() == [0, 0, 0]


def test_the_nine_candidates_of_space_c_take_no_time():
    generator = torch.Generator().manual_seed(0)
    log_p = torch.randn(16, 9, generator=generator).log_softmax(1)
    start = time.perf_counter()
    chosen = choose(log_p, 9)
    assert time.perf_counter() - start < 2  # measured: 0.02 s
    assert torch.equal(chosen, log_p.argmax(1))
    assert len(set(choose(log_p, 3).tolist())) == 3


def test_gradients_and_types_of_log_p_do_not_matter():
    log_p = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    expected = choose(log_p, 2)
    assert expected.dtype == torch.int64
    assert torch.equal(choose(log_p.requires_grad_(), 2), expected)
    assert torch.equal(choose(log_p.double(), 2), expected)


@pytest.mark.parametrize(
    ("log_p", "options", "words"),
    [
        (torch.zeros(3), {}, r"log_p: expected \(groups, candidates\), found the shape \(3,\)"),
        (torch.zeros(0, 3), {}, "log_p: expected"),
        (torch.tensor([[0.0, math.nan]]), {}, "log_p: expected finite"),
        (torch.tensor([[0.0, -math.inf]]), {"max_dilations": 1}, "log_p: expected finite"),
        (torch.zeros(3, 2), {"max_dilations": 0}, "max_dilations: expected a positive integer, found 0"),
        (torch.zeros(3, 2), {"max_dilations": True}, "max_dilations: expected a positive integer, found True"),
        (torch.zeros(3, 2), {"cost_weight": 1.0}, "cost_weight: needs measured costs"),
        (torch.zeros(3, 2), {"cost_weight": -1.0, "cost": affine_cost}, "cost_weight: expected a finite number"),
        (torch.zeros(3, 2), {"cost_weight": math.nan, "cost": affine_cost}, "cost_weight: expected a finite number"),
        (torch.zeros(3, 2), {"cost_weight": 1.0, "cost": lambda counts: math.inf}, "cost: expected a finite number"),
        (torch.zeros(3, 40), {"max_dilations": 4}, f"40 candidates have 102090 sets of at most 4.* {MAX_SETS}"),
    ],
)
def test_refused(log_p, options, words):
    with pytest.raises(SearchError, match=words) as error:
        choose(log_p, **options)
    assert "\n" not in str(error.value)
