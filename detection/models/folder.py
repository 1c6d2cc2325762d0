"""Detectors in folders and on the Hub: config.json, model.safetensors, a model card. Nothing is pickled."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from torch import nn

from ...base.errors import NatsError, short
from ...base.files import write_json, write_text
from ...base.names import CARD_NAME, CHART_NAME, CONFIG_NAME, WEIGHTS_NAME
from ...base.run_facts import RunFacts
from ...folders.limits import bounded, on_meta
from ...folders.model_folder import DETECTOR, ModelFolder, write_folder_atomically
from ...folders.weights_file import save_weights
from ...genotype.genotype import Genotype
from ...hub.client import resolve_folder
from ...pictures import save_chart
from ...publishing.card import NOT_STATED, Licences, card_metadata, eval_results, render_card
from ...version import __version__
from ..metrics import Metrics, in_percent
from .config import FRAMEWORKS, DetectorConfig
from .create import build_detector

LIBRARY_KEY = "nats_zoo_version"
FORMAT_KEY = "format"
FORMAT = 1  # of config.json; a change that older versions would misread raises it
MAX_BESIDE = 2**26  # numbers that building takes beside those of the weights: a classifier that is thrown away


def save_detector(
    detector: nn.Module,
    folder: str | os.PathLike,
    metrics: Metrics | None = None,
    evaluated_on: str | None = None,
    run: RunFacts | None = None,
) -> Path:
    """Write a detector as a model folder, whole or not at all.

    Args:
        detector: what `create_detector` or `from_pretrained` returned.
        folder: is created; a model folder that is already there is replaced.
        metrics: for the model card.
        evaluated_on: data set and split of the metrics.
        run: what made it, for the model card.

    Returns:
        The folder.

    Raises:
        NatsError: not such a detector, or another folder in the way.

    Example:
        >>> detector = create_detector("fcos", "resnet18", num_classes=3, classes=("cat", "dog"))
        >>> save_detector(detector, "runs/fcos")
        PosixPath('runs/fcos')
    """
    config = getattr(detector, "config", None)
    if not isinstance(config, DetectorConfig):
        raise NatsError(f"{type(detector).__name__} is not saved: expected a detector made by create_detector")
    genotype = None if config.genotype is None else Genotype.from_dict(config.genotype, source="config: genotype")

    def write(new: Path) -> None:
        write_json(new / CONFIG_NAME, {FORMAT_KEY: FORMAT, LIBRARY_KEY: __version__, **config.to_dict()})
        save_weights(detector.state_dict(), new / WEIGHTS_NAME, genotype)
        if genotype is not None:
            save_chart(genotype, new / CHART_NAME)
        card = _detector_card(config, genotype, metrics, evaluated_on or "an unnamed data set", run)
        write_text(new / CARD_NAME, card)

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

    Example:
        >>> detector = from_pretrained("org/fasterrcnn-nats-resnet50", revision="v1")
        >>> detector([torch.rand(3, 480, 640)])[0].keys()
        dict_keys(['boxes', 'labels', 'scores'])
    """
    folder = ModelFolder.open(resolve_folder(source, revision, cache_dir=cache_dir))
    config = read_detector_config(folder)
    folder.check()
    path = str(folder.config_path)
    try:
        with bounded(path, folder.weights.elements + MAX_BESIDE):
            detector = build_detector(config)
    except NatsError:
        with on_meta(path):  # takes no memory, and tells which tensor is another than the weights'
            folder.weights.check_shapes(build_detector(config).state_dict())
        raise
    folder.weights.check_shapes(detector.state_dict())
    detector.load_state_dict(folder.load())
    return detector.eval()


def read_detector_config(folder: str | os.PathLike | ModelFolder) -> DetectorConfig:
    """Read the config of a detector's folder; NatsError names the file and the key.

    Example:
        >>> read_detector_config("runs/nats/best").classes
        ('cat', 'dog')
    """
    folder = ModelFolder.open(folder)
    if folder.kind != DETECTOR:
        raise NatsError(f"{folder.config_path}: key 'framework' is missing, expected a detector's config")
    data = {key: value for key, value in folder.config.items() if key not in (FORMAT_KEY, LIBRARY_KEY)}
    _check_format(folder.config.get(FORMAT_KEY, FORMAT), folder.config_path)
    config = DetectorConfig.from_dict(data, source=str(folder.config_path))
    _ = folder.genotype  # raises what is wrong with it
    return config


def _check_format(found: Any, path: Path) -> None:
    if type(found) is not int or found < 1:
        raise NatsError(f"{path}: {FORMAT_KEY}: expected a number from 1 to {FORMAT}, found {short(found)}")
    if found > FORMAT:
        raise NatsError(
            f"{path}: is of a newer format ({short(found)}), this nats-zoo {__version__} reads up to {FORMAT}:"
            " upgrade nats-zoo"
        )


def _detector_card(
    config: DetectorConfig, genotype: Genotype | None, metrics: Metrics | None, evaluated_on: str, run: RunFacts | None
) -> str:
    base = run.base if run else None
    licences = Licences.of_base(base, "none: it began with random ones" if run else NOT_STATED)
    metadata = card_metadata(
        "detector",
        config.framework,
        licences,
        base,
        library_name="nats-zoo",
        tags=["timm", "torchvision", config.framework, *(["instance-segmentation"] if config.masks else [])],
        pipeline_tag="image-segmentation" if config.masks else "object-detection",
        eval_results=_results(metrics, evaluated_on, run),
    )
    metadata["nats_zoo"]["backbone"] = config.backbone
    boxes = metrics.to_dict() if metrics else {}
    masks = boxes.get("mask") or {}
    return render_card(
        "detector",
        metadata,
        genotype,
        licences,
        config=config,
        framework=FRAMEWORKS[config.framework].title,
        classes=" ".join(", ".join(config.classes).split()) or f"{config.num_classes - 1} without names",
        metrics=_overall(boxes) | {f"mask {key}": value for key, value in _overall(masks).items()},
        evaluated_on=f"{evaluated_on} (COCO, percent)",
        class_rows=_class_rows(boxes, masks),
        run=run,
    )


def _results(metrics: Metrics | None, evaluated_on: str, run: RunFacts | None) -> list[EvalResult] | None:
    """AP as the Hub's model-index states it."""
    if metrics is None:
        return None
    found = eval_results("object-detection", _figures(metrics, "box"), evaluated_on, run)
    if metrics.mask is not None:
        found += eval_results("image-segmentation", _figures(metrics.mask, "mask"), evaluated_on, run)
    return found or None


def _figures(metrics: Metrics, of: str) -> dict[str, tuple[str, float | None]]:
    return {
        f"{of} AP": ("mAP", metrics.ap),
        f"{of} AP50": ("mAP@0.5", metrics.ap50),
        f"{of} AP75": ("mAP@0.75", metrics.ap75),
    }


def _overall(values: dict[str, Any]) -> dict[str, str]:
    return {key: in_percent(value) for key, value in values.items() if key not in ("per_class", "mask")}


def _class_rows(boxes: dict[str, Any], masks: dict[str, Any]) -> list[list[str]]:
    """AP of each class, of boxes and perhaps of masks, below the columns' heads; empty without classes."""
    kinds = {"": boxes.get("per_class"), "mask ": masks.get("per_class")}
    tables = {kind: rows for kind, rows in kinds.items() if rows}
    columns = [(rows, key) for rows in tables.values() for key in ("ap", "ap50")]
    names = dict.fromkeys(name for rows in tables.values() for name in rows)
    lines = [[name, *(in_percent(rows.get(name, {}).get(key)) for rows, key in columns)] for name in names]
    return [["class", *(f"{kind}{name}" for kind in tables for name in ("AP", "AP50"))], *lines] if lines else []
