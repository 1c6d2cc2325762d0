"""COCO JSON: files and folders as its tools lay them out."""

import json
import re
from pathlib import Path
from typing import NoReturn

from ....base.files import read_json
from ..annotations import CocoAnnotations, RawData
from ..checking import check_annotations
from ..defects import DataError, show
from ..images import is_file


def read_coco(path: str | Path, folder: str | Path | None = None) -> RawData:
    """Reads an annotation file in COCO's JSON format.

    Args:
        path: The annotation file.
        folder: Of the images; by default none is looked for.

    Raises:
        DataError: If it is not JSON, or not lists of objects called images, annotations and categories.
    """
    path = Path(path)
    data = read_json(path, DataError, most_bytes=None, most_levels=None)  # a gigabyte is not unusual
    images, annotations, categories = (_entries(path, data, key) for key in ("images", "annotations", "categories"))
    folder = None if folder is None else Path(folder)
    return RawData(path, folder, images, annotations, categories, is_confined=True)


def _entries(path: Path, data: object, key: str) -> list[dict]:
    if not isinstance(data, dict):
        raise DataError(f"{path}: expected an object with images, annotations and categories, got {show(data)}")
    entries = data.get(key)
    if not isinstance(entries, list):
        raise DataError(f"{path}: {key}: expected a list of objects, got {show(entries)}")
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise DataError(f"{path}: {key}[{index}]: expected an object, got {show(entry)}")
        entry.pop("where", None)  # the file's own, whatever it means by it
    return entries


def read_annotations(
    path: str | Path, images: str | Path | None = None, skip_bad: bool = False, masks: bool = False
) -> CocoAnnotations:
    """Reads and checks an annotation file in COCO's JSON format.

    Args:
        path: The annotation file.
        images: Folder in which every image must exist; by default none is looked for.
        skip_bad: Leave out and count images and annotations that can not be used, instead of raising.
        masks: Read the objects' masks too; one without is a defect.

    Raises:
        DataError: If the file, or without `skip_bad` one of its entries, can not be used.
    """
    return check_annotations(read_coco(path, images), skip_bad, masks=masks)


def find_split(root: str | Path, split: str, images: str | Path | None = None) -> tuple[Path, Path]:
    """Finds the annotation file and the image folder of one split of a COCO-layout data set.

    Args:
        root: Folder that holds `annotations/instances_{split}.json`.
        split: For instance "train", "val" or "train2017".
        images: Image folder, relative to `root` or absolute. Default: the first of `{split}`, `images`,
            `images/{split}`, `JPEGImages` and `root` itself in which the annotation file's first image lies.

    Raises:
        DataError: If one of the two is not there.
    """
    root = Path(root)
    annotations = root / "annotations" / f"instances_{split}.json"
    if not annotations.is_file():
        raise DataError(f"{root}: split {split!r}: expected an annotation file {annotations}")
    if images is None:
        return annotations, _find_images(root, split, annotations)
    if not (root / images).is_dir():
        raise DataError(f"{root}: images: expected a folder {root / images}")
    return annotations, root / images


def _find_images(root: Path, split: str, annotations: Path) -> Path:
    first = _first_file_name(annotations)
    folders = [root / split, root / "images", root / "images" / split, root / "JPEGImages", root]
    for folder in folders:
        if (folder / first).is_file():
            return folder
    looked = ", ".join(map(str, folders))
    raise DataError(f"{annotations}: file_name: {first!r} lies in none of the folders {looked}")


def _first_file_name(annotations: Path) -> str:
    """Searches the text: to parse all of a file as large as COCO's takes a quarter of a minute and gigabytes."""
    match = re.search(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)+")', annotations.read_bytes())
    if match is None:
        raise DataError(f"{annotations}: images: expected at least one image with a file_name, found none")
    try:
        return json.loads(match[1])
    except ValueError as error:
        raise DataError(f"{annotations}: file_name: expected a JSON string: {error}") from error


def list_coco_splits(root: Path) -> list[str]:
    if root.is_file():
        return [root.stem.removeprefix("instances_")]
    return [path.stem.removeprefix("instances_") for path in sorted((root / "annotations").glob("instances_*.json"))]


def read_coco_file(path: Path, images: str | Path | None) -> RawData:
    """Reads an annotation file of any name; images are looked for beside it, and beside its folder `annotations`."""
    name = list_coco_splits(path)[0]
    root = path.parent.parent if path.parent.name == "annotations" else path.parent
    if images is not None and not (root / images).is_dir():
        raise DataError(f"{path}: images: expected a folder {root / images}")
    raw = read_coco(path, root / (images or ""))
    if images is None:
        folders = [root / name, root / "images", root / "images" / name, root / "JPEGImages", root]
        raw.folder = next((folder for folder in folders if _holds_an_image(folder, raw)), None) or _refuse(raw, folders)
    return raw


def _holds_an_image(folder: Path, raw: RawData) -> bool:
    names = [entry.get("file_name") for entry in raw.images[:20]]
    return any(is_file(folder / name) for name in names if isinstance(name, str) and name)


def _refuse(raw: RawData, folders: list[Path]) -> NoReturn:
    looked = ", ".join(map(str, folders))
    raise DataError(f"{raw.path}: file_name: expected the images in one of {looked}; another is told as images")
