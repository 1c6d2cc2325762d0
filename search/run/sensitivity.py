"""Sensitivity search: score all changes of a network's genotype at once, keep those that lower a held-back loss.

Nothing here knows detectors: losses are callables.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..supernet.searched_conv import SensitivityConv2d

Convs = Mapping[str, SensitivityConv2d]


class Change(NamedTuple):
    """One group's move to another candidate; `score` is the predicted change of the loss."""

    score: float
    conv: str
    group: int
    candidate: int


def score(model: nn.Module, convs: Convs, losses: Iterable[Callable[[], Tensor]]) -> dict[str, Tensor]:
    """S_{i,g} of every searched convolution: the first-order change of the loss if group i took candidate g.

    One backward pass per loss, without the weights' gradients.

    Args:
        model: whose parameters take no part.
        convs: its searched convolutions by name.
        losses: each computes a scalar loss anew, such as that of a batch of images.

    Returns:
        (groups, candidates) in float64, of the sum of the losses; 0 for the current candidates.
    """
    for conv in convs.values():
        conv.begin_scoring()
    try:
        with _without_parameter_gradients(model):
            for loss in losses:
                loss().backward()
    finally:
        scores = {name: conv.end_scoring() for name, conv in convs.items()}
    return scores


@contextmanager
def _without_parameter_gradients(model: nn.Module) -> Iterator[None]:
    """Outputs of the searched convolutions ask for gradients themselves; those of the weights would be thrown away."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def proposals(convs: Convs, scores: Mapping[str, Tensor], max_dilations: int | None = None) -> list[Change]:
    """The changes that are predicted to lower the loss, the best of each group, the best first.

    Args:
        convs: the searched convolutions.
        scores: as `score` gives them.
        max_dilations: a change that would bring its convolution, after those before it, to more different dilations
            is left out.
    """
    best = []
    for name, conv_scores in scores.items():
        values, candidates = conv_scores.min(1)
        rows = enumerate(zip(values.tolist(), candidates.tolist(), strict=True))
        best += [Change(value, name, group, candidate) for group, (value, candidate) in rows if value < 0]
    best.sort()
    return best if max_dilations is None else list(_within_limit(convs, best, max_dilations))


def _within_limit(convs: Convs, changes: Iterable[Change], most: int) -> Iterator[Change]:
    current = {name: conv.current.tolist() for name, conv in convs.items()}
    for change in changes:
        after = list(current[change.conv])
        after[change.group] = change.candidate
        if len(set(after)) <= max(most, len(set(current[change.conv]))):
            current[change.conv] = after
            yield change


@torch.no_grad()
def apply(convs: Convs, changes: Iterable[Change]) -> None:
    """Make the changes."""
    for change in changes:
        convs[change.conv].current[change.group] = change.candidate


@dataclass
class Progress:
    """Where an ascent stands; plain data, so that it can be saved and continued.

    Attributes:
        loss: held-back loss of the current genotype; None before it was measured.
        rounds: rounds of scoring that are over.
        trials: sets of changes tried.
        size: how many changes the next trial makes; None: a new round of scoring comes first.
        changes: the round's proposals.
        done: no further change is predicted to help, or the limit of rounds is reached.
    """

    loss: float | None = None
    rounds: int = 0
    trials: int = 0
    size: int | None = None
    changes: list[Change] = field(default_factory=list)
    done: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**vars(self), "changes": [list(change) for change in self.changes]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Progress":
        """What `to_dict` gave."""
        return cls(**{**data, "changes": [Change(*change) for change in data["changes"]]})


class Trial(NamedTuple):
    """A set of changes that was tried: what the scores predicted for the loss, and what came."""

    changes: int
    predicted: float
    actual: float
    held_back_loss: float
    accepted: bool


@dataclass
class SensitivitySearch:
    """Applies the k best predicted changes, keeps them if the held-back loss falls, else halves k.

    Args:
        convs: the searched convolutions by name.
        score: gives `score`'s result at the current genotype.
        held_back_loss: loss of the current genotype on images that take no part in scoring; statistics included, that
            a change of genotype calls for.
        max_dilations: most different dilations in a convolution.
        max_rounds: of scoring.
        progress: where to go on.
    """

    convs: Convs
    score: Callable[[], dict[str, Tensor]]
    held_back_loss: Callable[[], float]
    max_dilations: int | None = None
    max_rounds: int = 10
    progress: Progress = field(default_factory=Progress)

    def begin_round(self) -> dict[str, Tensor]:
        """Score all changes, once for the trials that follow; returns the scores."""
        progress = self.progress
        if progress.loss is None:
            progress.loss = self.held_back_loss()
        scores = self.score()
        progress.changes = proposals(self.convs, scores, self.max_dilations)
        progress.size = len(progress.changes)
        progress.done = not progress.changes
        return scores

    def try_changes(self) -> Trial:
        """Try the next set of changes, and take them back if the held-back loss does not fall."""
        progress = self.progress
        changes = progress.changes[: progress.size]
        before = {name: conv.current.clone() for name, conv in self.convs.items()}
        apply(self.convs, changes)
        assert progress.loss is not None, "begin_round comes first"
        assert progress.size is not None
        loss, before_loss = self.held_back_loss(), progress.loss
        predicted = sum(change.score for change in changes)
        trial = Trial(len(changes), predicted, loss - before_loss, loss, loss < before_loss)
        if trial.accepted:
            self._end_round(loss)
        else:
            self._take_back(before, progress.size)
        progress.trials += 1
        return trial

    def _end_round(self, loss: float) -> None:
        progress = self.progress
        progress.loss, progress.size, progress.changes = loss, None, []
        progress.rounds += 1
        progress.done = progress.rounds >= self.max_rounds

    @torch.no_grad()
    def _take_back(self, before: Mapping[str, Tensor], size: int) -> None:
        for name, conv in self.convs.items():
            conv.current.copy_(before[name])
        self.progress.size = size // 2
        self.progress.done = self.progress.size == 0
