"""Model folders: `config.json`, `model.safetensors`, `README.md` (the model card) and PNG charts; whole or absent."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ..base.errors import NatsError
from ..base.files import atomic_folder, read_json
from ..base.names import CONFIG_NAME, MODEL_FILES, WEIGHTS_NAME
from ..genotype.genotype import Genotype
from .limits import check_config
from .weights_file import FINGERPRINT_KEY, WeightsFile

BACKBONE, DETECTOR = "backbone", "detector"  # kinds of model folders
BODY = "backbone.body."  # where a detector's state dict holds its backbone's


def kind_of(config: Mapping[str, Any]) -> str:
    """Tell a detector's config.json from a backbone's.

    Example:
        >>> kind_of({"framework": "fcos", "backbone": "resnet18"})
        'detector'
    """
    return DETECTOR if "framework" in config else BACKBONE


@dataclass(frozen=True)
class ModelFolder:
    """A backbone's or a detector's folder: each of its files is read once, and when it is asked for.

    Attributes:
        path: of the folder.
        config: content of its config.json; a backbone's is within the limits of `limits`.

    Example:
        >>> folder = ModelFolder.open("runs/nats/best")
        >>> folder.check()
        >>> tensors = folder.load()
    """

    path: Path
    config: dict[str, Any]

    @classmethod
    def open(cls, folder: "str | os.PathLike | ModelFolder") -> "ModelFolder":
        """Read a folder's config.

        Raises:
            NatsError: no such file, no JSON object in it, or what is not taken from one.
        """
        if isinstance(folder, ModelFolder):
            return folder
        path = Path(folder) / CONFIG_NAME
        if not path.exists():
            raise NatsError(f"{folder}: no {CONFIG_NAME} in it, expected a model folder")
        config = read_json(path)
        if not isinstance(config, dict):
            raise NatsError(f"{path}: expected a JSON object, found {type(config).__name__}")
        if kind_of(config) == BACKBONE:  # a detector's is read strictly, by its own reader
            check_config(config, path)
        return cls(Path(folder), config)

    @property
    def config_path(self) -> Path:
        """Of its config.json, for messages."""
        return self.path / CONFIG_NAME

    @property
    def kind(self) -> str:
        """BACKBONE or DETECTOR."""
        return kind_of(self.config)

    @cached_property
    def weights(self) -> WeightsFile:
        """Its weights, of which the header is read; NatsError if there are none."""
        return WeightsFile(self.path / WEIGHTS_NAME)

    @cached_property
    def genotype(self) -> Genotype | None:
        """The genotype that its config states; None: of a plain network. NatsError if it is malformed."""
        holder, key = self.config, "genotype"
        if self.kind == BACKBONE:
            holder, key = self.config.get("model_args") or {}, "model_args: genotype"
        data = holder.get("genotype")
        return None if data is None else Genotype.from_dict(data, source=f"{self.config_path}: {key}")

    def check(self) -> None:
        """Raise NatsError unless its weights were saved with the genotype that its config states."""
        self.weights.check_fingerprint(self.genotype)

    def load(self) -> dict[str, Tensor]:
        """Read its tensors, by name."""
        return self.weights.load()

    def load_backbone(self) -> dict[str, Tensor]:
        """Read the tensors of its backbone, by the names that they have in a backbone's folder."""
        start = BODY if self.kind == DETECTOR else ""
        return {key.removeprefix(start): tensor for key, tensor in self.load().items() if key.startswith(start)}


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

    Example:
        >>> write_folder_atomically("model", lambda new: (new / "config.json").write_text("{}"))
        PosixPath('model')
    """
    target = Path(folder).resolve()
    is_free = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    if not is_free and not (target.is_dir() and (is_own or _is_own_model)(target)):
        raise NatsError(f"{folder}: is there already and is no model folder, or holds other files too; not replaced")
    try:
        with atomic_folder(target) as new:
            write(new)
    except OSError as error:
        raise NatsError(f"{folder}: can not be written: {error.strerror or error}") from error
    return Path(folder)


def _is_own_model(folder: Path) -> bool:
    """Tell whether it holds a config and weights that nats-zoo saved, and a model's other files, and nothing else."""
    try:
        is_saved = FINGERPRINT_KEY in ModelFolder.open(folder).weights.metadata
    except NatsError:
        return False
    return is_saved and set(folder.iterdir()) == set(model_files(folder))


def model_files(folder: Path) -> list[Path]:
    """List a model's files in a folder, by name.

    Example:
        >>> [path.name for path in model_files(Path("runs/nats/best"))]
        ['README.md', 'config.json', 'genotype.png', 'model.safetensors']
    """
    files = (path for path in folder.iterdir() if path.is_file() and not leads_out(path))
    return sorted(path for path in files if any(fnmatch(path.name, pattern) for pattern in MODEL_FILES))


def leads_out(path: Path) -> bool:
    """Tell whether a file is a link to somewhere else: what it would publish is not the folder's.

    The Hub's cache is such links, to `blobs` beside its `snapshots` or beside its repositories; those count as its own.

    Example:
        >>> Path("model/notes.png").symlink_to("/etc/passwd")
        >>> leads_out(Path("model/notes.png"))
        True
    """
    folder = path.parent.resolve()
    storages = [snapshots.parent for snapshots in folder.parents if snapshots.name == "snapshots"]
    homes = [folder, *(home / "blobs" for storage in storages for home in (storage, storage.parent))]
    return path.is_symlink() and not any(path.resolve().is_relative_to(home) for home in homes)
