"""Merge: the nearest genotype with at most k different dilations in each convolution."""

import time
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nats_zoo import Genotype, GenotypeError, Run
from nats_zoo.folders.find_genotype import find_genotype

CONV = "layer2.0.conv2"


def genotype(runs, gains=None, **provenance):
    return Genotype("resnet50", {CONV: runs}, {} if gains is None else {CONV: gains}, provenance, source="mine.json")


def distance(a, b):
    return abs(a[0] - b[0]) + abs(a[1] - b[1])


def cost(runs, kept):
    """How far the channels move to the nearest of the kept dilations, and how many move."""
    moves = [(run.channels, min(distance(run.dilation, other) for other in kept)) for run in runs]
    return sum(n * far for n, far in moves), sum(n for n, far in moves if far)


# --- examples ---------------------------------------------------------------------------------------------------------


def test_the_dilation_that_moves_channels_least_stays():
    found = genotype([(80, 1, 1), (32, 3, 3), (16, 1, 3)]).merge(2)
    # (1, 3) is 2 from both others; giving up (3, 3) or (1, 1) would move more channels.
    assert found.convs[CONV] == (Run(80, 1, 1), Run(32, 3, 3), Run(16, 1, 1))
    assert found.provenance["merged"]["share_moved"] == 16 / 128
    assert found.provenance["merged"]["mean_distance"] == 16 * 2 / 128


def test_a_median_is_taken_rather_than_the_most_frequent():
    runs = [(50, 1, 1), (40, 2, 2), (50, 3, 3)]
    assert genotype(runs).merge(1).convs[CONV] == (Run(50, 2, 2), Run(40, 2, 2), Run(50, 2, 2))


def test_among_equals_more_channels_stay_unchanged():
    # {(1, 1), (4, 1)}, {(1, 1), (6, 1)} and {(4, 1), (6, 1)} all move 12 channel steps.
    runs = [(4, 1, 1), (6, 4, 1), (6, 6, 1)]
    assert [cost(genotype(runs).convs[CONV], kept)[0] for kept in combinations([(1, 1), (4, 1), (6, 1)], 2)] == [12] * 3
    assert genotype(runs).merge(2).convs[CONV] == (Run(4, 4, 1), Run(6, 4, 1), Run(6, 6, 1))


def test_among_equals_of_as_many_channels_the_first_in_order_stays():
    assert genotype([(8, 3, 1), (8, 1, 3)]).merge(1).convs[CONV] == (Run(8, 1, 3), Run(8, 1, 3))
    # (2, 2) lies between the two that stay, and moves to the smaller.
    found = genotype([(1, 2, 2), (8, 3, 3), (8, 1, 1)]).merge(2)
    assert found.convs[CONV] == (Run(1, 1, 1), Run(8, 3, 3), Run(8, 1, 1))


def test_the_gain_of_a_run_that_moves_becomes_one():
    found = genotype([(80, 1, 1), (32, 3, 3), (16, 1, 3)], [0.5, 0.93, 1.1]).merge(2)
    assert found.gains == {CONV: (0.5, 0.93, 1.0)}


def test_convolutions_are_merged_each_by_itself():
    source = find_genotype("resnet50_c_n16_bccd")
    found = source.merge(3)
    for name, runs in source.convs.items():
        alone = Genotype("resnet50", {name: runs}).merge(3)
        assert found.convs[name] == alone.convs[name]
    assert any(len(shares) > 3 for shares in source.dilation_shares().values())
    assert max(len(shares) for shares in found.dilation_shares().values()) == 3


def test_provenance_keeps_the_sources_and_says_what_was_merged():
    source = genotype([(80, 1, 1), (32, 3, 3), (16, 1, 3)], method="mixture", metrics={"AP": 38.4})
    once = source.merge(2)
    merged = once.provenance["merged"]
    assert {k: v for k, v in once.provenance.items() if k != "merged"} == source.provenance
    assert merged["max_dilations"] == 2
    assert merged["source_fingerprint"] == source.fingerprint()
    twice = once.merge(1).provenance["merged"]
    assert twice["max_dilations"] == 1
    assert twice["source_fingerprint"] == once.fingerprint()
    assert twice["earlier"] == merged


# --- properties -------------------------------------------------------------------------------------------------------

run_lists = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=10)


@given(runs=run_lists, k=st.integers(1, 6), data=st.data())
def test_a_merged_convolution_is_the_best_of_all_sets(runs, k, data):
    gains = data.draw(st.lists(st.floats(0.5, 2), min_size=len(runs), max_size=len(runs)))
    source = genotype(runs, gains)
    found = source.merge(k)
    old, new = source.convs[CONV], found.convs[CONV]
    assert [run.channels for run in new] == [run.channels for run in old]

    kept = {run.dilation for run in new}
    own = {run.dilation for run in old}
    assert len(kept) <= k
    assert kept <= own
    moved = sum(run.channels * distance(run.dilation, other.dilation) for run, other in zip(old, new, strict=True))
    unmoved = sum(run.channels for run, other in zip(old, new, strict=True) if run == other)
    total = sum(run.channels for run in old)
    sets = (subset for size in range(1, k + 1) for subset in combinations(sorted(own), size))
    assert (moved, total - unmoved) == min(cost(old, subset) for subset in sets)

    expected_gains = [gain if a == b else 1.0 for gain, a, b in zip(gains, old, new, strict=True)]
    assert found.gains == {CONV: tuple(expected_gains)}
    if kept != own:
        assert found.provenance["merged"]["share_moved"] == (total - unmoved) / total
        assert found.provenance["merged"]["mean_distance"] == moved / total


@given(runs=run_lists, k=st.integers(1, 6), order=st.randoms())
def test_merging_again_changes_nothing_and_the_order_of_runs_does_not_matter(runs, k, order):
    found = genotype(runs).merge(k)
    assert found.merge(k) == found
    shuffled = list(runs)
    order.shuffle(shuffled)
    other = genotype(shuffled).merge(k)
    assert Counter(found.convs[CONV]) == Counter(other.convs[CONV])


@given(runs=run_lists, more=st.integers(0, 2**70))
def test_enough_dilations_leave_the_genotype_as_it_is(runs, more):
    source = genotype(runs, [2.0] * len(runs), method="mixture")
    different = len({run[1:] for run in runs})
    assert source.merge(different + more) == source
    assert "merged" not in source.merge(different + more).provenance


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, -1, 1.0, 2.5, "2", None, True, [2]])
def test_refuses_what_is_no_positive_integer(k):
    with pytest.raises(GenotypeError, match=r"mine\.json: max_dilations must be a positive integer, found"):
        genotype([(128, 1, 1)]).merge(k)


def many(n):
    return genotype([(i + 1, i // 100 + 1, i % 100 + 1) for i in range(n)])


def test_twenty_dilations_are_merged_exactly():
    found = many(20).merge(10)
    old, new = many(20).convs[CONV], found.convs[CONV]
    # On a line an exact answer is known in another way: dynamic programming over contiguous groups.
    assert cost(old, {run.dilation for run in new})[0] == best_on_a_line([run.channels for run in old], 10)


def best_on_a_line(weights, k):
    """Least cost of k medians of points 0, 1, 2 ... with these weights."""
    n = len(weights)

    def group(a, b):
        return min(sum(weights[i] * abs(i - m) for i in range(a, b)) for m in range(a, b))

    best = [group(0, b) for b in range(1, n + 1)]
    for _ in range(k - 1):
        best = [min([best[b]] + [best[a - 1] + group(a, b + 1) for a in range(1, b + 1)]) for b in range(n)]
    return best[-1]


@pytest.mark.parametrize(("n", "k"), [(40, 20), (100, 10), (900, 450), (900, 899), (5000, 1), (5000, 2500)])
def test_too_many_sets_are_refused_at_once(n, k):
    start = time.monotonic()
    with pytest.raises(GenotypeError, match=rf"mine\.json: layer2\.0\.conv2: {n} different dilations") as error:
        many(n).merge(k)
    assert time.monotonic() - start < 2
    assert "\n" not in str(error.value)


def test_many_dilations_with_few_sets_are_merged():
    assert len(many(900).merge(1).dilation_shares()[CONV]) == 1
    assert len(many(200).merge(2).dilation_shares()[CONV]) == 2
    assert len(many(150).merge(149).dilation_shares()[CONV]) == 149
