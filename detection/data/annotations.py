"""Annotations of detection data sets: as a parser finds them, and checked, as records that can be used.

A parser, one per format, turns files into `RawData`. `check_annotations` looks at every entry of it. What training or
evaluation would stumble over later is a `Defect` that names the file and the entry; it is refused, or, on request,
left out and counted.
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .defects import Defect, count
from .masks import ImageMasks

CLIPPED, ROTATED, EMPTY = "boxes clipped", "EXIF rotation", "images without objects"  # keys of notes


class Photo(NamedTuple):
    """One image as a parser found it; what it took from a file is unchecked.

    Attributes:
        where: how messages name it.
        id: COCO's image id.
        file_name: relative to the image folder.
        width: pixels.
        height: pixels.
    """

    where: str
    id: Any
    file_name: Any
    width: Any
    height: Any


class Annotation(NamedTuple):
    """One object as a parser found it; what it took from a file is unchecked.

    Attributes:
        where: how messages name it.
        image_id: of its `Photo`.
        category_id: a key of the categories.
        box: x, y, width, height in pixels.
        area: square pixels; None: the box's.
        iscrowd: 1 for a region of several objects, or one that nobody has to find.
        segmentation: its mask in COCO's terms, see `masks.encode`.
    """

    where: str
    image_id: Any
    category_id: Any
    box: Any
    area: Any = None
    iscrowd: Any = 0
    segmentation: Any = None


@dataclasses.dataclass
class RawData:
    """What a parser found, unchecked.

    Attributes:
        path: the file or folder that was read, for messages.
        folder: of the images; None: no image is looked for.
        images: in the order that the data set keeps.
        annotations: of all images.
        categories: names by id, in order of id.
        defects: what the parser itself could not use.
        is_confined: whether the images' names come from a file, which must not lead out of `folder`.
    """

    path: Path
    folder: Path | None
    images: list[Photo]
    annotations: list[Annotation]
    categories: dict[int, str]
    defects: list[Defect] = dataclasses.field(default_factory=list)
    is_confined: bool = False

    def has_masks(self) -> bool:
        """Whether any object has a segmentation; exporters of boxes alone often leave an empty list."""
        return any(each.segmentation not in (None, []) for each in self.annotations)


@dataclasses.dataclass(frozen=True)
class ImageRecord:
    """One annotated image.

    Attributes:
        id: COCO's image id.
        file_name: relative to the image folder.
        width: pixels.
        height: pixels.
        boxes: (N, 4) float64, x, y, width, height in pixels, as the file gives them.
        labels: (N,) int64, 1..K.
        area: (N,) float64, square pixels: the annotated area, else the box's.
        iscrowd: (N,) bool.
        masks: of the N objects; None where they were not asked for.
        where: how messages name the image.
    """

    id: int
    file_name: str
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    area: np.ndarray
    iscrowd: np.ndarray
    masks: ImageMasks | None = None
    where: str = ""

    def transposed(self) -> "ImageRecord":
        """The record of the image with rows and columns swapped."""
        boxes = self.boxes[:, [1, 0, 3, 2]]
        masks = None if self.masks is None else self.masks.transposed()
        return dataclasses.replace(self, width=self.height, height=self.width, boxes=boxes, masks=masks)


@dataclasses.dataclass(frozen=True)
class CocoAnnotations:
    """What a data set holds, checked.

    Attributes:
        classes: names in order of category id; label l is `classes[l - 1]`.
        category_ids: the file's own ids, ascending.
        images: in the file's order.
        defects: all entries that were left out. Annotations of an image that was left out are none of their own.
        notes: how often something was met that can be used but is worth knowing: "boxes clipped" (they lie partly
            outside their image), "images without objects" and, where images were decoded, "EXIF rotation". What was
            not met is missing.
    """

    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    images: tuple[ImageRecord, ...]
    defects: tuple[Defect, ...] = ()
    notes: dict[str, int] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def skipped(self) -> dict[str, int]:
        """How many entries were left out, by reason."""
        return count(self.defects)

    def transposed(self) -> "CocoAnnotations":
        """The annotations of all images with rows and columns swapped."""
        return dataclasses.replace(self, images=tuple(image.transposed() for image in self.images))

    def to_coco(self) -> dict:
        """The content in COCO's format: boxes unclipped, annotation ids from 1, area and iscrowd filled in.

        Where masks were asked for, each annotation has its segmentation, as compressed run lengths.
        """
        annotations = (annotation for image in self.images for annotation in self._annotations(image))
        return {
            "images": [
                {"id": i.id, "file_name": i.file_name, "width": i.width, "height": i.height} for i in self.images
            ],
            "annotations": [{"id": number, **annotation} for number, annotation in enumerate(annotations, start=1)],
            "categories": [{"id": i, "name": name} for i, name in zip(self.category_ids, self.classes, strict=True)],
        }

    def _annotations(self, image: ImageRecord) -> Iterator[dict]:
        masks = [] if image.masks is None else [{"segmentation": mask} for mask in image.masks.to_coco()]
        for row, box in enumerate(image.boxes.tolist()):
            yield {
                "image_id": image.id,
                "category_id": self.category_ids[image.labels[row] - 1],
                "bbox": box,
                "area": float(image.area[row]),
                "iscrowd": int(image.iscrowd[row]),
                **(masks[row] if masks else {}),
            }
