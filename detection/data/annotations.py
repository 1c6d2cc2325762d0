"""Annotations of detection data sets: raw as a parser gives them, and checked, as records that can be used.

A parser (`read_coco` here) turns a format into `RawData`: COCO's entries, not looked at. `check_annotations` looks at
every entry of it. What training or evaluation would stumble over later is a `Defect` that names the file and the
entry; it is refused, or, on request, left out and counted.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .defects import Defect, count
from .masks import ImageMasks

"""Pixels. A box whose visible part is thinner can lose it in float32, and detectors refuse such boxes in training."""

CLIPPED, ROTATED, EMPTY = "boxes clipped", "EXIF rotation", "images without objects"


@dataclasses.dataclass
class RawData:
    """What a parser found, in COCO's terms and unchecked.

    Image and annotation entries may carry "where": how messages name the entry, in place of "PATH: annotation ID".

    Attributes:
        path: The file or folder that was read, for messages.
        folder: Of the images; None: no image is looked for.
        images: Entries with id, file_name (relative to `folder`), width and height.
        annotations: Entries with id, image_id, category_id, bbox (x, y, width, height), and perhaps area, iscrowd and
            segmentation.
        categories: Entries with id and name.
        defects: What the parser itself could not use.
        is_confined: Whether the images' names come from a file, which must not lead out of `folder`.
    """

    path: Path
    folder: Path | None
    images: list[dict]
    annotations: list[dict]
    categories: list[dict]
    defects: list[Defect] = dataclasses.field(default_factory=list)
    is_confined: bool = False

    def has_masks(self) -> bool:
        """Returns whether any object has a segmentation; exporters of boxes alone often leave an empty list."""
        return any(entry.get("segmentation") not in (None, []) for entry in self.annotations)


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
        masks: Of the N objects; None where they were not asked for.
        where: How messages name the image.
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
        """Returns the record of the image with rows and columns swapped."""
        boxes = self.boxes[:, [1, 0, 3, 2]]
        masks = None if self.masks is None else self.masks.transposed()
        return dataclasses.replace(self, width=self.height, height=self.width, boxes=boxes, masks=masks)


@dataclasses.dataclass(frozen=True)
class CocoAnnotations:
    """What a data set holds, checked.

    Attributes:
        classes: Names in order of category id; label l is `classes[l - 1]`.
        category_ids: The file's own ids, ascending.
        images: In the file's order.
        defects: All entries that were left out. Annotations of an image that was left out are none of their own.
        notes: How often something was met that can be used but is worth knowing: "boxes clipped" (they lie partly
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

    @property
    def clipped(self) -> int:
        """How many boxes lie partly outside their image."""
        return self.notes.get(CLIPPED, 0)

    @property
    def turned(self) -> int:
        """How many images EXIF turns or mirrors for display; 0 unless they were decoded."""
        return self.notes.get(ROTATED, 0)

    def transposed(self) -> "CocoAnnotations":
        """Returns the annotations of all images with rows and columns swapped."""
        return dataclasses.replace(self, images=tuple(image.transposed() for image in self.images))

    def to_coco(self) -> dict:
        """Returns the content in COCO's format: boxes unclipped, annotation ids from 1, area and iscrowd filled in.

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
        masks = [] if image.masks is None else image.masks.to_coco()
        for box, label, area, crowd, mask in itertools.zip_longest(
            image.boxes, image.labels, image.area, image.iscrowd, masks
        ):
            annotation = {
                "image_id": image.id,
                "category_id": self.category_ids[label - 1],
                "bbox": box.tolist(),
                "area": float(area),
                "iscrowd": int(crowd),
            }
            yield annotation if mask is None else {**annotation, "segmentation": mask}
