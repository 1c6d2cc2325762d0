"""Training that begins with a trained detector: `nats train --init`, from a folder and from the Hub."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nats_zoo import Genotype, NatsError, save_backbone
from nats_zoo.detection import TrainConfig, create_detector, from_pretrained, save_detector
from nats_zoo.detection.data.drawn import draw_dataset
from nats_zoo.detection.training.initial import InitialDetector, find_initial, with_classes
from tests.hub.test_download import add_repo, contents
from tests.support.hub_server import HubProcess, Store

GENOTYPE = Genotype("test_resnet", {"layer2.0.conv2": [(16, 1, 1), (32, 1, 3)]}, provenance={"method": "by hand"})
TINY = {"fpn_channels": 32, "head_size": 16, "mask_channels": 8, "min_size": 64, "max_size": 96}
TINY |= {"anchor_sizes": (8, 16, 32, 64, 128)}
FRAMEWORKS = ("fasterrcnn", "maskrcnn", "cascade_rcnn", "retinanet", "fcos")
OLD, NEW = ("a", "b", "c"), ("c", "d", "a", "e")


def make(framework: str, folder: Path, classes=OLD, num_classes: int = 4, **options) -> Path:
    torch.manual_seed(1)
    chosen = {"weights": None, "genotype": GENOTYPE, "classes": classes, **TINY, **options}
    detector = create_detector(framework, "test_resnet", num_classes, **chosen)
    for parameter in detector.parameters():  # biases of zero would look alike
        torch.nn.init.normal_(parameter, std=0.05)
    return save_detector(detector, folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("initial")
    return {framework: make(framework, root / framework) for framework in FRAMEWORKS}


def config(**options) -> TrainConfig:
    return TrainConfig(data="data", output="run", **options)


def begin(folder: Path, classes=NEW, **options) -> InitialDetector:
    return with_classes(find_initial(str(folder), config(init=str(folder), **options)), classes, range(len(classes)))


# --- the class head ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def class_outputs(detector, framework: str) -> list[torch.Tensor]:
    """Of the parts that depend on the class, outputs (..., classes) or (..., classes, further)."""
    torch.manual_seed(3)
    heads, x = getattr(detector, "roi_heads", None), torch.randn(5, TINY["head_size"])
    if framework in ("fasterrcnn", "maskrcnn"):
        scores, boxes = heads.box_predictor(x)
        outputs = [scores, boxes.reshape(5, -1, 4)]
        return outputs + ([heads.mask_predictor(torch.randn(2, 8, 4, 4)).transpose(1, -1)] if heads.has_mask() else [])
    if framework == "cascade_rcnn":
        return [predictor(x)[0] for predictor in heads.box_predictor]
    logits = detector.head.classification_head([torch.randn(1, TINY["fpn_channels"], 4, 4)])
    return [logits[0] if isinstance(logits, tuple) else logits]


def axis(tensor: torch.Tensor, classes: int) -> int:
    return next(axis for axis in range(1, tensor.dim()) if tensor.shape[axis] == classes + 1)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_head_keeps_the_classes_of_the_same_name(saved, framework):
    before, after = from_pretrained(saved[framework]), begin(saved[framework]).create()
    assert after.config.classes == NEW
    pairs = list(zip(class_outputs(before, framework), class_outputs(after, framework), strict=True))
    assert pairs
    for old, new in pairs:
        old_axis, new_axis = axis(old, len(OLD)), axis(new, len(NEW))
        for label, origin in {0: 0, 1: 3, 3: 1}.items():
            assert torch.equal(new.select(new_axis, label), old.select(old_axis, origin))
        for label in (2, 4):
            same = [torch.equal(new.select(new_axis, label), old.select(old_axis, origin)) for origin in range(4)]
            assert not any(same)


@pytest.mark.parametrize("framework", ["maskrcnn", "retinanet"])
def test_equal_classes_keep_everything_and_others_all_but_the_head(saved, framework):
    before = from_pretrained(saved[framework]).state_dict()
    equal = begin(saved[framework], OLD).create().state_dict()
    assert all(torch.equal(tensor, equal[key]) for key, tensor in before.items())
    other = begin(saved[framework], ("x", "y", "z")).create().state_dict()
    changed = {key for key, tensor in before.items() if not torch.equal(tensor, other[key])}
    assert changed
    assert all("predictor" in key or "classification_head.cls_logits" in key for key in changed)


def test_a_head_without_names_is_kept_if_it_has_as_many_classes(tmp_path):
    folder = make("fasterrcnn", tmp_path / "nameless", classes=())
    before = from_pretrained(folder).state_dict()
    after = begin(folder, ("x", "y", "z"))
    assert all(torch.equal(tensor, before[key]) for key, tensor in after.create().state_dict().items())
    assert after.line().endswith("class head kept, 3 classes")
    assert begin(folder, ("x", "y")).line().endswith("class head new for x, y, which the detector does not find")


def test_one_line_says_what_is_kept(saved):
    folder = saved["fcos"]
    assert begin(folder, ("b", "a")).line() == f"init: {folder}: fcos on test_resnet; class head kept, 2 classes"
    assert begin(folder).line().endswith("; class head kept for 2 of 4 classes, new for d, e")
    many = [f"n{number}" for number in range(9)]
    assert begin(folder, many).line().endswith("new for n0, n1, n2, n3, n4, ..., which the detector does not find")


def test_a_checkpoint_keeps_what_a_run_began_with(saved):
    initial = begin(saved["fcos"])
    again = InitialDetector.from_dict(json.loads(json.dumps(initial.to_dict())), "state.json")
    assert (again.name, again.config, again.kept) == (initial.name, initial.config, initial.kept)
    assert again.line() == initial.line()
    assert again.create().state_dict().keys() == initial.create().state_dict().keys()
    with pytest.raises(NatsError, match=r"state\.json: init: expected what a run of training writes there"):
        InitialDetector.from_dict({"name": "x"}, "state.json")


# --- options ----------------------------------------------------------------------------------------------------------


def test_options_at_their_defaults_are_the_detectors_own_and_some_take_their_place(saved):
    own = from_pretrained(saved["fasterrcnn"]).config
    found = begin(saved["fasterrcnn"]).config
    for name in ("framework", "backbone", "genotype", "min_size", "max_size", "anchor_sizes", "norm", "roi_samples"):
        assert getattr(found, name) == getattr(own, name)
    changed = {"min_size": 80, "norm": "frozen", "trainable_layers": 1, "detections": 7, "score_thresh": 0.2}
    found = begin(saved["fasterrcnn"], **changed)
    assert {name: getattr(found.config, name) for name in changed} == changed
    detector = found.create()
    assert detector.transform.min_size == (80,)
    body = [name for name, parameter in detector.backbone.body.named_parameters() if parameter.requires_grad]
    assert body
    assert all(name.startswith("layer4") for name in body)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"framework": "fcos"}, r"framework: the detector of --init, .*, has 'fasterrcnn', found 'fcos'; leave it out"),
        ({"backbone": "resnet18"}, "backbone: .* has 'test_resnet', found 'resnet18'"),
        ({"masks": True}, "masks: .* has False, found True"),
        ({"fpn_channels": 64}, "fpn_channels: .* has 32, found 64"),
        ({"weights": "org/name"}, "weights: .* brings its own, found 'org/name'; leave it out, or give --weights"),
        ({"genotype": "mine.json"}, r"mine\.json: no published genotype"),
    ],
)
def test_options_that_contradict_the_detector_are_refused(saved, options, words):
    with pytest.raises(NatsError, match=words):
        begin(saved["fasterrcnn"], **options)
    begin(saved["fasterrcnn"], framework="fasterrcnn", backbone="test_resnet", fpn_channels=32)


@pytest.mark.parametrize("norm", ["live", "frozen"])
def test_a_trained_detector_takes_another_genotype_with_all_its_weights_and_recalibrated_norms(tmp_path, norm):
    folder = make("fasterrcnn", tmp_path / "plain", genotype=None)
    before = from_pretrained(folder).state_dict()
    wide = Genotype("test_resnet", {name: [(48, 1, 3)] for name in ("layer2.0.conv1", "layer2.0.conv2")})
    wide.save(tmp_path / "wide.json")
    found = begin(folder, OLD, genotype=str(tmp_path / "wide.json"), norm=norm)
    images = [[torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(seed))] for seed in range(4)]
    regrouped = found.create(images)
    after = regrouped.state_dict()
    moved = {key for key in after if not torch.equal(after[key], before[key])}
    assert moved
    assert all(key.startswith("backbone.body") for key in moved)
    assert {key.rpartition(".")[2] for key in moved} - {"num_batches_tracked"} == {"running_mean", "running_var"}
    assert regrouped.config.genotype["convs"] == wide.to_dict()["convs"]
    assert regrouped.backbone.body.layer2[0].conv1.runs.counts() == {(1, 3): 48}


def test_a_genotype_of_another_network_does_not_fit(saved, tmp_path):
    Genotype("resnet18", {"layer2.0.conv2": [(128, 1, 3)]}).save(tmp_path / "other.json")
    with pytest.raises(NatsError, match="resnet18"):
        begin(saved["fasterrcnn"], genotype=str(tmp_path / "other.json")).create()


def test_a_backbone_is_no_detector_to_begin_with(tmp_path):
    import timm

    model = timm.create_model("nats_any", architecture="test_resnet", genotype=GENOTYPE, num_classes=0)
    folder = save_backbone(model, tmp_path / "backbone")
    with pytest.raises(NatsError, match="key 'framework' is missing, expected a detector's config"):
        begin(folder)


# --- the commands, with a Hub and then without ------------------------------------------------------------------------

COMMANDS = """
import contextlib, io, json, shutil, sys
from nats_zoo.cli import commands as cli

def nats(*words):
    out, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
        code = cli.main([*words])
    return {"code": code, "out": out.getvalue(), "said": said.getvalue()}

TRAIN = ["train", "--init", "org/detector@v1", "--data", "data", "--output", "run", "--epochs", "2",
         "--batch_size", "4", "--workers", "0", "--lr_per_image", "0.0001", "--warmup_steps", "1",
         "--checkpoint_every", "1"]
SEARCH = ["search", "--init", "org/plain", "--data", "data", "--output", "found", "--mode", "sensitivity",
          "--epochs", "0", "--score_images", "2", "--held_back_images", "2", "--max_rounds", "1", "--workers", "0",
          "--calibration_images", "2", "--groups", "4"]
"""
ONLINE = """
print(json.dumps({
    "train": nats(*TRAIN),
    "option": nats("predict", "--model", "org/detector", "data/images", "--recursive", "--output", "one"),
    "first": nats("predict", "org/detector@v1", "data/images", "--recursive", "--output", "two"),
    "revision": nats("predict", "org/detector", "data/images", "--recursive", "--output", "three", "--revision", "v9"),
    "nothing": nats("predict", "org/detector"),
    "folder": nats("predict", "run/model", "data/images", "--revision", "v1"),
    "evaluate": nats("evaluate", "org/plain", "data", "--revision", "v1", "--workers", "0"),
    "search": nats(*SEARCH),
    "genotype": nats("show", "org/detector"),
}))
"""
OFFLINE = """
shutil.rmtree("run/model")
print(json.dumps({
    "resumed": nats(*TRAIN, "--resume", "true"),
    "other": nats(*(word.replace("@v1", "") for word in TRAIN), "--resume", "true"),
}))
"""


def run_commands(script: str, environment: dict[str, str], folder: Path) -> dict:
    command = [sys.executable, "-c", COMMANDS + script]
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> tuple[dict, Path]:
    """What the commands said with the Hub, and without it and its cache; and the folder in which they ran."""
    folder = tmp_path_factory.mktemp("commands")
    draw_dataset(folder / "data", train=8, val=2, test=2, size=64, distance=10)
    classes = ("vermilion", "blue", "green")
    store = Store(folder / "hub")
    options = {"anchor_sizes": TINY["anchor_sizes"], "fpn_channels": 16, "head_size": 16}
    add_repo(store, "org/detector", contents(make("fasterrcnn", folder / "one", classes, **options)))
    named = ("blue", "vermilion", "yellow")
    plain = make("fasterrcnn", folder / "two", named, genotype=None, **options)
    add_repo(store, "org/plain", contents(plain))
    with HubProcess(folder / "hub") as hub:
        online = run_commands(ONLINE, hub.client_environment(folder / "home"), folder)
        before = load_file(folder / "run" / "model" / "model.safetensors")
        shutil.rmtree(folder / "home")
        hub.requests(forget=True)
        offline = run_commands(OFFLINE, hub.client_environment(folder / "home"), folder)
        offline["asked"] = hub.requests()
    after = load_file(folder / "run" / "model" / "model.safetensors")
    offline["differs"] = [key for key, tensor in before.items() if not torch.equal(tensor, after[key])]
    return {**online, **offline}, folder


def test_training_goes_on_from_a_detector_on_the_hub_and_remembers_which(commands):
    found, folder = commands
    assert found["train"]["code"] == 0, found["train"]["said"]
    line = next(line for line in found["train"]["said"].splitlines() if line.startswith("init: "))
    commit = line.partition("@")[2].partition(":")[0]
    assert len(commit) == 40
    assert line.endswith(": fasterrcnn on test_resnet; class head kept for 2 of 3 classes, new for yellow")
    records = [json.loads(row) for row in (folder / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["init"] for row in records if "init" in row] == [{"name": f"org/detector@{commit}", "classes kept": 2}]
    assert json.loads((folder / "run" / "run.json").read_text())["init"] == "org/detector@v1"
    config = json.loads((folder / "run" / "model" / "config.json").read_text())
    assert config["classes"] == ["blue", "vermilion", "yellow"]
    assert config["min_size"] == 64
    assert config["genotype"]["convs"] == GENOTYPE.to_dict()["convs"]
    card = (folder / "run" / "model" / "README.md").read_text()
    assert f"org/detector@{commit}" in card
    assert "base_model: org/detector\n" in card


def test_a_resumed_run_neither_downloads_nor_begins_again(commands):
    found, _ = commands
    assert found["resumed"]["code"] == 0, found["resumed"]["said"]
    assert not found["asked"]
    assert found["differs"] == []
    assert "init: " not in found["resumed"]["said"]
    assert found["other"]["code"] == 2
    assert "run.json: the run was begun with init='org/detector@v1'" in found["other"]["said"]


def test_commands_take_a_detector_from_the_hub(commands):
    found, folder = commands
    for name in ("option", "first", "evaluate", "search", "genotype"):
        assert found[name]["code"] == 0, found[name]["said"]
    assert (folder / "one" / "predictions.json").read_bytes() == (folder / "two" / "predictions.json").read_bytes()
    assert json.loads((folder / "found" / "genotype.json").read_text())["architecture"] == "test_resnet"
    assert "chart: detector.png" in found["genotype"]["out"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("revision", "nats: org/detector@v9: no such folder, and from the Hub: the repository has no revision 'v9'"),
        ("nothing", "nats: images: expected some beside the model, org/detector; see nats predict --help"),
        ("folder", "nats: revision: is for repositories on the Hub, run/model is a file or a folder"),
    ],
)
def test_a_command_says_what_is_wrong_with_a_name_in_one_line(commands, name, words):
    said = commands[0][name]
    assert said["code"] == 2
    assert said["said"].startswith(words)
    assert said["said"].count("\n") == 1
