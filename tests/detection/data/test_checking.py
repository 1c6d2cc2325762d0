"""Damaged data: `nats data`, `nats train` and `nats evaluate` name every defect, or leave it out and count it."""

import copy
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from nats_zoo.cli import commands as cli
from nats_zoo.detection import create_detector, save_detector
from nats_zoo.detection.data.checking import check_annotations
from nats_zoo.detection.data.dataset import CocoDataset, collate
from nats_zoo.detection.data.defects import DataError, count
from nats_zoo.detection.data.formats.coco import parse_coco, read_coco

SIZES = [(48, 40), (40, 48), (56, 40), (48, 48), (64, 40), (40, 64), (40, 40), (48, 40), (48, 40), (40, 40)]
"""(width, height) of the images 0.jpg, 1.jpg ..., whose ids are 10, 11 ..., with the annotations 100 and 101, ..."""

ROTATE = 6  # EXIF's orientation of an image that is to be turned by 90 degrees for display


def noise(size: tuple[int, int], seed: int) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def save_with_orientation(image: Image.Image, path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif, quality=95)


def whole_content() -> dict:
    images, annotations = [], []
    for number, (width, height) in enumerate(SIZES):
        images.append({"id": 10 + number, "file_name": f"{number}.jpg", "width": width, "height": height})
        for box in ([2, 3, 20, 15], [10, 12, 25, 20]):
            annotations.append({"id": 100 + len(annotations), "image_id": 10 + number, "category_id": 1, "bbox": box})
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cat"}]}


class Damage:
    """A data set in COCO's layout that can be spoilt: its folder, and the content of its annotation file."""

    def __init__(self, root: Path):
        self.root = root
        self.path = root / "annotations" / "instances_train.json"
        self.content = whole_content()
        (root / "images").mkdir(parents=True)
        self.path.parent.mkdir()
        for number, size in enumerate(SIZES):
            noise(size, number).save(self.image(number), quality=90)

    def image(self, number: int) -> Path:
        return self.root / "images" / f"{number}.jpg"

    def annotate(self, index: int, **fields) -> None:
        self.content["annotations"][index].update(fields)

    def apply(self, name: str) -> None:
        DAMAGES[name][0](self)
        self.path.write_text(json.dumps(self.content))


def truncate(damage: Damage) -> None:
    path = damage.image(2)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def swap(damage: Damage) -> None:
    one, other = damage.image(4), damage.image(5)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


NAN = math.nan

# Name: what is done, the reasons it is counted under, what the message says, whether only decoding tells it
DAMAGES = {
    "truncated": (truncate, {"unreadable image": 1}, "image 12: {images}/2.jpg: can not be decoded", True),
    "empty image": (
        lambda d: d.image(3).write_bytes(b""),
        {"unreadable image": 1},
        "image 13: {images}/3.jpg: can not be decoded: the file is empty",
        True,
    ),
    "text for an image": (
        lambda d: d.image(3).write_text("<html>404</html>"),
        {"unreadable image": 1},
        "image 13: {images}/3.jpg: can not be decoded: cannot identify",
        True,
    ),
    "swapped": (swap, {"size mismatch": 2}, "image 14: {images}/4.jpg: expected 64x40 pixels as annotated", True),
    "missing": (lambda d: d.image(6).unlink(), {"missing image file": 1}, "image 16: file_name: expected", False),
    "nan box": (
        lambda d: d.annotate(0, bbox=[1, NAN, 5, 5]),
        {"degenerate box": 1},
        "annotation 100: bbox: expected [x, y, width, height], four finite numbers, found [1, nan, 5, 5]",
        False,
    ),
    "negative size": (
        lambda d: d.annotate(1, bbox=[20, 20, -5, 5]),
        {"degenerate box": 1},
        "annotation 101: bbox: expected a width and a height above 0",
        False,
    ),
    "outside": (
        lambda d: d.annotate(2, bbox=[80, 3, 5, 5]),
        {"box outside image": 1},
        "annotation 102: bbox: expected a box inside 40x48 pixels",
        False,
    ),
    "string id": (
        lambda d: d.annotate(3, id="103"),
        {"bad id": 1},
        "annotations[3]: id: expected an integer, found '103'",
        False,
    ),
    "image with a string id": (
        lambda d: (
            d.content["images"][2].update(id="12"),
            [d.annotate(index, image_id="12") for index in (4, 5)],  # which are no defects of their own
        ),
        {"bad id": 1},
        "images[2]: id: expected an integer, found '12'",
        False,
    ),
    "duplicate id": (lambda d: d.annotate(14, id=115), {"duplicate id": 1}, "annotation 115: id: expected each", False),
    "unknown class": (
        lambda d: d.annotate(16, category_id=7),
        {"unknown category": 1},
        "annotation 116: category_id: expected the id of a listed category, found 7",
        False,
    ),
    "unknown image": (
        lambda d: d.annotate(17, image_id=99),
        {"unknown image": 1},
        "annotation 117: image_id: expected the id of a listed image, found 99",
        False,
    ),
}

TOGETHER = [name for name in DAMAGES if name not in ("text for an image", "image with a string id")]
"""They touch different entries."""

# A run of one step
TRAIN = ["--backbone", "test_resnet", "--weights", "null", "--epochs", "1", "--batch_size", "10", "--val_split", "null"]
TRAIN += ["--fpn_channels", "8", "--head_size", "16", "--roi_samples", "16", "--min_size", "64", "--max_size", "64"]
TRAIN += ["--workers", "0"]


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    small = {"weights": None, "fpn_channels": 8, "head_size": 16, "min_size": 64, "max_size": 64}
    detector = create_detector("fasterrcnn", "test_resnet", num_classes=2, classes=("cat",), **small)
    return save_detector(detector, tmp_path_factory.mktemp("model") / "detector")


@pytest.fixture
def damage(tmp_path) -> Damage:
    return Damage(tmp_path / "set")


def commands(damage: Damage, detector: Path, *more: str) -> dict[str, list[str]]:
    root, out = str(damage.root), damage.root.parent
    return {
        "data": ["data", root, "--output", str(out / "report"), "--samples", "0", *more],
        "train": ["train", "--data", root, "--output", str(out / f"run{len(more)}"), *TRAIN, *more],
        "evaluate": ["evaluate", str(detector), root, "--split", "train", "--workers", "0", *more],
    }


def last_line(text: str) -> str:
    """Without the progress bars before it, which stay on their line."""
    return text.rstrip("\n").rpartition("\n")[2].rpartition("\r")[2]


def expected_text(damage: Damage, name: str) -> str:
    return DAMAGES[name][2].format(images=damage.root / "images")


# In a real process


def in_process(arguments: list[str]) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "nats_zoo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


def test_all_damage_at_once_is_named_and_counted_by_real_commands(damage, detector):
    for name in TOGETHER:
        damage.apply(name)
    for name, arguments in commands(damage, detector).items():
        done = in_process(arguments)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr + done.stdout
        assert last_line(done.stderr).startswith("nats: ")
        if name == "data":
            assert all(expected_text(damage, one) in done.stdout for one in TOGETHER)
            assert all(f"{number} x {reason}" in done.stderr for reason, number in reasons(TOGETHER).items())
        else:
            assert done.stderr.count("\n") == 1
            assert f"{damage.path}: annotations[3]: id: expected an integer" in done.stderr
            assert "(and 7 more defects; nats data lists all)" in done.stderr
    for name, arguments in commands(damage, detector, "--skip_bad").items():
        if name != "data":  # which has said the same above
            done = in_process(arguments)
            assert done.returncode == 0, done.stderr
            assert "Traceback" not in done.stderr
            for reason, number in reasons(TOGETHER).items():
                assert f"{number} with {reason}" in done.stderr, (name, reason)


def reasons(names: list[str]) -> dict[str, int]:
    """How often each reason is met, when all of these damages are there."""
    total: dict[str, int] = {}
    for name in names:
        for reason, number in DAMAGES[name][1].items():
            total[reason] = total.get(reason, 0) + number
    return total


# Each by itself


@pytest.mark.parametrize("name", DAMAGES)
def test_each_defect_is_named_by_every_command(name, damage, detector, capfd):
    damage.apply(name)
    _, counts, _, told_by_decoding = DAMAGES[name]
    for command, arguments in commands(damage, detector).items():
        assert cli.main(arguments) == 2
        printed, errors = capfd.readouterr()
        assert expected_text(damage, name) in (printed if command == "data" else last_line(errors)), command
        assert last_line(errors).startswith("nats: ")
        assert "Traceback" not in errors
        if command == "data":
            assert all(f"{number} x {reason}" in printed + errors for reason, number in counts.items())
        elif not told_by_decoding:
            assert len(errors.splitlines()) == 1


@pytest.mark.parametrize("name", DAMAGES)
def test_each_defect_is_left_out_and_counted_on_request(name, damage):
    damage.apply(name)
    dataset = CocoDataset(damage.path, damage.root / "images", skip_bad=True)
    assert dataset.skipped == DAMAGES[name][1]
    assert dataset.left_out.startswith(f"{damage.path}: left out: ")
    assert all(f"{number} with {reason}" in dataset.left_out for reason, number in DAMAGES[name][1].items())
    batches = list(DataLoader(dataset, batch_size=2, collate_fn=collate))
    assert sum(len(images) for images, _ in batches) == len(dataset) > 3
    assert sum(len(target["boxes"]) for _, targets in batches for target in targets) >= 8


def test_data_without_damage_has_no_defect(damage, detector, capfd):
    damage.path.write_text(json.dumps(damage.content))
    for arguments in commands(damage, detector).values():
        assert cli.main(arguments) == 0
    assert "left out" not in "".join(capfd.readouterr())
    assert CocoDataset(damage.path, damage.root / "images", skip_bad=True).left_out == ""


def test_an_empty_annotation_file_is_named_by_every_command(damage, detector, capfd):
    damage.path.write_bytes(b"")
    for more in ([], ["--skip_bad"]):
        for command, arguments in commands(damage, detector, *more).items():
            code = cli.main(arguments)
            printed, errors = capfd.readouterr()
            assert str(damage.path) in printed + errors
            assert "Traceback" not in errors
            assert code == 2 or (command == "data" and more)


def test_more_defects_than_the_first_are_counted(damage):
    damage.apply("nan box")
    with pytest.raises(DataError) as error:
        CocoDataset(damage.path, damage.root / "images")
    assert "more defect" not in str(error.value)
    damage.apply("negative size")
    with pytest.raises(DataError, match=r"annotation 100: .*\(and 1 more defect; nats data lists all\)$"):
        CocoDataset(damage.path, damage.root / "images")


def test_a_line_break_in_a_name_breaks_no_line(damage):
    damage.content["images"][0]["file_name"] = "a\nb\r\n.jpg"
    damage.path.write_text(json.dumps(damage.content))
    checked = check_annotations(read_coco(damage.path, damage.root / "images"), skip_bad=True)
    (defect,) = checked.defects
    assert len(defect.message.splitlines()) == 1


# EXIF


@pytest.mark.parametrize("annotated", ["as stored", "as displayed"])
def test_an_image_that_exif_turns_is_read_as_its_size_was_annotated(damage, annotated):
    stored = Image.fromarray(np.repeat(np.arange(0, 240, 5, dtype=np.uint8)[None, :, None], 40, 0).repeat(3, 2))
    save_with_orientation(stored, damage.image(0), ROTATE)
    width, height = stored.size if annotated == "as stored" else stored.size[::-1]
    damage.content["images"][0].update(width=width, height=height)
    damage.path.write_text(json.dumps(damage.content))
    raw = read_coco(damage.path, damage.root / "images")
    for skip_bad in (False, True):
        dataset = CocoDataset.from_raw(raw, skip_bad=skip_bad)
        assert dataset.skipped == {}
        image, _ = dataset[0]
        with Image.open(damage.image(0)) as file:
            expected = file if annotated == "as stored" else ImageOps.exif_transpose(file)
            expected = torch.from_numpy(np.array(expected.convert("RGB"))).permute(2, 0, 1) / 255
        assert image.shape == (3, height, width)
        torch.testing.assert_close(torch.as_tensor(image), expected)
        assert not torch.allclose(torch.as_tensor(image), expected.flip((1, 2)), atol=0.1)
    assert check_annotations(raw, decode=True).notes == {"EXIF rotation": 1}
    twin = CocoDataset.from_raw(raw, transpose=True)
    torch.testing.assert_close(torch.as_tensor(twin[0][0]), expected.mT)


def test_an_image_that_fits_neither_way_is_a_size_mismatch(damage):
    save_with_orientation(noise((30, 20), 0), damage.image(0), ROTATE)
    damage.path.write_text(json.dumps(damage.content))
    with pytest.raises(DataError, match="expected 48x40 pixels as annotated, the file stores 30x20"):
        check_annotations(read_coco(damage.path, damage.root / "images"), decode=True)


def test_a_turned_image_without_exif_is_a_size_mismatch(damage):
    noise(SIZES[0][::-1], 0).save(damage.image(0))
    damage.path.write_text(json.dumps(damage.content))
    checked = check_annotations(read_coco(damage.path, damage.root / "images"), skip_bad=True, decode=True)
    assert checked.skipped == {"size mismatch": 1}
    assert checked.notes == {}


def test_notes_count_what_can_be_used(damage):
    damage.annotate(0, bbox=[-5, 3, 20, 15])
    damage.content["annotations"][-2:] = []
    damage.path.write_text(json.dumps(damage.content))
    save_with_orientation(noise(SIZES[2], 2), damage.image(2), 3)
    raw = read_coco(damage.path, damage.root / "images")
    assert check_annotations(raw).notes == {"boxes clipped": 1, "images without objects": 1}
    decoded = check_annotations(raw, decode=True)
    assert decoded.notes == {"boxes clipped": 1, "EXIF rotation": 1, "images without objects": 1}
    assert decoded.skipped == {}


# Pascal VOC and YOLO


def write_voc(root: Path) -> Path:
    for name in ("a", "b", "c"):
        (root / "Annotations").mkdir(parents=True, exist_ok=True)
        (root / "JPEGImages").mkdir(exist_ok=True)
        noise((48, 40), 0).save(root / "JPEGImages" / f"{name}.jpg")
        (root / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><filename>{name}.jpg</filename><size><width>48</width><height>40</height></size><object>"
            "<name>cat</name><bndbox><xmin>2</xmin><ymin>3</ymin><xmax>20</xmax><ymax>30</ymax></bndbox></object>"
            "</annotation>"
        )
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "ImageSets" / "Main" / "train.txt").write_text("a\nb\nc\n")
    return root


def write_yolo(root: Path) -> Path:
    for name in ("a", "b", "c"):
        for folder in ("images", "labels"):
            (root / folder / "train").mkdir(parents=True, exist_ok=True)
        noise((48, 40), 0).save(root / "images" / "train" / f"{name}.jpg")
        (root / "labels" / "train" / f"{name}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    (root / "data.yaml").write_text("train: images/train\nnames: [cat]\n")
    return root


OTHERS = {
    "empty XML": (write_voc, "Annotations/b.xml", b"", "b.xml"),
    "torn XML": (write_voc, "Annotations/b.xml", b"<annotation><object>", "b.xml"),
    "empty VOC image": (write_voc, "JPEGImages/b.jpg", b"", "b.jpg"),
    "label of words": (write_yolo, "labels/train/b.txt", b"cat 0.5 0.5 0.4 0.4\n", "b.txt"),
    "label with NaN": (write_yolo, "labels/train/b.txt", b"0 nan 0.5 0.4 0.4\n", "b.txt"),
    "label of an unknown class": (write_yolo, "labels/train/b.txt", b"3 0.5 0.5 0.4 0.4\n", "b.txt"),
    "empty YOLO image": (write_yolo, "images/train/b.jpg", b"", "b.jpg"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_damage_in_other_formats_is_named_by_every_command(name, tmp_path, detector, capfd):
    write, path, content, named = OTHERS[name]
    root = write(tmp_path / "set")
    (root / path).write_bytes(content)
    lines = {
        "data": ["data", str(root), "--output", str(tmp_path / "report")],
        "train": ["train", "--data", str(root), "--output", str(tmp_path / "run"), *TRAIN],
        "evaluate": ["evaluate", str(detector), str(root), "--split", "train", "--workers", "0"],
    }
    for command, arguments in lines.items():
        assert cli.main(arguments) == 2, command
        printed, errors = capfd.readouterr()
        assert named in (printed if command == "data" else last_line(errors))
        assert last_line(errors).startswith("nats: ")
        assert "Traceback" not in errors
    assert cli.main([*lines["train"], "--skip_bad", "--output", str(tmp_path / "other_run")]) == 0
    assert "left out: 1 with" in "".join(capfd.readouterr())


# Anything at all

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
NUMBER = st.floats() | st.integers(-60, 60) | st.just(10**400)
BOX = st.lists(NUMBER, min_size=4, max_size=4)
ID = st.sampled_from([1, 2, 10, 11, "10", True, 1.0]) | JSON
IMAGE = st.fixed_dictionaries(
    {"id": ID, "file_name": st.sampled_from(["0.jpg", "1.jpg"]) | JSON, "width": st.just(48) | JSON, "height": JSON}
)
OBJECT = st.fixed_dictionaries(
    {"id": ID, "image_id": ID, "category_id": ID, "bbox": BOX | JSON},
    optional={"area": NUMBER | JSON, "iscrowd": st.booleans() | JSON, "segmentation": JSON, "where": JSON},
)
REASONS = {"bad id", "duplicate id", "no file name", "no size", "missing image file", "unreadable image"}
REASONS |= {"size mismatch", "unknown image", "unknown category", "degenerate box", "box outside image", "bad area"}
REASONS |= {"bad iscrowd", "no mask", "bad mask"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Damage:
    return Damage(tmp_path_factory.mktemp("whole") / "set")


@settings(max_examples=150)
@given(st.lists(IMAGE, max_size=2), st.lists(OBJECT, max_size=4), st.booleans(), st.booleans())
def test_any_entry_is_a_record_or_a_named_defect(whole, images, annotations, decode, masks):
    content = whole_content()
    content["images"][2:], content["annotations"][4:] = [], []
    content["images"] += copy.deepcopy(images)
    content["annotations"][0]["segmentation"] = [[1, 1, 9, 1, 9, 9]]
    content["annotations"] += copy.deepcopy(annotations)
    whole.path.write_text(json.dumps(content))
    raw = read_coco(whole.path, whole.root / "images")
    checked = check_annotations(raw, skip_bad=True, decode=decode, masks=masks)
    assert {defect.reason for defect in checked.defects} <= REASONS
    assert all(defect.message.startswith(f"{whole.path}: ") for defect in checked.defects)
    assert all(len(defect.message.splitlines()) == 1 for defect in checked.defects)
    bad_images = sum(
        bool(re.match(r": images?[ \[]", found.message[len(str(whole.path)) :])) for found in checked.defects
    )
    assert len(checked.images) == len(content["images"]) - bad_images
    if checked.defects:
        with pytest.raises(DataError):
            check_annotations(raw, decode=decode, masks=masks)
    again = parse_coco(whole.path, checked.to_coco())
    assert count(check_annotations(again, masks=masks and again.has_masks()).defects) == {}
