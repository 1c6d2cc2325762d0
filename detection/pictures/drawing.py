"""Detections drawn on images, and sheets that lay such images side by side."""

import functools
import math
import os
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont

from ...base.errors import NatsError
from .label_placement import Box, place_labels

# Okabe and Ito's palette without black: told apart with every common kind of colour blindness
PALETTE = ("#0072B2", "#D55E00", "#F0E442", "#56B4E9", "#009E73", "#E69F00", "#CC79A7")
MIN_SHORT_SIDE = 384  # pixels; smaller images are enlarged before text is put on them
MAX_ENLARGED = 3000  # pixels, of the long side of an image that is enlarged
MIN_FONT_SIZE = 12

SHORT_NAME = 5  # letters; longer names are cut down to their beginning where there is no room
MASK_OPACITY = 0.45
# How far the masks of a class's first, second, ... instance go from its colour towards white (1) or black (-1)
SHADES = (0.0, 0.35, -0.3, 0.55, -0.5)

_Masks = torch.Tensor | np.ndarray | Sequence


class _Object(NamedTuple):
    """What is drawn of one detection; `row` is its index in the arguments."""

    box: list[float]
    label: int
    score: float | None
    row: int


class _Style(NamedTuple):
    """Sizes in pixels."""

    font: ImageFont.FreeTypeFont
    margin: int
    line: int


def draw_detections(
    image: Image.Image,
    boxes: torch.Tensor,
    labels: torch.Tensor,
    scores: torch.Tensor | None = None,
    classes: Sequence[str] = (),
    threshold: float = 0.5,
    masks: _Masks | None = None,
    enlarge: bool = True,
) -> Image.Image:
    """Draw boxes, with the names of their classes, and masks on a copy of an image.

    Lines and letters grow with the image. Names are put where they hide neither objects nor each other; where there is
    no room they are cut short, down to the score alone. A class has one colour; its instances' masks differ in
    lightness.

    Args:
        image: any PIL image; the result is RGB.
        boxes: (N, 4) as (x1, y1, x2, y2) in pixels of `image`.
        labels: (N,) integers from 1, as torchvision's detectors give them (0 is the background).
        scores: (N,) in 0..1; absent for ground truth.
        classes: `classes[0]` is the name of label 1; a label without a name is shown as its number.
        threshold: detections with a lower score are left out.
        masks: (N, H, W) or (N, 1, H, W) at the size of `image`, boolean or with the object where it exceeds 0.5; a
            tensor, an array, or any sequence of N such planes, of which one is looked at at a time.
        enlarge: show an image with a side below 384 pixels larger by a whole factor.

    Raises:
        NatsError: boxes, labels, scores and masks of different lengths, or masks of another size than the image.
    """
    found = _shown(boxes, labels, scores, threshold)
    if masks is not None and len(masks) != len(boxes):
        raise NatsError(f"masks: expected {len(boxes)}, as many as boxes, found {len(masks)}")
    factor = _enlargement(image.size) if enlarge else 1
    canvas = image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    if not found:
        return canvas
    enlarged = [item._replace(box=[value * factor for value in item.box]) for item in found]
    style = _choose_style(canvas.size, [item.box for item in enlarged])
    if masks is not None:
        canvas = _paint_masks(canvas, enlarged, masks, image.size, style.line)
    _draw_boxes(canvas, enlarged, style.line)
    _draw_labels(canvas, enlarged, classes, style)
    return canvas


def class_colour(label: int) -> str:
    """The colour of a class, as `#RRGGBB`: a colour-blind safe palette of seven, repeated."""
    return PALETTE[(label - 1) % len(PALETTE)]


def mask_colour(label: int, instance: int) -> tuple[int, int, int]:
    """The colour of a class's `instance`-th mask, from 0: the class's own, lighter or darker."""
    shade = SHADES[instance % len(SHADES)]
    target = 255 if shade > 0 else 0
    red, green, blue = (round(c + abs(shade) * (target - c)) for c in ImageColor.getrgb(class_colour(label)))
    return red, green, blue


def text_colour(background: str) -> str:
    """Black or white, whichever has the higher contrast (WCAG 2) on the background `#RRGGBB`."""
    luminance = _luminance(background)
    return "black" if (luminance + 0.05) / 0.05 >= 1.05 / (luminance + 0.05) else "white"


def _luminance(colour: str) -> float:
    channels = (value / 255 for value in ImageColor.getrgb(colour))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _enlargement(size: tuple[int, int]) -> int:
    return max(1, min(math.ceil(MIN_SHORT_SIDE / min(size)), MAX_ENLARGED // max(size)))


def _shown(boxes: torch.Tensor, labels: torch.Tensor, scores: torch.Tensor | None, threshold: float) -> list[_Object]:
    """The objects to draw, the surest last and so on top."""
    corners = torch.as_tensor(boxes, dtype=torch.float64).reshape(-1, 4).tolist()
    names = torch.as_tensor(labels).tolist()
    sure = [None] * len(corners) if scores is None else torch.as_tensor(scores).tolist()
    for key, values in (("labels", names), ("scores", sure)):
        if len(values) != len(corners):
            raise NatsError(f"{key}: expected {len(corners)}, as many as boxes, found {len(values)}")
    found = [_Object(*columns) for columns in zip(corners, names, sure, range(len(corners)), strict=True)]
    found = [item for item in found if all(map(math.isfinite, item.box))]
    if scores is None:
        return found
    sure_enough = [(item.score, item) for item in found if item.score is not None and item.score >= threshold]
    return [item for _, item in sorted(sure_enough, key=lambda pair: pair[0])]


@functools.cache
def load_font(size: int) -> ImageFont.FreeTypeFont:
    """The font of all pictures, `size` in pixels."""
    # matplotlib ships DejaVu Sans: the same letters on every machine, beyond Latin too
    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def _choose_style(size: tuple[int, int], boxes: Sequence[Sequence[float]]) -> _Style:
    """Letters and lines in proportion to the image; smaller where its objects are small against it."""
    short = min(size)
    sides = sorted(min(x2 - x1, y2 - y1) for x1, y1, x2, y2 in boxes)
    by_object = sides[len(sides) // 2] / 4
    font = max(MIN_FONT_SIZE, round(min(short / 42, max(short / 70, by_object))))
    return _Style(load_font(font), max(2, font // 5), max(2, round(font / 7)))


def _paint_masks(
    canvas: Image.Image, found: Sequence[_Object], masks: _Masks, size: tuple[int, int], line: int
) -> Image.Image:
    """Fill and outline the masks of an image of this size on its enlarged canvas, smaller objects over larger ones."""
    pixels = np.array(canvas)
    colours = _instance_colours(found)
    for item, colour in sorted(zip(found, colours, strict=True), key=lambda pair: -_area(pair[0].box)):
        mask = _as_plane(masks[item.row])
        if mask.shape != size[::-1]:
            expected = f"{size[0]}x{size[1]} pixels, as the image"
            raise NatsError(f"masks[{item.row}]: expected {expected}, found {mask.shape[1]}x{mask.shape[0]}")
        _paint_mask(pixels, mask, canvas.width // size[0], colour, line)
    return Image.fromarray(pixels)


def _as_plane(mask: torch.Tensor | np.ndarray) -> np.ndarray:
    """(H, W) or (1, H, W) as a boolean (H, W) array."""
    array = mask.detach().cpu().numpy() if isinstance(mask, torch.Tensor) else np.asarray(mask)
    return array.reshape(array.shape[-2:]) > 0.5


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _instance_colours(found: Sequence[_Object]) -> list[tuple[int, int, int]]:
    """A colour for each object, in which those of a class take turns from left to right: neighbours differ."""
    seen: Counter[int] = Counter()
    colours = {}
    for index in sorted(range(len(found)), key=lambda i: (found[i].box[0], found[i].box[1])):
        label = found[index].label
        colours[index] = mask_colour(label, seen[label])
        seen[label] += 1
    return [colours[index] for index in range(len(found))]


def _paint_mask(pixels: np.ndarray, plane: np.ndarray, factor: int, colour: tuple[int, int, int], line: int) -> None:
    rows, columns = np.flatnonzero(plane.any(1)), np.flatnonzero(plane.any(0))
    if not len(rows):
        return
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    mask = plane[top:bottom, left:right].repeat(factor, 0).repeat(factor, 1)
    part = pixels[top * factor : bottom * factor, left * factor : right * factor]
    part[mask] = np.round((1 - MASK_OPACITY) * part[mask] + MASK_OPACITY * np.array(colour)).astype(np.uint8)
    part[mask & ~erode(mask, line)] = colour


def erode(mask: np.ndarray, width: int) -> np.ndarray:
    """Take `width` pixels off a boolean (H, W) mask along its outline, at the array's border too."""
    padded = np.pad(mask, width)
    for axis in (0, 1):
        padded = _all_within(padded, 2 * width + 1, axis)
    return padded


def _all_within(mask: np.ndarray, length: int, axis: int) -> np.ndarray:
    """Whether all of `length` entries from each on are true; doubles the reach in each step."""
    reach = 1
    while reach < length:
        step = min(reach, length - reach)
        size = mask.shape[axis] - step
        mask = mask.take(range(size), axis) & mask.take(range(step, size + step), axis)
        reach += step
    return mask


def _draw_boxes(canvas: Image.Image, found: Sequence[_Object], line: int) -> None:
    """Outlines around the objects, not on them, with an edge in black or white that stands out on any ground."""
    draw = ImageDraw.Draw(canvas, "RGBA")
    for item in found:
        colour = class_colour(item.label)
        edge = (*ImageColor.getrgb(text_colour(colour)), 110)
        width = _line_width(item.box, line)
        thin = max(1, width // 4)
        for outset, ink, pen in ((width + thin, edge, thin), (width, colour, width), (0, edge, thin)):
            draw.rectangle(_outline(item.box, outset, canvas.size), outline=ink, width=pen)


def _line_width(box: Sequence[float], line: int) -> int:
    """Thinner around objects that a full line would make disappear."""
    return max(1, min(line, round(min(box[2] - box[0], box[3] - box[1]) / 6)))


def _outline(box: Sequence[float], outset: int, size: tuple[int, int]) -> Box:
    """The corner pixels of a rectangle around a box, inside the image."""
    x1, y1, x2, y2 = box
    left, right = (min(max(value, 0), size[0] - 1) for value in (round(x1) - outset, round(x2) - 1 + outset))
    top, bottom = (min(max(value, 0), size[1] - 1) for value in (round(y1) - outset, round(y2) - 1 + outset))
    return left, top, max(left, right), max(top, bottom)


def _draw_labels(canvas: Image.Image, found: Sequence[_Object], classes: Sequence[str], style: _Style) -> None:
    """After all boxes, so that no line crosses a name."""
    font, margin = style.font, style.margin
    height = sum(font.getmetrics()) + margin
    if height > canvas.height or font.getlength("…") + 2 * margin > canvas.width:
        return  # a strip of pixels has room for no letter
    texts = [[shorten(text, font, canvas.width - 2 * margin) for text in _forms(item, classes)] for item in found]
    sizes = [[(math.ceil(font.getlength(text)) + 2 * margin, height) for text in forms] for forms in texts]
    outlines = [_outline(item.box, _line_width(item.box, style.line), canvas.size) for item in found]
    places = place_labels([(x1, y1, x2 + 1, y2 + 1) for x1, y1, x2, y2 in outlines], sizes, canvas.size)
    draw = ImageDraw.Draw(canvas)
    for item, forms, (form, (left, top, right, bottom)) in zip(found, texts, places, strict=True):
        colour = class_colour(item.label)
        draw.rectangle((left, top, right - 1, bottom - 1), fill=colour)
        draw.text((left + margin, top + margin // 2), forms[form], fill=text_colour(colour), font=font)


def _forms(item: _Object, classes: Sequence[str]) -> list[str]:
    """What may be written at a box, longest first; the shorter forms are for where there is no room."""
    name = classes[item.label - 1] if 1 <= item.label <= len(classes) else str(item.label)
    names = [name, *([f"{name[:3]}…"] if len(name) > SHORT_NAME else [])]
    if item.score is None:
        return names
    score = f"{item.score:.2f}"
    return [*(f"{name} {score}" for name in names), score]


def shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Cut a text, with an ellipsis, to a width in pixels."""
    if font.getlength(text) <= width:
        return text
    fits = (text[:end] + "…" for end in range(len(text) - 1, 0, -1) if font.getlength(text[:end] + "…") <= width)
    return next(fits, "…")
