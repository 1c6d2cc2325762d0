"""The formats of data sets, COCO JSON, Pascal VOC XML and YOLO, told apart by looking, and read alike."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from ...base.errors import short
from .annotations import RawData
from .dataset import CocoDataset
from .defects import DataError
from .formats.coco import find_split, list_coco_splits, read_coco
from .formats.voc import list_voc_splits, read_voc
from .formats.yolo import find_yolo_config, list_yolo_splits, read_yolo

Format = Literal["coco", "voc", "yolo"]
LOOKED_FOR: dict[Format, str] = {
    "coco": "annotations/instances_SPLIT.json (COCO)",
    "voc": "Annotations/*.xml (Pascal VOC)",
    "yolo": "data.yaml (YOLO)",
}
LISTERS: dict[Format, Callable[[Path], list[str]]] = {
    "coco": list_coco_splits,
    "voc": list_voc_splits,
    "yolo": list_yolo_splits,
}
USUAL_SPLITS = ("train", "trainval", "val", "valid", "validation", "test")


def find_formats(root: str | Path) -> list[Format]:
    """All formats in which a data set can be read, the one that is taken first."""
    return list(_look(Path(root)))


def _look(root: Path) -> Iterator[Format]:
    if root.is_file():
        suffixes: dict[str, Format] = {".json": "coco", ".yaml": "yolo", ".yml": "yolo"}
        yield from (format for suffix, format in suffixes.items() if suffix == root.suffix.lower())
        return
    tests: dict[Format, Callable[[Path], object]] = {**LISTERS, "yolo": find_yolo_config}  # which may be a broken one
    yield from (format for format, test in tests.items() if test(root))


def detect_format(root: str | Path) -> Format:
    """Tell a data set's format by looking.

    Args:
        root: folder of the data set; or an annotation file in COCO's format, or YOLO's data.yaml. Where several
            formats lie side by side, COCO is taken before VOC, and VOC before YOLO: the one that can say more.

    Raises:
        DataError: there is none of them.
    """
    root = Path(root)
    for format in _look(root):
        return format
    if not root.exists():
        raise DataError(f"{root}: expected a data set's folder, annotation file or data.yaml, found nothing there")
    if root.is_file():
        raise DataError(f"{root}: expected a folder, an annotation file (.json) or YOLO's data.yaml")
    raise DataError(f"{root}: expected a data set, with {', '.join(LOOKED_FOR.values())}; found none of them")


def list_splits(root: str | Path, format: Format | None = None) -> list[str]:
    """The names of a data set's splits: train, val and test first, others in order of names.

    Args:
        root: as for `detect_format`. An annotation file is one split, named after the file.
        format: "coco", "voc" or "yolo". Default: told by looking.

    Raises:
        DataError: there is no data set in this format.
    """
    root = Path(root)
    format = check_format(root, format)
    names = LISTERS[format](root)
    if not names:
        raise DataError(f"{root}: expected {LOOKED_FOR[format]}, found none")
    return sorted(names, key=lambda name: (USUAL_SPLITS.index(name) if name in USUAL_SPLITS else 9, name))


def check_format(root: Path, format: str | None) -> Format:
    """The format of this name, or, for None, that of the data set; DataError for another."""
    if format is None:
        return detect_format(root)
    for known in get_args(Format):
        if format == known:
            return known
    raise DataError(f"format: expected one of {', '.join(get_args(Format))}, found {short(format)}")


def read_split(
    root: str | Path, split: str, format: Format | None = None, *, images: str | Path | None = None
) -> RawData:
    """Read one split of a data set, unchecked.

    Args:
        root: as for `detect_format`. With an annotation file, `split` says nothing more.
        split: for instance "train".
        format: "coco", "voc" or "yolo". Default: told by looking.
        images: folder of the images, relative to the data set's folder or absolute, if it is not found by itself; not
            for YOLO.

    Raises:
        DataError: the split or its images can not be found or read at all. Single entries that can not be used are in
            the result's defects, or named when it is checked.
    """
    root = Path(root)
    format = check_format(root, format)
    if format == "voc":
        return read_voc(root, split, images)
    if format == "coco":
        return read_coco(*find_split(root, split, images))
    if images is not None:
        raise DataError(f"{root}: images: expected none for YOLO, whose data.yaml says where they are, found {images}")
    return read_yolo(root, split)


def open_split(
    root: str | Path,
    split: str,
    format: Format | None = None,
    *,
    images: str | Path | None = None,
    **options: Any,
) -> CocoDataset:
    """Open one split of a data set of any format for torchvision's detectors.

    Args:
        root, split, format, images: as for `read_split`.
        options: the fields of `ReadOptions`.

    Raises:
        DataError: the split or, without `skip_bad`, one of its entries can not be used.
    """
    return CocoDataset.from_raw(read_split(root, split, format, images=images), **options)
