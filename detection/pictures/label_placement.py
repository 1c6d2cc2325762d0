"""Where the names of boxes go in a picture: beside their boxes, off other objects and names as far as there is room."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Box = tuple[int, int, int, int]

ROUNDS = 3  # after the first, every name is moved once more with all others in place
ON_NAME = 8.0  # cost of a name wholly on another one
ON_OTHER = 0.6  # of a name wholly on other objects' boxes, to which it would seem to belong
HIDES_OTHER = 3.0  # of covering all of another object
HIDES_OWN = 2.0
SHORTER = 0.5  # of each next form of the name
PREFERENCE = 0.03  # of each place further down the list


class Place(NamedTuple):
    """Where a name goes, and which of its forms: an index into those that it came in."""

    form: int
    box: Box


def place_labels(
    boxes: Sequence[Sequence[float]], sizes: Sequence[Sequence[tuple[int, int]]], image_size: tuple[int, int]
) -> list[Place]:
    """Choose a place for the name of each box; never off the image.

    Every name is tried at some twenty places along its box, outside and inside, and takes the cheapest. The cost of a
    place: how much of other names, other objects and its own object it covers, and a little for a shorter form. Small
    boxes, which have the least choice, come first; then all names are moved again, with the others in place.

    Args:
        boxes: (x1, y1, x2, y2) in pixels.
        sizes: for each box (width, height) of the forms of its name, longest first, with their margin; no larger than
            the image.
        image_size: (width, height).

    Returns:
        The form and (left, top, right, bottom) in pixels, `right` and `bottom` exclusive, of each name.
    """
    corners = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    tried = [_all_candidates(box, forms, image_size) for box, forms in zip(corners, sizes, strict=True)]
    costs = [_cost_by_itself(places, corners, i, len(sizes[i])) for i, places in enumerate(tried)]
    picks = _choose(tried, costs, np.argsort(_areas(corners), kind="stable"))
    return [
        Place(int(pick) // (len(places) // len(forms)), tuple(places[pick].astype(int).tolist()))
        for pick, places, forms in zip(picks, tried, sizes, strict=True)
    ]


def _choose(tried: list[np.ndarray], costs: list[np.ndarray], order: np.ndarray) -> np.ndarray:
    """(N,): the index of each name's cheapest place, beside the names placed before; then again beside all others."""
    picks = np.full(len(tried), -1)
    chosen = np.zeros((len(tried), 4))  # of no area, and so in nobody's way
    for _ in range(ROUNDS):
        before = picks.copy()
        for index in order:
            chosen[index] = 0
            on_names = _overlap(tried[index], chosen).sum(1) / _areas(tried[index])
            picks[index] = np.argmin(costs[index] + ON_NAME * on_names)
            chosen[index] = tried[index][picks[index]]
        if (picks == before).all():
            break
    return picks


def _all_candidates(box: np.ndarray, forms: Sequence[tuple[int, int]], image_size: tuple[int, int]) -> np.ndarray:
    return np.concatenate([_candidates(box, size, image_size) for size in forms])


def _candidates(box: np.ndarray, size: tuple[int, int], image_size: tuple[int, int]) -> np.ndarray:
    """Places along a box, (K, 4) whole numbers, the most usual first, all inside the image."""
    (x1, y1, x2, y2), (width, height) = box.round(), size
    along = (x1, x2 - width, (x1 + x2 - width) / 2)
    down = (y1, y2 - height, (y1 + y2 - height) / 2)
    corners = [
        *((x, y1 - height) for x in along),  # above
        *((x, y) for y in (y1, y2 - height) for x in along[:2]),  # inside, in the corners
        *((x, y2) for x in along),  # below
        *((x, y) for x in (x2, x1 - width) for y in down),  # right, left
        *((x, y) for y in (y1 - height, y2) for x in (x2, x1 - width)),  # diagonally off a corner
    ]
    limits = (image_size[0] - width, image_size[1] - height)
    places = np.clip(np.floor(corners), 0, limits)
    return np.concatenate((places, places + size), axis=1)


def _cost_by_itself(places: np.ndarray, boxes: np.ndarray, own: int, forms: int) -> np.ndarray:
    """(K,): what places of one box's name cost by the objects under them, their rank and the name's form."""
    covered = _overlap(places, boxes)
    hidden = covered / np.maximum(_areas(boxes), 1)
    others = np.arange(len(boxes)) != own
    on_other = np.minimum(covered[:, others].sum(1) / _areas(places), 1)
    form, rank = np.divmod(np.arange(len(places)), len(places) // forms)
    hiding = ON_OTHER * on_other + HIDES_OTHER * hidden[:, others].sum(1) + HIDES_OWN * hidden[:, own]
    return hiding + SHORTER * form + PREFERENCE * rank


def _overlap(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(K, N) areas that (K, 4) and (N, 4) rectangles have in common."""
    low = np.maximum(one[:, None, :2], other[None, :, :2])
    high = np.minimum(one[:, None, 2:], other[None, :, 2:])
    return np.clip(high - low, 0, None).prod(2)


def _areas(rectangles: np.ndarray) -> np.ndarray:
    return np.prod(rectangles[:, 2:] - rectangles[:, :2], axis=1)
