"""Instance masks as COCO's annotations give them, kept run-length encoded until they are asked for.

A decoded mask takes a byte per pixel of the image; its run lengths, in pycocotools' compressed form, take some hundred
bytes, and every part of pycocotools reads them.
"""

import dataclasses
import itertools
import math
import re

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from ...base.errors import short
from .defects import BadEntry

# Pixels; pycocotools traces polygons in 32-bit integers, and coordinates far beyond an image are no drawing anyhow.
FARTHEST = 1e6
# Pixels; pycocotools takes memory in proportion to a polygon's outline, and ends the process when it gets none.
LONGEST = 4e6
# Of an image with masks: pycocotools counts pixels in 32 bits.
MAX_PIXELS = 2**31 - 1
# Compressed run lengths: 5 bits a character from '0' on; the 32 characters from 'P' say that the number goes on.
_NUMBERS = re.compile(r"(?:[P-o]{0,6}[0-O])+")


@dataclasses.dataclass(frozen=True)
class ImageMasks:
    """The masks of one image's objects, run-length encoded.

    Attributes:
        counts: compressed run lengths, one per object, down the columns of the image as it was annotated; b"" of an
            object without a mask, which can be neither decoded nor written.
        height: of the annotated image, pixels.
        width: pixels.
        is_transposed: rows and columns are swapped when the masks are taken out.
    """

    counts: tuple[bytes, ...]
    height: int
    width: int
    is_transposed: bool = False

    def __len__(self) -> int:
        return len(self.counts)

    def transposed(self) -> "ImageMasks":
        """The masks of the image with rows and columns swapped."""
        return dataclasses.replace(self, is_transposed=not self.is_transposed)

    def decode(self, kept: np.ndarray) -> Tensor:
        """The masks of the objects for which `kept`, (N,) bool, is true: (M, H, W) uint8, 0 or 1."""
        chosen = [self._rle(counts) for counts in itertools.compress(self.counts, kept)]
        if chosen:
            by_column = torch.from_numpy(coco_mask.decode(chosen).transpose(2, 1, 0))  # as it lies in memory
        else:
            by_column = torch.zeros(0, self.width, self.height, dtype=torch.uint8)
        return (by_column if self.is_transposed else by_column.mT).contiguous()

    def to_coco(self) -> list[dict]:
        """COCO's `segmentation` of each object: compressed run lengths that JSON can hold."""
        rles = (self._rle(counts) for counts in self.counts)
        if self.is_transposed:
            rles = (coco_mask.encode(np.asfortranarray(coco_mask.decode(rle).T)) for rle in rles)
        return [{"size": list(rle["size"]), "counts": rle["counts"].decode()} for rle in rles]

    def _rle(self, counts: bytes) -> dict:
        return {"size": [self.height, self.width], "counts": counts}


def encode(where: str, segmentation: object, height: int, width: int) -> bytes:
    """Check COCO's `segmentation` of one object, and give it as compressed run lengths.

    Args:
        where: how messages name the object.
        segmentation: polygons, a list of lists x1, y1, x2, y2 ... in pixels; or run lengths, a dict of size
            (height, width) and counts, a list of numbers or pycocotools' string.
        height: of the image, pixels.
        width: pixels.

    Raises:
        DataError: an object without a segmentation, or with one that can not be used.
    """
    where = f"{where}: segmentation"
    if segmentation is None or segmentation == []:
        raise BadEntry("no mask", f"{where}: expected polygons or run lengths, found {short(segmentation)}")
    if height * width > MAX_PIXELS:
        raise _bad(f"{where}: expected an image of at most {MAX_PIXELS} pixels, found {width}x{height}")
    if isinstance(segmentation, list):
        counts, area = _trace(where, segmentation, height, width)
    elif isinstance(segmentation, dict):
        counts, area = read_runs(where, segmentation, height, width)
    else:
        raise _bad(f"{where}: expected polygons or run lengths, found {short(segmentation)}")
    if not area:
        raise _bad(f"{where}: expected a mask that covers pixels of the {width}x{height} image, it covers none")
    return counts


def _bad(message: str) -> BadEntry:
    return BadEntry("bad mask", message)


def _trace(where: str, polygons: list, height: int, width: int) -> tuple[bytes, int]:
    for index, polygon in enumerate(polygons):
        if problem := _find_problem(polygon):
            raise _bad(f"{where}[{index}]: expected {problem}, found {short(polygon)}")
    rles = coco_mask.frPyObjects(polygons, height, width)
    rle = rles[0] if len(rles) == 1 else coco_mask.merge(rles)
    return rle["counts"], int(coco_mask.area(rle))


def _find_problem(polygon: object) -> str | None:
    """What was expected of a polygon that can not be used."""
    if not isinstance(polygon, list) or not set(map(type, polygon)) <= {int, float}:
        return "a polygon, a list of numbers x1, y1, x2, y2 ..."
    if len(polygon) % 2:
        return f"an even number of coordinates, not {len(polygon)}"
    if len(polygon) < 6:  # pycocotools takes four numbers for a box
        return "at least 3 points"
    # The sum tells NaN, which comparisons with it do not
    if not (min(polygon) >= -FARTHEST and max(polygon) <= FARTHEST) or math.isnan(sum(polygon)):
        return f"finite coordinates within {FARTHEST:.0f} pixels"
    if len(polygon) * (max(polygon) - min(polygon)) > LONGEST and _outline(polygon) > LONGEST:
        return f"an outline of at most {LONGEST:.0f} pixels"
    return None


def _outline(polygon: list) -> float:
    points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
    return float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum())


def read_runs(where: str, rle: dict, height: int, width: int) -> tuple[bytes, int]:
    """Check run lengths, which may cover nothing; give them in compressed form, and how many pixels they cover.

    Arguments as of `encode`.

    Raises:
        DataError: they are none, or not of an image of this size.
    """
    if rle.get("size") != [height, width]:
        raise _bad(
            f"{where}: size: expected the image's [height, width], {[height, width]}, found {short(rle.get('size'))}"
        )
    counts = rle.get("counts")
    runs = _uncompress(counts) if isinstance(counts, str) else _as_runs(counts)
    if runs is None:
        raise _bad(f"{where}: counts: expected run lengths, a list of integers from 0 on or a string of their"
                   f" compressed form, found {short(counts)}")  # fmt: skip
    if (total := sum(runs)) != height * width:
        raise _bad(f"{where}: counts: expected runs over all {height * width} pixels of the image, they add to {total}")
    # Those that were compressed may be so in more than one way: all go through pycocotools' own
    return coco_mask.frPyObjects({"size": [height, width], "counts": runs}, height, width)["counts"], sum(runs[1::2])


def _as_runs(counts: object) -> list[int] | None:
    """The run lengths, if they are some."""
    if not isinstance(counts, list) or not set(map(type, counts)) <= {int} or min(counts, default=-1) < 0:
        return None
    return counts


def _uncompress(text: str) -> list[int] | None:
    """Decode compressed run lengths; None if the string is none. pycocotools reads past the end of such a string."""
    if not text.isascii() or not _NUMBERS.fullmatch(text):
        return None
    digits = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) - 48
    starts = np.flatnonzero(np.append(True, digits[:-1] < 32))
    places = 5 * (np.arange(len(digits)) - np.repeat(starts, np.diff(np.append(starts, len(digits)))))
    numbers = np.add.reduceat((digits & 31) << places, starts)
    ends = np.append(starts[1:], len(digits)) - 1
    numbers -= np.where(digits[ends] & 16, 1 << (places[ends] + 5), 0)  # two's complement
    # From the fourth on a number is the difference to the run two before
    numbers[1::2] = numbers[1::2].cumsum()
    numbers[2::2] = numbers[2::2].cumsum()
    return _as_runs(numbers.tolist())
