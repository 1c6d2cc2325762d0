"""What is searched and among what: the paper's spaces, the convolutions of each network, groups of channels."""

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

from nats_zoo import NatsError
from nats_zoo.search import SPACES, SearchError, SearchSpace
from nats_zoo.search.space import count_groups, searched_convs

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


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "vgg11_bn"])
def test_a_network_without_residual_blocks_has_nothing_to_search(name):
    with pytest.raises(SearchError, match="no residual blocks in layer2 to layer4") as caught:
        searched_convs(network(name), SPACES["C"])
    assert isinstance(caught.value, NatsError)


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
