"""Annotations of any format, checked entry by entry: what is kept, what is a defect, what is worth a note."""

import functools
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from tqdm import tqdm

from ...base.errors import short
from .annotations import CLIPPED, EMPTY, ROTATED, Annotation, CocoAnnotations, ImageRecord, Photo, RawData
from .defects import BadEntry, DataError, count, is_finite_number, is_positive_int, listed
from .images import check_image_file
from .masks import ImageMasks, encode

MIN_SIDE = 0.01  # pixels; of a box that is thinner nothing may be left in float32, and detectors refuse it in training


def check_annotations(
    raw: RawData, *, skip_bad: bool = False, decode: bool = False, masks: bool | None = False, progress: bool = True
) -> CocoAnnotations:
    """Turn what a parser found into records, and find every defect in it.

    Args:
        raw: what the parser found.
        skip_bad: leave out entries that can not be used, instead of raising.
        decode: decode every image, which tells those that are truncated, or of another size than annotated, or turned
            by EXIF. Else a file is only looked for.
        masks: read the objects' masks too; one without is a defect. None: read those that there are; one that can not
            be used is a defect, and its object stays, without a mask.
        progress: show a bar while images are decoded.

    Raises:
        DataError: there is no usable category or image, or no object has the mask that was asked for; without
            `skip_bad`, there is any defect: the message is the first one's and counts the others.
    """
    return _Checker(raw, skip_bad, masks).check(decode, progress)


class _Checker:
    """Checks one data set: an entry that can not be used raises `BadEntry`, which is noted down."""

    def __init__(self, raw: RawData, skip_bad: bool, masks: bool | None):
        self.raw, self.skip_bad, self.with_masks = raw, skip_bad, masks
        self.defects = list(raw.defects)
        self.notes = {CLIPPED: 0, ROTATED: 0, EMPTY: 0}
        self.listing = functools.cache(_list_folder)
        self.labels = {category_id: label for label, category_id in enumerate(raw.categories, start=1)}

    def check(self, decode: bool, progress: bool) -> CocoAnnotations:
        raw = self.raw
        if not raw.categories:
            raise DataError(f"{raw.path}: categories: expected at least one category, found none")
        if self.with_masks and raw.annotations and not raw.has_masks():
            number = len(raw.annotations)
            raise DataError(f"{raw.path}: segmentation: expected objects with masks, none of the {number:,} has one")
        images = self.images()
        if decode:
            images = self.decodable(images, progress)
        if not images:
            self.refuse_all()
        objects = self.objects(images)
        self.refuse()
        self.notes[EMPTY] = sum(not found for found in objects.values())
        records = tuple(self.record(images[key], found) for key, found in objects.items())
        notes = {key: number for key, number in self.notes.items() if number}
        return CocoAnnotations(
            tuple(raw.categories.values()), tuple(raw.categories), records, tuple(self.defects), notes
        )

    def refuse(self) -> None:
        """Raise for the first defect, unless it is to be left out."""
        if self.defects and not self.skip_bad:
            others = len(self.defects) - 1
            more = f" (and {others:,} more defect{'s' * (others > 1)}; nats data lists all)" if others else ""
            raise DataError(self.defects[0].message + more)

    def refuse_all(self) -> NoReturn:
        self.refuse()
        counts = f"; left out: {listed(count(self.defects))}" if self.defects else ""
        raise DataError(f"{self.raw.path}: images: expected at least one usable image, found none{counts}")

    def images(self) -> dict[int, Photo]:
        """The usable images by id."""
        images: dict[int, Photo] = {}
        for image in self.raw.images:
            try:
                if type(image.id) is not int:
                    raise BadEntry("bad id", f"{image.where}: id: expected an integer, found {short(image.id)}")
                if image.id in images:
                    raise BadEntry("duplicate id", f"{image.where}: id: expected each id once, it came before")
                self.check_image(image)
            except BadEntry as bad:
                self.defects.append(bad.defect())
            else:
                images[image.id] = image
        return images

    def check_image(self, image: Photo) -> None:
        where, name, folder = image.where, image.file_name, self.raw.folder
        if not isinstance(name, str) or not name:
            raise BadEntry("no file name", f"{where}: file_name: expected a file name, found {short(name)}")
        for key, value in (("width", image.width), ("height", image.height)):
            if not is_positive_int(value):
                raise BadEntry("no size", f"{where}: {key}: expected a positive number of pixels, found {short(value)}")
        if folder is not None:
            path = os.path.join(folder, name)
            if self.raw.is_confined and not _is_inside(name, folder):
                expected = f"a file in the images' folder {folder}"
                raise BadEntry("file outside folder", f"{where}: file_name: expected {expected}, found {short(name)}")
            if os.path.basename(path) not in self.listing(os.path.dirname(path)):
                raise BadEntry("missing image file", f"{where}: file_name: expected an image file {path!r}")

    def decodable(self, images: dict[int, Photo], progress: bool) -> dict[int, Photo]:
        """Those of the images that can be decoded and have the annotated size."""
        usable = {}
        # Pillow decodes without Python's lock. One bar is enough for several processes.
        hidden = not progress or int(os.environ.get("RANK") or 0) > 0
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
            looked = [pool.submit(self.is_turned, image) for image in images.values()]
            bar = tqdm(looked, desc="check images", delay=1, leave=False, disable=hidden)
            for image, found in zip(images.values(), bar, strict=True):
                try:
                    self.notes[ROTATED] += found.result()
                except BadEntry as bad:
                    self.defects.append(bad.defect())
                else:
                    usable[image.id] = image
        return usable

    def is_turned(self, image: Photo) -> bool:
        """Whether EXIF turns an image; BadEntry for one that can not be used."""
        path = os.path.join(self.raw.folder or "", image.file_name)
        where = image.where if path in image.where else f"{image.where}: {path}"
        return check_image_file(where, path, (image.width, image.height))

    def objects(self, images: dict[int, Photo]) -> dict[int, list[tuple[Annotation, bytes]]]:
        """The usable objects of each usable image, by its id, with their masks' run lengths, b"" for none."""
        # Also ids that are no usable ones: what refers to an image that is left out is no defect of its own
        known = {image.id for image in self.raw.images if type(image.id) in (int, str)}
        objects: dict[int, list[tuple[Annotation, bytes]]] = {image_id: [] for image_id in images}
        for item in self.raw.annotations:
            try:
                _choose(item.where, "image_id", item.image_id, known, (int, str))
                if image := images.get(item.image_id):
                    _choose(item.where, "category_id", item.category_id, self.labels)
                    objects[item.image_id].append((self.checked(item, image), self.mask(item, image)))
            except BadEntry as bad:
                self.defects.append(bad.defect())
        return objects

    def checked(self, item: Annotation, image: Photo) -> Annotation:
        """The object with the area and the crowd flag filled in."""
        where, box, iscrowd = item.where, item.box, item.iscrowd
        if not (isinstance(box, list) and len(box) == 4 and all(map(is_finite_number, box))):
            expected = "[x, y, width, height], four finite numbers"
            raise BadEntry("degenerate box", f"{where}: bbox: expected {expected}, found {short(box)}")
        x, y, width, height = box
        if min(width, height) < MIN_SIDE:
            expected = f"a width and a height above 0 (at least {MIN_SIDE} pixels)"
            raise BadEntry("degenerate box", f"{where}: bbox: expected {expected}, found {short(box)}")
        right, bottom = x + width, y + height
        if min(min(right, image.width) - max(x, 0), min(bottom, image.height) - max(y, 0)) < MIN_SIDE:
            expected = f"a box inside {image.width}x{image.height} pixels"
            raise BadEntry("box outside image", f"{where}: bbox: expected {expected}, found {short(box)}")
        area = width * height if item.area is None else item.area
        if not is_finite_number(area) or area < 0:
            raise BadEntry("bad area", f"{where}: area: expected square pixels, found {short(area)}")
        if iscrowd not in (0, 1):
            raise BadEntry("bad iscrowd", f"{where}: iscrowd: expected 0 or 1, found {short(iscrowd)}")
        self.notes[CLIPPED] += x < 0 or y < 0 or right > image.width or bottom > image.height
        return item._replace(area=area)

    def mask(self, item: Annotation, image: Photo) -> bytes:
        if self.with_masks:
            return encode(item.where, item.segmentation, image.height, image.width)
        if self.with_masks is None and item.segmentation not in (None, []):
            try:
                return encode(item.where, item.segmentation, image.height, image.width)
            except BadEntry as bad:
                self.defects.append(bad.defect())
        return b""

    def record(self, image: Photo, found: list[tuple[Annotation, bytes]]) -> ImageRecord:
        rows = [(*item.box, self.labels[item.category_id], item.area, item.iscrowd) for item, _ in found]
        table = np.array(rows, dtype=np.float64).reshape(-1, 7)
        masks = None
        if self.with_masks is not False:
            masks = ImageMasks(tuple(mask for _, mask in found), image.height, image.width)
        return ImageRecord(
            image.id,
            image.file_name,
            image.width,
            image.height,
            boxes=table[:, :4],
            labels=table[:, 4].astype(np.int64),
            area=table[:, 5],
            iscrowd=table[:, 6].astype(bool),
            masks=masks,
            where=image.where,
        )


def _is_inside(name: str, folder: Path) -> bool:
    """Whether a name stays in a folder as it is written; folders in it may be links to other disks."""
    if os.pardir in Path(name).parts:
        return False
    outer = os.path.join(os.path.abspath(folder), "")
    return not os.path.isabs(name) or os.path.normpath(name).startswith(outer)


def _list_folder(folder: str) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except (OSError, ValueError):  # ValueError: the name holds a null character
        return frozenset()


def _choose(where: str, key: str, value: Any, known: Iterable, types: tuple[type, ...] = (int,)) -> None:
    if type(value) not in types or value not in known:
        kind = key.removesuffix("_id")
        raise BadEntry(f"unknown {kind}", f"{where}: {key}: expected the id of a listed {kind}, found {short(value)}")
