"""Backbones in model folders, in timm's own format: save and check.

`timm.create_model("hf-hub:org/name", pretrained=True)` rebuilds one after `import nats_zoo`.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import EvalResult
from timm.models._hub import save_config_for_hf
from torch import nn

from ..base.errors import NatsError, one_line, short
from ..folders.limits import on_meta
from ..folders.model_folder import CARD_NAME, CHART_NAME, read_config, save_chart, write_folder_atomically
from ..folders.weights_file import CONFIG_NAME, WEIGHTS_NAME, check_fingerprint, check_shapes, save_weights
from ..genotype.genotype import Genotype
from ..hub.client import resolve_folder
from ..models.nats_any import NAME as NATS_ANY
from ..networks.transform import VARIANT_PREFIX
from ..version import __version__
from .card import (
    CARD_CITATION,
    CARD_REPO,
    BaseWeights,
    RunFacts,
    card_metadata,
    card_table,
    eval_results,
    genotype_origin,
    genotype_section,
    join_card,
    license_section,
    provenance_tables,
    run_sections,
)


def from_pretrained(
    source: str | os.PathLike,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Load a backbone with its weights.

    Args:
        source: a folder that `save_backbone` wrote, or the id of a Hub repository (`org/name`).
        revision: branch, tag or commit of the repository.
        cache_dir: where downloads are kept; default: the Hub client's cache.
        **kwargs: go to `timm.create_model`, such as `num_classes` or `features_only`.

    Raises:
        NatsError: no such folder or repository, weights of another genotype, or weights that do not fit the config.
    """
    folder = resolve_folder(source, revision, cache_dir=cache_dir)
    check_backbone(folder)
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs)


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
        check_backbone(new)
        save_chart(genotype, new / CHART_NAME)
        card = _backbone_card(model, genotype, metrics or {}, base_model, evaluated_on, run)
        (new / CARD_NAME).write_text(card, encoding="utf-8")

    return write_folder_atomically(folder, write)


def check_backbone(folder: str | os.PathLike) -> None:
    """Check that a folder rebuilds a backbone: its genotype is the weights', and its tensors fit the network.

    Reads the weights' header only.

    Raises:
        NatsError: naming the file, and the key, fingerprints or tensor.
    """
    folder = Path(folder)
    config = read_config(folder)
    check_fingerprint(folder / WEIGHTS_NAME, _config_genotype(config, folder / CONFIG_NAME))
    weights = folder / WEIGHTS_NAME
    with on_meta(str(folder / CONFIG_NAME)):
        model = timm.create_model(f"local-dir:{folder}")
    check_shapes(weights, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})


def _config_genotype(config: Mapping, path: Path) -> Genotype:
    architecture, args = config.get("architecture"), config.get("model_args")
    genotype = args.get("genotype") if isinstance(args, Mapping) else None
    if not isinstance(genotype, Mapping):
        raise NatsError(f"{path}: model_args: expected a backbone's genotype as an object, found {short(genotype)}")
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise NatsError(f"{path}: architecture {short(architecture)} is unknown to nats-zoo {__version__} and timm")
    if not architecture.startswith(VARIANT_PREFIX):
        raise NatsError(f"{path}: architecture {architecture!r} runs no genotype, expected a {VARIANT_PREFIX}* one")
    return Genotype.from_dict(genotype, source=f"{path}: model_args: genotype")


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
