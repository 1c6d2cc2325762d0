"""Reads all of a split, decodes every image, and keeps apart what can be used and what is wrong."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ...base.errors import NatsError
from ..data.annotations import ImageRecord, RawData
from ..data.checking import check_annotations
from ..data.defects import BadEntry, Defect
from ..data.masks import encode
from ..data.opening import Format, read_split

HELD_APART = ("train", "val", "valid", "validation", "test")
"""Splits of which no image should be in two."""

Row = tuple[float, ...]
"""The label and the box of an object: by it an annotation is found again among those that were checked."""


class CheckedSplit(NamedTuple):
    """A split as it was read, and what of it can be used.

    Attributes:
        split: Its name.
        defects: Of every image and object that can not be used.
        raw: Unchecked; None if the split can not be read at all.
        classes: Names; label l is `classes[l - 1]`.
        category_ids: Label l is that of `category_ids[l - 1]`.
        records: Of the images that can be decoded.
        clipped: Boxes partly outside their image.
        turned: Images that EXIF turns or mirrors for display.
        mask_count: Objects with a mask that can be used.
    """

    split: str
    defects: list[Defect]
    raw: RawData | None = None
    classes: tuple[str, ...] = ()
    category_ids: tuple[int, ...] = ()
    records: tuple[ImageRecord, ...] = ()
    clipped: int = 0
    turned: int = 0
    mask_count: int = 0

    def _readable(self) -> RawData:
        assert self.raw is not None, "a split that can not be read has no records to ask about"
        return self.raw

    def files(self) -> set[str]:
        """The files of the images that can be used."""
        folder = self._readable().folder or ""
        return {os.path.realpath(os.path.join(folder, record.file_name)) for record in self.records}

    def masks(self, record: ImageRecord) -> dict[Row, bytes]:
        """The run lengths of an image's masks, of the objects that have one, by `row`."""
        return {row: counts for _, row, counts in self._masks([record]) if isinstance(counts, bytes)}

    def check_masks(self) -> tuple[int, list[Defect]]:
        """How many of the objects have masks that can be used, and the defects of those that can not."""
        found = [mask for _, _, mask in self._masks(self.records)]
        bad = [mask.defect() for mask in found if isinstance(mask, BadEntry)]
        return len(found) - len(bad), bad

    def _masks(self, records: Sequence[ImageRecord]) -> Iterator[tuple[ImageRecord, Row, bytes | BadEntry]]:
        labels = {category_id: label for label, category_id in enumerate(self.category_ids, start=1)}
        by_id = {record.id: (record, set(rows(record))) for record in records}
        raw = self._readable()
        for entry in raw.annotations:
            image_id = entry.get("image_id")
            if not entry.get("segmentation") or type(image_id) is not int or image_id not in by_id:
                continue
            record, kept = by_id[image_id]
            if (row := _row(entry, labels)) in kept:
                yield record, row, _encode(raw, entry, record)


def rows(record: ImageRecord) -> list[Row]:
    """A row for each object of an image."""
    return [(int(label), *box) for label, box in zip(record.labels, record.boxes.tolist(), strict=True)]


def _row(entry: dict, labels: dict[int, int]) -> Row | None:
    try:
        return (labels[entry["category_id"]], *map(float, entry["bbox"]))
    except (KeyError, TypeError, ValueError, OverflowError):  # one that was left out
        return None


def _encode(raw: RawData, entry: dict, record: ImageRecord) -> bytes | BadEntry:
    where = entry.get("where", f"{raw.path}: annotation {entry.get('id')}")
    try:
        return encode(where, entry["segmentation"], record.height, record.width)
    except BadEntry as bad:
        return bad


def check_split(
    root: Path, split: str, format: Format, images: str | Path | None = None, is_required: bool = False
) -> CheckedSplit:
    """Reads a split and decodes all of its images, with a progress bar.

    Args:
        root, split, format, images: As for `formats.read_split`.
        is_required: Raise if the split can not be read at all; by default that is one of its defects.

    Raises:
        DataError: If the split is required and can not be read.
    """
    try:
        raw = read_split(root, split, format, images)
    except NatsError as error:
        if is_required:
            raise
        return CheckedSplit(split, [Defect("unusable split", str(error))])
    try:
        content = check_annotations(raw, skip_bad=True, decode=True)
    except NatsError as error:
        return CheckedSplit(split, [*raw.defects, Defect("unusable split", str(error))], raw)
    checked = CheckedSplit(
        split,
        list(content.defects),
        raw,
        content.classes,
        content.category_ids,
        content.images,
        content.clipped,
        content.turned,
    )
    number, bad_masks = checked.check_masks()
    return checked._replace(defects=[*checked.defects, *bad_masks], mask_count=number)
