"""Planted recovery: every mode finds all dilations of a teacher that is known to have them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nats_zoo import Genotype, transform
from nats_zoo.search import SPACES, build_supernet, draw_pairs
from nats_zoo.search.run.sensitivity import SensitivitySearch, score
from nats_zoo.search.supernet.build import MODES

CANDIDATES = SPACES["C"].candidates[4]
CHANNELS, GROUPS, SIDE, BATCH = 24, 6, 16, 4
CONVS = ("0", "3", "6")
ALL = len(CONVS) * GROUPS
WITH_ALPHA = ("mixture", "sampled")


def plain_network(seed):
    """Three conv-BN-ReLU whose batch norms use batch statistics."""
    torch.manual_seed(seed)
    layers = []
    for _ in CONVS:
        layers += [nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS), nn.ReLU()]
    return nn.Sequential(*layers)


class Planted:
    """A teacher, its genotype as indices of candidates, and white noise to learn from."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.plain = plain_network(seed)
        self.truth = {name: torch.randint(len(CANDIDATES), (GROUPS,), generator=self.generator) for name in CONVS}
        size = CHANNELS // GROUPS
        runs = {name: [(size, *CANDIDATES[g]) for g in chosen.tolist()] for name, chosen in self.truth.items()}
        self.teacher = transform(copy.deepcopy(self.plain), Genotype("planted", runs))

    def images(self):
        return torch.randn(BATCH, CHANNELS, SIDE, SIDE, generator=self.generator)

    def student(self, mode, network=None):
        """A supernet of tied kernels, the teacher's own unless another network gives them; and its convolutions."""
        network = copy.deepcopy(self.plain) if network is None else network
        searched = build_supernet(
            network, dict.fromkeys(CONVS, CANDIDATES), GROUPS, mode=mode, kernels="tied", norm="live"
        )
        return network, searched

    def recovered(self, searched):
        """How many of all groups took the teacher's candidate."""
        return sum((conv.chosen() == self.truth[name]).sum().item() for name, conv in searched.items())


def layer_outputs(network, x):
    """The output of each of the three ReLUs."""
    outputs = []
    for module in network:
        x = module(x)
        if isinstance(module, nn.ReLU):
            outputs.append(x)
    return outputs


def final_loss(student, teacher, x):
    return F.mse_loss(student(x), teacher(x).detach())


@pytest.mark.parametrize("mode", WITH_ALPHA)
def test_alpha_finds_the_teachers_dilations(mode):
    planted = Planted(seed=0)
    student, searched = planted.student(mode)
    student.requires_grad_(False)
    alphas = [conv.alpha.requires_grad_(True) for conv in searched.values()]
    optimizer = torch.optim.Adam(alphas, lr=0.05, betas=MODES[mode].alpha_betas)
    assert planted.recovered(searched) < ALL / 2
    for step in range(80):
        draw_pairs(searched.values(), 0, step)
        optimizer.zero_grad()
        final_loss(student, planted.teacher, planted.images()).backward()
        optimizer.step()
    assert planted.recovered(searched) == ALL


def test_a_sensitivity_search_finds_the_teachers_dilations():
    planted = Planted(seed=0)
    student, searched = planted.student("sensitivity")
    scored, held_back = [[planted.images() for _ in range(n)] for n in (8, 4)]

    @torch.no_grad()
    def held_back_loss():
        return sum(final_loss(student, planted.teacher, x).item() for x in held_back)

    def scores():
        return score(student, searched, [lambda x=x: final_loss(student, planted.teacher, x) for x in scored])

    search = SensitivitySearch(searched, scores, held_back_loss)
    search.begin_round()
    losses = [search.progress.loss]
    while not search.progress.done:
        trial = search.try_changes()
        losses.append(search.progress.loss)
        if trial.accepted and not search.progress.done:
            search.begin_round()
    assert planted.recovered(searched) == ALL
    assert losses == sorted(losses, reverse=True)  # it never takes what makes things worse
    assert losses[-1] < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("mode", WITH_ALPHA)
def test_alpha_and_kernels_from_scratch_find_the_teachers_dilations(mode):
    planted = Planted(seed=1)
    student, searched = planted.student(mode, plain_network(seed=1001))
    alphas = [conv.alpha for conv in searched.values()]
    weights = [p for name, p in student.named_parameters() if not name.endswith("alpha")]
    optimizers = [torch.optim.Adam(weights, lr=0.01), torch.optim.Adam(alphas, lr=0.05, betas=MODES[mode].alpha_betas)]
    for step in range(200):
        draw_pairs(searched.values(), 0, step)
        x = planted.images()
        with torch.no_grad():
            targets = layer_outputs(planted.teacher, x)
        # At every layer: end to end, hidden channels may trade places.
        loss = sum(F.mse_loss(y, target) for y, target in zip(layer_outputs(student, x), targets, strict=True))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    assert planted.recovered(searched) == ALL
