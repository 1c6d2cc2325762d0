"""The folder of a training or search run: its config, log and checkpoints. No pickle in any of them.

run.json                 what was asked for
log.jsonl                what it runs on and what of it was left out; one record per logged step and per evaluation
tensorboard              the same numbers for TensorBoard, if asked for
checkpoints/step_000120  one safetensors file per group of tensors, and state.json
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...base.errors import NatsError, short
from ...base.files import atomic_folder, read_json, write_json, write_text
from ...folders.weights_file import load_weights

# Options that may differ between a run and its resumption: they do not change what is computed.
FREE_OPTIONS = frozenset({"resume", "workers", "checkpoint_every", "output", "data", "format", "images", "tensorboard"})


STATE_NAME = "state.json"
MAX_STATE_BYTES = 2**28  # of a checkpoint's state.json: an optimiser's numbers are in it, some for each tensor
MAX_STEP_DIGITS = 15


class RunError(NatsError):
    """A run folder that can not be started in, or resumed from."""


class Checkpoint(NamedTuple):
    """Everything a run continues from."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


class RunFolder:
    """Checks a run's folder; `begin` creates it.

    Args:
        path: the folder.
        config: the run's options, plain data.
        resume: continue what the folder holds. An absent or empty folder is begun in either case.
        writer: whether this process writes (the main one does).
        tensorboard: write the log's numbers for TensorBoard too.

    Raises:
        RunError: the folder holds something else, a run (and resume was not asked for), or a run of other options.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        config: Mapping[str, Any],
        resume: bool,
        writer: bool = True,
        tensorboard: bool = False,
    ):
        self.path = Path(path)
        self.writer = writer
        self.tensorboard = tensorboard
        self._events: Any = None  # torch's SummaryWriter
        self.config = json.loads(json.dumps(config))
        holds_run = (self.path / "run.json").is_file()
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path}: expected a folder, found a file")
        if not holds_run and self.path.is_dir() and any(self.path.iterdir()):
            raise RunError(f"{self.path}: not a run's folder (no run.json in it) and not empty; choose another")
        if holds_run and not resume:
            raise RunError(
                f"{self.path}: already holds a run; add --resume true to continue it or choose another folder"
            )
        if holds_run:
            self._check_options()

    def begin(self) -> None:
        """Write the options into the folder, which makes it a run's, and clear what was left half-written in it.

        Apart from the constructor, so that what fails in between leaves no folder, and that no process finds the run
        which another one has just begun.
        """
        if not self.writer:
            return
        checkpoints = self.path / "checkpoints"
        checkpoints.mkdir(parents=True, exist_ok=True)
        for unfinished in checkpoints.glob(".*"):  # of a process that was killed
            shutil.rmtree(unfinished)
        if not (self.path / "run.json").is_file():
            write_json(self.path / "run.json", self.config)

    def _check_options(self) -> None:
        path, config = self.path / "run.json", self.config
        before = read_json(path, RunError)
        if not isinstance(before, dict):
            raise RunError(f"{path}: expected an object with the run's options")
        for key in sorted((config.keys() | before.keys()) - FREE_OPTIONS):
            if before.get(key) != config.get(key):
                name = key if key in config else short(key)  # the file may hold any key
                was, now = short(before.get(key)), short(config.get(key))
                raise RunError(f"{path}: the run was begun with {name}={was} and can not go on with {now}")

    @property
    def log_path(self) -> Path:
        return self.path / "log.jsonl"

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one record to the log."""
        if self.writer:
            with self.log_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            self._log_events(record)

    def _log_events(self, record: Mapping[str, Any]) -> None:
        if self._events is None:
            return
        for key, value in record.items():
            if type(value) in (int, float) and key not in ("step", "epoch"):
                self._events.add_scalar(key, value, record["step"])
        self._events.flush()

    def has_log(self) -> bool:
        """Whether anything was logged."""
        return self.log_path.is_file() and self.log_path.stat().st_size > 0

    def rewind_log(self, step: int) -> None:
        """Drop what was logged after this step: a resumed run logs it again."""
        if self.writer and self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(self.path / "tensorboard", purge_step=step + 1)
        if self.writer and self.log_path.is_file():
            lines = self.log_path.read_text(encoding="utf-8").splitlines()
            write_text(self.log_path, "".join(f"{line}\n" for line in lines if _logged_step(line) <= step))

    def close(self) -> None:
        """Close what the log is written to."""
        if self._events is not None:
            self._events.close()
            self._events = None

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint beside its place, rename it, and only then remove older ones."""
        if not self.writer:
            return
        older = self._checkpoints()
        target = self.path / "checkpoints" / f"step_{checkpoint.step:06d}"
        with atomic_folder(target) as scratch:
            for group, tensors in checkpoint.tensors.items():
                save_file(
                    {k: t.detach().contiguous().cpu() for k, t in tensors.items()}, scratch / f"{group}.safetensors"
                )
            write_json(scratch / STATE_NAME, {"step": checkpoint.step, **checkpoint.state})
        for folder in older:
            if folder != target:
                shutil.rmtree(folder)

    def latest_folder(self) -> Path | None:
        """The newest checkpoint's folder, or None when the run has not come to its first."""
        folders = self._checkpoints()
        return folders[-1] if folders else None

    def latest_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint, or None when the run has not come to its first."""
        folder = self.latest_folder()
        return None if folder is None else read_checkpoint(folder)

    def latest_step(self) -> int | None:
        """The newest checkpoint's step, without reading it."""
        folder = self.latest_folder()
        return None if folder is None else int(folder.name.removeprefix("step_"))

    def _checkpoints(self) -> list[Path]:
        steps = {folder: folder.name.removeprefix("step_") for folder in (self.path / "checkpoints").glob("step_*")}
        return sorted((folder for folder, step in steps.items() if _is_step(step)), key=lambda f: int(steps[f]))


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's folder; RunError names what is missing or damaged."""
    state = read_state(folder)
    try:
        tensors = {path.stem: load_weights(path) for path in sorted(folder.glob("*.safetensors"))}
    except NatsError as error:
        raise RunError(f"{folder}: damaged checkpoint: {error}") from error
    return Checkpoint(state.pop("step"), tensors, state)


def read_state(folder: Path) -> dict[str, Any]:
    """The state in a checkpoint's folder, without the tensors; RunError names what is missing or damaged."""
    state = read_json(folder / STATE_NAME, RunError, MAX_STATE_BYTES)
    if not isinstance(state, dict) or type(state.get("step")) is not int or state["step"] < 0:
        raise RunError(f"{folder / STATE_NAME}: expected an object with an integer 'step', from 0 on")
    return state


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as tensors and JSON: what `unpack_optimizer` takes."""
    state = optimizer.state_dict()
    tensors, numbers = {}, {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                numbers[f"{index}.{key}"] = value
    return tensors, {"numbers": numbers, "param_groups": state["param_groups"]}


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
    """Load what `pack_optimizer` gave."""
    entries: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **data["numbers"]}.items():
        index, _, key = name.partition(".")
        entries.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": entries, "param_groups": data["param_groups"]})
    for parameter, entry in optimizer.state.items():
        for key, value in entry.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:  # files know no memory format
                entry[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _is_step(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= MAX_STEP_DIGITS


def _logged_step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return 2**62  # the torn last line of a killed run
