"""What a search begins with: the detector, and which images are for what."""

from typing import Any

import torch
from accelerate import Accelerator
from timm.layers import freeze_batch_norm_2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...detection.data.dataset import CocoDataset
from ...detection.models.folder import from_pretrained, read_detector_config
from ...detection.runs.setup import create_run_detector, in_memory_format, open_run_split
from ...hub.client import resolve_folder
from ..config import SearchConfig
from ..space import SearchError


def open_search_split(config: SearchConfig, split: str, transforms: Any = None) -> CocoDataset:
    """A split of the config's data set, with masks if the detector that the search begins with learns them.

    Raises:
        NatsError: no such data or detector.
    """
    masks = None if config.detector is None else read_detector_config(resolve_folder(config.detector)).masks
    return open_run_split(config, split, transforms, masks)


def create_search_detector(config: SearchConfig, data: CocoDataset, accelerator: Accelerator) -> nn.Module:
    """A plain detector: the trained one that the config names, or a new one on pretrained weights.

    Its batch norms are frozen, unless the config's norm is `live`.

    Raises:
        NatsError: no such detector, or one that does not fit the data or the config.
    """
    norm = "live" if config.norm == "live" else "frozen"
    if config.detector is None:
        return create_run_detector(config, data, accelerator, norm=norm)
    with accelerator.main_process_first():
        detector = from_pretrained(config.detector)
    found = detector.config
    if found.genotype is not None:
        raise SearchError(f"detector: {config.detector}: expected a plain backbone, found {found.backbone}")
    if found.num_classes != len(data.classes) + 1:
        raise SearchError(
            f"detector: {config.detector}: has {found.num_classes - 1} classes, {data.annotations} {len(data.classes)}"
        )
    body = detector.backbone.body
    has_live = any(isinstance(module, _BatchNorm) for module in body.modules())
    if norm == "live" and not has_live:
        raise SearchError(f"norm: the batch norms of {config.detector} are frozen, expected calibrated or frozen")
    if norm == "frozen" and has_live:
        detector.backbone.body = freeze_batch_norm_2d(body)
    return in_memory_format(detector, config)


def split_for_search(data: CocoDataset, config: SearchConfig) -> list[CocoDataset]:
    """The images for the weights and, beside them, in a bilevel search those for alpha: two halves drawn by the seed.

    In sensitivity mode: the images for weights and scores, without those that are held back.

    Each keeps an epoch of its own, so that calibration on `data` sees the same mirrored images in every epoch, also
    after a resume.
    """
    order = seeded_order(len(data), config.seed)
    if config.mode == "sensitivity":
        if len(data) <= config.held_back_images:
            raise SearchError(
                f"{data.annotations}: held_back_images: expected fewer than its {len(data)} images,"
                f" found {config.held_back_images}"
            )
        return [data.select(sorted(order[config.held_back_images :]))]
    if config.level == "single":
        return [data.select(range(len(data)))]
    if len(data) < 2:
        raise SearchError(f"{data.annotations}: a bilevel search needs at least two images")
    half = len(data) // 2
    return [data.select(order[:half]), data.select(order[half:])]


def held_back(data: CocoDataset, config: SearchConfig) -> CocoDataset:
    """The images that a sensitivity search holds back, from a data set of the same images."""
    order = seeded_order(len(data), config.seed)
    return data.select(sorted(order[: config.held_back_images]))


def seeded_order(length: int, seed: int) -> list[int]:
    """All indices, in an order drawn by the seed."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()
