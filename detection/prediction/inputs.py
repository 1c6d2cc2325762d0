"""What `nats predict` is given: images, folders, patterns and videos; and which images form a batch."""

import glob
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ...base.errors import NatsError
from ..data.images import IMAGE_SUFFIXES

VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"})


def is_video(path: Path) -> bool:
    """By its suffix."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def find_images(paths: Sequence[str], recursive: bool = False) -> list[Path]:
    """The files that paths stand for, each once, in the order of the paths and by name within one.

    Args:
        paths: files; folders, which stand for the images in them; and patterns with *, ?, [] and ** (any number of
            folders), which stand for the images and videos that they match. A path that exists is no pattern.
        recursive: take the images in folders of folders too.

    Raises:
        NatsError: a path that is not there, a folder without images, or a pattern that matches none.
    """
    found: dict[Path, None] = {}
    for path in paths:
        found |= dict.fromkeys(_find(path, recursive))
    return list(found)


def _find(path: str, recursive: bool) -> list[Path]:
    if Path(path).is_dir():
        return _images_in(Path(path), recursive)
    if Path(path).is_file():
        return [Path(path)]
    if glob.has_magic(path):
        return _matches(path)
    raise NatsError(f"{path}: no such image or folder")


def _images_in(folder: Path, recursive: bool) -> list[Path]:
    files = folder.rglob("*") if recursive else folder.iterdir()
    inside = sorted(file for file in files if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    # Nothing hidden: macOS puts ._NAME.jpg beside NAME.jpg
    inside = [file for file in inside if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    if not inside:
        hint = "" if recursive else "; --recursive looks into the folders in it too"
        raise NatsError(f"{folder}: no images in this folder{hint}")
    return inside


def _matches(pattern: str) -> list[Path]:
    files = sorted(path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file())
    known = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES]
    if not known:
        others = f", but {len(files)} other files" if files else ""
        raise NatsError(f"{pattern}: matches no image or video{others}")
    return known


def plan_batches(
    sizes: Sequence[tuple[int, int]], batch_size: int, padded: Callable[[tuple[int, int]], object]
) -> Iterator[list[int]]:
    """Indices of images for each batch: only images that come to the detector's network in the same padded size.

    So no image is padded more than it is alone, and what is found does not depend on the batch size, up to rounding.

    Args:
        sizes: (width, height) of each image.
        batch_size: at most.
        padded: the size in the network of an image of this size.
    """
    waiting: dict[object, list[int]] = {}
    known: dict[tuple[int, int], object] = {}
    for index, size in enumerate(sizes):
        if size not in known:
            known[size] = padded(size)
        batch = waiting.setdefault(known[size], [])
        batch.append(index)
        if len(batch) == batch_size:
            yield waiting.pop(known[size])
    yield from waiting.values()
