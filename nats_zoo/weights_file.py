"""Weights files: safetensors whose metadata carries the fingerprint of the genotype that they were trained with.

Shapes can not tell two genotypes apart, so the fingerprint does.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import NatsError, one_line
from .files import atomic_file
from .genotype import Genotype
from .version import __version__

CONFIG_NAME = "config.json"  # beside it; states what network the weights are of
WEIGHTS_NAME = "model.safetensors"
FINGERPRINT_KEY = "genotype_sha256"
PLAIN_FINGERPRINT = "plain"


def save_weights(state_dict: Mapping[str, Tensor], path: str | os.PathLike, genotype: Genotype | None) -> None:
    """Write a safetensors file that carries the genotype's fingerprint (None: of a plain network)."""
    metadata = {"format": "pt", "nats_zoo": __version__, FINGERPRINT_KEY: _fingerprint(genotype)}
    with atomic_file(path) as scratch:
        save_file({name: tensor.contiguous() for name, tensor in state_dict.items()}, scratch, metadata)


def load_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name.

    Raises:
        NatsError: no such file, or not in the safetensors format.
    """
    try:
        return load_file(path)
    except OSError as error:
        raise NatsError(f"{path}: can not be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise NatsError(f"{path}: not a safetensors file: {one_line(error)}") from error


def safetensors_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The metadata of a safetensors file, without reading its tensors.

    Raises:
        NatsError: no such file, or not in the safetensors format.
    """
    with _open_safetensors(path) as file:
        return file.metadata() or {}


def check_fingerprint(path: str | os.PathLike, genotype: Genotype | None) -> None:
    """Raise NatsError unless the weights were saved with this genotype (None: with a plain network).

    Args:
        path: a safetensors file that `save_weights` wrote.
        genotype: the genotype that the config beside it states.
    """
    found = safetensors_metadata(path).get(FINGERPRINT_KEY)
    expected = _fingerprint(genotype)
    if found is None:
        raise NatsError(f"{path}: its metadata has no {FINGERPRINT_KEY}, expected weights that nats-zoo saved")
    if found != expected:
        raise NatsError(
            f"{path}: these weights belong to another genotype: {FINGERPRINT_KEY} is {found},"
            f" that of {CONFIG_NAME} is {expected}"
        )


def check_shapes(path: str | os.PathLike, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise NatsError unless a safetensors file holds tensors of these names and shapes; reads its header only."""
    with _open_safetensors(path) as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
    for name in sorted(expected.keys() | found.keys()):
        if name.endswith(".num_batches_tracked") and name not in found:
            continue  # a frozen BN has none, and loading needs none
        if found.get(name) != expected.get(name):
            raise NatsError(
                f"{path}: tensor {name} has the shape {found.get(name, 'missing')},"
                f" {CONFIG_NAME} expects {expected.get(name, 'no such tensor')}"
            )


@contextmanager
def _open_safetensors(path: str | os.PathLike) -> Iterator[Any]:
    try:
        file = safe_open(path, framework="pt")
    except FileNotFoundError:
        raise NatsError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise NatsError(f"{path}: not a safetensors file: {one_line(error)}") from error
    with file:
        yield file


def _fingerprint(genotype: Genotype | None) -> str:
    return PLAIN_FINGERPRINT if genotype is None else genotype.fingerprint()
