"""Read all of a split, decode every image, and keep apart what can be used and what is wrong."""

import os
from pathlib import Path
from typing import NamedTuple

from ...base.errors import NatsError
from ..data.annotations import CocoAnnotations
from ..data.checking import check_annotations
from ..data.defects import Defect
from ..data.opening import Format, read_split

HELD_APART = ("train", "val", "valid", "validation", "test")  # splits of which no image should be in two


class CheckedSplit(NamedTuple):
    """A split as it was read.

    Attributes:
        split: its name.
        defects: of every image, object and mask that can not be used.
        content: what can be used, with the masks that there are; None if nothing can.
        folder: of the images.
    """

    split: str
    defects: list[Defect]
    content: CocoAnnotations | None = None
    folder: Path = Path()

    def files(self) -> set[str]:
        """The files of the images that can be used."""
        images = self.content.images if self.content else ()
        return {os.path.realpath(os.path.join(self.folder, record.file_name)) for record in images}


def check_split(
    root: Path, split: str, format: Format, *, images: str | Path | None = None, is_required: bool = False
) -> CheckedSplit:
    """Read a split and decode all of its images, with a progress bar.

    Args:
        root, split, format, images: as for `opening.read_split`.
        is_required: raise if the split can not be read at all; by default that is one of its defects.

    Raises:
        DataError: the split is required and can not be read.
    """
    defects: list[Defect] = []
    try:
        raw = read_split(root, split, format, images=images)
        defects += raw.defects
        is_required = False  # it can be read
        content = check_annotations(raw, skip_bad=True, decode=True, masks=None)
    except NatsError as error:
        if is_required:
            raise
        return CheckedSplit(split, [*defects, Defect("unusable split", str(error))])
    return CheckedSplit(split, list(content.defects), content, raw.folder or Path())
