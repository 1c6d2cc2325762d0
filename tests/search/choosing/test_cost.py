"""The table of measured costs: what it predicts, what it refuses, and how it is measured."""

import copy
import json
import math
from itertools import product

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nats_zoo import Genotype, GenotypeError, RegroupedConv2d
from nats_zoo.search.choosing.choose import choose
from nats_zoo.search.choosing.cost import ConvCost, CostTable
from nats_zoo.search.choosing.profile import fit_line, profile
from nats_zoo.search.space import SPACES, SearchError, searched_convs

CANDIDATES = ((1, 1), (2, 2), (1, 3))
NAME, OTHER = "layer2.0.conv2", "layer4.0.conv2"
TABLE = CostTable(
    architecture="test_resnet",
    device="a machine",
    torch="2.6.0",
    size=(64, 96),
    batch=2,
    memory_format="channels_last",
    dtype="bfloat16",
    threads=3,
    convs={
        NAME: ConvCost(48, 1e-3, 2e-5, {(1, 1): (1e-4, 0.9e-3 / 48), (2, 2): (3e-4, 2e-5), (1, 3): (0.0, 3e-5)}),
        OTHER: ConvCost(96, 3e-3, 0.0, {(1, 1): (0.0, 3e-3 / 96), (5, 5): (1e-4, 2e-5)}),
    },
)


def seconds_by_hand(counts, size):
    """Of NAME, for the number of groups at each of CANDIDATES."""
    fits = TABLE.convs[NAME].dilations
    parts = [fits[d][0] + fits[d][1] * n * size for d, n in zip(CANDIDATES, counts, strict=True) if n]
    return sum(parts) + (2e-5 if len(parts) > 1 else 0)


# --- predictions ------------------------------------------------------------------------------------------------------


def test_relative_cost_is_the_sum_over_used_dilations():
    assert TABLE.relative(NAME, {(1, 1): 48}) == pytest.approx(1)
    assert TABLE.relative(NAME, {(1, 3): 48, (2, 2): 0}) == pytest.approx(48 * 3e-5 / 1e-3)
    mixed = TABLE.relative(NAME, {(2, 2): 16, (1, 3): 32})
    assert mixed == pytest.approx((3e-4 + 16 * 2e-5 + 32 * 3e-5 + 2e-5) / 1e-3)
    assert TABLE.of_groups(NAME, CANDIDATES, 3)([0, 1, 2]) == mixed


def test_a_networks_cost_weighs_convolutions_by_their_time():
    genotype = Genotype("test_resnet", {NAME: [(32, 1, 3), (16, 2, 2)], "layer1.0.conv2": [(32, 1, 1)]})
    mixed = TABLE.relative(NAME, {(2, 2): 16, (1, 3): 32})
    assert TABLE.network(genotype) == pytest.approx((mixed * 1e-3 + 3e-3) / 4e-3)
    assert TABLE.network(Genotype("test_resnet", {})) == pytest.approx(1)


@settings(max_examples=25)
@given(st.integers(1, 4), st.integers(0, 10**6))
def test_expected_cost_against_all_assignments(groups, seed):
    p = torch.rand(groups, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
    p = p / p.sum(1, keepdim=True)
    expected = 0.0
    for assignment in product(range(3), repeat=groups):
        probability = math.prod(p[i, g].item() for i, g in enumerate(assignment))
        counts = [assignment.count(g) for g in range(3)]
        expected += probability * seconds_by_hand(counts, 48 / groups) / 1e-3
    assert TABLE.expected(NAME, p, CANDIDATES).item() == pytest.approx(expected)


@given(st.lists(st.integers(0, 2), min_size=3, max_size=3), st.integers(0, 1))
def test_one_hot_probabilities_cost_what_the_genotype_does(assignment, other):
    one_hot = torch.eye(3, dtype=torch.float64)[assignment]
    counts = [assignment.count(g) for g in range(3)]
    assert TABLE.expected(NAME, one_hot, CANDIDATES).item() == pytest.approx(
        TABLE.of_groups(NAME, CANDIDATES, 3)(counts)
    )
    runs = {NAME: [(16, *CANDIDATES[g]) for g in assignment], OTHER: [(96, *((1, 1), (5, 5))[other])]}
    probabilities = {NAME: one_hot, OTHER: torch.eye(2, dtype=torch.float64)[[other]]}
    total = TABLE.expected_total(probabilities, {NAME: CANDIDATES, OTHER: ((1, 1), (5, 5))})
    assert total.item() == pytest.approx(TABLE.network(Genotype("test_resnet", runs)))
    only_one = TABLE.expected_total({NAME: one_hot}, {NAME: CANDIDATES})
    assert only_one.item() == pytest.approx(TABLE.network(Genotype("test_resnet", {NAME: runs[NAME]})))


def test_expected_cost_is_differentiable():
    alpha = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: TABLE.expected(NAME, a.softmax(1), CANDIDATES), alpha)
    certain = torch.eye(3)[[0, 0, 1, 2]].requires_grad_()
    TABLE.expected(NAME, certain, CANDIDATES).backward()
    assert certain.grad.isfinite().all()


def test_descending_the_expected_cost_ends_at_the_cheapest_dilation():
    alpha = torch.zeros(4, 3, requires_grad=True)
    optimizer = torch.optim.Adam([alpha], lr=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        TABLE.expected(NAME, alpha.softmax(1), CANDIDATES).backward()
        optimizer.step()
    costs = [TABLE.relative(NAME, {dilation: 48}) for dilation in CANDIDATES]
    assert set(alpha.argmax(1).tolist()) == {costs.index(min(costs))}


def test_choose_with_a_table():
    log_p = torch.tensor([[0.4, 0.3, 0.3], [0.3, 0.4, 0.3], [0.4, 0.3, 0.3]]).log()
    cost = TABLE.of_groups(NAME, CANDIDATES, 3)
    assert choose(log_p, cost=cost, cost_weight=0.01).tolist() == [0, 1, 0]
    assert choose(log_p, cost=cost, cost_weight=100.0).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: TABLE.relative("layer9", {(1, 1): 48}), "costs: the convolution 'layer9' was not measured"),
        (
            lambda: TABLE.relative(NAME, {(7, 7): 48}),
            f"{NAME}: the dilation 7x7 was not measured, only 1x1, 2x2",
        ),
        (lambda: TABLE.relative(NAME, {(1, 1): 47}), f"costs: {NAME}: was measured with 48 output channels, found 47"),
        (lambda: TABLE.relative(NAME, {(1, 1): 50, (2, 2): -2}), f"costs: {NAME}: was measured with 48"),
        (lambda: TABLE.relative(NAME, {}), "found 0"),
        (lambda: TABLE.of_groups(NAME, CANDIDATES, 5), "its 48 channels are not 5 equal groups"),
        (lambda: TABLE.expected(NAME, torch.ones(2, 2), CANDIDATES), r"expected p of \(groups, 3\), found .* \(2, 2\)"),
        (lambda: TABLE.network(Genotype("test_resnet", {"layer1.0.conv2": [(32, 1, 2)]})), "'layer1.0.conv2' was not"),
        (
            lambda: TABLE.check("resnet50", {}),
            "architecture: .* of 'test_resnet', expected 'resnet50'",
        ),
        (lambda: TABLE.check("test_resnet", {NAME: [(1, 1), (4, 4)]}), "the dilation 4x4 was not measured"),
        (lambda: TABLE.check("test_resnet", ["layer1.0.conv2"]), "'layer1.0.conv2' was not measured"),
    ],
)
def test_what_was_not_measured_is_refused(ask, words):
    with pytest.raises(SearchError, match=words) as error:
        ask()
    assert "\n" not in str(error.value)


def test_another_architectures_genotype_is_refused():
    with pytest.raises(GenotypeError, match="is for the architecture 'resnet50'"):
        TABLE.network(Genotype("resnet50", {}))


def test_check_accepts_what_was_measured():
    TABLE.check("test_resnet", {NAME: CANDIDATES, OTHER: [(5, 5)]})
    TABLE.check("test_resnet", [NAME])


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_gives_the_same_table_back(tmp_path):
    path = tmp_path / "costs.json"
    TABLE.save(path)
    assert CostTable.load(path) == TABLE
    assert CostTable.from_dict(TABLE.to_dict()) == TABLE
    data = json.loads(path.read_text())
    assert data["convs"][NAME]["dilations"]["1x3"] == [0.0, 3e-5]
    assert data == json.loads(json.dumps(TABLE.to_dict()))
    assert [entry.name for entry in tmp_path.iterdir()] == ["costs.json"]


def with_change(path, value):
    """The table's JSON with one value replaced, or removed if it is Ellipsis."""
    data = copy.deepcopy(TABLE.to_dict())
    *parents, last = path
    target = data
    for key in parents:
        target = target[key]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["format"], 2, "format: expected format 1, found 2"),
        (["format"], True, "format: expected format 1, found True"),
        pytest.param(["threads"], ..., "key 'threads' is missing", id="path2-value2-the key 'threads' is missing"),
        (["colour"], "red", "unknown key 'colour', expected only format"),
        (["architecture"], 5, "architecture: expected a line of text, found 5"),
        (["device"], "two\nlines", "device: expected a line of text"),
        (["size"], [64], r"size: expected \[height, width\], found \[64\]"),
        (["size"], [64, -1], "size: expected a positive integer, found -1"),
        (["batch"], 1.0, "batch: expected a positive integer, found 1.0"),
        (["dtype"], "float8", "dtype: expected one of float32, bfloat16, float16, found 'float8'"),
        (["memory_format"], [], "memory_format: expected one of"),
        (["convs"], [], "convs: expected an object"),
        (["convs"], {}, "convs: expected at least one convolution"),
        (["convs", NAME], [], f"{NAME}: expected an object"),
        pytest.param(
            *(["convs", NAME, "join"], ..., f"{NAME}: key 'join' is missing"),
            id=f"path14-value14-{NAME}: the key 'join' is missing",
        ),
        (["convs", NAME, "plain"], 0, f"{NAME}: plain: expected a positive number of seconds, found 0"),
        (["convs", NAME, "plain"], math.nan, f"{NAME}: plain: expected seconds, a finite number"),
        (["convs", NAME, "plain"], True, f"{NAME}: plain: expected seconds"),
        (["convs", NAME, "plain"], 10**400, f"{NAME}: plain: expected seconds"),
        (["convs", NAME, "channels"], "48", f"{NAME}: channels: expected a positive integer, found '48'"),
        (["convs", NAME, "dilations", "1x3"], [1e-3], rf"{NAME}: 1x3: expected \[a, b\]"),
        (["convs", NAME, "dilations", "1x3"], [1e-3, -1e-9], f"{NAME}: 1x3: expected seconds"),
        (["convs", NAME, "dilations", "1x1"], ..., f"{NAME}: dilations: expected 1x1 among them"),
        (["convs", NAME, "dilations", "3"], [0, 0], f"{NAME}: dilations: expected keys like '1x3', found '3'"),
        (["convs", NAME, "dilations", "0x3"], [0, 0], "expected keys like '1x3'"),
        (["convs", NAME, "dilations", "2x1025"], [0, 0], "expected keys like '1x3'"),
        (["convs", NAME, "dilations", "02x3"], [0, 0], "expected keys like '1x3'"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path, path, value, words):
    file = tmp_path / "costs.json"
    file.write_text(json.dumps(with_change(path, value)))
    with pytest.raises(SearchError, match=words) as error:
        CostTable.load(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": 1, "format": 1}', "null"])
def test_what_is_no_table_is_refused(tmp_path, text):
    file = tmp_path / "costs.json"
    file.write_text(text)
    with pytest.raises(SearchError, match=str(file)):
        CostTable.load(file)


def test_a_key_that_appears_twice_is_refused(tmp_path):
    file = tmp_path / "costs.json"
    file.write_text(json.dumps(TABLE.to_dict()).replace('"batch": 2', '"batch": 2, "batch": 3'))
    with pytest.raises(SearchError, match="'batch' appears twice"):
        CostTable.load(file)


# --- measuring --------------------------------------------------------------------------------------------------------


@given(st.floats(0, 1e-2), st.floats(1e-7, 1e-2))
def test_the_fit_recovers_a_line(a, b):
    found = fit_line({n: a + b * n for n in (8, 16, 32, 64)})
    assert found == pytest.approx((a, b), rel=1e-6, abs=1e-9)


@given(st.dictionaries(st.integers(1, 64), st.floats(1e-6, 1), min_size=1))
def test_the_fit_is_the_best_line_through_the_last_point(seconds):
    a, b = fit_line(seconds)
    whole = max(seconds)
    assert a >= 0
    assert b >= 0
    assert a + b * whole == pytest.approx(seconds[whole])

    def error(slope):
        return sum((seconds[whole] - slope * (whole - n) - t) ** 2 for n, t in seconds.items())

    steepest = seconds[whole] / whole
    assert all(error(b) <= error(steepest * i / 50) * (1 + 1e-9) + 1e-15 for i in range(51))


def measure(name, space="A", size=64, **options):
    with torch.device("meta"):
        body = timm.create_model(name)
    return profile(body, searched_convs(body, SPACES[space]), size, repeats=2, warmup=0, **options), body


def test_profile_of_a_resnet(tmp_path):
    table, body = measure("test_resnet", "C", size=(64, 96), batch=2)
    convs = searched_convs(body, SPACES["C"])
    assert list(table.convs) == list(convs)
    for name, cost in table.convs.items():
        assert tuple(cost.dilations) == convs[name]
        assert cost.channels == body.get_submodule(name).out_channels
        assert cost.plain > 0
        assert cost.join > 0
        assert all(a >= 0 and b >= 0 and a + b > 0 for a, b in cost.dilations.values())
        assert table.relative(name, {(1, 1): cost.channels}) == pytest.approx(1)
    assert (table.architecture, table.size, table.batch) == ("test_resnet", (64, 96), 2)
    assert (table.dtype, table.memory_format) == ("float32", "contiguous")
    assert table.threads == torch.get_num_threads()
    assert table.torch == torch.__version__
    table.save(tmp_path / "costs.json")
    assert CostTable.load(tmp_path / "costs.json") == table
    assert all(name in str(table) for name in convs)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("regnety_002", {"dtype": "bfloat16", "memory_format": "channels_last"}),  # grouped
        ("test_efficientnet", {}),  # depthwise
        ("tf_efficientnet_b0", {}),  # depthwise, Conv2dSame
        ("test_convnext", {}),  # 7x7, with a bias
        ("resnext50_32x4d", {}),
    ],
)
def test_profile_of_other_networks(name, options):
    table, body = measure(name, **options)
    assert set(table.convs) == set(searched_convs(body, SPACES["A"]))
    for conv, cost in table.convs.items():
        assert table.relative(conv, {(1, 1): cost.channels}) == pytest.approx(1)


def test_profile_of_a_feature_network_on_the_cpu():
    body = timm.create_model("test_resnet", features_only=True, out_indices=(1, 2)).train()
    before = {key: value.clone() for key, value in body.state_dict().items()}
    table = profile(body, {"layer2.0.conv2": [(2, 2)]}, 64, repeats=1, warmup=0)
    assert tuple(table.convs["layer2.0.conv2"].dilations) == ((1, 1), (2, 2))
    assert table.architecture == "test_resnet"
    assert body.training
    assert not any(module._forward_pre_hooks for module in body.modules())
    assert all(torch.equal(value, before[key]) for key, value in body.state_dict().items())


def test_equal_convolutions_are_measured_once():
    table, _ = measure("resnet18", size=32)
    assert table.convs["layer3.0.conv2"] is table.convs["layer3.1.conv2"]
    assert table.convs["layer3.0.conv2"] != table.convs["layer2.0.conv2"]


class OneOfTwo(nn.Module):
    """Two convolutions, one of which nothing comes through."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.used(x)


class Other(nn.Conv2d):
    """A convolution of a class of its own, which can not be regrouped."""


def test_what_can_not_be_measured_is_refused():
    dilations = [(2, 2)]
    for convs, options, error, words in [
        ({"nowhere": dilations}, {}, SearchError, "nowhere: the network has no convolution of this name"),
        ({"unused": dilations}, {}, SearchError, "unused: no image comes through it"),
        ({}, {}, SearchError, "convs: expected at least one"),
        ({"used": dilations}, {"batch": 0}, SearchError, "batch: expected at least 1, found 0"),
        ({"used": dilations}, {"repeats": 0}, SearchError, "repeats: expected at least 1"),
        ({"used": dilations}, {"size": (16, 0)}, SearchError, "size: expected at least 1, found 0"),
        ({"used": dilations}, {"size": 1}, SearchError, "size: the network takes no images of 1 x 1"),
        ({"used": dilations}, {"device": "abacus"}, SearchError, "device: abacus: "),
    ]:
        with pytest.raises(error, match=words) as found:
            profile(OneOfTwo(), convs, **{"size": 16, "repeats": 1, **options})
        assert "\n" not in str(found.value)
    with pytest.raises(GenotypeError, match="Other can not be regrouped"):
        profile(nn.Sequential(Other(3, 4, 3)), {"0": dilations}, 16, repeats=1)


def test_joining_costs_what_a_regrouped_convolution_does_beside_convolving():
    from nats_zoo.search.choosing import profile as module

    conv = RegroupedConv2d(6, 8, 3, padding=1, runs=[(2, 1, 1), (2, 2, 2), (2, 1, 1), (2, 2, 2)])
    images = torch.randn(2, 6, 9, 9)
    with torch.no_grad():
        expected = conv(images)
        outputs = {
            (d, d): nn.functional.conv2d(images, conv.weight[rows], conv.bias[rows], padding=d, dilation=d)
            for d, rows in ((1, [0, 1, 4, 5]), (2, [2, 3, 6, 7]))
        }
        assert torch.allclose(module._Join(conv, outputs)(images), expected, atol=1e-5)
