"""Pascal VOC data sets: one XML file per image, parsed here; `checking.py` looks at what they say.

Layouts. Splits are told by lists, `ImageSets/Main/{split}.txt` (or `ImageSets/{split}.txt`, `{split}.txt`) with the
name of an image per line, the XML files lying in `Annotations`, `annotations_voc` or another folder; or by folders,
`Annotations/{split}/*.xml`, `{split}/Annotations/*.xml` or `{split}/*.xml`. The split `all` takes every XML file of a
folder that tells no splits.

Corners. In VOC's own files (whose source/database is "The VOC2007 Database" or alike) they are pixels counted from 1,
both inclusive: 1 is subtracted from xmin and ymin, as detectron2 does, and xmax = xmin is a box of one pixel's width.
Everyone else's files (LabelImg's, CVAT's, BCCD, NEU-DET) hold edges in pixels from 0, and are taken as they are
written: a box is xmax - xmin wide, and xmax = xmin is degenerate.

Objects marked `difficult` become COCO's `iscrowd`: left out of training, and neither a hit nor a miss in evaluation,
which is what VOC's own evaluation does with them.
"""

import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from ....base.errors import one_line, short
from ....base.files import TooLargeError, read_limited
from ..annotations import Annotation, Photo, RawData
from ..defects import BadEntry, DataError, Defect
from ..images import ImageIndex, image_stem, is_file

ALL = "all"  # the split of data sets that tell none
MAX_BYTES = 16 * 2**20  # a larger XML file, list of images or list of classes is refused, unread
MAX_ELEMENTS = 400_000  # of an XML file: some 30,000 objects
MAX_LEVELS = 64  # of elements within each other

ANNOTATION_FOLDERS = ("Annotations", "annotations_voc", "annotations", "xml", "xmls", "voc", "labels")
CLASS_FILES = ("labels.txt", "classes.txt")
CORNERS = ("xmin", "ymin", "xmax", "ymax")
_OFFICIAL = re.compile(r"VOC\s*20\d\d")


class VocObject(NamedTuple):
    """One object of an XML file: how messages name it, the class's name and the box, x, y, width, height."""

    where: str
    name: str
    box: list[float]
    is_difficult: bool


class VocAnnotation(NamedTuple):
    """What one XML file says.

    Attributes:
        path: the XML file.
        file_name: as its `filename` says, without folders; empty if it says nothing.
        width: pixels.
        height: pixels.
        objects: those that can be used.
        defects: of those that can not.
    """

    path: Path
    file_name: str
    width: int
    height: int
    objects: list[VocObject]
    defects: list[Defect]

    @property
    def names(self) -> list[str]:
        """Under which to look for the image: the XML file's stem first, as most programs do."""
        return [name for name in (self.path.stem, self.file_name, image_stem(self.file_name)) if name]


def read_voc(
    root: str | Path, split: str, images: str | Path | None = None, *, one_based: bool | None = None
) -> RawData:
    """Read a split of a Pascal VOC data set.

    Image ids count from 1 in order of file names. Classes come from `labels.txt` or `classes.txt`, one per line, if
    there is one in `root`; else they are the names found in all XML files of the data set, of other splits too, sorted.

    The image of an XML file is the one with its stem, or else the one that its `filename` says, with or without
    suffix. If it says another image, which is there too, nobody can tell whose the boxes are: that is a defect.

    Args:
        root: folder of the data set, see the top of this file.
        split: for instance "train"; "all" where no splits are told.
        images: image folder, relative to `root` or absolute. Default: the first of `JPEGImages`, `images/{split}`,
            `{split}/images`, `images`, `{split}`, the folder of the XML files and `root` itself with one of the images.
        one_based: whether corners are inclusive pixels counted from 1. Default: in files whose source/database names a
            VOC year.

    Raises:
        DataError: the split, its images or the classes can not be found.
    """
    root = Path(root)
    layout = _find_layout(root)
    files, defects = _files_of(root, split, layout)
    parsed, broken = _parse_all(files, one_based)
    defects += broken
    for annotation in parsed:
        defects += annotation.defects
    index = _find_images(root, split, images, parsed, files)
    classes = _read_names(root, parsed, set(files), layout)
    photos, annotations = [], []
    for image_id, (name, xml) in enumerate(_locate_images(parsed, index, defects), start=1):
        photos.append(Photo(str(xml.path), image_id, name, xml.width, xml.height))
        for where, label, box, is_difficult in xml.objects:
            if label in classes:
                annotations.append(Annotation(where, image_id, classes[label], box, iscrowd=int(is_difficult)))
            else:
                expected = f"one of the {len(classes)} classes of {root}"
                defects.append(_defect("unknown class", f"{where}: name: expected {expected}, found {short(label)}"))
    names = {number: name for name, number in classes.items()}
    return RawData(root, index.folder, photos, annotations, names, defects)


def list_voc_splits(root: str | Path) -> list[str]:
    """Names of a Pascal VOC data set's splits, sorted; ["all"] where none are told; [] if it is no such data set."""
    layout = _find_layout(Path(root))
    return layout.splits or ([ALL] if layout.flat is not None else [])


# Layout


def _subfolders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:  # not iterdir: nothing is asked about each of a hundred thousand images
            return sorted(Path(entry.path) for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []


def _xml_files(folder: Path) -> list[Path]:
    try:
        return sorted(folder / name for name in os.listdir(folder) if name.lower().endswith(".xml"))
    except OSError:
        return []


def _has_xml(folder: Path) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(entry.name.lower().endswith(".xml") for entry in entries)
    except OSError:
        return False


class _Layout(NamedTuple):
    """How a data set tells its splits.

    Attributes:
        flat: the folder with the XML files of all splits, if there is one.
        lists: the files that list a split's images, by split.
        folders: the folders with the XML files of one split each, by split.
    """

    flat: Path | None
    lists: dict[str, Path]
    folders: dict[str, Path]

    @property
    def splits(self) -> list[str]:
        return sorted({*self.lists, *self.folders})

    def files(self) -> Iterator[Path]:
        """All XML files."""
        for folder in dict.fromkeys([*([] if self.flat is None else [self.flat]), *self.folders.values()]):
            yield from _xml_files(folder)


def _find_layout(root: Path) -> _Layout:
    candidates = [*(root / name for name in ANNOTATION_FOLDERS), root]
    flat = next(filter(_has_xml, candidates), None) or next(filter(_has_xml, _subfolders(root)), None)
    lists = {} if flat is None else _split_lists(root, flat)
    usual = {name.lower() for name in ANNOTATION_FOLDERS}
    folders: dict[str, Path] = {}
    for folder in _subfolders(root):
        if (folder / "ImageSets").is_dir():  # a data set of its own: root is VOCdevkit
            continue
        if _has_xml(folder) and folder.name.lower() not in usual:
            folders.setdefault(folder.name, folder)
        for below in filter(_has_xml, _subfolders(folder)):
            folders.setdefault(folder.name if below.name.lower() in usual else below.name, below)
    return _Layout(flat, lists, {name: folder for name, folder in folders.items() if not (lists and folder == flat)})


def _split_lists(root: Path, flat: Path) -> dict[str, Path]:
    """The files that list a split's images. VOC has one per class and split beside them, such as cat_train.txt."""
    folders = (root / "ImageSets" / "Main", root / "ImageSets")
    found = {path.stem: path for folder in reversed(folders) for path in sorted(folder.glob("*.txt"))}
    found = {path.stem: path for path in sorted(root.glob("*.txt")) if _lists_xml(path, flat)} | found
    return {name: path for name, path in found.items() if name.rpartition("_")[2] not in found or "_" not in name}


def _lists_xml(path: Path, flat: Path) -> bool:
    """Whether a text file is such a list, not a README or the names of classes."""
    try:
        return any(is_file(flat / f"{name}.xml") for name in _listed_names(path)[:5])
    except DataError:
        return False


def _listed_names(path: Path) -> list[str]:
    """Names of images, of which lines may also be file names, paths, or followed by VOC's 1, 0 or -1."""
    lines = (re.sub(r"\s+(-1|0|1)$", "", line) for line in _read_lines(path, "an image"))
    return [image_stem(line.replace("\\", "/").rpartition("/")[2]).removesuffix(".xml") for line in lines]


def _read_lines(path: Path, of: str) -> list[str]:
    try:
        text = read_limited(path, MAX_BYTES).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected the name of {of} per line: {one_line(error)}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _files_of(root: Path, split: str, layout: _Layout) -> tuple[list[Path], list[Defect]]:
    """The XML files of a split, sorted, and the defects of the list that names them."""
    if layout.flat is not None and split in layout.lists:
        return _listed_files(layout.lists[split], layout.flat)
    if split in layout.folders:
        return _xml_files(layout.folders[split]), []
    if layout.flat is not None and split == ALL:
        return _xml_files(layout.flat), []
    if layout.flat is None and not layout.folders:
        below = [path.name for path in _subfolders(root) if (path / "Annotations").is_dir()]
        hint = f"; there is one in each of {', '.join(below)}" if below else ""
        raise DataError(f"{root}: expected Pascal VOC's XML files, for instance in {root / 'Annotations'}{hint}")
    home = layout.flat or root / "Annotations"
    expected = f"a list {root / 'ImageSets' / 'Main' / f'{split}.txt'} or a folder {home / split} of XML files"
    there = f"there are {', '.join(layout.splits)}" if layout.splits else f"the split {ALL!r} takes all files of {home}"
    raise DataError(f"{root}: split {split!r}: expected {expected}; {there}")


def _listed_files(listing: Path, folder: Path) -> tuple[list[Path], list[Defect]]:
    files: set[Path] = set()
    defects = []
    for number, name in enumerate(_listed_names(listing), start=1):
        path, where = folder / f"{name}.xml", f"{listing}: entry {number}"
        if path in files:
            defects.append(_defect("duplicate image", f"{where}: expected each image once, {name!r} came before"))
        elif not is_file(path):
            defects.append(_defect("missing annotation file", f"{where}: expected an XML file {path}"))
        else:
            files.add(path)
    if not files:
        raise DataError(f"{listing}: expected names of XML files in {folder}, found none")
    return sorted(files), defects


# XML


def _parse_all(files: Iterable[Path], one_based: bool | None) -> tuple[list[VocAnnotation], list[Defect]]:
    parsed, defects = [], []
    for path in files:
        try:
            parsed.append(parse_voc(path, one_based))
        except BadEntry as bad:
            defects.append(bad.defect())
    return parsed, defects


def parse_voc(path: Path, one_based: bool | None = None) -> VocAnnotation:
    """Read one XML file.

    Args:
        path: the file; at most 16 MiB, without a document type and so without entities.
        one_based: as for `read_voc`.

    Raises:
        DataError: it can not be used at all; of an object that can not be used, the defect is in the result.
    """
    tree = _parse_xml(path)
    if tree.tag != "annotation":
        found = short(tree.tag)[1:-1]
        raise BadEntry("bad XML", f"{path}: expected <annotation>, as Pascal VOC has it, found <{found}>")
    size = []
    for key in ("width", "height"):
        value = _number(tree, f"size/{key}")
        if not (0 < value < math.inf and value.is_integer()):
            found = short(tree.findtext(f"size/{key}"))
            raise BadEntry("no size", f"{path}: size: {key}: expected a positive number of pixels, found {found}")
        size.append(int(value))
    if one_based is None:
        one_based = _OFFICIAL.search(tree.findtext("source/database") or "") is not None
    objects, defects = [], []
    for number, element in enumerate(tree.findall("object"), start=1):
        try:
            objects.append(_parse_object(f"{path}: object {number}", element, one_based))
        except BadEntry as bad:
            defects.append(bad.defect())
    file_name = _text(tree, "filename").replace("\\", "/").rpartition("/")[2]
    return VocAnnotation(path, file_name, size[0], size[1], objects, defects)


def _parse_xml(path: Path) -> Element:
    try:
        content = read_limited(path, MAX_BYTES)
    except OSError as error:
        raise BadEntry("unreadable annotation file", f"{path}: can not be read: {error.strerror}") from error
    except TooLargeError as error:
        raise BadEntry("bad XML", f"{path}: expected at most {MAX_BYTES} bytes of XML") from error
    if not content.strip():
        raise BadEntry("empty XML", f"{path}: expected Pascal VOC's XML, the file is empty")
    builder = _LimitedBuilder()
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler = builder.start, builder.end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = _refuse_doctype
    try:
        parser.Parse(content, True)
        return builder.close()
    except (expat.ExpatError, ValueError, LookupError) as error:  # the latter two: of the encoding, or the doctype
        raise BadEntry("bad XML", f"{path}: expected XML: {one_line(error)}") from error


class _LimitedBuilder(TreeBuilder):
    """Builds a tree of bounded size and depth."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.level = 0

    def start(self, tag: str, attrs: dict[str, str], /) -> Element:
        self.elements += 1
        self.level += 1
        if self.elements > MAX_ELEMENTS or self.level > MAX_LEVELS:
            raise ValueError(f"at most {MAX_ELEMENTS} elements are read, and {MAX_LEVELS} within each other")
        return super().start(tag, attrs)

    def end(self, tag: str, /) -> Element:
        self.level -= 1
        return super().end(tag)


def _refuse_doctype(name: str, *_: object) -> None:
    raise ValueError(f"a document type, which may define entities, is not read: <!DOCTYPE {name[:40]}")


def _text(element: Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _number(element: Element, path: str) -> float:
    try:
        return float(_text(element, path))
    except ValueError:
        return math.nan


def _parse_object(where: str, element: Element, one_based: bool) -> VocObject:
    name, difficult = _text(element, "name"), _text(element, "difficult")
    if not name:
        raise BadEntry("no class", f"{where}: name: expected the name of a class, found nothing")
    corners = []
    for key in CORNERS:
        corners.append(_number(element, f"bndbox/{key}"))
        if not math.isfinite(corners[-1]):
            found = short(element.findtext(f"bndbox/{key}"))
            raise BadEntry("bad coordinate", f"{where}: bndbox: {key}: expected a finite number, found {found}")
    left, top, right, bottom = corners[0] - one_based, corners[1] - one_based, *corners[2:]
    if right <= left or bottom <= top:
        order = "xmin <= xmax and ymin <= ymax" if one_based else "xmin < xmax and ymin < ymax"
        found = ", ".join(_text(element, f"bndbox/{key}") for key in CORNERS)
        raise BadEntry("degenerate box", f"{where}: bndbox: expected {order}, found {found}")
    if difficult not in ("", "0", "1"):
        raise BadEntry("bad difficult", f"{where}: difficult: expected 0 or 1, found {short(difficult)}")
    return VocObject(where, name, [left, top, right - left, bottom - top], difficult == "1")


# Classes and images


def _read_names(root: Path, parsed: list[VocAnnotation], files: set[Path], layout: _Layout) -> dict[str, int]:
    """Category ids from 1 by class."""
    for path in (root / name for name in CLASS_FILES):
        if path.is_file():
            names = _read_lines(path, "a class")
            if not names:
                raise DataError(f"{path}: expected the name of a class per line, the file is empty")
            if len(set(names)) < len(names):
                twice = next(name for index, name in enumerate(names) if name in names[:index])
                raise DataError(f"{path}: expected each class once, {twice!r} comes again")
            break
    else:
        # Those of the other splits count too, or labels would mean something else in each; their defects are theirs
        others, _ = _parse_all((path for path in layout.files() if path not in files), None)
        names = sorted({item.name for annotation in [*parsed, *others] for item in annotation.objects})
    return {name: number for number, name in enumerate(names, start=1)}


def _find_images(
    root: Path, split: str, images: str | Path | None, parsed: list[VocAnnotation], files: list[Path]
) -> ImageIndex:
    if images is not None:
        if not (root / images).is_dir():
            raise DataError(f"{root}: images: expected a folder {root / images}")
        return ImageIndex(root / images)
    home = files[0].parent
    below = [root / "JPEGImages", root / "images" / split, root / split / "images", root / "images", root / split]
    wanted = [name for annotation in parsed for name in annotation.names] or [path.stem for path in files]
    for folder, recursive in [*((folder, True) for folder in below), (home, False), (root, False)]:
        index = ImageIndex(folder, recursive)
        if index.holds_any(wanted):
            return index
    looked = ", ".join(map(str, dict.fromkeys([*below, home, root])))
    raise DataError(f"{files[0]}: expected an image {files[0].stem} with the suffix of one in one of {looked}")


def _locate_images(
    parsed: list[VocAnnotation], index: ImageIndex, defects: list[Defect]
) -> list[tuple[str, VocAnnotation]]:
    """Image paths, relative to the folder, with what is annotated in them, sorted; an image has one XML file."""
    located: dict[str, VocAnnotation] = {}
    for annotation in parsed:
        try:
            path = _locate_image(annotation, index)
            if path in located:
                expected = f"an image of its own, {path!r} is that of {located[path].path}"
                raise BadEntry("duplicate image", f"{annotation.path}: filename: expected {expected}")
            located[path] = annotation
        except BadEntry as bad:
            defects.append(bad.defect())
    return sorted(located.items())


def _locate_image(annotation: VocAnnotation, index: ImageIndex) -> str:
    stem, name = annotation.path.stem, annotation.file_name
    where = f"{annotation.path}: filename"
    named = index.find(name) or index.find(image_stem(name))
    own = index.find(stem)
    if own and named and not set(named) & set(own):
        expected = f"the image {own[0]!r} of the XML file's name, found {name!r}, which is another image"
        raise BadEntry("swapped image", f"{where}: expected {expected}")
    found = [path for path in own if path in named] or own or named
    if not found:
        expected = f"an image {stem!r} with the suffix of one, or {name!r}," if name else f"an image {stem!r}"
        raise BadEntry("missing image file", f"{where}: expected {expected} in {index.folder}")
    if len(found) > 1:
        raise BadEntry("ambiguous image", f"{where}: expected one image {stem!r}, found {', '.join(found[:3])}")
    return found[0]


def _defect(reason: str, message: str) -> Defect:
    return BadEntry(reason, message).defect()
