"""YOLO data sets, as Ultralytics has them: data.yaml, images, and a text file of labels beside each image.

Parsed here; `checking.py` looks at what they say. What is done as Ultralytics does it:

- The label file of `.../images/.../a.jpg` is `.../labels/.../a.txt` (the last `/images/` counts; in a path without
  one, `a.txt` lies beside the image). An image without a label file, or with an empty one, holds no objects.
- A line is `class cx cy width height`, or for a mask `class x1 y1 x2 y2 x3 y3 ...`, in shares of the image's width and
  height; classes count from 0.
- Widths and heights are those of the image as EXIF turns it for display, where it is turned by a quarter.

What is not: a line that comes twice, values outside of 0..1 and everything else that is dropped or repaired there
without a word is a defect here.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ....base.errors import one_line, short
from ....base.files import read_limited, read_yaml
from ..annotations import Annotation, Photo, RawData
from ..defects import BadEntry, DataError, Defect
from ..images import exists, is_image, list_images, read_sizes

CONFIG_NAMES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
SPLITS = ("train", "val", "valid", "validation", "test")
TOLERANCE = 0.001  # beyond 0..1, in shares of the image: labels are often rounded to three digits
ROUNDING = 1e-5  # what a box of six digits may jut out by rounding alone; so much is taken off again
MAX_BYTES = 16 * 2**20  # a larger list or label file is refused, unread
MAX_CLASSES = 50_000  # of a data.yaml


class YoloConfig(NamedTuple):
    """What data.yaml says.

    Attributes:
        path: the file.
        root: folder to which its paths are relative.
        splits: files, folders and lists of images, by split.
        classes: names, by class from 0.
        keypoint_values: numbers per line after the box that belong to keypoints; 0 in data sets without.
    """

    path: Path
    root: Path
    splits: dict[str, list[str]]
    classes: list[str]
    keypoint_values: int


def read_yolo(root: str | Path, split: str) -> RawData:
    """Read a split of a YOLO data set.

    Image ids count from 1 in order of paths; category ids are the classes plus 1. Image files are relative to the
    data set's root where they lie in it.

    Args:
        root: folder with data.yaml, or that file. Its `path` is absolute or relative to the file's own folder, which
            is also where the data set is looked for if that does not exist. `train`, `val` and `test` are a folder, a
            text file with an image per line, or a list of those.
        split: a key of data.yaml.

    Raises:
        DataError: data.yaml, the split's images or all of its label files can not be found or read.
    """
    config = read_yolo_config(root)
    if split not in config.splits:
        there = ", ".join(config.splits) or "none"
        raise DataError(f"{config.path}: {split}: expected a folder or a list of images, the splits there are: {there}")
    defects: list[Defect] = []
    paths = _list_split(config, split, defects)
    labels = [label_file(path) for path in paths]
    if not any(map(os.path.isfile, labels)):
        raise DataError(f"{config.path}: {split}: expected label files, such as {labels[0]}, found none")
    images: list[Photo] = []
    annotations: list[Annotation] = []
    sizes, unreadable = read_sizes(paths)
    defects += unreadable
    for number, (path, label, size) in enumerate(zip(paths, labels, sizes, strict=True), start=1):
        if size is not None:
            name = path.relative_to(config.root).as_posix() if path.is_relative_to(config.root) else str(path)
            images.append(Photo(f"{config.path}: image {number}", number, name, *size))
            annotations += _read_labels(label, config, images[-1], defects)
    return RawData(config.path, config.root, images, annotations, dict(enumerate(config.classes, start=1)), defects)


def list_yolo_splits(root: str | Path) -> list[str]:
    """Names of the splits that data.yaml names, in its order; [] if there is no such file.

    Raises:
        DataError: data.yaml can not be used.
    """
    return [] if find_yolo_config(root) is None else list(read_yolo_config(root).splits)


def find_yolo_config(root: str | Path) -> Path | None:
    """The data.yaml of a folder, or the only other YAML file in it that names classes; a YAML file is itself it."""
    root = Path(root)
    if root.is_file():
        return root if root.suffix.lower() in (".yaml", ".yml") else None
    for name in CONFIG_NAMES:
        if (root / name).is_file():
            return root / name
    others = [path for path in sorted([*root.glob("*.yaml"), *root.glob("*.yml")]) if _names_classes(path)]
    return others[0] if len(others) == 1 else None


def read_yolo_config(root: str | Path) -> YoloConfig:
    """Read and check data.yaml.

    Args:
        root: folder with data.yaml, or that file.

    Raises:
        DataError: it can not be found or used.
    """
    path = find_yolo_config(root)
    if path is None:
        raise DataError(f"{root}: expected YOLO's data.yaml, a file {Path(root) / CONFIG_NAMES[0]}")
    content = read_yaml(path, DataError)
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected keys with values, such as names and train, found {short(content)}")
    classes = _classes(path, content)
    splits = {}
    for key in SPLITS:
        if content.get(key) not in (None, "", []):
            splits[key] = entries = content[key] if isinstance(content[key], list) else [content[key]]
            if not all(isinstance(entry, str) and entry and "\0" not in entry for entry in entries):
                found = short(content[key])
                raise DataError(f"{path}: {key}: expected a folder, a text file, or a list of those, found {found}")
    if not splits:
        raise DataError(f"{path}: expected the images of at least one split, under {', '.join(SPLITS)}")
    return YoloConfig(path, _root(path, content.get("path")), splits, classes, _keypoint_values(path, content))


def label_file(image: Path) -> Path:
    """The label file of an image, by Ultralytics' rule."""
    before, images, after = str(image).rpartition(f"{os.sep}images{os.sep}")
    moved = f"{before}{os.sep}labels{os.sep}{after}" if images else str(image)
    return Path(moved).with_suffix(".txt")


# data.yaml


def _names_classes(path: Path) -> bool:
    try:
        content = read_yaml(path, DataError)
    except DataError:
        return False
    return isinstance(content, dict) and "names" in content and any(key in content for key in SPLITS)


def _classes(path: Path, content: dict) -> list[str]:
    names, count = content.get("names"), content.get("nc")
    if names is None and type(count) is int and 0 < count <= MAX_CLASSES:
        return [f"class_{number}" for number in range(count)]
    if isinstance(names, dict):
        if set(names) != set(range(len(names))):
            raise DataError(f"{path}: names: expected the classes 0, 1, 2 ..., found {short(list(names))}")
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not names:
        raise DataError(f"{path}: names: expected a list of the classes' names, found {short(names)}")
    for number, name in enumerate(names):
        if type(name) not in (str, int, float) or not str(name).strip():
            raise DataError(f"{path}: names: {number}: expected a name, in quotes if need be, found {short(name)}")
    if count is not None and count != len(names):
        raise DataError(f"{path}: nc: expected {len(names)}, as many as there are names, found {short(count)}")
    classes = [str(name).strip() for name in names]
    if len(set(classes)) < len(classes):
        raise DataError(f"{path}: names: expected each class once, found {short(classes)}")
    return classes


def _root(path: Path, value: object) -> Path:
    if value is not None and (not isinstance(value, str) or "\0" in value):
        raise DataError(f"{path}: path: expected a folder, found {short(value)}")
    root = path.parent / value if value else path.parent
    # The path often tells where the data set lay on the machine that it was made on
    return Path(os.path.abspath(root if exists(root) else path.parent))


def _keypoint_values(path: Path, content: dict) -> int:
    shape = content.get("kpt_shape")
    if shape is None:
        return 0
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 1000 for n in shape)):
        raise DataError(f"{path}: kpt_shape: expected [keypoints, values of each], found {short(shape)}")
    return shape[0] * shape[1]


# Images


def _list_split(config: YoloConfig, split: str, defects: list[Defect]) -> list[Path]:
    paths: list[Path] = []
    for entry in config.splits[split]:
        where = f"{config.path}: {split}"
        found = _find_entry(config.root, entry)
        if found is None:
            raise DataError(f"{where}: expected a folder or a text file {config.root / entry}")
        paths += _list_file(config, found) if found.is_file() else [found / name for name in list_images(found)]
    unique = sorted(set(paths))
    if not unique:
        raise DataError(f"{config.path}: {split}: expected images in {', '.join(config.splits[split])}, found none")
    if more := len(paths) - len(unique):
        twice = next(path for path in unique if paths.count(path) > 1)
        message = f"{config.path}: {split}: expected each image once, {twice} comes again"
        defects += [Defect("duplicate image", one_line(message))] * more
    return unique


def _find_entry(root: Path, entry: str) -> Path | None:
    """The folder or list of an entry; Roboflow writes ../train/images where it means train/images."""
    for candidate in (entry, entry.removeprefix("../")):
        path = Path(os.path.abspath(root / candidate))
        if exists(path):
            return path
    return None


def _list_file(config: YoloConfig, path: Path) -> Iterator[Path]:
    """The images that a text file lists: relative to its folder, or to the data set's root."""
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        name = line.strip()
        if not name:
            continue
        if not is_image(name) or "\0" in name:
            raise DataError(f"{path}: line {number}: expected the path of an image, found {short(name)}")
        beside = Path(os.path.abspath(path.parent / name))
        below = Path(os.path.abspath(config.root / name))
        yield below if not exists(beside) and exists(below) else beside


# Labels


def _read_text(path: Path) -> str:
    try:
        return read_limited(path, MAX_BYTES).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise BadEntry("unreadable label file", f"{path}: expected UTF-8 text: {one_line(error)}") from error


def _read_labels(path: Path, config: YoloConfig, image: Photo, defects: list[Defect]) -> Iterator[Annotation]:
    """The objects of an image's label file."""
    try:
        lines = _read_text(path).splitlines() if path.exists() else []
    except BadEntry as bad:
        defects.append(bad.defect())
        return
    first_seen: dict[tuple[float, ...], int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            values = _parse_line(where, line, config)
            if (first := first_seen.setdefault(values, number)) != number:
                raise BadEntry("duplicate object", f"{where}: expected each object once, line {first} says the same")
        except BadEntry as bad:
            defects.append(bad.defect())
        else:
            yield _annotation(where, values, image)


def _parse_line(where: str, line: str, config: YoloConfig) -> tuple[float, ...]:
    """The class, and a box's four shares or a polygon's points."""
    columns = line.split()
    if config.keypoint_values and len(columns) == 5 + config.keypoint_values:
        columns = columns[:5]
    if len(columns) != 5 and (len(columns) < 7 or len(columns) % 2 == 0):
        expected = "class cx cy width height, or class x1 y1 x2 y2 x3 y3 ..."
        raise BadEntry("wrong columns", f"{where}: expected {expected}, found {len(columns)} columns")
    try:
        values = tuple(map(float, columns))
    except ValueError:
        values = tuple(map(_number, columns))
    if not all(map(math.isfinite, values)):
        wrong = next(text for text in columns if not math.isfinite(_number(text)))
        raise BadEntry("not a number", f"{where}: expected finite numbers, found {short(wrong)}")
    if not (values[0].is_integer() and 0 <= values[0] < len(config.classes)):
        expected = f"a class from 0 to {len(config.classes) - 1} ({config.path})"
        raise BadEntry("unknown class", f"{where}: expected {expected}, found {columns[0]}")
    for value, text in zip(values[1:], columns[1:], strict=True):
        if not -TOLERANCE <= value <= 1 + TOLERANCE:
            raise BadEntry("not normalised", f"{where}: expected shares of the image, from 0 to 1, found {text}")
    if len(values) == 5 and min(values[3:]) <= 0:
        found = " ".join(columns[3:])
        raise BadEntry("degenerate box", f"{where}: expected a width and a height above 0, found {found}")
    return values


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _annotation(where: str, values: tuple[float, ...], image: Photo) -> Annotation:
    width, height = image.width, image.height
    area = segmentation = None
    if len(values) == 5:
        cx, cy, w, h = values[1:]
        corners = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
    else:
        xs, ys = values[1::2], values[2::2]
        corners = [min(xs), min(ys), max(xs), max(ys)]
        segmentation = [[value * (width, height)[index % 2] for index, value in enumerate(values[1:])]]
        following = zip(xs[1:] + xs[:1], ys[1:] + ys[:1], strict=True)  # the shoelace formula, in shares of the image
        area = abs(sum(x * y2 - x2 * y for x, y, (x2, y2) in zip(xs, ys, following, strict=True))) / 2 * width * height
    left, top, right, bottom = map(_snap, corners)
    box = [left * width, top * height, (right - left) * width, (bottom - top) * height]
    return Annotation(where, image.id, int(values[0]) + 1, box, area, segmentation=segmentation)


def _snap(share: float) -> float:
    """Take off what rounding alone lets a box jut out."""
    nearest = min(max(share, 0.0), 1.0)
    return nearest if abs(share - nearest) <= ROUNDING else share
