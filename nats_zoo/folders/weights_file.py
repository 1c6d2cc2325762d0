"""Weights files: safetensors whose metadata carries the fingerprint of the genotype that they were trained with.

Shapes can not tell two genotypes apart, so the fingerprint does.
"""

import math
import os
from collections.abc import Mapping

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..base.errors import NatsError, one_line, short
from ..base.files import atomic_file, parse_json
from ..base.names import CONFIG_NAME
from ..genotype.genotype import Genotype

FINGERPRINT_KEY = "genotype_sha256"
PLAIN_FINGERPRINT = "plain"
MAX_HEADER_BYTES = 4 * 2**20  # of a file: about 40,000 tensors, ten times what the largest network of timm has
MAX_DIMENSIONS = 16  # of a tensor
MAX_NAME = 512  # characters of a tensor's name, which error messages quote


def save_weights(state_dict: Mapping[str, Tensor], path: str | os.PathLike, genotype: Genotype | None) -> None:
    """Write a safetensors file that carries the genotype's fingerprint (None: of a plain network).

    Equal tensors give equal files: safetensors writes several metadata in any order, so there is one.

    Example:
        >>> save_weights(model.state_dict(), "model.safetensors", model.genotype)
        >>> WeightsFile("model.safetensors").check_fingerprint(model.genotype)
    """
    with atomic_file(path) as scratch:
        tensors = {name: tensor.contiguous() for name, tensor in state_dict.items()}
        save_file(tensors, scratch, {FINGERPRINT_KEY: _fingerprint(genotype)})


class WeightsFile:
    """A safetensors file, of which the header is read once, and the tensors when they are asked for.

    Args:
        path: of the file.

    Attributes:
        metadata: what its header states beside the tensors.
        shapes: of each tensor, by name.

    Raises:
        NatsError: no such file, or not in the safetensors format.

    Example:
        >>> weights = WeightsFile("runs/nats/best/model.safetensors")
        >>> weights.check_fingerprint(find_genotype("resnet50_c_n16_bccd"))
        >>> tensors = weights.load()
    """

    def __init__(self, path: str | os.PathLike):
        self.path = path
        check_header(path)
        try:
            file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise NatsError(f"{path}: not a safetensors file: {one_line(error)[:300]}") from error
        with file:
            self.metadata: dict[str, str] = file.metadata() or {}
            names = file.keys()
            self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}

    @property
    def elements(self) -> int:
        """Numbers in all of its tensors."""
        return sum(map(math.prod, self.shapes.values()))

    def load(self) -> dict[str, Tensor]:
        """Read the tensors, by name; NatsError if torch can not."""
        return _load(self.path)

    def check_fingerprint(self, genotype: Genotype | None) -> None:
        """Raise NatsError unless `save_weights` wrote it with this genotype (None: with a plain network)."""
        found, expected = self.metadata.get(FINGERPRINT_KEY), _fingerprint(genotype)
        if found is None:
            raise NatsError(f"{self.path}: its metadata has no {FINGERPRINT_KEY}, expected weights that nats-zoo saved")
        if found != expected:
            raise NatsError(
                f"{self.path}: these weights belong to another genotype: {FINGERPRINT_KEY} is {short(found)},"
                f" that of {CONFIG_NAME} is {expected}"
            )

    def check_shapes(self, state_dict: Mapping[str, Tensor]) -> None:
        """Raise NatsError unless it holds tensors of these names and shapes."""
        expected = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
        for name in sorted(expected.keys() | self.shapes.keys()):
            if name.endswith(".num_batches_tracked") and name not in self.shapes:
                continue  # a frozen BN has none, and loading needs none
            if self.shapes.get(name) != expected.get(name):
                raise NatsError(
                    f"{self.path}: tensor {name} has the shape {self.shapes.get(name, 'missing')},"
                    f" {CONFIG_NAME} expects {expected.get(name, 'no such tensor')}"
                )


def load_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, by name.

    Raises:
        NatsError: no such file, or not in the safetensors format.

    Example:
        >>> model.load_state_dict(load_weights("model.safetensors"))
        <All keys matched successfully>
    """
    if not os.path.exists(path):
        raise NatsError(f"{path}: can not be read: no such file")
    check_header(path)
    return _load(path)


def _load(path: str | os.PathLike) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except OSError as error:
        raise NatsError(f"{path}: can not be read: {error.strerror or one_line(error)}") from error
    except (SafetensorError, RuntimeError, ValueError, KeyError, AttributeError, TypeError, OverflowError) as error:
        # beyond the first: a type of numbers that this torch does not have
        raise NatsError(f"{path}: not a safetensors file that torch reads: {one_line(error)[:300]}") from error


def check_header(path: str | os.PathLike) -> None:
    """Check the JSON header of a safetensors file before any library parses it.

    The format's library checks types, offsets and overlaps; it takes headers of 100 MB, though, of which it makes
    gigabytes, and of a tensor named twice it takes one.

    Raises:
        NatsError: no such file, no header, one of over MAX_HEADER_BYTES, or one that names a tensor twice, gives it
            more than MAX_DIMENSIONS, or a name that can not be printed.

    Example:
        >>> check_header("model.safetensors")
    """
    header = parse_json(_header_bytes(path), f"{path}: not a safetensors file: its header", NatsError)
    if not isinstance(header, dict):
        raise NatsError(f"{path}: not a safetensors file: expected an object as its header, found {short(header)}")
    for name, entry in header.items():
        if len(name) > MAX_NAME or not name.isprintable():
            raise NatsError(f"{path}: expected names of at most {MAX_NAME} printable characters, found {short(name)}")
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if isinstance(shape, list) and len(shape) > MAX_DIMENSIONS and name != "__metadata__":
            raise NatsError(f"{path}: {name}: expected at most {MAX_DIMENSIONS} dimensions, found {len(shape)}")


def _header_bytes(path: str | os.PathLike) -> bytes:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise NatsError(f"{path}: not a safetensors file, or not all of one: it ends within its header")
            if length > MAX_HEADER_BYTES:
                found = f"found one of {length}"
                raise NatsError(f"{path}: expected a header of at most {MAX_HEADER_BYTES} bytes, {found}")
            return file.read(length)
    except FileNotFoundError:
        raise NatsError(f"{path}: no such file") from None
    except OSError as error:
        raise NatsError(f"{path}: can not be read: {error.strerror or one_line(error)}") from error


def _fingerprint(genotype: Genotype | None) -> str:
    return PLAIN_FINGERPRINT if genotype is None else genotype.fingerprint()
