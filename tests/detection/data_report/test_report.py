"""`nats data`: its numbers against plain counting, every defect by name, its picture, and its exit codes."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageColor
from pycocotools.coco import COCO

from nats_zoo import NatsError
from nats_zoo.cli import commands as cli
from nats_zoo.detection.data.annotations import ImageRecord
from nats_zoo.detection.data.drawn import draw_dataset
from nats_zoo.detection.data_report.check import check_split
from nats_zoo.detection.data_report.report import report_data
from nats_zoo.detection.data_report.samples import choose_samples
from nats_zoo.detection.pictures.drawing import MASK_OPACITY, class_colour
from tests.support.paths import SHARED_DATA

RED = (255, 0, 0)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    return draw_dataset(tmp_path_factory.mktemp("drawn") / "data", train=6, val=3, test=0, size=64)


@pytest.fixture
def data(drawn, tmp_path) -> Path:
    root = shutil.copytree(drawn, tmp_path / "data")
    (root / "annotations" / "instances_test.json").unlink()  # no images
    return root


def change(root: Path, split: str, edit) -> None:
    path = root / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def write_coco(root: Path, images: list[tuple], annotations: list[dict], categories=("cat", "dog")) -> Path:
    """Images as (name, width, height), numbered from 1, all red."""
    (root / "annotations").mkdir(parents=True)
    for name, width, height in images:
        Image.new("RGB", (width, height), RED).save(root / name)
    content = {
        "images": [
            {"id": number, "file_name": name, "width": width, "height": height}
            for number, (name, width, height) in enumerate(images, start=1)
        ],
        "annotations": [{"id": number, **entry} for number, entry in enumerate(annotations, start=1)],
        "categories": [{"id": number, "name": name} for number, name in enumerate(categories, start=1)],
    }
    (root / "annotations" / "instances_train.json").write_text(json.dumps(content))
    return root


# Numbers


def test_numbers_are_those_of_pycocotools(drawn, tmp_path):
    report, _ = report_data(drawn, "train", output=tmp_path, samples=0)
    (split,) = report.splits
    coco = COCO(drawn / "annotations" / "instances_train.json")
    entries = coco.loadAnns(coco.getAnnIds())
    assert (split.images, split.boxes) == (len(coco.imgs), len(entries))
    names = {category["id"]: category["name"] for category in coco.loadCats(coco.getCatIds())}
    assert {name: boxes for name, (boxes, _) in split.classes.items() if boxes} == dict(
        Counter(names[entry["category_id"]] for entry in entries)
    )
    assert {name: images for name, (_, images) in split.classes.items()} == {
        name: len(coco.getImgIds(catIds=[number])) for number, name in names.items()
    }
    assert split.sizes == {
        "small": len(coco.getAnnIds(areaRng=[0, 32**2])),
        "medium": len(coco.getAnnIds(areaRng=[32**2, 96**2])),
        "large": len(coco.getAnnIds(areaRng=[96**2, 1e10])),
    }
    per_image = [len(coco.getAnnIds(imgIds=[number])) for number in coco.imgs]
    assert split.boxes_per_image == (min(per_image), np.median(per_image), max(per_image))
    ratios = [entry["bbox"][2] / entry["bbox"][3] for entry in entries]
    assert split.aspect_ratios == pytest.approx((min(ratios), np.median(ratios), max(ratios)))
    assert split.image_sizes == [(64, 64, 6)]
    assert split.masks == len(entries)
    assert (split.empty, split.crowd, split.defects, split.notes) == (0, 0, [], [])


def test_crowd_empty_twice_clipped_and_turned(tmp_path):
    images = [("a.png", 40, 30), ("b.png", 20, 50), ("c.jpg", 20, 50)]
    box = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 8, 4]}
    crowd = {"image_id": 1, "category_id": 2, "bbox": [1, 2, 30, 20], "iscrowd": 1}
    root = write_coco(tmp_path / "data", images, [box, box, crowd, {**box, "bbox": [-5, 2, 10, 10]}])
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.new("RGB", (20, 50)).save(root / "c.jpg", exif=exif)
    report, _ = report_data(root, output=tmp_path / "out")
    (split,) = report.splits
    assert report.defects == []
    assert (split.images, split.boxes, split.crowd, split.empty, split.masks) == (3, 3, 1, 2, 0)
    assert split.classes == {"cat": (3, 1), "dog": (0, 0)}
    assert split.image_sizes == [(20, 50, 2), (40, 30, 1)]
    assert (split.widths, split.heights) == ((20, 20, 40), (30, 50, 50))
    text = str(report)
    for line in ("1 box there twice", "1 box partly outside", "1 image that EXIF turns", "1 region, left out"):
        assert line in text
    assert "2 images without objects" in text


def test_images_in_two_splits_are_remarked(data, tmp_path):
    report, _ = report_data(data, output=tmp_path, samples=0)
    assert report.notes == []
    shutil.copy(data / "annotations" / "instances_train.json", data / "annotations" / "instances_val.json")
    report, _ = report_data(data, output=tmp_path, samples=0)
    assert report.notes == ["train and val have 6 images in common"]
    assert "train and val have 6 images in common" in str(report)


def test_json_holds_the_same_numbers(data, tmp_path):
    report, written = report_data(data, output=tmp_path / "out")
    content = json.loads((tmp_path / "out" / "data.json").read_text())
    assert content["format"] == "coco"
    assert [split["split"] for split in content["splits"]] == ["train", "val"]
    for split, numbers in zip(report.splits, content["splits"], strict=True):
        assert numbers["boxes"] == split.boxes == sum(each["boxes"] for each in numbers["classes"].values())
        assert numbers["boxes_per_image"]["max"] == split.boxes_per_image.max
        assert numbers["defects"] == []
    assert written == [f"numbers: {tmp_path / 'out' / 'data.json'}", f"picture: {tmp_path / 'out' / 'data.png'}"]


# Defects


def test_every_defect_is_counted_and_named(data, tmp_path):
    def edit(content):
        content["annotations"][0]["bbox"] = [1, 1, 0, 5]
        content["annotations"][1]["category_id"] = 99
        content["annotations"][2]["segmentation"] = [[1, 1, 2, 2]]
        content["images"][4]["width"] = 65

    change(data, "train", edit)
    (data / "images" / "train_00005.png").write_bytes((data / "images" / "train_00005.png").read_bytes()[:200])
    (data / "images" / "train_00003.png").unlink()
    (data / "annotations" / "instances_val.json").write_text("")
    report, _ = report_data(data, output=tmp_path, samples=2)
    counts = Counter(defect.reason for defect in report.defects)
    assert counts == {
        "degenerate box": 1,
        "unknown category": 1,
        "bad mask": 1,
        "size mismatch": 1,
        "unreadable image": 1,
        "missing image file": 1,
        "unusable split": 1,
    }
    assert report.splits[0].images == 3
    text = str(report)
    for defect in report.defects:
        assert defect.message in text
    assert "split val: can not be used" in text


def test_many_defects_of_a_kind_are_counted_and_a_few_shown(tmp_path):
    bad = [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 0, number]} for number in range(10)]
    root = write_coco(tmp_path / "data", [("a.png", 40, 30)], bad)
    report, _ = report_data(root, output=tmp_path / "out")
    text = str(report)
    assert "10 x degenerate box" in text
    assert "... and 7 more" in text
    assert text.count("annotation ") == 3
    content = json.loads((tmp_path / "out" / "data.json").read_text())
    assert len(content["splits"][0]["defects"]) == 10


# The picture


def picture_of_square(folder: Path, **more) -> np.ndarray:
    """The picture of a red image of 96x48 pixels, enlarged by 5, with one square object of 20 pixels' side."""
    square = {"image_id": 1, "category_id": 1, "bbox": [40, 20, 20, 20], **more}
    root = write_coco(folder / "data", [("a.png", 96, 48)], [square])
    report_data(root, output=folder / "out.png")
    return np.asarray(Image.open(folder / "out.png")).astype(int)


def extent(found: np.ndarray) -> tuple[int, int]:
    """Rows and columns between the first and the last pixel found."""
    return tuple(int(np.ptp(places)) for places in np.nonzero(found))


def test_the_picture_shows_the_image_and_the_box_as_large_as_it_is(tmp_path):
    pixels = picture_of_square(tmp_path)
    assert extent((pixels == RED).all(2)) == pytest.approx((5 * 48, 5 * 96), abs=3)
    colour = ImageColor.getrgb(class_colour(1))
    longest = [row for row in (pixels == colour).all(2) if row.sum() > 80]  # the upper and lower line, not the name
    assert {int(np.ptp(np.flatnonzero(row))) for row in longest} <= set(range(95, 112))
    assert len(longest) >= 4


def test_the_picture_shows_masks(tmp_path):
    """Half of the box, a triangle, is tinted in the colour of the class; without a mask nothing is."""
    triangle = [[40, 20, 60, 20, 40, 40]]
    colour = np.array(ImageColor.getrgb(class_colour(1)))
    mixed = np.round((1 - MASK_OPACITY) * np.array(RED) + MASK_OPACITY * colour)
    tinted = (np.abs(picture_of_square(tmp_path / "a", segmentation=triangle) - mixed) <= 2).all(2)
    assert 0.8 * 100 * 100 / 2 < tinted.sum() < 100 * 100 / 2
    assert not (np.abs(picture_of_square(tmp_path / "b") - mixed) <= 2).all(2).any()


def test_two_equal_boxes_keep_their_own_masks(tmp_path):
    """One object of two with the same class and box covers its upper half, the other its lower half."""
    halves = [[[40, 20, 60, 20, 60, 30, 40, 30]], [[40, 30, 60, 30, 60, 40, 40, 40]], [[1, 1, 2, 2]]]
    box = {"image_id": 1, "category_id": 1, "bbox": [40, 20, 20, 20]}
    root = write_coco(tmp_path / "data", [("a.png", 96, 48)], [{**box, "segmentation": half} for half in halves])
    checked = check_split(root, "train", "coco")
    assert [defect.reason for defect in checked.defects] == ["bad mask"]
    masks = checked.content.images[0].masks
    assert masks.counts[2] == b""  # the object of the bad mask stays, without one
    upper, lower = masks.decode(np.array([True, True, False]))
    assert (upper[20:30].sum(), upper[30:].sum()) == (200, 0)
    assert (lower[:30].sum(), lower[30:40].sum()) == (0, 200)
    assert report_data(root, output=tmp_path / "out")[0].splits[0].masks == 2


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (3000, 4), (1500, 1100), (16, 16)])
def test_any_image_size(tmp_path, size):
    box = {"image_id": 1, "category_id": 2, "bbox": [0, 0, *size]}
    root = write_coco(tmp_path / "data", [("a.png", *size)], [box], ("c", "a very long name of a class, " * 9))
    report, _ = report_data(root, output=tmp_path / "out.png")
    assert report.defects == []
    assert Image.open(tmp_path / "out.png").width <= 600


def record(labels: list[int]) -> ImageRecord:
    zeros = np.zeros(len(labels))
    return ImageRecord(1, "a", 9, 9, np.zeros((len(labels), 4)), np.array(labels, int), zeros, zeros.astype(bool))


def test_samples_show_every_class_when_there_is_room():
    records = [record([1])] * 10 + [record([1, 2])] + [record([])] * 10 + [record([3])]
    chosen = choose_samples(records, 4)
    assert {10, 21} <= set(chosen)
    assert len(chosen) == 4
    assert choose_samples(records, 99) == list(range(22))


@given(labels=st.lists(st.lists(st.integers(1, 5), max_size=3), min_size=1, max_size=20), samples=st.integers(1, 12))
def test_chosen_samples_are_as_many_as_asked_and_distinct(labels, samples):
    records = [record(each) for each in labels]
    chosen = choose_samples(records, samples)
    assert len(set(chosen)) == len(chosen) == min(samples, len(records))
    shown = {label for index in chosen for label in labels[index]}
    assert shown == {label for each in labels for label in each} or samples < 5


# The command


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "nats_zoo", "data", *arguments], capture_output=True, text=True, check=False
    )


def test_the_command_in_a_process_of_its_own(data, tmp_path):
    done = run(str(data), "--split", "val", "--output", str(tmp_path / "out.png"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "split val: 3 images" in done.stdout
    assert "split train" not in done.stdout
    assert (tmp_path / "out.png").is_file()
    assert (tmp_path / "out.json").is_file()


def test_exit_codes(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", "data"]) == 0
    assert (tmp_path / "data_data.png").is_file()
    (data / "images" / "val_00001.png").write_bytes(b"")
    assert cli.main(["data", "data", "--samples", "0"]) == 2
    out, err = capsys.readouterr()
    assert "1 x unreadable image" in out
    assert err.splitlines()[-1] == (
        "nats: data: 1 defect (1 x unreadable image); mend them, or leave them out with --skip_bad"
    )
    assert cli.main(["data", "data", "--skip_bad"]) == 0
    assert "1 x unreadable image" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nowhere"], "nowhere: expected a data set's folder"),
        (["data", "--split", "night"], "instances_night.json"),
        (["data", "--format", "yolo"], "data.yaml"),
        (["data", "--samples", "-1"], "samples: expected 0 or more"),
        (["data", "--output", "nowhere/a.png"], "output: nowhere/a.png"),
        (["data", "--output", "data/drawn.json"], "output: data/drawn.json"),
        (["data", "--images", "nowhere", "--split", "val"], "images: expected a folder"),
    ],
)
def test_bad_options_are_one_line_and_write_nothing(data, tmp_path, monkeypatch, capsys, arguments, text):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["data", *arguments]) == 2
    err = capsys.readouterr().err
    assert text in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_split_told_that_can_not_be_read_is_refused(data, tmp_path):
    (data / "annotations" / "instances_val.json").write_text("")
    with pytest.raises(NatsError, match=r"instances_val\.json"):
        report_data(data, "val", output=tmp_path)


# Real data


def test_bccd_as_voc(tmp_path):
    if not (SHARED_DATA / "bccd").is_dir():
        pytest.skip(f"needs {SHARED_DATA / 'bccd'}")
    report, _ = report_data(SHARED_DATA / "bccd", format="voc", output=tmp_path, samples=1)
    assert report.other_formats == ["coco"]
    assert [(split.split, split.images) for split in report.splits] == [
        ("train", 205),
        ("trainval", 292),
        ("val", 87),
        ("test", 72),
    ]
    assert [defect.reason for defect in report.defects] == ["degenerate box"] * 2  # in train and trainval, but once
    assert report.notes == []
