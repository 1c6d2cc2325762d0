"""Image files of a data set: decoded whole, as the annotated size says how they are meant, or refused by name."""

import os
from pathlib import Path

from PIL import Image, ImageOps

from ...base.errors import one_line
from .defects import BadEntry

ORIENTATION = 0x0112  # EXIF's tag
TURNED = (5, 6, 7, 8)  # its values for images whose rows and columns change places for display


def load_image(where: str, path: str | Path, size: tuple[int, int]) -> Image.Image:
    """Decodes an image whose annotated size, (width, height), is known; returns RGB.

    Pixels are taken as the file stores them, because that is what annotations refer to as a rule. Only where the size
    fits nothing but the image as EXIF turns it for display, it is turned.

    Raises:
        DataError: If it can not be decoded, holds more than 8 bits per channel, or has another size.
    """
    return _load(where, path, size)[0]


def check_image_file(where: str, path: str | Path, size: tuple[int, int]) -> bool:
    """Decodes an image as far as it takes to know that `load_image` will not fail.

    Returns:
        Whether EXIF turns or mirrors it for display.

    Raises:
        DataError: As `load_image` does.
    """
    return _load(where, path, size, draft=True)[1]


def _load(where: str, path: str | Path, size: tuple[int, int], draft: bool = False) -> tuple[Image.Image, bool]:
    try:
        if not os.path.getsize(path):
            raise ValueError("the file is empty")
        with Image.open(path) as image:
            stored = image.size
            if draft:  # a JPEG is read to its end, and computed at an eighth of its size
                image.draft(None, (1, 1))
            image.load()
            if _is_deep(image):
                raise BadEntry("unreadable image", f"{where}: expected 8 bits per channel, got mode {image.mode!r}")
            orientation = _orientation(image)
            turned = stored != size and orientation in TURNED and stored[::-1] == size
            rgb = (ImageOps.exif_transpose(image) if turned else image).convert("RGB")
    except BadEntry:
        raise
    except Exception as error:  # Pillow raises nearly anything on broken files: OSError, SyntaxError, TypeError ...
        raise BadEntry("unreadable image", f"{where}: can not be decoded: {one_line(error)}") from error
    if stored != size and not turned:
        expected = f"{size[0]}x{size[1]} pixels as annotated"
        raise BadEntry("size mismatch", f"{where}: expected {expected}, the file stores {stored[0]}x{stored[1]}")
    return rgb, orientation != 1


def _is_deep(image: Image.Image) -> bool:
    """Whether Pillow would clip its pixels at 255."""
    return image.mode in ("I", "F") or image.mode.startswith("I;")


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # a broken EXIF block says nothing, and its pixels may be whole
        return 1
    return value if value in range(1, 9) else 1
