"""Drawn data whose classes lie in a relation between two parts: in which direction a bright blob has its dark partner.

Nothing on the bright blob tells its class, only where the partner is, and how far off that is can be set: what a
network learns of the relation at one spacing, dilation reuses at another. So classification images of close pairs
stand for a network's pretraining, and detection images of the same blobs spread further apart for what a detector
meets. In the latter the box is around the bright blob alone; the partner lies far outside it.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ...base.errors import NatsError
from ...base.files import atomic_folder
from .drawn import SPLITS, check_drawn_with

FORMAT = 1  # raised whenever the same parameters would give other files
DIRECTIONS = ("E", "SE", "S", "SW", "W", "NW", "N", "NE")  # in which the partner lies; y grows downwards
BLOB = 3.0  # pixels, a blob's standard deviation
CONTRAST = 100.0
NOISE = 20.0
BOX = 20  # pixels, side of a box around a bright blob
MARGIN = 8  # pixels, from a dark blob's centre to the border
JITTER = 0.15  # of the spacing
APART = 26  # pixels, between the centres of different pairs' blobs
UNAMBIGUOUS = 1.3  # spacings, from a bright blob to another pair's dark one
ATTEMPTS = 60  # to find room for one more pair

Spacing = tuple[int, int]


class Pair(NamedTuple):
    """A bright blob's centre, its dark partner's, in pixels (x, y), and the direction's index."""

    bright: tuple[float, float]
    dark: tuple[float, float]
    direction: int


def draw_relations(
    root: str | os.PathLike,
    spacings: Sequence[Spacing] = ((54, 54),),
    *,
    train: int = 320,
    val: int = 0,
    test: int = 100,
    size: int = 192,
    seed: int = 0,
) -> Path:
    """Draw a detection data set in COCO's layout, with one or two pairs of blobs in each image.

    The same parameters give the same files. A folder that this function has already filled with the same parameters is
    used as it is.

    Args:
        root: the folder; made whole or not at all.
        spacings: (across, down) in pixels from a bright blob to a partner at its right, or below it; in between, on the
            ellipse. Each pair draws one of them, and up to 15% more or less.
        train, val, test: numbers of images.
        size: side of the square images, in pixels.
        seed: of everything that is random.

    Returns:
        `root`.

    Raises:
        NatsError: parameters out of range, or a folder of that name that holds something else.

    Example:
        draw_relations("wide", [(54, 18)], train=320)
        draw_relations("mixed", [(18, 18), (54, 54)], train=320)
    """
    root, counts = Path(root), {"train": train, "val": val, "test": test}
    parameters = {"format": FORMAT, "spacings": [list(s) for s in spacings], **counts, "size": size, "seed": seed}
    for key, number in {**counts, "seed": seed}.items():
        if number < 0:
            raise NatsError(f"{key}: expected 0 or more, found {number}")
    asked: Sequence[Sequence[int]] = spacings or [()]
    for spacing in asked:
        _check_spacing(spacing, size)
    if not root.exists():
        with atomic_folder(root) as folder:
            (folder / "images").mkdir()
            (folder / "annotations").mkdir()
            for split, count in counts.items():
                content = _write_split(folder / "images", split, count, spacings, size, seed)
                (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")
            (folder / "drawn.json").write_text(json.dumps(parameters, indent=2) + "\n", encoding="utf-8")
    check_drawn_with(root, parameters)
    return root


def relation_images(count: int, spacing: Spacing = (18, 18), size: int = 64, seed: int = 0) -> Iterator[tuple]:
    """Classification images of one pair each: (image (size, size) uint8, direction's index), one after the other.

    Raises:
        NatsError: a spacing that the image has no room for.

    Example:
        image, direction = next(relation_images(1))
    """
    _check_spacing(spacing, size)
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        pair = None
        while pair is None:
            pair = _draw_pair([spacing], size, rng)
        yield _paint([pair], size, rng), pair.direction


def centred_image(spacing: Spacing, size: int = 192, direction: int = 1, seed: int = 0) -> np.ndarray:
    """An image (size, size) uint8 with a bright blob in its centre and the partner at this spacing."""
    angle = direction * 2 * math.pi / len(DIRECTIONS)
    dark = size / 2 + spacing[0] * math.cos(angle), size / 2 + spacing[1] * math.sin(angle)
    return _paint([Pair((size / 2, size / 2), dark, direction)], size, np.random.default_rng(seed))


def _check_spacing(spacing: Sequence[int], size: int) -> None:
    room = int((size - BOX - 2 * MARGIN) / (1 + JITTER))
    if len(spacing) != 2 or not all(1 <= length <= room for length in spacing):
        raise NatsError(
            f"spacings: expected pairs of 1 to {room} pixels in images of {size} pixels, found {tuple(spacing)}"
        )


def _write_split(
    folder: Path, split: str, count: int, spacings: Sequence[Spacing], size: int, seed: int
) -> dict[str, list]:
    images: list[dict] = []
    annotations: list[dict] = []
    for index in range(count):
        # a generator for each image: no image depends on how many others there are
        rng = np.random.default_rng([seed, SPLITS.index(split), index])
        pairs = _draw_pairs(spacings, size, rng)
        name = f"{split}_{index:05d}.png"
        Image.fromarray(_paint(pairs, size, rng)).save(folder / name)
        images.append({"id": index + 1, "file_name": name, "width": size, "height": size})
        for pair in pairs:
            x, y = (round(centre - BOX / 2, 2) for centre in pair.bright)
            shape = {"bbox": [x, y, BOX, BOX], "area": BOX * BOX, "iscrowd": 0}
            number = len(annotations) + 1
            annotations.append({"id": number, "image_id": index + 1, "category_id": pair.direction + 1, **shape})
    categories = [{"id": number, "name": name} for number, name in enumerate(DIRECTIONS, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _draw_pairs(spacings: Sequence[Spacing], size: int, rng: np.random.Generator) -> list[Pair]:
    """One or two pairs, the first always; a second for which no room is found is left out."""
    wanted = rng.integers(1, 3)
    widest = tuple(max(spacing[axis] for spacing in spacings) for axis in range(2))
    pairs: list[Pair] = []
    for attempt in range(10 * ATTEMPTS):
        if len(pairs) == wanted or (pairs and attempt > ATTEMPTS):
            break
        pair = _draw_pair(spacings, size, rng)
        if pair is not None and not any(_confuses(pair, other, widest) for other in pairs):
            pairs.append(pair)
    return pairs


def _draw_pair(spacings: Sequence[Spacing], size: int, rng: np.random.Generator) -> Pair | None:
    """A pair, or None if its dark blob would lie outside."""
    across, down = spacings[int(rng.integers(len(spacings)))]
    direction = int(rng.integers(len(DIRECTIONS)))
    angle, length = direction * 2 * math.pi / len(DIRECTIONS), rng.uniform(1 - JITTER, 1 + JITTER)
    x, y = rng.uniform(BOX / 2, size - BOX / 2, 2)
    dark = x + length * across * math.cos(angle), y + length * down * math.sin(angle)
    inside = all(MARGIN <= place < size - MARGIN for place in dark)
    return Pair((x, y), dark, direction) if inside else None


def _confuses(one: Pair, other: Pair, spacing: Sequence[int]) -> bool:
    """Whether blobs of the two touch, or a dark blob may be taken for the other pair's."""
    for a in one[:2]:
        if any(math.dist(a, b) < APART for b in other[:2]):
            return True
    for bright, dark in ((one.bright, other.dark), (other.bright, one.dark)):
        if math.hypot((dark[0] - bright[0]) / spacing[0], (dark[1] - bright[1]) / spacing[1]) < UNAMBIGUOUS:
            return True
    return False


def _paint(pairs: Sequence[Pair], size: int, rng: np.random.Generator) -> np.ndarray:
    """Blobs on grey noise, (size, size) uint8."""
    image = 128 + rng.normal(0, NOISE, (size, size))
    places = np.arange(size)
    for pair in pairs:
        for (x, y), contrast in ((pair.bright, CONTRAST), (pair.dark, -CONTRAST)):
            column, row = (np.exp(-((places - centre) ** 2) / (2 * BLOB**2)) for centre in (x, y))
            image += contrast * np.outer(row, column)
    return image.round().clip(0, 255).astype(np.uint8)
