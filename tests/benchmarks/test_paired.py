"""benchmarks/paired.py: its statistics against tables, closed forms, hand computation and brute force."""

import itertools
import math
import statistics

import numpy as np
import paired as stats
import pytest
from hypothesis import given
from hypothesis import strategies as st

differences = st.lists(st.integers(-20, 20), min_size=1, max_size=8)


# --- Student's t ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("df", "two_sided_95", "two_sided_99"),
    [(1, 12.706, 63.657), (2, 4.303, 9.925), (4, 2.776, 4.604), (7, 2.365, 3.499), (15, 2.131, 2.947)],
)
def test_t_quantiles_are_those_of_printed_tables(df, two_sided_95, two_sided_99):
    assert stats.t.ppf(0.975, df) == pytest.approx(two_sided_95, abs=5e-4)
    assert stats.t.ppf(0.995, df) == pytest.approx(two_sided_99, abs=5e-4)


def test_t_of_many_degrees_of_freedom_is_normal():
    assert stats.t.ppf(0.975, 20_000) == pytest.approx(statistics.NormalDist().inv_cdf(0.975), abs=2e-4)


@given(t=st.floats(-50, 50))
def test_t_cdf_has_the_closed_forms_of_one_and_two_degrees_of_freedom(t):
    assert stats.t.cdf(t, 1) == pytest.approx(0.5 + math.atan(t) / math.pi, abs=1e-9)
    assert stats.t.cdf(t, 2) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)), abs=1e-9)


@given(t=st.floats(-20, 20), df=st.integers(1, 60))
def test_t_cdf_is_symmetric_and_inverted_by_the_quantile(t, df):
    assert stats.t.cdf(t, df) + stats.t.cdf(-t, df) == pytest.approx(1, abs=1e-9)
    p = stats.t.cdf(t, df)
    if 1e-6 < p < 1 - 1e-6:
        assert stats.t.ppf(p, df) == pytest.approx(t, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("p", "df"), [(0.0, 3), (1.0, 3), (0.5, 0)])
def test_t_quantile_refuses_what_has_none(p, df):
    assert not math.isfinite(stats.t.ppf(p, df))


# --- sign flips -------------------------------------------------------------------------------------------------------


@given(values=differences)
def test_sign_flip_p_counts_all_flips(values):
    flips = [abs(sum(s * v for s, v in zip(signs, values, strict=True))) for signs in _signs(len(values))]
    expected = sum(flip >= abs(sum(values)) for flip in flips) / len(flips)
    assert stats.sign_flip_p(values) == expected


@given(values=differences)
def test_sign_flip_p_knows_no_unit_sign_or_order(values):
    p = stats.sign_flip_p(values)
    assert stats.sign_flip_p([-value for value in values]) == p
    assert stats.sign_flip_p([0.1 * value for value in reversed(values)]) == p


@given(values=st.lists(st.integers(-20, 20), min_size=1, max_size=6), level=st.floats(0, 1))
def test_sign_flip_test_is_exact(values, level):
    """If all signs are equally likely, it rejects at a level no more often than that."""
    flipped = [[s * v for s, v in zip(signs, values, strict=True)] for signs in _signs(len(values))]
    assert statistics.fmean(stats.sign_flip_p(row) <= level for row in flipped) <= level


def _signs(n):
    return list(itertools.product((1, -1), repeat=n))


@pytest.mark.parametrize("n", [1, 3, 8, 16])
def test_smallest_p_is_that_of_one_sign_in_all_blocks(n):
    assert stats.sign_flip_p([1.0 + 0.1 * i for i in range(n)]) == 2 / 2**n


def test_beyond_16_pairs_flips_are_drawn_by_the_seed():
    """Differences of one size: the number of positive ones is binomial."""
    values = [1.0] * 14 + [-1.0] * 6
    exact = 2 * sum(math.comb(20, k) for k in range(14, 21)) / 2**20
    p = stats.sign_flip_p(values, seed=1)
    assert p == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / stats.RANDOM_FLIPS))
    assert p == stats.sign_flip_p(values, seed=1) != stats.sign_flip_p(values, seed=2)
    assert stats.sign_flip_p([1.0] * 40) == 1 / (1 + stats.RANDOM_FLIPS)  # never zero


# --- intervals --------------------------------------------------------------------------------------------------------


def test_paired_by_hand():
    found = stats.paired([1.0, 2.0, 3.0])
    assert (found.mean, found.sd, found.p) == (2.0, 1.0, 0.25)
    margin = 4.302653 / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((2 - margin, 2 + margin), abs=1e-6)
    assert found.is_descriptive
    assert not stats.paired([1.0] * 8).is_descriptive


def test_one_pair_has_no_interval():
    found = stats.paired([0.7])
    assert (found.mean, found.sd, found.low, found.high, found.p) == (0.7, None, None, None, 1.0)


@given(values=differences.filter(lambda values: len(values) > 1))
def test_paired_differences_the_other_way_round(values):
    there, back = stats.paired(values), stats.paired([-value for value in values])
    assert (back.mean, back.low, back.high) == pytest.approx((-there.mean, -there.high, -there.low))
    assert (back.sd, back.p) == pytest.approx((there.sd, there.p))


@pytest.mark.parametrize(("blocks", "percent"), [(3, 24), (5, 56), (8, 86)])
def test_power_of_small_studies(blocks, percent):
    """A true difference of 1 at a spread of 0.8: how often the 95% interval excludes zero."""
    studies = 4000
    drawn = np.random.default_rng(blocks).normal(1.0, 0.8, (studies, blocks))
    excluded = sum(abs(statistics.fmean(row)) > stats.spread(row)[1] for row in drawn.tolist())
    error = 100 * math.sqrt(0.25 / studies)
    assert 100 * excluded / studies == pytest.approx(percent, abs=4 * error)


def test_interval_covers_the_truth_in_95_percent():
    drawn = np.random.default_rng(0).normal(0.3, 1.0, (4000, 5))
    covered = sum(abs(statistics.fmean(row) - 0.3) <= stats.spread(row)[1] for row in drawn.tolist())
    assert covered / 4000 == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 4000))


# --- agreement --------------------------------------------------------------------------------------------------------


def test_agreement_by_hand():
    """Two genotypes of two convolutions with groups of 10 and of 30 channels."""
    layout = {
        "a": (np.array([[0, 0, 1, 2], [0, 1, 1, 1]]), 10),  # 2 of 4 groups agree; chance: 1/2 * 1/4 + 1/4 * 3/4 = 5/16
        "b": (np.array([[0, 1], [0, 1]]), 30),  # 2 of 2; chance: 1/2
    }
    found = stats.agreement(layout)
    assert found.observed == pytest.approx((2 * 10 + 2 * 30) / 100)
    assert found.expected == pytest.approx((40 * 5 / 16 + 60 / 2) / 100)
    assert found.pairs == 1
    assert found.beyond_chance == pytest.approx((0.8 - 0.425) / (1 - 0.425))


codes = st.integers(2, 3).flatmap(
    lambda genotypes: st.lists(st.tuples(*[st.integers(0, 2)] * genotypes), min_size=1, max_size=4)
)


@given(columns=codes)
def test_chance_is_the_mean_over_all_permutations(columns):
    rows = list(zip(*columns, strict=True))
    layouts = [
        stats.agreement({"a": (np.array([rows[0], *others]), 8)}, shuffles=1).observed
        for others in itertools.product(*(itertools.permutations(row) for row in rows[1:]))
    ]
    expected = stats.agreement({"a": (np.array(rows), 8)}, shuffles=1).expected
    assert expected == pytest.approx(statistics.fmean(layouts))


def test_p_of_agreement_is_small_for_one_layout_and_large_for_none():
    rng = np.random.default_rng(0)
    one = rng.integers(0, 5, 16)
    assert stats.agreement({"a": (np.array([one, one, one]), 4)}).p < 0.001
    opposed = np.array([[0, 0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0]])
    found = stats.agreement({"a": (opposed, 4)})
    assert (found.observed, found.expected, found.p) == (0.0, 0.5, 1.0)


def test_p_of_agreement_is_that_of_counting():
    """Four groups, one dilation of its own in each: 1 of 24 permutations agrees wholly."""
    found = stats.agreement({"a": (np.array([[0, 1, 2, 3], [0, 1, 2, 3]]), 1)}, shuffles=4000)
    assert found.p == pytest.approx(1 / 24, abs=4 * math.sqrt(1 / 24 / 4000))


def test_p_of_agreement_is_uniform_where_seeds_do_not_agree():
    rng = np.random.default_rng(1)
    ps = [stats.agreement({"a": (rng.integers(0, 3, (2, 24)), 4)}, shuffles=99).p for _ in range(300)]
    assert statistics.fmean(p <= 0.1 for p in ps) < 0.1 + 3 * math.sqrt(0.09 / 300)
    assert statistics.fmean(p <= 0.5 for p in ps) > 0.25  # nor is it always large


def test_nothing_is_beyond_chance_where_all_channels_have_one_dilation():
    found = stats.agreement({"a": (np.zeros((3, 4), dtype=int), 4)})
    assert (found.observed, found.expected, found.beyond_chance, found.p) == (1.0, 1.0, None, 1.0)
