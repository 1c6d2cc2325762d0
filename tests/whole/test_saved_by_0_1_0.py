"""What version 0.1.0 saved: it loads, gives the same outputs, and its runs go on. See saved_by_0_1_0/write.py.

Outputs of whole numbers, which no processor rounds, are equal bit for bit. Others are equal up to rounding, and bit for
bit too where this machine computes as the one did that wrote them.
"""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

import nats_zoo
from nats_zoo import Genotype, cli, detection
from tests.whole.saved_by_0_1_0.write import (
    RESNET10T,
    RESNET18,
    SEARCH,
    TINY,
    TRAIN,
    digest,
    environment,
    genotypes,
    outputs,
    probe,
)

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_accelerate")

SAVED = Path(__file__).parent / "saved_by_0_1_0"
EXPECTED = load_file(SAVED / "expected.safetensors")
FACTS = json.loads((SAVED / "expected.json").read_text(encoding="utf-8"))
BACKBONES = {"variant": ("resnet18", RESNET18), "any": ("resnet10t", RESNET10T)}
GENOTYPES = {"genotype.json": TINY, "genotype/genotype.json": TINY, "variant": "resnet18", "any": "resnet10t"}


@pytest.fixture(scope="module")
def tolerance(one_thread):
    """None where bits must be equal, on a machine that computes as the one did on which 0.1.0 wrote."""
    same = environment() == FACTS["environment"] and torch.equal(probe(), EXPECTED["probe"])
    return {"rtol": 0, "atol": 0} if same else {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A working folder with a copy of everything: runs name their data and weights relative to it."""
    shutil.copytree(SAVED, tmp_path / "home", ignore=shutil.ignore_patterns("*.py", "__pycache__", "expected.*"))
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def expected(name):
    return {key.partition("/")[2]: tensor for key, tensor in EXPECTED.items() if key.startswith(f"{name}/")}


def images(name):
    return EXPECTED["whole numbers"].float() if name == "variant" else EXPECTED["image"][None] / 255


def check_close(found, name, tolerance):
    known = expected(name)
    for key, tensor in known.items():
        torch.testing.assert_close(found[key], tensor, **tolerance, msg=lambda text, key=key: f"{key}: {text}")
    assert known, "nothing to compare"


class PerChannel(nn.Module):
    """A plain convolution, computed channel by channel at the dilations of its runs."""

    def __init__(self, conv, convolve, runs, gains):
        super().__init__()
        self.conv, self.compute = conv, lambda x: convolve(conv, x, runs, gains)

    def forward(self, x):
        return self.compute(x)


@pytest.fixture(scope="module")
def per_channel(convolve_per_channel):
    """`per_channel(model, genotype, tensors)`: a plain network of timm with these weights, each channel by itself."""

    def build(model, genotype, tensors):
        model.load_state_dict(tensors)
        for name, runs in genotype["convs"].items():
            conv = PerChannel(model.get_submodule(name), convolve_per_channel, runs, genotype["gains"].get(name))
            model.set_submodule(name, conv)
        return model.eval()

    return build


@pytest.mark.parametrize("file", ["genotype.json", "genotype/genotype.json", "searched/genotype.json"])
def test_genotype_files_are_read_and_written_as_they_were(file, tmp_path):
    genotype = Genotype.load(SAVED / file)
    assert genotype.to_dict() == read(SAVED / file)
    genotype.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (SAVED / file).read_bytes()
    if file != "searched/genotype.json":
        assert genotype == genotypes()[TINY]


@pytest.mark.parametrize("name", ["genotype.json", "genotype", "variant", "any", "detector", "searched"])
def test_every_folder_shows_its_genotype(name, home, capsys):
    assert cli.main(["show", name, "--output", "chart.png"]) == 0
    known = (
        Genotype.load("searched/genotype.json") if name == "searched" else genotypes()[BACKBONES.get(name, (TINY,))[0]]
    )
    assert str(known) in capsys.readouterr().out


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_load(name, per_channel, tolerance):
    architecture, options = BACKBONES[name]
    model = nats_zoo.from_pretrained(SAVED / name).eval()
    assert model.genotype == genotypes()[architecture]
    assert digest(model.state_dict()) == FACTS["digests"][name]

    found = outputs(model, images(name))
    tensors = load_file(SAVED / name / "model.safetensors")
    oracle = per_channel(timm.create_model(architecture, **options), model.genotype.to_dict(), tensors)
    for key, tensor in outputs(oracle, images(name)).items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-5)
        assert name != "variant" or torch.equal(found[key], tensor), "these sums are exact in any order"
    exact = {"rtol": 0, "atol": 0}
    check_close(found, name, exact if name == "variant" else tolerance)


@pytest.mark.parametrize("name", BACKBONES)
def test_timm_loads_backbones(name):
    model = timm.create_model(f"local-dir:{SAVED / name}", pretrained=True)
    assert digest(model.state_dict()) == FACTS["digests"][name]


def test_detectors_load(per_channel, tolerance):
    detector = detection.from_pretrained(SAVED / "detector")
    assert digest(detector.state_dict()) == FACTS["digests"]["detector"]
    genotype = detector.config.genotype
    assert genotype == genotypes()[TINY].to_dict()
    assert detector.config.classes == ("square", "disc")

    prefix = "backbone.body."
    tensors = load_file(SAVED / "detector" / "model.safetensors")
    tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    plain = timm.create_model(TINY, features_only=True, out_indices=(1, 2, 3, 4))
    with torch.no_grad():
        maps = zip(
            detector.backbone.body(images("any")), per_channel(plain, genotype, tensors)(images("any")), strict=True
        )
        for found, known in maps:
            torch.testing.assert_close(found, known, rtol=1e-5, atol=1e-5)
        check_close(detector([images("any")[0]])[0], "detector", tolerance)


def test_a_stopped_training_run_goes_on_to_its_end(home, tolerance):
    log = Path("stopped/log.jsonl").read_text(encoding="utf-8")
    begun = load_file(next(Path("stopped/checkpoints").glob("*/model.safetensors")))
    assert cli.main([*TRAIN, "--output", "stopped", "--resume", "true"]) == 0
    assert Path("stopped/log.jsonl").read_text(encoding="utf-8").startswith(log)
    assert [path.name for path in Path("stopped/checkpoints").iterdir()] == ["step_000012"]

    trained = load_file("stopped/model/model.safetensors")
    moved = max((tensor - begun[name]).abs().amax() for name, tensor in trained.items() if tensor.is_floating_point())
    assert moved > 1e-3, "the last two steps do not show"
    if tolerance["atol"]:
        check_close(trained, "trained", {"rtol": 0, "atol": 1e-4})  # rounding, after two steps
    else:
        assert digest(trained) == FACTS["digests"]["trained"]
    assert digest(detection.from_pretrained("stopped/model").state_dict()) == digest(trained)


def test_a_run_of_other_options_is_still_refused(home, capsys):
    assert cli.main([*TRAIN, "--output", "stopped", "--resume", "true", "--momentum", "0.5"]) == 2
    assert "momentum" in capsys.readouterr().err


def test_a_finished_search_is_decoded_and_reported_again(home):
    before, page = read("searched/genotype.json"), Path("searched/report/report.md").read_text(encoding="utf-8")
    shutil.rmtree("searched/report")
    Path("searched/genotype.json").unlink()
    assert cli.main([*SEARCH, "--output", "searched", "--resume", "true"]) == 0

    after = read("searched/genotype.json")
    for provenance in (before["provenance"], after["provenance"]):
        provenance |= {"version": "", "command": ""}  # of the program that ended the run
    assert after == before
    again = Path("searched/report/report.md").read_text(encoding="utf-8")
    figures = [line for line in page.splitlines() if line.startswith("|")]
    assert len(figures) > 20
    assert [line for line in again.splitlines() if line.startswith("|")] == figures


def test_the_folder_of_a_search_names_its_genotype(home):
    """In training, as the page of the search says."""
    words = [word if word != "genotype" else "searched" for word in TRAIN]
    assert cli.main([*words, "--output", "trained", "--epochs", "1", "--val_split", "null"]) == 0
    assert read("trained/model/config.json")["genotype"] == read("searched/genotype.json")
