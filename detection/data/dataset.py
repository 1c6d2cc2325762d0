"""Data sets for torchvision's detectors: images with boxes, labels and masks."""

import copy
import dataclasses
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from .annotations import CLIPPED, CocoAnnotations, ImageRecord, RawData
from .augment import eval_transforms
from .checking import check_annotations
from .defects import BadEntry, DataError, listed
from .formats.coco import read_coco
from .images import load_image


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How a data set is read, whatever its format.

    Attributes:
        transforms: takes and returns (image, target); sees the image as uint8 and has to leave it float32 in 0..1. Its
            randomness must be torch's. None: `eval_transforms()`.
        skip_bad: leave out and count (`skipped`) images and objects that can not be used, instead of raising. Every
            image is decoded once for it, as nothing else tells that a file is truncated.
        seed: with the epoch and the image id it determines all randomness of an item.
        transpose: swap rows and columns of all images and boxes before anything else, in `to_coco()` too: as if the
            files held the transposed images.
        masks: give masks; an object without one can not be used then.
    """

    transforms: Callable | None = None
    skip_bad: bool = False
    seed: int = 0
    transpose: bool = False
    masks: bool = False


class CocoDataset(Dataset):
    """Images with boxes, and masks where they are asked for, as torchvision's detectors take them.

    An item is `(image, target)`: a `tv_tensors.Image`, (3, H, W) float32 RGB in 0..1, and a dict of

    - boxes: `tv_tensors.BoundingBoxes`, (N, 4) float32, x1, y1, x2, y2 in pixels, clipped to the image, N may be 0;
    - labels: (N,) int64, 1..K, where label l is `classes[l - 1]` (0 is the background);
    - image_id: COCO's image id, an int;
    - area: (N,) float32, square pixels;
    - iscrowd: (N,) int64, zeros: crowd regions are left to evaluation;
    - masks, if they are asked for: `tv_tensors.Mask`, (N, H, W) uint8, 0 or 1.

    Pixels are taken as the file stores them, because that is what boxes in COCO refer to. An EXIF orientation is
    applied only where the annotated size fits nothing else.

    Args:
        annotations: the annotation file, in COCO's format; `open_split` reads the others.
        images: folder to which the annotated file names are relative.
        transforms: see `ReadOptions`.
        options: its other fields.

    Raises:
        DataError: the file or, without `skip_bad`, one of its entries can not be used; from `[]`, an image can not be
            decoded or its size is not the annotated one.

    Example:
        >>> dataset = CocoDataset("instances_train.json", "images", train_transforms(jitter=0.2), skip_bad=True)
        >>> image, target = dataset[0]
        >>> dataset.classes[target["labels"][0] - 1]
    """

    def __init__(self, annotations: str | Path, images: str | Path, transforms: Callable | None = None, **options: Any):
        self._open(read_coco(annotations, images), ReadOptions(transforms=transforms, **options))

    @classmethod
    def from_raw(cls, raw: RawData, **options: Any) -> "CocoDataset":
        """A data set of what a format's parser found; `options` are the fields of `ReadOptions`."""
        dataset = cls.__new__(cls)
        dataset._open(raw, ReadOptions(**options))
        return dataset

    def _open(self, raw: RawData, options: ReadOptions) -> None:
        self.annotations = raw.path
        self.images = Path(raw.folder or "")
        self.options = options
        self.transforms = options.transforms or eval_transforms()
        content = check_annotations(raw, skip_bad=options.skip_bad, decode=options.skip_bad, masks=options.masks)
        self._content = content.transposed() if options.transpose else content
        self._epoch = _shared_counter()

    @property
    def masks(self) -> bool:
        """Whether masks are given."""
        return self.options.masks

    @property
    def content(self) -> CocoAnnotations:
        """What the data set holds, checked, without its images' pixels."""
        return self._content

    @property
    def classes(self) -> tuple[str, ...]:
        """Names in order of category id."""
        return self._content.classes

    @property
    def category_ids(self) -> tuple[int, ...]:
        """The file's own ids, ascending."""
        return self._content.category_ids

    @property
    def image_ids(self) -> tuple[int, ...]:
        """One per item."""
        return tuple(record.id for record in self._content.images)

    @property
    def skipped(self) -> dict[str, int]:
        """How many entries of the file were left out, by reason."""
        return self._content.skipped

    @property
    def left_out(self) -> str:
        """One line that says how many entries were left out, by reason; empty if none was."""
        return f"{self.annotations}: left out: {listed(self.skipped)}" if self.skipped else ""

    @property
    def notes(self) -> dict[str, int]:
        """What can be used but is worth knowing, see `CocoAnnotations`."""
        return self._content.notes

    @property
    def clipped(self) -> int:
        """How many boxes of the file lie partly outside their image."""
        return self._content.notes.get(CLIPPED, 0)

    def __len__(self) -> int:
        return len(self._content.images)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, dict]:
        record = self._content.images[index]
        image = self._load(record)
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would seed the GPUs' generators too, and nothing here restores those.
            torch.default_generator.manual_seed(self._item_seed(record.id))
            return self.transforms(image, _target(record))

    def path(self, index: int) -> Path:
        """The file of an item's image."""
        return self.images / self._content.images[index].file_name

    def set_epoch(self, epoch: int) -> None:
        """Change the randomness of all items; reaches the workers of a running DataLoader too."""
        self._epoch.fill_(epoch)

    def select(self, indices: Iterable[int]) -> "CocoDataset":
        """A data set of the same file with only these items; it keeps an epoch of its own."""
        images = tuple(self._content.images[index] for index in indices)
        selection = copy.copy(self)
        selection._content = dataclasses.replace(self._content, images=images)
        selection._epoch = _shared_counter(int(self._epoch))
        return selection

    def to_coco(self) -> dict:
        """The annotations of exactly these images in COCO's format, crowd regions included, boxes unclipped."""
        return self._content.to_coco()

    def _item_seed(self, image_id: int) -> int:
        digest = hashlib.sha256(f"{self.options.seed} {int(self._epoch)} {image_id}".encode()).digest()
        return int.from_bytes(digest[:8], "big")

    def _load(self, record: ImageRecord) -> tv_tensors.Image:
        path = self.images / record.file_name
        where = record.where if str(path) in record.where else f"{record.where}: {path}"
        stored = (record.height, record.width) if self.options.transpose else (record.width, record.height)
        try:
            image = F.to_image(load_image(where, path, stored))
        except BadEntry as bad:
            raise DataError(str(bad)) from bad  # which a DataLoader's worker can hand on
        return tv_tensors.wrap(image.mT.contiguous(), like=image) if self.options.transpose else image


def _shared_counter(value: int = 0) -> torch.Tensor:
    return torch.tensor(value).share_memory_()


def _target(record: ImageRecord) -> dict:
    kept = ~record.iscrowd
    x, y, width, height = record.boxes[kept].T
    corners = np.stack((x, y, x + width, y + height), axis=1)
    corners = corners.clip(0, (record.width, record.height, record.width, record.height))
    target = {
        "boxes": tv_tensors.BoundingBoxes(
            torch.from_numpy(corners.astype(np.float32)),
            format="XYXY",
            canvas_size=(record.height, record.width),
        ),
        "labels": torch.from_numpy(record.labels[kept]),
        "image_id": record.id,
        "area": torch.from_numpy(record.area[kept].astype(np.float32)),
        "iscrowd": torch.zeros(int(kept.sum()), dtype=torch.int64),
    }
    if record.masks is not None:
        target["masks"] = tv_tensors.Mask(record.masks.decode(kept))
    return target


def collate(batch: Iterable[tuple[torch.Tensor, dict]]) -> tuple[list[torch.Tensor], list[dict]]:
    """A list of images and a list of targets: images of a batch need not have one size."""
    images, targets = zip(*batch, strict=True)
    return list(images), list(targets)
