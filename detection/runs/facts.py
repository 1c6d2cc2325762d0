"""What the model card says about a run of training or search."""

import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from accelerate import Accelerator
from torch import nn

from ...base.errors import NatsError
from ...base.run_facts import BaseWeights, RunFacts
from ...hub.client import split_revision
from ...version import __version__
from ..data.dataset import CocoDataset
from ..data.defects import listed
from .config import RunConfig
from .folder import RunFolder

PRECISIONS = {"no": "float32", "bf16": "bfloat16 autocast", "fp16": "float16 autocast"}


def describe_run(
    config: RunConfig,
    settings: Mapping[str, Any],
    data: Mapping[str, CocoDataset],
    detector: nn.Module,
    accelerator: Accelerator,
    images_per_step: int,
    command: str | None = None,
) -> RunFacts:
    """The facts of a run that is going on.

    Args:
        config: its options.
        settings: the same, as its folder keeps them.
        data: the data set's splits, by name.
        detector: what it trains, made by `create_detector`.
        accelerator: its devices and precision.
        images_per_step: over all processes.
        command: as it was typed.
    """
    return RunFacts(
        command=command,
        settings=settings,
        dataset=Path(config.data).name,
        split=config.val_split,
        data={split: data_line(split, describe_data(found)).partition(": ")[2] for split, found in data.items()},
        hardware=describe_hardware(accelerator) | {"images per step": str(images_per_step)},
        base=base_weights(config, detector),
    )


def base_weights(config: RunConfig, detector: nn.Module) -> BaseWeights | None:
    """What the run began with; None: random weights."""
    source = getattr(config, "init", None) or config.weights  # of a search there is no init
    if source is None:
        return None
    if source == "pretrained":
        cfg = detector.backbone.body.pretrained_cfg
        hub_id = cfg.get("hf_hub_id") or None
        name = f"timm's {config.backbone}"
        return BaseWeights(name=name, hub_id=hub_id, license=cfg.get("license") or None)
    if Path(source).exists():
        return BaseWeights(name=Path(source).resolve().name)
    try:
        return BaseWeights(name=source, hub_id=split_revision(source)[0])
    except NatsError:  # a file or folder that is gone by now; the run's result is not to be lost for that
        return BaseWeights(name=Path(source).name)


def describe_hardware(accelerator: Accelerator) -> dict[str, str]:
    """Device, precision and processes of this run, and the versions of what computes."""
    device = accelerator.device
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device.type.upper()} ({platform.machine()}), {torch.get_num_threads()} threads"
    packages = {"torch": torch, "torchvision": torchvision, "timm": timm}
    return {
        "device": name,
        "processes": str(accelerator.num_processes),
        "precision": PRECISIONS.get(accelerator.mixed_precision, accelerator.mixed_precision),
        "nats-zoo": __version__,
        **{package: module.__version__ for package, module in packages.items()},
        "Python": platform.python_version(),
    }


def log_data(folder: RunFolder, accelerator: Accelerator, data: Mapping[str, CocoDataset]) -> None:
    """Print a line per split on stderr, and begin the log with the same numbers and the hardware, on the main process.

    Args:
        folder: of the run; one that is resumed has its record already.
        accelerator: knows the main process, devices and precision.
        data: by the split's name.
    """
    if not accelerator.is_main_process:
        return
    found = {split: describe_data(dataset) for split, dataset in data.items()}
    for split, description in found.items():
        print(data_line(split, description), file=sys.stderr)
    if not folder.has_log():
        folder.log({"step": 0, "epoch": 0.0, "data": found, "hardware": describe_hardware(accelerator)})


def describe_data(dataset: CocoDataset) -> dict[str, Any]:
    """Counts of a data set as plain data: what can be used, what was left out and why, and what was noticed."""
    content = dataset.content
    crowds = sum(int(image.iscrowd.sum()) for image in content.images)
    return {
        "images": len(content.images),
        "boxes": sum(len(image.boxes) for image in content.images) - crowds,
        "crowd regions": crowds,
        "masks": dataset.masks,
        "classes": list(content.classes),
        "left out": dict(content.skipped),
        "notes": dict(content.notes),
    }


def data_line(split: str, description: Mapping[str, Any]) -> str:
    """One line about a split."""
    crowds = f", {description['crowd regions']:,} crowd regions" if description["crowd regions"] else ""
    objects = f"{description['boxes']:,} boxes{' with masks' if description['masks'] else ''}"
    line = f"{split}: {description['images']:,} images, {objects}{crowds}, {len(description['classes'])} classes"
    if description["left out"]:
        line += f"; left out: {listed(description['left out'])}"
    if description["notes"]:
        line += "; " + ", ".join(f"{count:,} {what}" for what, count in description["notes"].items())
    return line
