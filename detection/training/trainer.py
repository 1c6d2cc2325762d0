"""Training a detector: SGD with warm-up and steps, as the field does it, on accelerate."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ...base.files import write_json
from ...folders.find_genotype import find_genotype
from ..data.augment import train_transforms
from ..data.dataset import CocoDataset
from ..evaluation.evaluate import evaluate_detector, log_record
from ..metrics import Metrics
from ..models.folder import save_detector
from ..runs.curves import training_curves
from ..runs.facts import describe_run, log_data
from ..runs.folder import STATE_NAME, RunError, RunFolder, pack_optimizer, read_state, unpack_optimizer
from ..runs.loop import EpochLoader, ResumableLoop, cosine, set_lr, warmup_factor
from ..runs.setup import (
    check_norm,
    create_accelerator,
    create_run_detector,
    describe_split,
    in_memory_format,
    load_scaler_state,
    open_run_folder,
    open_run_split,
    scaler_state,
    synchronise_norms,
)
from .config import TrainConfig
from .initial import InitialDetector, find_initial, with_classes

INIT_KEY = "init"  # of a checkpoint's state.json


class Trainer(ResumableLoop):
    """Trains one detector; `run()` begins or resumes.

    Args:
        config: see TrainConfig.
        accelerator: None: one of the config's precision.
        command: as it was typed, for the model card.

    Raises:
        NatsError: anything wrong with the data, the options or the output folder, before any work is done.

    Example:
        >>> trainer = Trainer(TrainConfig(data="my_data", output="runs/nats"))
        >>> trainer.run()  # or, with resume=True, goes on
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator | None = None, command: str | None = None):
        self.config = config
        self.command = command
        accelerator = accelerator or create_accelerator(config.precision)
        check_norm(config.norm, accelerator)
        folder = open_run_folder(config, accelerator)
        self.initial = find_run_initial(config, folder, accelerator)
        masks = None if self.initial is None else self.initial.config.masks
        self.train_data = open_run_split(config, config.train_split, train_transforms(
            config.flip, config.vertical_flip, config.jitter), masks)  # fmt: skip
        self.val_data = open_run_split(config, config.val_split, masks=masks) if config.val_split else None
        loader = EpochLoader(self.train_data, accelerator, config.batch_size, config.workers, config.seed)
        super().__init__(
            accelerator, folder, [loader], config.epochs, config.seed, config.checkpoint_every, "train",
            config.accumulate,
        )  # fmt: skip
        self._prepare(self._create_detector())
        self.best_ap = -1.0
        self.evaluations_since_best = 0
        self.metrics: Metrics | None = None

    def _create_detector(self) -> nn.Module:
        config, data = self.config, self.train_data
        if self.initial is None:
            genotype = None if config.genotype is None else find_genotype(config.genotype)
            return create_run_detector(config, data, self.accelerator, genotype=genotype, norm=config.norm)
        if self.initial.folder is not None:
            self.initial = with_classes(self.initial, data.classes, data.category_ids)
        check_norm(self.initial.config.norm, self.accelerator)
        torch.manual_seed(config.seed)
        detector = self.initial.create()
        synchronise_norms(detector, self.accelerator)
        return in_memory_format(detector, config)

    def _prepare(self, detector: nn.Module) -> None:
        config, accelerator = self.config, self.accelerator
        self.averaged = None
        if config.ema is not None:  # the copy is made before accelerate wraps the detector
            self.averaged = ModelEmaV3(detector, config.ema, use_warmup=True, exclude_buffers=True)
            self.averaged.module = accelerator.prepare_model(self.averaged.module, evaluation_mode=True)
        optimizer = torch.optim.SGD(
            [p for p in detector.parameters() if p.requires_grad],
            lr=config.lr_per_image,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self.detector, self.optimizer = accelerator.prepare(detector, optimizer)

    @property
    def result(self) -> nn.Module:
        """What is evaluated and saved: the detector of the averaged weights, or the trained one."""
        return self.plain_detector if self.averaged is None else self.averaged.module

    @property
    def data(self) -> dict[str, CocoDataset]:
        """The splits of the run, by name."""
        data = {self.config.train_split: self.train_data}
        if self.config.val_split and self.val_data is not None:
            data[self.config.val_split] = self.val_data
        return data

    def begin(self) -> None:
        """Say what the run trains and evaluates on, and what it begins with."""
        is_new = not self.folder.has_log()
        log_data(self.folder, self.accelerator, self.data)
        if self.initial is not None and self.initial.folder is not None and self.accelerator.is_main_process:
            print(self.initial.line(), file=sys.stderr)
            if is_new:
                self.log({"init": {"name": self.initial.name, "classes kept": len(self.initial.kept.keys() - {0})}})

    def train_step(self, *batches: list[tuple]) -> dict[str, float]:
        (training,) = batches  # one loader
        lr = self._lr()
        set_lr(self.optimizer, lr)
        self.detector.train()
        with image_sizes(self.plain_detector, self.config.train_min_sizes):
            losses = self.backward(training)
        self.clip(self.detector.parameters(), self.config.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.averaged is not None:
            self.averaged.update(self.plain_detector, self.step + 1)
        return {"loss": losses.pop("loss"), "lr": lr, **losses}

    def _lr(self) -> float:
        config = self.config
        warmup = warmup_factor(self.step, config.warmup_steps)
        return config.lr_per_image * self.images_per_step * warmup * self._lr_decay()

    def _lr_decay(self) -> float:
        warmup = self.config.warmup_steps
        if self.config.lr_schedule == "cosine":
            return cosine(max(self.step - warmup, 0), self.total_steps - warmup, 1.0, 0.0)
        return 0.1 ** sum(self.epoch >= epoch for epoch in self.config.lr_steps)

    def end_epoch(self) -> None:
        done = self.step // self.steps_per_epoch
        last = done == self.epochs
        if self.val_data is None or (done % self.config.eval_every and not last):
            return
        self.metrics = evaluate_detector(self.result, self.val_data, self.accelerator, self.config)
        self.log(log_record(self.metrics))
        self.evaluations_since_best += 1
        ap = self.metrics.ap or 0.0
        if ap > self.best_ap:
            self.best_ap, self.evaluations_since_best = ap, 0
            self._save("best", self.metrics)
        if self.is_over:
            self.log({"early_stop": self.config.early_stop, "best_AP": self.best_ap})

    @property
    def is_over(self) -> bool:
        limit = self.config.early_stop
        return limit is not None and self.evaluations_since_best >= limit and self.step < self.total_steps

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        momentum, optimizer = pack_optimizer(self.optimizer)
        tensors = {"model": self.plain_detector.state_dict(), "optimizer": momentum}
        if self.averaged is not None:
            tensors["averaged"] = self.averaged.module.state_dict()
        return tensors, {
            "optimizer": optimizer,
            "scaler": scaler_state(self.accelerator),
            "best_ap": self.best_ap,
            "evaluations_since_best": self.evaluations_since_best,
            "metrics": self.metrics.to_dict() if self.metrics else None,
            INIT_KEY: self.initial.to_dict() if self.initial else None,
        }

    def load_state(self, tensors: dict[str, dict[str, Tensor]], data: dict[str, Any]) -> None:
        self.plain_detector.load_state_dict(tensors["model"])
        if self.averaged is not None:
            self.averaged.module.load_state_dict(tensors["averaged"])
        unpack_optimizer(self.optimizer, tensors["optimizer"], data["optimizer"])
        load_scaler_state(self.accelerator, data["scaler"])
        self.best_ap, self.evaluations_since_best = data["best_ap"], data["evaluations_since_best"]
        self.metrics = Metrics.from_dict(data["metrics"]) if data["metrics"] else None

    def finish(self) -> Metrics | None:
        """Write the model folder; returns the last evaluation's metrics."""
        self._save("model", self.metrics)
        if self.accelerator.is_main_process:
            training_curves(self.folder.log_path, self.folder.path / "curves.png")
            if self.metrics:
                write_json(self.folder.path / "metrics.json", self.metrics.to_dict())
            if self.is_over:
                print(self._why_it_is_over(), file=sys.stderr)
        return self.metrics

    def _why_it_is_over(self) -> str:
        done = f"ended after {self.step // self.steps_per_epoch} of {self.epochs} epochs (early_stop)"
        return f"{done}: {self.evaluations_since_best} evaluations without an AP above {self.best_ap:.1f}"

    def _save(self, name: str, metrics: Metrics | None) -> None:
        if self.accelerator.is_main_process:
            split = describe_split(self.config, self.config.val_split)
            began = {} if self.initial is None else {"init": self.initial.name}
            run = describe_run(
                self.config, self.folder.config | began, self.data, self.plain_detector, self.accelerator,
                self.images_per_step, self.command,
            )  # fmt: skip
            save_detector(self.result, self.folder.path / name, metrics, split, run)
        self.accelerator.wait_for_everyone()


def find_run_initial(config: TrainConfig, folder: RunFolder, accelerator: Accelerator) -> InitialDetector | None:
    """The detector that a run begins with; that of a run which goes on is in its checkpoint, nothing is downloaded.

    Raises:
        NatsError: no such detector, or an option that contradicts it.
    """
    if config.init is None:
        return None
    checkpoint = folder.latest_folder()
    if checkpoint is not None:
        path, saved = checkpoint / STATE_NAME, read_state(checkpoint).get(INIT_KEY)
        if not isinstance(saved, dict):
            raise RunError(f"{path}: {INIT_KEY}: expected the detector that the run began with")
        return InitialDetector.from_dict(saved, str(path))
    with accelerator.main_process_first():  # it downloads, the others find the files
        return find_initial(config.init, config)


@contextmanager
def image_sizes(detector: nn.Module, sizes: Sequence[int]) -> Iterator[None]:
    """Have a torchvision detector draw the short side of each training image from these, for a while.

    It draws with torch's generator, which the loop seeds anew for each step. No sizes: nothing changes.
    """
    before = detector.transform.min_size
    detector.transform.min_size = tuple(sizes) or before
    try:
        yield
    finally:
        detector.transform.min_size = before
