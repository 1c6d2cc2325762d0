"""The `nats` command: what it costs to ask for help, recipes, and one line for every bad input."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from timm.models import save_for_hf

from nats_zoo import Genotype, __version__
from nats_zoo.cli import commands as cli
from nats_zoo.detection.data.drawn import draw_dataset

COMMANDS = (
    "list",
    "collection",
    "show",
    "erf",
    "profile",
    "search",
    "control",
    "data",
    "train",
    "evaluate",
    "predict",
    "convert",
    "transfer",
    "merge",
    "export",
    "publish",
    "demo",
)

# A search of one step. Its data and weights lie beside it, see `home`.
RECIPE = """\
# a comment at the head, as recipes have it
data: data
weights: weights
backbone: test_resnet
space: A
groups: 4
level: single
epochs: 9
alpha_start: 0
batch_size: 2
fpn_channels: 16
head_size: 16
min_size: 64
max_size: 64
anchor_sizes: [8, 16, 32, 48, 64]
calibration_images: 2
workers: 0
"""


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A recipe, a data set, weights, and the run that the recipe began there."""
    folder = tmp_path_factory.mktemp("origin")
    draw_dataset(folder / "data", train=2, val=1, test=1, size=64, distance=10)
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3, zero_init_last=False)
    save_for_hf(model, folder / "weights", safe_serialization=True)
    (folder / "recipe.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["search", "--config", "recipe.yaml", "--epochs", "1", "--output", "begun"]) == 0
    return folder


@pytest.fixture
def home(origin, tmp_path, monkeypatch):
    """A copy of `origin` to spoil, as the working folder."""
    folder = tmp_path / "home"
    shutil.copytree(origin, folder)
    monkeypatch.chdir(folder)
    return folder


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- what it offers ---------------------------------------------------------------------------------------------------


def test_help_lists_every_command_and_costs_no_more_than_timm():
    code = "import sys; from nats_zoo.cli import main; code = main(['--help']); print(code, *sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    *shown, last = done.stdout.splitlines()
    exit_code, *modules = last.split()
    assert exit_code == "0"
    for command in COMMANDS:
        assert any(re.match(rf"  {command} +\w", line) for line in shown)
    dear = {
        "accelerate",
        "jsonargparse",
        "matplotlib",
        "onnx",
        "onnxruntime",
        "pycocotools",
        "nats_zoo.detection",
        "nats_zoo.search",
    }
    assert not dear & set(modules)


@pytest.mark.parametrize("arguments", [["list"], ["list", "--json"], ["show", "nats_resnet50"]])
def test_what_the_zoo_holds_is_told_without_the_trainer(arguments, tmp_path):
    """A chart is drawn by matplotlib; nothing else of what training needs is imported."""
    code = "import sys; from nats_zoo.cli import main; code = main(sys.argv[1:]); print(code, *sorted(sys.modules))"
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True, cwd=tmp_path)
    exit_code, *modules = done.stdout.splitlines()[-1].split()
    assert exit_code == "0"
    dear = {"accelerate", "pycocotools", "onnx", "nats_zoo.detection.training", "nats_zoo.search.run"}
    assert not (dear if "show" in arguments else {*dear, "matplotlib"}) & set(modules)


def test_without_a_command_it_shows_the_help(capsys):
    assert cli.main([]) == 0
    assert "usage: nats COMMAND" in capsys.readouterr().out


def test_a_terminal_that_lacks_a_character_is_no_error(tmp_path):
    path = tmp_path / "mine.json"
    Genotype("resnet18", {"layer2.0.conv2": [[128, 1, 1]]}, provenance={"dataset": "Zürich 2×"}).save(path)
    code = f"import sys; from nats_zoo.cli import main; sys.exit(main(['show', {str(path)!r}, '--output', 'x.png']))"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert rb"Z\xfcrich 2\xd7" in done.stdout


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.split() == ["nats-zoo", __version__]


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("list", ["--json"]),
        ("show", ["genotype", "--output"]),
        ("erf", ["model", "--genotype", "--weights", "--size", "--stage", "--seed"]),
        ("export", ["model", "--format {auto,onnx,torch,torchscript}", "--deploy", "--fixed", "--opset", "--for"]),
        ("convert", ["source", "--pattern", "--checkpoint", "--backbone", "--epsilon"]),
        ("merge", ["genotype", "-k MAX_DILATIONS", "--output"]),
        ("search", ["--groups", "--alpha_start", "--config"]),
        ("control", ["{uniform,random,shares,shuffled}", "--dilation", "--shares", "--seed"]),
        ("train", ["--genotype", "--lr_steps", "--resume"]),
        ("evaluate", ["model", "data", "--split"]),
        ("predict", ["model", "images [images ...]", "--threshold"]),
        ("publish", ["folder", "repo", "--dry_run"]),
        ("demo", ["--output", "--seed"]),
    ],
)
def test_each_command_explains_its_options(command, options, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: nats {command}")
    assert all(option in shown for option in options)


def test_later_options_win_over_the_recipe(origin):
    asked = json.loads((origin / "begun" / "run.json").read_text())
    assert (asked["level"], asked["groups"], asked["batch_size"]) == ("single", 4, 2)  # the recipe's
    assert (asked["epochs"], asked["output"]) == (1, "begun")  # the command line's
    assert asked["alpha_lr"] == 0.01  # the default
    assert Genotype.load(origin / "begun" / "genotype.json").provenance["epochs"] == 1


# --- bad input --------------------------------------------------------------------------------------------------------

SEARCH = ["search", "--config", "recipe.yaml", "--output", "out"]
TRAIN = ["train", "--data", "data", "--weights", "null", "--output", "out", "--backbone", "nats_resnet18"]


def refused(arguments, capfd, home):
    """The one line that a refused command says; it leaves every file as it was."""
    before = contents(home)
    assert cli.main(arguments) == 2
    printed, errors = capfd.readouterr()
    assert printed == ""
    assert errors.endswith("\n")
    assert len(errors.splitlines()) == 1, errors
    assert errors.startswith("nats: ")
    assert "Traceback" not in errors
    assert contents(home) == before
    assert not (home / "out").exists()
    return errors


OPTIONS = {
    "unknown command": (
        ["serch"],
        "serch: no such command, expected one of list, show, erf, transfer, merge, profile, search",
    ),
    "unknown option": ([*SEARCH, "--colour", "red"], "--colour"),
    "missing options": (["search", "--config", "recipe.yaml"], "required: output"),
    "missing positional": (["evaluate", "begun"], "required: data"),
    "missing images": (["predict", "begun"], "images: expected some beside the model, begun"),
    "no number": ([*SEARCH, "--epochs", "many"], '"epochs"'),
    "no such choice": ([*SEARCH, "--mode", "magic"], '"mode"'),
    "no such space": ([*SEARCH, "--space", "D"], "space: D: expected A, B, C or a YAML file"),
    "no such recipe": (["search", "--config", "nowhere.yaml"], "nowhere.yaml"),
    "batch of none": ([*SEARCH, "--batch_size", "0"], "batch_size: expected 1 or more"),
    "negative rate": ([*SEARCH, "--alpha_lr", "-1"], "alpha_lr: expected 0 or more"),
    "alpha would never move": ([*SEARCH, "--alpha_start", "9"], "epochs: expected 10 or more"),
    "improbable flip": ([*SEARCH, "--flip", "2"], "flip: expected a number in 0..1"),
    "no such framework": ([*SEARCH, "--framework", "yolo"], "Got value: yolo"),
    "no such backbone": ([*SEARCH, "--backbone", "resnet51"], "timm has no model 'resnet51'"),
    "nothing to search in": (
        [*SEARCH, "--backbone", "mobilenetv3_small_050", "--weights", "weights"],
        "another network",
    ),
    "searched backbone": ([*SEARCH, "--backbone", "nats_resnet18"], "backbone: the search begins from a plain network"),
    "random backbone": ([*SEARCH, "--weights", "null"], "weights: the search reuses a pretrained backbone"),
    "groups that do not divide": ([*SEARCH, "--groups", "5"], "48 output channels can not be split into 5 groups"),
    "no groups": ([*SEARCH, "--groups", "0"], "can not be split into 0 groups"),
    "two ways to group": ([*SEARCH, "--channels_per_group", "8"], "give exactly one of the two"),
    "missing weights folder": ([*SEARCH, "--weights", "nowhere"], "nowhere: neither a folder nor the id of a Hub"),
    "no weights in it": ([*SEARCH, "--weights", "data"], "data: no config.json in it"),
    "missing data folder": ([*SEARCH, "--data", "nowhere"], "nowhere: expected a data set's folder"),
    "missing split": ([*SEARCH, "--val_split", "dev"], "split 'dev'"),
    "missing image folder": ([*SEARCH, "--images", "nowhere"], "images: expected a folder"),
    "output is a file": (["search", "--config", "recipe.yaml", "--output", "recipe.yaml"], "expected a folder"),
    "output below a file": (["search", "--config", "recipe.yaml", "--output", "recipe.yaml/run"], "recipe.yaml/run"),
    "missing genotype": ([*TRAIN, "--genotype", "nowhere.json"], "nowhere.json: no published genotype"),
    "model folder that is none": (["evaluate", "data", "data"], "data: no config.json in it"),
    "backbone for a detector": (["evaluate", "weights", "data"], "key 'framework' is missing"),
    "missing model": (["predict", "nowhere", "data/images"], "nowhere: neither a folder nor the id of a Hub"),
    "data to evaluate on missing": (["evaluate", "weights", "nowhere"], "nowhere: expected a data set's folder"),
    "metrics would replace a file": (["evaluate", "weights", "data", "--output", "recipe.yaml"], "found a file"),
    "missing image": (
        ["predict", "weights", "data/images", "nowhere.png", "--output", "out"],
        "nowhere.png: no such image",
    ),
    "no image in the folder": (["predict", "weights", "weights", "--output", "out"], "weights: no images"),
    "nothing to publish": (["publish", "data", "org/name", "--dry_run", "true"], "data: no config.json in it"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_bad_options_are_refused_in_one_line(case, home, capfd):
    arguments, expected = OPTIONS[case]
    assert expected in refused(arguments, capfd, home)


@pytest.mark.parametrize("text", ["epochs: [1,\n b: {", "- 1\n- 2\n", "colour: red\n", "\x00", "epochs: 2.5\n"])
def test_a_recipe_that_is_none_is_refused(text, home, capfd):
    (home / "recipe.yaml").write_text(text)
    assert "search" in refused(SEARCH, capfd, home)


def change_annotations(home, change):
    path = home / "data" / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _narrow(content):
    content["annotations"][0]["bbox"][2] = 0


def _other_category(content):
    content["annotations"][0]["category_id"] = 99


def _no_images(content):
    content["images"].clear()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_narrow, r"instances_train\.json: annotation 1: bbox: expected a width and a height above 0"),
        pytest.param(
            _other_category,
            r"instances_train\.json: annotation 1: category_id: .* found 99",
            id=r"_other_category-instances_train\.json: annotation 1: category_id: .* got 99",  # as it was said first
        ),
        (_no_images, r"instances_train\.json: images: expected at least one image"),
    ],
)
def test_bad_annotations_are_refused(change, expected, home, capfd):
    change_annotations(home, change)
    assert re.search(expected, refused(SEARCH, capfd, home))


def test_an_empty_annotation_file_is_refused(home, capfd):
    path = home / "data" / "annotations" / "instances_train.json"
    path.write_text("")
    assert str(path.relative_to(home)) in refused(SEARCH, capfd, home)


def test_a_missing_image_is_refused(home, capfd):
    (home / "data" / "images" / "train_00001.png").unlink()
    assert "train_00001.png" in refused(SEARCH, capfd, home)


def _conv(name="layer2.0.conv2", channels=128):
    return {name: [[channels // 2, 1, 1], [channels // 2, 3, 3]]}


GENOTYPES = {
    "not JSON": ("{", r"mine\.json: not JSON"),
    "no genotype": ({"convs": {}}, r"mine\.json: key 'format' is missing"),
    "wrong architecture": ({"architecture": "resnet50", "convs": _conv()}, r"mine\.json: .*'resnet50'.*'resnet18'"),
    "unknown convolution": (
        {"convs": _conv("layer2.7.conv2")},
        r"mine\.json: .* no convolution named 'layer2\.7\.conv2'",
    ),
    "wrong sum": (
        {"convs": _conv(channels=130)},
        r"mine\.json: layer2\.0\.conv2: its runs add up to 130 .* expected 128",
    ),
    "no dilation": (
        {"convs": {"layer2.0.conv2": [[128, 0, 1]]}},
        r"mine\.json: layer2\.0\.conv2: .* positive integers",
    ),
}


@pytest.mark.parametrize("case", GENOTYPES)
def test_a_genotype_that_does_not_fit_is_refused(case, home, capfd):
    content, expected = GENOTYPES[case]
    if isinstance(content, dict) and case != "no genotype":
        content = {"format": 1, "architecture": "resnet18", **content}
    (home / "mine.json").write_text(content if isinstance(content, str) else json.dumps(content))
    assert re.search(expected, refused([*TRAIN, "--genotype", "mine.json"], capfd, home))


# --- output folders ---------------------------------------------------------------------------------------------------

BEGUN = ["search", "--config", "recipe.yaml", "--epochs", "1", "--output", "begun"]


def test_a_folder_that_holds_a_run_is_not_begun_anew(home, capfd):
    assert "begun: already holds a run; add --resume true" in refused(BEGUN, capfd, home)


def test_a_run_is_not_resumed_with_other_options(home, capfd):
    said = refused([*BEGUN, "--groups", "2", "--resume", "true"], capfd, home)
    assert "run.json: the run was begun with groups=4 and can not go on with 2" in said


@pytest.mark.parametrize("resume", ["true", "false"])
def test_a_folder_of_something_else_is_left_alone(resume, home, capfd):
    arguments = ["search", "--config", "recipe.yaml", "--output", "weights", "--resume", resume]
    assert "weights: not a run's folder" in refused(arguments, capfd, home)


def _cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def _remove_state(folder):
    (folder / "state.json").unlink()


def _spoil_state(folder):
    (folder / "state.json").write_text("[]")


def _empty(folder):
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("spoil", [_cut, _remove_state, _spoil_state, _empty])
def test_a_damaged_checkpoint_is_refused(spoil, home, capfd):
    spoil(home / "begun" / "checkpoints" / "step_000001")
    assert "begun" in refused([*BEGUN, "--resume", "true"], capfd, home)


# --- predict ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"no image", b"", None])
def test_a_file_that_is_no_image_is_refused_before_anything_is_written(content, home, capfd):
    file = home / "data" / "images" / "zz.png"
    whole = (home / "data" / "images" / "train_00000.png").read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if content is None else content)
    arguments = ["predict", "weights", "data/images", "--output", "out"]
    assert "zz.png: can not be decoded: " in refused(arguments, capfd, home)


def test_a_picture_never_replaces_an_image(home, capfd):
    arguments = ["predict", "weights", "data/images", "--output", "data/images"]
    assert "test_00000.png: is one of the images" in refused(arguments, capfd, home)


# --- a real process ---------------------------------------------------------------------------------------------------


def test_a_reader_that_goes_away_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-m", "nats_zoo", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=120) == 141


def test_a_real_process_ends_with_one_line_and_code_2(home):
    before = contents(home)
    done = subprocess.run(
        [sys.executable, "-m", "nats_zoo", *SEARCH, "--data", "nowhere"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("nats: nowhere: expected a data set's folder")
    assert contents(home) == before
