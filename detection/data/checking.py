"""Annotations of any format, checked entry by entry: what is kept, what is a defect, what is worth a note."""

import functools
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from tqdm import tqdm

from .annotations import CLIPPED, EMPTY, ROTATED, CocoAnnotations, ImageRecord, RawData
from .defects import BadEntry, DataError, Defect, count, is_finite_number, is_positive_int, listed, show
from .images import check_image_file
from .masks import ImageMasks, encode

MIN_SIDE = 0.01


def check_annotations(
    raw: RawData, skip_bad: bool = False, decode: bool = False, masks: bool = False, progress: bool = True
) -> CocoAnnotations:
    """Turns what a parser found into records, and finds every defect in it.

    Args:
        raw: What the parser found.
        skip_bad: Leave out entries that can not be used, instead of raising.
        decode: Decode every image, which tells those that are truncated, or of another size than annotated, or turned
            by EXIF. Else a file is only looked for.
        masks: Read the objects' masks too; one without is a defect.
        progress: Show a bar while images are decoded.

    Raises:
        DataError: If there is no usable category or image, or no object has the mask that was asked for; without
            `skip_bad`, if there is any defect: the message is the first one's and counts the others.
    """
    return _Checker(raw, skip_bad, masks).check(decode, progress)


class _Checker:
    """Checks one data set: an entry that can not be used raises `BadEntry`, which is noted down."""

    def __init__(self, raw: RawData, skip_bad: bool, masks: bool):
        self.path = raw.path
        self.raw = raw
        self.skip_bad = skip_bad
        self.with_masks = masks
        self.defects = list(raw.defects)
        self.notes = {CLIPPED: 0, ROTATED: 0, EMPTY: 0}
        self.listing = functools.cache(_list_folder)

    def check(self, decode: bool, progress: bool) -> CocoAnnotations:
        names = self.categories()
        self.require_masks()
        images = self.images()
        if decode:
            images = self.decodable(images, progress)
        if not images:
            self.refuse_all()
        labels = {category_id: label for label, category_id in enumerate(names, start=1)}
        rows, masks = self.annotations(images, labels)
        self.refuse()
        self.notes[EMPTY] = sum(not found for found in rows.values())
        records = tuple(self.record(image, rows[key], masks.get(key)) for key, image in images.items())
        notes = {key: number for key, number in self.notes.items() if number}
        return CocoAnnotations(tuple(names.values()), tuple(names), records, tuple(self.defects), notes)

    def refuse(self) -> None:
        """Raises for the first defect, unless it is to be left out."""
        if not self.defects or self.skip_bad:
            return
        others = len(self.defects) - 1
        more = f" (and {others:,} more defect{'s' * (others > 1)}; nats data lists all)" if others else ""
        raise DataError(self.defects[0].message + more)

    def refuse_all(self) -> NoReturn:
        self.refuse()
        counts = f"; left out: {listed(count(self.defects))}" if self.defects else ""
        raise DataError(f"{self.path}: images: expected at least one usable image, got none{counts}")

    def categories(self) -> dict[int, str]:
        """Returns names by id, in order of id."""
        names: dict[int, str] = {}
        for index, entry in enumerate(self.raw.categories):
            where = f"{self.path}: categories[{index}]"
            category_id, name = entry.get("id"), entry.get("name")
            if not is_positive_int(category_id):
                raise DataError(f"{where}: id: expected a positive integer, got {show(category_id)}")
            if not isinstance(name, str) or not name:
                raise DataError(f"{where}: name: expected a name, got {show(name)}")
            if category_id in names or name in names.values():
                raise DataError(f"{where}: expected an id and a name of its own, {category_id} or {name!r} is taken")
            names[category_id] = name
        if not names:
            raise DataError(f"{self.path}: categories: expected at least one category, got none")
        return dict(sorted(names.items()))

    def require_masks(self) -> None:
        if self.with_masks and self.raw.annotations and not self.raw.has_masks():
            number = len(self.raw.annotations)
            raise DataError(f"{self.path}: segmentation: expected objects with masks, none of the {number:,} has one")

    def images(self) -> dict[int, dict]:
        """Returns the usable entries by id."""
        images: dict[int, dict] = {}
        for index, entry in enumerate(self.raw.images):
            try:
                self.check_image(self.identify("image", index, entry, images), entry)
            except BadEntry as bad:
                self.defects.append(bad.defect())
            else:
                images[entry["id"]] = entry
        return images

    def decodable(self, images: dict[int, dict], progress: bool) -> dict[int, dict]:
        """Returns those of the images that can be decoded and have the annotated size."""
        # Pillow decodes without Python's lock. One bar is enough for several processes.
        hidden = not progress or int(os.environ.get("RANK") or 0) > 0
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
            found = pool.map(self.look_into, images.values())
            bar = tqdm(found, desc="check images", total=len(images), delay=1, leave=False, disable=hidden)
            findings = dict(zip(images, bar, strict=True))
        self.defects += [finding for finding in findings.values() if isinstance(finding, Defect)]
        self.notes[ROTATED] = sum(finding is True for finding in findings.values())
        return {key: image for key, image in images.items() if not isinstance(findings[key], Defect)}

    def look_into(self, entry: dict) -> Defect | bool:
        """Returns what is wrong with an image's file, or whether EXIF turns it."""
        path = os.path.join(self.raw.folder or "", entry["file_name"])
        name = self.name("image", entry)
        try:
            return check_image_file(
                name if path in name else f"{name}: {path}", path, (entry["width"], entry["height"])
            )
        except BadEntry as bad:
            return bad.defect()

    def annotations(
        self, images: dict[int, dict], labels: dict[int, int]
    ) -> tuple[dict[int, list[tuple]], dict[int, list[bytes]]]:
        """Returns a row (x, y, width, height, label, area, iscrowd) and a mask per usable entry, by image id."""
        # Also ids that are no usable ones: what refers to an image that is left out is no defect of its own
        known = {entry["id"] for entry in self.raw.images if type(entry.get("id")) in (int, str)}
        rows: dict[int, list[tuple]] = {image_id: [] for image_id in images}
        masks: dict[int, list[bytes]] = {image_id: [] for image_id in images} if self.with_masks else {}
        taken: set[int] = set()
        for index, entry in enumerate(self.raw.annotations):
            try:
                where = self.identify("annotation", index, entry, taken)
                taken.add(entry["id"])
                image_id = _choose("image_id", where, entry, known, (int, str))
                if image := images.get(image_id):
                    row = _row(where, entry, image, labels)
                    if self.with_masks:
                        masks[image_id].append(
                            encode(where, entry.get("segmentation"), image["height"], image["width"])
                        )
                    rows[image_id].append(row)
                    self.notes[CLIPPED] += _juts_out(row, image)
            except BadEntry as bad:
                self.defects.append(bad.defect())
        return rows, masks

    def identify(self, kind: str, index: int, entry: dict, taken: Iterable[int]) -> str:
        """Returns how messages name the entry."""
        identity = entry.get("id")
        if type(identity) is not int:
            where = entry.get("where") or f"{self.path}: {kind}s[{index}]"
            raise BadEntry("bad id", f"{where}: id: expected an integer, got {show(identity)}")
        where = self.name(kind, entry)
        if identity in taken:
            raise BadEntry("duplicate id", f"{where}: id: expected each id once, it came before")
        return where

    def name(self, kind: str, entry: dict) -> str:
        return entry.get("where") or f"{self.path}: {kind} {entry['id']}"

    def check_image(self, where: str, entry: dict) -> None:
        name = entry.get("file_name")
        if not isinstance(name, str) or not name:
            raise BadEntry("no file name", f"{where}: file_name: expected a file name, got {show(name)}")
        for key in ("width", "height"):
            if not is_positive_int(entry.get(key)):
                found = show(entry.get(key))
                raise BadEntry("no size", f"{where}: {key}: expected a positive number of pixels, got {found}")
        if self.raw.folder is not None:
            path = os.path.join(self.raw.folder, name)
            if self.raw.is_confined and not _is_inside(name, self.raw.folder):
                expected = f"a file in the images' folder {self.raw.folder}"
                raise BadEntry("file outside folder", f"{where}: file_name: expected {expected}, got {show(name)}")
            if os.path.basename(path) not in self.listing(os.path.dirname(path)):
                raise BadEntry("missing image file", f"{where}: file_name: expected an image file {path!r}")

    def record(self, image: dict, rows: list[tuple], masks: list[bytes] | None) -> ImageRecord:
        table = np.array(rows, dtype=np.float64).reshape(-1, 7)
        width, height = image["width"], image["height"]
        return ImageRecord(
            id=image["id"],
            file_name=image["file_name"],
            width=width,
            height=height,
            boxes=table[:, :4],
            labels=table[:, 4].astype(np.int64),
            area=table[:, 5],
            iscrowd=table[:, 6].astype(bool),
            masks=None if masks is None else ImageMasks(tuple(masks), height, width),
            where=self.name("image", image),
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


def _row(where: str, entry: dict, image: dict, labels: dict[int, int]) -> tuple:
    label = labels[_choose("category_id", where, entry, labels)]
    x, y, width, height = _box(where, entry)
    visible = _visible(x, width, image["width"]), _visible(y, height, image["height"])
    if min(visible) < MIN_SIDE:
        inside = f"a box inside {image['width']}x{image['height']} pixels"
        raise BadEntry("box outside image", f"{where}: bbox: expected {inside}, got {show(entry['bbox'])}")
    return x, y, width, height, label, _area(where, entry, width * height), _iscrowd(where, entry)


def _choose(key: str, where: str, entry: dict, known: Iterable, types: tuple[type, ...] = (int,)) -> Any:
    value = entry.get(key)
    if type(value) not in types or value not in known:
        kind = key.removesuffix("_id")
        raise BadEntry(f"unknown {kind}", f"{where}: {key}: expected the id of a listed {kind}, got {show(value)}")
    return value


def _box(where: str, entry: dict) -> list[float]:
    box = entry.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(map(is_finite_number, box))):
        expected = "[x, y, width, height], four finite numbers"
        raise BadEntry("degenerate box", f"{where}: bbox: expected {expected}, got {show(box)}")
    if min(box[2:]) < MIN_SIDE:
        expected = f"a width and a height above 0 (at least {MIN_SIDE} pixels)"
        raise BadEntry("degenerate box", f"{where}: bbox: expected {expected}, got {show(box)}")
    return box


def _visible(start: float, extent: float, limit: int) -> float:
    return min(start + extent, limit) - max(start, 0)


def _juts_out(row: tuple, image: dict) -> bool:
    x, y, width, height = row[:4]
    return x < 0 or y < 0 or x + width > image["width"] or y + height > image["height"]


def _area(where: str, entry: dict, box_area: float) -> float:
    area = entry.get("area", box_area)
    if not is_finite_number(area) or area < 0:
        raise BadEntry("bad area", f"{where}: area: expected square pixels, got {show(area)}")
    return area


def _iscrowd(where: str, entry: dict) -> bool:
    iscrowd = entry.get("iscrowd", 0)
    if iscrowd not in (0, 1):
        raise BadEntry("bad iscrowd", f"{where}: iscrowd: expected 0 or 1, got {show(iscrowd)}")
    return bool(iscrowd)
