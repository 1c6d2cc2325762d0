"""Genotype: plain data that survives a round trip, and a reader that refuses everything else."""

import copy
import hashlib
import itertools
import json
import pickle
import random
import resource
from dataclasses import FrozenInstanceError

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nats_zoo.base.errors import GenotypeError, NatsError
from nats_zoo.folders.find_genotype import find_genotype
from nats_zoo.genotype.catalogue import DEFAULT_GENOTYPES, GENOTYPE_DIR, published_genotypes
from nats_zoo.genotype.genotype import MAX_DEPTH, MAX_FILE_BYTES, Genotype
from nats_zoo.genotype.runs import Run, Runs
from nats_zoo.networks.transform import transform

CONV = "layer2.0.conv2"
GOOD = {
    "format": 1,
    "architecture": "resnet50",
    "convs": {CONV: [[80, 1, 1], [32, 3, 3], [16, 1, 3]], "layer3.0.conv2": [[128, 1, 1], [64, 2, 2], [64, 1, 1]]},
    "gains": {CONV: [1.0, 0.93, 1.1]},
    "provenance": {"method": "mixture", "space": "C", "groups": 16, "metrics": {"AP": 38.4}, "note": None},
}


def good(**changes):
    return copy.deepcopy(GOOD) | changes


def with_runs(runs):
    return good(convs={CONV: runs}, gains={})


def with_gains(gains):
    return good(gains={CONV: gains})


def write(tmp_path, content):
    path = tmp_path / "mine.json"
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)
    return path


# --- round trip -------------------------------------------------------------------------------------------------------

names = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1, max_size=12)
architectures = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,11}", fullmatch=True)
runs = st.lists(st.tuples(st.integers(1, 4096), st.integers(1, 64), st.integers(1, 64)), min_size=1, max_size=5)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=8,
)


@st.composite
def genotypes(draw):
    convs = draw(st.dictionaries(names, runs, max_size=4))
    with_gains = draw(st.sets(st.sampled_from(sorted(convs)))) if convs else set()
    finite = st.floats(allow_nan=False, allow_infinity=False)
    gains = {name: draw(st.lists(finite, min_size=len(convs[name]), max_size=len(convs[name]))) for name in with_gains}
    return Genotype(draw(architectures), convs, gains, draw(st.dictionaries(names, json_values, max_size=3)))


@settings(max_examples=50)
@given(genotype=genotypes())
def test_file_round_trip(genotype, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "round_trip.json"
    genotype.save(path)
    loaded = Genotype.load(path)
    assert loaded == genotype
    assert hash(loaded) == hash(genotype)
    assert loaded.to_dict() == genotype.to_dict() == json.loads(path.read_text())
    assert Genotype.from_dict(genotype.to_dict()) == genotype


def test_reads_the_documented_form():
    genotype = Genotype.from_dict(GOOD)
    assert genotype.architecture == "resnet50"
    assert genotype.convs[CONV] == (Run(80, 1, 1), Run(32, 3, 3), Run(16, 1, 3))
    assert genotype.gains == {CONV: (1.0, 0.93, 1.1)}
    assert genotype.provenance["metrics"] == {"AP": 38.4}
    assert genotype.to_dict() == GOOD


def test_file_has_one_line_per_convolution(tmp_path):
    Genotype.from_dict(GOOD).save(tmp_path / "mine.json")
    lines = (tmp_path / "mine.json").read_text().splitlines()
    assert f'    "{CONV}": [[80, 1, 1], [32, 3, 3], [16, 1, 3]],' in lines


def test_equality_sees_everything_but_the_source():
    genotype = Genotype.from_dict(GOOD, source="one")
    assert genotype == Genotype.from_dict(GOOD, source="two")
    reordered = good(convs=dict(reversed(GOOD["convs"].items())))
    assert genotype == Genotype.from_dict(reordered)
    assert hash(genotype) == hash(Genotype.from_dict(reordered))
    others = [
        good(architecture="resnet101"),
        good(convs=GOOD["convs"] | {CONV: [[80, 1, 1], [32, 3, 3], [16, 3, 1]]}),
        with_gains([1.0, 0.93, 1.2]),
        good(provenance={"method": "random"}),
    ]
    for other in others:
        assert genotype != Genotype.from_dict(other)


def test_is_frozen_and_shares_nothing_with_its_input():
    data = good()
    genotype = Genotype.from_dict(data)
    data["convs"][CONV].append([1, 9, 9])
    data["provenance"]["metrics"]["AP"] = 0
    genotype.to_dict()["provenance"]["metrics"]["AP"] = 0
    assert genotype.to_dict() == GOOD
    with pytest.raises(FrozenInstanceError):
        genotype.architecture = "resnet101"


# --- fingerprint, shares, table ---------------------------------------------------------------------------------------


def test_fingerprint_is_the_hash_of_the_computed_content():
    """Published weights carry it: it must never change for a given genotype."""
    text = '{"architecture": "resnet18", "convs": {"layer1.0.conv1": [[60, 1, 1], [4, 1, 3]]}, "format": 1}'
    genotype = Genotype("resnet18", {"layer1.0.conv1": [(60, 1, 1), (4, 1, 3)]})
    assert genotype.fingerprint() == hashlib.sha256(text.encode()).hexdigest()


def test_fingerprint_ignores_provenance_and_sees_runs_gains_and_architecture():
    fingerprint = Genotype.from_dict(GOOD).fingerprint()
    assert Genotype.from_dict(good(provenance={"note": "other"})).fingerprint() == fingerprint
    changed = [
        good(convs=GOOD["convs"] | {CONV: [[80, 1, 1], [32, 3, 3], [16, 3, 1]]}),
        good(convs=GOOD["convs"] | {CONV: [[79, 1, 1], [33, 3, 3], [16, 1, 3]]}),
        good(architecture="resnet101"),
        with_gains([1.0, 0.93, 1.2]),
        good(gains={}),
    ]
    assert len({Genotype.from_dict(data).fingerprint() for data in changed} | {fingerprint}) == len(changed) + 1


def test_dilation_shares_add_up_runs_of_one_dilation():
    shares = Genotype.from_dict(GOOD).dilation_shares()
    assert shares[CONV] == {(1, 1): 0.625, (3, 3): 0.25, (1, 3): 0.125}
    assert shares["layer3.0.conv2"] == {(1, 1): 0.75, (2, 2): 0.25}


@given(genotype=genotypes())
def test_shares_of_each_convolution_sum_to_one(genotype):
    for shares in genotype.dilation_shares().values():
        assert sum(shares.values()) == pytest.approx(1)
        assert all(share > 0 for share in shares.values())


def test_share_changed_counts_channels_whose_dilation_is_not_one():
    assert Genotype.from_dict(GOOD).share_changed() == (48 + 64) / (128 + 256)
    assert Genotype("resnet50", {}).share_changed() == 0


def test_str_is_a_table():
    lines = str(Genotype.from_dict(GOOD)).splitlines()
    assert lines[0] == "resnet50: 2 convolutions, 29% of channels changed"
    assert lines[1].split() == ["convolution", "channels", "1x1", "2x2", "3x3", "1x3"]
    assert lines[2].split() == [CONV, "128", "62%", ".", "25%", "12%"]


@given(st.lists(st.sampled_from([(1, 1), (3, 3), (1, 3)]), min_size=1, max_size=30))
def test_runs_from_channels_keeps_each_channels_dilation_in_the_fewest_runs(dilations):
    found = Runs.of(dilations)
    assert [run.dilation for run in found for _ in range(run.channels)] == dilations
    assert all(a.dilation != b.dilation for a, b in itertools.pairwise(found))


# --- strict reading ---------------------------------------------------------------------------------------------------

TEXT = json.dumps(GOOD)
# What is read, and what the message must say besides the file's name.
BAD_FILES = {
    "empty": ("", ["JSON"]),
    "prose": ("resnet50 with dilations", ["JSON"]),
    "python, not JSON": (repr(GOOD), ["JSON"]),
    "truncated": (TEXT[:-20], ["JSON"]),
    "something behind it": (TEXT + "]", ["JSON"]),
    "not UTF-8": (b"\xff\xfe" + TEXT.encode("utf-16-le"), ["UTF-8"]),
    "a pickle": (pickle.dumps(GOOD), ["JSON"]),
    "nested lists": ("[" * 100_000 + "]" * 100_000, ["nested"]),
    "nested objects": ('{"format":' * 100_000 + "1" + "}" * 100_000, ["nested"]),
    "nested provenance": ('{"provenance":' + "[" * 100_000 + "]" * 100_000 + "}", ["nested"]),
    "key twice": ('{"format": 1, ' + TEXT[1:], ["'format'", "twice"]),
    "convolution twice": (TEXT.replace('"layer3.0.conv2"', f'"{CONV}"', 1), [CONV, "twice"]),
    "integer of 5000 digits": (TEXT.replace("80", "9" * 5000), ["JSON"]),
    "a list": ("[]", ["object"]),
    "null": ("null", ["object"]),
    "NaN gain": (TEXT.replace("0.93", "NaN"), [CONV, "finite"]),
    "infinite gain": (TEXT.replace("0.93", "-Infinity"), [CONV, "finite"]),
    "gain beyond float": (TEXT.replace("0.93", "1e400"), [CONV, "finite"]),
    "NaN in provenance": (TEXT.replace("38.4", "NaN"), ["provenance"]),
}
BAD_DATA = {
    "unknown key": (good(weights="x"), ["'weights'"]),
    "no format": ({k: v for k, v in GOOD.items() if k != "format"}, ["'format'", "missing"]),
    "no architecture": ({k: v for k, v in GOOD.items() if k != "architecture"}, ["'architecture'", "missing"]),
    "no convs": ({k: v for k, v in GOOD.items() if k != "convs"}, ["'convs'", "missing"]),
    "unknown format": (good(format=2), ["format", "2"]),
    "format True": (good(format=True), ["format", "True"]),
    "format 1.0": (good(format=1.0), ["format", "1.0"]),
    "format as text": (good(format="1"), ["format", "'1'"]),
    "architecture as number": (good(architecture=50), ["architecture", "50"]),
    "empty architecture": (good(architecture=""), ["architecture"]),
    "line break in the architecture": (good(architecture="resnet50\nFAKE"), ["resnet50\\nFAKE"]),
    "half a character in the architecture": (good(architecture="\ud800"), ["architecture"]),
    "half a character in provenance": (good(provenance={"note": "\ud800"}), ["provenance"]),
    "convs as list": (good(convs=[]), ["convs", "list"]),
    "convs null": (good(convs=None), ["convs", "NoneType"]),
    "provenance as list": (good(provenance=[1]), ["provenance", "list"]),
    "gains as list": (good(gains=[1.0]), ["gains", "list"]),
    "line break in a name": (good(convs={"layer2\nFAKE": [[1, 1, 1]]}), ["layer2\\nFAKE"]),
    "no runs": (with_runs([]), [CONV]),
    "runs as object": (with_runs({"128": [1, 1]}), [CONV]),
    "runs as text": (with_runs("128,1,1"), [CONV]),
    "run of two": (with_runs([[128, 1]]), [CONV, "[128, 1]"]),
    "run of four": (with_runs([[128, 1, 1, 1]]), [CONV]),
    "run as number": (with_runs([128]), [CONV]),
    "no channels": (with_runs([[0, 1, 1], [128, 1, 1]]), [CONV, "positive"]),
    "negative channels": (with_runs([[-8, 1, 1], [136, 1, 1]]), [CONV, "positive"]),
    "dilation zero": (with_runs([[128, 0, 1]]), [CONV, "positive"]),
    "negative dilation": (with_runs([[128, 1, -3]]), [CONV, "positive"]),
    "float dilation": (with_runs([[128, 1.5, 1]]), [CONV, "integers"]),
    "whole float dilation": (with_runs([[128, 3.0, 1]]), [CONV, "integers"]),
    "float channels": (with_runs([[128.0, 1, 1]]), [CONV, "integers"]),
    "text dilation": (with_runs([[128, "3", 1]]), [CONV, "integers"]),
    "null dilation": (with_runs([[128, None, 1]]), [CONV, "integers"]),
    "True dilation": (with_runs([[128, True, 1]]), [CONV, "integers"]),
    "True channels": (with_runs([[True, 1, 1], [127, 1, 1]]), [CONV, "integers"]),
    "enormous dilation": (with_runs([[128, 10**400, 1]]), [CONV, "at most"]),
    "enormous channels": (with_runs([[10**400, 1, 1]]), [CONV, "at most"]),
    "gains for another convolution": (good(gains={"layer9": [1.0]}), ["layer9"]),
    "too few gains": (with_gains([1.0, 1.0]), [CONV, "3 gains"]),
    "gains as number": (with_gains(1.0), [CONV, "3 gains"]),
    "True gain": (with_gains([1.0, True, 1.0]), [CONV, "True"]),
    "text gain": (with_gains([1.0, "1", 1.0]), [CONV, "'1'"]),
    "null gain": (with_gains([1.0, None, 1.0]), [CONV, "None"]),
    "enormous gain": (with_gains([1.0, 10**400, 1.0]), [CONV, "finite"]),
}


def assert_refused(error, path, words):
    message = str(error.value)
    assert isinstance(error.value, NatsError)
    assert len(message.splitlines()) == 1
    assert len(message) < 400
    for word in [str(path), *words]:
        assert word in message


@pytest.mark.parametrize(("content", "words"), BAD_FILES.values(), ids=BAD_FILES)
def test_refuses_bad_file(content, words, tmp_path):
    path = write(tmp_path, content)
    with pytest.raises(GenotypeError) as error:
        Genotype.load(path)
    assert_refused(error, path, words)


@pytest.mark.parametrize(("data", "words"), BAD_DATA.values(), ids=BAD_DATA)
def test_refuses_bad_data(data, words, tmp_path):
    path = write(tmp_path, json.dumps(data))
    with pytest.raises(GenotypeError) as error:
        Genotype.load(path)
    assert_refused(error, path, words)


def test_the_unspoilt_file_is_read(tmp_path):
    assert Genotype.load(write(tmp_path, TEXT)) == Genotype.from_dict(GOOD)


def test_refuses_a_file_too_large_without_reading_all_of_it(tmp_path):
    path = write(tmp_path, TEXT)
    with path.open("r+b") as file:
        file.truncate(2**40)  # sparse: a terabyte of zeros that takes no space
    with pytest.raises(GenotypeError, match=str(MAX_FILE_BYTES)) as error:
        Genotype.load(path)
    assert_refused(error, path, ["large"])


def test_refuses_a_missing_file_and_a_folder(tmp_path):
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(GenotypeError) as error:
            Genotype.load(path)
        assert_refused(error, path, ["read"])


def test_a_pickle_is_not_executed(tmp_path):
    marker = tmp_path / "executed"

    class Touch:
        def __reduce__(self):
            return (type(marker).touch, (marker,))

    with pytest.raises(GenotypeError):
        Genotype.load(write(tmp_path, pickle.dumps(Touch())))
    assert not marker.exists()


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, object(), torch.tensor(1.0), b"bytes"])
def test_provenance_is_plain_data(value):
    with pytest.raises(GenotypeError, match="provenance"):
        Genotype("resnet50", {}, provenance={"metrics": {"AP": value}})


@pytest.mark.parametrize("as_object", [False, True], ids=["lists", "objects"])
def test_provenance_is_nested_so_deep_and_no_deeper(as_object, tmp_path):
    """What is read can be written again, also by a program that has gone deep itself."""
    opening, closing = ('{"a": ', "}") if as_object else ("[", "]")

    def nested(levels):
        value = opening * levels + "1" + closing * levels
        return write(tmp_path, f'{{"format": 1, "architecture": "a", "convs": {{}}, "provenance": {{"a": {value}}}}}')

    Genotype.load(nested(MAX_DEPTH - 1)).save(tmp_path / "again.json")
    for levels in (MAX_DEPTH, 500, 980, 5000):
        path = nested(levels)
        with pytest.raises(GenotypeError) as error:
            Genotype.load(path)
        assert_refused(error, path, ["nested"])


# --- fuzz -------------------------------------------------------------------------------------------------------------

BYTES = [bytes([i]) for i in range(256)] + [b"null", b"-1", b"1e999", b"NaN", b'"', b"{}", b"[[", b"\\ud800", b"9" * 40]
VALUES = [
    None, True, False, 0, -1, 1, 2, 64, 2**20, 2**20 + 1, 2**63, 10**400, 0.5, 1.0, 1e308, float("nan"), float("inf"),
    "", "1", "resnet50", CONV, "a\nb", "\x00", "\ud800", "é" * 500, [], {}, [[]], [1], [1, 1, 1], [[1, 1, 1]],
    [[128, 1, 1]], [1.0, 1.0, 1.0], {"": 1}, {"x\ny": [[1, 1, 1]]}, {CONV: [[1, 1, 1]]}, {"format": 1},
]  # fmt: skip


def mutate_bytes(content, rng):
    """One to three bytes or stretches changed, put in, taken out, doubled or moved."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        a, b = sorted((rng.randrange(len(content) + 1), rng.randrange(len(content) + 1)))
        b = min(b, a + 40)
        new = rng.choice(BYTES)
        content = rng.choice(
            [
                content[:a] + new + content[a + 1 :],
                content[:a] + new + content[a:],
                content[:a] + content[b:],
                content[:b] + content[a:],
                content[:a],
                content[b:] + content[:a],
            ]
        )
    return content


def places(value, path=()):
    """The path of every value within a JSON value."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def mutate_structure(data, rng):
    """One to three values replaced, removed, doubled, renamed or put in the place of another."""
    data = copy.deepcopy(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        *way, key = rng.choice([path for path in places(data) if path] or [("format",)])
        parent = data
        for step in way:
            parent = parent[step]
        new = copy.deepcopy(rng.choice([rng.choice(VALUES), data.get(rng.choice(list(GOOD)))]))
        kind = rng.randrange(4)
        if kind == 0:
            parent[key] = new
        elif kind == 1:
            del parent[key]
        elif isinstance(parent, list):
            parent.insert(key, parent[key] if kind == 2 else new)
        else:
            name = rng.choice(["", "convs", "gains", "a\nb", CONV, "layer3.0.conv2", "\ud800", str(key) * 3])
            parent[name] = parent.pop(key) if kind == 2 else new
    return data


def mutated_file(rng):
    if rng.random() < 0.5:
        return mutate_bytes(TEXT.encode(), rng)
    text = json.dumps(mutate_structure(GOOD, rng), ensure_ascii=rng.random() < 0.5)
    return text.encode(errors="surrogatepass")


def test_ten_thousand_mutated_files_are_read_or_refused(tmp_path):
    """And nothing else: no other exception, no genotype that can not be used and written again."""
    rng = random.Random(0)
    path, again = tmp_path / "mine.json", tmp_path / "again.json"
    read = []
    for _ in range(10_000):
        path.write_bytes(mutated_file(rng))
        try:
            genotype = Genotype.load(path)
        except GenotypeError as error:
            message = str(error)
            assert message.startswith(str(path))
            assert len(message.splitlines()) == 1
            continue
        read.append(genotype)
        genotype.save(again)
        assert Genotype.load(again) == Genotype.from_dict(genotype.to_dict()) == genotype
        assert f"{genotype}\n{genotype.provenance}".encode()
        assert all(len(shares) <= 2 for shares in genotype.merge(2).dilation_shares().values())
    assert 500 < len(read) < 9_500
    assert len({genotype.fingerprint() for genotype in read}) > 100


# --- writing ----------------------------------------------------------------------------------------------------------


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "mine.json"
    old = Genotype.from_dict(GOOD)
    old.save(path)
    new = Genotype("resnet50", {f"layer{i}": [(64, 1, 1)] for i in range(1000)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # the disk is full after one block
    try:
        with pytest.raises(OSError):
            new.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert Genotype.load(path) == old
    assert list(tmp_path.iterdir()) == [path]
    new.save(path)
    assert Genotype.load(path) == new


# --- Inception Convolution's pattern files ----------------------------------------------------------------------------

IC_KEYS = [f"({h}, {w})" for h in range(4) for w in range(4)]
R50_WIDTHS = [64] * 3 + [128] * 4 + [256] * 6 + [512] * 3
R50_CONVS = [f"layer{s}.{b}.conv2" for s, n in ((1, 3), (2, 4), (3, 6), (4, 3)) for b in range(n)]


def ic_patterns():
    """16 patterns with all keys present, as the published files have them; two of the keys used per convolution."""
    patterns = []
    for index, width in enumerate(R50_WIDTHS):
        counts = dict.fromkeys(IC_KEYS, 0)
        counts[IC_KEYS[index]] = width - 24
        counts[IC_KEYS[(index + 5) % 16]] += 24
        patterns.append(counts)
    return patterns


def test_from_ic_conv_names_the_stages_3x3_convolutions_in_order(tmp_path):
    genotype = Genotype.from_ic_conv(write(tmp_path, json.dumps(ic_patterns())), "resnet50")
    assert list(genotype.convs) == R50_CONVS
    assert genotype.architecture == "resnet50"
    assert genotype.convs["layer1.0.conv2"] == (Run(40, 1, 1), Run(24, 2, 2))
    # key 3 is (0, 3), key 8 is (2, 0): dilation is one more, height first
    assert genotype.convs["layer2.0.conv2"] == (Run(104, 1, 4), Run(24, 3, 1))
    # key 15 is (3, 3), key 4 is (1, 0), which the file lists earlier
    assert genotype.convs["layer4.2.conv2"] == (Run(24, 2, 1), Run(488, 4, 4))


def test_from_ic_conv_fits_its_network(tmp_path):
    genotype = Genotype.from_ic_conv(write(tmp_path, json.dumps(ic_patterns())), "resnet50")
    with torch.device("meta"):
        model = transform(timm.create_model("resnet50"), genotype)
    assert model.get_submodule("layer2.0.conv2").runs == genotype.convs["layer2.0.conv2"]


def test_from_ic_conv_counts_cardinality_groups_in_grouped_convolutions(tmp_path):
    """As the published pattern file of ResNeXt-101 32x4d does: 33 patterns that each add up to 32."""
    patterns = [{"(0, 0)": 19, "(0, 1)": 1, "(1, 0)": 0, "(3, 2)": 12}] * 33
    path = write(tmp_path, json.dumps(patterns))
    genotype = Genotype.from_ic_conv(path, "resnext101_32x4d")
    assert genotype.convs["layer1.0.conv2"] == (Run(76, 1, 1), Run(4, 1, 2), Run(48, 4, 3))
    assert genotype.convs["layer4.2.conv2"] == (Run(608, 1, 1), Run(32, 1, 2), Run(384, 4, 3))
    with torch.device("meta"):
        transform(timm.create_model("resnext101_32x4d"), genotype)
    path = write(tmp_path, json.dumps([{"(0, 0)": 31}] * 33))
    with pytest.raises(GenotypeError) as error:
        Genotype.from_ic_conv(path, "resnext101_32x4d")
    assert_refused(error, path, ["layer1.0.conv2", "31", "128 channels or 32 groups"])


def with_pattern(index, pattern):
    patterns = ic_patterns()
    patterns[index] = pattern
    return patterns


BAD_PATTERNS = {
    "one too few": (ic_patterns()[:-1], ["16 patterns", "found 15"]),
    "an object": ({"layer1": {}}, ["16 patterns", "dict"]),
    "pattern as list": (with_pattern(3, [128]), ["layer2.0.conv2", "list"]),
    "wrong sum": (with_pattern(3, {"(0, 0)": 127}), ["layer2.0.conv2", "127", "128"]),
    "no channels at all": (with_pattern(3, {"(0, 0)": 0}), ["layer2.0.conv2", "128"]),
    "True channels": (with_pattern(3, {"(0, 0)": True, "(0, 1)": 127}), ["layer2.0.conv2", "True"]),
    "False channels": (with_pattern(3, {"(0, 0)": 128, "(0, 1)": False}), ["layer2.0.conv2", "False"]),
    "float channels": (with_pattern(3, {"(0, 0)": 128.0}), ["layer2.0.conv2", "128.0"]),
    "negative key": (with_pattern(3, {"(-1, 0)": 128}), ["layer2.0.conv2", "(-1, 0)"]),
    "one number": (with_pattern(3, {"(1)": 128}), ["layer2.0.conv2", "'(1)'"]),
    "code as key": (with_pattern(3, {"__import__('os').getcwd()": 128}), ["layer2.0.conv2"]),
    "set as key": (with_pattern(3, {"{[]: 1}": 128}), ["layer2.0.conv2"]),
}


@pytest.mark.parametrize(("patterns", "words"), BAD_PATTERNS.values(), ids=BAD_PATTERNS)
def test_from_ic_conv_refuses(patterns, words, tmp_path):
    path = write(tmp_path, json.dumps(patterns))
    with pytest.raises(GenotypeError) as error:
        Genotype.from_ic_conv(path, "resnet50")
    assert_refused(error, path, words)


def test_from_ic_conv_refuses_an_unknown_architecture(tmp_path):
    path = write(tmp_path, json.dumps(ic_patterns()))
    with pytest.raises(GenotypeError) as error:
        Genotype.from_ic_conv(path, "resnet5000")
    assert_refused(error, path, ["resnet5000"])


# --- what users pass as genotype= -------------------------------------------------------------------------------------


def test_resolve_takes_all_forms(tmp_path):
    genotype = Genotype.from_dict(GOOD)
    path = write(tmp_path, TEXT)
    for form in (genotype, GOOD, path, str(path)):
        assert find_genotype(form) == genotype


@pytest.mark.parametrize("form", [3, None, ["mine.json"], "no_such_genotype", "", "no\0file"])
def test_resolve_refuses(form):
    with pytest.raises(GenotypeError):
        find_genotype(form)


def test_published_names_are_the_packages_files():
    assert published_genotypes() == sorted(path.stem for path in GENOTYPE_DIR.glob("*.json"))
    assert set(DEFAULT_GENOTYPES.values()) <= set(published_genotypes())


def test_published_genotypes_fit_their_networks_and_say_where_they_come_from():
    for name in published_genotypes():
        genotype = find_genotype(name)
        assert genotype.provenance.get("method"), name
        with torch.device("meta"):
            transform(timm.create_model(genotype.architecture), genotype)
