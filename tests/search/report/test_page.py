"""The report of a search: figures that were computed by hand, warnings where they are due, and commands that run."""

import json
import math
import re
import shlex

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from PIL import Image
from torch import nn

from nats_zoo import NatsError
from nats_zoo.detection import TrainConfig
from nats_zoo.genotype.genotype import Genotype
from nats_zoo.genotype.runs import Run, Runs
from nats_zoo.search import MixtureConv2d, SearchConfig, decode
from nats_zoo.search.report.outcome import alpha_outcome, read_snapshots
from nats_zoo.search.report.page import write_report
from nats_zoo.search.supernet.build import alpha_dict, entropy, share_changed

CANDIDATES = {"layer2.0.conv2": ((1, 1), (2, 2), (1, 3), (3, 1)), "layer3.0.conv2": ((1, 1), (3, 3))}
# Groups of 4 channels, two in each convolution.
PROBABILITIES = {
    "layer2.0.conv2": [[0.7, 0.1, 0.1, 0.1], [0.2, 0.3, 0.4, 0.1]],
    "layer3.0.conv2": [[0.4, 0.6], [0.9, 0.1]],
}
FOUND = {"layer2.0.conv2": (Run(4, 1, 1), Run(4, 1, 3)), "layer3.0.conv2": (Run(4, 3, 3), Run(4, 1, 1))}
UNIFORM = {conv: np.zeros((2, len(dilations))) for conv, dilations in CANDIDATES.items()}
COMMAND = "nats search --data 'a|b' --output runs/search"
OPTIONS = {
    "data": "data/a b",
    "train_split": "train",
    "backbone": "resnet18.tv_in1k",
    "weights": "pretrained",
    "mode": "mixture",
    "level": "bilevel",
    "kernels": None,
    "norm": "calibrated",
    "space": "C",
    "groups": 2,
    "channels_per_group": None,
    "epochs": 10,
    "alpha_start": 4,
    "seed": 7,
    "temperature": 1.0,
    "min_size": 512,
    "anchor_sizes": [16, 32, 64, 128, 256],
    "clip_grad": None,
    "alpha_lr": 0.05,
}


def logs(probabilities, temperature=1.0):
    return {conv: (temperature * np.log(p)).tolist() for conv, p in probabilities.items()}


def alpha_record(epoch, alpha):
    return {"step": 10 * epoch, "epoch": epoch, "alpha": {conv: np.asarray(a).tolist() for conv, a in alpha.items()}}


def loss_records(epochs=10):
    return [{"step": 5 * n, "epoch": n / 2, "loss": 2 - n / 20, "entropy": 1.0} for n in range(1, 2 * epochs + 1)]


def trial(number, changes, predicted, actual, accepted):
    held_back = 1.5 + (actual or 0)
    record = {"trial": number, "changes": changes, "predicted": predicted, "actual": actual, "accepted": accepted}
    return {"step": 100 + number, "epoch": 10.0, "held_back_loss": held_back, **record}


def scores_record(step, value=-0.1):
    scores = {conv: np.full((2, len(dilations)), value) for conv, dilations in CANDIDATES.items()}
    return {"step": step, "epoch": 10.0, "scores": {conv: s.tolist() for conv, s in scores.items()}}


@pytest.fixture
def report(tmp_path):
    """`report(records, found=FOUND, **options)` writes one of runs/search: (warnings, its page)."""

    def write(records, found=FOUND, provenance=None, candidates=CANDIDATES, tail="", **options):
        folder = tmp_path / "runs" / "search"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").write_text(json.dumps(OPTIONS | options))
        (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
        provenance = {"dataset": "a b train, 99 images", "weights": "tv_in1k", "command": COMMAND} | (provenance or {})
        warnings = write_report(folder, Genotype("resnet18", found, provenance=provenance), candidates)
        return warnings, (folder / "report" / "report.md").read_text()

    write.folder = tmp_path / "runs" / "search"
    return write


def table(page):
    """The page's rows of two cells."""
    return dict(re.findall(r"^\| ([^|]+) \| ((?:\\\||[^|])+) \|$", page, re.MULTILINE))


def pictures(folder):
    return {path.name for path in (folder / "report").iterdir() if path.suffix == ".png"}


DECIDED = [*loss_records(), *(alpha_record(epoch, logs(PROBABILITIES)) for epoch in range(5, 11))]


# --- figures ----------------------------------------------------------------------------------------------------------


def test_the_figures_of_a_search_by_alpha(report):
    """Entropies: 0.9404 / ln 4, 1.2799 / ln 4, 0.6730 / ln 2 and 0.3251 / ln 2. Margins: 0.6, 0.1, 0.2 and 0.8."""
    warnings, page = report(DECIDED)
    rows = table(page)
    assert warnings == []
    assert "## Warnings" not in page
    assert rows["relative entropy of the probabilities"].startswith("0.760 ")
    assert rows["groups with a probability above 1/2"] == "3 of 4 (75%)"
    assert rows["mean probability of the chosen candidate"] == "0.650 (before the search: 0.375)"
    assert rows["mean margin to the best other candidate"] == "0.425"
    assert rows["groups that did not get their likeliest candidate"] == "0 of 4"
    assert rows["groups that changed their mind at the end"] == "0%, after epoch 9"
    assert rows["channels changed"] == "50.0%"


def test_groups_that_a_limit_or_a_cost_overruled_count_with_what_they_got(report):
    """In layer3 the first group gets the plain dilation at 0.4 instead of 0.6: -0.2 for its margin, which was 0.2."""
    _, page = report(DECIDED, {**FOUND, "layer3.0.conv2": (Run(8, 1, 1),)})
    rows = table(page)
    assert rows["groups that did not get their likeliest candidate"] == "1 of 4"
    assert rows["mean probability of the chosen candidate"].startswith("0.600 ")
    assert rows["mean margin to the best other candidate"] == "0.325"


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), spread=st.floats(0, 5), temperature=st.sampled_from([0.3, 1.0, 2.0]))
def test_the_figures_are_those_of_the_supernet(seed, spread, temperature):
    generator = torch.Generator().manual_seed(seed)
    searched = {}
    for conv, groups in (("layer2.0.conv2", 2), ("layer3.0.conv2", 4)):
        plain = nn.Conv2d(8, 8, 3, padding=1)
        searched[conv] = MixtureConv2d(plain, CANDIDATES[conv], groups, tied=True, eps=None)
        searched[conv].temperature = temperature
        searched[conv].alpha.data.normal_(0, spread, generator=generator)
    genotype = decode(searched, "resnet18", {})
    record = {"step": 1, "epoch": 1, "alpha": alpha_dict(searched)}
    outcome = alpha_outcome(read_snapshots([record], CANDIDATES, [temperature], "log"), genotype, CANDIDATES)
    tops = torch.cat([conv.log_probabilities().exp().max(1).values for conv in searched.values()])
    assert outcome.groups == 6
    assert outcome.entropy == pytest.approx(entropy(searched.values()), abs=1e-5)
    assert outcome.chosen == pytest.approx(tops.mean().item(), abs=1e-5)
    assert (tops > 0.5 + 1e-5).sum() <= outcome.decided <= (tops > 0.5 - 1e-5).sum()  # float64 there, float32 here
    assert outcome.overruled == 0
    assert outcome.margin >= 0
    assert genotype.share_changed() == pytest.approx(share_changed(searched.values()), abs=1e-6)


def test_the_shares_per_stage_and_kind(report):
    convs = {
        "layer2.0.conv2": (Run(3, 1, 1), Run(1, 1, 3), Run(2, 2, 2), Run(2, 3, 1)),
        "layer2.1.conv2": (Run(8, 1, 5),),
        "layer3.0.conv2": (Run(16, 3, 3),),
    }
    _, page = report(loss_records(), convs)
    assert "| stage | channels | plain | isotropic | wide | tall |" in page
    assert "| layer2 | 16 | 18.8% | 12.5% | 56.2% | 12.5% |" in page
    assert "| layer3 | 16 | 0.0% | 100.0% | 0.0% | 0.0% |" in page
    assert "| all | 32 | 9.4% | 56.2% | 28.1% | 6.2% |" in page


def test_the_page_says_what_was_searched(report):
    metrics = {"entropy": 0.5, "AP on val before retraining": 12.345}
    provenance = {"kernels": "untied", "metrics": metrics}
    _, page = report(DECIDED, provenance=provenance, entropy_weight=0.1, final_temperature=None, temperature=1.0)
    rows = table(page)
    expected = {
        "backbone": "resnet18.tv_in1k",
        "weights": "tv_in1k",
        "data set": "a b train, 99 images",
        "mode": "mixture, bilevel",
        "kernels": "untied",
        "batch norm": "calibrated",
        "space": "C",
        "groups": "2 in each of 2 convolutions",
        "epochs": "10, alpha frozen for the first 4",
        "seed": "7",
        "alpha lr": "0.05",
        "entropy weight": "0.1",
        "AP on val before retraining": "12.3",
    }
    assert rows.items() >= expected.items()
    assert "temperature" not in rows  # at its default
    assert f"```bash\n{COMMAND}\n```" in page
    _, page = report(DECIDED, groups=None, channels_per_group=4)
    assert table(page)["groups"] == "4 channels each, in 2 convolutions"


def test_what_run_json_does_not_say_is_left_out(report, tmp_path):
    _, page = report(DECIDED)
    (report.folder / "run.json").write_text("{}")
    write_report(report.folder, Genotype("resnet18", FOUND), CANDIDATES)
    page = (report.folder / "report" / "report.md").read_text()
    assert "seed" not in table(page)
    assert "None" not in page
    assert "nats train --data DATA --backbone resnet18 --genotype" in page


def test_every_picture_on_the_page_is_there_and_a_picture(report):
    for records, options, expected in (
        (DECIDED, {}, {"genotype.png", "search.png", "alpha.png"}),
        (
            [*loss_records(), scores_record(100), trial(1, 2, -0.1, -0.2, True)],
            {"mode": "sensitivity"},
            {"genotype.png", "search.png", "predictions.png", "scores.png"},
        ),
    ):
        _, page = report(records, **options)
        assert set(re.findall(r"\]\((\w+\.png)\)", page)) == pictures(report.folder) == expected
        for name in expected:
            assert Image.open(report.folder / "report" / name).size[0] > 300


# --- temperature ------------------------------------------------------------------------------------------------------


def test_probabilities_are_at_the_temperature_of_the_options(report):
    record = alpha_record(10, logs(PROBABILITIES, temperature=0.2))
    _, page = report([*loss_records(), record], temperature=0.2)
    assert table(page)["relative entropy of the probabilities"].startswith("0.760 ")
    assert table(page)["temperature"] == "0.2"
    _, page = report([*loss_records(), record])
    assert table(page)["relative entropy of the probabilities"].startswith("0.98")


def test_a_temperature_that_falls_is_the_last_one_at_the_end(report):
    """From 1 to 0.01 in the 60 steps after epoch 4; at step 70 it is 0.01 ** (29 / 59)."""
    first = alpha_record(7, logs(PROBABILITIES, temperature=0.01 ** (29 / 59)))
    records = [*loss_records(), first, alpha_record(10, logs(PROBABILITIES, temperature=0.01))]
    _, page = report(records, final_temperature=0.01)
    assert table(page)["relative entropy of the probabilities"].startswith("0.760 ")
    falling = (report.folder / "report" / "alpha.png").read_bytes()
    report([*loss_records(), *(alpha_record(epoch, logs(PROBABILITIES)) for epoch in (7, 10))])
    assert (report.folder / "report" / "alpha.png").read_bytes() == falling


def test_a_logged_temperature_counts_and_not_that_of_the_options(report):
    records = [alpha_record(epoch, logs(PROBABILITIES, temperature=0.2)) | {"temperature": 0.2} for epoch in (7, 10)]
    _, page = report([*loss_records(), *records], temperature=3.0, final_temperature=0.01)
    assert table(page)["relative entropy of the probabilities"].startswith("0.760 ")
    with pytest.raises(NatsError, match=r"log\.jsonl: temperature: expected a finite number above 0, found 0"):
        report([*loss_records(), alpha_record(10, logs(PROBABILITIES)) | {"temperature": 0}])


# --- warnings ---------------------------------------------------------------------------------------------------------


def at_lead(lead):
    """All groups' first-best candidates at this share of the way from uniform to certain, but not the plain one."""
    found = {}
    for conv, dilations in CANDIDATES.items():
        count = len(dilations)
        top = (1 + lead * (count - 1)) / count
        row = [(1 - top) / (count - 1)] * count
        row[1] = top
        found[conv] = [row, row]
    return found


SECOND = {"layer2.0.conv2": (Run(8, 2, 2),), "layer3.0.conv2": (Run(8, 3, 3),)}


@pytest.mark.parametrize(("lead", "is_said"), [(0.02, True), (0.09, True), (0.11, False), (0.6, False)])
def test_alpha_that_did_not_move_is_said_below_a_tenth_of_the_way(lead, is_said, report):
    warnings, page = report([*loss_records(), alpha_record(9, UNIFORM), alpha_record(10, logs(at_lead(lead)))], SECOND)
    assert [warning.partition(":")[0] for warning in warnings] == ["alpha did not move"] * is_said
    assert ("- **alpha did not move" in page) is is_said
    if is_said:
        assert f"{lead:.1%} of the way" in warnings[0]


def test_alpha_without_a_step_is_a_tie_that_the_plain_dilation_wins(report):
    plain = {conv: (Run(8, 1, 1),) for conv in CANDIDATES}
    warnings, _ = report([*loss_records(), *(alpha_record(epoch, UNIFORM) for epoch in range(1, 11))], plain)
    assert len(warnings) == 2
    assert warnings[0].startswith("alpha did not move: relative entropy 1.000")
    assert warnings[1].startswith("collapse: every group kept the plain dilation")


def test_noise_in_alpha_is_no_move_and_a_preference_of_some_groups_is_one(report):
    rng = np.random.default_rng(0)
    many = {"layer4.0.conv2": tuple((1, d) for d in range(1, 10))}
    noise = rng.normal(0, 0.25, (16, 9))
    for alpha, expected in ((noise, ["alpha did not move"]), (noise + 2 * np.eye(9)[rng.integers(0, 9, 16)], [])):
        convs = {"layer4.0.conv2": Runs.of((1, 1 + int(best)) for best in alpha.argmax(1))}
        records = [*loss_records(), alpha_record(10, {"layer4.0.conv2": alpha})]
        warnings, _ = report(records, convs, candidates=many)
        assert [warning.partition(":")[0] for warning in warnings] == expected


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ((Run(8, 1, 1),), "collapse: every group kept the plain dilation; nothing was found"),
        ((Run(8, 3, 3),), "collapse: every group took the same dilation, 3"),
        ((Run(4, 3, 1), Run(4, 3, 1)), "collapse: every group took the same dilation, 3×1"),
        ((Run(4, 1, 1), Run(4, 3, 3)), None),
    ],
)
def test_a_collapse_says_to_what(runs, message, report):
    candidates = {"layer2.0.conv2": ((1, 1), (3, 3), (3, 1))}
    alpha = 5 * np.eye(3)[[0, 0]]
    warnings, _ = report([*loss_records(), alpha_record(10, {"layer2.0.conv2": alpha})],
                         {"layer2.0.conv2": runs}, candidates=candidates)  # fmt: skip
    assert warnings == ([message] if message else [])


def test_groups_that_change_their_mind_in_the_last_tenth_are_counted(report):
    """Of four groups one changes after epoch 9; a change before does not count."""
    early = {**PROBABILITIES, "layer3.0.conv2": [[0.6, 0.4], [0.1, 0.9]]}
    late = {**PROBABILITIES, "layer3.0.conv2": [[0.6, 0.4], [0.9, 0.1]]}
    records = [alpha_record(epoch, logs(early)) for epoch in range(5, 9)]
    settled = [*records, *(alpha_record(epoch, logs(PROBABILITIES)) for epoch in (9, 10))]
    restless = [*records, alpha_record(9, logs(late)), alpha_record(10, logs(PROBABILITIES))]
    assert report([*loss_records(), *settled])[0] == []
    warnings, page = report([*loss_records(), *restless])
    assert len(warnings) == 1
    assert warnings[0].startswith("not converged: 25% of the groups (more than 10%)")
    assert table(page)["groups that changed their mind at the end"] == "25%, after epoch 9"


def test_leaving_the_tie_in_which_alpha_began_is_no_change_of_mind(report):
    records = [alpha_record(epoch, UNIFORM) for epoch in range(1, 10)]
    warnings, page = report([*loss_records(), *records, alpha_record(10, logs(PROBABILITIES))])
    assert warnings == []
    assert table(page)["groups that changed their mind at the end"].startswith("not known")


@pytest.mark.parametrize("records", [[], [{"step": 100, "epoch": 10, "alpha": None}]])
def test_no_alpha_steps_are_said(records, report):
    warnings, page = report([*loss_records(), *records])
    assert len(warnings) == 1
    assert warnings[0].startswith("no alpha steps were logged")
    assert pictures(report.folder) == {"genotype.png", "search.png"}
    assert "entropy of the probabilities" not in page


# --- sensitivity ------------------------------------------------------------------------------------------------------


def test_the_figures_of_a_sensitivity_search(report):
    records = [
        *({**record, "entropy": None} for record in loss_records()),
        scores_record(100),
        trial(1, 8, -0.8, 0.3, False),
        trial(2, 4, -0.5, -0.2, True),
        scores_record(102, -0.05),
        trial(3, 2, -0.25, -0.05, True),
        trial(4, 2, -0.1, None, None),
        trial(5, 1, -0.1, 0.1, False),
    ]
    warnings, page = report(records, mode="sensitivity", score_images=32)
    rows = table(page)
    assert warnings == []
    assert rows["mode"] == "sensitivity"
    assert rows["score images"] == "32"
    assert "kernels" not in rows
    assert "alpha lr" not in rows
    assert rows["rounds of scoring"] == "2"
    assert rows["trials"] == "5, of which 2 accepted"
    assert rows["changes kept"] == "6"
    assert rows["change of the loss by what was accepted"] == "-0.25 (predicted: -0.75)"
    assert rows["trials, up to the last accepted one, at which the loss changed the other way"] == "1 of 3"
    assert rows["loss on held-back images"] == "1.45"


@pytest.mark.parametrize(
    ("trials", "message"),
    [
        ([], "no trials were logged"),
        ([(1, 2, -0.3, 0.1, False), (2, 1, -0.1, 0.2, False)], "no change was accepted: at none of the 2 trials"),
        (
            [(1, 8, -0.3, 0.1, False), (2, 4, -0.2, 0.1, False), (3, 2, -0.1, -0.1, True)],
            "predictions failed: at 2 of 3 trials",
        ),
        ([(1, 4, -0.2, -0.1, True), (2, 2, -0.2, 0.1, False), (3, 1, -0.1, 0.1, False)], None),
    ],
)
def test_a_sensitivity_search_that_found_nothing_says_so_and_one_that_came_to_its_end_does_not(trials, message, report):
    warnings, page = report([*loss_records(), *(trial(*numbers) for numbers in trials)], mode="sensitivity")
    assert len(warnings) == (message is not None)
    assert [warning for warning in warnings if not warning.startswith(message)] == []
    assert (message or "Search") in page
    assert "alpha" not in page.partition("## What")[0]


@pytest.mark.parametrize("option", ["init", "detector"])  # as it is called, and was in earlier runs
def test_a_sensitivity_search_of_a_trained_detector_needs_no_training(option, report):
    records = [scores_record(0), {**trial(1, 2, -0.1, -0.2, True), "epoch": 0.0}]
    options = {option: "runs/plain/model", "backbone": "resnet50", "epochs": 0, "min_size": 640, "fpn_channels": 64}
    warnings, page = report(records, mode="sensitivity", **options)
    assert warnings == []
    assert pictures(report.folder) == {"genotype.png", "predictions.png", "scores.png"}
    assert table(page)["started from the detector"] == "runs/plain/model"
    assert table(page)["backbone"] == "resnet18"
    assert ("--min_size 640" in page) == (option == "init")  # it stands above the detector's own
    assert "--fpn_channels" not in page
    assert "--backbone resnet18 " in page


# --- what to do next --------------------------------------------------------------------------------------------------


def trains(page):
    """The page's train commands, as `nats train` reads them."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrainConfig, as_group=False)
    commands = [shlex.split(line) for line in page.splitlines() if line.startswith("nats train ")]
    return [TrainConfig(**parser.parse_args(words[2:]).as_dict()) for words in commands]


def test_the_next_commands_train_both_networks_as_the_search_saw_them(report):
    _, page = report(DECIDED, weights=None, transpose=True, framework="retinanet", precision="bf16")
    nats, plain = trains(page)
    assert nats.genotype == str(report.folder / "genotype.json")
    assert plain.genotype is None
    for config in (nats, plain):
        assert (config.data, config.backbone, config.weights) == ("data/a b", "resnet18.tv_in1k", None)
        assert (config.framework, config.min_size, config.precision) == ("retinanet", 512, "bf16")
        assert tuple(config.anchor_sizes) == (16, 32, 64, 128, 256)
        assert config.clip_grad is None
        assert config.transpose is True
    assert nats.output != plain.output
    assert {**nats.to_dict(), "genotype": None, "output": ""} == {**plain.to_dict(), "output": ""}


def test_a_search_with_its_defaults_gives_a_short_command(report):
    options = SearchConfig(data="my_data", output="runs/search", backbone="resnet50").to_dict()
    _, page = report(DECIDED, **json.loads(json.dumps(options)))
    folder = report.folder
    assert f"nats train --data my_data --backbone resnet50 --output {folder}_plain" in page
    assert f"--backbone resnet50 --genotype {folder}/genotype.json --output {folder}_nats" in page


# --- robustness -------------------------------------------------------------------------------------------------------


def test_a_resumed_run_with_a_torn_line_reports_as_an_uninterrupted_one(report):
    wild = [{"step": 45, "epoch": 4.5, "loss": 90.0}, alpha_record(5, logs(at_lead(0.9)))]
    expected = report(DECIDED)
    files = {path.name: path.read_bytes() for path in (report.folder / "report").iterdir()}
    assert report([*loss_records()[:8], *wild, *DECIDED], tail='{"step": 101, "alp') == expected
    assert {path.name: path.read_bytes() for path in (report.folder / "report").iterdir()} == files


def test_an_older_report_is_replaced_whole(report):
    report(DECIDED)
    assert "alpha.png" in pictures(report.folder)
    report([*loss_records(), scores_record(100), trial(1, 1, -1, -1, True)], mode="sensitivity")
    assert "alpha.png" not in pictures(report.folder)
    assert {path.name for path in report.folder.iterdir()} == {"run.json", "log.jsonl", "report"}


def bad_alpha(**convs):
    alpha = {"layer2.0.conv2": [[0, 0, 0, 0]] * 2, "layer3.0.conv2": [[0, 0]] * 2}
    return [alpha_record(1, UNIFORM), {"step": 20, "epoch": 2, "alpha": {**alpha, **convs}}]


@pytest.mark.parametrize(
    ("records", "convs", "options", "message"),
    [
        (
            bad_alpha(**{"layer3.0.conv2": [[0, 0, 0]]}),
            FOUND,
            {},
            r"log\.jsonl: step 20: alpha: layer3\.0\.conv2: expe",
        ),
        (
            bad_alpha(**{"layer3.0.conv2": [[0, None]]}),
            FOUND,
            {},
            r"log\.jsonl: step 20: alpha: layer3\.0\.conv2: expe",
        ),
        (bad_alpha(**{"layer3.0.conv2": "x"}), FOUND, {}, r"log\.jsonl: step 20: alpha: layer3\.0\.conv2: expe"),
        (bad_alpha(other=[[0]]), FOUND, {}, r"log\.jsonl: step 20: alpha: expected an object with the searched conv"),
        ([{"step": 1, "epoch": 1, "loss": "x"}], FOUND, {}, r"log\.jsonl: line 1: loss: expected a number"),
        (DECIDED, {**FOUND, "layer3.0.conv2": (Run(8, 5, 5),)}, {}, r"genotype: layer3\.0\.conv2: expected one of"),
        (DECIDED, {**FOUND, "layer3.0.conv2": (Run(3, 1, 1), Run(5, 3, 3))}, {}, r"genotype: layer3\.0\.conv2: exp"),
        (DECIDED, {"layer2.0.conv2": FOUND["layer2.0.conv2"]}, {}, r"genotype: layer3\.0\.conv2: expected one of"),
        (DECIDED, FOUND, {"temperature": 0}, r"run\.json: temperature: expected a number above 0, found 0"),
        (DECIDED, FOUND, {"final_temperature": "cold"}, r"run\.json: final_temperature: expected a number above 0"),
        ([scores_record(1, math.nan)], FOUND, {"mode": "sensitivity"}, r"log\.jsonl: step 1: scores: layer2"),
        ([trial(1, 1, "x", 1, True)], FOUND, {"mode": "sensitivity"}, r"log\.jsonl: line 1: predicted: expected a num"),
    ],
)
def test_what_does_not_fit_is_named_and_leaves_the_old_report_alone(records, convs, options, message, report):
    report(DECIDED)
    before = {path.name: path.read_bytes() for path in (report.folder / "report").iterdir()}
    with pytest.raises(NatsError, match=message) as caught:
        report(records, convs, **options)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in (report.folder / "report").iterdir()} == before
    assert {path.name for path in report.folder.iterdir()} == {"run.json", "log.jsonl", "report"}


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(NatsError, match=r"run\.json: can not be read"):
        write_report(tmp_path, Genotype("resnet18", FOUND), CANDIDATES)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(NatsError, match=r"run\.json: expected an object"):
        write_report(tmp_path, Genotype("resnet18", FOUND), CANDIDATES)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(NatsError, match=r"log\.jsonl: can not be read"):
        write_report(tmp_path, Genotype("resnet18", FOUND), CANDIDATES)
    assert not (tmp_path / "report").exists()
