"""Transfer: a genotype of one architecture on another, by stage, relative depth and relative channel position."""

import functools
import math
import random

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nats_zoo
from nats_zoo import Genotype, GenotypeError
from nats_zoo.folders.find_genotype import find_genotype
from nats_zoo.genotype.catalogue import DEFAULT_GENOTYPES
from nats_zoo.genotype.runs import PLAIN, Run
from nats_zoo.networks.stages import searchable_convs
from nats_zoo.networks.transform import transform
from nats_zoo.publishing import card as model_card

TRANSFERRED = [name for name in DEFAULT_GENOTYPES.values() if find_genotype(name).provenance["method"] == "transfer"]


@functools.cache
def plain(architecture):
    """timm's network, to be looked at only."""
    with torch.device("meta"):
        return timm.create_model(architecture)


def assert_fits(genotype):
    """Names, sums and cardinality groups are those of the network."""
    with torch.device("meta"):
        transform(timm.create_model(genotype.architecture), genotype)


def draw(architecture, seed, gains=False):
    """Random runs in about two thirds of the convolutions, on cardinality-group boundaries; every dilation differs."""
    rng = random.Random(seed)
    model, convs = plain(architecture), {}
    for name in (name for names in searchable_convs(model).values() for name in names):
        conv = model.get_submodule(name)
        units = conv.groups if conv.groups > 1 else conv.out_channels
        cuts = sorted(rng.sample(range(1, units), min(rng.randint(0, 4), units - 1)))
        sizes = [b - a for a, b in zip([0, *cuts], [*cuts, units], strict=True)]
        if rng.random() < 0.7:
            convs[name] = [(size * conv.out_channels // units, rng.randint(1, 9), rng.randint(1, 9)) for size in sizes]
    factors = {name: [rng.uniform(0.5, 2) for _ in runs] for name, runs in convs.items()} if gains else {}
    return Genotype(architecture, convs, factors, {"method": "random", "seed": seed})


def channels(genotype, name, out_channels):
    """The dilation of each output channel."""
    return [run.dilation for run in genotype.convs.get(name, [Run(out_channels, *PLAIN)]) for _ in range(run.channels)]


R50 = {f"layer2.{i}.conv2": [(128, 2, 2)] for i in range(4)}


# --- what goes where --------------------------------------------------------------------------------------------------


def one_stage(architecture, stage=3):
    """A genotype that tells the blocks of a stage apart: convolution i of it has dilation (i + 1, 1)."""
    model = plain(architecture)
    names = searchable_convs(model)[stage]
    convs = {name: [(model.get_submodule(name).out_channels, i + 1, 1)] for i, name in enumerate(names)}
    return Genotype(architecture, convs)


def dilations_of(genotype, names):
    return [genotype.convs[name][0].dilation_h if name in genotype.convs else 1 for name in names]


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("resnet50", "resnet101", [1 + math.floor((j + 0.5) / 23 * 6) for j in range(23)]),
        ("resnet101", "resnet50", [1 + math.floor((j + 0.5) / 6 * 23) for j in range(6)]),
        # Two convolutions in a BasicBlock, one in a Bottleneck: the latter's position, 0.5, is the second of two.
        ("resnet18", "resnet50", [2, 2, 2, 4, 4, 4]),
        ("resnet50", "resnet18", [2, 2, 5, 5]),
        ("resnet34", "resnet18", [3, 4, 9, 10]),
    ],
)
def test_blocks_correspond_by_relative_depth(source, target, expected):
    found = one_stage(source).transfer(target)
    stages = searchable_convs(plain(target))
    assert dilations_of(found, stages[3]) == expected
    assert set(found.convs) <= set(stages[3])  # other stages stay plain


def test_channels_correspond_by_relative_position():
    genotype = Genotype("resnet50", {"layer2.0.conv2": [(6, 2, 2), (58, 1, 3), (64, 3, 1)]})
    # Channel u of 256 takes channel floor((u + 0.5) / 2) of 128.
    wide = genotype.transfer("wide_resnet50_2")
    assert wide.convs == {"layer2.0.conv2": (Run(12, 2, 2), Run(116, 1, 3), Run(128, 3, 1))}
    # Cardinality group u of 32, 8 channels each, takes channel 4u + 2: of the first 6 channels that is only channel 2.
    grouped = genotype.transfer("resnext50_32x4d")
    assert grouped.convs == {"layer2.0.conv2": (Run(8, 2, 2), Run(120, 1, 3), Run(128, 3, 1))}


def test_depthwise_targets_take_a_dilation_per_channel():
    genotype = Genotype("resnet50", {f"layer2.{i}.conv2": [(64, 1, 1), (64, 2, 3)] for i in range(4)})
    found = genotype.transfer("mobilenetv3_large_100")
    names = searchable_convs(plain("mobilenetv3_large_100"))[2]
    assert list(found.convs) == names
    for name in names:
        assert found.dilation_shares()[name] == {(1, 1): 0.5, (2, 3): 0.5}


def test_a_target_that_comes_out_plain_is_left_out():
    ones = {f"layer2.{i}.conv2": [(128, 1, 1)] for i in range(4)}
    genotype = Genotype("resnet50", ones | {"layer4.2.conv2": [(511, 1, 1), (1, 2, 2)]})
    # In ResNeXt, no cardinality group takes the one channel at the end.
    assert genotype.transfer("resnext50_32x4d").convs == {}
    assert set(genotype.transfer("wide_resnet50_2").convs) == {"layer4.2.conv2"}


def reference(genotype, target):
    """The rule once more, written as it is stated: with fractions, names and one channel at a time."""
    source_model, target_model, result = plain(genotype.architecture), plain(target), {}
    source_stages = searchable_convs(source_model)

    def position(j, m, n):
        return math.floor((j + 0.5) / m * n)

    def blocks(names):
        parents = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
        return [[name for name in names if name.rpartition(".")[0] == parent] for parent in parents]

    for stage, names in searchable_convs(target_model).items():
        sources, targets = blocks(source_stages.get(stage, [])), blocks(names)
        for j, block in enumerate(targets if sources else []):
            source_block = sources[position(j, len(targets), len(sources))]
            for t, name in enumerate(block):
                source_name = source_block[position(t, len(block), len(source_block))]
                source = channels(genotype, source_name, source_model.get_submodule(source_name).out_channels)
                conv = target_model.get_submodule(name)
                units = conv.groups if conv.groups > 1 else conv.out_channels
                per_unit = conv.out_channels // units
                result[name] = [source[position(c // per_unit, units, len(source))] for c in range(conv.out_channels)]
    return {name: dilations for name, dilations in result.items() if set(dilations) != {PLAIN}}


ARCHITECTURES = ["resnet18", "resnet50", "resnext50_32x4d", "mobilenetv3_small_100", "convnext_atto", "regnetx_002"]


@settings(max_examples=12)
@given(source=st.sampled_from(ARCHITECTURES), target=st.sampled_from(ARCHITECTURES), seed=st.integers(0, 2**32))
def test_any_transfer_follows_the_rule_and_fits(source, target, seed):
    genotype = draw(source, seed)
    found = genotype.transfer(target)
    assert found.architecture == target
    expected = reference(genotype, target)
    if source == target:
        assert found.convs == genotype.convs
    else:
        assert list(found.convs) == list(expected)
    for name, dilations in expected.items():
        assert channels(found, name, None) == dilations
    assert_fits(found)


@settings(max_examples=6)
@given(architecture=st.sampled_from(ARCHITECTURES), seed=st.integers(0, 2**32))
def test_the_same_architecture_is_the_identity(architecture, seed):
    genotype = draw(architecture, seed, gains=True)
    assert genotype.transfer(architecture) == genotype
    if architecture.startswith("resnet"):
        assert genotype.transfer(f"nats_{architecture}.tv_in1k") == genotype


def test_twin_architectures_take_the_genotype_as_it_is():
    genotype = draw("resnet50", 0)
    found = genotype.transfer("seresnet50")
    for name, runs in genotype.convs.items():
        out_channels = sum(run.channels for run in runs)
        assert channels(found, name, out_channels) == channels(genotype, name, out_channels)


# --- provenance -------------------------------------------------------------------------------------------------------


def test_provenance_names_the_source_and_carries_its_own(tmp_path):
    genotype = draw("resnet18", 1)
    path = tmp_path / "mine.json"
    genotype.save(path)
    found = Genotype.load(path).transfer("resnet34")
    provenance = found.provenance
    assert provenance["method"] == "transfer"
    assert provenance["source_architecture"] == "resnet18"
    assert provenance["source_genotype"] == "mine"
    assert provenance["source_fingerprint"] == genotype.fingerprint()
    assert provenance["source_provenance"] == genotype.provenance
    assert "Genotype.load('mine.json').transfer('resnet34')" in provenance["command"]
    assert str(tmp_path) not in str(found.to_dict())
    assert "gains" not in provenance
    again = found.transfer("resnet50").provenance
    assert again["source_architecture"] == "resnet34"
    assert again["source_provenance"] == provenance


def test_a_genotype_without_a_file_has_no_name():
    provenance = draw("resnet18", 1).transfer("resnet34").provenance
    assert "source_genotype" not in provenance
    assert "command" not in provenance
    assert provenance["source_fingerprint"] == draw("resnet18", 1).fingerprint()


def test_gains_are_dropped_and_that_is_said():
    genotype = draw("resnet18", 2, gains=True)
    found = genotype.transfer("resnet34")
    assert not found.gains
    assert found.convs == draw("resnet18", 2).transfer("resnet34").convs
    assert "resnet18" in found.provenance["gains"]


def test_convolutions_that_lie_in_no_stage_are_left_out_and_named():
    odd = {"layer2.0.conv1": [(128, 2, 2)]}  # a 1x1
    found = Genotype("resnet50", R50 | odd).transfer("resnet101")
    assert found.convs == Genotype("resnet50", R50).transfer("resnet101").convs
    assert found.provenance["left_out"] == ["layer2.0.conv1"]
    assert "left_out" not in Genotype("resnet50", R50).transfer("resnet101").provenance


# --- refusals ---------------------------------------------------------------------------------------------------------

REFUSED = {
    "unknown target": (R50, "resnet5000", "timm has no model 'resnet5000'"),
    "no target": (R50, None, "timm has no model None"),
    "a hub's model": (R50, "hf-hub:timm/resnet18", "timm has no model"),
    "nothing to regroup": (
        R50,
        "vit_tiny_patch16_224",
        "vit_tiny_patch16_224 has no convolution that can be regrouped",
    ),
    "blocks that rebuild themselves": (R50, "mobileone_s0", "be regrouped"),
    "name absent": ({"layer9.0.conv2": [(128, 2, 2)]}, "resnet101", "layer9.0.conv2"),
    "wrong sum": ({"layer2.0.conv2": [(127, 2, 2)]}, "resnet101", "layer2.0.conv2: its runs add up to 127"),
    "wrong sum, same architecture": ({"layer2.0.conv2": [(127, 2, 2)]}, "resnet50", "layer2.0.conv2"),
    "no convolution": ({"layer2.0.bn2": [(128, 2, 2)]}, "resnet101", "layer2.0.bn2"),
}


@pytest.mark.parametrize(("convs", "target", "words"), REFUSED.values(), ids=REFUSED)
def test_refuses(convs, target, words):
    with pytest.raises(GenotypeError) as error:
        Genotype("resnet50", convs, source="mine.json").transfer(target)
    message = str(error.value)
    assert message.startswith("mine.json")
    assert words in message
    assert "\n" not in message


def test_refuses_an_unknown_source():
    with pytest.raises(GenotypeError, match="timm has no model 'resnet5000'"):
        Genotype("resnet5000", {}).transfer("resnet50")


# --- the published ones -----------------------------------------------------------------------------------------------


def test_the_searched_genotypes_are_those_of_resnet18_and_resnet50():
    assert set(DEFAULT_GENOTYPES.values()) - set(TRANSFERRED) == {"resnet18_c_n4_bccd", "resnet50_c_n16_bccd"}


@pytest.mark.parametrize("name", TRANSFERRED)
def test_a_published_file_is_what_transfer_gives(name):
    """Its provenance says from what; the version is the one that wrote it."""
    published = find_genotype(name)
    source = find_genotype(published.provenance["source_genotype"])
    again = source.transfer(published.architecture)
    version = {"version": published.provenance["version"]}
    expected = again.to_dict() | {"provenance": dict(again.provenance) | version}
    assert published.to_dict() == expected
    command = published.provenance["command"].replace("'" + published.provenance["source_genotype"], "'{folder}")
    assert command == f"Genotype.load('{{folder}}.json').transfer('{published.architecture}')"
    assert source.share_changed() > 0.5
    assert published.share_changed() > 0.5


# --- what a model card says of it -------------------------------------------------------------------------------------


def card(genotype, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(f"nats_{genotype.architecture}", genotype=genotype, num_classes=2)
    return (nats_zoo.save_backbone(model, tmp_path / "backbone") / "README.md").read_text(encoding="utf-8")


def test_the_card_of_a_transferred_genotype_says_so_and_shows_both_provenances(tmp_path):
    genotype = find_genotype("resnet34_transfer_c_n4_bccd")
    text = card(genotype, tmp_path)
    assert "not searched for this network" in text
    assert "transferred from the genotype of `resnet18` (`resnet18_c_n4_bccd`)" in text
    assert "A search chose them" not in text
    own, source = (text.index(f"## Provenance of the genotype{end}\n") for end in ("", "'s source"))
    assert own < text.index("| source_fingerprint |") < source < text.index("| detector | fasterrcnn")
    assert "source_provenance" not in text


@pytest.mark.parametrize(
    ("provenance", "words"),
    [
        ({"method": "mixture"}, "A search chose them (`mixture`)."),
        ({"method": "random"}, "They were not searched: they are a control for searched ones (`random`)."),
        ({"method": "by hand"}, "Their provenance states the method `by hand`."),
        ({}, "Their origin is not stated."),
        ({"method": "transfer"}, "transferred from the genotype of `another network`."),
        ({"method": ["a`\n|"]}, "method `['a'\\n\\|']`."),
        ({"method": "mixture", "merged": {"max_dilations": 2}}, "merged afterwards"),
    ],
)
def test_the_origin_follows_from_the_provenance(provenance, words):
    sentence = model_card.genotype_origin(Genotype("resnet18", {}, provenance=provenance))
    assert words in sentence
    assert "\n" not in sentence
