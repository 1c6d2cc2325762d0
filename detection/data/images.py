"""Image files of a folder: found by name or stem, and their sizes read from their headers."""

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ...base.errors import one_line
from .defects import BadEntry
from .image_files import ORIENTATION, TURNED

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
