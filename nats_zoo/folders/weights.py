"""Weights of a plain architecture, from wherever users name them: what timm is told so that it loads them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from ..base.errors import NatsError
from ..base.names import WEIGHTS_NAME
from ..hub.client import resolve_folder
from .model_folder import DETECTOR, ModelFolder
from .weights_file import load_weights

TIMM = "timm/"  # the organisation on the Hub, whose repositories all have safetensors


def fetch_pretrained(name: str) -> None:
    """Put timm's weights of a network into the Hub's cache, where timm then finds them.

    Unlike timm's own download this one compares the checksum, and gives up at once when the Hub can not be reached.
    Weights that are elsewhere than in timm's own repositories are left to timm.

    Args:
        name: timm's name, with a tag if wanted (`resnet50.tv_in1k`).

    Raises:
        NatsError: they can not be had.

    Example:
        >>> fetch_pretrained("resnet50.tv_in1k")
        >>> model = timm.create_model("resnet50.tv_in1k", pretrained=True)  # from the cache
    """
    try:
        cfg = timm.get_pretrained_cfg(name)
    except RuntimeError:  # no such tag, which timm then says
        return
    repo = "" if cfg is None or cfg.hf_hub_filename else cfg.hf_hub_id or ""
    if not repo.startswith(TIMM):
        return
    try:
        resolve_folder(repo, files=[WEIGHTS_NAME])
    except NatsError as error:
        raise NatsError(f"weights: {error}") from error


def weights_overlay(
    architecture: str, weights: str, arguments: Mapping[str, Any] | None = None, headless: bool = True
) -> dict[str, Any]:
    """Make timm's `pretrained_cfg_overlay` for these weights, with their own normalisation and classes.

    Args:
        architecture: timm's name of the plain network.
        weights: the folder, safetensors file or Hub repository of a timm model of the same (plain) architecture, or of
            a detector on it, whose backbone is taken.
        arguments: of the network's constructor, which change its shapes.
        headless: whether the classifier's weights may be absent.

    Raises:
        NatsError: weights that can not be read, or of another network.

    Example:
        >>> overlay = weights_overlay("resnet18", "runs/nats/best")
        >>> body = timm.create_model("resnet18", pretrained=True, pretrained_cfg_overlay=overlay, features_only=True)
    """
    path = Path(weights) if weights.endswith(".safetensors") else resolve_folder(weights)
    if path.is_dir():
        folder = ModelFolder.open(path)
        tensors, cfg = folder.load_backbone(), _pretrained_cfg(folder)
    else:
        tensors, cfg = load_weights(path), {}
    head = {"num_classes": 0} if headless else {key: cfg[key] for key in ("num_classes",) if key in cfg}
    _check_weights(architecture, {**(arguments or {}), **head}, tensors, weights)
    return {**cfg, "state_dict": tensors, "file": None, "hf_hub_id": None, "url": ""}


def _pretrained_cfg(folder: ModelFolder) -> dict[str, Any]:
    """Read what a folder says of its weights, as timm's pretrained cfg."""
    config = folder.config
    if folder.kind == DETECTOR:
        return {"mean": config.get("image_mean"), "std": config.get("image_std")}
    cfg = config.get("pretrained_cfg")
    if not isinstance(cfg, dict):
        raise NatsError(f"{folder.config_path}: expected a timm config with the key 'pretrained_cfg'")
    kept = {key: cfg[key] for key in ("mean", "std", "num_classes", "classifier", "input_size") if key in cfg}
    return kept | {key: config[key] for key in ("num_classes",) if key in config}


def _check_weights(architecture: str, arguments: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> None:
    """Check names and shapes, as timm loads a headless network leniently: another network's must not pass for its."""
    with torch.device("meta"):
        expected = timm.create_model(architecture, **arguments).state_dict()
    for key, tensor in expected.items():
        found = tuple(tensors[key].shape) if key in tensors else "missing"
        if found != tuple(tensor.shape) and not (found == "missing" and key.endswith("num_batches_tracked")):
            raise NatsError(f"{source}: weights of another network: {key} is {found}, expected {tuple(tensor.shape)}")
