"""The formats of data sets, COCO JSON, Pascal VOC XML and YOLO, told apart by looking, and read alike."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from .annotations import RawData
from .dataset import CocoDataset
from .defects import DataError
from .formats.coco import find_split, list_coco_splits, read_coco, read_coco_file
from .formats.voc import list_voc_splits, read_voc
from .formats.yolo import find_yolo_config, list_yolo_splits, read_yolo

Format = Literal["coco", "voc", "yolo"]
FORMATS: tuple[Format, ...] = ("coco", "voc", "yolo")
LOOKED_FOR = {
    "coco": "annotations/instances_SPLIT.json (COCO)",
    "voc": "Annotations/*.xml (Pascal VOC)",
    "yolo": "data.yaml (YOLO)",
}
USUAL_SPLITS = ("train", "trainval", "val", "valid", "validation", "test")


def find_formats(root: str | Path) -> list[Format]:
    """Returns all formats in which a data set can be read, the one that is taken first."""
    return list(_look(Path(root)))


def _look(root: Path) -> Iterator[Format]:
    if root.is_file():
        suffix = root.suffix.lower()
        if suffix == ".json":
            yield "coco"
        elif suffix in (".yaml", ".yml"):
            yield "yolo"
        return
    tests: dict[Format, Callable[[], bool]] = {
        "coco": lambda: bool(list_coco_splits(root)),
        "voc": lambda: bool(list_voc_splits(root)),
        "yolo": lambda: find_yolo_config(root) is not None,
    }
    yield from (format for format in FORMATS if tests[format]())


def detect_format(root: str | Path) -> Format:
    """Tells a data set's format by looking.

    Args:
        root: Folder of the data set; or an annotation file in COCO's format, or YOLO's data.yaml. Where several
            formats lie side by side, COCO is taken before VOC, and VOC before YOLO: the one that can say more.

    Raises:
        DataError: If there is none of them.
    """
    for format in _look(Path(root)):
        return format
    raise DataError(_nothing_found(Path(root)))


def _nothing_found(root: Path) -> str:
    if not root.exists():
        return f"{root}: expected a data set's folder, annotation file or data.yaml, there is none of that name"
    if root.is_file():
        return f"{root}: expected a folder, an annotation file (.json) or YOLO's data.yaml"
    return f"{root}: expected a data set, with {', '.join(LOOKED_FOR.values())}; found none of them"


def list_splits(root: str | Path, format: Format | None = None) -> list[str]:
    """Returns the names of a data set's splits: train, val and test first, others in order of names.

    Args:
        root: As for `detect_format`. An annotation file is one split, named after the file.
        format: "coco", "voc" or "yolo". Default: told by looking.

    Raises:
        DataError: If there is no data set in this format.
    """
    root = Path(root)
    format = _format(root, format)
    names = {"coco": list_coco_splits, "voc": list_voc_splits, "yolo": list_yolo_splits}[format](root)
    if not names:
        raise DataError(f"{root}: expected {LOOKED_FOR[format]}, found none")
    return sorted(names, key=lambda name: (USUAL_SPLITS.index(name) if name in USUAL_SPLITS else 9, name))


def _format(root: Path, format: str | None) -> Format:
    if format is None:
        return detect_format(root)
    if format not in FORMATS:
        raise DataError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    return format


def read_split(root: str | Path, split: str, format: Format | None = None, images: str | Path | None = None) -> RawData:
    """Reads one split of a data set, unchecked.

    Args:
        root: As for `detect_format`. With an annotation file, `split` says nothing more.
        split: For instance "train".
        format: "coco", "voc" or "yolo". Default: told by looking.
        images: Folder of the images, relative to the data set's folder or absolute, if it is not found by itself; not
            for YOLO.

    Raises:
        DataError: If the split or its images can not be found or read at all. Single entries that can not be used
            are in the result's defects, or named when it is checked.
    """
    root = Path(root)
    format = _format(root, format)
    if format == "voc":
        return read_voc(root, split, images)
    if format == "coco":
        return read_coco_file(root, images) if root.is_file() else read_coco(*find_split(root, split, images))
    if images is not None:
        raise DataError(f"{root}: images: expected none for YOLO, whose data.yaml says where they are, got {images}")
    return read_yolo(root, split)


def open_split(
    root: str | Path,
    split: str,
    format: Format | None = None,
    images: str | Path | None = None,
    transforms: Callable | None = None,
    skip_bad: bool = False,
    seed: int = 0,
    transpose: bool = False,
    masks: bool = False,
) -> CocoDataset:
    """Opens one split of a data set of any format for torchvision's detectors.

    Args:
        root, split, format, images: As for `read_split`.
        transforms, skip_bad, seed, transpose, masks: As for `CocoDataset`.

    Raises:
        DataError: If the split or, without `skip_bad`, one of its entries can not be used.
    """
    raw = read_split(root, split, format, images)
    return CocoDataset.from_raw(raw, transforms, skip_bad, seed, transpose, masks)
