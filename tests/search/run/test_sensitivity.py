"""Sensitivity mode: scores against numerical derivatives, and what the search does with them."""

import copy
import itertools
import json

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import freeze_batch_norm_2d
from torch import nn

from nats_zoo.search import SPACES, SensitivityConv2d, build_supernet, calibrate
from nats_zoo.search.run.sensitivity import Change, Progress, SensitivitySearch, apply, proposals, score
from nats_zoo.search.space import searched_convs

GROUPS = 4
CANDIDATES = ((1, 1), (2, 2), (1, 3), (3, 1))


@pytest.fixture(scope="module")
def plain(randomise_bn):
    torch.manual_seed(0)
    body = timm.create_model(
        "resnet18", channels=(8, 16, 24, 32), zero_init_last=False, features_only=True, out_indices=(1, 2, 3, 4)
    )
    return freeze_batch_norm_2d(randomise_bn(body, torch.Generator().manual_seed(1)).double().eval())


def images(number=2, side=96, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, 3, side, side, dtype=torch.float64, generator=generator)


def supernet(plain, norm="calibrated"):
    body = copy.deepcopy(plain)
    searched = build_supernet(body, searched_convs(body, SPACES["C"]), GROUPS, mode="sensitivity", norm=norm)
    generator = torch.Generator().manual_seed(2)
    for conv in searched.values():
        conv.current.copy_(torch.randint(len(conv.candidates), (GROUPS,), generator=generator))
    if norm == "calibrated":
        calibrate(body, searched.values(), [images(seed=8)])
    return body, searched


def loss_of(body, x):
    return sum(y.square().mean() for y in body(x))


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["calibrated", "frozen"])
def test_scores_are_the_derivatives_of_the_loss_towards_each_candidate(plain, norm):
    body, searched = supernet(plain, norm)
    x, step = images(), 1e-5
    scores = score(body, searched, [lambda: loss_of(body, x)])
    assert list(scores) == list(searched)
    for name, group, candidate in (("layer2.0.conv2", 1, 3), ("layer3.1.conv2", 0, 2), ("layer4.1.conv2", 3, 7)):
        conv = searched[name]
        assert candidate != conv.current[group]
        with torch.no_grad():
            ends = [nudged_loss(body, conv, group, candidate, sign * step, x) for sign in (1, -1)]
        derivative = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close(scores[name][group, candidate], derivative, rtol=1e-4, atol=1e-12)


def nudged_loss(body, conv, group, candidate, step, x):
    """The loss when a group's output moves by a small step towards another candidate's."""

    def nudge(module, inputs, output):
        other = module.convolve_all(inputs[0], candidate, *module.normalised(candidate))
        channels = slice(group * module.group_size, (group + 1) * module.group_size)
        output = output.clone()
        output[:, channels] += step * (other - output)[:, channels]
        return output

    handle = conv.register_forward_hook(nudge)
    try:
        return loss_of(body, x)
    finally:
        handle.remove()


def test_the_current_candidates_score_nothing_and_losses_add_up(plain):
    body, searched = supernet(plain)
    batches = [images(1), images(2, seed=6)]
    both = score(body, searched, [lambda x=x: loss_of(body, x) for x in batches])
    each = [score(body, searched, [lambda x=x: loss_of(body, x)]) for x in batches]
    for name, conv in searched.items():
        current = both[name][torch.arange(GROUPS), conv.current]
        torch.testing.assert_close(current, torch.zeros_like(current), atol=1e-12, rtol=0)
        torch.testing.assert_close(both[name], each[0][name] + each[1][name])
        assert (both[name] != 0).float().mean() > 0.5


def test_scoring_gives_no_parameter_a_gradient_and_leaves_them_trainable(plain):
    body, searched = supernet(plain)
    trainable = [name for name, p in body.named_parameters() if p.requires_grad]
    before = copy.deepcopy(body.state_dict())
    score(body, searched, [lambda: loss_of(body, images())])
    assert [name for name, p in body.named_parameters() if p.requires_grad] == trainable
    assert all(p.grad is None for p in body.parameters())
    assert all(torch.equal(tensor, before[key]) for key, tensor in body.state_dict().items())


def test_scores_in_bfloat16_point_the_same_way(plain):
    body, searched = supernet(plain)
    body.float()
    x = images().float()

    def in_bfloat16():
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(body, x).float()

    exact, rough = (
        torch.cat([s.flatten() for s in score(body, searched, [loss]).values()])
        for loss in (lambda: loss_of(body, x), in_bfloat16)
    )
    assert torch.corrcoef(torch.stack([exact, rough]))[0, 1] > 0.95


def test_statistics_of_the_current_candidates_alone_are_those_of_all(plain):
    body, searched = supernet(plain)
    twin = copy.deepcopy(body)
    calibrate(body, searched.values(), [images(seed=9), images(seed=10)])
    others = {name: twin.get_submodule(name) for name in searched}
    for conv in others.values():
        conv.measures_all = False
    calibrate(twin, others.values(), [images(seed=9), images(seed=10)])
    for name, conv in searched.items():
        channels = conv.per_channel(conv.current)
        for found, expected in zip(others[name].statistics_rows(channels), conv.statistics_rows(channels), strict=True):
            torch.testing.assert_close(found, expected)
    assert others["layer4.1.conv2"].mean.ne(searched["layer4.1.conv2"].mean).any()  # the rest was left alone


# --- proposals and trials ---------------------------------------------------------------------------------------------


def convs(number=2):
    """Searched convolutions whose scores tests make up."""
    torch.manual_seed(0)
    return {
        f"conv{i}": SensitivityConv2d(nn.Conv2d(2, 8, 3, padding=1), CANDIDATES, GROUPS, tied=True, eps=None)
        for i in range(number)
    }


def drawn_scores(found, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.randn(GROUPS, 4, dtype=torch.float64, generator=generator) for name in found}
    for name, conv in found.items():
        scores[name][torch.arange(GROUPS), conv.current] = 0
    return scores


@given(seed=st.integers(0, 1000))
def test_proposals_are_each_groups_best_predicted_improvement_in_order(seed):
    found = convs()
    scores = drawn_scores(found, seed)
    changes = proposals(found, scores)
    assert changes == sorted(changes)
    improvable = [(name, group) for name in found for group in range(GROUPS) if scores[name][group].min() < 0]
    assert sorted((change.conv, change.group) for change in changes) == sorted(improvable)
    for change in changes:
        assert (
            change.score
            == scores[change.conv][change.group].min()
            == scores[change.conv][change.group][change.candidate]
        )


@given(seed=st.integers(0, 1000), most=st.integers(1, 4))
def test_proposals_never_bring_a_convolution_beyond_its_limit_of_dilations(seed, most):
    found = convs()
    changes = proposals(found, drawn_scores(found, seed), max_dilations=most)
    for stop in range(len(changes) + 1):
        for conv in found.values():
            conv.current.zero_()
        apply(found, changes[:stop])
        assert all(len(conv.current.unique()) <= most for conv in found.values())


class MadeUp:
    """A loss that is a sum over groups of made-up values of their candidates, and pairs of groups that clash."""

    def __init__(self, seed, clash):
        self.convs = convs()
        generator = torch.Generator().manual_seed(seed)
        self.values = {name: torch.randn(GROUPS, 4, dtype=torch.float64, generator=generator) for name in self.convs}
        self.clash = clash

    def loss(self):
        rows = torch.arange(GROUPS)
        total = sum(self.values[name][rows, conv.current].sum() for name, conv in self.convs.items())
        changed = sum((conv.current != 0).sum() for conv in self.convs.values())
        return (total + self.clash * changed * (changed - 1)).item()

    def scores(self):
        rows = torch.arange(GROUPS)
        return {name: v - v[rows, self.convs[name].current][:, None] for name, v in self.values.items()}

    def search(self, progress=None):
        return SensitivitySearch(self.convs, self.scores, self.loss, progress=progress or Progress())


def finish(search, stop_after=None):
    trials = []
    while not search.progress.done and stop_after != len(trials):
        if search.progress.size is None:
            search.begin_round()
        else:
            trials.append(search.try_changes())
    return trials


@given(seed=st.integers(0, 1000), clash=st.sampled_from([0.0, 0.1, 1.0]))
def test_a_search_only_ever_lowers_the_held_back_loss(seed, clash):
    problem = MadeUp(seed, clash)
    start = problem.loss()
    search = problem.search()
    trials = finish(search)
    assert search.progress.loss == problem.loss() <= start
    losses = [start, *(trial.held_back_loss for trial in trials if trial.accepted)]
    assert losses == sorted(losses, reverse=True)
    for trial, following in itertools.pairwise(trials):
        if not trial.accepted:
            assert following.changes == trial.changes // 2
    if clash == 0:  # the first-order prediction is exact: the first trial takes everything
        assert [trial.accepted for trial in trials] in ([], [True])
        assert all(trial.predicted == pytest.approx(trial.actual) for trial in trials)
        assert problem.loss() == pytest.approx(sum(v.min(1).values.sum().item() for v in problem.values.values()))


@given(seed=st.integers(0, 200), stop=st.integers(0, 4))
def test_a_search_goes_on_from_its_saved_progress(seed, stop):
    whole = MadeUp(seed, 0.3)
    expected = finish(whole.search())

    stopped = MadeUp(seed, 0.3)
    search = stopped.search()
    before = finish(search, stop_after=stop)
    saved = json.loads(json.dumps(search.progress.to_dict()))
    resumed = stopped.search(Progress.from_dict(saved))
    assert before + finish(resumed) == expected
    for name, conv in stopped.convs.items():
        assert torch.equal(conv.current, whole.convs[name].current)


def test_a_search_ends_after_its_rounds():
    problem = MadeUp(3, 0.3)
    search = problem.search()
    search.max_rounds = 1
    trials = finish(search)
    assert sum(trial.accepted for trial in trials) == search.progress.rounds == 1


def test_changes_survive_json():
    change = Change(-0.5, "conv0", 2, 3)
    progress = Progress(loss=1.5, rounds=1, trials=4, size=1, changes=[change])
    assert Progress.from_dict(json.loads(json.dumps(progress.to_dict()))) == progress
