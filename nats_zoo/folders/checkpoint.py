"""Checkpoints that torch saved, of whatever program: read as tensors by name, and as nothing else."""

import argparse
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.errors import NatsError, one_line, short
from .weights_file import load_weights


def read_checkpoint(path: str | os.PathLike, keys: Sequence[str] = ("model",)) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint, by name.

    Args:
        path: a file of torch.save's, or .safetensors.
        keys: under which, in this order, the state dict may lie; else the file's object is the state dict.

    Raises:
        NatsError: it can not be read, is no state dict of dense tensors, or holds other objects than plain data.

    Example:
        >>> read_checkpoint("model_25.pth")["backbone.body.conv1.weight"].shape
        torch.Size([64, 3, 7, 7])
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return load_weights(path)
    found = _unpack(path)
    if isinstance(found, Mapping):
        found = next((found[key] for key in keys if isinstance(found.get(key), Mapping)), found)
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise NatsError(f"{path}: expected a state dict, or an object with one under {' or '.join(map(repr, keys))}")
    for name, tensor in found.items():
        if not isinstance(name, str) or not _is_whole(tensor):
            raise NatsError(f"{path}: expected named, dense tensors, found another kind under {short(name)}")
    return dict(found)


def _unpack(path: Path) -> Any:
    """What torch saved, if it is plain data and tensors: no object of it is created, no code of it runs."""
    try:
        _refuse_compressed(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # torchvision's reference training saves its own
            return torch.load(path, map_location="cpu", weights_only=True)
    except NatsError:
        raise
    except (RuntimeError, ValueError, OSError, EOFError) as error:
        raise NatsError(f"{path}: expected a checkpoint of tensors: {one_line(error)[:200]}") from error
    except Exception as error:  # pickle's own: weights_only refuses whatever is not plain data
        raise NatsError(f"{path}: expected a checkpoint of tensors, found other objects in it") from error


def _refuse_compressed(path: Path) -> None:
    """torch.save stores as it is; a compressed archive may be a thousand times larger than its file."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise NatsError(f"{path}: expected a checkpoint as torch.save writes it, found a compressed one")


def _is_whole(tensor: Tensor) -> bool:
    """Whether it has each of its numbers in memory: a file can also say that one stands for billions."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        return False
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()
