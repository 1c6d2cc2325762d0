"""Where a searched genotype comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...detection.metrics import Metrics
from ...detection.models.config import DetectorConfig
from ...genotype.genotype import Genotype
from ...version import __version__
from ..config import SearchConfig
from ..space import SPACES
from ..supernet.build import is_tied


@dataclass(frozen=True, kw_only=True)
class SearchFacts:
    """What a search knows of itself at its end.

    Attributes:
        config: its options.
        command: how it was started.
        detector: of what the backbone was searched.
        tag: of the weights, where they are timm's.
        images: in the split that was searched on.
        images_per_step: over all processes.
        entropy: of alpha, relative to uniform; None in sensitivity mode.
        trials: what `Trials.describe` says; empty in the modes with an alpha.
    """

    config: SearchConfig
    command: str
    detector: DetectorConfig
    tag: str | None
    images: int
    images_per_step: int
    entropy: float | None
    trials: Mapping[str, Any]


def describe_search(facts: SearchFacts, genotype: Genotype, metrics: Metrics | None) -> dict[str, Any]:
    """Provenance of the genotype that a search found, as plain data.

    Args:
        facts: of the search, at its end.
        genotype: what it found.
        metrics: of the decoded network on the validation split, if it was evaluated.

    Example:
        >>> provenance = describe_search(facts, genotype, metrics=None)
        >>> replace(genotype, provenance=provenance).save("genotype.json")
    """
    config = facts.config
    return {
        "method": config.mode,
        **_space(config),
        **_schedule(facts),
        "seed": config.seed,
        "version": __version__,
        "command": facts.command,
        "metrics": _metrics(facts, genotype, metrics),
        "note": config.note,
    }


def _space(config: SearchConfig) -> dict[str, Any]:
    size = {"groups": config.groups} if config.groups else {"channels_per_group": config.channels_per_group}
    limits = {"max_dilations": config.max_dilations, "costs": config.costs and Path(config.costs).name}
    weights = {"cost_weight": config.cost_weight, "cost_loss": config.cost_loss}
    return {
        "space": config.space if config.space in SPACES else Path(config.space).name,
        **size,
        "kernels": "tied" if is_tied(config.mode, config.kernels) else "untied",
        "norm": config.norm,
        **{key: value for key, value in {**limits, **weights}.items() if value},
    }


def _schedule(facts: SearchFacts) -> dict[str, Any]:
    config, detector = facts.config, facts.detector
    name = f"{detector.framework}, short side {detector.min_size}, fpn {detector.fpn_channels}"
    dataset = f"{Path(config.data).name} {config.train_split}, {facts.images} images"
    if config.detector is None and config.weights == "pretrained":
        weights = facts.tag
    else:
        weights = config.detector or config.weights
        weights = weights and Path(weights).name
    return {
        **({} if facts.trials else {"level": config.level}),
        "dataset": dataset + (", transposed" if config.transpose else ""),
        "weights": weights,
        "detector": name if config.detector is None else f"{name}, trained: {Path(config.detector).name}",
        "epochs": config.epochs,
        **(facts.trials or {"alpha_start": config.alpha_start}),
        "images_per_step": facts.images_per_step,
    }


def _metrics(facts: SearchFacts, genotype: Genotype, metrics: Metrics | None) -> dict[str, Any]:
    found: dict[str, Any] = {} if facts.entropy is None else {"entropy": round(facts.entropy, 4)}
    found["share_changed"] = round(genotype.share_changed(), 4)
    if metrics is not None:
        found[f"AP on {facts.config.val_split} before retraining"] = metrics.ap
    return found
