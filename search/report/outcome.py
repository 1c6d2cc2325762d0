"""How a search ended, in figures, and whether these mean anything.

A search by alpha is judged by its probabilities, softmax(alpha / temperature): how far they moved from uniform, and
whether they came to rest. A sensitivity search is judged by its trials: what was predicted, and what happened.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...base.errors import NatsError
from ...base.run_log import Record, latest
from ...genotype.genotype import Genotype
from ...genotype.runs import PLAIN, Dilation, Runs
from ..supernet.searched_conv import log_probabilities, relative_entropy

# Alpha did not move: both hold. On the way from uniform (0) to certain (1) the likeliest candidates came less far than
# UNMOVED_LEAD, in the mean over the groups; and the mean entropy, relative to uniform, is above UNMOVED_ENTROPY. Normal
# noise in alpha comes to that up to a standard deviation of about 0.3 with 5 candidates, 0.4 with 9.
UNMOVED_LEAD = 0.1
UNMOVED_ENTROPY = 0.95
# Not converged: more than this share of the groups changed their likeliest candidate in the last part of the run.
LAST_PART = 0.1
RESTLESS_SHARE = 0.1
# Predictions are no use: at more than this share of the trials the loss changed the other way. The trials after the
# last accepted one do not count: that none of them helps is how such a search ends.
WRONG_SIGNS = 0.5
ROUNDING = 1e-6  # two candidates at 1/2 each are not decided


class Doubt(NamedTuple):
    """Something that makes a genotype doubtful, in one line, and what may help."""

    text: str
    advice: str


class Snapshot(NamedTuple):
    """Log-probabilities at a moment of the search: (groups, candidates) for each convolution."""

    epoch: float
    log_p: Mapping[str, Tensor]


@dataclass(frozen=True)
class AlphaOutcome:
    """The figures of a search by alpha, over all groups of all convolutions.

    Attributes:
        groups: how many there are.
        entropy: of the probabilities, mean, relative to the uniform distribution's: 1 at the start, 0 when decided.
        lead: of the likeliest candidates, mean, on the way from uniform (0) to certain (1).
        decided: groups with a probability above 1/2.
        chosen: mean probability of the genotype's candidates.
        uniform: mean of what a candidate's probability was before alpha moved.
        margin: mean difference between the probabilities of the genotype's candidate and of the best other one.
        overruled: groups whose likeliest candidate the genotype does not take (a limit of dilations, a cost).
        restless: share of the groups whose likeliest candidate changed in the last part of the run; None: alpha was
            logged less than twice since it moved.
        restless_since: the epoch in which that part begins.
    """

    groups: int
    entropy: float
    lead: float
    decided: int
    chosen: float
    uniform: float
    margin: float
    overruled: int
    restless: float | None
    restless_since: float


@dataclass(frozen=True)
class TrialOutcome:
    """The figures of a sensitivity search.

    Attributes:
        rounds: of scoring.
        trials: of sets of changes.
        accepted: trials whose changes were kept.
        changes: groups changed by those.
        predicted, actual: change of the loss by the accepted trials, summed.
        comparable: trials up to the last accepted one (all, if none was) whose predicted and actual changes are known
            and not 0.
        wrong_signs: those of them at which the loss changed the other way.
        held_back_loss: the loss on held-back images after the last accepted trial; None: none was.
    """

    rounds: int
    trials: int
    accepted: int
    changes: int
    predicted: float
    actual: float
    comparable: int
    wrong_signs: int
    held_back_loss: float | None


def read_snapshots(
    records: Iterable[Record], candidates: Mapping[str, Sequence[Dilation]], temperatures: Sequence[float], source: str
) -> list[Snapshot]:
    """The probabilities over time.

    Args:
        records: of the log, those that hold alpha, in order of time.
        candidates: of each searched convolution.
        temperatures: one per record.
        source: what error messages call the log.

    Raises:
        NatsError: alpha that does not fit the candidates or is not finite.
    """
    snapshots = []
    for record, temperature in zip(records, temperatures, strict=True):
        alpha = read_arrays(record, "alpha", candidates, source)
        log_p = {conv: log_probabilities(torch.from_numpy(values), temperature) for conv, values in alpha.items()}
        snapshots.append(Snapshot(record["epoch"], log_p))
    return snapshots


def read_arrays(
    record: Record, key: str, candidates: Mapping[str, Sequence[Dilation]], source: str
) -> dict[str, np.ndarray]:
    """What a record holds for each convolution, (groups, candidates), such as alpha.

    Raises:
        NatsError: naming the log, the step, the convolution and what was expected.
    """
    found, where = record[key], f"{source}: step {record['step']}: {key}"
    if not isinstance(found, Mapping) or set(found) != set(candidates):
        raise NatsError(f"{where}: expected an object with the searched convolutions {', '.join(candidates)}")
    return {conv: _array(found[conv], len(dilations), f"{where}: {conv}") for conv, dilations in candidates.items()}


def _array(values: Any, columns: int, where: str) -> np.ndarray:
    try:
        array = np.asarray(values, dtype=float)
    except (TypeError, ValueError, OverflowError):
        array = np.empty(0)
    if array.ndim != 2 or not len(array) or array.shape[1] != columns or not np.isfinite(array).all():
        raise NatsError(f"{where}: expected finite numbers, {columns} candidates for each of its groups")
    return array


def alpha_outcome(
    snapshots: Sequence[Snapshot], genotype: Genotype, candidates: Mapping[str, Sequence[Dilation]]
) -> AlphaOutcome:
    """The figures of a search by alpha.

    Args:
        snapshots: at least one, in order of time; they need at least one convolution.
        genotype: what was decoded from the last.
        candidates: of each searched convolution.

    Raises:
        NatsError: a genotype whose runs are not whole groups of one candidate.
    """
    final = snapshots[-1].log_p
    groups = [
        _judge_groups(log_p, _chosen(genotype, conv, candidates[conv], len(log_p))) for conv, log_p in final.items()
    ]
    columns = {name: np.concatenate([group[name] for group in groups]) for name in groups[0]}
    restless, since = _restless(snapshots)
    return AlphaOutcome(
        groups=len(columns["top"]),
        decided=int((columns["top"] > 0.5 + ROUNDING).sum()),
        overruled=int((columns["margin"] < 0).sum()),
        restless=restless,
        restless_since=since,
        **{name: float(columns[name].mean()) for name in ("entropy", "lead", "chosen", "uniform", "margin")},
    )


def _judge_groups(log_p: Tensor, chosen: np.ndarray) -> dict[str, np.ndarray]:
    """One convolution's groups; a single candidate counts as decided."""
    probabilities = log_p.exp().numpy()
    groups, count = probabilities.shape
    top = probabilities.max(axis=1)
    own = probabilities[np.arange(groups), chosen]
    others = probabilities.copy()
    others[np.arange(groups), chosen] = 0
    return {
        "top": top,
        "entropy": relative_entropy(log_p).numpy(),
        "lead": (top * count - 1) / (count - 1) if count > 1 else np.ones(groups),
        "chosen": own,
        "uniform": np.full(groups, 1 / count),
        "margin": own - others.max(axis=1),
    }


def _chosen(genotype: Genotype, conv: str, candidates: Sequence[Dilation], groups: int) -> np.ndarray:
    """Each group's candidate in the genotype, as an index."""
    dilations = genotype.convs.get(conv, Runs()).per_channel()
    size, rest = divmod(len(dilations), groups)
    slices = [set(dilations[size * group : size * (group + 1)]) for group in range(groups)]
    if rest or not all(len(found) == 1 and found <= set(candidates) for found in slices):
        raise NatsError(
            f"{genotype.source}: {conv}: expected one of the searched candidates for each of its {groups} groups"
        )
    return np.array([list(candidates).index(min(found)) for found in slices])


def _restless(snapshots: Sequence[Snapshot]) -> tuple[float | None, float]:
    """Share of the groups whose likeliest candidate changed in the last part of the run, and when that began."""
    moved = [snapshot for snapshot in snapshots if not _is_uniform(snapshot)]
    begin = (1 - LAST_PART) * snapshots[-1].epoch
    first = max((i for i, snapshot in enumerate(moved) if snapshot.epoch <= begin), default=0)
    choices = [_likeliest(snapshot) for snapshot in moved[first:]]
    if len(choices) < 2:
        return None, begin
    return float((np.stack(choices) != choices[-1]).any(axis=0).mean()), moved[first].epoch


def _is_uniform(snapshot: Snapshot) -> bool:
    """Alpha has not moved: as before its first step."""
    return all(np.ptp(log_p.exp().numpy(), axis=1).max() < 1e-9 for log_p in snapshot.log_p.values())


def _likeliest(snapshot: Snapshot) -> np.ndarray:
    return np.concatenate([log_p.argmax(1).numpy() for log_p in snapshot.log_p.values()])


def trial_outcome(records: Sequence[Record]) -> TrialOutcome:
    """The figures of a sensitivity search, from its log."""
    trials = trials_in(records)
    accepted = [trial for trial in trials if trial.get("accepted")]
    end = max((number for number, trial in enumerate(trials, 1) if trial.get("accepted")), default=len(trials))
    products = [t["predicted"] * t["actual"] for t in trials[:end] if _finite(t, "predicted", "actual")]
    losses = [trial["held_back_loss"] for trial in accepted if _finite(trial, "held_back_loss")]
    return TrialOutcome(
        rounds=len(latest(records, "scores")),
        trials=len(trials),
        accepted=len(accepted),
        changes=sum(int(trial["changes"]) for trial in accepted if _finite(trial, "changes")),
        predicted=math.fsum(trial["predicted"] for trial in accepted if _finite(trial, "predicted")),
        actual=math.fsum(trial["actual"] for trial in accepted if _finite(trial, "actual")),
        comparable=sum(product != 0 for product in products),
        wrong_signs=sum(product < 0 for product in products),
        held_back_loss=losses[-1] if losses else None,
    )


def trials_in(records: Sequence[Record]) -> list[Record]:
    """The records of a sensitivity search's trials, in order."""
    return [dict(record) for record in latest(records, "trial", "trial")]


def comparable_trials(records: Sequence[Record]) -> list[Record]:
    """Those trials whose predicted and actual change of the loss are both known."""
    return [trial for trial in trials_in(records) if _finite(trial, "predicted", "actual")]


def _finite(record: Record, *keys: str) -> bool:
    return all(math.isfinite(record.get(key, math.nan)) for key in keys)


def alpha_doubts(outcome: AlphaOutcome | None, genotype: Genotype) -> list[Doubt]:
    """What makes the genotype of a search by alpha doubtful.

    Args:
        outcome: None: the log holds no alpha.
        genotype: what was found.
    """
    if outcome is None:
        none = Doubt(
            "no alpha steps were logged: nothing tells whether the genotype is more than a tie-break",
            "Alpha is logged after every epoch; look whether log.jsonl is whole.",
        )
        return [none, *_collapse(genotype)]
    return [*_unmoved(outcome), *_collapse(genotype), *_unsettled(outcome)]


def _unmoved(outcome: AlphaOutcome) -> list[Doubt]:
    if outcome.lead >= UNMOVED_LEAD or outcome.entropy <= UNMOVED_ENTROPY:
        return []
    return [
        Doubt(
            f"alpha did not move: relative entropy {outcome.entropy:.3f} (above {UNMOVED_ENTROPY}), and the likeliest"
            f" candidates have come {outcome.lead:.1%} of the way from uniform to certain (less than"
            f" {UNMOVED_LEAD:.0%}); the genotype is no better than a tie-break or noise",
            "Give alpha more steps (epochs, images, level single), a higher alpha_lr, or fewer groups.",
        )
    ]


def _collapse(genotype: Genotype) -> list[Doubt]:
    dilations = set(genotype.all_runs().counts())
    if not dilations - {PLAIN}:
        return [
            Doubt(
                "collapse: every group kept the plain dilation; nothing was found",
                "Look first whether a uniform genotype moves AP on this data at all.",
            )
        ]
    if len(dilations) > 1:
        return []
    return [
        Doubt(
            f"collapse: every group took the same dilation, {dilations.pop().name()}",
            "Compare it with the plain network; no search by channels was needed to find it.",
        )
    ]


def _unsettled(outcome: AlphaOutcome) -> list[Doubt]:
    if outcome.restless is None or outcome.restless <= RESTLESS_SHARE:
        return []
    return [
        Doubt(
            f"not converged: {outcome.restless:.0%} of the groups (more than {RESTLESS_SHARE:.0%}) still changed their"
            f" likeliest candidate after epoch {outcome.restless_since:g}",
            "Search for more epochs, and compare with another seed.",
        )
    ]


def trial_doubts(outcome: TrialOutcome, genotype: Genotype) -> list[Doubt]:
    """What makes the genotype of a sensitivity search doubtful."""
    if not outcome.trials:
        return [Doubt("no trials were logged: no change was tried", "Look whether the run came to its end.")]
    doubts = _collapse(genotype) if outcome.accepted else [_nothing_accepted(outcome)]
    if outcome.accepted and outcome.wrong_signs > WRONG_SIGNS * outcome.comparable:
        doubts.append(
            Doubt(
                f"predictions failed: at {outcome.wrong_signs} of {outcome.comparable} trials, up to the last accepted"
                " one, the loss changed the other way",
                "Score more images, or start from a detector that has been trained for longer.",
            )
        )
    return doubts


def _nothing_accepted(outcome: TrialOutcome) -> Doubt:
    return Doubt(
        f"no change was accepted: at none of the {outcome.trials} trials the loss on held-back images fell; the"
        " genotype is the one that the search began with",
        "Score more images, hold more back, or start from a detector that has been trained for longer.",
    )
