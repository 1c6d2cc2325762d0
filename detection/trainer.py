"""Training a detector: SGD with warm-up and steps, as the field does it, on accelerate."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..errors import NatsError, one_line
from ..figures import training_curves
from ..files import write_json
from .augment import train_transforms
from .coco_eval import Metrics, evaluate, predict
from .config import Precision, RunConfig, check_at_least
from .datasets import CocoDataset, collate, find_split
from .detectors import create_detector
from .hub import save_detector
from .loop import EpochLoader, ResumableLoop, cosine, set_lr, warmup_factor
from .processes import process_group
from .run_folder import RunFolder, pack_optimizer, unpack_optimizer

CALIBRATION_BATCH = 8


@dataclass(kw_only=True)
class TrainConfig(RunConfig):
    """Train a detector on a COCO-layout data set.

    The defaults are the field's 1x recipe. The output folder receives model/ (the last weights), best/ (the best on
    val_split), log.jsonl, curves.png, metrics.json and checkpoints/.

    Args:
        genotype: what the variant runs: a published name or a file; null: the variant's default.
        norm: batch norm of the backbone, 'frozen' or 'live'; null: frozen, or live in a random backbone.
        epochs: times through the training split.
        lr_per_image: learning rate, multiplied by the images of a step (over all processes).
        momentum: of SGD.
        weight_decay: of SGD.
        warmup_steps: the learning rate grows linearly over this many steps.
        lr_schedule: after the warm-up: 'steps', or 'cosine' to zero at the last step.
        lr_steps: epochs after which 'steps' divides the learning rate by 10.
        flip: probability of mirroring an image left and right.
        vertical_flip: probability of mirroring an image top and bottom.
        jitter: strength of brightness, contrast and saturation jitter, 0 to 1.
        eval_every: epochs between evaluations on val_split.
    """

    val_split: str | None = "val"
    backbone: str = "nats_resnet50"
    genotype: str | None = None
    norm: Literal["frozen", "live"] | None = None
    epochs: int = 13
    lr_per_image: float = 0.00125
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_steps: int = 500
    lr_schedule: Literal["steps", "cosine"] = "steps"
    lr_steps: tuple[int, ...] = (8, 11)
    flip: float = 0.5
    vertical_flip: float = 0.0
    jitter: float = 0.0
    eval_every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, epochs=self.epochs, eval_every=self.eval_every)
        check_at_least(0, lr_per_image=self.lr_per_image, warmup_steps=self.warmup_steps)
        check_at_least(0, momentum=self.momentum, weight_decay=self.weight_decay)


class Trainer(ResumableLoop):
    """Trains one detector; `run()` begins or resumes.

    Args:
        config: see TrainConfig.
        accelerator: None: one of the config's precision.

    Raises:
        NatsError: anything wrong with the data, the options or the output folder, before any work is done.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator | None = None):
        self.config = config
        accelerator = accelerator or create_accelerator(config.precision)
        self.train_data = open_split(config, config.train_split, train_transforms(
            config.flip, config.vertical_flip, config.jitter))  # fmt: skip
        self.val_data = open_split(config, config.val_split) if config.val_split else None
        folder = open_run_folder(config, accelerator)
        loader = EpochLoader(self.train_data, accelerator, config.batch_size, config.workers, config.seed)
        super().__init__(
            accelerator, folder, [loader], config.epochs, config.seed, config.checkpoint_every, "train",
            config.accumulate,
        )  # fmt: skip
        detector = create_run_detector(config, self.train_data, accelerator, genotype=config.genotype, norm=config.norm)
        optimizer = torch.optim.SGD(
            [p for p in detector.parameters() if p.requires_grad],
            lr=config.lr_per_image,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self.detector, self.optimizer = accelerator.prepare(detector, optimizer)
        self.best_ap = -1.0
        self.metrics: Metrics | None = None

    def train_step(self, batches: list[tuple]) -> dict[str, float]:
        lr = self._lr()
        set_lr(self.optimizer, lr)
        self.detector.train()
        losses = self.backward(batches)
        self.clip(self.detector.parameters(), self.config.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
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
        self.metrics = evaluate_detector(self.plain_detector, self.val_data, self.accelerator, self.config)
        ap = self.metrics.ap or 0.0
        self.log({"AP": self.metrics.ap, "AP50": self.metrics.ap50, "AP75": self.metrics.ap75})
        if ap > self.best_ap:
            self.best_ap = ap
            self._save("best", self.metrics)

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        momentum, optimizer = pack_optimizer(self.optimizer)
        tensors = {"model": self.plain_detector.state_dict(), "optimizer": momentum}
        metrics = self.metrics.to_dict() if self.metrics else None
        return tensors, {"optimizer": optimizer, "scaler": scaler_state(self.accelerator), "best_ap": self.best_ap,
                         "metrics": metrics}  # fmt: skip

    def load_state(self, tensors: dict[str, dict[str, Tensor]], data: dict[str, Any]) -> None:
        self.plain_detector.load_state_dict(tensors["model"])
        unpack_optimizer(self.optimizer, tensors["optimizer"], data["optimizer"])
        load_scaler_state(self.accelerator, data["scaler"])
        self.best_ap = data["best_ap"]
        self.metrics = Metrics(**data["metrics"]) if data["metrics"] else None

    def finish(self) -> Metrics | None:
        """Write the model folder; returns the last evaluation's metrics."""
        self._save("model", self.metrics)
        if self.accelerator.is_main_process:
            training_curves(self.folder.log_path, self.folder.path / "curves.png")
            if self.metrics:
                write_json(self.folder.path / "metrics.json", self.metrics.to_dict())
        return self.metrics

    def _save(self, name: str, metrics: Metrics | None) -> None:
        if self.accelerator.is_main_process:
            split = describe_split(self.config, self.config.val_split)
            save_detector(self.plain_detector, self.folder.path / name, metrics=metrics, evaluated_on=split)
        self.accelerator.wait_for_everyone()


def create_accelerator(precision: Precision | None) -> Accelerator:
    """The accelerator of a precision; devices and processes are what `accelerate launch` says."""
    try:
        accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=[process_group()])
    except ValueError as error:  # a precision that this machine lacks
        raise NatsError(f"precision: {one_line(error)}") from error
    started = int(os.environ.get("WORLD_SIZE") or 1)
    if accelerator.num_processes != started:  # each would begin the whole run, in the same folder
        raise NatsError(
            f"started as one of {started} processes, but finds no device to share; for processes on the CPU set the"
            " environment variable ACCELERATE_USE_CPU=true"
        )
    if precision == "fp16" and accelerator.scaler is None:  # accelerate would silently compute in float32
        raise NatsError(f"precision: fp16 is not for the device {accelerator.device.type!r}, bf16 may be")
    return accelerator


def open_run_folder(config: RunConfig, accelerator: Accelerator) -> RunFolder:
    """The config's output folder, which the main process writes."""
    return RunFolder(config.output, config.to_dict(), config.resume, accelerator.is_main_process, config.tensorboard)


def open_split(config: RunConfig, split: str, transforms: Any = None) -> CocoDataset:
    """A split of the config's data set; evaluation transforms unless told otherwise."""
    annotations, images = find_split(config.data, split, config.images)
    return CocoDataset(annotations, images, transforms, config.skip_bad, config.seed, config.transpose)


def describe_split(config: RunConfig, split: str | None) -> str:
    """How model cards and provenance name a split of the config's data set."""
    return f"{Path(config.data).name} {split}{', transposed' if config.transpose else ''}"


def create_run_detector(config: RunConfig, data: CocoDataset, accelerator: Accelerator, **options: Any) -> nn.Module:
    """The detector that a run begins with, its batch norms calibrated on training images; the same on every process.

    `options` go to `create_detector` beside those of the config.
    """
    torch.manual_seed(config.seed)
    with accelerator.main_process_first():  # it downloads, the others find the files
        detector = create_detector(
            config.framework,
            config.backbone,
            num_classes=len(data.classes) + 1,
            weights=config.weights,
            trainable_layers=config.trainable_layers,
            calibration=calibration_batches(data, config) if config.calibration_images and config.weights else None,
            fpn_channels=config.fpn_channels,
            head_size=config.head_size,
            roi_samples=config.roi_samples,
            min_size=config.min_size,
            max_size=config.max_size,
            anchor_sizes=config.anchor_sizes,
            classes=data.classes,
            category_ids=data.category_ids,
            **options,
        )
    return in_memory_format(detector, config)


def in_memory_format(detector: nn.Module, config: RunConfig) -> nn.Module:
    """The detector in the memory format that the config says."""
    return detector.to(memory_format=torch.channels_last) if config.channels_last else detector


def calibration_batches(data: CocoDataset, config: RunConfig) -> Iterator[tuple]:
    """(images, targets) of the images on which batch norms are calibrated: the same ones for every arm and process."""
    generator = torch.Generator().manual_seed(config.seed)
    chosen = torch.randperm(len(data), generator=generator)[: config.calibration_images].tolist()
    for start in range(0, len(chosen), CALIBRATION_BATCH):
        yield collate(data[index] for index in chosen[start : start + CALIBRATION_BATCH])


def evaluate_detector(detector: nn.Module, data: CocoDataset, accelerator: Accelerator, config: RunConfig) -> Metrics:
    """COCO metrics of a detector on a data set."""
    results = predict(detector, data, accelerator, config.eval_batch_size, config.workers)
    return evaluate(data, results)


def scaler_state(accelerator: Accelerator) -> dict[str, Any] | None:
    """State of the fp16 loss scaler, or None without one."""
    return accelerator.scaler.state_dict() if accelerator.scaler is not None else None


def load_scaler_state(accelerator: Accelerator, state: dict[str, Any] | None) -> None:
    """Take on what `scaler_state` gave."""
    if accelerator.scaler is not None and state is not None:
        accelerator.scaler.load_state_dict(state)
