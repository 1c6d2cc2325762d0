"""What a run trains and evaluates on, said at its start and kept in its log: nothing is left out silently."""

import sys
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator

from ..data.dataset import CocoDataset
from ..data.defects import listed
from .folder import RunFolder
from .hardware import describe_hardware


def report_data(folder: RunFolder, accelerator: Accelerator, data: Mapping[str, CocoDataset]) -> None:
    """Print a line per split on stderr, and begin the log with the same numbers and the hardware, on the main process.

    Args:
        folder: of the run; one that is resumed has its record already.
        accelerator: knows the main process, devices and precision.
        data: by the split's name.
    """
    if not accelerator.is_main_process:
        return
    found = {split: describe_data(dataset) for split, dataset in data.items()}
    for split, description in found.items():
        print(data_line(split, description), file=sys.stderr)
    if not folder.has_log():
        folder.log({"step": 0, "epoch": 0.0, "data": found, "hardware": describe_hardware(accelerator)})


def describe_data(dataset: CocoDataset) -> dict[str, Any]:
    """Counts of a data set as plain data: what can be used, what was left out and why, and what was noticed."""
    content = dataset.content
    crowds = sum(int(image.iscrowd.sum()) for image in content.images)
    return {
        "images": len(content.images),
        "boxes": sum(len(image.boxes) for image in content.images) - crowds,
        "crowd regions": crowds,
        "masks": dataset.masks,
        "classes": list(content.classes),
        "left out": dict(content.skipped),
        "notes": dict(content.notes),
    }


def data_line(split: str, description: Mapping[str, Any]) -> str:
    """One line about a split."""
    crowds = f", {description['crowd regions']:,} crowd regions" if description["crowd regions"] else ""
    objects = f"{description['boxes']:,} boxes{' with masks' if description['masks'] else ''}"
    line = f"{split}: {description['images']:,} images, {objects}{crowds}, {len(description['classes'])} classes"
    if description["left out"]:
        line += f"; left out: {listed(description['left out'])}"
    if description["notes"]:
        line += "; " + ", ".join(f"{count:,} {what}" for what, count in description["notes"].items())
    return line
