"""A picture of samples of a data set: images with boxes, masks and names of classes, equally readable at any size."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..data.annotations import CocoAnnotations, ImageRecord
from ..data.images import load_image
from ..pictures.drawing import MIN_SHORT_SIDE, PALETTE, draw_detections
from ..pictures.sheet import Cell, write_sheet
from .check import CheckedSplit

CELL = 480  # pixels, the longer side of a sample
COLUMNS = 4
BACKGROUND = (238, 238, 238)


def draw_samples(checked: Sequence[CheckedSplit], path: Path, samples: int) -> None:
    """Write a PNG with some images of each split, their boxes, masks and names of classes.

    Args:
        checked: splits without usable images are left out.
        path: the PNG file.
        samples: most images of a split.
    """
    sections = {
        f"{each.split}: {many(len(each.content.images), 'image')}": _draw_split(each.content, each.folder, samples)
        for each in checked
        if each.content is not None
    }
    write_sheet(path, sections, COLUMNS)


def choose_samples(records: Sequence[ImageRecord], samples: int) -> list[int]:
    """Indices of images that show every class if there is room, the rarest first, and others at even steps."""
    labels = [set(record.labels.tolist()) for record in records]
    frequency = Counter(label for each in labels for label in each)
    chosen: set[int] = set()
    for label, _ in reversed(frequency.most_common()):
        if len(chosen) < samples and not any(label in labels[index] for index in chosen):
            candidates = [index for index, each in enumerate(labels) if label in each]
            chosen.add(candidates[len(candidates) // 2])
    evenly = [index * len(records) // max(1, samples) for index in range(samples)]
    rest = dict.fromkeys([*evenly, *range(len(records))])
    chosen.update(itertools.islice((index for index in rest if index not in chosen), max(0, samples - len(chosen))))
    return sorted(chosen)[:samples]


def many(number: int, thing: str) -> str:
    """A number of things: "1 box", "1,024 boxes"."""
    plural = f"{thing}es" if thing[-1] in "xs" else f"{thing}s"
    return f"{number:,} {thing if number == 1 else plural}"


def _draw_split(content: CocoAnnotations, folder: Path, samples: int) -> list[Cell]:
    chosen = [content.images[index] for index in choose_samples(content.images, samples)]
    widths, heights = zip(*(_fit((record.width, record.height), (CELL, CELL)) for record in chosen), strict=True)
    cell = (max(MIN_SHORT_SIDE, *widths), max(MIN_SHORT_SIDE, *heights))
    return [_draw_record(record, folder / record.file_name, content.classes, cell) for record in chosen]


def _draw_record(record: ImageRecord, path: Path, classes: Sequence[str], cell: tuple[int, int]) -> Cell:
    """Draw an image into a cell of its own: letters and lines have one size, whatever the image's."""
    image = load_image(str(path), path, (record.width, record.height))
    fitted = image.resize(_fit(image.size, cell), Image.Resampling.LANCZOS)
    corner = ((cell[0] - fitted.width) // 2, (cell[1] - fitted.height) // 2)
    canvas = Image.new("RGB", cell, BACKGROUND)
    canvas.paste(fitted, corner)
    order = np.argsort(-record.boxes[:, 2] * record.boxes[:, 3], kind="stable")  # small ones on top
    boxes = torch.from_numpy(_to_canvas(record, corner, fitted.size)[order])
    # Crowd regions get labels of their own with the same colours
    crowd = len(PALETTE) * math.ceil(len(classes) / len(PALETTE))
    names = [*classes, *[""] * (crowd - len(classes)), *(f"{c} (crowd)" for c in classes)]
    labels = torch.from_numpy((record.labels + crowd * record.iscrowd)[order])
    masks = _Planes(record, order, corner, fitted.size, cell)
    drawn = draw_detections(canvas, boxes, labels, classes=names, masks=masks, enlarge=False)
    return Cell(drawn, (f"{record.file_name}  {many(len(record.boxes), 'object')}",))


def _fit(size: tuple[int, int], cell: tuple[int, int]) -> tuple[int, int]:
    scale = min(cell[0] / size[0], cell[1] / size[1])
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _to_canvas(record: ImageRecord, corner: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """The boxes' visible parts as (N, 4) x1, y1, x2, y2 on the canvas, where the image lies at a corner in a size."""
    corners = np.concatenate((record.boxes[:, :2], record.boxes[:, :2] + record.boxes[:, 2:]), axis=1)
    corners = corners.clip(0, (record.width, record.height) * 2)
    scale = np.array((size[0] / record.width, size[1] / record.height) * 2)
    return corners * scale + np.array(corner * 2)


class _Planes(Sequence[np.ndarray]):
    """The masks of an image's objects on its canvas, (H, W) bool each, made when they are asked for.

    Args:
        record: the image; an object of it without a mask gets an empty one.
        order: in which the objects are drawn.
        corner, size: where the image lies on the canvas, and how large, in pixels.
        cell: size of the canvas.
    """

    def __init__(
        self,
        record: ImageRecord,
        order: np.ndarray,
        corner: tuple[int, int],
        size: tuple[int, int],
        cell: tuple[int, int],
    ):
        self.record, self.order = record, order
        self.corner, self.size, self.cell = corner, size, cell

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: Any) -> Any:
        canvas = Image.new("L", self.cell)
        masks, row = self.record.masks, self.order[index]
        if masks is not None and masks.counts[row]:
            mask = masks.decode(np.arange(len(masks)) == row)[0]
            canvas.paste(Image.fromarray(mask.numpy() * 255).resize(self.size, Image.Resampling.BILINEAR), self.corner)
        return np.asarray(canvas) >= 128
