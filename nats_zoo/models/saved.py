"""Backbones that `save_backbone` wrote, from a folder or the Hub."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from torch import nn

from ..base.errors import NatsError, short
from ..base.names import CONFIG_NAME, VARIANT_PREFIX, WEIGHTS_NAME
from ..folders.limits import on_meta
from ..folders.model_folder import read_config
from ..folders.weights_file import check_fingerprint, check_shapes
from ..genotype.genotype import Genotype
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
    """
    folder = resolve_folder(source, revision, cache_dir=cache_dir)
    check_backbone(folder)
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs)


def check_backbone(folder: str | os.PathLike) -> None:
    """Check that a folder rebuilds a backbone: its genotype is the weights', and its tensors fit the network.

    Reads the weights' header only.

    Raises:
        NatsError: naming the file, and the key, fingerprints or tensor.
    """
    folder = Path(folder)
    config = read_config(folder)
    check_fingerprint(folder / WEIGHTS_NAME, config_genotype(config, folder / CONFIG_NAME))
    weights = folder / WEIGHTS_NAME
    with on_meta(str(folder / CONFIG_NAME)):
        model = timm.create_model(f"local-dir:{folder}")
    check_shapes(weights, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})


def config_genotype(config: Mapping, path: Path) -> Genotype:
    architecture, args = config.get("architecture"), config.get("model_args")
    genotype = args.get("genotype") if isinstance(args, Mapping) else None
    if not isinstance(genotype, Mapping):
        raise NatsError(f"{path}: model_args: expected a backbone's genotype as an object, found {short(genotype)}")
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise NatsError(f"{path}: architecture {short(architecture)} is unknown to nats-zoo {__version__} and timm")
    if not architecture.startswith(VARIANT_PREFIX):
        raise NatsError(f"{path}: architecture {architecture!r} runs no genotype, expected a {VARIANT_PREFIX}* one")
    return Genotype.from_dict(genotype, source=f"{path}: model_args: genotype")
