"""The trials of a sensitivity search: scoring, trying and keeping changes on a detector's images, resumable."""

from collections.abc import Callable, Generator, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm import tqdm

from ...detection.data.dataset import CocoDataset, collate
from ..supernet.searched_conv import SensitivityConv2d
from .sensitivity import Progress, SensitivitySearch, score


class Trials:
    """What follows the epochs of a sensitivity search.

    Args:
        detector: on the supernet, without accelerate's wrappers; called in training mode.
        convs: the supernet's searched convolutions by name.
        scored, held_back: images on which changes are scored, and those whose loss decides; none mirrored by chance.
        accelerator: devices, precision and processes, which share the images.
        batch_size: images that go through the network at once, per process.
        seed: of the proposals on which the detector trains.
        calibrate: measures the statistics of the candidates that `convs` ask for; None: they stay.
        max_dilations: most different dilations in a convolution.
        max_rounds: of scoring.

    Example:
        >>> for record in trials.records():
        ...     print(record.get("held_back_loss"))
    """

    def __init__(
        self,
        detector: nn.Module,
        convs: Mapping[str, SensitivityConv2d],
        scored: CocoDataset,
        held_back: CocoDataset,
        accelerator: Accelerator,
        *,
        batch_size: int,
        seed: int,
        calibrate: Callable[[], None] | None = None,
        max_dilations: int | None = None,
        max_rounds: int = 10,
    ):
        self.detector, self.convs, self.scored, self.held_back = detector, convs, scored, held_back
        self.accelerator, self.batch_size, self.seed, self.calibrate = accelerator, batch_size, seed, calibrate
        self.search = SensitivitySearch(convs, self._score, self._held_back_loss, max_dilations, max_rounds)

    def records(self) -> Generator[dict[str, Any], None, None]:
        """Try changes until none helps, or go on doing so.

        Yields:
            What the log has of it: `scores` of a round by convolution, (groups, candidates); or `trial`, the number of
            a set of changes that was tried, with the fields of `Trial`. `state` is then up to date.
        """
        progress = self.search.progress
        main = self.accelerator.is_main_process
        with tqdm(desc="trials", initial=progress.trials, unit="trial", disable=not main, dynamic_ncols=True) as bar:
            while not progress.done:
                if progress.size is None:
                    yield {"scores": {name: rows.tolist() for name, rows in self.search.begin_round().items()}}
                    continue
                trial = self.search.try_changes()
                bar.update()
                bar.set_postfix(changes=trial.changes, loss=f"{trial.held_back_loss:.4g}", accepted=trial.accepted)
                yield {"trial": progress.trials, **trial._asdict()}

    def _score(self) -> dict[str, Tensor]:
        if self.calibrate is not None:
            self.calibrate()
        self.detector.train()
        totals = score(self.detector, self.convs, self._losses(self.scored))
        return {name: self._mean(total, self.scored) for name, total in totals.items()}

    @torch.no_grad()
    def _held_back_loss(self) -> float:
        """Mean loss of the held-back images at the current genotype, with its own statistics."""
        if self.calibrate is not None:
            for conv in self.convs.values():
                conv.measures_all = False
            try:
                self.calibrate()
            finally:
                for conv in self.convs.values():
                    conv.measures_all = True
        self.detector.train()
        total = torch.zeros((), dtype=torch.float64)
        for loss in self._losses(self.held_back):
            total += loss().double().cpu()
        return self._mean(total, self.held_back).item()

    def _losses(self, data: CocoDataset) -> Iterator[Callable[[], Tensor]]:
        """Of each batch of this process's share the sum of its images' losses, a function of the genotype alone."""
        starts = range(0, len(data), self.batch_size)
        for number in range(self.accelerator.process_index, len(starts), self.accelerator.num_processes):
            yield partial(self._loss, data, range(len(data))[starts[number] :][: self.batch_size], number)

    def _loss(self, data: CocoDataset, indices: range, number: int) -> Tensor:
        images, targets = send_to_device(collate(data[index] for index in indices), self.accelerator.device)
        torch.manual_seed(self.seed * 1_000_003 + number)  # the proposals that the detector trains on
        with self.accelerator.autocast():
            return sum(self.detector(images, targets).values()) * len(indices)

    def _mean(self, total: Tensor, data: CocoDataset) -> Tensor:
        return self.accelerator.reduce(total.to(self.accelerator.device), "sum").cpu() / len(data)

    def state(self) -> dict[str, Any]:
        """Plain data from which `load_state` goes on; the genotype itself is part of the supernet's state."""
        return self.search.progress.to_dict()

    def load_state(self, data: dict[str, Any]) -> None:
        """Take on what `state` gave."""
        self.search.progress = Progress.from_dict(data)
        if unknown := {change.conv for change in self.search.progress.changes} - self.convs.keys():
            raise ValueError(f"trials: expected changes of the searched convolutions, found {min(unknown)}")

    def describe(self) -> dict[str, Any]:
        """For the genotype's provenance."""
        progress = self.search.progress
        images = {"score_images": len(self.scored), "held_back_images": len(self.held_back)}
        return {**images, "rounds": progress.rounds, "trials": progress.trials}
