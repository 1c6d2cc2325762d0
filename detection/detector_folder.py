"""Detectors in folders and on the Hub: config.json, model.safetensors, a model card. Nothing is pickled."""

import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from torch import nn

from ..errors import NatsError
from ..files import write_json
from ..genotype import Genotype
from ..hub_client import resolve_folder
from ..model_card import CARD_CITATION, CARD_REPO, card_table, genotype_origin, provenance_tables
from ..model_folder import CARD_NAME, CHART_NAME, read_config, save_chart, write_folder_atomically
from ..version import __version__
from ..weights_file import CONFIG_NAME, WEIGHTS_NAME, check_fingerprint, check_shapes, load_weights, save_weights
from .coco_eval import Metrics
from .detector_config import FRAMEWORKS, DetectorConfig
from .detectors import build_detector

LIBRARY_KEY = "nats_zoo_version"


def save_detector(
    detector: nn.Module, folder: str | os.PathLike, metrics: Metrics | None = None, evaluated_on: str | None = None
) -> Path:
    """Write a detector as a model folder, whole or not at all.

    Args:
        detector: what `create_detector` or `from_pretrained` returned.
        folder: is created; a model folder that is already there is replaced.
        metrics: for the model card.
        evaluated_on: data set and split of the metrics.

    Returns:
        The folder.

    Raises:
        NatsError: not such a detector, or another folder in the way.
    """
    config = getattr(detector, "config", None)
    if not isinstance(config, DetectorConfig):
        raise NatsError(f"{type(detector).__name__} is not saved: expected a detector made by create_detector")
    genotype = _genotype(config, "config")

    def write(new: Path) -> None:
        write_json(new / CONFIG_NAME, {LIBRARY_KEY: __version__, **config.to_dict()})
        save_weights(detector.state_dict(), new / WEIGHTS_NAME, genotype)
        if genotype is not None:
            save_chart(genotype, new / CHART_NAME)
        card = _detector_card(config, genotype, metrics, evaluated_on)
        (new / CARD_NAME).write_text(card, encoding="utf-8")

    return write_folder_atomically(folder, write)


def from_pretrained(
    source: str | os.PathLike, revision: str | None = None, cache_dir: str | os.PathLike | None = None
) -> nn.Module:
    """Load a detector with its weights, in evaluation mode.

    Args:
        source: a folder that `save_detector` wrote, or the id of a Hub repository (`org/name`).
        revision: branch, tag or commit of the repository.
        cache_dir: where downloads are kept; default: the Hub client's cache.

    Returns:
        A torchvision detector; its `config` names the classes.

    Raises:
        NatsError: no such folder or repository, a config that is none, weights of another genotype, or a tensor of
            another shape.
    """
    folder = resolve_folder(source, revision, cache_dir=cache_dir)
    config = read_detector_config(folder)
    weights = folder / WEIGHTS_NAME
    check_fingerprint(weights, _genotype(config, str(folder / CONFIG_NAME)))
    with torch.device("meta"):
        expected = build_detector(config).state_dict()
    check_shapes(weights, {name: tuple(tensor.shape) for name, tensor in expected.items()})
    detector = build_detector(config)
    detector.load_state_dict(load_weights(weights))
    return detector.eval()


def read_detector_config(folder: str | os.PathLike) -> DetectorConfig:
    """The config of a detector folder; NatsError names the file and the key."""
    data = read_config(folder)
    path = Path(folder) / CONFIG_NAME
    if "framework" not in data:
        raise NatsError(f"{path}: key 'framework' is missing, expected a detector's config")
    data.pop(LIBRARY_KEY, None)
    config = DetectorConfig.from_dict(data, source=str(path))
    _genotype(config, str(path))
    return config


def _genotype(config: DetectorConfig, source: str) -> Genotype | None:
    return None if config.genotype is None else Genotype.from_dict(config.genotype, source=f"{source}: genotype")


def _detector_card(
    config: DetectorConfig, genotype: Genotype | None, metrics: Metrics | None, evaluated_on: str | None
) -> str:
    tasks = ["instance-segmentation"] if config.masks else []
    header = ModelCardData(
        library_name="nats-zoo",
        license="other",
        tags=["nats-zoo", "timm", "torchvision", config.framework, *tasks],
        pipeline_tag="object-detection",
    )
    sections = [
        f"---\n{header.to_yaml()}\n---",
        _CARD_BODY.format(
            framework=FRAMEWORKS[config.framework].title,
            backbone=config.backbone,
            found="boxes (XYXY, pixels), labels, scores" + (", masks (N, 1, H, W) in 0..1" if config.masks else ""),
            repo=CARD_REPO,
            classes=", ".join(config.classes) or f"{config.num_classes - 1} without names",
            min_size=config.min_size,
            max_size=config.max_size,
        ),
        _genotype_section(genotype),
        card_table(f"Metrics on {evaluated_on} (COCO, percent)", _flat(metrics)),
        provenance_tables(genotype) if genotype else "",
        CARD_CITATION,
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _genotype_section(genotype: Genotype | None) -> str:
    if genotype is None:
        return "## Genotype\n\nNone: this is the plain network."
    chart = f"![Dilations of each convolution]({CHART_NAME})"
    return f"## Genotype\n\n{genotype_origin(genotype)}\n\n{chart}\n\n```\n{genotype}\n```"


def _flat(metrics: Metrics | None) -> dict[str, str]:
    if metrics is None:
        return {}
    values = metrics.to_dict()
    of_masks = values.pop("mask", None)
    return _flat_one(values) | {f"mask {key}": value for key, value in _flat_one(of_masks or {}).items()}


def _flat_one(values: dict[str, Any]) -> dict[str, str]:
    """The figures of boxes, or of masks, those of the classes last."""
    figures = {key: value for key, value in values.items() if key not in ("per_class", "mask")}
    figures |= {f"ap of {name}": row["ap"] for name, row in values.get("per_class", {}).items()}
    return {key: "-" if value is None else f"{value:.1f}" for key, value in figures.items()}


_CARD_BODY = """\
# {framework} on {backbone}

A torchvision detector on a timm backbone, trained with nats-zoo.

- classes: {classes}
- finds {found}
- images are resized to a short side of {min_size} pixels, the long one at most {max_size}

## Use

```python
import nats_zoo  # first: it registers the backbone with timm

detector = nats_zoo.detection.from_pretrained("{repo}")
predictions = detector([image])  # image: (3, H, W) float tensor, RGB in 0..1
```

```bash
nats predict {repo} image.jpg
```
"""
