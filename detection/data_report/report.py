"""What is in a data set, and what is wrong with it: numbers, named defects, and a picture of samples."""

import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...base.errors import NatsError
from ...base.files import write_json
from ...base.text import text_table
from ..data.annotations import CLIPPED, ROTATED, CocoAnnotations
from ..data.defects import Defect, count
from ..data.opening import Format, detect_format, find_formats, list_splits
from .check import HELD_APART, CheckedSplit, check_split
from .samples import draw_samples, many

SMALL, MEDIUM = 32**2, 96**2  # square pixels: COCO's limits between small, medium and large
EXAMPLES = 3  # of each kind of defect, in the printed text; data.json holds all


class Spread(NamedTuple):
    """Smallest, middle and largest of some numbers."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> "Spread | None":
        """None if there are no values."""
        if not len(values):
            return None
        return cls(float(np.min(values)), float(np.median(values)), float(np.max(values)))

    def __str__(self) -> str:
        return f"min {_short(self.min)}, median {_short(self.median)}, max {_short(self.max)}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.2f}"


@dataclasses.dataclass(frozen=True)
class SplitReport:
    """The numbers of one split. All count what can be used; boxes without crowd regions.

    Attributes:
        split: its name.
        images: how many.
        boxes: how many.
        crowd: crowd regions, which training leaves out: COCO's iscrowd, VOC's difficult.
        masks: objects, crowd or not, that have one.
        classes: boxes and images with at least one, by class, most frequent first.
        sizes: boxes by COCO's size, of the annotated area.
        empty: images without objects.
        widths, heights: of images, pixels; `image_sizes` are the three most frequent (width, height, images).
        aspect_ratios: width / height of boxes.
        boxes_per_image: spread over all images.
        defects: of every image and object that can not be used.
        notes: what is remarkable, and usable.
    """

    split: str
    images: int = 0
    boxes: int = 0
    crowd: int = 0
    masks: int = 0
    classes: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    empty: int = 0
    widths: Spread | None = None
    heights: Spread | None = None
    image_sizes: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)
    aspect_ratios: Spread | None = None
    boxes_per_image: Spread | None = None
    defects: list[Defect] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON can hold it."""
        content = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        spreads = {key: value._asdict() for key, value in content.items() if isinstance(value, Spread)}
        classes = {name: {"boxes": boxes, "images": images} for name, (boxes, images) in self.classes.items()}
        defects = [dataclasses.asdict(defect) for defect in self.defects]
        return content | spreads | {"classes": classes, "defects": defects, "defect_counts": count(self.defects)}

    def __str__(self) -> str:
        return "\n".join([f"split {self.split}: {self._headline()}", *(f"  {line}" for line in self._lines())])

    def _headline(self) -> str:
        if not self.images:
            return "can not be used"
        return f"{many(self.images, 'image')}, {many(self.boxes, 'box')}, {many(len(self.classes), 'class')}"

    def _lines(self) -> Iterator[str]:
        if self.images:
            yield from _class_table(self.classes, self.boxes)
            yield from _aligned(self._facts())
        yield from _aligned([("notes" if index == 0 else "", note) for index, note in enumerate(self.notes)])
        yield from _defect_lines(self.defects)

    def _facts(self) -> Iterator[tuple[str, str]]:
        if self.boxes:
            yield "box sizes", ", ".join(f"{name} {_share(n, self.boxes)}" for name, n in self.sizes.items())
            yield "box width / height", str(self.aspect_ratios)
        yield "boxes per image", f"{self.boxes_per_image}; {many(self.empty, 'image')} without objects"
        yield "image sizes", self._image_sizes()
        if self.crowd:
            yield "crowd", f"{many(self.crowd, 'region')}, left out of training"
        yield "masks", f"of {_share(self.masks, self.boxes + self.crowd)} objects" if self.masks else "none"

    def _image_sizes(self) -> str:
        listed = ", ".join(f"{width}x{height} {_share(n, self.images)}" for width, height, n in self.image_sizes)
        if len(self.image_sizes) == 1:
            return f"{self.image_sizes[0][0]}x{self.image_sizes[0][1]}, all"
        return f"width {self.widths}; height {self.heights}; most often {listed}"


@dataclasses.dataclass(frozen=True)
class DataReport:
    """The report on a data set: where it is, its format, others that lie beside it, and its splits."""

    path: str
    format: Format
    other_formats: list[str]
    splits: list[SplitReport]
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def defects(self) -> list[Defect]:
        """Of all splits; one that is in several, as of VOC's train and trainval, once."""
        return list(dict.fromkeys(defect for split in self.splits for defect in split.defects))

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON can hold it."""
        return {
            "path": self.path,
            "format": self.format,
            "other_formats": self.other_formats,
            "notes": self.notes,
            "splits": [split.to_dict() for split in self.splits],
        }

    def __str__(self) -> str:
        beside = "".join(f"; it can be read with --format {name} too" for name in self.other_formats)
        notes = "".join(f"\nnote: {note}" for note in self.notes)
        return "\n\n".join([f"{self.path}: format {self.format}{beside}{notes}", *map(str, self.splits)])


def _share(number: int, total: int) -> str:
    return f"{number:,} ({number / total:.1%})" if total else f"{number:,}"


def _aligned(facts: Iterable[tuple[str, str]]) -> list[str]:
    return [f"{name:<19} {value}" for name, value in facts]


def _class_table(classes: dict[str, tuple[int, int]], boxes: int) -> list[str]:
    rows = [
        (name, f"{number:,}", f"{number / boxes:.1%}" if boxes else "-", f"{images:,}")
        for name, (number, images) in classes.items()
    ]
    return text_table([("class", "boxes", "share", "images"), *rows], "<19", ">9", ">7", ">9", gap=" ")


def _defect_lines(defects: Sequence[Defect]) -> Iterator[str]:
    yield from _aligned([("defects", "none" if not defects else f"{len(defects):,}")])
    for reason, number in Counter(defect.reason for defect in defects).most_common():
        yield f"  {number:,} x {reason}"
        messages = [defect.message for defect in defects if defect.reason == reason]
        yield from (f"    {message}" for message in messages[:EXAMPLES])
        if number > EXAMPLES:
            yield f"    ... and {number - EXAMPLES:,} more, all in the JSON file"


# Reading


def report_data(
    path: str | Path,
    split: str | None = None,
    format: Format | None = None,
    images: str | Path | None = None,
    output: str | Path | None = None,
    samples: int = 8,
) -> tuple[DataReport, list[str]]:
    """Check a data set, every image and object of it, and show what is in it: numbers, defects, a picture of samples.

    Args:
        path: folder of a data set (COCO, Pascal VOC or YOLO), or its annotation file or data.yaml.
        split: the split to look at; default: all.
        format: coco, voc or yolo; default: told by looking, the first of these that is there.
        images: folder of the images, if it is not found by itself; not for YOLO.
        output: PNG file for the samples, the numbers going into a JSON file beside it, or a folder for data.png and
            data.json; default: the data set's name with _data.png and _data.json, in the working folder.
        samples: images of each split in the picture; 0 for no picture.

    Returns:
        The report, and a line for each file that was written.

    Raises:
        DataError: there is no such data set or split.
        NatsError: the output can not be written there.
    """
    root = Path(path)
    if samples < 0:
        raise NatsError(f"samples: expected 0 or more, found {samples}")
    chosen = detect_format(root) if format is None else format
    splits = list_splits(root, chosen) if split is None else [split]
    picture = picture_path(root, output)
    checked = [check_split(root, name, chosen, images=images, is_required=split is not None) for name in splits]
    reports = [summarise(each) for each in checked]
    others: list[str] = [name for name in find_formats(root) if name != chosen]
    report = DataReport(str(root), chosen, others, reports, _shared_images(checked))
    write_json(picture.with_suffix(".json"), report.to_dict())
    written = [f"numbers: {picture.with_suffix('.json')}"]
    if samples and any(each.content for each in checked):
        draw_samples(checked, picture, samples)
        written.append(f"picture: {picture}")
    return report, written


def summarise_defects(report: DataReport) -> str:
    """Say in one line that there are defects, how many of which kind, and what can be done."""
    counts = ", ".join(f"{number:,} x {reason}" for reason, number in count(report.defects).items())
    found = many(len(report.defects), "defect")
    return f"{report.path}: {found} ({counts}); mend them, or leave them out with --skip_bad"


def picture_path(root: Path, output: str | Path | None) -> Path:
    """The PNG file that `report_data` writes; a folder is made if need be.

    Raises:
        NatsError: it can not be one.
    """
    if output is None:
        return Path(f"{Path(os.path.abspath(root)).stem}_data.png")
    path = Path(output)
    if path.suffix.lower() != ".png":
        if path.exists() and not path.is_dir():
            raise NatsError(f"output: {path}: expected a PNG file or a folder, found another file")
        path.mkdir(parents=True, exist_ok=True)
        return path / "data.png"
    if path.is_dir() or not path.parent.is_dir():
        raise NatsError(f"output: {path}: expected a PNG file in a folder that is there")
    return path


def _shared_images(checked: Sequence[CheckedSplit]) -> list[str]:
    """Which of the splits that are held apart as a rule have images in common."""
    files = {each.split: each.files() for each in checked if each.split in HELD_APART}
    shared = ((one, other, len(files[one] & files[other])) for one, other in itertools.combinations(files, 2))
    return [f"{one} and {other} have {many(number, 'image')} in common" for one, other, number in shared if number]


def summarise(checked: CheckedSplit) -> SplitReport:
    """The numbers of a split."""
    content = checked.content
    if content is None:
        return SplitReport(checked.split, defects=checked.defects)
    records = content.images
    kept = [~record.iscrowd for record in records]
    boxes = np.concatenate([record.boxes[k] for record, k in zip(records, kept, strict=True)])
    area = np.concatenate([record.area[k] for record, k in zip(records, kept, strict=True)])
    labels = [record.labels[k] for record, k in zip(records, kept, strict=True)]
    widths, heights = [record.width for record in records], [record.height for record in records]
    sizes = Counter(zip(widths, heights, strict=True)).most_common(3)
    small, large = int((area < SMALL).sum()), int((area >= MEDIUM).sum())
    return SplitReport(
        split=checked.split,
        images=len(records),
        boxes=len(boxes),
        crowd=sum(int(record.iscrowd.sum()) for record in records),
        masks=sum(bool(mask) for record in records if record.masks for mask in record.masks.counts),
        classes=_count_classes(content.classes, labels),
        sizes={"small": small, "medium": len(area) - small - large, "large": large},
        empty=sum(not len(record.boxes) for record in records),
        widths=Spread.of(widths),
        heights=Spread.of(heights),
        image_sizes=[(width, height, number) for (width, height), number in sizes],
        aspect_ratios=Spread.of(boxes[:, 2] / boxes[:, 3]),
        boxes_per_image=Spread.of([len(each) for each in labels]),
        defects=checked.defects,
        notes=list(_notes(content)),
    )


def _notes(content: CocoAnnotations) -> Iterator[str]:
    if clipped := content.notes.get(CLIPPED):
        yield f"{many(clipped, 'box')} partly outside the image, clipped to it in training"
    objects = (np.column_stack((record.labels, record.boxes)) for record in content.images)
    if twice := sum(len(each) - len(np.unique(each, axis=0)) for each in objects):
        yield f"{many(twice, 'box')} there twice, with the same class in the same image"
    if turned := content.notes.get(ROTATED):
        yield f"{many(turned, 'image')} that EXIF turns or mirrors for display: see whether the boxes fit"


def _count_classes(classes: Sequence[str], labels: Sequence[np.ndarray]) -> dict[str, tuple[int, int]]:
    boxes, images = np.zeros(len(classes) + 1, int), np.zeros(len(classes) + 1, int)
    for each in labels:
        np.add.at(boxes, each, 1)
        images[np.unique(each)] += 1
    order = sorted(range(1, len(classes) + 1), key=lambda label: -boxes[label])
    return {classes[label - 1]: (int(boxes[label]), int(images[label])) for label in order}
