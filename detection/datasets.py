"""COCO-layout data sets, read strictly, for torchvision detectors.

A data set is an annotation file in COCO's JSON format and a folder of images. Every entry is checked while the file is
read: what training or evaluation would stumble over later is a `DataError` that names the file and the entry, or, on
request, is left out and counted.
"""

import copy
import dataclasses
import functools
import hashlib
import json
import os
import re
import reprlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from ..errors import NatsError
from ..files import read_json
from .augment import eval_transforms

MIN_SIDE = 0.01
"""Pixels. A box whose visible part is thinner can lose it in float32, and detectors refuse such boxes in training."""


class DataError(NatsError):
    """A data set or a results file that can not be used."""

    def __init__(self, message: str):
        if message.startswith("Caught "):
            # A DataLoader hands on its worker's error as a whole traceback in one string; the error itself ends it.
            message = message.rpartition("DataError: ")[2].rstrip()
        super().__init__(message)


class _BadEntry(DataError):
    """An image or annotation that can not be used; `reason` is what it is counted under when it is left out."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def find_split(root: str | Path, split: str, images: str | Path | None = None) -> tuple[Path, Path]:
    """Finds the annotation file and the image folder of one split of a COCO-layout data set.

    Args:
        root: Folder that holds `annotations/instances_{split}.json`.
        split: For instance "train", "val" or "train2017".
        images: Image folder, relative to `root` or absolute. Default: the first of `{split}`, `images`,
            `images/{split}`, `JPEGImages` and `root` itself in which the annotation file's first image lies.

    Raises:
        DataError: If one of the two is not there.
    """
    root = Path(root)
    annotations = root / "annotations" / f"instances_{split}.json"
    if not annotations.is_file():
        raise DataError(f"{root}: split {split!r}: expected an annotation file {annotations}")
    if images is None:
        return annotations, _find_images(root, split, annotations)
    if not (root / images).is_dir():
        raise DataError(f"{root}: images: expected a folder {root / images}")
    return annotations, root / images


def _find_images(root: Path, split: str, annotations: Path) -> Path:
    first = _first_file_name(annotations)
    folders = [root / split, root / "images", root / "images" / split, root / "JPEGImages", root]
    for folder in folders:
        if (folder / first).is_file():
            return folder
    looked = ", ".join(map(str, folders))
    raise DataError(f"{annotations}: file_name: {first!r} lies in none of the folders {looked}")


def _first_file_name(annotations: Path) -> str:
    """Searches the text: to parse all of a file as large as COCO's takes a quarter of a minute and gigabytes."""
    match = re.search(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)+")', annotations.read_bytes())
    if match is None:
        raise DataError(f"{annotations}: images: expected at least one image with a file_name, found none")
    try:
        return json.loads(match[1])
    except ValueError as error:
        raise DataError(f"{annotations}: file_name: expected a JSON string: {error}") from error


def _entries(path: Path, data: object, key: str) -> list[dict]:
    if not isinstance(data, dict):
        raise DataError(f"{path}: expected an object with images, annotations and categories, got {_show(data)}")
    entries = data.get(key)
    if not isinstance(entries, list):
        raise DataError(f"{path}: {key}: expected a list of objects, got {_show(entries)}")
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise DataError(f"{path}: {key}[{index}]: expected an object, got {_show(entry)}")
    return entries


def _file_name(where: str, entry: dict) -> str:
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        raise _BadEntry("no file name", f"{where}: file_name: expected a file name, got {_show(name)}")
    return name


def _show(value: object) -> str:
    return "nothing" if value is None else reprlib.repr(value)


def is_finite_number(value: object) -> bool:
    """Whether a JSON value is a number, neither NaN nor infinite nor beyond float64."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_positive_int(value: object) -> bool:
    return type(value) is int and value > 0


@dataclasses.dataclass(frozen=True)
class ImageRecord:
    """One annotated image.

    Attributes:
        id: COCO's image id.
        file_name: Relative to the image folder.
        width: Pixels.
        height: Pixels.
        boxes: (N, 4) float64, x, y, width, height in pixels, as the file gives them.
        labels: (N,) int64, 1..K.
        area: (N,) float64, square pixels: the annotated area, else the box's.
        iscrowd: (N,) bool.
    """

    id: int
    file_name: str
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    area: np.ndarray
    iscrowd: np.ndarray

    def transposed(self) -> "ImageRecord":
        """Returns the record of the image with rows and columns swapped."""
        boxes = self.boxes[:, [1, 0, 3, 2]]
        return dataclasses.replace(self, width=self.height, height=self.width, boxes=boxes)


@dataclasses.dataclass(frozen=True)
class CocoAnnotations:
    """What an annotation file holds.

    Attributes:
        classes: Names in order of category id; label l is `classes[l - 1]`.
        category_ids: The file's own ids, ascending.
        images: In the file's order.
        skipped: How many images and annotations were left out, by reason. Annotations of an image that was left out
            are not counted besides it.
        clipped: How many boxes lie partly outside their image.
    """

    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    images: tuple[ImageRecord, ...]
    skipped: dict[str, int]
    clipped: int

    def transposed(self) -> "CocoAnnotations":
        """Returns the annotations of all images with rows and columns swapped."""
        return dataclasses.replace(self, images=tuple(image.transposed() for image in self.images))

    def to_coco(self) -> dict:
        """Returns the content in COCO's format: boxes unclipped, annotation ids from 1, area and iscrowd filled in."""
        annotations = (annotation for image in self.images for annotation in self._annotations(image))
        return {
            "images": [
                {"id": i.id, "file_name": i.file_name, "width": i.width, "height": i.height} for i in self.images
            ],
            "annotations": [{"id": number, **annotation} for number, annotation in enumerate(annotations, start=1)],
            "categories": [{"id": i, "name": name} for i, name in zip(self.category_ids, self.classes, strict=True)],
        }

    def _annotations(self, image: ImageRecord) -> Iterator[dict]:
        for box, label, area, crowd in zip(image.boxes, image.labels, image.area, image.iscrowd, strict=True):
            yield {
                "image_id": image.id,
                "category_id": self.category_ids[label - 1],
                "bbox": box.tolist(),
                "area": float(area),
                "iscrowd": int(crowd),
            }


def read_annotations(path: str | Path, images: str | Path | None = None, skip_bad: bool = False) -> CocoAnnotations:
    """Reads and checks an annotation file in COCO's JSON format.

    Args:
        path: The annotation file.
        images: Folder in which every image must exist; by default none is looked for.
        skip_bad: Leave out and count images and annotations that can not be used, instead of raising.

    Raises:
        DataError: If the file, or without `skip_bad` one of its entries, can not be used.
    """
    return _Reader(Path(path), images, skip_bad).read()


class _Reader:
    """Reads one annotation file: an entry that can not be used raises `_BadEntry`, or is counted."""

    def __init__(self, path: Path, folder: str | Path | None, skip_bad: bool):
        self.path = path
        self.folder = folder
        self.skip_bad = skip_bad
        self.skipped: Counter[str] = Counter()
        self.clipped = 0
        self.listing = functools.cache(_list_folder)

    def read(self) -> CocoAnnotations:
        data = read_json(self.path, DataError)
        image_entries = _entries(self.path, data, "images")
        annotation_entries = _entries(self.path, data, "annotations")
        names = self.categories(_entries(self.path, data, "categories"))
        images = self.images(image_entries)
        listed = {entry["id"] for entry in image_entries if type(entry.get("id")) is int}
        labels = {category_id: label for label, category_id in enumerate(names, start=1)}
        rows = self.annotations(annotation_entries, images, listed, labels)
        records = tuple(_record(image, rows[image_id]) for image_id, image in images.items())
        return CocoAnnotations(tuple(names.values()), tuple(names), records, dict(self.skipped), self.clipped)

    def reject(self, bad: _BadEntry) -> None:
        if not self.skip_bad:
            raise bad
        self.skipped[bad.reason] += 1

    def categories(self, entries: list[dict]) -> dict[int, str]:
        """Returns names by id, in order of id."""
        names: dict[int, str] = {}
        for index, entry in enumerate(entries):
            where = f"{self.path}: categories[{index}]"
            category_id, name = entry.get("id"), entry.get("name")
            if not _is_positive_int(category_id):
                raise DataError(f"{where}: id: expected a positive integer, got {_show(category_id)}")
            if not isinstance(name, str) or not name:
                raise DataError(f"{where}: name: expected a name, got {_show(name)}")
            if category_id in names or name in names.values():
                raise DataError(f"{where}: expected an id and a name of its own, {category_id} or {name!r} is taken")
            names[category_id] = name
        if not names:
            raise DataError(f"{self.path}: categories: expected at least one category, got none")
        return dict(sorted(names.items()))

    def images(self, entries: list[dict]) -> dict[int, dict]:
        """Returns the usable entries by id."""
        images: dict[int, dict] = {}
        for index, entry in enumerate(entries):
            try:
                where = self.identify("image", index, entry, images)
                self.check_image(where, entry)
            except _BadEntry as bad:
                self.reject(bad)
            else:
                images[entry["id"]] = entry
        if not images:
            left_out = "".join(f"; left out: {count} with {reason}" for reason, count in self.skipped.items())
            raise DataError(f"{self.path}: images: expected at least one usable image, got none{left_out}")
        return images

    def annotations(
        self, entries: list[dict], images: dict[int, dict], listed: set[int], labels: dict[int, int]
    ) -> dict[int, list[tuple]]:
        """Returns a row (x, y, width, height, label, area, iscrowd) for each usable entry, by image id."""
        rows: dict[int, list[tuple]] = {image_id: [] for image_id in images}
        taken: set[int] = set()
        for index, entry in enumerate(entries):
            try:
                where = self.identify("annotation", index, entry, taken)
                taken.add(entry["id"])
                image_id = _choose("image_id", where, entry, listed)
                if image_id in images:
                    rows[image_id].append(self.row(where, entry, images[image_id], labels))
            except _BadEntry as bad:
                self.reject(bad)
        return rows

    def identify(self, kind: str, index: int, entry: dict, taken: Iterable[int]) -> str:
        """Returns how messages name the entry."""
        identity = entry.get("id")
        if type(identity) is not int:
            raise _BadEntry("bad id", f"{self.path}: {kind}s[{index}]: id: expected an integer, got {_show(identity)}")
        if identity in taken:
            raise _BadEntry(
                "duplicate id", f"{self.path}: {kind} {identity}: id: expected each id once, it came before"
            )
        return f"{self.path}: {kind} {identity}"

    def check_image(self, where: str, entry: dict) -> None:
        name = _file_name(where, entry)
        for key in ("width", "height"):
            if not _is_positive_int(entry.get(key)):
                found = _show(entry.get(key))
                raise _BadEntry("no size", f"{where}: {key}: expected a positive number of pixels, got {found}")
        if self.folder is not None:
            path = os.path.join(self.folder, name)
            if os.path.basename(path) not in self.listing(os.path.dirname(path)):
                raise _BadEntry("missing image file", f"{where}: file_name: expected an image file {path!r}")

    def row(self, where: str, entry: dict, image: dict, labels: dict[int, int]) -> tuple:
        label = labels[_choose("category_id", where, entry, labels)]
        x, y, width, height = _box(where, entry)
        visible = _visible(x, width, image["width"]), _visible(y, height, image["height"])
        if min(visible) < MIN_SIDE:
            inside = f"a box inside {image['width']}x{image['height']} pixels"
            raise _BadEntry("box outside image", f"{where}: bbox: expected {inside}, got {_show(entry['bbox'])}")
        row = (x, y, width, height, label, _area(where, entry, width * height), _iscrowd(where, entry))
        self.clipped += x < 0 or y < 0 or x + width > image["width"] or y + height > image["height"]
        return row


def _list_folder(folder: str) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except (OSError, ValueError):  # ValueError: the name holds a null character
        return frozenset()


def _choose(key: str, where: str, entry: dict, known: Iterable[int]) -> int:
    value = entry.get(key)
    if type(value) is not int or value not in known:
        kind = key.removesuffix("_id")
        raise _BadEntry(f"unknown {kind}", f"{where}: {key}: expected the id of a listed {kind}, got {_show(value)}")
    return value


def _box(where: str, entry: dict) -> list[float]:
    box = entry.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(map(is_finite_number, box))):
        expected = "[x, y, width, height], four finite numbers"
        raise _BadEntry("degenerate box", f"{where}: bbox: expected {expected}, got {_show(box)}")
    if min(box[2:]) < MIN_SIDE:
        expected = f"a width and a height above 0 (at least {MIN_SIDE} pixels)"
        raise _BadEntry("degenerate box", f"{where}: bbox: expected {expected}, got {_show(box)}")
    return box


def _visible(start: float, extent: float, limit: int) -> float:
    return min(start + extent, limit) - max(start, 0)


def _area(where: str, entry: dict, box_area: float) -> float:
    area = entry.get("area", box_area)
    if not is_finite_number(area) or area < 0:
        raise _BadEntry("bad area", f"{where}: area: expected square pixels, got {_show(area)}")
    return area


def _iscrowd(where: str, entry: dict) -> bool:
    iscrowd = entry.get("iscrowd", 0)
    if iscrowd not in (0, 1):
        raise _BadEntry("bad iscrowd", f"{where}: iscrowd: expected 0 or 1, got {_show(iscrowd)}")
    return bool(iscrowd)


def _record(image: dict, rows: list[tuple]) -> ImageRecord:
    table = np.array(rows, dtype=np.float64).reshape(-1, 7)
    return ImageRecord(
        id=image["id"],
        file_name=image["file_name"],
        width=image["width"],
        height=image["height"],
        boxes=table[:, :4],
        labels=table[:, 4].astype(np.int64),
        area=table[:, 5],
        iscrowd=table[:, 6].astype(bool),
    )


class CocoDataset(Dataset):
    """Images with boxes from a COCO annotation file, as torchvision's detectors take them.

    An item is `(image, target)`: a `tv_tensors.Image`, (3, H, W) float32 RGB in 0..1, and a dict of

    - boxes: `tv_tensors.BoundingBoxes`, (N, 4) float32, x1, y1, x2, y2 in pixels, clipped to the image, N may be 0;
    - labels: (N,) int64, 1..K, where label l is `classes[l - 1]` (0 is the background);
    - image_id: COCO's image id, an int;
    - area: (N,) float32, square pixels;
    - iscrowd: (N,) int64, zeros: crowd regions are left to evaluation.

    Pixels are taken as the file stores them (an EXIF orientation is not applied), because that is what boxes in COCO
    refer to.

    Args:
        annotations: The annotation file.
        images: Folder to which the annotated file names are relative.
        transforms: Takes and returns (image, target); sees the image as uint8 and has to leave it float32 in 0..1.
            Its randomness must be torch's. Default: `eval_transforms()`.
        skip_bad: Leave out and count (`skipped`) entries that can not be used, instead of raising.
        seed: With the epoch and the image id it determines all randomness of an item.
        transpose: Swap rows and columns of all images and boxes before anything else, in `to_coco()` too: as if the
            files held the transposed images.

    Raises:
        DataError: If the file or, without `skip_bad`, one of its entries can not be used; from `[]`, if an image can
            not be decoded or its size is not the annotated one.
    """

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path,
        transforms: Callable | None = None,
        skip_bad: bool = False,
        seed: int = 0,
        transpose: bool = False,
    ):
        self.annotations = Path(annotations)
        self.images = Path(images)
        self.transforms = eval_transforms() if transforms is None else transforms
        self.seed = seed
        self.transpose = transpose
        content = read_annotations(annotations, images, skip_bad)
        self._content = content.transposed() if transpose else content
        self._epoch = _shared_counter()

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
    def clipped(self) -> int:
        """How many boxes of the file lie partly outside their image."""
        return self._content.clipped

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
        """Changes the randomness of all items; reaches the workers of a running DataLoader too."""
        self._epoch.fill_(epoch)

    def select(self, indices: Iterable[int]) -> "CocoDataset":
        """Returns a data set of the same file with only these items; it keeps an epoch of its own."""
        images = tuple(self._content.images[index] for index in indices)
        selection = copy.copy(self)
        selection._content = dataclasses.replace(self._content, images=images)
        selection._epoch = _shared_counter(int(self._epoch))
        return selection

    def to_coco(self) -> dict:
        """Returns the annotations of exactly these images in COCO's format, crowd regions included, boxes unclipped."""
        return self._content.to_coco()

    def _item_seed(self, image_id: int) -> int:
        digest = hashlib.sha256(f"{self.seed} {int(self._epoch)} {image_id}".encode()).digest()
        return int.from_bytes(digest[:8], "big")

    def _load(self, record: ImageRecord) -> tv_tensors.Image:
        path = self.images / record.file_name
        where = f"{self.annotations}: image {record.id}: {path}"
        image = F.to_image(_decode(where, path))
        height, width = image.shape[-2:]
        stored = record.transposed() if self.transpose else record
        if (width, height) != (stored.width, stored.height):
            expected = f"{stored.width}x{stored.height} pixels as annotated"
            raise DataError(f"{where}: expected {expected}, the file stores {width}x{height}")
        return tv_tensors.wrap(image.mT.contiguous(), like=image) if self.transpose else image


def _shared_counter(value: int = 0) -> torch.Tensor:
    return torch.tensor(value).share_memory_()


def _decode(where: str, path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:  # Pillow raises nearly anything on broken files: OSError, SyntaxError, TypeError ...
        raise DataError(f"{where}: can not be decoded: {error}") from error
    if image.mode in ("I", "F") or image.mode.startswith("I;"):  # Pillow would clip these at 255
        raise DataError(f"{where}: expected 8 bits per channel, got Pillow's mode {image.mode!r}")
    return image.convert("RGB")


def _target(record: ImageRecord) -> dict:
    kept = ~record.iscrowd
    x, y, width, height = record.boxes[kept].T
    corners = np.stack((x, y, x + width, y + height), axis=1)
    corners = corners.clip(0, (record.width, record.height, record.width, record.height))
    return {
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


def collate(batch: Iterable[tuple[torch.Tensor, dict]]) -> tuple[list[torch.Tensor], list[dict]]:
    """Returns a list of images and a list of targets: images of a batch need not have one size."""
    images, targets = zip(*batch, strict=True)
    return list(images), list(targets)
