"""The report of a search: one page in Markdown, its pictures, and warnings where the result means little."""

import dataclasses
import json
import math
import os
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...base.errors import NatsError
from ...base.files import atomic_folder, read_json, write_text
from ...base.names import VARIANT_PREFIX
from ...base.run_log import Record, has_key, latest, read_log
from ...base.text import card_table, markdown_table
from ...detection.models.options import DETECTOR_OPTIONS, FIXED_OPTIONS
from ...detection.runs.config import RunConfig
from ...detection.training.config import TrainConfig
from ...genotype.genotype import Genotype
from ...genotype.runs import KINDS, Dilation, Runs
from ...networks.stages import genotype_stages
from ...pictures.genotype_chart import genotype_chart
from ..config import SearchConfig, annealed
from .outcome import (
    AlphaOutcome,
    Doubt,
    TrialOutcome,
    alpha_doubts,
    alpha_outcome,
    comparable_trials,
    read_arrays,
    read_snapshots,
    trial_doubts,
    trial_outcome,
)
from .pictures import SEARCH_CURVES, alpha_heatmaps, prediction_scatter, score_heatmaps, search_curves

REPORT = "report"
PAGE = "report.md"
# Options that the page shows by other means, or that only matter to another mode.
SHOWN = {"mode", "kernels", "norm", "space", "groups", "channels_per_group", "level", "epochs", "alpha_start", "note"}
ALPHA_ONLY = {"alpha_lr", "alpha_weight_decay", "temperature", "final_temperature"}
SENSITIVITY_ONLY = {"score_images", "held_back_images", "max_rounds"}
# Options of the search that its training has of its own.
NOT_CARRIED = {"backbone", "data", "output", "resume", "checkpoint_every", "seed", "val_split"}
CAPTIONS = {
    "genotype.png": "The share of each dilation in each convolution",
    "alpha.png": "How the search made up its mind: mean probability of each candidate",
    "search.png": "Losses, entropy and the share of channels changed",
    "predictions.png": "Trials: the predicted change of the loss, and the actual one",
    "scores.png": "First round of scoring: what each change should do to the loss (blue: it falls)",
}

CONTROLS = """\
The search says nothing about AP. Compare with the plain network by the same recipe; with a genotype of random
dilations and with this one's shares on other channels, which tell whether the search found more than that dilations
help; and with another search seed, to see how far two searches agree."""


@dataclass(frozen=True)
class SearchRun:
    """What a report is made of.

    Attributes:
        folder: the run's.
        options: of run.json.
        records: of log.jsonl.
        genotype: what was found.
        candidates: of each searched convolution.
    """

    folder: Path
    options: Mapping[str, Any]
    records: list[Record]
    genotype: Genotype
    candidates: Mapping[str, tuple[Dilation, ...]]

    @property
    def log_path(self) -> Path:
        return self.folder / "log.jsonl"

    @property
    def mode(self) -> str:
        return self.option("mode") or self.genotype.provenance.get("method") or "mixture"

    @property
    def init(self) -> str | None:
        """The trained detector that the search began with; earlier runs call the option `detector`."""
        return self.option("init") or self.option("detector")

    @property
    def is_sensitivity(self) -> bool:
        return self.mode == "sensitivity"

    def option(self, name: str, default: Any = None) -> Any:
        """An option, or the default where it is absent or null."""
        value = self.options.get(name)
        return default if value is None else value

    def number(self, name: str, default: float, above: float = -1) -> float:
        """An option that is a finite number.

        Raises:
            NatsError: it is something else, or not above the limit.
        """
        value = self.option(name, default)
        if type(value) not in (int, float) or not above < value < math.inf:
            raise NatsError(f"{self.folder / 'run.json'}: {name}: expected a number above {above}, found {value!r}")
        return value


def write_report(
    folder: str | os.PathLike, genotype: Genotype, candidates: Mapping[str, tuple[Dilation, ...]]
) -> list[str]:
    """Write the report of a search that came to its end.

    FOLDER/report/ is made anew, whole or not at all: report.md and its pictures, genotype.png, search.png, alpha.png
    of a search by alpha, predictions.png and scores.png of a sensitivity search. A picture for which the log holds
    nothing is left out.

    Args:
        folder: the run's, with run.json and log.jsonl.
        genotype: what was found.
        candidates: dilations of the candidates of each searched convolution.

    Returns:
        What makes the genotype doubtful, one line each; see `outcome` for when.

    Raises:
        NatsError: run.json or log.jsonl can not be read or does not fit the genotype and its candidates.
    """
    run = read_run(folder, genotype, candidates)
    history = alpha_history(run)
    if run.is_sensitivity:
        trials = trial_outcome(run.records)
        doubts = trial_doubts(trials, genotype)
        outcome: AlphaOutcome | TrialOutcome | None = trials
    else:
        found = _outcome_of_alpha(run, history)
        doubts = alpha_doubts(found, genotype)
        outcome = found
    with atomic_folder(run.folder / REPORT) as new:
        _draw(run, history, new)
        pictures = [name for name in CAPTIONS if (new / name).is_file()]
        write_text(new / PAGE, _page(run, outcome, doubts, pictures))
    return [doubt.text for doubt in doubts]


def read_run(
    folder: str | os.PathLike, genotype: Genotype, candidates: Mapping[str, tuple[Dilation, ...]]
) -> SearchRun:
    """Read a run's options and log.

    Raises:
        NatsError: naming the file.
    """
    folder = Path(folder)
    options = read_json(folder / "run.json")
    if not isinstance(options, dict):
        raise NatsError(f"{folder / 'run.json'}: expected an object with the run's options")
    return SearchRun(folder, options, read_log(folder / "log.jsonl"), genotype, candidates)


# --- alpha over time --------------------------------------------------------------------------------------------------


def alpha_history(run: SearchRun) -> list[Mapping[str, Any]]:
    """The records that hold alpha, in order of time; none in a sensitivity search."""
    return [] if run.is_sensitivity else latest(run.records, "alpha")


def _outcome_of_alpha(run: SearchRun, history: list[Mapping[str, Any]]) -> AlphaOutcome | None:
    if not history:
        return None
    snapshots = read_snapshots(history, run.candidates, _temperatures(run, history), str(run.log_path))
    return alpha_outcome(snapshots, run.genotype, run.candidates)


def _temperatures(run: SearchRun, history: Iterable[Record]) -> list[float]:
    """The temperature at each snapshot, which is logged with it."""
    found = [r["temperature"] if "temperature" in r else _unlogged_temperature(run, r) for r in history]
    if wrong := [value for value in found if not 0 < value < math.inf]:
        raise NatsError(f"{run.log_path}: temperature: expected a finite number above 0, found {wrong[0]}")
    return found


def _unlogged_temperature(run: SearchRun, record: Record) -> float:
    """That of the step before the record, in a log that holds alpha alone, as earlier ones do."""
    first = run.number("temperature", 1.0, above=0)
    last = run.number("final_temperature", first, above=0)
    step, per_epoch = record["step"], record["step"] / max(record["epoch"], 1e-9)
    start, end = run.number("alpha_start", 0), run.number("epochs", 1)
    return annealed(first, last, step - 1, start * per_epoch, end * per_epoch)


# --- pictures ---------------------------------------------------------------------------------------------------------


def _draw(run: SearchRun, history: list[Mapping[str, Any]], into: Path) -> None:
    genotype_chart(run.genotype, into / "genotype.png")
    if any(has_key(run.records, key) for key in SEARCH_CURVES):
        search_curves(run.log_path, into / "search.png")
    if history:
        alpha_heatmaps(history, run.candidates, into / "alpha.png", _temperatures(run, history))
    if run.is_sensitivity:
        _draw_sensitivity(run, into)


def _draw_sensitivity(run: SearchRun, into: Path) -> None:
    trials, rounds = comparable_trials(run.records), latest(run.records, "scores")
    if trials:
        prediction_scatter(trials, into / "predictions.png")
    if rounds:
        scores = read_arrays(rounds[0], "scores", run.candidates, str(run.log_path))
        title = f"first of {len(rounds)} rounds of scoring" if len(rounds) > 1 else "the round of scoring"
        score_heatmaps(scores, run.candidates, into / "scores.png", title)


# --- the page ---------------------------------------------------------------------------------------------------------


def _page(
    run: SearchRun, outcome: AlphaOutcome | TrialOutcome | None, doubts: list[Doubt], pictures: Iterable[str]
) -> str:
    command = run.genotype.provenance.get("command")
    ended = _trial_facts(outcome) if isinstance(outcome, TrialOutcome) else _alpha_facts(outcome)
    sections = [
        f"# Search: dilations for {_words(run.genotype.architecture)}",
        _doubt_list(doubts),
        card_table("What was searched", _searched_facts(run)),
        f"```bash\n{_words(command)}\n```" if command else "",
        card_table("How it ended", ended | _genotype_facts(run.genotype)),
        _share_table(run.genotype),
        "\n\n".join(f"![{CAPTIONS[name]}]({name})\n\n*{CAPTIONS[name]}.*" for name in pictures),
        _next_steps(run),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _words(value: Any) -> str:
    return " ".join(str(value).split())


def _doubt_list(doubts: Iterable[Doubt]) -> str:
    lines = [f"- **{_words(doubt.text)}.** {doubt.advice}" for doubt in doubts]
    return "\n".join(["## Warnings\n", *lines]) if lines else ""


def _searched_facts(run: SearchRun) -> dict[str, str]:
    provenance = run.genotype.provenance
    data = provenance.get("dataset") or f"{Path(run.option('data', '')).name} {run.option('train_split', '')}"
    facts = {
        "backbone": _backbone(run),
        "weights": provenance.get("weights") or run.option("weights"),
        "data set": data,
        "detector": provenance.get("detector") or run.option("framework"),
        "mode": run.mode if run.is_sensitivity else f"{run.mode}, {run.option('level', 'bilevel')}",
        # Where the options leave them to the mode, the provenance knows.
        "kernels": None if run.is_sensitivity else provenance.get("kernels") or run.option("kernels"),
        "batch norm": run.option("norm"),
        "space": run.option("space"),
        "groups": _groups(run),
        "epochs": _epochs(run),
        "seed": run.option("seed"),
    }
    facts = {name: _words(value) for name, value in facts.items() if value is not None and _words(value)}
    return facts | _other_options(run)


def _backbone(run: SearchRun) -> str:
    """With its tag, unless a detector that the search started from decided it."""
    named = None if run.init else run.option("backbone")
    return named or run.genotype.architecture


def _groups(run: SearchRun) -> str:
    convs = f"{len(run.candidates)} convolution{'s' * (len(run.candidates) != 1)}"
    size = run.option("channels_per_group")
    return f"{size} channels each, in {convs}" if size else f"{run.option('groups', '?')} in each of {convs}"


def _epochs(run: SearchRun) -> str | None:
    epochs, start = run.option("epochs"), run.option("alpha_start")
    if run.is_sensitivity or not start or epochs is None:
        return epochs
    return f"{epochs}, alpha frozen for the first {start}"


def _other_options(run: SearchRun) -> dict[str, str]:
    """Those of the search's own options that are not at their defaults."""
    shared = {field.name for field in dataclasses.fields(RunConfig)}
    hidden = shared | SHOWN | (ALPHA_ONLY if run.is_sensitivity else SENSITIVITY_ONLY)
    began = {} if run.init is None else {"started from the detector": _words(run.init)}
    changed = _changed_options(run, SearchConfig, hidden | {"init"})
    return began | {name.replace("_", " "): _words(value) for name, value in changed.items()}


def _changed_options(run: SearchRun, config: type, hidden: set[str]) -> dict[str, Any]:
    """The run's options that the config class has too, with another default; lists for tuples."""
    fields = {field.name: field.default for field in dataclasses.fields(config) if field.name not in hidden}
    defaults = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    return {name: run.options[name] for name in defaults if name in run.options and run.options[name] != defaults[name]}


def _alpha_facts(outcome: AlphaOutcome | None) -> dict[str, str]:
    if outcome is None:
        return {}
    return {
        "relative entropy of the probabilities": f"{outcome.entropy:.3f} (1: undecided, 0: decided)",
        "groups with a probability above 1/2": f"{outcome.decided} of {outcome.groups}"
        f" ({outcome.decided / outcome.groups:.0%})",
        "mean probability of the chosen candidate": f"{outcome.chosen:.3f} (before the search: {outcome.uniform:.3f})",
        "mean margin to the best other candidate": f"{outcome.margin:.3f}",
        "groups that did not get their likeliest candidate": f"{outcome.overruled} of {outcome.groups}",
        "groups that changed their mind at the end": _restless_fact(outcome),
    }


def _restless_fact(outcome: AlphaOutcome) -> str:
    if outcome.restless is None:
        return "not known, alpha was logged too seldom"
    return f"{outcome.restless:.0%}, after epoch {outcome.restless_since:g}"


def _trial_facts(outcome: TrialOutcome) -> dict[str, str]:
    facts = {
        "rounds of scoring": str(outcome.rounds),
        "trials": f"{outcome.trials}, of which {outcome.accepted} accepted",
        "changes kept": str(outcome.changes),
        "change of the loss by what was accepted": f"{outcome.actual:+.4g} (predicted: {outcome.predicted:+.4g})",
        "trials, up to the last accepted one, at which the loss changed the other way": f"{outcome.wrong_signs} of"
        f" {outcome.comparable}",
    }
    if outcome.held_back_loss is not None:
        facts["loss on held-back images"] = f"{outcome.held_back_loss:.4g}"
    return facts


def _genotype_facts(genotype: Genotype) -> dict[str, str]:
    """And what was measured afterwards, such as the decoded network's AP."""
    facts = {"channels changed": f"{genotype.share_changed():.1%}"}
    metrics = genotype.provenance.get("metrics")
    measured = metrics if isinstance(metrics, Mapping) else {}
    return facts | {_words(name): _measured(value) for name, value in measured.items() if name.startswith("AP")}


def _measured(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, int | float) else _words(value)


def _share_table(genotype: Genotype) -> str:
    """Shares of the output channels, per stage and kind of dilation."""
    stages = genotype_stages(genotype)
    if not stages:
        return ""
    rows = [_share_row(stage, genotype, convs) for stage, convs in stages.items()]
    if len(stages) > 1:
        rows.append(_share_row("all", genotype, genotype.convs))
    table = markdown_table(("stage", "channels", *KINDS), rows)
    return f"## The genotype\n\nOutput channels by kind of dilation.\n\n{table}"


def _share_row(title: str, genotype: Genotype, convs: Iterable[str]) -> list[str]:
    runs = Runs(run for conv in convs for run in genotype.convs[conv])
    counts = [sum(n for dilation, n in runs.counts().items() if dilation.kind() == kind) for kind in KINDS]
    return [title, str(runs.channels), *(f"{count / runs.channels:.1%}" for count in counts)]


def _next_steps(run: SearchRun) -> str:
    base = run.folder if run.folder.name else run.folder.resolve()
    genotype = ["--genotype", str(run.folder / "genotype.json")]
    commands = [
        shlex.join([*_train_command(run), *genotype, "--output", f"{base}_nats"]),
        shlex.join([*_train_command(run), "--output", f"{base}_plain"]),
    ]
    parts = ["## What to do next", "Train the genotype, and the plain network equally:"]
    parts.append("```bash\n{}\n```".format("\n".join(commands)))
    if run.init:
        parts.append("Add the framework and the sizes of the detector that the search started from.")
    return "\n\n".join([*parts, CONTROLS])


def _train_command(run: SearchRun) -> list[str]:
    """`nats train` with what the search and a training have in common; the plain network's.

    The options at which both have the same default, as most are, are left out.
    """
    words = ["nats", "train", "--data", str(run.option("data", "DATA"))]
    words += ["--backbone", _backbone(run).removeprefix(VARIANT_PREFIX)]
    own = {field.name for field in dataclasses.fields(TrainConfig)} - {f.name for f in dataclasses.fields(RunConfig)}
    hidden = own | NOT_CARRIED
    if run.init:  # which has options of its own; in earlier runs none of the search's stood above them
        hidden |= set(FIXED_OPTIONS if run.option("init") else DETECTOR_OPTIONS) - {"trainable_layers"}
    for name, value in _changed_options(run, TrainConfig, hidden).items():
        words += [f"--{name}", _argument(value)]
    return words


def _argument(value: Any) -> str:
    """As the command line takes it."""
    if isinstance(value, list):
        return "[" + ",".join(map(_argument, value)) + "]"
    return value if isinstance(value, str) else json.dumps(value)
