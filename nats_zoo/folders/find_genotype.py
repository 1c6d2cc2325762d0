"""Genotypes by name: the published ones, those of files and folders, and of Hub repositories without their weights."""

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import timm

from ..base.errors import GenotypeError, NatsError
from ..base.names import CONFIG_NAME, GENOTYPE_NAME, HUB_PREFIX, NATS_ANY, VARIANT_PREFIX
from ..genotype.catalogue import GENOTYPE_DIR, default_genotype, published_genotypes
from ..genotype.genotype import Genotype
from ..hub.client import resolve_folder
from .model_folder import ModelFolder

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(?<!\.json)(@.+)?")  # org/name, org/name@revision


def pull_genotype(source: str) -> Genotype:
    """Fetch the genotype of a Hub repository, without its weights.

    Args:
        source: `org/name` or `org/name@revision`, with or without `hf-hub:` before it.

    Raises:
        NatsError: it can not be had, there is none in it, or it is malformed.

    Example:
        >>> pull_genotype("org/name@v1").source
        'hf-hub:org/name@v1'
    """
    folder = resolve_folder(source, files=(GENOTYPE_NAME, CONFIG_NAME))
    if not is_genotype_folder(folder) and not (folder / CONFIG_NAME).is_file():
        raise NatsError(f"{source}: neither {GENOTYPE_NAME} nor {CONFIG_NAME} is in the repository")
    genotype = folder_genotype(folder)
    if genotype is None:
        raise NatsError(f"{source}: a plain network, it has no genotype")
    return replace(genotype, source=HUB_PREFIX + source.removeprefix(HUB_PREFIX))


def folder_genotype(folder: Path) -> Genotype | None:
    """Read the genotype in the folder of a genotype, a search, a backbone or a detector; None: of a plain network.

    Raises:
        NatsError: not such a folder, or malformed.

    Example:
        >>> folder_genotype(Path("runs/search")).architecture
        'resnet50'
    """
    if is_genotype_folder(folder):
        return Genotype.load(folder / GENOTYPE_NAME)
    return ModelFolder.open(folder).genotype


def find_genotype(genotype: Genotype | Mapping | str | os.PathLike) -> Genotype:
    """Find what users pass as `genotype=` or `--genotype`: the one door to genotypes.

    Args:
        genotype: a Genotype; its JSON form; the name of a published one, or of a variant (its default); a genotype
            file; the folder of a search; or the folder or Hub repository (`org/name`, `org/name@revision`, either
            after `hf-hub:`) of a genotype, backbone or detector.

    Raises:
        NatsError: no such name, file or repository, a plain network's, or a malformed genotype (then a GenotypeError).

    Example:
        >>> find_genotype("resnet50_c_n16_bccd").architecture
        'resnet50'
    """
    if isinstance(genotype, Genotype):
        return genotype
    if isinstance(genotype, Mapping):
        return Genotype.from_dict(genotype)
    if not isinstance(genotype, str | os.PathLike):
        raise GenotypeError(f"genotype: expected a name, a path, a dict or a Genotype, found {type(genotype).__name__}")
    name, path = os.fspath(genotype), Path(genotype)
    if name in published_genotypes():
        return Genotype.load(GENOTYPE_DIR / f"{name}.json")
    if name.startswith(HUB_PREFIX):
        return pull_genotype(name)
    if name and path.exists():
        found = folder_genotype(path) if path.is_dir() else Genotype.load(path)
    elif name.partition(".")[0] == NATS_ANY:
        raise NatsError(f"{NATS_ANY}: name the plain architecture instead, and a genotype for it")
    elif timm.is_model(plain := name.partition(".")[0].removeprefix(VARIANT_PREFIX)):
        is_variant = name.startswith(VARIANT_PREFIX)
        found = Genotype.load(GENOTYPE_DIR / f"{default_genotype(plain)}.json") if is_variant else None
    elif REPOSITORY.fullmatch(name):
        return pull_genotype(name)
    else:
        known = ", ".join(published_genotypes())
        raise GenotypeError(
            f"{name}: no published genotype, variant, file or folder of this name; published are: {known}"
        )
    if found is None:
        raise NatsError(f"{name}: a plain network, it has no genotype")
    return found


def is_genotype_folder(folder: str | os.PathLike) -> bool:
    """Tell whether it is a genotype's folder, or that of a search with its result; a model's has a genotype too.

    Example:
        >>> is_genotype_folder("runs/search"), is_genotype_folder("runs/nats/best")
        (True, False)
    """
    return (Path(folder) / GENOTYPE_NAME).is_file() and not (Path(folder) / CONFIG_NAME).exists()
