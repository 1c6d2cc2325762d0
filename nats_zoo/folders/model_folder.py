"""Model folders: `config.json`, `model.safetensors`, `README.md` (the model card) and PNG charts; whole or absent."""

import os
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..base.errors import NatsError
from ..base.files import atomic_folder, read_json
from ..base.names import CONFIG_NAME, MODEL_FILES, WEIGHTS_NAME
from .limits import check_config
from .weights_file import FINGERPRINT_KEY, safetensors_metadata


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The content of a model folder's config.json.

    Raises:
        NatsError: no such file, no JSON object in it, or what is not taken from one, see `config_limits`.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.exists():
        raise NatsError(f"{folder}: no {CONFIG_NAME} in it, expected a model folder")
    config = read_json(path)
    if not isinstance(config, dict):
        raise NatsError(f"{path}: expected a JSON object, found {type(config).__name__}")
    check_config(config, path)
    return config


def write_folder_atomically(
    folder: str | os.PathLike, write: Callable[[Path], None], is_own: Callable[[Path], bool] | None = None
) -> Path:
    """Write a model folder, or one of another kind, beside its target, then rename it.

    Args:
        folder: the target; one there that is empty or of the same kind is replaced.
        write: fills the folder that it is given. What it raises leaves the target as it was.
        is_own: whether a folder is of that kind and holds nothing else; default: of a model.

    Returns:
        The target.

    Raises:
        NatsError: something else is in the way, or the target can not be written.
    """
    target = Path(folder).resolve()
    if target.exists() and not _is_replaceable(target, is_own or _is_own_model):
        raise NatsError(f"{folder}: is there already and is no model folder, or holds other files too; not replaced")
    try:
        with atomic_folder(target) as new:
            write(new)
    except OSError as error:
        raise NatsError(f"{folder}: can not be written: {error.strerror or error}") from error
    return Path(folder)


def _is_replaceable(folder: Path, is_own: Callable[[Path], bool]) -> bool:
    return folder.is_dir() and (not any(folder.iterdir()) or is_own(folder))


def _is_own_model(folder: Path) -> bool:
    return is_model_folder(folder) and not other_files(folder)


def is_model_folder(folder: Path) -> bool:
    """Whether it holds a config and weights that nats-zoo saved."""
    try:
        read_config(folder)
        return FINGERPRINT_KEY in safetensors_metadata(folder / WEIGHTS_NAME)
    except NatsError:
        return False


def model_files(folder: Path) -> list[Path]:
    """A model's files in a folder, by name."""
    files = (path for path in folder.iterdir() if path.is_file() and not leads_out(path))
    return sorted(path for path in files if any(fnmatch(path.name, pattern) for pattern in MODEL_FILES))


def leads_out(path: Path) -> bool:
    """Whether a file is a link to somewhere else: what it would publish is not the folder's.

    The Hub's cache is such links, to `blobs` beside its `snapshots`; those count as its own.
    """
    folder = path.parent.resolve()
    homes = [folder, *(snapshots.parent / "blobs" for snapshots in folder.parents if snapshots.name == "snapshots")]
    return path.is_symlink() and not any(path.resolve().is_relative_to(home) for home in homes)


def other_files(folder: Path) -> set[Path]:
    """What a folder holds beside a model's files: it is neither replaced nor published."""
    return set(folder.iterdir()) - set(model_files(folder))
