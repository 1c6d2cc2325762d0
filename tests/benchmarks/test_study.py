"""benchmarks/study.py: what it plans, refuses and reports, and a real study, stopped in every way and resumed."""

import csv
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.models import save_for_hf

from nats_zoo import Genotype, NatsError
from nats_zoo.detection import TrainConfig, Trainer
from nats_zoo.detection.data.drawn import draw_dataset
from nats_zoo.search.controls import Searchable, random, shuffled, uniform
from tests.support.paths import ROOT

BENCHMARKS = ROOT / "benchmarks"
SMALL = {
    "fpn_channels": 16,
    "head_size": 16,
    "min_size": 64,
    "max_size": 64,
    "anchor_sizes": [8, 16, 32, 48, 64],
    "calibration_images": 4,
    "batch_size": 1,
    "workers": 0,
}
TRAIN = {**SMALL, "epochs": 3, "lr_per_image": 0.01, "warmup_steps": 2, "checkpoint_every": 2}
SEARCH = {**SMALL, "mode": "sampled", "groups": 4, "epochs": 1, "alpha_start": 0, "level": "single"}
CONVS = ["layer2.0.conv2", "layer3.0.conv2", "layer4.0.conv2"]  # of timm's smallest ResNet


@pytest.fixture(scope="module")
def study():
    return importlib.import_module("study")


@pytest.fixture(scope="module")
def reporting():
    return importlib.import_module("study_report")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, randomise_bn):
    """A folder with a drawn data set, weights of timm's smallest ResNet, and two recipes."""
    folder = tmp_path_factory.mktemp("study_inputs")
    draw_dataset(folder / "drawn", train=7, val=3, test=1, size=64, distance=10)
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3, zero_init_last=False)
    randomise_bn(model, torch.Generator().manual_seed(1))
    save_for_hf(model, folder / "weights", safe_serialization=True)
    (folder / "train.yaml").write_text(json.dumps(TRAIN))
    (folder / "search.yaml").write_text(json.dumps(SEARCH))
    return folder


@pytest.fixture
def words(inputs, tmp_path):
    """`words(*further, **changes)`: a command line."""

    def make(*further, **changes):
        options = {
            "train-config": inputs / "train.yaml",
            "search-config": inputs / "search.yaml",
            "data": inputs / "drawn",
            "weights": inputs / "weights",
            "backbone": "test_resnet",
            "output": tmp_path / "out",
            **changes,
        }
        return [*(f"--{key}={value}" for key, value in options.items()), *further]

    return make


@pytest.fixture
def planned(study, words):
    """`planned(*further, **changes)`: the Study of a command line."""
    return lambda *further, **changes: study.plan_study(study.parse_args(words(*further, **changes)))


def recipe_file(folder, options):
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(options))
    return path


# --- planning ---------------------------------------------------------------------------------------------------------


def test_blocks_come_one_by_one_and_searches_first(study, planned):
    found = planned("--arms", "plain", "searched", "shuffled", "path", "--blocks", "2", "--sizes", "64", "96")
    names = ["search-sampled", "search-path-sampled", "plain", "searched", "shuffled", "path"]
    expected = [f"{s}x{s}, block {b}, {name}" for b in (0, 1) for s in (64, 96) for name in names]
    assert [task.label for task in study.plan_tasks(found)] == expected


def test_every_arm_of_a_block_has_the_same_recipe_and_seed(study, planned):
    found = planned("--arms", "plain", "uniform_1x3", "random", "--blocks", "2", "--seed", "10", "--transpose")
    for task in study.plan_tasks(found):
        task.folder.mkdir(parents=True)
        task._write_config()
        options = json.loads((task.folder / "config.yaml").read_text())
        genotype = options.pop("genotype", None)
        assert (genotype is None) == (task.arm.kind == "plain")
        assert options.pop("output") == str(task.folder / "run")
        assert options.pop("seed") == 10 + task.block
        kept = {key: value for key, value in TRAIN.items() if key in options}
        assert kept == TRAIN
        assert (options["val_split"], options["eval_every"], options["resume"]) == ("val", 3, True)
        assert (options["transpose"], options["backbone"], options["min_size"]) == (True, "test_resnet", 64)
        TrainConfig(**options, output="")


def test_controls_are_drawn_by_the_block(study, planned):
    found = planned("--arms", "uniform_3x1", "random", "shares", shares="{3: {1x1: 0.5, 2x2: 0.5}}")
    searchable = Searchable("test_resnet", groups=4)
    arms = {arm.name: arm for arm in found.arms}
    assert study.control_genotype(found, arms["uniform_3x1"], 5) == uniform(searchable, (3, 1))
    for block in (0, 3):
        assert study.control_genotype(found, arms["random"], block) == random(searchable, block)
        made = study.control_genotype(found, arms["shares"], block)
        assert made.dilation_shares() == {CONVS[1]: {(1, 1): 0.5, (2, 2): 0.5}}
        assert made.provenance["seed"] == block


def test_shuffled_is_made_from_the_blocks_own_search(study, planned):
    found = planned("--arms", "searched", "shuffled", "--blocks", "2")
    tasks = {(task.block, task.own_name): task for task in study.plan_tasks(found)}
    for block in (0, 1):
        genotype = random(Searchable("test_resnet", groups=4), 100 + block)  # stands where the search puts its own
        run = tasks[block, "search-sampled"].folder / "run"
        run.mkdir(parents=True)
        genotype.save(run / "genotype.json")
        for arm, expected in (("searched", genotype), ("shuffled", shuffled(genotype, block))):
            task = tasks[block, arm]
            task.folder.mkdir()
            assert Genotype.load(task.options()["genotype"]) == expected


def test_modes_of_searches(study, planned):
    found = planned("--arms", "searched:mixture", "searched", "shuffled:mixture", "path", "--blocks", "1")
    searches = {task.own_name: task.options() for task in study.plan_tasks(found) if task.command == "search"}
    assert {name: (o["mode"], o["groups"]) for name, o in searches.items()} == {
        "search-mixture": ("mixture", 4),
        "search-sampled": ("sampled", 4),
        "search-path-sampled": ("sampled", 1),
    }
    single = planned("--arms", "searched", "shuffled", "--search-mode", "mixture", "--blocks", "1")
    assert [task.own_name for task in study.plan_tasks(single)] == ["search-mixture", "searched", "shuffled"]


@pytest.mark.parametrize(
    ("further", "error"),
    [
        (["--arms", "plane"], "arms: plane: expected plain, uniform_HxW"),
        (["--arms", "plain:2"], "arms: plain:2: expected"),
        (["--arms", "uniform_3"], "dilation: expected HEIGHTxWIDTH"),
        (["--arms", "searched:greedy"], "greedy"),
        (["--arms", "searched:mixture", "searched:sampled", "shuffled"], "expected shuffled:MODE"),
        (["--arms", "shares"], "shares: expected both the arm and the option"),
        (["--arms", "plain", "--shares", "{3: {1x1: 1}}"], "shares: expected both the arm and the option"),
        (["--arms", "shares", "--shares", "{3: {1x1: 0.4}}"], "stage 3: its shares add up to 0.4"),
        (["--arms", "shares", "--shares", "{3: ["], "shares: not YAML"),
        pytest.param(
            ["--arms", "file:no.json"], "no.json: no published genotype", id="further9-no.json: no such genotype file"
        ),
        (["--data", "nowhere"], "data: nowhere: no such folder"),
        (["--backbone", "resnet8"], "resnet8"),
        (["--search-mode", "greedy"], "greedy"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(further, error, study, words, tmp_path, capsys):
    assert study.main(words(*further)) == 2
    found = capsys.readouterr().err
    assert found.startswith("study: ")
    assert found.count("\n") == 1
    assert error in found
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"epcohs": 2}, "Option 'epcohs' is not accepted"),
        ({"epochs": 0}, "epochs: expected 1 or more"),
        ({"calibration_images": 0}, "recalibrates batch norms in every arm"),
        ({"genotype": "resnet18_c_n4_bccd"}, "genotype: the arms say what is trained"),
    ],
)
def test_bad_recipes_are_refused(changes, error, study, words, tmp_path, capsys):
    path = recipe_file(tmp_path, {**TRAIN, **changes})
    assert study.main(words(**{"train-config": path})) == 2
    assert error in capsys.readouterr().err


def test_a_study_goes_on_with_its_own_recipe_only(study, words, planned, tmp_path):
    study.begin_folder(planned())
    study.begin_folder(planned("--arms", "plain", "path", "--blocks", "3", "--sizes", "96", "--transpose"))
    free = recipe_file(tmp_path, {**TRAIN, "workers": 2, "checkpoint_every": 7})
    study.begin_folder(planned(**{"train-config": free}))
    for options, key in [
        ({"train-config": recipe_file(tmp_path, {**TRAIN, "lr_per_image": 0.02})}, "train.lr_per_image=0.01"),
        ({"seed": 1}, "seed=0"),
        ({"eval-split": "test"}, "train.val_split='val'"),
        ({"search-mode": "mixture"}, "search.mode='sampled'"),
    ]:
        with pytest.raises(NatsError, match=rf"study\.json: the study was begun with {key}"):
            study.begin_folder(planned(**options))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(NatsError, match="not a study's folder"):
        study.begin_folder(planned(output=tmp_path / "other"))


def test_two_studies_do_not_share_a_folder(study, tmp_path):
    with study.only_one(tmp_path), pytest.raises(NatsError, match="a study is running there"), study.only_one(tmp_path):
        pass


# --- a real study -----------------------------------------------------------------------------------------------------


def start(words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, BENCHMARKS / "study.py", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def has_checkpoint(folder):
    return any((folder / "run" / "checkpoints").glob("step_*"))


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"  # orphans wait for their reaper


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the study runs on POSIX systems")
def test_a_study_survives_whatever_stops_it(study, words, tmp_path, capsys):
    # One thread: with another number of them sums differ in their last bits.
    command = words("--arms", "plain", "uniform_1x3", "random", "--blocks", "2", "--threads", "1")
    blocks = [tmp_path / "out" / "64x64" / f"block_{block:02}" for block in (0, 1)]
    names = ["plain", "uniform_1x3", "random"]

    # 1. Asked to stop: so does its run, behind a checkpoint.
    first = start(command)
    wait_for(lambda: has_checkpoint(blocks[0] / "plain"))
    pid = int((blocks[0] / "plain" / "lock").read_text())
    first.send_signal(signal.SIGTERM)
    _, errors = first.communicate()
    assert first.returncode == 130, errors
    assert "the same command goes on from there" in errors
    assert not is_alive(pid)
    assert has_checkpoint(blocks[0] / "plain")
    assert not (blocks[0] / "plain" / "done.json").exists()

    # 2. Killed with its run.
    second = start(command)
    wait_for(lambda: has_checkpoint(blocks[0] / "uniform_1x3"))
    second.kill()
    second.communicate()
    os.kill(int((blocks[0] / "uniform_1x3" / "lock").read_text()), signal.SIGKILL)

    # 3. Killed alone: the run that outlives it is waited for, not started again beside itself.
    third = start(command)
    wait_for(lambda: has_checkpoint(blocks[0] / "random"))
    third.kill()
    third.communicate()
    orphan = int((blocks[0] / "random" / "lock").read_text())

    assert study.main(command) == 0
    printed = capsys.readouterr().out
    assert not is_alive(orphan)
    rows = read_csv(tmp_path / "out" / "results.csv")
    assert [(row["block"], row["arm"]) for row in rows] == [(str(b), arm) for b in (0, 1) for arm in names]
    assert [row["seconds"] == "" for row in rows] == [True, True, True, False, False, False]
    assert "**Descriptive" in printed
    assert printed.strip() == (tmp_path / "out" / "report.md").read_text().strip()
    assert Image.open(tmp_path / "out" / "study.png").size > (300, 300)

    # What was stopped has ended as if it had not been; the metrics are those of the last weights.
    for folder, row in zip((blocks[0] / "uniform_1x3", blocks[1] / "random"), (rows[1], rows[5]), strict=True):
        options = json.loads((folder / "config.yaml").read_text())
        metrics = Trainer(TrainConfig(**{**options, "output": str(tmp_path / "again" / folder.parent.name)})).run()
        expected = load_file(tmp_path / "again" / folder.parent.name / "model" / "model.safetensors")
        found = load_file(folder / "run" / "model" / "model.safetensors")
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
        assert (row["AP"], row["AP50"]) == (str(metrics.ap), str(metrics.ap50))
        assert row["fingerprint"] == Genotype.load(folder / "genotype.json").fingerprint()

    # Once more: nothing is left to do.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/*/*/*.*")}
    assert study.main(command) == 0
    assert capsys.readouterr().out == printed
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/*/*/*.*")} == before
    assert not list((tmp_path / "out").glob("*/*/*/run/checkpoints"))


def test_a_run_that_fails_is_reported_and_the_others_go_on(study, words, planned, tmp_path, capsys):
    recipe = recipe_file(tmp_path, {**TRAIN, "epochs": 1})
    options = (["--arms", "plain", "random", "--blocks", "1", "--jobs", "2"], {"train-config": recipe})
    study.begin_folder(planned(*options[0], **options[1]))
    spoiled = tmp_path / "out" / "64x64" / "block_00" / "random" / "run"
    spoiled.mkdir(parents=True)
    (spoiled / "thesis.tex").touch()
    assert study.main(words(*options[0], **options[1])) == 1
    printed, errors = capsys.readouterr()
    assert "study: 64x64, block 0, random: exit code 2: nats: " in errors
    assert "not a run's folder" in errors
    assert "| plain | 1 |" in printed
    assert "| random |" not in printed
    (spoiled / "thesis.tex").unlink()
    assert study.main(words(*options[0], **options[1])) == 0
    assert "| random - plain | 1 |" in capsys.readouterr().out


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# --- the report -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """`folder(runs)`: a study's folder with finished runs (size, transposed, arm, block, AP, genotype)."""

    def fill(runs):
        study = tmp_path / "study"
        study.mkdir()
        recipe = {"backbone": "test_resnet", "data": "/data/drawn", "val_split": "val"}
        (study / "study.json").write_text(json.dumps({"train": recipe, "search": {}, "seed": 0, "shares": None}))
        for size, transposed, arm, block, ap, genotype in runs:
            run = study / f"{size}x{size}{'_transposed' * transposed}" / f"block_{block:02}" / arm.replace(":", "-")
            run.mkdir(parents=True)
            genotype.save(run / "genotype.json")
            metrics = {"ap": ap, "ap50": 2 * ap, "ap75": ap, "ap_small": None, "ap_medium": ap, "ap_large": ap}
            done = {"arm": arm, "block": block, "min_size": size, "max_size": size, "transposed": transposed}
            (run / "done.json").write_text(json.dumps({**done, "metrics": metrics, "seconds": 60.0}))
        return study

    return fill


PLAIN = Genotype("test_resnet", {})


def layout(*dilations, groups=4):
    runs = {"layer4.0.conv2": [(96 // groups, *dilation) for dilation in dilations]}
    return Genotype("test_resnet", runs, provenance={"groups": groups})


TALL = layout((3, 1), (3, 1), (1, 3), (1, 1))
WIDE = layout((1, 3), (1, 3), (3, 1), (1, 1))


def blocks_of(gains, size=64, transposed=False, searched=TALL, arm="searched"):
    """Runs of plain, random and searched, whose AP is that of plain and a gain."""
    for block, gain in enumerate(gains):
        base = 20.0 + 3 * block  # what a block has in common cancels
        yield size, transposed, "plain", block, base, PLAIN
        yield size, transposed, "random", block, base + 0.5, layout((2, 2), (1, 3), (3, 1), (1, 1))
        yield size, transposed, arm, block, base + gain, searched


def test_report_by_hand(reporting, folder):
    study = folder(blocks_of([1.0, 2.0, 3.0]))
    text = reporting.report(study)
    margin = 4.302653 / math.sqrt(3)
    interval = f"{2 - margin:+.2f} to {2 + margin:+.2f}"
    assert text.startswith("# test_resnet on drawn, last weights, val split")
    assert (
        f"| **searched - plain** | 3 | +2.00 | {interval} | 0.250 | +4.00 | - | +2.00 | +2.00 | +1.0 +2.0 +3.0 |"
        in text
    )
    assert "| **searched - random** | 3 | +1.50 |" in text
    assert "| random - plain | 3 | +0.50 | +0.50 to +0.50 | 0.250 |" in text
    assert "| plain | 3 | 23.00 | 46.00 | 23.00 | - | 23.00 | 23.00 | 3.00 | 0% | 0% | 0% | 0% | 1.0 |" in text
    assert "| searched | 3 | 25.00 |" in text
    assert "| 75% | 0% | 25% | 50% |" in text  # changed, isotropic, wide, tall


def test_fewer_than_eight_blocks_are_descriptive(reporting, folder, tmp_path):
    assert "**Descriptive" in reporting.report(folder(blocks_of(range(7))))
    (tmp_path / "study").rename(tmp_path / "seven")
    assert "Descriptive" not in reporting.report(folder(blocks_of(range(8))))


def test_only_blocks_with_both_arms_are_compared(reporting, folder):
    runs = [run for run in blocks_of([1.0, 5.0, 3.0]) if run[2:4] != ("plain", 1)]
    text = reporting.report(folder(runs))
    assert "| **searched - plain** | 2 | +2.00 |" in text
    assert "| **searched - random** | 3 | +2.50 |" in text
    assert "| plain | 2 |" in text


def test_agreement_of_seeds(reporting, folder):
    """Tall and wide agree on the last of 4 groups; chance is 1/2 * 1/4 + 1/4 * 1/2 + 1/4 * 1/4."""
    runs = [*blocks_of([0.0]), *list(blocks_of([0.0, 0.0], searched=WIDE))[3:]]
    text = reporting.report(folder(runs))
    assert "| searched | 1 | 25.0% | 31.2% | -0.09 |" in text


def test_transposed_twins_are_compared(reporting, folder):
    runs = [*blocks_of([1.0] * 3), *blocks_of([1.0] * 3, transposed=True, searched=WIDE)]
    text = reporting.report(folder(runs))
    assert "## 64 px\n" in text
    assert "## 64 px, transposed\n" in text
    assert "| searched | 64 | 3 | +0.250 | -0.250 | +0.500 | +0.500 to +0.500 | 0.250 |" in text


def test_dose_response(reporting, folder):
    runs = [run for size, gain in ((256, 1), (384, 2), (512, 4)) for run in blocks_of([gain, gain + 1], size=size)]
    study = folder(runs)
    points = reporting.dose_response(reporting.read_results(study), "searched")
    assert [(size, gain.mean) for size, gain in points] == [(256, 1.5), (384, 2.5), (512, 4.5)]
    reporting.report(study)
    with Image.open(study / "study.png") as picture:
        assert picture.height > picture.width * 0.8  # three panels of differences and the gain by size
    rows = read_csv(study / "results.csv")
    assert [row["size"] for row in rows] == ["256"] * 6 + ["384"] * 6 + ["512"] * 6
    assert set(rows[0]) >= {"size", "transposed", "arm", "block", "AP", "AP50", "AP75", "APs", "APm", "APl", "seconds",
                            "share_changed", "fingerprint"}  # fmt: skip
    assert (rows[0]["APs"], rows[0]["APl"]) == ("", "20.0")


def test_each_search_is_compared_with_its_own_shuffle(reporting, folder):
    runs = list(blocks_of([1.0, 2.0], arm="searched:mixture"))
    runs += [(64, False, "shuffled:mixture", block, 20.0, WIDE) for block in (0, 1)]
    text = reporting.report(folder(runs))
    assert "| **searched:mixture - plain** |" in text
    assert "| searched:mixture - shuffled:mixture | 2 |" in text
    assert "| shuffled:mixture - plain | 2 |" in text


def test_a_folder_without_finished_runs(reporting, folder, tmp_path):
    assert reporting.report(folder([])) == "No run is finished yet."
    with pytest.raises(NatsError, match="holds no study"):
        reporting.report(tmp_path)
