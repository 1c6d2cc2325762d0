"""What the model card says about a run of training or search."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from ...base.errors import NatsError
from ...hub.client import split_revision
from ...publishing.card import BaseWeights, RunFacts
from ..data.dataset import CocoDataset
from .config import RunConfig
from .data import data_line, describe_data
from .hardware import describe_hardware


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
