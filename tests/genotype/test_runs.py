"""Dilations and runs: equal to plain tuples, and what is asked of them."""

import copy
import json
import pickle

import pytest

from nats_zoo import NatsError
from nats_zoo.genotype.runs import KINDS, MAX_DILATION, Dilation, Run, Runs

RUNS = Runs([(3, 1, 1), (2, 1, 3), (1, 1, 3), (2, 1, 1)])


def test_a_dilation_is_the_plain_tuple():
    dilation = Dilation(1, 3)
    assert dilation == (1, 3)
    assert {(1, 3): "found"}[dilation] == {dilation: "found"}[1, 3]
    assert repr(dilation) == "(1, 3)"
    assert json.dumps(dilation) == "[1, 3]"
    assert pickle.loads(pickle.dumps(dilation)) == copy.deepcopy(dilation) == dilation


def test_text_and_dilation_are_each_other():
    for dilation in (Dilation(1, 1), Dilation(12, 3), Dilation(MAX_DILATION, 1)):
        assert Dilation.parse(str(dilation)) == dilation
    assert f"{Dilation(1, 3)}" == "1x3"


@pytest.mark.parametrize("value", [(1,), (1, 2, 3), "13", (0, 1), (True, 1), (1, 2.0), (1, MAX_DILATION + 1), None])
def test_what_is_no_dilation_is_refused(value):
    with pytest.raises(NatsError, match=r"^dilation: expected a height and a width from 1 to 1024, found"):
        Dilation.check(value)


def test_a_list_is_taken_for_a_dilation():
    assert Dilation.check([2, 3]) == (2, 3)
    assert isinstance(Dilation.check([2, 3]), Dilation)


def test_kinds_names_and_order():
    found = [Dilation(1, 3), Dilation(3, 3), Dilation(1, 1), Dilation(3, 1), Dilation(2, 2)]
    assert {d.kind() for d in found} == set(KINDS)
    assert [d.name() for d in found] == ["1×3", "3", "1", "3×1", "2"]
    assert sorted(found, key=Dilation.order) == [(1, 1), (2, 2), (3, 3), (1, 3), (3, 1)]


def test_runs_are_the_plain_tuple_of_them():
    assert RUNS == ((3, 1, 1), (2, 1, 3), (1, 1, 3), (2, 1, 1))
    assert all(isinstance(run, Run) for run in RUNS)
    again = pickle.loads(pickle.dumps(RUNS))
    assert isinstance(again, Runs)
    assert again == copy.deepcopy(RUNS) == RUNS


def test_channels_counts_and_dilations_of_runs():
    assert RUNS.channels == 8
    assert RUNS.counts() == {(1, 1): 5, (1, 3): 3}
    assert list(RUNS.counts()) == [(1, 1), (1, 3)]
    assert RUNS.per_channel() == [(1, 1)] * 3 + [(1, 3)] * 3 + [(1, 1)] * 2
    assert (Runs().channels, Runs().per_channel()) == (0, [])


def test_neighbours_of_one_dilation_merge_and_others_do_not():
    assert RUNS.merged() == ((3, 1, 1), (3, 1, 3), (2, 1, 1))
    assert Runs.of(RUNS.per_channel()) == RUNS.merged()


def test_runs_of_groups_count_their_channels():
    assert Runs.of([(1, 1), (1, 1), (2, 2)], each=16) == ((32, 1, 1), (16, 2, 2))
