"""Image files: found by name or stem, measured, decoded; and the one place that decides how EXIF turns them.

What a camera stores may be turned for display by its EXIF orientation. Prediction takes images as they are displayed.
Annotations refer to the pixels as stored, as a rule: so data sets are read, and an image is turned by a quarter only
where its annotated size fits nothing else. YOLO's annotations refer to JPEG files as displayed, whose sizes they take.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image, ImageOps
from tqdm import tqdm

from ...base.errors import one_line
from .defects import BadEntry, Defect

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
ORIENTATION = 0x0112  # EXIF's tag
TURNED = (5, 6, 7, 8)  # its values for images whose rows and columns change places for display
THREADS = 8  # headers are waited for, not computed

Size = tuple[int, int]  # width, height


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


def read_sizes(paths: Sequence[Path]) -> tuple[list[Size | None], list[Defect]]:
    """Read the sizes of images from their headers, JPEG files as displayed; with a progress bar.

    Returns:
        A size for each path, None where a file is no image that Pillow can read, and the defects of those.
    """
    sizes: list[Size | None] = []
    defects = []
    with ThreadPoolExecutor(THREADS) as pool:
        found = [pool.submit(_read_size, path) for path in paths]
        for size in tqdm(found, "image sizes", leave=False, disable=None, delay=1):
            try:
                sizes.append(size.result())
            except BadEntry as bad:
                sizes.append(None)
                defects.append(bad.defect())
    return sizes, defects


def _read_size(path: Path) -> Size:
    try:
        if not os.path.getsize(path):
            raise ValueError("the file is empty")
        with Image.open(path) as image:
            # Of other formats it may take decoding all of the image to know
            turned = image.format in ("JPEG", "MPO") and _orientation(image) in TURNED
            return image.size[::-1] if turned else image.size
    except FileNotFoundError as error:
        raise BadEntry("missing image file", f"{path}: expected an image file") from error
    except Exception as error:  # Pillow raises nearly anything on broken files: OSError, SyntaxError, TypeError ...
        raise BadEntry("unreadable image", f"{path}: can not be read as an image: {one_line(error)}") from error


def open_image(path: Path) -> Image.Image:
    """Decode an image of any size, as displayed, to RGB.

    Raises:
        DataError: it can not be decoded, or holds more than 8 bits per channel.
    """
    return _decode(str(path), path, None)[0]


def measure_image(path: Path) -> Size:
    """Width and height of an image, as displayed; read to its end, so that `open_image` will not fail on it.

    Raises:
        DataError: as of `open_image`.
    """
    return _decode(str(path), path, None, draft=True)[1]


def load_image(where: str, path: str | Path, size: Size) -> Image.Image:
    """Decode an image whose annotated size is known, as its annotations refer to it, to RGB.

    Args:
        where: how messages name it.
        path: the file.
        size: width and height in pixels.

    Raises:
        DataError: it can not be decoded, holds more than 8 bits per channel, or has another size.
    """
    return _decode(where, path, size)[0]


def check_image_file(where: str, path: str | Path, size: Size) -> bool:
    """Decode an image as far as it takes to know that `load_image` will not fail.

    Returns:
        Whether EXIF turns or mirrors it for display.

    Raises:
        DataError: as of `load_image`.
    """
    return _decode(where, path, size, draft=True)[2]


def _decode(where: str, path: str | Path, size: Size | None, draft: bool = False) -> tuple[Image.Image, Size, bool]:
    """RGB pixels, the displayed size, and whether that is another view than the stored one.

    `size`: as annotated; None: as displayed. `draft`: a JPEG is read to its end, and computed at an eighth of its size.
    """
    try:
        if not os.path.getsize(path):
            raise ValueError("the file is empty")
        with Image.open(path) as image:
            stored = image.size
            if draft:
                image.draft(None, (1, 1))
            image.load()
            if image.mode in ("I", "F") or image.mode.startswith("I;"):  # Pillow would clip it at 255
                raise BadEntry("unreadable image", f"{where}: expected 8 bits per channel, found mode {image.mode!r}")
            orientation = _orientation(image)  # of a PNG it may be known only now
            turned = size is None or (stored != size and orientation in TURNED and stored[::-1] == size)
            rgb = (ImageOps.exif_transpose(image) if turned and orientation != 1 else image).convert("RGB")
    except BadEntry:
        raise
    except Exception as error:  # Pillow raises nearly anything on broken files: OSError, SyntaxError, TypeError ...
        raise BadEntry("unreadable image", f"{where}: can not be decoded: {one_line(error)}") from error
    if size is not None and size != stored and not turned:
        expected = f"{size[0]}x{size[1]} pixels as annotated"
        raise BadEntry("size mismatch", f"{where}: expected {expected}, the file stores {stored[0]}x{stored[1]}")
    return rgb, stored[::-1] if orientation in TURNED else stored, orientation != 1


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # a broken EXIF block says nothing, and its pixels may be whole
        return 1
    return value if value in range(1, 9) else 1
