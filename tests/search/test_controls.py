"""Control genotypes: valid, a function of their seed, and what they say they are."""

import itertools
import json
import math
from collections import Counter

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nats_zoo import Genotype, NatsError, transform
from nats_zoo.cli import commands as cli
from nats_zoo.genotype.provenance import CONTROL_METHODS, SEARCH_METHODS
from nats_zoo.genotype.runs import Dilation
from nats_zoo.search import SPACES, SearchError
from nats_zoo.search.controls import (
    Searchable,
    group_size,
    parse_shares,
    random,
    round_shares,
    shares,
    shuffled,
    uniform,
)
from nats_zoo.search.space import searched_convs

HALVES = {3: {(1, 1): 0.5, (1, 3): 0.5}, 4: {(2, 2): 0.75, (1, 1): 0.25}}


def meta_network(architecture):
    with torch.device("meta"):
        return timm.create_model(architecture)


def channels(genotype, name):
    return [run.dilation for run in genotype.convs[name] for _ in range(run.channels)]


# --- what all of them have --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "size"),
    [
        ("resnet18", {"groups": 4}),
        ("resnext50_32x4d", {"groups": 16}),  # two cardinality groups each, in every stage
        ("regnety_002", {"channels_per_group": 8}),  # its cardinality groups have 8 channels
        ("convnext_atto", {"groups": 4}),  # depthwise
    ],
)
@pytest.mark.parametrize("kind", CONTROL_METHODS)
def test_controls_fit_their_network_and_take_whole_groups(kind, architecture, size):
    genotype = make(kind, Searchable(architecture, **size))
    network = meta_network(architecture)
    transform(network, genotype)  # refuses what does not fit
    for name, runs in genotype.convs.items():
        conv = network.get_submodule(name)
        group = size.get("channels_per_group") or conv.out_channels // size["groups"]
        assert group % (conv.out_channels // conv.groups) == 0 or conv.groups == 1
        assert kind == "uniform" or all(run.channels % group == 0 for run in runs)


def make(kind, searchable, seed=3):
    if kind == "uniform":
        return uniform(searchable, (2, 3))
    if kind == "shares":
        return shares(searchable, {3: {(1, 1): 0.5, (2, 2): 0.5}}, seed)
    drawn = random(searchable, seed)
    return shuffled(drawn, seed) if kind == "shuffled" else drawn


@pytest.mark.parametrize("kind", CONTROL_METHODS)
def test_controls_are_files_with_provenance(kind, tmp_path):
    genotype = make(kind, Searchable("resnet18", groups=4))
    genotype.save(tmp_path / "made.json")
    assert Genotype.load(tmp_path / "made.json") == genotype
    assert genotype.architecture == "resnet18"
    assert (genotype.provenance["method"], genotype.provenance["space"]) == (kind, "C")
    assert kind not in SEARCH_METHODS
    assert genotype.provenance.get("seed") == (None if kind == "uniform" else 3)
    assert genotype.provenance.get("groups") == (None if kind == "uniform" else 4)


@pytest.mark.parametrize("kind", ["random", "shares", "shuffled"])
def test_what_is_drawn_is_a_function_of_the_seed(kind):
    searchable = Searchable("resnet18", groups=8)
    drawn = {make(kind, searchable, seed).fingerprint() for seed in range(10)}
    assert len(drawn) == 10
    assert make(kind, searchable, 5) == make(kind, searchable, 5)


def test_the_same_draw_on_more_convolutions_changes_none():
    few = random(Searchable("resnet18", convs=("layer4.*.conv2",), groups=4), 7)
    many = random(Searchable("resnet18", groups=4), 7)
    assert len(few.convs) == 2
    assert all(many.convs[name] == runs for name, runs in few.convs.items())


@pytest.mark.parametrize("name", ["resnet18", "nats_resnet18", "resnet18.tv_in1k", "nats_resnet18.tv_in1k"])
def test_variants_and_tags_stand_for_the_plain_architecture(name):
    assert uniform(Searchable(name), (2, 2)) == uniform(Searchable("resnet18"), (2, 2))


# --- uniform ----------------------------------------------------------------------------------------------------------


def test_uniform_is_timms_network_with_another_dilation(randomise_bn):
    torch.manual_seed(0)
    plain = timm.create_model("resnet18", features_only=True, zero_init_last=False).eval()
    randomise_bn(plain, torch.Generator().manual_seed(1))
    images = torch.rand(1, 3, 96, 96)
    genotype = uniform(Searchable("resnet18"), (1, 3))
    names = [f"layer{stage}.{block}.conv2" for stage in (2, 3, 4) for block in (0, 1)]
    assert list(genotype.convs) == names
    nats = timm.create_model("nats_resnet18", features_only=True, genotype=genotype, zero_init_last=False).eval()
    nats.load_state_dict(plain.state_dict())
    for name in names:
        plain.get_submodule(name).dilation = plain.get_submodule(name).padding = (1, 3)
    with torch.inference_mode():
        for ours, timms in zip(nats(images), plain(images), strict=True):
            torch.testing.assert_close(ours, timms, rtol=1e-4, atol=1e-4)
        plain.get_submodule(names[-1]).dilation = plain.get_submodule(names[-1]).padding = (3, 1)
        assert not torch.allclose(nats(images)[-1], plain(images)[-1], rtol=1e-4, atol=1e-4)


def test_uniform_takes_the_convolutions_of_the_space():
    assert len(uniform(Searchable("resnet18", basic_block="both"), (2, 2)).convs) == 12
    assert uniform(Searchable("resnet18"), (7, 1)).share_changed() == 1.0  # the space need not have the dilation
    assert uniform(Searchable("resnet18"), (1, 1)).share_changed() == 0.0


# --- random -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", SPACES)
def test_random_draws_every_candidate_equally_often(space):
    counts = {stage: Counter() for stage in (2, 3, 4)}
    for seed in range(15):
        genotype = random(Searchable("resnet18", space, groups=16), seed)
        for name in genotype.convs:
            counts[int(name[5])].update(channels(genotype, name)[:: len(channels(genotype, name)) // 16])
    for stage, candidates in SPACES[space].candidates.items():
        expected = 15 * 2 * 16 / len(candidates)
        assert counts[stage].keys() == set(candidates)
        assert all(abs(count - expected) < 4.5 * math.sqrt(expected) for count in counts[stage].values())


def test_random_draws_what_the_search_may_choose():
    searchable = Searchable("resnext50_32x4d", groups=32)
    genotype = random(searchable, 0)
    assert list(genotype.convs) == list(searched_convs(meta_network("resnext50_32x4d"), SPACES["C"]))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"groups": 5}, "can not be split into 5 groups"),
        ({"groups": 64}, "cut its cardinality groups"),
        ({}, "give exactly one of the two"),
        ({"groups": 4, "channels_per_group": 8}, "give exactly one of the two"),
    ],
)
def test_a_split_that_does_not_fit_is_refused(options, error):
    with pytest.raises(SearchError, match=error):
        random(Searchable("resnext50_32x4d", **options))


# --- shares -----------------------------------------------------------------------------------------------------------


def test_shares_are_those_that_were_asked_for():
    genotype = shares(Searchable("resnet18", groups=8), HALVES, 1)
    assert list(genotype.convs) == [f"layer{stage}.{block}.conv2" for stage in (3, 4) for block in (0, 1)]
    for name, found in genotype.dilation_shares().items():
        assert found == HALVES[int(name[5])]
    assert genotype.provenance["shares"] == {"3": {"1x1": 0.5, "1x3": 0.5}, "4": {"2x2": 0.75, "1x1": 0.25}}


share_lists = st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(any)


@given(weights=share_lists, groups=st.integers(1, 40))
def test_rounding_moves_no_dilation_by_a_group(weights, groups):
    given_shares = {(1, 1 + index): weight / sum(weights) for index, weight in enumerate(weights)}
    counts = round_shares(given_shares, groups)
    assert sum(counts.values()) == groups
    for dilation, share in given_shares.items():
        assert abs(counts[dilation] - share * groups) < 1
        assert share > 0 or counts[dilation] == 0
    ordered = sorted(given_shares, key=given_shares.get)
    assert all(counts[a] <= counts[b] for a, b in itertools.pairwise(ordered) if given_shares[a] < given_shares[b])


def test_largest_remainders_by_hand():
    assert round_shares({(1, 1): 0.5, (2, 2): 0.3, (3, 3): 0.2}, 4) == {(1, 1): 2, (2, 2): 1, (3, 3): 1}
    assert round_shares({(1, 1): 1 / 3, (2, 2): 1 / 3, (3, 3): 1 / 3}, 4) == {(1, 1): 2, (2, 2): 1, (3, 3): 1}
    assert round_shares({(1, 1): 0.29, (2, 2): 0.71}, 100) == {(1, 1): 29, (2, 2): 71}


@pytest.mark.parametrize(
    ("stages", "error"),
    [
        ({}, "at least one stage"),
        ({1: {(1, 1): 1.0}}, "shares: stage 1: expected one of the searched stages, 2, 3, 4"),
        ({3: {(1, 1): 0.5}}, "stage 3: its shares add up to 0.5, expected 1"),
        ({3: {(1, 1): 1.5, (2, 2): -0.5}}, "1x1: expected a share from 0 to 1, found 1.5"),
        ({3: {(0, 1): 1.0}}, "expected a height and a width from 1"),
        ({3: {(1, 1): math.nan}}, "expected a share from 0 to 1"),
    ],
)
def test_shares_that_are_none_are_refused(stages, error):
    with pytest.raises(NatsError, match=error):
        shares(Searchable("resnet18", groups=4), stages)


# --- shuffled ---------------------------------------------------------------------------------------------------------

dilations = st.sampled_from([(1, 1), (2, 2), (1, 3), (3, 1)])


@st.composite
def genotypes(draw):
    """Of test_resnet, whose layer2 has 48 channels and layer4 96: runs of whole groups, some with gains."""
    size = draw(st.sampled_from([1, 4, 12]))
    convs, gains = {}, {}
    for name, total in (("layer2.0.conv2", 48), ("layer4.0.conv2", 96)):
        drawn = draw(st.lists(dilations, min_size=total // size, max_size=total // size))
        convs[name] = [(size, *dilation) for dilation in drawn]
        if draw(st.booleans()):
            gains[name] = [1.0 + index / 100 for index in range(len(drawn))]
    provenance = draw(st.sampled_from([{}, {"method": "sampled", "channels_per_group": size}]))
    return Genotype("test_resnet", convs, gains, provenance)


@settings(max_examples=40)
@given(genotype=genotypes(), seed=st.integers(0, 1000))
def test_shuffling_keeps_shares_and_moves_channels(genotype, seed):
    made = shuffled(genotype, seed)
    assert made.dilation_shares() == genotype.dilation_shares()
    assert made.share_changed() == genotype.share_changed()
    for name in genotype.convs:
        before, after = channels(genotype, name), channels(made, name)
        assert Counter(before) == Counter(after)
        assert before != after or len(set(before)) == 1
        size = group_size(genotype, name)
        assert all(len(set(after[start : start + size])) == 1 for start in range(0, len(after), size))
        assert group_size(made, name) % size == 0
        assert Counter(gains_of(made, name)) == Counter(gains_of(genotype, name))


def gains_of(genotype, name):
    """(dilation, gain) of every channel."""
    runs = genotype.convs[name]
    gains = genotype.gains.get(name, (None,) * len(runs))
    return [(run.dilation, gain) for run, gain in zip(runs, gains, strict=True) for _ in range(run.channels)]


def test_shuffling_moves_the_groups_of_the_provenance():
    """Runs that happen to be long are still made of groups."""
    runs = {"layer4.0.conv2": [(48, 1, 1), (48, 2, 2)]}
    by_groups = Genotype("test_resnet", runs, provenance={"groups": 4})
    assert group_size(by_groups, "layer4.0.conv2") == 24
    assert group_size(Genotype("test_resnet", runs), "layer4.0.conv2") == 48
    assert len({shuffled(by_groups, seed).fingerprint() for seed in range(50)}) == math.comb(4, 2) - 1
    swapped = shuffled(Genotype("test_resnet", runs), 0)  # the only other layout
    assert swapped.convs["layer4.0.conv2"] == ((48, 2, 2), (48, 1, 1))


@pytest.mark.parametrize("provenance", [{"groups": 5}, {"groups": 3}, {"groups": True}, {"groups": "8"}, {"groups": 0}])
def test_groups_that_do_not_fit_the_runs_do_not_count(provenance):
    genotype = Genotype("test_resnet", {"layer4.0.conv2": [(24, 1, 1), (72, 2, 2)]}, provenance=provenance)
    assert group_size(genotype, "layer4.0.conv2") == 24


def test_shuffled_says_what_it_was_made_from():
    genotype = random(Searchable("resnet18", "A", groups=4), 1)
    made = shuffled(genotype, 9)
    assert made.provenance["source_fingerprint"] == genotype.fingerprint() != made.fingerprint()
    assert made.provenance["source_provenance"] == genotype.provenance
    assert (made.provenance["space"], made.provenance["groups"], made.provenance["seed"]) == ("A", 4, 9)


def test_shuffling_takes_a_published_genotype_and_refuses_one_that_does_not_fit():
    assert shuffled("resnet18_c_n4_bccd").architecture == "resnet18"
    with pytest.raises(NatsError, match=r"layer9\.0"):
        shuffled(Genotype("resnet18", {"layer9.0.conv2": [(8, 1, 1)]}))
    with pytest.raises(NatsError, match="timm has no model 'resnet8'"):
        shuffled(Genotype("resnet8", {}))


# --- text and command -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["3", "3x", "x3", "0x1", "1x-1", "1x3x5", "axb", "1x1025", "²x1"])
def test_text_that_is_no_dilation_is_refused(text):
    with pytest.raises(NatsError, match=r"^dilation: expected"):
        Dilation.parse(text)


def test_shares_from_plain_data():
    assert parse_shares({"3": {"1x1": 0.5, "1x3": 0.5}}) == {3: {(1, 1): 0.5, (1, 3): 0.5}}
    for data in (None, [], {3: 0.5}, {"layer3": {"1x1": 1}}, {3: {"1": 1}}):
        with pytest.raises(NatsError, match=r"^(shares|dilation): expected"):
            parse_shares(data)


@pytest.fixture
def control(tmp_path, monkeypatch, capsys):
    """`control(*arguments)`: run the command; returns its exit code, what it printed, and its error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = cli.main(["control", *arguments])
        printed, error = capsys.readouterr()
        return code, printed, error

    return run


def test_the_command_makes_each_kind(control, tmp_path):
    recipe = {"backbone": "resnet18", "shares": {4: {"1x1": 0.5, "1x3": 0.5}}, "groups": 4}
    (tmp_path / "shares.yaml").write_text(json.dumps(recipe))
    for arguments, expected in [
        (("uniform", "--backbone=resnet18", "--dilation=1x3"), uniform(Searchable("resnet18"), (1, 3))),
        (("random", "--backbone=nats_resnet18", "--seed=4"), random(Searchable("resnet18", groups=16), 4)),
        (("random", "--backbone=resnet18", "--channels_per_group=8", "--space=A", "--basic_block=both"),
         random(Searchable("resnet18", "A", channels_per_group=8, basic_block="both"), 0)),
        (("shares", "--config=shares.yaml"), shares(Searchable("resnet18", groups=4), {4: HALVES[3]}, 0)),
        (("shuffled", "--genotype=nats_resnet18", "--seed=2"), shuffled("resnet18_c_n4_bccd", 2)),
    ]:  # fmt: skip
        code, printed, error = control(*arguments, "--output=made.json")
        assert (code, error) == (0, "")
        assert printed == f"{expected}\n\ngenotype: made.json\n"
        assert Genotype.load(tmp_path / "made.json") == expected


def test_the_command_names_its_file_by_itself(control, tmp_path):
    control("uniform", "--backbone=resnet18", "--dilation=2x2")
    control("random", "--backbone=resnet18", "--seed=3")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resnet18_random_3.json", "resnet18_uniform_2x2.json"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["uniform", "--backbone=resnet18"], "dilation: is missing, uniform needs it"),
        (["random"], "backbone: is missing, random needs it"),
        (
            ["random", "--backbone=resnet18", "--dilation=1x3"],
            "dilation: is not for random, which takes backbone, space",
        ),
        (
            ["shuffled", "--genotype=resnet18_c_n4_bccd", "--groups=4"],
            "groups: is not for shuffled, which takes genotype",
        ),
        (["uniform", "--backbone=resnet18", "--dilation=3"], "dilation: expected HEIGHTxWIDTH such as 1x3, found '3'"),
        (["uniform", "--backbone=resnet8", "--dilation=1x3"], "backbone: timm has no model 'resnet8'"),
        (["uniform", "--backbone=vit_tiny_patch16_224", "--dilation=1x3"], "backbone"),
        (["random", "--backbone=resnet18", "--space=Z"], "space: Z: expected A, B, C or a YAML file"),
        (["random", "--backbone=resnet18", "--groups=5"], "layer2.0.conv2: its 128 output channels can not be split"),
        (["shares", "--backbone=resnet18", "--shares={3: {1x1: 0.4}}"], "shares: stage 3: its shares add up to 0.4"),
        (["random", "--backbone=resnet18", "--output=no/where.json"], "output: no/where.json: there is no folder no"),
        (["average", "--backbone=resnet18"], "control:"),
    ],
)
def test_bad_options_are_refused_in_one_line(arguments, error, control, tmp_path):
    code, printed, found = control(*arguments)
    assert (code, printed) == (2, "")
    assert found.startswith(f"nats: {error}")
    assert found.count("\n") == 1
    assert not list(tmp_path.iterdir())
