"""The trials of a sensitivity search: scoring, trying and keeping changes on a detector's images, resumable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from tqdm import tqdm

from ...detection.data.dataset import CocoDataset, collate
from ...detection.runs.loop import StopRequest
from ..supernet.searched_conv import SensitivityConv2d
from .sensitivity import Progress, SensitivitySearch, score
from .start import held_back, open_search_split, seeded_order

if TYPE_CHECKING:
    from .searcher import Searcher


class Trials:
    """What follows the epochs of a sensitivity search; a trial counts as a step, with a checkpoint behind it.

    Args:
        searcher: the run; its supernet is one of SensitivityConv2d.
    """

    def __init__(self, searcher: Searcher):
        self.searcher = searcher
        config = searcher.config
        plain = open_search_split(config, config.train_split)  # not mirrored: their losses are compared with each other
        order = seeded_order(len(searcher.loaders[0].dataset), config.seed)
        scored = searcher.loaders[0].dataset.select(sorted(order[: config.score_images]))
        self.scored, self.held_back = _Batches(scored, searcher), _Batches(held_back(plain, config), searcher)
        self.search = SensitivitySearch(
            self._convs(), self._score, self._held_back_loss, config.max_dilations, config.max_rounds
        )

    def run(self) -> None:
        """Try changes until none helps, or go on doing so."""
        progress = self.search.progress
        main = self.searcher.accelerator.is_main_process
        with StopRequest() as stop, tqdm(
            desc="trials", initial=progress.trials, unit="trial", disable=not main, dynamic_ncols=True
        ) as bar:  # fmt: skip
            while not progress.done:
                if progress.size is None:
                    scores = self.search.begin_round()
                    self.searcher.log(
                        {"scores": {self.searcher.names[name]: rows.tolist() for name, rows in scores.items()}}
                    )
                else:
                    self._try(bar)
                    self.searcher.stop_if_asked(stop)

    def _try(self, bar: tqdm) -> None:
        trial = self.search.try_changes()
        self.searcher.step += 1
        self.searcher.log({"trial": self.search.progress.trials, **trial._asdict()})
        bar.update()
        bar.set_postfix(changes=trial.changes, loss=f"{trial.held_back_loss:.4g}", accepted=trial.accepted)
        self.searcher.checkpoint()

    def _score(self) -> dict[str, Tensor]:
        searcher = self.searcher
        if searcher.config.norm == "calibrated":
            searcher.calibrate()
        searcher.plain_detector.train()
        totals = score(searcher.plain_detector, self._convs(), self.scored.losses())
        return {name: self._mean(total, self.scored) for name, total in totals.items()}

    @torch.no_grad()
    def _held_back_loss(self) -> float:
        """Mean loss of the held-back images at the current genotype, with its own statistics."""
        searcher = self.searcher
        if searcher.config.norm == "calibrated":
            self._calibrate_current()
        searcher.plain_detector.train()
        total = torch.zeros((), dtype=torch.float64)
        for loss in self.held_back.losses():
            total += loss().double().cpu()
        return self._mean(total, self.held_back).item()

    def _calibrate_current(self) -> None:
        convs = self._convs().values()
        for conv in convs:
            conv.measures_all = False
        try:
            self.searcher.calibrate()
        finally:
            for conv in convs:
                conv.measures_all = True

    def _convs(self) -> dict[str, SensitivityConv2d]:
        """The supernet's convolutions, which are all of this kind in sensitivity mode."""
        return {name: conv for name, conv in self.searcher.searched.items() if isinstance(conv, SensitivityConv2d)}

    def _mean(self, total: Tensor, batches: _Batches) -> Tensor:
        accelerator = self.searcher.accelerator
        return accelerator.reduce(total.to(accelerator.device), "sum").cpu() / len(batches.data)

    def state(self) -> dict[str, Any]:
        """Plain data from which `load_state` goes on; the genotype itself is part of the supernet's state."""
        return self.search.progress.to_dict()

    def load_state(self, data: dict[str, Any]) -> None:
        """Take on what `state` gave."""
        self.search.progress = Progress.from_dict(data)

    def describe(self) -> dict[str, Any]:
        """For the genotype's provenance."""
        progress = self.search.progress
        images = {"score_images": len(self.scored.data), "held_back_images": len(self.held_back.data)}
        return {**images, "rounds": progress.rounds, "trials": progress.trials}


class _Batches:
    """This process's share of some images, in batches, with a loss that is a function of the genotype alone."""

    def __init__(self, data: CocoDataset, searcher: Searcher):
        self.data, self.searcher = data, searcher

    def losses(self) -> Iterator[Callable[[], Tensor]]:
        """Of each batch a callable that gives the sum over its images of the detector's loss."""
        size, accelerator = self.searcher.config.batch_size, self.searcher.accelerator
        starts = range(0, len(self.data), size)
        for number in range(accelerator.process_index, len(starts), accelerator.num_processes):
            indices = range(starts[number], min(starts[number] + size, len(self.data)))
            yield partial(self._loss, indices, number)

    def _loss(self, indices: range, number: int) -> Tensor:
        searcher = self.searcher
        batch = collate(self.data[index] for index in indices)
        images, targets = send_to_device(batch, searcher.accelerator.device)
        torch.manual_seed(searcher.seed * 1_000_003 + number)  # the proposals that the detector trains on
        with searcher.accelerator.autocast():
            return sum(searcher.plain_detector(images, targets).values()) * len(indices)
