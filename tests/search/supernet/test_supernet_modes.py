"""All modes, norms and networks: one-hot is the decoded network, decided as plain it is the plain network."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import freeze_batch_norm_2d

from nats_zoo import RegroupedConv2d, searchable_convs, transform
from nats_zoo.search import SPACES, build_supernet, calibrate, decode, decode_network, draw_pairs
from nats_zoo.search.space import genotype_names, searched_convs
from nats_zoo.search.supernet.build import MODES, share_changed

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
ON = 1e4
MAPS = {"features_only": True}
NETWORKS = {
    "resnet18": {"channels": (8, 16, 24, 32), "zero_init_last": False},
    "resnext50_32x4d": {"channels": (64, 64, 64, 64), "layers": (1, 1, 1, 1), "zero_init_last": False},
    "regnety_002": {},
    "mobilenetv3_small_050": {},
}

CHANNELS_PER_GROUP = {"regnety_002": 8, "mobilenetv3_small_050": 1}  # of their cardinality; others: four groups


def images(number=2, side=96, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, 3, side, side, dtype=torch.float64, generator=generator)


@pytest.fixture(scope="module")
def pretrained(randomise_bn):
    """`pretrained(name)`: a feature extractor with random batch norms, in evaluation mode: do not change."""
    made = {}

    def make(name):
        if name not in made:
            torch.manual_seed(0)
            body = timm.create_model(name, **NETWORKS[name], **MAPS)
            made[name] = randomise_bn(body, torch.Generator().manual_seed(1)).double().eval()
        return made[name]

    return make


def supernet(body, mode, norm="calibrated", kernels=None, channels_per_group=None):
    body = copy.deepcopy(body)
    if norm != "live":
        body = freeze_batch_norm_2d(body)
    convs = searched_convs(body, SPACES["C"])
    groups = 4 if channels_per_group is None else None
    return body, build_supernet(body, convs, groups, channels_per_group, mode, kernels, norm)


@torch.no_grad()
def decide(searched, seed=None):
    """One-hot, drawn at random or plain everywhere."""
    generator = torch.Generator().manual_seed(seed or 0)
    for conv in searched.values():
        chosen = torch.randint(len(conv.candidates), (conv.num_groups,), generator=generator)
        chosen = torch.zeros_like(chosen) if seed is None else chosen
        conv.alpha.copy_(ON * F.one_hot(chosen, len(conv.candidates)))
        if hasattr(conv, "current"):
            conv.current.copy_(chosen)


def outputs(body, searched, x):
    draw_pairs(searched.values(), 11)
    with torch.no_grad():
        return body(x)


def drift(searched):
    with torch.no_grad():
        for conv in searched.values():
            noise = torch.randn(conv.kernels.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
            conv.kernels += 0.3 * conv.kernels.std() * noise


@pytest.mark.parametrize("norm", ["calibrated", "live", "frozen"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_decided_as_plain_a_supernet_is_the_plain_network(name, mode, norm, pretrained):
    plain = pretrained(name)
    body, searched = supernet(plain, mode, norm)
    decide(searched)
    x = images()
    torch.testing.assert_close(outputs(body, searched, x), outputs(plain, {}, x), **CLOSE)
    conv = next(iter(searched.values()))
    with torch.no_grad():
        conv.alpha[1] = ON * F.one_hot(torch.tensor(2), len(conv.candidates))
        if hasattr(conv, "current"):
            conv.current[1] = 2
    changed = outputs(body, searched, x)
    assert max((a - b).abs().max() for a, b in zip(changed, outputs(plain, {}, x), strict=True)) > 1e-3


@pytest.mark.parametrize("norm", ["calibrated", "live", "frozen"])
@pytest.mark.parametrize("kernels", ["tied", "untied"])
@pytest.mark.parametrize("mode", MODES)
def test_a_decoded_network_computes_what_its_supernet_does_at_one_hot(mode, kernels, norm, pretrained):
    body, searched = supernet(pretrained("resnet18"), mode, norm, kernels)
    drift(searched)
    if norm == "calibrated":
        calibrate(body, searched.values(), [images(seed=8)], lambda: draw_pairs(searched.values(), 3))
    decide(searched, seed=3)
    x = images()
    expected = outputs(body, searched, x)
    assert share_changed(searched.values()) > 0.3
    network, twins = copy.deepcopy((body, searched))
    decode_network(network, twins)
    assert {type(network.get_submodule(name)) for name in searched} == {RegroupedConv2d}
    torch.testing.assert_close(outputs(network, {}, x), expected, **CLOSE)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NETWORKS)
def test_any_networks_genotype_is_one_that_timms_network_takes_on(name, mode, pretrained):
    """With tied kernels and frozen norms, the decoded network is the plain one, regrouped."""
    plain = pretrained(name)
    body, searched = supernet(plain, mode, "frozen", "tied", CHANNELS_PER_GROUP.get(name))
    decide(searched, seed=3)
    names = genotype_names(body, list(searched))
    genotype = decode({names[own]: conv for own, conv in searched.items()}, name, {})
    x = images()
    expected = outputs(body, searched, x)
    nats = timm.create_model("nats_any", architecture=name, genotype=genotype, **NETWORKS[name], **MAPS)
    nats.double().eval().load_state_dict(plain.state_dict())
    torch.testing.assert_close(outputs(nats, {}, x), expected, **CLOSE)
    classifier = timm.create_model(name, **NETWORKS[name])
    assert genotype.convs.keys() <= {conv for convs in searchable_convs(classifier).values() for conv in convs}
    transform(classifier, genotype)


@pytest.mark.parametrize("mode", ["mixture", "sampled"])
def test_alpha_gets_gradients_under_live_batch_norms(mode, pretrained):
    body, searched = supernet(pretrained("resnet18"), mode, "live")
    body.train()
    draw_pairs(searched.values(), 1)
    before = body.layer3[0].bn2.running_mean.clone()
    sum(y.square().mean() for y in body(images())).backward()
    assert all(conv.alpha.grad.abs().sum() > 0 for conv in searched.values())
    assert not torch.equal(body.layer3[0].bn2.running_mean, before)


@pytest.mark.parametrize("mode", MODES)
def test_a_supernet_keeps_channels_last(mode, pretrained):
    body, searched = supernet(pretrained("resnet18"), mode)
    x = images()
    decide(searched, seed=3)
    expected = outputs(body, searched, x)
    body.to(memory_format=torch.channels_last)
    found = outputs(body, searched, x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, **CLOSE)
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in found)
