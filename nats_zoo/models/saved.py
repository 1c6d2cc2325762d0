"""Backbones that `save_backbone` wrote, from a folder or the Hub."""

import os
from collections.abc import Mapping
from typing import Any

import timm
from torch import nn

from ..base.errors import NatsError, short
from ..base.names import VARIANT_PREFIX
from ..folders.limits import on_meta
from ..folders.model_folder import ModelFolder
from ..hub.client import resolve_folder
from ..version import __version__


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

    Example:
        >>> backbone = nats_zoo.from_pretrained("runs/backbone", features_only=True, out_indices=(1, 2, 3, 4))
        >>> [features.shape[1] for features in backbone(torch.rand(1, 3, 224, 224))]
        [256, 512, 1024, 2048]
    """
    folder = resolve_folder(source, revision, cache_dir=cache_dir)
    check_backbone(ModelFolder.open(folder))
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs)


def check_backbone(folder: ModelFolder) -> None:
    """Check that a folder rebuilds a backbone: its genotype is the weights', and its tensors fit the network.

    Reads the weights' header only.

    Raises:
        NatsError: naming the file, and the key, fingerprints or tensor.

    Example:
        >>> check_backbone(ModelFolder.open("runs/backbone"))
    """
    path, architecture = folder.config_path, folder.config.get("architecture")
    genotype = (folder.config.get("model_args") or {}).get("genotype")
    if not isinstance(genotype, Mapping):
        raise NatsError(f"{path}: model_args: expected a backbone's genotype as an object, found {short(genotype)}")
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise NatsError(f"{path}: architecture {short(architecture)} is unknown to nats-zoo {__version__} and timm")
    if not architecture.startswith(VARIANT_PREFIX):
        raise NatsError(f"{path}: architecture {architecture!r} runs no genotype, expected a {VARIANT_PREFIX}* one")
    folder.check()
    with on_meta(str(path)):
        model = timm.create_model(f"local-dir:{folder.path}")
    folder.weights.check_shapes(model.state_dict())
