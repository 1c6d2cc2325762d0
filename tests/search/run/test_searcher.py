"""Searches from end to end on a drawn data set: what they update, write, and how they survive being stopped."""

import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.models import save_for_hf

from nats_zoo import Genotype, RegroupedConv2d, __version__
from nats_zoo.cli import commands as cli
from nats_zoo.detection import CocoDataset, TrainConfig, Trainer
from nats_zoo.detection.data.drawn import draw_dataset
from nats_zoo.search import SPACES, SearchConfig, Searcher, SearchError
from nats_zoo.search.choosing.cost import ConvCost, CostTable
from nats_zoo.search.run.start import held_back, split_for_search
from nats_zoo.search.supernet.build import alpha_dict, entropy
from tests.support.two_processes import launch_two

CONVS = ["layer2.0.conv2", "layer3.0.conv2", "layer4.0.conv2"]  # of timm's smallest ResNet
TRAIN = 7  # images: halves of 3 and 4


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw_dataset(tmp_path_factory.mktemp("search") / "drawn", train=TRAIN, val=2, test=1, size=64, distance=10)


@pytest.fixture(scope="module")
def weights(tmp_path_factory, randomise_bn):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3, zero_init_last=False)
    randomise_bn(model, torch.Generator().manual_seed(1))
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    save_for_hf(model, folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def options(data, weights):
    """`options(output, **changes)`: a search of a few seconds."""

    def make(output, **changes):
        return {
            "data": str(data),
            "weights": str(weights),
            "output": str(output),
            "backbone": "test_resnet",
            "space": "A",
            "groups": 4,
            "epochs": 4,
            "alpha_start": 1,
            "lr_per_image": 0.005,
            "alpha_lr": 0.05,
            "fpn_channels": 16,
            "head_size": 16,
            "min_size": 64,
            "max_size": 64,
            "anchor_sizes": [8, 16, 32, 48, 64],
            "calibration_images": 4,
            "batch_size": 1,
            "workers": 0,
            **changes,
        }

    return make


@pytest.fixture(scope="module")
def searcher(options, tmp_path_factory):
    """`searcher(**changes)`: a Searcher that has not begun; alpha moves from its first step on."""
    return lambda **changes: Searcher(
        SearchConfig(**options(tmp_path_factory.mktemp("run"), **{"alpha_start": 0, "batch_size": 2, **changes}))
    )


def command_line(options):
    return ["search", *(word for key, value in options.items() for word in (f"--{key}", _text(value)))]


def _text(value):
    return json.dumps(value) if isinstance(value, list | bool) else str(value)


def search(options):
    assert cli.main(command_line(options)) == 0


@pytest.fixture(scope="module")
def bilevel(options, tmp_path_factory):
    """The folder of an uninterrupted bilevel search."""
    chosen = options(tmp_path_factory.mktemp("bilevel") / "run", val_split="val", note="a note")
    search(chosen)
    return chosen


@pytest.fixture(scope="module")
def single(options, tmp_path_factory):
    chosen = options(tmp_path_factory.mktemp("single") / "run", level="single", epochs=2)
    search(chosen)
    return chosen


def records(options, key):
    with open(f"{options['output']}/log.jsonl") as file:
        return [record for record in map(json.loads, file) if key in record]


def checkpoints(options):
    return sorted(path.name for path in os.scandir(f"{options['output']}/checkpoints"))


def final_tensors(options):
    (last,) = checkpoints(options)
    folder = f"{options['output']}/checkpoints/{last}"
    files = sorted(file.name for file in os.scandir(folder) if file.name.endswith(".safetensors"))
    assert files == ["alpha_optimizer.safetensors", "model.safetensors", "weight_optimizer.safetensors"]
    return {file: load_file(f"{folder}/{file}") for file in files}


def genotype(options):
    return Genotype.load(f"{options['output']}/genotype.json")


def assert_same_search(options, others):
    """Genotype, alpha's history, weights and optimisers, bit by bit."""
    assert without_command(genotype(options)) == without_command(genotype(others))
    assert records(options, "alpha") == records(others, "alpha")
    tensors, expected = final_tensors(options), final_tensors(others)
    for file in expected:
        assert tensors[file].keys() == expected[file].keys()
        assert all(torch.equal(tensors[file][key], tensor) for key, tensor in expected[file].items()), file


def without_command(found):
    """The genotype's content; how it was come by may be another command."""
    content = found.to_dict()
    assert content["provenance"].pop("command")
    return content


# --- which images and which parameters --------------------------------------------------------------------------------


def dataset(data):
    return CocoDataset(data / "annotations" / "instances_train.json", data / "images")


def test_bilevel_halves_share_no_image_and_hold_all(data, options):
    images = set(dataset(data).image_ids)
    drawn = set()
    for seed in range(5):
        config = SearchConfig(**options("run", seed=seed))
        halves = [set(half.image_ids) for half in split_for_search(dataset(data), config)]
        assert not halves[0] & halves[1]
        assert halves[0] | halves[1] == images
        assert [len(half) for half in halves] == [TRAIN // 2, TRAIN - TRAIN // 2]
        assert halves == [set(half.image_ids) for half in split_for_search(dataset(data), config)]
        drawn.add(frozenset(halves[0]))
    assert len(drawn) > 1


def test_a_single_level_search_uses_all_images(data, options):
    (everything,) = split_for_search(dataset(data), SearchConfig(**options("run", level="single")))
    assert everything.image_ids == dataset(data).image_ids


def test_a_bilevel_search_needs_two_images(data, options):
    with pytest.raises(SearchError, match="needs at least two images"):
        split_for_search(dataset(data).select([0]), SearchConfig(**options("run")))


def test_a_sensitivity_search_holds_images_back(data, options):
    config = SearchConfig(**options("run", mode="sensitivity", held_back_images=3))
    (used,) = split_for_search(dataset(data), config)
    kept = held_back(dataset(data), config)
    assert len(kept) == 3
    assert not set(used.image_ids) & set(kept.image_ids)
    assert set(used.image_ids) | set(kept.image_ids) == set(dataset(data).image_ids)
    with pytest.raises(SearchError, match=r"held_back_images: expected fewer than its 7 images, found 7"):
        split_for_search(dataset(data), SearchConfig(**options("run", mode="sensitivity", held_back_images=7)))


def batches(data):
    images = dataset(data)
    return [tuple(map(list, zip(*(images[i] for i in pair), strict=True))) for pair in ((0, 1), (2, 3), (4, 5))]


def after_a_step(searcher, *batches, alpha=0.5):
    """Alpha and weights, each as one vector, after one step from alpha that is not zero."""
    with torch.no_grad():
        for mixture in searcher.searched.values():
            mixture.alpha.fill_(alpha)
    before = [torch.cat([p.detach().flatten() for p in split]) for split in _split(searcher)]
    torch.manual_seed(0)
    record = searcher.train_step(*([batch] for batch in batches))
    after = [torch.cat([p.detach().flatten() for p in split]) for split in _split(searcher)]
    assert all(p.grad is None for p in searcher.plain_detector.parameters())
    return record, *after, *before


def _split(searcher):
    named = [(name, p) for name, p in searcher.plain_detector.named_parameters() if p.requires_grad]
    return [[p for name, p in named if name.endswith(".alpha") is is_alpha] for is_alpha in (True, False)]


def test_in_a_bilevel_step_one_half_moves_the_weights_and_the_other_alpha(searcher, data):
    one, two, three = batches(data)
    record, alpha, moved, alpha_before, weights_before = after_a_step(searcher(), one, two)
    assert set(record) == {"loss", "alpha_loss", "lr", "entropy", "share_changed"}
    assert (alpha != alpha_before).all()
    assert not torch.equal(moved, weights_before)

    _, other_alpha, same_weights, *_ = after_a_step(searcher(), one, three)
    assert torch.equal(same_weights, moved)
    assert not torch.equal(other_alpha, alpha)

    _, _, other_weights, *_ = after_a_step(searcher(), three, two)
    assert not torch.equal(other_weights, moved)


def test_alpha_takes_the_gradient_of_its_own_half_alone(searcher, data):
    one, two, _ = batches(data)
    searched = searcher(lr_per_image=0.0, final_lr_per_image=0.0, alpha_weight_decay=0.0)
    torch.manual_seed(0)
    searched.train_step([one], [two])

    by_hand = searcher()
    detector = by_hand.plain_detector.train()
    torch.manual_seed(0)
    for batch in (one, two):
        detector.zero_grad()
        sum(detector(*batch).values()).backward()
    for name, mixture in searched.searched.items():
        mean_gradient = searched.alpha_optimizer.state[mixture.alpha]["exp_avg"]  # a tenth of the first gradient
        torch.testing.assert_close(mean_gradient, 0.1 * by_hand.searched[name].alpha.grad, rtol=1e-4, atol=1e-9)


def test_a_single_level_step_moves_both_by_the_same_loss(searcher, data):
    record, alpha, weights, alpha_before, weights_before = after_a_step(searcher(level="single"), batches(data)[0])
    assert set(record) == {"loss", "lr", "entropy", "share_changed"}
    assert (alpha != alpha_before).all()
    assert not torch.equal(weights, weights_before)


def test_alpha_decays_by_its_own_weight_decay_only(searcher, data):
    batch = batches(data)[0]
    _, alpha, weights, *_ = after_a_step(searcher(level="single"), batch)
    _, same_alpha, decayed, *_ = after_a_step(searcher(level="single", weight_decay=0.5), batch)
    assert torch.equal(same_alpha, alpha)
    assert not torch.equal(decayed, weights)
    _, decayed, same_weights, *_ = after_a_step(searcher(level="single", alpha_weight_decay=100.0), batch)
    assert torch.equal(same_weights, weights)
    assert not torch.equal(decayed, alpha)
    assert (decayed < 0.5).all()


def test_frozen_stages_stay_and_every_alpha_is_trained(searcher, data):
    searched = searcher(trainable_layers=1)
    before = {name: p.detach().clone() for name, p in searched.body.named_parameters()}
    after_a_step(searched, *batches(data)[:2])
    moved = {name for name, p in searched.body.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in moved if name.endswith("alpha")} == {f"{name}.alpha" for name in CONVS}
    assert {name.partition(".")[0] for name in moved if not name.endswith("alpha")} == {"layer4"}


# --- what a run writes ------------------------------------------------------------------------------------------------


def test_alpha_is_frozen_until_alpha_start_and_moves_then(bilevel):
    history = records(bilevel, "alpha")
    assert [record["epoch"] for record in history] == [1, 2, 3, 4]
    flat = [torch.cat([torch.tensor(record["alpha"][name]) for name in CONVS[:2]]) for record in history]
    assert not flat[0].any()
    assert (flat[1] != 0).all()
    assert (flat[2] != flat[1]).all()


def test_weights_move_in_every_candidate(bilevel, weights):
    pretrained = load_file(weights / "model.safetensors")
    model = final_tensors(bilevel)["model.safetensors"]
    for name in CONVS:
        kernels = model[f"backbone.body.{name}.kernels"].chunk(3 if name.startswith("layer4") else 2)
        assert not any(torch.equal(kernel, pretrained[f"{name}.weight"]) for kernel in kernels)
        assert not torch.equal(kernels[0], kernels[1])


def test_candidates_have_statistics_of_their_own(bilevel):
    model = final_tensors(bilevel)["model.safetensors"]
    for name in CONVS:
        for statistic in ("mean", "var"):
            rows = model[f"backbone.body.{name}.{statistic}"]
            assert not any(torch.equal(rows[0], row) for row in rows[1:])


def test_statistics_follow_the_kernels_at_the_beginning_of_an_epoch(searcher):
    searched = searcher()
    first = searched.searched[CONVS[0]]
    searched.begin_epoch()
    mean, var = first.mean.clone(), first.var.clone()
    first.kernel(1).data.mul_(2)
    searched.begin_epoch()
    torch.testing.assert_close(first.mean, mean * torch.tensor([[1.0], [2.0]]))
    torch.testing.assert_close(first.var, var * torch.tensor([[1.0], [4.0]]))


def test_the_genotype_is_the_argmax_of_the_last_alpha(bilevel):
    found = genotype(bilevel)
    assert found.architecture == "test_resnet"
    assert list(found.convs) == CONVS
    alpha = records(bilevel, "alpha")[-1]["alpha"]
    candidates = {"layer2": (1, 3), "layer3": (1, 3), "layer4": (1, 3, 5)}
    for name, runs in found.convs.items():
        groups = [max(range(len(row)), key=row.__getitem__) for row in alpha[name]]
        dilations = [candidates[name.partition(".")[0]][g] for g in groups]
        channels = sum(run.channels for run in runs)
        per_channel = [run.dilation for run in runs for _ in range(run.channels)]
        assert per_channel == [(d, d) for d in dilations for _ in range(channels // 4)]


def test_a_genotype_says_where_it_comes_from(bilevel):
    provenance = genotype(bilevel).provenance
    expected = {
        "method": "mixture",
        "space": "A",
        "groups": 4,
        "level": "bilevel",
        "dataset": f"drawn train, {TRAIN} images",
        "weights": "tiny",
        "epochs": 4,
        "alpha_start": 1,
        "images_per_step": 1,
        "seed": 0,
        "version": __version__,
        "note": "a note",
    }
    assert {key: provenance[key] for key in expected} == expected
    assert provenance["detector"].startswith("fasterrcnn")
    last = records(bilevel, "entropy")[-1]
    assert provenance["metrics"]["entropy"] == round(last["entropy"], 4)
    assert provenance["metrics"]["share_changed"] == pytest.approx(genotype(bilevel).share_changed(), abs=1e-4)


def test_a_report_is_written(bilevel):
    assert sorted(os.listdir(f"{bilevel['output']}/report")) == ["alpha.png", "genotype.png", "report.md", "search.png"]
    for name in ("genotype.png", "search.png", "alpha.png"):
        with Image.open(f"{bilevel['output']}/report/{name}") as picture:
            picture.load()
            assert picture.format == "PNG"
            assert min(picture.size) > 100


def test_nothing_else_is_written(bilevel):
    assert sorted(os.listdir(bilevel["output"])) == ["checkpoints", "genotype.json", "log.jsonl", "report", "run.json"]
    assert checkpoints(bilevel) == [f"step_{4 * (TRAIN // 2):06d}"]


def test_ap_of_the_decoded_network_is_logged_and_goes_into_the_provenance(bilevel):
    (record,) = records(bilevel, "AP")
    assert 0 <= record["AP"] <= 100
    assert genotype(bilevel).provenance["metrics"]["AP on val before retraining"] == record["AP"]


def test_after_a_run_with_val_split_the_detector_is_the_decoded_one(searcher):
    searched = searcher(epochs=1, val_split="val")
    found = searched.run()
    convs = {name: searched.body.get_submodule(name) for name in CONVS}
    assert all(isinstance(conv, RegroupedConv2d) for conv in convs.values())
    assert {name: sum(run.channels for run in conv.runs) for name, conv in convs.items()} == {
        name: sum(run.channels for run in runs) for name, runs in found.convs.items()
    }
    assert all(conv.runs == found.convs[name] for name, conv in convs.items())


def test_learning_rate_is_per_image_and_falls_to_its_end(bilevel, searcher):
    start, end = 0.005, SearchConfig.final_lr_per_image
    before_the_last_of_12 = end + (start - end) * (1 + math.cos(math.pi * 11 / 12)) / 2
    assert records(bilevel, "lr")[-1]["lr"] == pytest.approx(before_the_last_of_12)
    assert searcher(batch_size=3)._lr() == pytest.approx(3 * searcher(batch_size=1)._lr())


# --- the same again ---------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_search(bilevel, tmp_path):
    again = {**bilevel, "output": str(tmp_path / "again")}
    search(again)
    assert_same_search(again, bilevel)
    assert records(again, "loss") == records(bilevel, "loss")


def start(options):
    return subprocess.Popen(
        [sys.executable, "-m", "nats_zoo", *command_line(options)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def stop_behind(process, options, step, number, timeout=400):
    """Wait until a checkpoint of at least this step is there, then send the signal; exit code and stderr."""
    deadline = time.monotonic() + timeout
    while not any(int(name[-6:]) >= step for name in _whole_checkpoints(options)):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=timeout)
    assert not os.path.exists(f"{options['output']}/genotype.json")
    return process.returncode, errors


def _whole_checkpoints(options):
    folder = f"{options['output']}/checkpoints"
    return [name for name in os.listdir(folder) if name.startswith("step_")] if os.path.isdir(folder) else []


def test_interrupted_between_two_steps_and_resumed_equals_uninterrupted(bilevel, tmp_path):
    stopped = {**bilevel, "output": str(tmp_path / "run"), "checkpoint_every": 1}
    code, errors = stop_behind(start(stopped), stopped, 5, signal.SIGINT)  # alpha moves from the fourth
    assert code == 130
    last = errors.splitlines()[-1]
    assert last.startswith("nats: stopped at step ")
    assert last.endswith("continue with --resume true")
    assert "Traceback" not in errors

    search({**stopped, "resume": True})
    assert_same_search(stopped, bilevel)


MODES = {
    "sampled": {"level": "bilevel", "epochs": 2, "alpha_start": 0},
    "sampled-untied": {"mode": "sampled", "level": "single", "kernels": "untied", "epochs": 2},
    "mixture-tied": {"mode": "mixture", "level": "single", "kernels": "tied", "epochs": 2, "norm": "frozen"},
    "sensitivity": {"epochs": 1, "batch_size": 2, "score_images": 3, "held_back_images": 2, "trainable_layers": 5},
    "live": {"mode": "sampled", "level": "single", "norm": "live", "epochs": 2, "final_temperature": 0.5},
}


@pytest.mark.parametrize("mode", MODES)
def test_killed_in_any_mode_and_resumed_equals_uninterrupted(mode, options, tmp_path):
    changes = {"mode": mode, **MODES[mode]}
    whole = options(tmp_path / "whole", **changes)
    search(whole)
    steps = [record["step"] for record in records(whole, "trial" if mode == "sensitivity" else "loss")]
    stopped = {**whole, "output": str(tmp_path / "run"), "checkpoint_every": 1}
    middle = steps[0] if mode == "sensitivity" else max(2, steps[-1] // 2)
    assert middle < steps[-1]  # something is left to do
    code, _ = stop_behind(start(stopped), stopped, middle, signal.SIGKILL)
    assert code == -signal.SIGKILL
    search({**stopped, "resume": True})
    assert_same_search(stopped, whole)
    assert records(stopped, "trial") == records(whole, "trial")


def test_killed_behind_an_epoch_and_resumed_equals_uninterrupted(single, tmp_path):
    """The resumed process calibrates first of all, on the images as the stopped one saw them."""
    stopped = {**single, "output": str(tmp_path / "run")}
    code, _ = stop_behind(start(stopped), stopped, TRAIN, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert _whole_checkpoints(stopped) == [f"step_{TRAIN:06d}"]  # two epochs in all; the next may have been begun
    search({**stopped, "resume": True})
    assert_same_search(stopped, single)


def test_a_finished_search_resumed_is_the_same_search(single):
    before, tensors = genotype(single), final_tensors(single)["model.safetensors"]
    search({**single, "resume": True})
    assert without_command(genotype(single)) == without_command(before)
    again = final_tensors(single)["model.safetensors"]
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())


# --- several processes ------------------------------------------------------------------------------------------------


# The command, after which each process says where its own alpha ended.
WATCHED = """
import sys

from nats_zoo.cli import commands as cli; from nats_zoo import search
from nats_zoo.search.supernet.build import alpha_dict
from nats_zoo.base.files import write_json


class Watched(search.Searcher):
    def run(self):
        genotype = super().run()
        chosen = {name: conv.chosen().tolist() for name, conv in self.searched.items()}
        write_json(f"{sys.argv[0]}.{self.accelerator.process_index}", [alpha_dict(self.searched), chosen])
        return genotype


search.Searcher = Watched
sys.exit(cli.main())
"""


def test_two_processes_make_one_search(options, tmp_path):
    chosen = options(tmp_path / "run", epochs=1, alpha_start=0, val_split="val")
    script = tmp_path / "watched.py"
    script.write_text(WATCHED)
    done = launch_two(script, *command_line(chosen))
    assert done.returncode == 0, done.stderr
    found = genotype(chosen)
    run = tmp_path / "run"
    lines = [line for line in done.stdout.splitlines() if not line.startswith("warning: ")]
    results = [f"genotype: {run / 'genotype.json'}", f"report: {run / 'report' / 'report.md'}"]
    assert lines == [*str(found).splitlines(), "", *results]  # not from both
    assert found.provenance["images_per_step"] == 2
    assert shlex.split(found.provenance["command"])[:2] == ["nats", "search"]
    (record,) = records(chosen, "alpha")
    assert record["step"] == 2  # 3 images, 2 to a step
    assert all(torch.tensor(rows).all() for rows in record["alpha"].values())
    for rank in (0, 1):
        assert json.loads((tmp_path / f"watched.py.{rank}").read_text())[0] == record["alpha"]
    assert len(records(chosen, "AP")) == 1


@pytest.mark.parametrize("mode", ["sampled", "sensitivity"])
def test_two_processes_come_to_the_same_genotype_in_other_modes(mode, options, tmp_path):
    sizes = {"score_images": 3, "held_back_images": 2} if mode == "sensitivity" else {}
    chosen = options(tmp_path / "run", mode=mode, space="C", epochs=1, alpha_start=0, level="single", **sizes)
    script = tmp_path / "watched.py"
    script.write_text(WATCHED)
    done = launch_two(script, *command_line(chosen))
    assert done.returncode == 0, done.stderr
    found = genotype(chosen)
    assert done.stdout.startswith(f"{found}\n")
    ends = [json.loads((tmp_path / f"watched.py.{rank}").read_text()) for rank in (0, 1)]
    assert ends[0] == ends[1]
    per_channel = {
        name: [run.dilation for run in runs for _ in range(run.channels)] for name, runs in found.convs.items()
    }
    for name, groups in ends[0][1].items():
        candidates = SPACES["C"].candidates[int(name[len("layer")])]
        size = len(per_channel[name]) // len(groups)
        assert per_channel[name] == [candidates[g] for g in groups for _ in range(size)]
    assert len(records(chosen, "trial")) == found.provenance.get("trials", 0)


# --- options ----------------------------------------------------------------------------------------------------------


def distinct(found):
    return [len({run.dilation for run in runs}) for runs in found.convs.values()]


def set_alpha(searched, favoured=None):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for conv in searched.searched.values():
            conv.alpha.normal_(generator=generator)
            if favoured is not None:
                conv.alpha[:, favoured] += 2


def finished(searched):
    """The genotype of a searcher as it stands."""
    searched.folder.begin()
    searched.log({"alpha": alpha_dict(searched.searched), "loss": 1.0})
    return searched.finish()


def test_max_dilations_limits_each_convolution_to_the_best_set(searcher):
    found = {}
    for most in (None, 1, 2):
        searched = searcher(space="C", max_dilations=most)
        set_alpha(searched)
        found[most] = finished(searched)
        likeliest = sum(c.log_probabilities().max(1).values.sum().item() for c in searched.searched.values())
    assert max(distinct(found[None])) > 2
    assert set(distinct(found[1])) == {1}
    assert max(distinct(found[2])) == 2
    assert found[2].provenance["max_dilations"] == 2
    assert likeliest < 0


def cost_file(path, slow, convs=CONVS, architecture="test_resnet"):
    """Costs under which one dilation takes ten times as long as all others."""
    dilations = {f"{h}x{w}": [0.0, 10.0 if (h, w) == slow else 1.0] for h, w in SPACES["C"].candidates[4]}
    model = timm.create_model("test_resnet")
    channels = {name: model.get_submodule(name).out_channels for name in convs}
    table = CostTable(
        architecture, "a CPU", torch.__version__, (64, 64), 1, "contiguous", "float32", 1,
        {name: ConvCost(n, float(n), 0.0, {_dilation(k): tuple(ab) for k, ab in dilations.items()})
         for name, n in channels.items()},
    )  # fmt: skip
    table.save(path)
    return str(path)


def _dilation(text):
    return tuple(map(int, text.split("x")))


def test_costs_keep_a_slow_dilation_out_of_the_genotype(searcher, tmp_path):
    costs = cost_file(tmp_path / "costs.json", slow=(2, 2))
    share = {}
    for weight in (0.0, 100.0):
        searched = searcher(space="C", costs=costs, cost_weight=weight)
        set_alpha(searched, favoured=1)
        shares = finished(searched).dilation_shares().values()
        share[weight] = sum(row.get((2, 2), 0) for row in shares)
    assert share[0.0] > 1
    assert share[100.0] == 0


def test_expected_time_and_entropy_in_the_loss_move_alpha_their_way(searcher, data, tmp_path):
    batch = batches(data)[0]
    costs = cost_file(tmp_path / "costs.json", slow=(3, 3))
    plain = {"level": "single", "space": "C", "mode": "sampled"}
    cheap, decided, open_ = (
        searcher(**plain, **terms)
        for terms in ({"costs": costs, "cost_loss": 1e4}, {"entropy_weight": 1e4}, {"entropy_weight": -1e4})
    )
    for searched in (cheap, decided, open_):
        set_alpha(searched)
    before = entropy(decided.searched.values())
    was = [c.log_probabilities()[:, 2].detach().clone() for c in cheap.searched.values()]
    for searched in (cheap, decided, open_):
        torch.manual_seed(0)
        searched.train_step([batch])
    assert all((c.log_probabilities()[:, 2] < p).all() for c, p in zip(cheap.searched.values(), was, strict=True))
    assert entropy(decided.searched.values()) < before < entropy(open_.searched.values())


def test_costs_of_another_network_or_space_are_refused(searcher, tmp_path):
    with pytest.raises(SearchError, match=r"costs\.json: architecture: the costs are those of 'resnet18'"):
        searcher(costs=cost_file(tmp_path / "costs.json", (2, 2), architecture="resnet18"))
    with pytest.raises(SearchError, match=r"costs\.json: the convolution 'layer4\.0\.conv2' was not measured"):
        searcher(costs=cost_file(tmp_path / "costs.json", (2, 2), convs=CONVS[:2]))
    with pytest.raises(SearchError, match="cost_weight: needs measured costs"):
        searcher(cost_weight=1.0)


def test_calibrated_gains_come_with_the_genotype(searcher):
    searched = searcher(space="A", calibrate_gains=True)
    set_alpha(searched)
    found = finished(searched)
    assert set(found.gains) == {n for n, runs in found.convs.items() if {r.dilation for r in runs} != {(1, 1)}}
    for name, gains in found.gains.items():
        for run, gain in zip(found.convs[name], gains, strict=True):
            assert (gain == 1) == (run.dilation == (1, 1))
    assert found.provenance["gains"]["images"] == 4
    assert found.provenance["method"] == "mixture"


def test_temperature_falls_geometrically_while_alpha_moves(searcher):
    searched = searcher(alpha_start=1, epochs=3, temperature=2.0, final_temperature=0.5)  # 2 steps an epoch
    seen = []
    for step in range(searched.total_steps):
        searched.step = step
        searched._set_temperature()
        seen.append(next(iter(searched.searched.values())).temperature)
    assert seen[:3] == [2.0, 2.0, 2.0]
    assert seen[-1] == pytest.approx(0.5)
    ratios = [b / a for a, b in itertools.pairwise(seen[2:])]
    assert ratios == pytest.approx([ratios[0]] * len(ratios))
    assert ratios[0] < 1


def test_alpha_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(options, tmp_path, capsys):
    chosen = options(tmp_path / "run", level="single", alpha_lr=3e37, alpha_start=1, epochs=3)
    assert cli.main(command_line(chosen)) == 2
    (complaint,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nats:")]
    assert re.search(r"run: .*layer\d.*not finite at step \d+.*checkpoint", complaint)
    assert checkpoints(chosen) == [f"step_{TRAIN:06d}"]


def test_a_search_whose_alpha_did_not_move_says_so(options, tmp_path, capsys):
    chosen = options(tmp_path / "run", level="single", alpha_lr=1e-9, alpha_start=0, epochs=1)
    search(chosen)
    printed = capsys.readouterr().out
    assert "warning: alpha did not move" in printed
    with open(f"{chosen['output']}/report/report.md") as page:
        assert "alpha did not move" in page.read()


def test_both_convolutions_and_named_ones_can_be_searched(searcher):
    assert list(searcher(basic_block="both").searched)[:2] == ["layer2.0.conv1", "layer2.0.conv2"]
    assert list(searcher(convs=("layer4.*",)).searched) == ["layer4.0.conv1", "layer4.0.conv2"]


# --- sensitivity ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(options, tmp_path_factory):
    """The folder of a plain detector, trained a little."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    unknown = {"space", "groups", "alpha_start", "alpha_lr"}
    chosen = {key: value for key, value in options(folder, epochs=2).items() if key not in unknown}
    Trainer(TrainConfig(**{**chosen, "val_split": None, "warmup_steps": 2})).run()
    return folder / "model"


def test_a_sensitivity_search_starts_from_a_trained_detector_and_lowers_its_held_back_loss(options, trained, tmp_path):
    chosen = options(
        tmp_path / "run", mode="sensitivity", detector=str(trained), epochs=0, space="C", score_images=4,
        held_back_images=3, min_size=999,  # the detector's own size counts
    )  # fmt: skip
    search(chosen)
    trials = records(chosen, "trial")
    assert trials
    assert [t["actual"] < 0 for t in trials] == [t["accepted"] for t in trials]
    found = genotype(chosen)
    assert found.provenance["method"] == "sensitivity"
    assert found.provenance["weights"] == "model"
    assert "short side 64" in found.provenance["detector"]
    assert found.provenance["trials"] == len(trials)
    assert (found.share_changed() > 0) == any(t["accepted"] for t in trials)
    assert len(records(chosen, "scores")) == found.provenance["rounds"] + (not trials[-1]["accepted"])
    assert os.path.exists(f"{chosen['output']}/report/predictions.png")


def test_a_detector_that_does_not_fit_is_refused(options, trained, tmp_path, searcher):
    other = draw_dataset(tmp_path / "drawn", train=3, val=1, test=1, size=64, distance=10)
    path = other / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    content["categories"].append({"id": 99, "name": "another"})
    path.write_text(json.dumps(content))
    with pytest.raises(SearchError, match=r"detector: .*model: has 3 classes, .*instances_train.json 4"):
        searcher(detector=str(trained), data=str(other))
    with pytest.raises(SearchError, match=r"norm: the batch norms of .*model are frozen"):
        searcher(detector=str(trained), norm="live")
