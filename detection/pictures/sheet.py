"""Sheets: pictures in rows and columns, with headings and captions, in one PNG."""

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageOps

from ...base.errors import NatsError
from ...base.files import atomic_file
from .drawing import load_font, shorten

HEADING, CAPTION, GAP = 26, 14, 14  # pixels
CELL_SIDE = 480  # pixels, of a comparison sheet


class Cell(NamedTuple):
    """A picture with the lines that are written under it, the first in black and others in grey.

    Example:
        >>> Cell(Image.open("photo.jpg"), ("photo.jpg", "3 objects"))
    """

    picture: Image.Image
    captions: tuple[str, ...] = ()


def write_sheet(
    path: str | os.PathLike, sections: Mapping[str, Sequence[Cell]], columns: int, *, titles: Sequence[str] = ()
) -> None:
    """Write a PNG of pictures in rows, under a heading for each section.

    Args:
        path: the PNG file.
        sections: at least one cell by heading; what a heading says after a line break is small and grey under it.
        columns: most pictures in a row.
        titles: of the columns.

    Example:
        >>> write_sheet("sheet.png", {"train": [Cell(Image.open("photo.jpg"), ("photo.jpg",))]}, columns=4)
    """
    large, small = load_font(HEADING), load_font(CAPTION)
    columns = min(columns, max(map(len, sections.values())))
    step = GAP + max(cell.picture.width for cells in sections.values() for cell in cells)
    top = GAP + (HEADING + GAP if titles else 0)
    texts = [((GAP + index * step, GAP), title, large, "black", step - GAP) for index, title in enumerate(titles)]
    pictures = []
    for heading, cells in sections.items():
        if heading:
            title, _, note = heading.partition("\n")
            texts.append(((GAP, top), title, large, "black", columns * step - GAP))
            texts.append(((GAP, top + HEADING + 8), note, small, "#555555", columns * step - GAP))
            top += HEADING + (CAPTION + GAP + 8 if note else GAP)
        for start in range(0, len(cells), columns):
            row = cells[start : start + columns]
            for left, (picture, captions) in zip(range(GAP, GAP + columns * step, step), row, strict=False):
                pictures.append((picture, (left, top)))
                for line, text in enumerate(captions):
                    place = (left, top + picture.height + 4 + line * (CAPTION + 5))
                    texts.append((place, text, small, "#555555" if line else "black", step - GAP))
            top += GAP + max(cell.picture.height + len(cell.captions) * (CAPTION + 5) for cell in row)
    sheet = Image.new("RGB", (GAP + columns * step, top), "white")
    for picture, place in pictures:
        sheet.paste(picture, place)
    draw = ImageDraw.Draw(sheet)
    for place, text, font, colour, room in texts:
        draw.text(place, shorten(text, font, room), fill=colour, font=font)
    with atomic_file(path) as scratch:
        sheet.save(scratch, format="PNG")


def comparison_sheet(columns: Mapping[str, Sequence[Image.Image]], path: str | os.PathLike) -> None:
    """Write a PNG with one titled column per entry and one row per image, such as ground truth, plain, NATS.

    Args:
        columns: equally many images under each title; images of any size, fitted into equal cells.
        path: the PNG file.

    Raises:
        NatsError: no images, or columns of different lengths.

    Example:
        >>> comparison_sheet({"plain": [Image.open("a.png")], "NATS": [Image.open("b.png")]}, "sheet.png")
    """
    lengths = {title: len(images) for title, images in columns.items()}
    if not lengths or 0 in lengths.values() or len(set(lengths.values())) > 1:
        raise NatsError(f"{path}: expected columns of equally many images, at least one, found {lengths}")
    rows = list(zip(*columns.values(), strict=True))
    size = tuple(min(CELL_SIDE, max(image.size[axis] for row in rows for image in row)) for axis in (0, 1))
    cells = [Cell(ImageOps.pad(image.convert("RGB"), size, color="white")) for row in rows for image in row]
    write_sheet(path, {"": cells}, len(columns), titles=list(columns))
