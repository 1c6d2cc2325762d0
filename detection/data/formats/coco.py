"""COCO JSON: files and folders as its tools lay them out."""

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ....base.errors import one_line, short
from ....base.files import read_json
from ..annotations import Annotation, CocoAnnotations, Photo, RawData
from ..checking import check_annotations
from ..defects import DataError, Defect, is_positive_int
from ..images import is_file

PREFIX = "instances_"  # of an annotation file's name, before the split's
PROBED = 20  # images of a file, by which its image folder is told
FILE_NAME = re.compile(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)+")')


def read_coco(path: str | Path, folder: str | Path | None = None) -> RawData:
    """Read an annotation file in COCO's JSON format.

    Args:
        path: the annotation file.
        folder: of the images; by default none is looked for.

    Raises:
        DataError: it is not JSON, or not lists of objects called images, annotations and categories.
    """
    path = Path(path)
    data = read_json(path, DataError, most_bytes=None, most_levels=None)  # a gigabyte is not unusual
    return parse_coco(path, data, None if folder is None else Path(folder))


def parse_coco(path: Path, data: Any, folder: Path | None = None) -> RawData:
    """What an annotation file's content says; arguments and errors are those of `read_coco`."""
    if not isinstance(data, dict):
        raise DataError(f"{path}: expected an object with images, annotations and categories, found {short(data)}")
    for key in ("images", "annotations", "categories"):
        if not isinstance(data.get(key), list):
            raise DataError(f"{path}: {key}: expected a list of objects, found {short(data.get(key))}")
        for index, entry in enumerate(data[key]):
            if not isinstance(entry, dict):
                raise DataError(f"{path}: {key}[{index}]: expected an object, found {short(entry)}")
    images = [
        Photo(_where(path, "image", index, e), e.get("id"), e.get("file_name"), e.get("width"), e.get("height"))
        for index, e in enumerate(data["images"])
    ]
    annotations, defects = _annotations(path, data["annotations"])
    return RawData(path, folder, images, annotations, _categories(path, data["categories"]), defects, is_confined=True)


def _annotations(path: Path, entries: Sequence[dict]) -> tuple[list[Annotation], list[Defect]]:
    annotations, defects = [], []
    taken: set[int] = set()
    for index, entry in enumerate(entries):
        where, identity = _where(path, "annotation", index, entry), entry.get("id")
        if type(identity) is not int:
            defects.append(Defect("bad id", f"{where}: id: expected an integer, found {short(identity)}"))
        elif identity in taken:
            defects.append(Defect("duplicate id", f"{where}: id: expected each id once, it came before"))
        else:
            taken.add(identity)
            ids, iscrowd = (entry.get("image_id"), entry.get("category_id")), entry.get("iscrowd", 0)
            rest = entry.get("area"), iscrowd, entry.get("segmentation")
            annotations.append(Annotation(where, *ids, entry.get("bbox"), *rest))
    return annotations, defects


def _where(path: Path, kind: str, index: int, entry: dict) -> str:
    identity = entry.get("id")
    return f"{path}: {kind} {identity}" if type(identity) is int else f"{path}: {kind}s[{index}]"


def _categories(path: Path, entries: Sequence[dict]) -> dict[int, str]:
    """Names by id, in order of id."""
    names: dict[int, str] = {}
    for index, entry in enumerate(entries):
        where = f"{path}: categories[{index}]"
        category_id, name = entry.get("id"), entry.get("name")
        if not is_positive_int(category_id):
            raise DataError(f"{where}: id: expected a positive integer, found {short(category_id)}")
        if not isinstance(name, str) or not name:
            raise DataError(f"{where}: name: expected a name, found {short(name)}")
        if category_id in names or name in names.values():
            raise DataError(f"{where}: expected an id and a name of its own, {category_id} or {name!r} is taken")
        names[category_id] = name
    return dict(sorted(names.items()))


def read_annotations(
    path: str | Path, images: str | Path | None = None, skip_bad: bool = False, *, masks: bool = False
) -> CocoAnnotations:
    """Read and check an annotation file in COCO's JSON format.

    Args:
        path: the annotation file.
        images: folder in which every image must exist; by default none is looked for.
        skip_bad: leave out and count images and annotations that can not be used, instead of raising.
        masks: read the objects' masks too; one without is a defect.

    Raises:
        DataError: the file, or without `skip_bad` one of its entries, can not be used.
    """
    return check_annotations(read_coco(path, images), skip_bad=skip_bad, masks=masks)


def find_split(root: str | Path, split: str, images: str | Path | None = None) -> tuple[Path, Path]:
    """Find the annotation file and the image folder of one split of a COCO-layout data set.

    Args:
        root: folder that holds `annotations/instances_{split}.json`; or an annotation file, `split` then says nothing
            more, and images are looked for beside it, and beside its folder if that is called annotations.
        split: for instance "train", "val" or "train2017".
        images: image folder, relative to the data set's folder or absolute. Default: the first of `{split}`,
            `images`, `images/{split}`, `JPEGImages` and the data set's folder in which a first image of the
            annotation file lies.

    Raises:
        DataError: one of the two is not there.
    """
    root = Path(root)
    annotations = root / "annotations" / f"{PREFIX}{split}.json"
    if root.is_file():
        (split,), annotations = list_coco_splits(root), root
        root = root.parent.parent if root.parent.name == "annotations" else root.parent
    elif not annotations.is_file():
        raise DataError(f"{root}: split {split!r}: expected an annotation file {annotations}")
    if images is not None:
        if not (root / images).is_dir():
            raise DataError(f"{root}: images: expected a folder {root / images}")
        return annotations, root / images
    names = _first_file_names(annotations)
    folders = [root / split, root / "images", root / "images" / split, root / "JPEGImages", root]
    for folder in folders:
        if any(is_file(folder / name) for name in names):
            return annotations, folder
    if not names:
        raise DataError(f"{annotations}: images: expected at least one image with a file_name, found none")
    looked = ", ".join(map(str, folders))
    found = f"{names[0]!r} lies in none of them"
    raise DataError(f"{annotations}: file_name: expected images in one of {looked}; {found}; another is told as images")


def _first_file_names(annotations: Path) -> list[str]:
    """Searches the text: to parse all of a file as large as COCO's takes a quarter of a minute and gigabytes."""
    try:
        found = itertools.islice(FILE_NAME.finditer(annotations.read_bytes()), PROBED)
        return [json.loads(match[1]) for match in found]
    except (OSError, ValueError) as error:
        raise DataError(f"{annotations}: file_name: expected a JSON string: {one_line(error)}") from error


def list_coco_splits(root: Path) -> list[str]:
    """Names of the splits of a data set in COCO's layout, sorted; an annotation file is one."""
    files = [root] if root.is_file() else sorted((root / "annotations").glob(f"{PREFIX}*.json"))
    return [path.stem.removeprefix(PREFIX) for path in files]
