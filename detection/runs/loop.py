"""Epochs of optimiser steps that can be stopped between any two of them and resumed.

A step is a function of (seed, step, process): random numbers are seeded anew before each, and so is each epoch's order
of images. A resumed run therefore ends in the state of an uninterrupted one.
"""

import math
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

from ...base.errors import Interrupted, one_line
from ..data.dataset import CocoDataset, collate
from .folder import Checkpoint, RunError, RunFolder
from .processes import ended_with_launcher, has_launcher, lost_process_told

LOG_EVERY = 10  # steps
SMALLEST_SCALE = 2.0**-10  # of fp16's losses, which begins at 2**16; it is halved with every step that is left out


class EpochSampler(Sampler[int]):
    """All indices, shuffled as a function of (seed, epoch)."""

    def __init__(self, length: int, seed: int):
        self.length, self.seed, self.epoch = length, seed, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        return iter(torch.randperm(self.length, generator=generator).tolist())


class EpochLoader:
    """A data set's training batches on this process, epoch by epoch, from any batch on."""

    def __init__(self, dataset: CocoDataset, accelerator: Accelerator, batch_size: int, workers: int, seed: int):
        self.dataset = dataset
        self.accelerator = accelerator
        self.batch_size = batch_size
        self.sampler = EpochSampler(len(dataset), seed)
        loader = DataLoader(
            dataset, batch_size=batch_size, sampler=self.sampler, num_workers=workers, collate_fn=collate
        )
        self.loader = accelerator.prepare_data_loader(loader)

    def __len__(self) -> int:
        return len(self.loader)

    def batches(self, epoch: int, skip: int) -> Iterator[tuple]:
        """(images, targets) of this epoch, without the first `skip` batches."""
        self.sampler.epoch = epoch
        loader = self.accelerator.skip_first_batches(self.loader, skip) if skip else self.loader
        # Else accelerate gives the data set its own count when iteration begins; in 1.2 that of a loader which skips
        # batches is 0.
        loader.set_epoch(epoch)
        self.dataset.set_epoch(epoch)
        return iter(loader)


class StopRequest:
    """Turns Ctrl-C and SIGTERM into a request that is looked at between steps; a second one interrupts at once.

    Not so under a launcher, which hands on what the terminal has sent to all: there the second is no second thought.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self) -> "StopRequest":
        self.requested = False
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            self._before = {number: signal.signal(number, self._request) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _request(self, *_: object) -> None:
        self.requested = True
        if not has_launcher():
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


class ResumableLoop(ABC):
    """The frame of training and search; subclasses say what a step does and what its state is.

    Args:
        accelerator: devices, precision and processes.
        folder: where the log and checkpoints go, and from where the loop resumes.
        loaders: one or several; a step takes batches of each, the first tells how many there are.
        epochs: how many times through the first loader.
        seed: see the module's docstring.
        checkpoint_every: steps between checkpoints; None: at the end of each epoch only.
        title: what the progress bar calls it.
        accumulate: batches of each loader that make a step; the last step of an epoch takes what is left.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: RunFolder,
        loaders: list[EpochLoader],
        epochs: int,
        seed: int,
        checkpoint_every: int | None,
        title: str,
        accumulate: int = 1,
    ):
        self.accelerator, self.folder, self.loaders = accelerator, folder, loaders
        self.epochs, self.seed, self.checkpoint_every, self.title = epochs, seed, checkpoint_every, title
        self.accumulate = accumulate
        self.step = 0
        self._saved_step = -1

    detector: nn.Module  # as accelerate wrapped it; subclasses set it

    @property
    def plain_detector(self) -> nn.Module:
        """The detector without accelerate's wrappers."""
        return self.accelerator.unwrap_model(self.detector)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.loaders[0]) / self.accumulate)

    @property
    def images_per_step(self) -> int:
        """Over all processes; the last step of an epoch may have fewer."""
        return self.loaders[0].batch_size * self.accumulate * self.accelerator.num_processes

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def epoch(self) -> int:
        """The epoch of the step that comes next, from 0."""
        return self.step // self.steps_per_epoch

    @abstractmethod
    def train_step(self, *batches: list[tuple]) -> dict[str, float]:
        """Update once on some batches of each loader; returns what to log, `loss` among it."""

    def backward(self, batches: list[tuple], extra: Callable[[], Tensor | float] | None = None) -> dict[str, float]:
        """Add the gradient of the mean loss over the images of some batches.

        A batch counts by its images, so that a short last one weighs less. Several processes exchange gradients once,
        with the last batch.

        Args:
            batches: (images, targets) each.
            extra: gives what is added to the loss, for instance of parameters alone.

        Returns:
            Means of the detector's losses by name, and of their sum as `loss`; without `extra`.

        Raises:
            RunError: one of them is not finite.
        """
        total = sum(len(images) for images, _ in batches)
        means: dict[str, Tensor] = {}
        for index, (images, targets) in enumerate(batches):
            last = index == len(batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.detector):
                losses = self.detector(images, targets)
                losses = {"loss": sum(losses.values()), **losses}
                share = len(images) / total
                self.accelerator.backward(share * (losses["loss"] + (extra() if extra else 0.0)))
            for name, loss in losses.items():
                means[name] = means.get(name, 0.0) + share * loss.detach()
        record = dict(zip(means, torch.stack(list(means.values())).tolist(), strict=True))  # one wait for the GPU
        self._check_finite(record)
        return record

    def clip(self, parameters: Iterable[nn.Parameter], largest: float | None) -> None:
        """Clip the gradient's norm; with None, only see that it is finite.

        In fp16 the scaler has a step left out whose gradient is not finite, which is how it finds its scale.

        Raises:
            RunError: the gradient is not finite; in fp16, at any scale.
        """
        norm = self.accelerator.clip_grad_norm_(parameters, math.inf if largest is None else largest)
        scaler = self.accelerator.scaler
        if scaler is None or scaler.get_scale() < SMALLEST_SCALE:
            self._check_finite({"the gradient's norm": norm.item()})

    def epoch_loaders(self) -> list[EpochLoader]:
        """The loaders that the current epoch draws from, the first always among them."""
        return self.loaders

    @abstractmethod
    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Groups of tensors and plain data from which `load_state` continues."""

    @abstractmethod
    def load_state(self, tensors: dict[str, dict[str, Tensor]], data: dict[str, Any]) -> None:
        """Take on what `state` gave."""

    @property
    def is_over(self) -> bool:
        """Whether the run ends before its last epoch; asked between epochs."""
        return False

    def begin(self) -> None:  # noqa: B027 (a hook, empty unless wanted)
        """Called once in each process, before the first step, also of a resumed run."""

    def begin_epoch(self) -> None:  # noqa: B027
        """Called before an epoch's first step."""

    def end_epoch(self) -> None:  # noqa: B027
        """Called after an epoch's last step, before its checkpoint; `self.step` counts that step."""

    def finish(self) -> Any:  # noqa: B027
        """Called after the last epoch; what `run` returns."""

    def run(self) -> Any:
        """Run, or resume, to the end.

        Raises:
            Interrupted: stopped by Ctrl-C or SIGTERM, behind a checkpoint.
            RunError: a damaged checkpoint, or a loss that is not finite.
            LostProcess: another process of the run ended.
        """
        with ended_with_launcher(self._what_next), lost_process_told(self._what_next):
            self.folder.begin()
            self._resume()
            self.begin()
            try:
                self._run_epochs()
                return self.finish()
            finally:
                self.folder.close()

    def _what_next(self) -> str:
        step = self.folder.latest_step()
        last = "there is no checkpoint yet" if step is None else f"the last checkpoint is step {step}"
        return f"{last} in {self.folder.path}; continue with --resume true"

    def _run_epochs(self) -> None:
        total, main = self.total_steps, self.accelerator.is_main_process
        with StopRequest() as stop, tqdm(
            total=total, initial=self.step, desc=self.title, unit="step", disable=not main, dynamic_ncols=True
        ) as bar:  # fmt: skip
            while self.step < total and not self.is_over:
                self._run_epoch(bar, stop)

    def _run_epoch(self, bar: tqdm, stop: StopRequest) -> None:
        epoch, done = self.epoch, self.step % self.steps_per_epoch
        if not done:
            self.begin_epoch()
        streams = (loader.batches(epoch, done * self.accumulate) for loader in self.epoch_loaders())
        for batches in zip(*(_grouped(stream, self.accumulate) for stream in streams), strict=False):
            record = self._seeded_step(batches)
            self._report(bar, record)
            if self.step % self.steps_per_epoch == 0:
                break
            self._between_steps(stop)
        self.end_epoch()
        self.checkpoint()
        self.stop_if_asked(stop)

    def _seeded_step(self, batches: tuple[list[tuple], ...]) -> dict[str, float]:
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        torch.manual_seed((self.seed * 1_000_003 + self.step) * world + rank)
        record = self.train_step(*batches)
        self._check_finite(record)
        self.step += 1
        return record

    def _check_finite(self, record: dict[str, float]) -> None:
        bad = [key for key, value in record.items() if not math.isfinite(value)]
        if bad:
            key = bad[-1]  # a part of the loss rather than the sum
            raise RunError(
                f"{self.folder.path}: {key} is {record[key]} at step {self.step}, in epoch {self.epoch + 1} of"
                f" {self.epochs}; the last checkpoint is kept. A lower learning rate or clip_grad may help"
            )

    def _report(self, bar: tqdm, record: dict[str, float]) -> None:
        bar.update()
        bar.set_postfix({key: f"{value:.3g}" for key, value in record.items()}, refresh=False)
        if self.step % LOG_EVERY == 0 or self.step == self.total_steps:
            self.log(record)

    def log(self, record: dict[str, Any]) -> None:
        """Append a record to the log, under the current step and epoch."""
        self.folder.log({"step": self.step, "epoch": round(self.step / self.steps_per_epoch, 4), **record})

    def _between_steps(self, stop: StopRequest) -> None:
        if self.checkpoint_every and self.step % self.checkpoint_every == 0:
            self.checkpoint()
        self.stop_if_asked(stop)

    def stop_if_asked(self, stop: StopRequest) -> None:
        """Stop behind a checkpoint if any process was asked to."""
        if stop.requested:
            self.accelerator.set_trigger()
        if self.accelerator.check_trigger():  # any process's request stops all of them at the same step
            self.checkpoint()
            total = max(self.step, self.total_steps)  # a search's trials come after its epochs
            raise Interrupted(f"stopped at step {self.step} of {total}; continue with --resume true")

    def checkpoint(self) -> None:
        """Save the state, unless this step's is saved."""
        if self._saved_step != self.step:
            tensors, data = self.state()
            self.folder.save_checkpoint(Checkpoint(self.step, tensors, data))
            self.accelerator.wait_for_everyone()
            self._saved_step = self.step

    def _resume(self) -> None:
        checkpoint = self.folder.latest_checkpoint()
        step = 0
        if checkpoint is not None:
            try:
                self.load_state(checkpoint.tensors, checkpoint.state)
            except (KeyError, RuntimeError, TypeError, ValueError) as error:
                reason = one_line(error)
                raise RunError(f"{self.folder.path}: the checkpoint does not fit this run: {reason}") from error
            step = self._saved_step = self.step = checkpoint.step
        self._check_shared(step)
        self.folder.rewind_log(step)

    def _check_shared(self, step: int) -> None:
        """Machines without a common file system would go on from different steps."""
        steps = gather_object([step])
        if len(set(steps)) > 1:
            raise RunError(
                f"{self.folder.path}: expected a folder that all machines share; process"
                f" {self.accelerator.process_index} found the checkpoint of step {step}, others of {sorted(set(steps))}"
            )


def _grouped(batches: Iterator[tuple], size: int) -> Iterator[list[tuple]]:
    while group := list(islice(batches, size)):
        yield group


def warmup_factor(step: int, warmup_steps: int) -> float:
    """Linear warm-up from a thousandth, as torchvision's reference training does."""
    return 1.0 if step >= warmup_steps else 0.001 + 0.999 * step / warmup_steps


def cosine(step: int, total: int, start: float, end: float) -> float:
    """Cosine from `start` at step 0 to `end` at step `total`."""
    return end + (start - end) * (1 + math.cos(math.pi * step / max(total, 1))) / 2


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
