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

from ..base.errors import NatsError, one_line, short
from ..base.files import atomic_file, parse_json
from ..base.names import CONFIG_NAME
from ..genotype.genotype import Genotype
from ..version import __version__

FINGERPRINT_KEY = "genotype_sha256"
PLAIN_FINGERPRINT = "plain"
MOST_HEADER_BYTES = 4 * 2**20  # of a file: about 40,000 tensors, ten times what the largest network of timm has
MOST_DIMENSIONS = 16  # of a tensor
MOST_NAME = 512  # characters of a tensor's name, which error messages quote


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
    if not os.path.exists(path):
        raise NatsError(f"{path}: can not be read: no such file")
    read_header(path)
    try:
        return load_file(path)
    except OSError as error:
        raise NatsError(f"{path}: can not be read: {error.strerror or one_line(error)}") from error
    except (SafetensorError, RuntimeError, ValueError, KeyError, AttributeError, TypeError, OverflowError) as error:
        # beyond the first: a type of numbers that this torch does not have
        raise NatsError(f"{path}: not a safetensors file that torch reads: {one_line(error)[:300]}") from error


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
            f"{path}: these weights belong to another genotype: {FINGERPRINT_KEY} is {_quoted(found)},"
            f" that of {CONFIG_NAME} is {expected}"
        )


def check_shapes(path: str | os.PathLike, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise NatsError unless a safetensors file holds tensors of these names and shapes; reads its header only."""
    found = tensor_shapes(path)
    for name in sorted(expected.keys() | found.keys()):
        if name.endswith(".num_batches_tracked") and name not in found:
            continue  # a frozen BN has none, and loading needs none
        if found.get(name) != expected.get(name):
            raise NatsError(
                f"{path}: tensor {name} has the shape {found.get(name, 'missing')},"
                f" {CONFIG_NAME} expects {expected.get(name, 'no such tensor')}"
            )


def tensor_shapes(path: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a safetensors file, by name; reads its header only.

    Raises:
        NatsError: no such file, or not in the safetensors format.
    """
    with _open_safetensors(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)


@contextmanager
def _open_safetensors(path: str | os.PathLike) -> Iterator[Any]:
    read_header(path)
    try:
        file = safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise NatsError(f"{path}: not a safetensors file: {one_line(error)[:300]}") from error
    with file:
        yield file


def read_header(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON header of a safetensors file, checked before any library parses it.

    The format's library checks types, offsets and overlaps; it takes headers of 100 MB, though, of which it makes
    gigabytes, and of a tensor named twice it takes one.

    Raises:
        NatsError: no such file, no header, one of over MOST_HEADER_BYTES, or one that names a tensor twice, gives it
            more than MOST_DIMENSIONS, or a name that can not be printed.
    """
    header = parse_json(_header_bytes(path), f"{path}: not a safetensors file: its header", NatsError)
    if not isinstance(header, dict):
        raise NatsError(f"{path}: not a safetensors file: expected an object as its header, found {short(header)}")
    for name, entry in header.items():
        if len(name) > MOST_NAME or not name.isprintable():
            raise NatsError(f"{path}: expected names of at most {MOST_NAME} printable characters, found {short(name)}")
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if isinstance(shape, list) and len(shape) > MOST_DIMENSIONS and name != "__metadata__":
            raise NatsError(f"{path}: {name}: expected at most {MOST_DIMENSIONS} dimensions, found {len(shape)}")
    return header


def _header_bytes(path: str | os.PathLike) -> bytes:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise NatsError(f"{path}: not a safetensors file, or not all of one: it ends within its header")
            if length > MOST_HEADER_BYTES:
                found = f"found one of {length}"
                raise NatsError(f"{path}: expected a header of at most {MOST_HEADER_BYTES} bytes, {found}")
            return file.read(length)
    except FileNotFoundError:
        raise NatsError(f"{path}: no such file") from None
    except OSError as error:
        raise NatsError(f"{path}: can not be read: {error.strerror or one_line(error)}") from error


def _quoted(fingerprint: str) -> str:
    """As it is, if it is like one."""
    return fingerprint if fingerprint.isalnum() and len(fingerprint) <= 64 else short(fingerprint)


def _fingerprint(genotype: Genotype | None) -> str:
    return PLAIN_FINGERPRINT if genotype is None else genotype.fingerprint()
