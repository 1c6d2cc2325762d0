"""Backbones in model folders, in timm's own format: save and check.

`timm.create_model("hf-hub:org/name", pretrained=True)` rebuilds one after `import nats_zoo`.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from timm.models._hub import save_config_for_hf
from torch import nn

from ..base.errors import NatsError, one_line
from ..base.names import CARD_NAME, CHART_NAME, CONFIG_NAME, NATS_ANY, WEIGHTS_NAME
from ..base.run_facts import BaseWeights, RunFacts
from ..base.text import card_table
from ..folders.model_folder import ModelFolder, write_folder_atomically
from ..folders.weights_file import save_weights
from ..genotype.genotype import Genotype
from ..genotype.provenance import genotype_origin
from ..models.saved import check_backbone
from ..pictures import save_chart
from .card import (
    CARD_CITATION,
    CARD_REPO,
    card_metadata,
    eval_results,
    genotype_section,
    join_card,
    license_section,
    provenance_tables,
    run_sections,
)


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
        card = _backbone_card(model, genotype, metrics or {}, base_model, evaluated_on, run)
        (new / CARD_NAME).write_text(card, encoding="utf-8")

    return write_folder_atomically(folder, write)


def _save_config(model: nn.Module, path: Path) -> None:
    try:
        save_config_for_hf(model, str(path))
    except ValueError as error:
        raise NatsError(f"{type(model).__name__} can not be described in {CONFIG_NAME}: {one_line(error)}") from error


def _backbone_card(
    model: nn.Module,
    genotype: Genotype,
    metrics: Mapping[str, Any],
    base_model: str | None,
    evaluated_on: str | None,
    run: RunFacts | None,
) -> str:
    cfg = model.pretrained_cfg
    base = BaseWeights(name=_base_name(cfg), hub_id=base_model, license=cfg.get("license"))
    header = card_metadata(
        "backbone",
        cfg["architecture"] if cfg["architecture"] != NATS_ANY else genotype.architecture,
        (run and run.base) or base,
        library_name="timm",
        tags=["timm", "object-detection-backbone", "dilated-convolution"],
        pipeline_tag="image-feature-extraction",
        eval_results=_results(metrics, evaluated_on, run),
    )
    on = f" on {evaluated_on}" if evaluated_on else ""
    sections = [
        _CARD_BODY.format(
            title=cfg["architecture"] if cfg["architecture"] != NATS_ANY else f"{genotype.architecture}, regrouped",
            plain=genotype.architecture,
            origin=genotype_origin(genotype),
            repo=CARD_REPO,
        ),
        genotype_section(genotype, CHART_NAME),
        card_table(f"Metrics{on}", metrics),
        provenance_tables(genotype),
        run_sections(run),
        license_section((run and run.base) or base),
        CARD_CITATION,
    ]
    return join_card(header, sections)


def _base_name(cfg: Mapping[str, Any]) -> str:
    """The weights of a network's tag; timm does not record whether they were loaded."""
    tag = f".{cfg['tag']}" if cfg.get("tag") else ""
    return f"timm's {cfg['architecture']}{tag}, if it began with them"


def _results(metrics: Mapping[str, Any], evaluated_on: str | None, run: RunFacts | None) -> list[EvalResult] | None:
    if evaluated_on is None:
        return None
    figures = {key: (key, float(value)) for key, value in metrics.items() if type(value) in (int, float)}
    return eval_results("image-feature-extraction", figures, evaluated_on, run) or None


_CARD_BODY = """\
# {title}

A backbone for object detection: timm's `{plain}` with some output channels of its convolutions at other dilations.
Same parameters, same multiply-adds and same state dict as `{plain}`. {origin}

## Use

```python
import nats_zoo  # first: it registers the architecture with timm
import timm

model = timm.create_model("hf-hub:{repo}", pretrained=True)
backbone = timm.create_model("hf-hub:{repo}", pretrained=True, features_only=True, out_indices=(1, 2, 3, 4))
```

`nats_zoo.from_pretrained("{repo}", revision=...)` also pins a revision and checks that the weights belong to
the genotype.

## Intended use and limits

- It is made to be fine-tuned in a detector (`nats train`), or in another dense task.
- The logits of a regrouped classifier are not ImageNet-accurate before fine-tuning, because the dilations differ from
  those that the weights were first trained with.
- Whether a genotype helps depends on the data: compare with the plain network, trained equally."""
