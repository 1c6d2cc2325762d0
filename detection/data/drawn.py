"""A drawn data set whose classes only a wide receptive field tells apart, along one axis.

Objects are textured grey shapes over a wide range of sizes; nothing on an object tells its class. The class is the
colour of a small mark some way off its box, on the box's row, to the left or the right. On the box's column, above or
below and as far away, lies a decoy: a mark of another class's colour. So wide dilations, (1, k), pay; on the
transposed twin of the data set, tall ones, (k, 1), do.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageDraw
from pycocotools import mask as coco_mask

from ...base.errors import NatsError, short
from ...base.files import atomic_folder, read_json
from ..pictures.drawing import class_colour

FORMAT = 2  # raised whenever the same parameters would give other files
MIN_SIDE = 12  # pixels, of an object
MAX_OBJECTS = 4  # per image
ATTEMPTS = 30  # to find room for one more object
GAP = 2  # pixels, between things that must not touch
CLASSES = ("blue", "vermilion", "yellow")  # the first colours of the palette that detections are drawn in
TEXTURES = ("stripes", "checks", "blobs", "gradient")
SPLITS = ("train", "val", "test")


class Rect(NamedTuple):
    """Pixels: `x` and `y` of the upper left corner, width and height."""

    x: int
    y: int
    w: int
    h: int

    def intersects(self, other: "Rect") -> bool:
        """Whether the two share a pixel."""
        return (
            self.x < other.x + other.w
            and other.x < self.x + self.w
            and self.y < other.y + other.h
            and other.y < self.y + self.h
        )

    def grown(self, x: int, y: int) -> "Rect":
        """`x` pixels more on the left and on the right, `y` above and below."""
        return Rect(self.x - x, self.y - y, self.w + 2 * x, self.h + 2 * y)


class DrawnObject(NamedTuple):
    """An object's box with the mark that tells its class, and the decoy."""

    box: Rect
    mark: Rect
    decoy: Rect
    label: int
    decoy_label: int


def draw_dataset(
    root: str | os.PathLike,
    train: int = 240,
    val: int = 60,
    test: int = 120,
    size: int = 160,
    distance: int | None = None,
    transpose: bool = False,
    seed: int = 0,
) -> Path:
    """Draw a data set in COCO's layout, with masks: `images/` and `annotations/instances_{train,val,test}.json`.

    The same parameters give the same files; a split's first images stay the same when its number changes. A folder
    that this function has already filled with the same parameters is used as it is.

    Args:
        root: the folder; made whole or not at all.
        train, val, test: numbers of images.
        size: side of the square images, in pixels. Objects have sides from 12 pixels to half of it.
        distance: pixels between an object's box and its mark. Default: a fifth of `size`.
        transpose: exchange rows and columns of the same pictures, so that the mark lies on the object's column.
        seed: of everything that is random.

    Returns:
        `root`.

    Raises:
        NatsError: parameters out of range, such as a distance that leaves no room for the largest object and its
            marks, or a folder of that name that holds something else.
    """
    root = Path(root)
    distance = size // 5 if distance is None else distance
    parameters = {"format": FORMAT, "train": train, "val": val, "test": test, "size": size, "distance": distance}
    parameters |= {"transpose": transpose, "seed": seed}
    _check_parameters(parameters)
    if not root.exists():
        with atomic_folder(root) as folder:
            _write(folder, parameters)
    check_drawn_with(root, parameters)
    return root


def mark_side(size: int) -> int:
    """Side of a mark in pixels, in images of a given size."""
    return max(6, size // 20)


def draw_objects(size: int, distance: int, rng: np.random.Generator) -> list[DrawnObject]:
    """Place one to four objects with marks and decoys: all inside the image, none on another's row or column stretch.

    Sides are drawn log-uniformly. The largest object is placed first and always fits; others for which no room is
    found are left out.
    """
    sides = [_draw_sides(size, rng) for _ in range(rng.integers(1, MAX_OBJECTS + 1))]
    placed: list[DrawnObject] = []
    for width, height in sorted(sides, key=math.prod, reverse=True):
        for _ in range(ATTEMPTS):
            candidate = _place(width, height, size, distance, rng)
            if not any(_in_each_others_way(candidate, other, distance) for other in placed):
                placed.append(candidate)
                break
    return placed


def draw_image(
    objects: Sequence[DrawnObject], size: int, rng: np.random.Generator
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Paint objects, marks and decoys on a noisy background.

    Returns:
        The image, (size, size, 3) uint8, and each object's mask, (size, size) uint8, 0 or 1.
    """
    shade = rng.uniform(105, 150)
    grey = shade + 10 * _smooth_noise((size, size), size / 8, rng)
    masks = [_paint_object(grey, item.box, shade, rng) for item in objects]
    grey += rng.normal(0, 5, grey.shape)
    image = np.repeat(grey[:, :, None], 3, axis=2)
    for item in objects:
        for rect, label in ((item.mark, item.label), (item.decoy, item.decoy_label)):
            patch = image[rect.y : rect.y + rect.h, rect.x : rect.x + rect.w]
            patch[:] = ImageColor.getrgb(class_colour(label)) + rng.normal(0, 5, (rect.h, rect.w, 1))
    return image.round().clip(0, 255).astype(np.uint8), masks


def _check_parameters(parameters: dict[str, Any]) -> None:
    for key in (*SPLITS, "seed"):
        if parameters[key] < 0:
            raise NatsError(f"{key}: expected 0 or more, found {parameters[key]}")
    size, distance = parameters["size"], parameters["distance"]
    if size < 2 * MIN_SIDE:
        raise NatsError(f"size: expected at least {2 * MIN_SIDE} pixels, found {size}")
    room = size - size // 2 - mark_side(size)
    if not 1 <= distance <= room:
        raise NatsError(f"distance: expected 1 to {room} pixels in images of {size} pixels, found {distance}")


def _write(folder: Path, parameters: dict[str, Any]) -> None:
    (folder / "images").mkdir()
    (folder / "annotations").mkdir()
    for split in SPLITS:
        content = _write_split(folder, split, parameters)
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "drawn.json").write_text(json.dumps(parameters, indent=2) + "\n", encoding="utf-8")


def _write_split(folder: Path, split: str, parameters: dict[str, Any]) -> dict[str, Any]:
    size, transpose = parameters["size"], parameters["transpose"]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(parameters[split]):
        # a generator for each image: no image depends on how many others there are
        rng = np.random.default_rng([parameters["seed"], SPLITS.index(split), index])
        objects = draw_objects(size, parameters["distance"], rng)
        pixels, masks = draw_image(objects, size, rng)
        name = f"{split}_{index:05d}.png"
        Image.fromarray(pixels.swapaxes(0, 1) if transpose else pixels).save(folder / "images" / name)
        images.append({"id": index + 1, "file_name": name, "width": size, "height": size})
        for item, mask in zip(objects, masks, strict=True):
            annotations.append(_annotation(len(annotations) + 1, index + 1, item, mask, transpose))
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _annotation(number: int, image_id: int, item: DrawnObject, mask: np.ndarray, transpose: bool) -> dict[str, Any]:
    x, y, w, h = item.box
    rle = coco_mask.encode(np.asfortranarray(mask.T if transpose else mask))
    return {
        "id": number,
        "image_id": image_id,
        "category_id": item.label,
        "bbox": [y, x, h, w] if transpose else [x, y, w, h],
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
        "area": w * h,
        "iscrowd": 0,
    }


def check_drawn_with(root: Path, parameters: dict[str, Any]) -> None:
    """NatsError for a folder that was not drawn with these parameters."""
    try:
        found = read_json(root / "drawn.json")
    except NatsError as error:
        raise NatsError(f"{root}: exists and is no drawn data set; choose another folder") from error
    if found != parameters:
        raise NatsError(f"{root}: expected a data set drawn with {parameters}, found one with {short(found)}")


def _draw_sides(size: int, rng: np.random.Generator) -> tuple[int, int]:
    """Width and height: one side log-uniform over the whole range, the other not too different, in either order."""
    largest = size // 2
    side = math.exp(rng.uniform(math.log(MIN_SIDE), math.log(largest)))
    sides = [round(side), min(largest, max(MIN_SIDE, round(side * rng.uniform(0.6, 1.0))))]
    rng.shuffle(sides)
    return sides[0], sides[1]


def _place(width: int, height: int, size: int, distance: int, rng: np.random.Generator) -> DrawnObject:
    side = mark_side(size)
    reach = distance + side
    mark_first, decoy_first = rng.integers(2, size=2)  # left of the object, above it
    x = int(rng.integers(size - width - reach + 1)) + reach * int(mark_first)
    y = int(rng.integers(size - height - reach + 1)) + reach * int(decoy_first)
    box = Rect(x, y, width, height)
    mark = Rect(x - reach if mark_first else x + width + distance, y + (height - side) // 2, side, side)
    decoy = Rect(x + (width - side) // 2, y - reach if decoy_first else y + height + distance, side, side)
    label, decoy_label = 1 + rng.choice(len(CLASSES), 2, replace=False)
    return DrawnObject(box, mark, decoy, int(label), int(decoy_label))


def _in_each_others_way(one: DrawnObject, other: DrawnObject, distance: int) -> bool:
    return _reaches_into(one, other, distance) or _reaches_into(other, one, distance)


def _reaches_into(one: DrawnObject, other: DrawnObject, distance: int) -> bool:
    """Whether box, mark or decoy of one lie on the other's box or on the cross where its own marks may lie."""
    reach = distance + other.mark.w
    row = Rect(other.box.x, other.mark.y, other.box.w, other.mark.h).grown(reach, 0)
    column = Rect(other.decoy.x, other.box.y, other.decoy.w, other.box.h).grown(0, reach)
    keep_clear = [rect.grown(GAP, GAP) for rect in (other.box, row, column)]
    return any(rect.intersects(kept) for rect in (one.box, one.mark, one.decoy) for kept in keep_clear)


def _smooth_noise(shape: tuple[int, int], scale: float, rng: np.random.Generator) -> np.ndarray:
    """Noise with details of about `scale` pixels, between about -1 and 1."""
    coarse = rng.uniform(-1, 1, [max(2, round(side / scale)) for side in shape]).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize(shape[::-1], Image.Resampling.BICUBIC), dtype=float)


def _paint_object(grey: np.ndarray, box: Rect, background: float, rng: np.random.Generator) -> np.ndarray:
    """Blend a textured shape, clearly darker or brighter than the background, into its box, touching all four sides.

    Returns:
        Its mask in the whole image, 0 or 1.
    """
    mask = _shape_mask(box.w, box.h, rng)
    contrast = rng.uniform(55, 80) * rng.choice([-1, 1])
    texture = background + contrast + 25 * _texture(box.w, box.h, rng)
    inside = slice(box.y, box.y + box.h), slice(box.x, box.x + box.w)
    grey[inside] += mask * (texture - grey[inside])
    whole = np.zeros(grey.shape, dtype=np.uint8)
    whole[inside] = mask > 0.5
    return whole


def _shape_mask(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """1 inside, 0 outside, (height, width): an ellipse, a rectangle, or a polygon that touches all four sides."""
    shape = Image.new("L", (width, height))
    draw = ImageDraw.Draw(shape)
    right, bottom = width - 1, height - 1
    kind = rng.choice(["ellipse", "rectangle", "polygon"])
    if kind == "ellipse":
        draw.ellipse((0, 0, right, bottom), fill=255)
    elif kind == "rectangle":
        draw.rectangle((0, 0, right, bottom), fill=255)
    else:
        a, b, c, d = rng.uniform(0.15, 0.85, 4)
        draw.polygon([(a * right, 0), (right, b * bottom), (c * right, bottom), (0, d * bottom)], fill=255)
    return np.asarray(shape, dtype=float) / 255


def _texture(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """A pattern between -1 and 1, (height, width)."""
    kind = rng.choice(TEXTURES)
    if kind == "blobs":
        return _smooth_noise((height, width), max(3.0, min(width, height) / 6), rng)
    angle = rng.uniform(0, math.pi)
    y, x = np.mgrid[:height, :width]
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    if kind == "gradient":
        return (along - along.mean()) / max(1.0, np.abs(along - along.mean()).max())
    period = max(4.0, min(width, height) / rng.uniform(2, 6))
    waves = np.sin(2 * math.pi * along / period)
    return np.sign(waves * np.sin(2 * math.pi * across / period)) if kind == "checks" else waves
