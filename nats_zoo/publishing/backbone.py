"""Backbones in model folders, in timm's own format: save and check.

`timm.create_model("hf-hub:org/name", pretrained=True)` rebuilds one after `import nats_zoo`.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.models._hub import save_config_for_hf
from torch import nn

from ..base.errors import NatsError, one_line
from ..base.files import write_text
from ..base.names import CARD_NAME, CHART_NAME, CONFIG_NAME, NATS_ANY, WEIGHTS_NAME
from ..base.run_facts import BaseWeights, RunFacts
from ..folders.model_folder import ModelFolder, write_folder_atomically
from ..folders.weights_file import save_weights
from ..genotype.genotype import Genotype
from ..models.saved import check_backbone
from ..pictures import save_chart
from .card import NOT_STATED, Licences, card_metadata, eval_results, render_card


def save_backbone(
    model: nn.Module,
    folder: str | os.PathLike,
    metrics: Mapping[str, Any] | None = None,
    base_model: str | None = None,
    evaluated_on: str | None = None,
    run: RunFacts | None = None,
) -> Path:
    """Write a backbone as a model folder, whole or not at all.

    Args:
        model: a `nats_*` model as `timm.create_model` returned it, without `features_only`.
        folder: is created; a model folder that is already there is replaced.
        metrics: figures for the model card.
        base_model: Hub id of the weights it was fine-tuned from, for the model card.
        evaluated_on: data set and split of the metrics. With it they are stated for the Hub's search too.
        run: what made it, for the model card.

    Returns:
        The folder.

    Raises:
        NatsError: not such a model, one that its config would not rebuild, or another folder in the way.

    Example:
        >>> model = timm.create_model("nats_resnet50.tv_in1k", pretrained=True)
        >>> save_backbone(model, "runs/backbone", metrics={"AP": 37.4}, evaluated_on="COCO val2017")
    """
    genotype = getattr(model, "genotype", None)
    if not isinstance(genotype, Genotype) or not hasattr(model, "num_classes"):  # features_only has no classifier
        raise NatsError(
            f"{type(model).__name__} is not saved as a backbone: expected a nats_* model of timm, without features_only"
        )

    def write(new: Path) -> None:
        _save_config(model, new / CONFIG_NAME)
        save_weights(model.state_dict(), new / WEIGHTS_NAME, genotype)
        check_backbone(ModelFolder.open(new))
        save_chart(genotype, new / CHART_NAME)
        facts: dict[str, Any] = {"metrics": metrics or {}, "base_model": base_model, "evaluated_on": evaluated_on}
        write_text(new / CARD_NAME, _backbone_card(model, genotype, run=run, **facts))

    return write_folder_atomically(folder, write)


def _save_config(model: nn.Module, path: Path) -> None:
    try:
        save_config_for_hf(model, str(path))
    except ValueError as error:
        raise NatsError(f"{type(model).__name__} can not be described in {CONFIG_NAME}: {one_line(error)}") from error


def _backbone_card(
    model: nn.Module,
    genotype: Genotype,
    *,
    metrics: Mapping[str, Any],
    base_model: str | None,
    evaluated_on: str | None,
    run: RunFacts | None,
) -> str:
    cfg = model.pretrained_cfg
    is_any = cfg["architecture"] == NATS_ANY
    tag = f".{cfg['tag']}" if cfg.get("tag") else ""
    base = None if run is None else run.base
    if base is None:  # timm does not record whether the weights of a network's tag were loaded
        name = f"timm's {cfg['architecture']}{tag}, if it began with them"
        base = BaseWeights(name=name, hub_id=base_model, license=cfg.get("license"))
    results = None
    if evaluated_on is not None:
        figures = {key: (key, float(value)) for key, value in metrics.items() if type(value) in (int, float)}
        results = eval_results("image-feature-extraction", figures, evaluated_on, run) or None
    licences = Licences.of_base(base, NOT_STATED)
    metadata = card_metadata(
        "backbone",
        genotype.architecture if is_any else cfg["architecture"],
        licences,
        base,
        library_name="timm",
        tags=["timm", "object-detection-backbone", "dilated-convolution"],
        pipeline_tag="image-feature-extraction",
        eval_results=results,
    )
    return render_card(
        "backbone",
        metadata,
        genotype,
        licences,
        title=f"{genotype.architecture}, regrouped" if is_any else cfg["architecture"],
        plain=genotype.architecture,
        metrics=metrics,
        evaluated_on=evaluated_on,
        run=run,
    )
