"""Training a detector: SGD with warm-up and steps, as the field does it, on accelerate."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ...base.errors import NatsError, one_line
from ...base.files import write_json
from ...models.named import find_genotype
from ...pictures.style import training_curves
from ..data import opening as formats
from ..data.augment import train_transforms
from ..data.dataset import CocoDataset, collate
from ..evaluation.coco import Metrics, evaluate, predict
from ..models.create import create_detector
from ..models.folder import save_detector
from ..runs.config import Precision, RunConfig, check_at_least
from ..runs.data import report_data
from ..runs.facts import describe_run
from ..runs.folder import STATE_NAME, RunError, RunFolder, pack_optimizer, read_state, unpack_optimizer
from ..runs.loop import EpochLoader, ResumableLoop, cosine, set_lr, warmup_factor
from ..runs.processes import process_group
from .initial import InitialDetector, find_initial, with_classes

CALIBRATION_BATCH = 8
INIT_KEY = "init"  # of a checkpoint's state.json
DETECTOR_OPTIONS = (
    *("fpn_channels", "head_size", "roi_samples", "masks", "mask_channels", "min_size", "max_size", "anchor_sizes"),
    *("score_thresh", "nms_thresh", "detections"),
)
"""Options of a run that are fields of the detector's config."""


@dataclass(kw_only=True)
class TrainConfig(RunConfig):
    """Train a detector on boxes, and on masks where the framework finds them.

    The defaults are the field's 1x recipe for COCO; recipes/small_data.yaml is for some hundred images. The output
    folder receives model/ (the last weights), best/ (of the highest box AP on val_split), log.jsonl, curves.png,
    metrics.json and checkpoints/.

    Args:
        init: folder or Hub repository (org/name, org/name@revision) of a trained detector to go on from: all of it,
            and its class head for the classes that have the same name in the data. Its config then stands for
            framework, backbone, genotype, masks, anchor_sizes and the sizes of the heads, which can not be changed. Its
            min_size, max_size, trainable_layers, norm, roi_samples, score_thresh, nms_thresh and detections can: they
            hold as far as these options are left at their defaults. weights and calibration_images are not needed.
        genotype: what the variant runs: a published name, a file, the folder of a search, or the Hub repository of a
            genotype or model (hf-hub:org/name); null: the variant's default.
        norm: batch norm of the backbone, 'frozen', 'live', or 'sync': live, with statistics over all processes, on
            GPUs; null: frozen, or live in a random backbone.
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
        train_min_sizes: in training, min_size is drawn from these for each image; empty: as in evaluation.
        ema: decay of an exponential moving average of the weights, for instance 0.999, which grows to it over the first
            steps; evaluation, best/ and model/ are then of the averaged weights. null: none.
        eval_every: epochs between evaluations on val_split.
        early_stop: end the run after so many evaluations without a higher AP; null: never.
    """

    val_split: str | None = "val"
    init: str | None = None
    backbone: str = "nats_resnet50"
    genotype: str | None = None
    norm: Literal["frozen", "live", "sync"] | None = None
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
    train_min_sizes: tuple[int, ...] = ()
    ema: float | None = None
    eval_every: int = 1
    early_stop: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, epochs=self.epochs, eval_every=self.eval_every, early_stop=self.early_stop)
        check_at_least(1, train_min_sizes=min(self.train_min_sizes, default=None))
        check_at_least(0, lr_per_image=self.lr_per_image, warmup_steps=self.warmup_steps)
        check_at_least(0, momentum=self.momentum, weight_decay=self.weight_decay)
        if self.ema is not None and not 0 < self.ema < 1:
            raise NatsError(f"ema: expected a decay between 0 and 1, found {self.ema}")
        if self.early_stop is not None and self.val_split is None:
            raise NatsError("early_stop: needs a val_split, on which AP is measured")


class Trainer(ResumableLoop):
    """Trains one detector; `run()` begins or resumes.

    Args:
        config: see TrainConfig.
        accelerator: None: one of the config's precision.
        command: as it was typed, for the model card.

    Raises:
        NatsError: anything wrong with the data, the options or the output folder, before any work is done.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator | None = None, command: str | None = None):
        self.config = config
        self.command = command
        accelerator = accelerator or create_accelerator(config.precision)
        check_norm(config.norm, accelerator)
        folder = open_run_folder(config, accelerator)
        self.initial = find_run_initial(config, folder, accelerator)
        masks = None if self.initial is None else self.initial.config.masks
        self.train_data = open_split(config, config.train_split, train_transforms(
            config.flip, config.vertical_flip, config.jitter), masks)  # fmt: skip
        self.val_data = open_split(config, config.val_split, masks=masks) if config.val_split else None
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
        report_data(self.folder, self.accelerator, self.data)
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


def create_accelerator(precision: Precision | None) -> Accelerator:
    """The accelerator of a precision; devices and processes are what `accelerate launch` says."""
    started = int(os.environ.get("WORLD_SIZE") or 1)
    alone = (
        f"started as one of {started} processes, but finds no device to share; for processes on the CPU set the"
        " environment variable ACCELERATE_USE_CPU=true"
    )
    try:
        accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=[process_group()])
    except ValueError as error:  # a precision that this machine lacks
        if "MASTER_ADDR" in str(error):  # older versions look for the others at once
            raise NatsError(alone) from error
        raise NatsError(f"precision: {one_line(error)}") from error
    if accelerator.num_processes != started:  # each would begin the whole run, in the same folder
        raise NatsError(alone)
    if precision == "fp16" and accelerator.scaler is None:  # accelerate would silently compute in float32
        raise NatsError(f"precision: fp16 is not for the device {accelerator.device.type!r}, bf16 may be")
    return accelerator


def open_run_folder(config: RunConfig, accelerator: Accelerator) -> RunFolder:
    """The config's output folder, which the main process writes."""
    return RunFolder(config.output, config.to_dict(), config.resume, accelerator.is_main_process, config.tensorboard)


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


def open_split(config: RunConfig, split: str, transforms: Any = None, masks: bool | None = None) -> CocoDataset:
    """A split of the config's data set; evaluation transforms, and masks if the framework needs them, unless told."""
    masks = config.wants_masks if masks is None else masks
    return formats.open_split(
        config.data, split, config.format, config.images, transforms, config.skip_bad, config.seed, config.transpose,
        masks,
    )  # fmt: skip


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
            **{key: getattr(config, key) for key in DETECTOR_OPTIONS},
            classes=data.classes,
            category_ids=data.category_ids,
            **options,
        )
    synchronise_norms(detector, accelerator)
    return in_memory_format(detector, config)


def synchronise_norms(detector: nn.Module, accelerator: Accelerator) -> None:
    """Make the batch norms of a detector whose norm is "sync" share their statistics over all processes.

    Of a single process those are its own: ordinary live batch norms.

    Raises:
        NatsError: several processes on the CPU, where torch has no such batch norm.
    """
    if detector.config.norm == "sync" and accelerator.num_processes > 1:
        check_norm("sync", accelerator)
        detector.backbone.body = convert_sync_batchnorm(detector.backbone.body)


def check_norm(norm: str | None, accelerator: Accelerator) -> None:
    """NatsError for a norm that these processes can not have."""
    if norm == "sync" and accelerator.num_processes > 1 and accelerator.device.type != "cuda":
        raise NatsError(
            f"norm: sync is for processes on GPUs, found {accelerator.num_processes} on the device"
            f" {accelerator.device.type!r}; expected frozen or live there"
        )


def in_memory_format(detector: nn.Module, config: RunConfig) -> nn.Module:
    """The detector in the memory format that the config says."""
    return detector.to(memory_format=torch.channels_last) if config.channels_last else detector


def calibration_batches(data: CocoDataset, config: RunConfig) -> Iterator[tuple]:
    """(images, targets) of the images on which batch norms are calibrated: the same ones for every arm and process."""
    generator = torch.Generator().manual_seed(config.seed)
    chosen = torch.randperm(len(data), generator=generator)[: config.calibration_images].tolist()
    for start in range(0, len(chosen), CALIBRATION_BATCH):
        yield collate(data[index] for index in chosen[start : start + CALIBRATION_BATCH])


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


def evaluate_detector(detector: nn.Module, data: CocoDataset, accelerator: Accelerator, config: RunConfig) -> Metrics:
    """COCO metrics of a detector on a data set."""
    return evaluate(data, predict(detector, data, accelerator, config.eval_batch_size, config.workers))


def log_record(metrics: Metrics) -> dict[str, float | None]:
    """What the log keeps of an evaluation, in percent."""
    record = {"AP": metrics.ap, "AP50": metrics.ap50, "AP75": metrics.ap75}
    if metrics.mask is not None:
        record |= {"mask_AP": metrics.mask.ap, "mask_AP50": metrics.mask.ap50, "mask_AP75": metrics.mask.ap75}
    return record


def scaler_state(accelerator: Accelerator) -> dict[str, Any] | None:
    """State of the fp16 loss scaler, or None without one."""
    return accelerator.scaler.state_dict() if accelerator.scaler is not None else None


def load_scaler_state(accelerator: Accelerator, state: dict[str, Any] | None) -> None:
    """Take on what `scaler_state` gave."""
    if accelerator.scaler is not None and state is not None:
        accelerator.scaler.load_state_dict(state)
