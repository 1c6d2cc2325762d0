"""Genotypes in Hub repositories: of a genotype alone, or that of a backbone or detector. Weights are not downloaded."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..base.errors import NatsError
from ..genotype.genotype import HUB_PREFIX, Genotype
from ..hub.client import resolve_folder
from ..publishing.genotype import GENOTYPE_NAME, is_genotype_folder
from .model_folder import read_config
from .weights_file import CONFIG_NAME


def pull_genotype(source: str) -> Genotype:
    """The genotype of a Hub repository.

    Args:
        source: `org/name` or `org/name@revision`, with or without `hf-hub:` before it.

    Raises:
        NatsError: it can not be had, there is none in it, or it is malformed.
    """
    folder = resolve_folder(source, files=(GENOTYPE_NAME, CONFIG_NAME))
    if not is_genotype_folder(folder) and not (folder / CONFIG_NAME).is_file():
        raise NatsError(f"{source}: neither {GENOTYPE_NAME} nor {CONFIG_NAME} is in the repository")
    genotype = folder_genotype(folder)
    if genotype is None:
        raise NatsError(f"{source}: a plain network, it has no genotype")
    return replace(genotype, source=HUB_PREFIX + source.removeprefix(HUB_PREFIX))


def folder_genotype(folder: Path) -> Genotype | None:
    """The genotype in the folder of a genotype, a search, a backbone or a detector; None: of a plain network.

    Raises:
        NatsError: not such a folder, or malformed.
    """
    if is_genotype_folder(folder):
        return Genotype.load(folder / GENOTYPE_NAME)
    data = config_genotype(read_config(folder))
    return None if data is None else Genotype.from_dict(data, source=f"{folder / CONFIG_NAME}: genotype")


def config_genotype(config: Mapping[str, Any]) -> Any:
    """What a model's config.json has in the place of a genotype; None: a plain network."""
    if "framework" in config:  # a detector's
        return config.get("genotype")
    arguments = config.get("model_args")
    return arguments.get("genotype") if isinstance(arguments, Mapping) else None
