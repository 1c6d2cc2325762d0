"""What is searched and among what: the paper's spaces, the convolutions of each network, groups of channels."""

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

from nats_zoo import NatsError, searchable_convs
from nats_zoo.search import SPACES, SearchError, SearchSpace, find_space
from nats_zoo.search.space import count_groups, genotype_names, searched_convs

# The paper's table: candidate dilations of layer2, layer3 and layer4; a number means the same in both directions.
PAPER = {
    "A": ([1, 3], [1, 3], [1, 3, 5]),
    "B": ([1, 2, 3], [1, 2, 3], [1, 2, 3, 4, 5]),
    "C": (
        [1, 2, 3, (1, 3), (3, 1)],
        [1, 2, 3, (1, 3), (3, 1)],
        [1, 2, 3, 4, 5, (1, 3), (3, 1), (1, 5), (5, 1)],
    ),
}


def network(name, **kwargs):
    with torch.device("meta"):  # names and shapes are all that is asked for
        return timm.create_model(name, **kwargs)


def block_convs(blocks):
    """conv2 of every block of layer2, layer3, layer4."""
    return [f"layer{stage}.{block}.conv2" for stage, n in zip((2, 3, 4), blocks, strict=True) for block in range(n)]


@pytest.mark.parametrize("name", PAPER)
def test_spaces_are_those_of_the_paper(name):
    stages = [[d if isinstance(d, tuple) else (d, d) for d in stage] for stage in PAPER[name]]
    candidates = SPACES[name].candidates
    assert sorted(candidates) == [2, 3, 4]
    assert [list(candidates[stage]) for stage in (2, 3, 4)] == stages


def test_there_are_no_other_spaces():
    assert list(SPACES) == ["A", "B", "C"]


@pytest.mark.parametrize("dilations", [(), ((2, 2), (1, 1)), ((1, 1), (2, 2), (2, 2))])
def test_a_space_begins_with_the_plain_dilation_and_repeats_none(dilations):
    with pytest.raises(SearchError, match="space mine: stage 3"):
        SearchSpace("mine", {2: ((1, 1), (3, 3)), 3: dilations})


@pytest.mark.parametrize("options", [{}, {"features_only": True, "out_indices": (1, 2, 3, 4)}])
@pytest.mark.parametrize(
    ("name", "blocks"), [("resnet18", (2, 2, 2)), ("resnet50", (4, 6, 3)), ("resnext50_32x4d", (4, 6, 3))]
)
def test_the_searched_convolutions_are_conv2_of_the_last_three_stages(name, blocks, options):
    body = network(name, **options)
    convs = searched_convs(body, SPACES["C"])
    assert list(convs) == block_convs(blocks)
    for conv, candidates in convs.items():
        assert body.get_submodule(conv).kernel_size == (3, 3)
        assert candidates == SPACES["C"].candidates[int(conv[len("layer")])]


def test_resnet50_has_13_searched_convolutions_those_with_stride_included():
    body = network("resnet50")
    strides = [body.get_submodule(name).stride for name in searched_convs(body, SPACES["A"])]
    assert len(strides) == 13
    assert strides.count((2, 2)) == 3


def test_resnet18_has_6_searched_convolutions_none_with_stride():
    body = network("resnet18")
    strides = [body.get_submodule(name).stride for name in searched_convs(body, SPACES["A"])]
    assert strides == [(1, 1)] * 6


def test_stages_that_a_space_does_not_name_are_not_searched():
    late = SearchSpace("late", {4: ((1, 1), (2, 2))})
    assert list(searched_convs(network("resnet18"), late)) == ["layer4.0.conv2", "layer4.1.conv2"]


def test_a_network_without_searchable_convolutions_is_refused():
    with pytest.raises(SearchError, match=r"ConvNet has no convolution to search in the stages 2, 3, 4") as caught:
        searched_convs(ConvNet(), SPACES["C"])
    assert isinstance(caught.value, NatsError)


class ConvNet(torch.nn.Sequential):
    """A network that timm knows nothing of: one stage, 0."""

    def __init__(self):
        super().__init__(torch.nn.Conv2d(3, 4, 3))


@pytest.mark.parametrize("name", ["regnety_002", "mobilenetv3_small_050", "vgg11_bn", "convnext_atto"])
def test_of_another_network_all_searchable_convolutions_of_the_stages_are_searched(name):
    model = network(name)
    convs = searched_convs(model, SPACES["A"])
    stages = searchable_convs(model)
    assert list(convs) == [conv for stage in (2, 3, 4) for conv in stages.get(stage, [])]
    for stage in (2, 3, 4):
        assert {convs[conv] for conv in stages.get(stage, [])} <= {SPACES["A"].candidates[stage]}


def test_both_convolutions_of_basic_blocks_on_request():
    convs = searched_convs(network("resnet18"), SPACES["A"], basic_block="both")
    assert list(convs)[:4] == ["layer2.0.conv1", "layer2.0.conv2", "layer2.1.conv1", "layer2.1.conv2"]
    assert len(convs) == 12
    bottlenecks = network("resnet50")
    assert searched_convs(bottlenecks, SPACES["A"], basic_block="both") == searched_convs(bottlenecks, SPACES["A"])


def test_convolutions_can_be_named_by_patterns():
    convs = searched_convs(network("resnet18"), SPACES["C"], ["layer4.*", "layer2.1.conv1"])
    assert list(convs) == ["layer2.1.conv1", *(f"layer4.{block}.conv{n}" for block in (0, 1) for n in (1, 2))]


def test_a_pattern_that_matches_nothing_and_a_stage_without_candidates_are_refused():
    model = network("resnet18")
    with pytest.raises(SearchError, match=r"convs: 'layer9.*' matches no convolution that can be searched, such as"):
        searched_convs(model, SPACES["C"], ["layer4.*", "layer9.*"])
    with pytest.raises(SearchError, match=r"convs: layer1\.0\.conv1 is in stage 1, space C has no candidates for it"):
        searched_convs(model, SPACES["C"], ["layer1.*"])


@pytest.mark.parametrize("name", ["resnet18", "regnety_002", "convnext_atto", "vgg11_bn", "cspresnet50", "densenet121"])
def test_a_genotype_names_convolutions_as_the_network_does_that_was_not_taken_apart(name):
    plain, wrapped = network(name), network(name, features_only=True)
    names = genotype_names(wrapped, [conv for convs in searchable_convs(wrapped).values() for conv in convs])
    assert names
    assert len(set(names.values())) == len(names)
    for own, original in names.items():
        assert wrapped.get_submodule(own).weight.shape == plain.get_submodule(original).weight.shape
    own_stages, stages = searchable_convs(wrapped), searchable_convs(plain)
    for stage, convs in own_stages.items():
        assert {names[conv] for conv in convs} <= set(stages[stage])


def write(path, text):
    path.write_text(text)
    return path


def test_a_space_of_ones_own_comes_from_yaml(tmp_path):
    space = find_space(write(tmp_path / "wide.yaml", "2: [1, [1, 3]]\n4: [1, 2, [5, 1]]\n"))
    assert space.name == "wide"
    assert space.candidates == {2: ((1, 1), (1, 3)), 4: ((1, 1), (2, 2), (5, 1))}
    assert find_space("B") is SPACES["B"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("2: [1, [1, 3, 5]]", r"2: expected numbers or \[height, width\]"),
        ("2: [1, 0]", "2: expected numbers"),
        ("2: [1, true]", "2: expected numbers"),
        ("2: 3", "2: expected a list of candidates"),
        ("layer2: [1, 2]", "expected stages"),
        ("[1, 2]", "expected stages"),
        ("", "expected stages"),
        ("2: [1, 2", "not YAML"),
        ("2: [2, 3]", "space bad: stage 2: expected different dilations that begin with 1"),
    ],
)
def test_a_malformed_space_is_refused_in_one_line(tmp_path, text, complaint):
    with pytest.raises(SearchError, match=complaint) as caught:
        find_space(write(tmp_path / "bad.yaml", text))
    assert "\n" not in str(caught.value)


def test_an_unknown_space_is_refused():
    with pytest.raises(SearchError, match="space: D: expected A, B, C or a YAML file"):
        find_space("D")


@given(
    channels=st.integers(1, 64),
    groups=st.one_of(st.none(), st.integers(-2, 70)),
    per_group=st.one_of(st.none(), st.integers(-2, 70)),
)
def test_channels_are_split_evenly_or_the_split_is_refused(channels, groups, per_group):
    conv = torch.nn.Conv2d(3, channels, 3, device="meta")
    given_one = [n for n in (groups, per_group) if n is not None]
    if len(given_one) == 1 and given_one[0] > 0 and channels % given_one[0] == 0:
        count = count_groups(conv, "conv", groups, per_group)
        assert count == (groups if groups is not None else channels // per_group)
    else:
        with pytest.raises(SearchError, match=r"conv: its|exactly one"):
            count_groups(conv, "conv", groups, per_group)


@given(cardinality=st.integers(2, 12), width=st.integers(1, 8), groups=st.integers(1, 96))
def test_groups_of_a_grouped_convolution_take_whole_cardinality_groups(cardinality, width, groups):
    conv = torch.nn.Conv2d(cardinality, cardinality * width, 3, groups=cardinality, device="meta")
    if conv.out_channels % groups:
        with pytest.raises(SearchError, match="can not be split"):
            count_groups(conv, "conv", groups, None)
        return
    size = conv.out_channels // groups
    ends = set(range(size, conv.out_channels + 1, size))
    if ends <= set(range(width, conv.out_channels + 1, width)):
        assert count_groups(conv, "conv", groups, None) == groups
    else:
        with pytest.raises(SearchError, match=f"groups of {size} channels cut its cardinality groups of {width}"):
            count_groups(conv, "conv", groups, None)


def test_resnext_takes_the_papers_32_channels_per_group_and_refuses_a_cut():
    body = network("resnext50_32x4d")  # cardinality groups of 8, 16 and 32 channels in layer2, 3 and 4
    convs = {name: body.get_submodule(name) for name in searched_convs(body, SPACES["C"])}
    assert [count_groups(conv, name, None, 32) for name, conv in convs.items()] == [8] * 4 + [16] * 6 + [32] * 3
    with pytest.raises(SearchError, match=r"layer4\.0\.conv2: groups of 16 channels cut its cardinality groups of 32"):
        count_groups(convs["layer4.0.conv2"], "layer4.0.conv2", None, 16)
