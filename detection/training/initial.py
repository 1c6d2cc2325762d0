"""Training that begins with a whole trained detector: what it brings, and which classes its head keeps."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...base.errors import NatsError
from ...folders.find_genotype import find_genotype
from ...hub.client import resolve_folder, split_revision
from ..models.backbone import create_body
from ..models.config import DetectorConfig
from ..models.create import assemble, build_detector, freeze, recalibrate_backbone
from ..models.folder import from_pretrained, read_detector_config
from ..models.options import DETECTOR_OPTIONS, FIXED_OPTIONS
from ..runs.config import RunConfig

# What the weights do not belong to: an option that is not at its default takes the place of the detector's own.
CHANGEABLE_OPTIONS = ("norm", *(name for name in DETECTOR_OPTIONS if name not in FIXED_OPTIONS))
SHOWN_NAMES = 5


@dataclass(frozen=True)
class InitialDetector:
    """The detector that a run begins with, or once began with.

    Attributes:
        name: as the option names it; of a Hub repository with the commit that was taken.
        config: that of the detector which is trained.
        kept: for the labels whose part of the class head is taken over, those that they have there. Label 0, the
            background, comes along with any other.
        folder: where the weights are; None: the run goes on from a checkpoint.
    """

    name: str
    config: DetectorConfig
    kept: Mapping[int, int]
    folder: Path | None = None

    def create(self, calibration: Iterable | None = None) -> nn.Module:
        """The detector, with the weights; of a run that goes on with random ones, to load the checkpoint into.

        Args:
            calibration: batches as `create_detector` takes them, for batch norms that have to fit another genotype.

        Raises:
            NatsError: weights of another genotype, or that do not fit the config.
        """
        if self.folder is None:
            return build_detector(self.config)
        genotype = None if self.config.genotype is None else find_genotype(self.config.genotype)
        detector = assemble(self.config, create_body(self.config.backbone, genotype))
        source = from_pretrained(self.folder).state_dict()
        detector.load_state_dict(_take_over(detector.state_dict(), source, self.config, self.kept))
        if calibration is not None:
            recalibrate_backbone(detector, calibration)
        return freeze(detector)

    def line(self) -> str:
        """What is taken over, in one line."""
        count = len(self.kept.keys() - {0})
        names = self.config.classes
        new = [name for label, name in enumerate(names, 1) if label not in self.kept]
        if not new:
            head = f"class head kept, {count} classes"
        elif count:
            head = f"class head kept for {count} of {len(names)} classes, new for {_few(new)}"
        else:
            head = f"class head new for {_few(new)}, which the detector does not find"
        return f"init: {self.name}: {self.config.framework} on {self.config.backbone}; {head}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: what `from_dict` takes."""
        return {"name": self.name, "config": self.config.to_dict(), "kept": [list(pair) for pair in self.kept.items()]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str) -> "InitialDetector":
        """Of a run that goes on; NatsError names the source and the key."""
        try:
            name, config, kept = str(data["name"]), data["config"], {int(new): int(old) for new, old in data["kept"]}
        except (KeyError, TypeError, ValueError) as error:
            raise NatsError(f"{source}: init: expected what a run of training writes there") from error
        return cls(name, DetectorConfig.from_dict(config, f"{source}: init: config"), kept)


def find_initial(init: str, config: RunConfig) -> InitialDetector:
    """The detector that a run's options name, with what they say of it; for the classes see `with_classes`.

    Raises:
        NatsError: no such detector, or an option that contradicts it.
    """
    folder = resolve_folder(init)
    origin = read_detector_config(folder)
    _check_options(init, origin, config)
    changed = {name: getattr(config, name) for name in CHANGEABLE_OPTIONS if not _is_default(config, name)}
    genotype = getattr(config, "genotype", None)
    if genotype is not None:
        changed["genotype"] = find_genotype(genotype).to_dict()
    return InitialDetector(_pinned(init, folder), replace(origin, **changed), {}, folder)


def with_classes(initial: InitialDetector, classes: Sequence[str], category_ids: Sequence[int]) -> InitialDetector:
    """The same detector for a data set's classes, whose heads it keeps where a class has the same name.

    One whose config names no classes keeps its head if it has as many; they are taken to be in the same order.
    """
    config = initial.config
    if config.classes:
        kept = {new: config.classes.index(name) + 1 for new, name in enumerate(classes, 1) if name in config.classes}
    elif config.num_classes == len(classes) + 1:
        kept = {label: label for label in range(1, len(classes) + 1)}
    else:
        kept = {}
    config = replace(config, num_classes=len(classes) + 1, classes=tuple(classes), category_ids=tuple(category_ids))
    return replace(initial, config=config, kept={0: 0, **kept} if kept else {})


def _check_options(init: str, origin: DetectorConfig, config: RunConfig) -> None:
    for name in FIXED_OPTIONS:
        asked, own = getattr(config, name), getattr(origin, name)
        if not _is_default(config, name) and asked != own:
            raise NatsError(f"{name}: the detector of --init, {init}, has {own!r}, found {asked!r}; leave it out")
    if not _is_default(config, "weights"):
        raise NatsError(
            f"weights: the detector of --init, {init}, brings its own, found {config.weights!r}; leave it"
            " out, or give --weights instead of --init, which takes the backbone's weights alone"
        )


def _is_default(config: RunConfig, name: str) -> bool:
    default = next(field.default for field in dataclasses.fields(config) if field.name == name)
    return getattr(config, name) == default


def _pinned(init: str, folder: Path) -> str:
    """How the run remembers the detector: a repository with the commit."""
    if folder.parent.name != "snapshots" or Path(init).is_dir():
        return init
    return f"{split_revision(init)[0]}@{folder.name}"


def _take_over(
    new: dict[str, Tensor], old: Mapping[str, Tensor], config: DetectorConfig, kept: Mapping[int, int]
) -> dict[str, Tensor]:
    """The new detector's state with the old one's, of the class head only the kept classes."""
    per_class = _rows_per_class(config)
    taken = dict(new)
    for key, tensor in new.items():
        if key in per_class:
            taken[key] = _take_rows(key, tensor, old[key], config.num_classes, kept)
        elif key in old:  # batch norms that were frozen have not counted their batches
            taken[key] = old[key]
    return taken


def _rows_per_class(config: DetectorConfig) -> set[str]:
    """Names of the tensors whose first axis grows with the number of classes."""
    with torch.device("meta"):
        counts = (config.num_classes, config.num_classes + 1)
        sizes = [replace(config, num_classes=count, classes=(), category_ids=()) for count in counts]
        states = [build_detector(size).state_dict() for size in sizes]
        shapes = [{key: tensor.shape for key, tensor in state.items()} for state in states]
    return {key for key, shape in shapes[0].items() if shape != shapes[1][key]}


def _take_rows(key: str, new: Tensor, old: Tensor, num_classes: int, kept: Mapping[int, int]) -> Tensor:
    """Rows of the kept classes from the old tensor, all others from the new one.

    torchvision's dense heads (`cls_logits`) have all classes of one anchor after the other; the others, as `bbox_pred`,
    all four coordinates of one class after the other.
    """
    rows = new.shape[0] // num_classes
    dense = "cls_logits" in key

    def by_class(tensor: Tensor) -> Tensor:
        count = tensor.shape[0] // rows
        axes = (rows, count) if dense else (count, rows)
        blocks = tensor.reshape(*axes, *tensor.shape[1:])
        return blocks.transpose(0, 1) if dense else blocks

    taken = by_class(new.clone())
    if kept:
        taken[list(kept)] = by_class(old)[list(kept.values())]
    return (taken.transpose(0, 1) if dense else taken).reshape(new.shape)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN_NAMES]) + (", ..." if len(names) > SHOWN_NAMES else "")
