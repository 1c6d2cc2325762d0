"""What every run sets up: accelerator, folder, data, detector, calibration."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.layers import convert_sync_batchnorm
from torch import nn

from ...base.errors import NatsError, one_line
from ..data import opening as formats
from ..data.dataset import CocoDataset, collate
from ..models.create import create_detector
from ..models.options import DETECTOR_OPTIONS
from .config import Precision, RunConfig
from .folder import RunFolder
from .processes import process_group

CALIBRATION_BATCH = 8


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


def open_run_split(config: RunConfig, split: str, transforms: Any = None, masks: bool | None = None) -> CocoDataset:
    """A split of the config's data set; evaluation transforms, and masks if the framework needs them, unless told."""
    masks = config.wants_masks if masks is None else masks
    return formats.open_split(
        config.data,
        split,
        config.format,
        images=config.images,
        transforms=transforms,
        skip_bad=config.skip_bad,
        seed=config.seed,
        transpose=config.transpose,
        masks=masks,
    )


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
            num_classes=len(data.classes) + 1,
            weights=config.weights,
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


def scaler_state(accelerator: Accelerator) -> dict[str, Any] | None:
    """State of the fp16 loss scaler, or None without one."""
    return accelerator.scaler.state_dict() if accelerator.scaler is not None else None


def load_scaler_state(accelerator: Accelerator, state: dict[str, Any] | None) -> None:
    """Take on what `scaler_state` gave."""
    if accelerator.scaler is not None and state is not None:
        accelerator.scaler.load_state_dict(state)
