"""Detections drawn on images, and sheets that lay such images side by side."""

import functools
import math
import os
from collections.abc import Mapping, Sequence

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..errors import NatsError
from ..files import atomic_file

# Okabe and Ito's palette without black: told apart with every common kind of colour blindness
PALETTE = ("#0072B2", "#D55E00", "#F0E442", "#56B4E9", "#009E73", "#E69F00", "#CC79A7")
MIN_SHORT_SIDE = 384  # pixels; smaller images are enlarged before text is put on them
MIN_FONT_SIZE = 12
CELL_SIDE = 480  # pixels, of a comparison sheet

Box = tuple[int, int, int, int]


def draw_detections(
    image: Image.Image,
    boxes: torch.Tensor,
    labels: torch.Tensor,
    scores: torch.Tensor | None = None,
    classes: Sequence[str] = (),
    threshold: float = 0.5,
) -> Image.Image:
    """Draw boxes with the names of their classes on a copy of an image.

    Lines and letters grow with the image. An image with a side below 384 pixels is enlarged by a whole factor first.

    Args:
        image: any PIL image; the result is RGB.
        boxes: (N, 4) as (x1, y1, x2, y2) in pixels of `image`.
        labels: (N,) integers from 1, as torchvision's detectors give them (0 is the background).
        scores: (N,) in 0..1; absent for ground truth.
        classes: `classes[0]` is the name of label 1; a label without a name is shown as its number.
        threshold: detections with a lower score are left out.
    """
    factor = max(1, math.ceil(MIN_SHORT_SIDE / min(image.size)))
    canvas = image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(canvas)
    short = min(canvas.size)
    font = _font(max(MIN_FONT_SIZE, short // 40))
    line_width = max(2, short // 250)
    shown = _shown(boxes, labels, scores, threshold)
    for box, label, _ in shown:
        corners = [min(round(value * factor), canvas.size[i % 2] - 1) for i, value in enumerate(box)]
        draw.rectangle(corners, outline=class_colour(label), width=line_width)
    for box, label, score in shown:  # after all boxes, so that no line crosses a name
        name = classes[label - 1] if 1 <= label <= len(classes) else str(label)
        text = name if score is None else f"{name} {score:.2f}"
        _draw_text_on_colour(canvas, text, [value * factor for value in box], class_colour(label), font)
    return canvas


def comparison_sheet(columns: Mapping[str, Sequence[Image.Image]], path: str | os.PathLike) -> None:
    """Write a PNG with one titled column per entry and one row per image, such as ground truth, plain, NATS.

    Args:
        columns: equally many images under each title; images of any size, fitted into equal cells.
        path: the PNG file.

    Raises:
        NatsError: no images, or columns of different lengths.
    """
    lengths = {title: len(images) for title, images in columns.items()}
    if not lengths or 0 in lengths.values() or len(set(lengths.values())) > 1:
        raise NatsError(f"{path}: expected columns of equally many images, at least one, found {lengths}")
    images = [image for column in columns.values() for image in column]
    cell = (min(CELL_SIDE, max(i.width for i in images)), min(CELL_SIDE, max(i.height for i in images)))
    with atomic_file(path) as scratch:
        _lay_out(columns, cell).save(scratch, format="PNG")


def class_colour(label: int) -> str:
    """The colour of a class, as `#RRGGBB`: a colour-blind safe palette of seven, repeated."""
    return PALETTE[(label - 1) % len(PALETTE)]


def place_text(box: Sequence[float], size: tuple[int, int], image_size: tuple[int, int]) -> Box:
    """Where the text of a box goes: on its upper edge, or inside it at the image's border; never off the image.

    Args:
        box: (x1, y1, x2, y2) in pixels.
        size: (width, height) of the text with its margin, no larger than the image.
        image_size: (width, height).

    Returns:
        (left, top, right, bottom) in pixels, `right` and `bottom` exclusive.
    """
    width, height = size
    left = round(min(max(box[0], 0), image_size[0] - width))
    above = round(box[1]) - height
    top = above if above >= 0 else round(box[1])
    top = min(max(top, 0), image_size[1] - height)
    return left, top, left + width, top + height


def _shown(
    boxes: torch.Tensor, labels: torch.Tensor, scores: torch.Tensor | None, threshold: float
) -> list[tuple[list[float], int, float | None]]:
    """Boxes, labels and scores to draw, the surest last and so on top."""
    corners = torch.as_tensor(boxes, dtype=torch.float64).reshape(-1, 4).tolist()
    names = torch.as_tensor(labels).tolist()
    if scores is None:
        return [(box, label, None) for box, label in zip(corners, names, strict=True)]
    rows = zip(corners, names, torch.as_tensor(scores).tolist(), strict=True)
    return sorted((row for row in rows if row[2] >= threshold), key=lambda row: row[2])


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    # matplotlib ships DejaVu Sans: the same letters on every machine, beyond Latin too
    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def _draw_text_on_colour(
    canvas: Image.Image, text: str, box: Sequence[float], colour: str, font: ImageFont.FreeTypeFont
) -> None:
    margin = max(3, round(font.size) // 4)
    text = _shorten(text, font, canvas.width - 2 * margin)
    ascent, descent = font.getmetrics()
    size = (math.ceil(font.getlength(text)) + 2 * margin, ascent + descent + margin)
    left, top, right, bottom = place_text(box, size, canvas.size)
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((left, top, right - 1, bottom - 1), fill=colour)
    draw.text((left + margin, top + margin // 2), text, fill=_text_colour(colour), font=font)


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    fits = (text[:end] + "…" for end in range(len(text) - 1, 0, -1) if font.getlength(text[:end] + "…") <= width)
    return next(fits, "…")


def _text_colour(background: str) -> str:
    red, green, blue = (int(background[i : i + 2], 16) for i in (1, 3, 5))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 120 else "white"


def _lay_out(columns: Mapping[str, Sequence[Image.Image]], cell: tuple[int, int]) -> Image.Image:
    gap = max(6, cell[0] // 40)
    font = _font(max(MIN_FONT_SIZE, cell[0] // 20))
    top = 2 * gap + sum(font.getmetrics())
    rows = len(next(iter(columns.values())))
    size = (gap + len(columns) * (cell[0] + gap), top + rows * (cell[1] + gap))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, (title, images) in enumerate(columns.items()):
        left = gap + column * (cell[0] + gap)
        draw.text((left + cell[0] / 2, gap), _shorten(title, font, cell[0]), fill="black", font=font, anchor="ma")
        for row, image in enumerate(images):
            fitted = ImageOps.contain(image.convert("RGB"), cell)
            centre = ((cell[0] - fitted.width) // 2, (cell[1] - fitted.height) // 2)
            sheet.paste(fitted, (left + centre[0], top + row * (cell[1] + gap) + centre[1]))
    return sheet
