"""What the benchmarks share: types of their options, the end of a device's work, and their CSV files."""

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nats_zoo.base.files import atomic_file


def positive(text: str) -> int:
    """An option's integer of 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def height_x_width(text: str) -> tuple[int, int]:
    """An option's HEIGHTxWIDTH in pixels."""
    height, _, width = text.partition("x")
    return positive(height), positive(width)


def synchronise(device: torch.device | str) -> None:
    """Wait until a GPU has done what it was given; without it only the giving would be timed."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows as a CSV file, atomically; what only some have is left empty in the others."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with atomic_file(path) as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
