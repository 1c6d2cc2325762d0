"""Pascal VOC: layouts, the two conventions for corners, what becomes of difficult objects, how defects are named."""

import contextlib
import json
import os
import random
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from nats_zoo.detection.data.dataset import CocoDataset
from nats_zoo.detection.data.defects import DataError
from nats_zoo.detection.data.formats.voc import list_voc_splits, read_voc
from nats_zoo.detection.data.opening import open_split
from tests.support.paths import SHARED_DATA

OFFICIAL = "The VOC2007 Database"


def voc_xml(file_name="a.jpg", size=(40, 30), objects=(("cat", 2, 3, 20, 25),), database="Unknown") -> str:
    parts = "".join(
        f"<object><name>{escape(str(name))}</name><difficult>{(*more, 0)[0]}</difficult><bndbox><xmin>{x1}</xmin>"
        f"<ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for name, x1, y1, x2, y2, *more in objects
    )
    width, height = size
    return (
        f"<annotation><filename>{escape(file_name)}</filename><source><database>{database}</database></source>"
        f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>{parts}</annotation>"
    )


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def write_image(path: Path, size=(40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 120, 60)).save(path)
    return path


def write_voc(root: Path, xmls: dict[str, str], split: str | None = "train") -> Path:
    """VOC's own layout with an image of 40x30 pixels for each XML file."""
    for stem, text in xmls.items():
        write(root / "Annotations" / f"{stem}.xml", text)
        write_image(root / "JPEGImages" / f"{stem}.jpg")
    if split:
        write(root / "ImageSets" / "Main" / f"{split}.txt", "\n".join(xmls))
    return root


def boxes_of(raw) -> list[list[float]]:
    return [entry.box for entry in raw.annotations]


def reasons(raw) -> list[str]:
    return [defect.reason for defect in raw.defects]


def only_defect(root: Path, split: str = "train"):
    """The one defect of a split, which names its file; the data set is refused with the same line, unless asked."""
    (defect,) = read_voc(root, split).defects
    assert "\n" not in defect.message
    with pytest.raises(DataError) as error:
        open_split(root, split, "voc")
    assert str(error.value) == defect.message
    return defect


# What is read


def test_an_object_of_vocs_own_files_is_counted_from_one_and_inclusive(tmp_path):
    """As detectron2 has it: (1, W) covers the whole image, and equal corners are a box of one pixel."""
    objects = (("cat", 1, 1, 40, 30), ("cat", 5, 6, 5, 6))
    raw = read_voc(write_voc(tmp_path, {"a": voc_xml(objects=objects, database=OFFICIAL)}), "train")
    assert boxes_of(raw) == [[0, 0, 40, 30], [4, 5, 1, 1]]
    assert raw.defects == []


def test_an_object_of_other_programs_files_is_taken_as_written(tmp_path):
    raw = read_voc(write_voc(tmp_path, {"a": voc_xml(objects=(("cat", 1, 2.5, 40, 30),))}), "train")
    assert boxes_of(raw) == [[1, 2.5, 39, 27.5]]


@pytest.mark.parametrize("database", [OFFICIAL, "Unknown"])
@pytest.mark.parametrize(("one_based", "box"), [(True, [0, 1, 40, 29]), (False, [1, 2, 39, 28])])
def test_the_convention_can_be_told(tmp_path, database, one_based, box):
    root = write_voc(tmp_path, {"a": voc_xml(objects=(("cat", 1, 2, 40, 30),), database=database)})
    assert boxes_of(read_voc(root, "train", one_based=one_based)) == [box]


def test_difficult_objects_are_crowd_and_left_out_of_training(tmp_path):
    objects = (("cat", 2, 3, 20, 25, 1), ("cat", 2, 3, 30, 25, 0), ("cat", 2, 3, 25, 25, ""))
    root = write_voc(tmp_path, {"a": voc_xml(objects=objects)})
    assert [entry.iscrowd for entry in read_voc(root, "train").annotations] == [1, 0, 0]
    dataset = open_split(root, "train")
    assert dataset[0][1]["boxes"].tolist() == [[2, 3, 30, 25], [2, 3, 25, 25]]
    assert [entry["iscrowd"] for entry in dataset.to_coco()["annotations"]] == [1, 0, 0]


def test_parts_of_an_object_are_not_the_object(tmp_path):
    part = "<part><name>head</name><bndbox><xmin>9</xmin><ymin>9</ymin><xmax>12</xmax><ymax>12</ymax></bndbox></part>"
    text = voc_xml().replace("<object>", f"<object>{part}")
    raw = read_voc(write_voc(tmp_path, {"a": text}), "train")
    assert boxes_of(raw) == [[2, 3, 18, 22]]
    assert list(raw.categories.values()) == ["cat"]


def test_ids_count_from_one_in_order_of_file_names(tmp_path):
    xmls = {stem: voc_xml(f"{stem}.jpg") for stem in ("b", "c", "a")}
    raw = read_voc(write_voc(tmp_path, xmls), "train")
    assert [(image.id, image.file_name) for image in raw.images] == [(1, "a.jpg"), (2, "b.jpg"), (3, "c.jpg")]
    assert [entry.image_id for entry in raw.annotations] == [1, 2, 3]


def test_classes_are_those_of_all_splits_sorted(tmp_path):
    """A class that one split lacks must not shift the labels there."""
    write_voc(tmp_path, {"a": voc_xml(objects=(("dog", 2, 3, 20, 25),))}, "train")
    write_voc(tmp_path, {"b": voc_xml("b.jpg", objects=(("ant", 2, 3, 20, 25), ("cat", 2, 3, 20, 25)))}, "val")
    train, val = read_voc(tmp_path, "train"), read_voc(tmp_path, "val")
    assert train.categories == val.categories
    assert list(train.categories.values()) == ["ant", "cat", "dog"]
    assert [entry.category_id for entry in (*train.annotations, *val.annotations)] == [3, 1, 2]


@pytest.mark.parametrize("name", ["labels.txt", "classes.txt"])
def test_a_file_of_classes_gives_their_order(tmp_path, name):
    root = write_voc(tmp_path, {"a": voc_xml(objects=(("cat", 2, 3, 20, 25), ("emu", 1, 1, 9, 9)))})
    write(root / name, "dog\ncat\n")
    raw = read_voc(root, "train")
    assert list(raw.categories.values()) == ["dog", "cat"]
    assert [entry.category_id for entry in raw.annotations] == [2]
    defect = only_defect(root)
    assert defect.reason == "unknown class"
    for text in (str(root / "Annotations" / "a.xml"), "object 2", "name", "'emu'"):
        assert text in defect.message


# Layouts


LAYOUTS = [
    ("ImageSets/Main/train.txt", "Annotations", "JPEGImages"),
    ("ImageSets/train.txt", "annotations_voc", "images"),
    ("train.txt", "boxes", "images/train"),
    ("train.txt", ".", "."),
    (None, "annotations_voc/train", "images/train"),
    (None, "Annotations/train", "JPEGImages"),
    (None, "train/Annotations", "train/images"),
    (None, "train/annotations", "images/kind"),
    (None, "train", "train"),
]


@pytest.mark.parametrize(("listing", "annotations", "images"), LAYOUTS)
def test_layouts(tmp_path, listing, annotations, images):
    write(tmp_path / annotations / "a.v1.xml", voc_xml("a.v1"))  # a name without suffix, as some of NEU-DET's
    if listing:
        write(tmp_path / annotations / "unlisted.xml", voc_xml("unlisted.jpg"))
        write(tmp_path / listing, "a.v1\n")
        write(tmp_path / "README.txt", b"\xff\xfe no list")
    image = write_image(tmp_path / images / "a.v1.png")
    assert list_voc_splits(tmp_path) == ["train"]
    raw = read_voc(tmp_path, "train")
    assert [(raw.folder / entry.file_name).resolve() for entry in raw.images] == [image.resolve()]
    assert len(open_split(tmp_path, "train", "voc")) == 1


def test_a_folder_that_tells_no_splits_is_read_whole(tmp_path):
    root = write_voc(tmp_path, {"a": voc_xml(), "b": voc_xml("b.jpg")}, split=None)
    assert list_voc_splits(root) == ["all"]
    assert len(read_voc(root, "all").images) == 2
    with pytest.raises(DataError) as error:
        read_voc(root, "val")
    for text in (root, "'val'", root / "ImageSets" / "Main" / "val.txt", root / "Annotations" / "val", "'all'"):
        assert str(text) in str(error.value)


def test_lists_per_class_are_no_splits(tmp_path):
    root = write_voc(tmp_path, {"a": voc_xml()})
    write(root / "ImageSets" / "Main" / "cat_train.txt", "a  1\n")
    write(root / "ImageSets" / "Main" / "tiny_set.txt", "a -1\n")
    assert list_voc_splits(root) == ["tiny_set", "train"]
    assert len(read_voc(root, "tiny_set").images) == 1


def test_the_folder_above_several_data_sets_is_none(tmp_path):
    for year in ("VOC2007", "VOC2012"):
        write_voc(tmp_path / year, {"a": voc_xml()})
    assert list_voc_splits(tmp_path) == []
    with pytest.raises(DataError, match="there is one in each of VOC2007, VOC2012"):
        read_voc(tmp_path, "train")


def test_the_images_folder_can_be_told(tmp_path):
    root = write_voc(tmp_path, {"a": voc_xml()})
    write_image(tmp_path / "elsewhere" / "a.png")
    assert read_voc(root, "train", "elsewhere").images[0].file_name == "a.png"
    with pytest.raises(DataError, match="images: expected a folder"):
        read_voc(root, "train", "nowhere")


def test_images_that_lie_nowhere_are_named_with_where_they_were_looked_for(tmp_path):
    root = write_voc(tmp_path, {"a": voc_xml()})
    os.remove(root / "JPEGImages" / "a.jpg")
    with pytest.raises(DataError) as error:
        read_voc(root, "train")
    for text in (root / "Annotations" / "a.xml", root / "JPEGImages", root / "images" / "train"):
        assert str(text) in str(error.value)


def test_the_name_in_the_file_finds_an_image_that_the_stem_does_not(tmp_path):
    root = write_voc(tmp_path, {"a": voc_xml("C:\\me\\photo.jpg")})
    os.rename(root / "JPEGImages" / "a.jpg", root / "JPEGImages" / "photo.jpg")
    assert read_voc(root, "train").images[0].file_name == "photo.jpg"


def test_a_name_that_no_image_has_gives_way_to_the_stem(tmp_path):
    raw = read_voc(write_voc(tmp_path, {"a": voc_xml("before_it_was_renamed.jpg")}), "train")
    assert raw.images[0].file_name == "a.jpg"
    assert raw.defects == []


# Defects

BAD_FILES = {
    "empty XML": "",
    "bad XML": voc_xml()[:-20],
    "no size": voc_xml().replace("<width>40</width>", ""),
}
BAD_SIZES = ["0", "-4", "nan", "inf", "40.5", "forty", ""]
BAD_OBJECTS = [
    ("bad coordinate", "bndbox: xmin", ("cat", "nan", 3, 20, 25)),
    ("bad coordinate", "bndbox: ymin", ("cat", 2, "three", 20, 25)),
    ("bad coordinate", "bndbox: xmax", ("cat", 2, 3, "1e999", 25)),
    ("bad coordinate", "bndbox: ymax", ("cat", 2, 3, 20, "")),
    ("degenerate box", "bndbox", ("cat", 20, 3, 2, 25)),
    ("degenerate box", "bndbox", ("cat", 2, 3, 2, 25)),
    ("bad difficult", "difficult", ("cat", 2, 3, 20, 25, "maybe")),
    ("no class", "name", (" ", 2, 3, 20, 25)),
]


@pytest.mark.parametrize("reason", BAD_FILES)
def test_a_file_that_can_not_be_used_is_named(tmp_path, reason):
    root = write_voc(tmp_path, {"a": voc_xml(), "b": BAD_FILES[reason]})
    defect = only_defect(root)
    assert defect.reason == reason
    assert str(root / "Annotations" / "b.xml") in defect.message
    assert len(open_split(root, "train", "voc", skip_bad=True)) == 1


@pytest.mark.parametrize("value", BAD_SIZES)
def test_a_size_that_is_none_is_named(tmp_path, value):
    root = write_voc(tmp_path, {"a": voc_xml(), "b": voc_xml("b.jpg", size=(40, value))})
    defect = only_defect(root)
    assert defect.reason == "no size"
    assert "size: height" in defect.message


@pytest.mark.parametrize(("reason", "key", "item"), BAD_OBJECTS)
def test_an_object_that_can_not_be_used_is_named(tmp_path, reason, key, item):
    root = write_voc(tmp_path, {"a": voc_xml(objects=[("cat", 2, 3, 20, 25), item])})
    defect = only_defect(root)
    assert defect.reason == reason
    assert f"{root / 'Annotations' / 'a.xml'}: object 2: {key}" in defect.message
    dataset = open_split(root, "train", "voc", skip_bad=True)
    assert dataset.skipped == {reason: 1}
    assert len(dataset[0][1]["boxes"]) == 1


def test_corners_in_the_wrong_order_are_degenerate_when_inclusive_too(tmp_path):
    root = write_voc(tmp_path, {"a": voc_xml(objects=[("cat", 6, 3, 5, 25), ("cat", 5, 3, 5, 25)], database=OFFICIAL)})
    assert only_defect(root).reason == "degenerate box"


def test_swapped_images_are_named(tmp_path):
    root = write_voc(tmp_path, {"a": voc_xml("b.jpg"), "b": voc_xml("a.jpg"), "c": voc_xml("c.jpg")})
    raw = read_voc(root, "train")
    assert reasons(raw) == ["swapped image"] * 2
    assert str(root / "Annotations" / "a.xml") in raw.defects[0].message
    assert "'b.jpg'" in raw.defects[0].message
    assert [image.file_name for image in raw.images] == ["c.jpg"]


def test_missing_ambiguous_and_shared_images_are_named(tmp_path):
    root = write_voc(tmp_path, {stem: voc_xml("") for stem in ("a", "b", "c", "d", "e")})
    os.remove(root / "JPEGImages" / "a.jpg")
    write_image(root / "JPEGImages" / "b.png")
    os.remove(root / "JPEGImages" / "d.jpg")
    write(root / "Annotations" / "d.xml", voc_xml("c.jpg"))
    raw = read_voc(root, "train")
    assert sorted(reasons(raw)) == ["ambiguous image", "duplicate image", "missing image file"]
    by_reason = {defect.reason: defect.message for defect in raw.defects}
    assert str(root / "Annotations" / "a.xml") in by_reason["missing image file"]
    assert "b.jpg, b.png" in by_reason["ambiguous image"]
    assert str(root / "Annotations" / "c.xml") in by_reason["duplicate image"]


def test_a_list_that_names_what_is_not_there_or_twice_is_named(tmp_path):
    root = write_voc(tmp_path, {"a": voc_xml()})
    write(root / "ImageSets" / "Main" / "train.txt", "a\nnowhere\na\n")
    raw = read_voc(root, "train")
    assert reasons(raw) == ["missing annotation file", "duplicate image"]
    assert f"{root / 'ImageSets' / 'Main' / 'train.txt'}: entry 2" in raw.defects[0].message
    assert len(raw.images) == 1


def test_the_size_is_checked_against_the_image(tmp_path):
    root = write_voc(tmp_path, {"a": voc_xml(size=(41, 30))})
    with pytest.raises(DataError, match=r"a\.xml.*expected 41x30 pixels as annotated, the file stores 40x30"):
        open_split(root, "train")[0]


BOMB = '<!DOCTYPE a [<!ENTITY x "{}">{}]>'.format(
    "y" * 10, "".join(f'<!ENTITY x{i} "{f"&x{i - 1 if i else str()};" * 10}">' for i in range(12))
)


@pytest.mark.parametrize(
    "head",
    [BOMB, '<!DOCTYPE a SYSTEM "file:///etc/passwd">', '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>'],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_document_types_and_entities_are_refused(tmp_path, head, encoding):
    text = f'<?xml version="1.0" encoding="{encoding}"?>{head}' + voc_xml().replace("cat", "&x11;")
    root = write_voc(tmp_path, {"a": voc_xml(), "b": ""})
    write(root / "Annotations" / "b.xml", text.encode(encoding))
    defect = only_defect(root)
    assert defect.reason == "bad XML"
    assert "document type" in defect.message


def test_a_file_too_large_is_refused_unread(tmp_path):
    root = write_voc(tmp_path, {"a": voc_xml(), "b": ""})
    with open(root / "Annotations" / "b.xml", "wb") as file:
        file.truncate(2**40)
    assert "16777216 bytes" in only_defect(root).message


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=300) | st.text(max_size=200).map(str.encode), listing=st.binary(max_size=60))
def test_garbage_is_a_data_error_at_most(tmp_path, content, listing):
    root = write_voc(tmp_path, {"a": voc_xml(), "b": ""})
    write(root / "Annotations" / "b.xml", content)
    write(root / "ImageSets" / "Main" / "other.txt", listing)
    assert len(read_voc(root, "train").images) == 1
    assert len(read_voc(root, "train").defects) == 1
    with contextlib.suppress(DataError):
        read_voc(root, "other")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_a_damaged_file_is_read_or_named(tmp_path, seed):
    """Bytes of a valid file replaced, dropped or doubled: always either entries or defects, and never an exception."""
    rng = random.Random(seed)
    content = bytearray(voc_xml(objects=[("cat", 2, 3, 20, 25), ("dog", 4, 4, 9, 9)]).encode())
    for _ in range(rng.randint(1, 8)):
        start = rng.randrange(len(content))
        content[start : start + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
    root = write_voc(tmp_path, {"a": "", "b": voc_xml("b.jpg")})
    write(root / "Annotations" / "a.xml", bytes(content))
    raw = read_voc(root, "train")
    assert len(raw.images) + len({d.message.split(": ")[0] for d in raw.defects}) >= 2


# Real data


def needs(name: str) -> Path:
    if not (SHARED_DATA / name).is_dir():
        pytest.skip(f"needs {SHARED_DATA / name}")
    return SHARED_DATA / name


def targets(dataset: CocoDataset) -> dict[str, list[tuple]]:
    """Class names and boxes by file name."""
    found: dict[str, list[tuple]] = {}
    content = dataset.to_coco()
    names = {category["id"]: category["name"] for category in content["categories"]}
    files = {image["id"]: (image["file_name"], image["width"], image["height"]) for image in content["images"]}
    for image in files.values():
        found[image] = []
    for entry in content["annotations"]:
        found[files[entry["image_id"]]].append((names[entry["category_id"]], *entry["bbox"]))
    return {image: sorted(rows) for image, rows in found.items()}


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_bccd_as_voc_is_bccd_as_coco(split):
    root = needs("bccd")
    voc = open_split(root, split, "voc", skip_bad=True)
    coco = open_split(root, split, "coco")
    assert targets(voc) == targets(coco)
    assert voc.skipped == ({} if split == "test" else {"degenerate box": 1})


def test_bccd_with_corners_of_the_other_convention_is_not(monkeypatch):
    root = needs("bccd")
    shifted = CocoDataset.from_raw(read_voc(root, "test", one_based=True))
    assert targets(shifted) != targets(open_split(root, "test", "coco"))
    # and its two points are boxes of one pixel then
    assert read_voc(root, "trainval", one_based=True).defects == []


def test_bccds_degenerate_boxes_are_named():
    defects = read_voc(needs("bccd"), "trainval").defects
    assert [defect.reason for defect in defects] == ["degenerate box"] * 2
    assert "BloodImage_00338.xml: object 13" in defects[0].message
    assert "BloodImage_00343.xml: object 4" in defects[1].message


def test_neu_det_as_voc_is_neu_det_as_coco(tmp_path):
    """Its XML files tell no split: lists of the COCO files' images do."""
    root = needs("neu-det")
    for name in ("annotations_voc", "images"):
        os.symlink(root / name, tmp_path / name)
    for split in ("train", "val"):
        content = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
        names = "\n".join(Path(image["file_name"]).stem for image in content["images"])
        write(tmp_path / "ImageSets" / "Main" / f"{split}.txt", names)
    for split in ("train", "val"):
        voc, coco = open_split(tmp_path, split), open_split(root, split)
        assert targets(voc) == targets(coco)
        assert voc.classes == coco.classes
        assert np.mean([len(rows) for rows in targets(voc).values()]) > 2
