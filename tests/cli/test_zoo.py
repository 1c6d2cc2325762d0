"""`nats list`, `nats show`, `nats erf` and `nats export`: what they print, and the files that they leave."""

import json
import re
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf
from timm.utils import reparameterize_model

from nats_zoo import Genotype
from nats_zoo.base.text import TABLE_WIDTH
from nats_zoo.cli import commands as cli
from nats_zoo.folders.find_genotype import find_genotype
from nats_zoo.genotype.catalogue import DEFAULT_GENOTYPES
from nats_zoo.genotype.provenance import origin
from nats_zoo.models.zoo import list_zoo
from nats_zoo.networks.erf import erf_radius, plain_and_nats_fields
from nats_zoo.networks.export import BEST_FORMS, choose_form
from tests.support.marks import needs_onnx

GENOTYPE = Genotype(
    "test_resnet",
    {"layer2.0.conv2": [(16, 1, 1), (32, 1, 3)]},
    provenance={"method": "mixture", "space": "C", "note": "a word " * 40, "metrics": {"entropy": 0.5}},
)


@pytest.fixture(scope="module")
def origin_folder(tmp_path_factory):
    """A genotype and weights of timm's smallest ResNet."""
    folder = tmp_path_factory.mktemp("origin")
    GENOTYPE.save(folder / "mine.json")
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3, zero_init_last=False)
    save_for_hf(model, folder / "weights", safe_serialization=True)
    return folder


@pytest.fixture
def home(origin_folder, tmp_path, monkeypatch):
    folder = tmp_path / "home"
    shutil.copytree(origin_folder, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def say(capfd):
    """`say(*arguments)`: run the command, which must succeed, and return what it printed."""

    def say(*arguments):
        code = cli.main(list(arguments))
        printed, errors = capfd.readouterr()
        assert (code, errors) == (0, "")
        return printed

    return say


# --- list -------------------------------------------------------------------------------------------------------------


def test_the_list_names_every_variant_and_how_its_genotype_was_found(say):
    lines = say("list").splitlines()
    assert max(map(len, lines)) <= TABLE_WIDTH
    table, tags = lines[: lines.index("")], lines[lines.index("") :]
    for variant in timm.list_models("nats_*"):
        [row] = [line for line in table if line.startswith(f"{variant} ")]
        architecture = variant.removeprefix("nats_")
        if architecture not in DEFAULT_GENOTYPES:
            assert row.endswith("takes architecture= and a")  # and goes on below
            continue
        genotype = find_genotype(DEFAULT_GENOTYPES[architecture])
        assert DEFAULT_GENOTYPES[architecture] in row
        assert f" {genotype.share_changed():.0%} " in row
        assert ("not searched: transferred from" in row) == (genotype.provenance["method"] == "transfer")
        assert ("searched: mixture" in row) == (genotype.provenance["method"] == "mixture")
    assert any(re.match(r"nats_resnet50 +tv_in1k, a1_in1k", line) for line in tags)


def test_the_list_as_json(say):
    entries = {entry["variant"]: entry for entry in json.loads(say("list", "--json"))}
    assert set(entries) == set(timm.list_models("nats_*"))
    for architecture, name in DEFAULT_GENOTYPES.items():
        entry, genotype = entries[f"nats_{architecture}"], find_genotype(name)
        assert entry["default_genotype"] == name
        assert entry["provenance"] == genotype.provenance
        assert entry["searched"] == (genotype.provenance["method"] != "transfer")
        assert entry["convolutions"] == len(genotype.convs)
        found = timm.list_models(f"nats_{architecture}", pretrained=True)
        assert {f"nats_{architecture}.{tag}" for tag in entry["tags"]} == set(found)
        assert entry["tags"][0] == entry["default_tag"] == timm.get_pretrained_cfg(f"nats_{architecture}").tag


def test_variants_without_a_default_come_last():
    has_default = [entry.genotype is not None for entry in list_zoo()]
    assert has_default == sorted(has_default, reverse=True)


@pytest.mark.parametrize(
    ("provenance", "words"),
    [
        ({}, "origin not stated"),
        ({"method": "by hand", "groups": 4}, "by hand, 4 groups"),
        ({"method": "random", "space": "C", "groups": 4, "seed": 2}, "not searched: random, space C, 4 groups, seed 2"),
        ({"method": "uniform", "dilation": "1x3", "space": "C"}, "not searched: uniform 1x3, space C"),
        ({"method": "shares", "channels_per_group": 8}, "not searched: given shares, groups of 8 channels"),
        (
            {"method": "shuffled", "seed": 1, "source_provenance": {"method": "sampled", "space": "A"}},
            "not searched: shuffled, seed 1, from (searched: sampled, space A)",
        ),
        ({"method": "shuffled", "seed": 1}, "not searched: shuffled, seed 1, from (another genotype)"),
        ({"method": "sampled", "space": "B", "dataset": "a\n b"}, "searched: sampled, space B; dataset: a b"),
        ({"method": "transfer", "source_architecture": "resnet50"}, "not searched: transferred from resnet50"),
        ({"method": "transfer", "source_genotype": "mine"}, "not searched: transferred from mine"),
        (
            {"method": "mixture", "merged": {"max_dilations": 2}},
            "searched: mixture; merged to at most 2 dilations",
        ),
    ],
)
def test_origins_in_words(provenance, words):
    assert origin(provenance) == words


# --- show -------------------------------------------------------------------------------------------------------------


def test_show_prints_the_table_and_provenance_and_draws_the_chart(home, say):
    printed = say("show", "mine.json")
    assert printed.startswith(str(GENOTYPE))
    assert printed.endswith("chart: mine.png\n")
    assert "\nmethod: mixture\nspace: C\n" in printed
    assert "\nmetrics:\n  entropy: 0.5\n" in printed
    assert max(map(len, printed.splitlines())) <= TABLE_WIDTH
    assert Image.open(home / "mine.png").format == "PNG"
    assert "chart: other.png" in say("show", "mine.json", "--output", "other.png")
    assert (home / "other.png").read_bytes() == (home / "mine.png").read_bytes()


def test_show_takes_variants_and_tells_what_they_are_transferred_from(home, say):
    printed = say("show", "nats_resnet34")
    assert printed.endswith(f"chart: {DEFAULT_GENOTYPES['resnet34']}.png\n")
    assert f"source_genotype: {DEFAULT_GENOTYPES['resnet18']}" in printed
    assert "source_provenance:\n  method: mixture" in printed


# --- erf --------------------------------------------------------------------------------------------------------------


def test_erf_prints_what_it_measured_and_draws_it(home, say):
    printed = say("erf", "test_resnet", "--genotype", "mine.json", "--weights", "weights", "--size", "128")
    network = timm.create_model("nats_any", architecture="test_resnet", genotype=GENOTYPE, features_only=True)
    network.load_state_dict(timm.create_model("local-dir:weights", pretrained=True, features_only=True).state_dict())
    plain, nats = (erf_radius(field) for field in plain_and_nats_fields(network, 128))
    assert printed.splitlines() == [
        "Effective receptive field of test_resnet, stage 4, in 128 x 128 pixels; weights: weights",
        f"plain: {plain}",
        f"NATS: mine: {nats}",
        "picture: erf.png",
    ]
    assert nats.width > plain.width
    assert np.asarray(Image.open(home / "erf.png")).std() > 10


def test_erf_of_random_weights_says_so_and_follows_the_seed(home, say):
    arguments = ["erf", "test_resnet", "--genotype", "mine.json", "--size", "96", "--stage", "3"]
    first = say(*arguments, "--output", "a.png")
    assert "weights: random, seed 0" in first
    assert say(*arguments, "--output", "b.png").splitlines()[:-1] == first.splitlines()[:-1]
    assert "seed 1" in say(*arguments, "--seed", "1", "--output", "c.png")
    pictures = [(home / f"{name}.png").read_bytes() for name in "abc"]
    assert pictures[0] == pictures[1] != pictures[2]


# --- export -----------------------------------------------------------------------------------------------------------

EXPORT = ["export", "test_resnet", "--genotype", "mine.json", "--weights", "weights", "--size", "64"]


@torch.no_grad()
@pytest.mark.parametrize("options", [[], ["--deploy"], ["--outputs", "logits"]])
def test_export_writes_what_the_network_gives(options, home, say):
    printed = say(*EXPORT, "--format", "torch", *options)
    outputs = "logits" if "logits" in options else "stride4, stride8, stride16, stride32"
    assert re.search(rf"^test_resnet\.pt2: \d\.\d MB, images -> {outputs}$", printed, re.MULTILINE)
    assert "less mean [0.5, 0.5, 0.5], divided by std [0.5, 0.5, 0.5]" in printed
    assert re.search(r"^checked on 2x3x64x64 and 1x3x96x128: off by at most", printed, re.MULTILINE)
    model = timm.create_model("nats_any", architecture="test_resnet", genotype=GENOTYPE, num_classes=3)
    model.load_state_dict(timm.create_model("local-dir:weights", pretrained=True).state_dict())
    assert "takes any batch, and heights and widths in multiples of 32 from 64 pixels" in printed
    images = torch.randn(1, 3, 96, 64)
    found = torch.export.load(home / "test_resnet.pt2").module()(images)
    if "logits" in options:
        torch.testing.assert_close(found, model.eval()(images))
    else:
        torch.testing.assert_close(found[-1], model.eval().forward_features(images), rtol=1e-3, atol=1e-4)


@needs_onnx
def test_export_to_onnx_and_torchscript(home, say):
    pytest.importorskip("onnxscript")
    assert "checked on 1x3x64x96" in say(*EXPORT[:-1], "[64, 96]", "--fixed", "--output", "m.onnx")
    assert "checked on 2x3x64x64" in say(*EXPORT, "--format", "torchscript")
    assert {path.name for path in home.iterdir()} == {"mine.json", "weights", "m.onnx", "test_resnet.pt"}


def test_the_suffix_of_the_output_tells_the_format(home, say):
    for name, load in (("m.pt2", torch.export.load), ("m.pt", torch.jit.load)):
        say(*EXPORT, "--output", name)
        load(home / name)
    say(*EXPORT, "--format", "torchscript", "--output", "m.bin")
    torch.jit.load(home / "m.bin")


@needs_onnx
@torch.no_grad()
def test_deployment_form_has_no_batch_norm(home, say):
    import onnx

    for options in ([], ["--deploy"]):
        say(*EXPORT, "--fixed", *options, "--output", f"{len(options)}.onnx")
    plain, deployed = (onnx.load(home / f"{n}.onnx") for n in (0, 1))
    assert len(deployed.graph.node) < len(plain.graph.node)
    body = timm.create_model("nats_any", architecture="test_resnet", genotype=GENOTYPE, features_only=True).eval()
    assert not any("bn" in name for name in reparameterize_model(body).layer2.state_dict())


@torch.no_grad()
def test_export_for_a_runtime_chooses_the_form(home, say):
    say(*EXPORT, "--for", "torch")
    assert not any("layer2.0.bn" in name for name in torch.export.load(home / "test_resnet.pt2").state_dict)
    say(*EXPORT, "--for", "torch", "--deploy", "false")
    assert any("layer2.0.bn" in name for name in torch.export.load(home / "test_resnet.pt2").state_dict)
    assert [choose_form(runtime, "auto", None)[0] for runtime in BEST_FORMS] == ["onnx", "onnx", "torch"]
    assert choose_form(None, "torchscript", None) == ("torchscript", "as it is")


# --- transfer and merge -----------------------------------------------------------------------------------------------


def test_transfer_and_merge_write_what_the_genotype_gives(home, say):
    printed = say("transfer", "mine.json", "resnet18", "--output", "deeper.json")
    assert Genotype.load(home / "deeper.json") == Genotype.load("mine.json").transfer("resnet18")
    assert "resnet18: " in printed
    assert "genotype: deeper.json" in printed
    say("merge", "mine.json", "-k", "1")
    assert Genotype.load(home / "mine_k1.json") == Genotype.load("mine.json").merge(1) != Genotype.load("mine.json")
    say("merge", "mine.json", "--max_dilations", "9", "--output", "same.json")
    assert Genotype.load(home / "same.json") == Genotype.load("mine.json")


# --- bad input --------------------------------------------------------------------------------------------------------

REFUSED = {
    "no such genotype": (["show", "nowhere.json"], r"nowhere\.json: no published genotype"),
    "plain model": (["show", "weights"], "weights: a plain network"),
    "no such folder for the chart": (["show", "mine.json", "--output", "no/x.png"], "output: no/x.png: there is no"),
    "folder in the chart's place": (["show", "mine.json", "--output", "weights"], "output: weights: expected a file"),
    "no such model": (["erf", "resnet19"], "resnet19: timm has no such model"),
    "no genotype": (["erf", "test_resnet"], "test_resnet has no default genotype, give one with --genotype"),
    "another's genotype": (["erf", "resnet18", "--genotype", "mine.json"], "is for the architecture 'test_resnet'"),
    "no pixels": (["erf", "nats_resnet18", "--size", "0"], "size: expected 1 pixel or more"),
    "no such stage": (["erf", "nats_resnet18", "--stage", "6"], "not of 6"),
    "weights of another": (["erf", "nats_resnet18", "--weights", "weights"], "weights of another network"),
    "no weights": (["export", "nats_resnet18"], "weights: nats_resnet18 is a name, expected pretrained, random, or"),
    "no such format": ([*EXPORT, "--format", "tflite"], '"format"'),
    "no format's suffix": (
        [*EXPORT, "--output", "m.bin"],
        "expected a suffix that tells the format, .onnx",
    ),
    "no such runtime": ([*EXPORT, "--for", "tflite"], '"for"'),
    "another runtime's format": (
        [*EXPORT, "--for", "openvino", "--output", "m.pt2"],
        r"for: openvino is served best by \.onnx files, found the format 'torch'",
    ),
    "transfer to nothing": (["transfer", "mine.json", "resnet19"], "mine.json: timm has no model 'resnet19'"),
    "merge to none": (["merge", "mine.json", "-k", "0"], r"mine\.json: max_dilations must be a positive integer"),
    "merge without a number": (["merge", "mine.json"], "max_dilations"),
    "small": ([*EXPORT[:-1], "32"], "size: expected at least 64 pixels"),
    "size of three": ([*EXPORT[:-1], "[64, 64, 64]"], '"size"'),
    "no flag": ([*EXPORT, "--deploy", "perhaps"], '"deploy"'),
    "fixed trace": ([*EXPORT, "--format", "torchscript", "--fixed"], "fixed: a TorchScript trace"),
    "no such output": ([*EXPORT, "--output", "no/m.onnx"], "output: no/m.onnx: there is no folder no"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_line(case, home, capfd):
    arguments, words = REFUSED[case]
    before = sorted(home.rglob("*"))
    assert cli.main(arguments) == 2
    printed, errors = capfd.readouterr()
    assert printed == ""
    assert errors.startswith("nats: ")
    assert len(errors.splitlines()) == 1
    assert re.search(words, errors)
    assert sorted(home.rglob("*")) == before
