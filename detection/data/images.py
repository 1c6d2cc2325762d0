"""Image files of a folder: found by name or stem, and their sizes read from their headers."""

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image, ImageOps
from tqdm import tqdm

from ...base.errors import NatsError, one_line
from .defects import BadEntry

ORIENTATION = 0x0112  # EXIF's tag
TURNED = (5, 6, 7, 8)  # its values for images whose rows and columns change places for display

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
THREADS = 8  # headers are waited for, not computed


def exists(path: Path) -> bool:
    """Whether there is a file or folder of this name, which may be none that a file system takes."""
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or not of characters that names may have
        return False


def is_file(path: Path) -> bool:
    """Whether there is a file of this name, which may be none that a file system takes."""
    return exists(path) and path.is_file()


def is_image(name: str) -> bool:
    """Whether a file name ends as those of images do."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def image_stem(name: str) -> str:
    """A file name without an image's suffix; other dots belong to the name."""
    return os.path.splitext(name)[0] if is_image(name) else name


def list_images(folder: Path, recursive: bool = True) -> list[str]:
    """Paths of the images in a folder, relative to it, sorted; none if it is not there."""
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if recursive and not name.startswith(".")]
        found += [os.path.relpath(os.path.join(parent, name), folder) for name in names if is_image(name)]
    return sorted(found)


class ImageIndex:
    """The images of a folder and of those below it, looked up by file name or by stem.

    Args:
        folder: where to look.
        recursive: in the folders below it too.
    """

    def __init__(self, folder: Path, recursive: bool = True):
        self.folder = folder
        self._by_name: dict[str, list[str]] = defaultdict(list)
        for path in list_images(folder, recursive):
            name = os.path.basename(path)
            self._by_name[name].append(path)
            self._by_name[image_stem(name)].append(path)

    def find(self, name: str) -> list[str]:
        """Paths, relative to the folder, of the images of this file name or stem; of one directly in it, only that."""
        paths = self._by_name.get(name, [])
        top = [path for path in paths if os.path.dirname(path) == ""]
        return top if len(top) == 1 else paths

    def holds_any(self, names: Iterable[str]) -> bool:
        """Whether at least one of these file names or stems is there."""
        return any(name in self._by_name for name in names)


def read_sizes(paths: Sequence[Path]) -> list[tuple[int, int] | BadEntry]:
    """Reads (width, height) of images, as EXIF turns JPEG files for display, from their headers; with a progress bar.

    Returns:
        One for each path; the error where a file is no image that Pillow can read.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(_read_size, paths)
        return list(tqdm(found, "image sizes", len(paths), leave=False, disable=None, delay=1))


def _read_size(path: Path) -> tuple[int, int] | BadEntry:
    try:
        if not os.path.getsize(path):
            raise ValueError("the file is empty")
        with Image.open(path) as image:
            # Of other formats it may take decoding all of the image to know
            turned = image.format in ("JPEG", "MPO") and image.getexif().get(ORIENTATION) in TURNED
            return image.size[::-1] if turned else image.size
    except FileNotFoundError:
        return BadEntry("missing image file", f"{path}: expected an image file")
    except Exception as error:  # Pillow raises nearly anything on broken files: OSError, SyntaxError, TypeError ...
        return BadEntry("unreadable image", f"{path}: can not be read as an image: {one_line(error)}")


def open_image(path: Path) -> Image.Image:
    """An RGB image, upright as its EXIF orientation says; NatsError names a file that is none."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow raises nearly anything on broken files: OSError, SyntaxError, TypeError ...
        raise NatsError(f"{path}: can not be decoded as an image") from error


def measure_image(path: Path) -> tuple[int, int]:
    """Width and height of an image, upright; read to its end, so that `open_image` will not fail on it.

    Raises:
        NatsError: a file that is no image, or a damaged one.
    """
    try:
        with Image.open(path) as image:
            size = image.size
            is_turned = image.getexif().get(ORIENTATION) in TURNED
            image.draft(None, (1, 1))  # a JPEG is read to its end all the same, and computed at an eighth of its size
            image.load()
    except Exception as error:  # see open_image
        raise NatsError(f"{path}: can not be decoded as an image") from error
    return size[::-1] if is_turned else size


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
