"""Sheets of errors: the part of the image around each, with ground truth and with detections drawn, side by side."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from pycocotools.coco import COCO
from torchvision.transforms.v2 import functional as F

from ..data.dataset import CocoDataset
from ..pictures.drawing import draw_detections
from ..pictures.sheet import Cell, write_sheet
from .coco import CocoEvaluation, has_masks
from .errors import FalsePositive, Missed

MAX_ERRORS = 12
COLUMNS = 3
PANEL = 280  # pixels, both sides of one picture of a pair

AROUND = 0.6  # how much is shown on each side of an error, in lengths of its own side

LEAST_CROP = 96  # pixels of the image, shortest side of what is shown

GAP = 8  # pixels between the two
BACKGROUND = (238, 238, 238)

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels


class _Crop(NamedTuple):
    """A part of an image, enlarged or reduced to a panel; `corner` is where it begins in the image."""

    picture: Image.Image
    corner: tuple[int, int]
    size: tuple[int, int]

    @property
    def scale(self) -> float:
        return self.picture.width / self.size[0]

    def holds(self, box: Box) -> bool:
        x1, y1, x2, y2 = self.place(box)
        return min(x2, self.picture.width) > max(x1, 0) and min(y2, self.picture.height) > max(y1, 0)

    def place(self, box: Box) -> Box:
        (left, top), scale = self.corner, self.scale
        x1, y1, x2, y2 = box
        return (x1 - left) * scale, (y1 - top) * scale, (x2 - left) * scale, (y2 - top) * scale

    def cut(self, mask: np.ndarray) -> np.ndarray:
        """The same part of a mask (H, W) of the image, as large as the picture."""
        (left, top), (width, height) = self.corner, self.size
        part = Image.fromarray(np.ascontiguousarray(mask[top : top + height, left : left + width]) * np.uint8(255))
        return np.asarray(part.resize(self.picture.size, Image.Resampling.BILINEAR)) >= 128


class ErrorSheets:
    """Sheets of one evaluation's errors.

    Args:
        dataset: the images.
        evaluation: of results on that data set.
        threshold: detections with a lower score are not drawn.
    """

    def __init__(self, dataset: CocoDataset, evaluation: CocoEvaluation, threshold: float):
        self.dataset = dataset
        self.evaluation = evaluation
        self.threshold = threshold
        self.indices = {image_id: index for index, image_id in enumerate(dataset.image_ids)}
        names = [category["name"] for _, category in sorted(evaluation.truth.cats.items())]
        self.names = [*names, *(f"{name} (crowd)" for name in names)]
        self.labels = {category_id: label for label, category_id in enumerate(sorted(evaluation.truth.cats), start=1)}

    def draw(self, errors: Sequence[FalsePositive | Missed], title: str, path: str | Path) -> None:
        """Write a PNG of the first twelve errors: each with ground truth on the left and detections on the right.

        Of a false positive nothing but itself is drawn on the right, unless it is a duplicate; there, and beside a
        missed object, all detections are.

        Raises:
            DataError: if an image can not be loaded.
        """
        heading = f"{title}\nleft: ground truth; right: detections"
        write_sheet(path, {heading: [self._draw_error(error) for error in errors[:MAX_ERRORS]]}, COLUMNS)

    def _draw_error(self, error: FalsePositive | Missed) -> Cell:
        truth, found = self.evaluation.truth, self.evaluation.found
        subjects = [truth.anns[error.truth]] if error.truth is not None else []
        if isinstance(error, FalsePositive):
            subjects.append(found.anns[error.detection])
        image_id = subjects[0]["image_id"]
        crop = self._crop(image_id, [_corners(each) for each in subjects])
        if isinstance(error, Missed) or error.kind == "duplicate":
            detections = [each for each in found.imgToAnns[image_id] if each["score"] >= self.threshold]
        else:
            detections = [found.anns[error.detection]]
        left = self._panel(crop, truth, truth.imgToAnns[image_id])
        right = self._panel(crop, found, detections, with_scores=True)
        pair = Image.new("RGB", (2 * PANEL + GAP, PANEL), "white")
        for offset, picture in ((0, left), (PANEL + GAP, right)):
            pair.paste(ImageOps.pad(picture, (PANEL, PANEL), color=BACKGROUND), (offset, 0))
        return Cell(pair, (self._describe(error), self.dataset.path(self.indices[image_id]).name))

    def _describe(self, error: FalsePositive | Missed) -> str:
        if isinstance(error, Missed):
            missed = self.evaluation.truth.anns[error.truth]
            _, _, width, height = missed["bbox"]
            return f"{self._name(missed)}, {width:.0f} x {height:.0f} pixels: not seen"
        found = self.evaluation.found.anns[error.detection]
        text = f"{self._name(found)} {found['score']:.2f}"
        if error.truth is None:
            return f"{text}: nothing there"
        return f"{text}: {self._name(self.evaluation.truth.anns[error.truth])} at IoU {error.iou:.2f}"

    def _name(self, entry: dict) -> str:
        return self.evaluation.truth.cats[entry["category_id"]]["name"]

    def _crop(self, image_id: int, boxes: Sequence[Box]) -> _Crop:
        image = F.to_pil_image(self.dataset[self.indices[image_id]][0])
        x1, y1, x2, y2 = (choose(column) for choose, column in zip((min, min, max, max), zip(*boxes, strict=True),
                                                                   strict=True))  # fmt: skip
        left, width = _span(x1, x2, image.width)
        top, height = _span(y1, y2, image.height)
        scale = PANEL / max(width, height)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        part = image.crop((left, top, left + width, top + height))
        return _Crop(part.resize(size, Image.Resampling.LANCZOS), (left, top), (width, height))

    def _panel(self, crop: _Crop, coco: COCO, entries: Sequence[dict], with_scores: bool = False) -> Image.Image:
        shown = [each for each in entries if crop.holds(_corners(each))]
        crowd = len(self.labels)
        labels = [self.labels[each["category_id"]] + crowd * bool(each["iscrowd"]) for each in shown]
        return draw_detections(
            crop.picture,
            torch.tensor([crop.place(_corners(each)) for each in shown], dtype=torch.float64).reshape(-1, 4),
            torch.tensor(labels, dtype=torch.int64),
            torch.tensor([each["score"] for each in shown]) if with_scores else None,
            self.names,
            threshold=-math.inf,
            masks=[crop.cut(coco.annToMask(each)) for each in shown] if has_masks(shown) else None,
            enlarge=False,
        )


def _corners(entry: dict) -> Box:
    x, y, width, height = entry["bbox"]
    return x, y, x + width, y + height


def _span(start: float, end: float, limit: int) -> tuple[int, int]:
    """Where a crop around something begins, and its length, in whole pixels inside an image of this side."""
    start, end = max(0.0, min(start, limit)), min(float(limit), max(end, 0.0))
    length = min(limit, max(LEAST_CROP, math.ceil((1 + 2 * AROUND) * (end - start))))
    first = round((start + end - length) / 2)
    return max(0, min(first, limit - length)), length
