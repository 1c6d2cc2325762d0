"""benchmarks/search_cost.py: it times the real updates, in turns, and measures memory where nothing else adds to it."""

import csv
import importlib.util
import signal
import subprocess
import sys

import pytest
import torch

from tests.support.paths import ROOT

SCRIPT = ROOT / "benchmarks" / "search_cost.py"
TINY = ["--model", "test_resnet", "--size", "64x96", "--batch", "1", "--groups", "4", "--fpn-channels", "8"]
TINY += ["--head-size", "16", "--roi-samples", "8", "--threads", "1"]
MIB = 2**20


@pytest.fixture(scope="module")
def search_cost():
    spec = importlib.util.spec_from_file_location("search_cost", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def trainee(search_cost):
    def create(mode, kernels=None, *flags):
        args = search_cost.parse_args([*TINY, *flags])
        return search_cost.Trainee("test_resnet", search_cost.Arm(mode, kernels), search_cost.draw_batches(args), args)

    return create


# --- what is compared -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ([], ["plain", "mixture untied", "sampled tied"]),
        (
            ["--mode", "mixture", "sampled", "sensitivity", "--kernels", "tied", "untied"],
            ["plain", "mixture tied", "mixture untied", "sampled tied", "sampled untied", "sensitivity tied"],
        ),
    ],
)
def test_arms(search_cost, flags, names):
    assert [arm.name for arm in search_cost.list_arms(search_cost.parse_args(flags))] == names


def changed(trainee, work):
    """Names of the parameters that some work changes."""
    before = {name: parameter.detach().clone() for name, parameter in trainee.detector.named_parameters()}
    work()
    return {name for name, parameter in trainee.detector.named_parameters() if not parameter.equal(before[name])}


@pytest.mark.parametrize("norm", ["calibrated", "live"])
@pytest.mark.parametrize(("mode", "kernels"), [("mixture", "untied"), ("sampled", "tied")])
def test_a_round_moves_the_weights_and_every_alpha(trainee, mode, kernels, norm):
    own = trainee(mode, kernels, "--norm", norm, "--precision", "bf16")
    moved = changed(own, lambda: own.round(0))
    alphas = {f"backbone.body.{name}.alpha" for name in own.searched}
    assert len(alphas) == 3
    assert alphas <= moved
    assert all(f"backbone.body.{name}.kernels" in moved for name in own.searched)
    assert any(name.startswith("roi_heads") for name in moved)
    frozen = [name for name in moved if "body.conv1" in name or "body.layer1" in name]
    assert not frozen
    assert all(parameter.grad is None for parameter in own.detector.parameters())


def test_alpha_moves_in_its_own_update_only(trainee):
    own = trainee("mixture", "tied")
    own.batches, own.optimizers = own.batches[:1], own.optimizers[:1]
    moved = changed(own, lambda: own.round(0))
    assert moved
    assert not any(name.endswith("alpha") for name in moved)


def test_plain_and_searched_train_the_same_weights(trainee):
    plain, tied = trainee("plain"), trainee("sampled", "tied")
    names = [changed(own, lambda own=own: own.round(0)) for own in (plain, tied)]
    as_plain = {name.replace(".kernels", ".weight") for name in names[1] if not name.endswith("alpha")}
    assert as_plain == names[0]


def test_a_scoring_pass_scores_all_images_and_trains_nothing(trainee):
    own = trainee("sensitivity", "tied")
    passed = []
    own.detector.register_forward_hook(lambda *_: passed.append(1))
    assert not changed(own, lambda: own.round(0))
    assert len(passed) == 2


def test_random_weights_are_awake(search_cost):
    """With timm's zero_init_last, alpha has no gradient, and a search would cost what it does not do."""
    args = search_cost.parse_args(TINY)
    detector = search_cost.create_plain_detector("test_resnet", search_cost.draw_batches(args)[0][0], args)
    asleep = search_cost.create_detector("fasterrcnn", "test_resnet", 2, weights=None)
    zeros = [
        sum(not module.weight.any() for module in each.backbone.body.modules() if hasattr(module, "running_mean"))
        for each in (detector, asleep)
    ]
    assert zeros == [0, 4]
    assert not any(p.requires_grad for p in detector.backbone.body.layer1.parameters())
    assert all(p.requires_grad for n, p in detector.backbone.body.layer2.named_parameters() if "conv" in n)


# --- figures ----------------------------------------------------------------------------------------------------------


def test_arms_take_turns_and_warm_up_is_not_counted(search_cost):
    calls, seen = [], []
    rounds = {name: (lambda number, name=name: calls.append((name, number))) for name in ("plain", "sampled tied")}
    args = search_cost.parse_args(["--repeats", "3", "--warmup", "2"])
    times = search_cost.time_rounds(rounds, args, lambda times: seen.append(len(times["plain"])))
    assert calls == [(name, number) for number in range(5) for name in rounds]
    assert {name: len(values) for name, values in times.items()} == {"plain": 3, "sampled tied": 3}
    assert seen == [1, 2, 3]


def test_ratios_are_taken_per_round(search_cost):
    """The machine slowed down tenfold halfway; the ratios do not know."""
    times = {"plain": [1.0, 1.0, 10.0, 10.0, 10.0], "sampled tied": [1.1, 1.2, 13.0, 14.0, 15.0]}
    rows = search_cost.summarise(times, images_per_round=4)
    assert rows["plain"]["ratio"] == 1
    sampled = rows["sampled tied"]
    assert sampled["seconds_per_image"] == 13 / 4
    assert (sampled["ratio_q1"], sampled["ratio"], sampled["ratio_q3"]) == pytest.approx((1.2, 1.3, 1.4))


def test_the_peak_is_that_since_the_start(search_cost):
    torch.ones(600 * MIB, dtype=torch.uint8)  # gone at once
    level = search_cost.start_peak("cpu")
    torch.ones(200 * MIB, dtype=torch.uint8)
    assert 190 < (search_cost.peak_memory("cpu") - level) / MIB < 300


def test_memory_is_a_process_of_its_own(search_cost):
    """What its parent holds is no part of it, although the system begins getrusage's figure with that."""
    held = torch.ones(1500 * MIB, dtype=torch.uint8)
    args = search_cost.parse_args(TINY)
    found = search_cost.measure_memory("test_resnet", search_cost.PLAIN, args)
    assert 0 < found["growth_mib"] < found["total_mib"] < held.numel() / MIB


@pytest.mark.parametrize(
    ("figures", "verdict"),
    [
        (dict(ratio=1.6), "time 1.60: met"),
        (dict(ratio=1.61), "time 1.61: missed in time"),
        (dict(ratio=1.2, total_ratio=1.1, growth_ratio=1.7), "growth 1.70: missed in growth"),
        (dict(ratio=2, total_ratio=1.9, growth_ratio=1.1), "growth 1.10: missed in time, total memory"),
    ],
)
def test_goal(search_cost, figures, verdict):
    rows = [dict(model="resnet18", mode=mode, kernels="tied") | figures for mode in ("mixture", "sampled")]
    (line,) = search_cost.goal_lines(rows)
    assert line.startswith("goal of at most 1.6: resnet18 sampled tied: time ")
    assert line.endswith(verdict)


# --- the command ------------------------------------------------------------------------------------------------------


def test_prints_a_table_and_writes_csv(search_cost, tmp_path, capsys):
    target = tmp_path / "cost.csv"
    flags = [*TINY, "--mode", "sampled", "--repeats", "2", "--memory-format", "channels_last", "--csv", str(target)]
    assert search_cost.main(flags) == 0
    with target.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["mode"], row["kernels"]) for row in rows] == [("plain", ""), ("sampled", "tied")]
    expected = dict(model="test_resnet", size="64x96", batch="1", groups="4", space="C", norm="calibrated")
    expected |= dict(memory_format="channels_last", precision="no", weights="random", trainable_layers="3")
    expected |= dict(rounds="2", threads="1", torch=torch.__version__)
    for row in rows:
        assert expected.items() <= row.items()
        assert row["device_name"]
        assert float(row["seconds_per_image"]) > 0
        assert float(row["ratio_q1"]) <= float(row["ratio"]) <= float(row["ratio_q3"])
        assert float(row["total_mib"]) > float(row["growth_mib"]) > 0
        for what in ("total", "growth"):
            ratio = float(row[f"{what}_mib"]) / float(rows[0][f"{what}_mib"])
            assert float(row[f"{what}_ratio"]) == pytest.approx(ratio, rel=0.02)
    lines = capsys.readouterr().out.splitlines()
    assert rows[0]["device_name"] in lines[0]
    first = [line.partition(":")[0].removeprefix("test_resnet ") for line in lines[1:5]]
    assert first == ["plain", "sampled tied", "round 1", "round 2"]
    assert f"{float(rows[1]['ratio']):.3f}" in lines[7]
    assert lines[-1].startswith("goal of at most 1.6: test_resnet sampled tied: time ")


# In a shell's background interrupts are ignored, and would be by the child too.
HEED_INTERRUPTS = """
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_what_was_measured_before_an_interruption_is_kept(search_cost, tmp_path):
    target = tmp_path / "cost.csv"
    flags = [*TINY, "--mode", "sampled", "--repeats", "1000000", "--no-memory", "--csv", str(target)]
    command = [sys.executable, "-c", HEED_INTERRUPTS, SCRIPT, *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if "round 3" in line:
                process.send_signal(signal.SIGINT)
                break
        rest = process.stdout.read()
    assert process.returncode == 130
    assert "goal of at most 1.6" in rest
    with target.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["mode"] for row in rows] == ["plain", "sampled"]
    assert int(rows[0]["rounds"]) >= 3


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "absent"], "search_cost: backbone: timm has no model 'absent'"),
        (["--weights", "test_resnet=absent"], "absent"),
        (["--space", "D"], "search_cost: space: D: expected A, B, C or a YAML file"),
        (["--groups", "5"], "search_cost: layer2.0.conv2: its 48 output channels can not be split into 5 groups"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(search_cost, flags, words, tmp_path, capsys):
    assert search_cost.main([*TINY, "--no-memory", "--csv", str(tmp_path / "cost.csv"), *flags]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_bad_input_in_the_process_that_measures_memory(search_cost, capsys):
    assert search_cost.main([*TINY, "--model", "absent"]) == 2
    assert capsys.readouterr().err == "search_cost: absent plain: backbone: timm has no model 'absent'\n"


@pytest.mark.parametrize("flags", [["--repeats", "0"], ["--size", "64"], ["--mode", "fast"], ["--weights", "folder"]])
def test_bad_flags(search_cost, flags):
    with pytest.raises(SystemExit) as ended:
        search_cost.main(flags)
    assert ended.value.code == 2
