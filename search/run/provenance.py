"""Where a searched genotype comes from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...detection.metrics import Metrics
from ...genotype.genotype import Genotype
from ...version import __version__
from ..space import SPACES
from ..supernet.build import entropy, is_tied

if TYPE_CHECKING:
    from .searcher import Searcher


def describe_search(searcher: Searcher, genotype: Genotype, metrics: Metrics | None) -> dict[str, Any]:
    """Provenance of the genotype that a search found.

    Args:
        searcher: the search, at its end.
        genotype: what it found.
        metrics: of the decoded network on the validation split, if it was evaluated.
    """
    config = searcher.config
    return {
        "method": config.mode,
        **_space(searcher),
        **_schedule(searcher),
        "seed": config.seed,
        "version": __version__,
        "command": searcher.command,
        "metrics": _metrics(searcher, genotype, metrics),
        "note": config.note,
    }


def _space(searcher: Searcher) -> dict[str, Any]:
    config = searcher.config
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


def _schedule(searcher: Searcher) -> dict[str, Any]:
    config, detector = searcher.config, searcher.plain_detector.config
    name = f"{detector.framework}, short side {detector.min_size}, fpn {detector.fpn_channels}"
    dataset = f"{Path(config.data).name} {config.train_split}, {len(searcher.data)} images"
    return {
        **({} if searcher.trials else {"level": config.level}),
        "dataset": dataset + (", transposed" if config.transpose else ""),
        "weights": _weights(searcher),
        "detector": name if config.detector is None else f"{name}, trained: {Path(config.detector).name}",
        "epochs": config.epochs,
        **(searcher.trials.describe() if searcher.trials else {"alpha_start": config.alpha_start}),
        "images_per_step": searcher.images_per_step,
    }


def _weights(searcher: Searcher) -> str | None:
    config = searcher.config
    if config.detector is not None:
        return Path(config.detector).name
    if config.weights == "pretrained":
        return searcher.body.pretrained_cfg.get("tag")
    return None if config.weights is None else Path(config.weights).name


def _metrics(searcher: Searcher, genotype: Genotype, metrics: Metrics | None) -> dict[str, Any]:
    found: dict[str, Any] = {"share_changed": round(genotype.share_changed(), 4)}
    if searcher.trials is None:
        found = {"entropy": round(entropy(searcher.searched.values()), 4), **found}
    if metrics is not None:
        found[f"AP on {searcher.config.val_split} before retraining"] = metrics.ap
    return found
