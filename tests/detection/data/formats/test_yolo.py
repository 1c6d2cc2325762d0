"""YOLO data sets: what data.yaml may say, label lines, equality with the COCO original, and how defects are named."""

import contextlib
import json
import os
import random
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from nats_zoo.detection.data.dataset import CocoDataset
from nats_zoo.detection.data.defects import DataError
from nats_zoo.detection.data.drawn import draw_dataset
from nats_zoo.detection.data.formats.yolo import label_file, list_yolo_splits, read_yolo
from nats_zoo.detection.data.opening import open_split

SIZE = (40, 20)
BOX = "0 0.5 0.5 0.25 0.5"  # [15, 5, 10, 10] in an image of that size


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def write_image(path: Path, size: tuple[int, int] = SIZE, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 120, 60)).save(path, **options)
    return path


def write_yolo(root: Path, labels: dict[str, str | None], **content) -> Path:
    """The usual layout: images/train and labels/train, an image of 40x20 pixels for each label file."""
    for stem, text in labels.items():
        write_image(root / "images" / "train" / f"{stem}.png")
        if text is not None:
            write(root / "labels" / "train" / f"{stem}.txt", text)
    content = {"names": ["cat", "dog"], "train": "images/train", **content}
    write(root / "data.yaml", yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return root


def boxes_of(raw) -> list[list[float]]:
    return [entry.box for entry in raw.annotations]


def only_defect(root: Path):
    """The one defect of a split, which is one line; the data set is refused with the same line, unless asked."""
    (defect,) = read_yolo(root, "train").defects
    assert "\n" not in defect.message
    with pytest.raises(DataError) as error:
        open_split(root, "train", "yolo")
    assert str(error.value) == defect.message
    return defect


# What is read


def test_boxes_polygons_and_images_without_objects(tmp_path):
    labels = {"a": f"{BOX}\n\n1 0.25 0.25 0.75 0.25 0.75 0.75 0.25 0.5\n", "b": "", "c": None}
    raw = read_yolo(write_yolo(tmp_path, labels), "train")
    assert raw.defects == []
    assert [image.file_name for image in raw.images] == [f"images/train/{stem}.png" for stem in "abc"]
    assert [(image.id, image.width, image.height) for image in raw.images] == [(n, *SIZE) for n in (1, 2, 3)]
    box, polygon = raw.annotations
    assert (box.box, box.category_id) == ([15, 5, 10, 10], 1)
    assert box.segmentation is None
    assert (polygon.box, polygon.category_id) == ([10, 5, 20, 10], 2)
    assert polygon.segmentation == [[10, 5, 30, 5, 30, 15, 10, 10]]
    assert polygon.area == pytest.approx(150)  # a trapezium, 20 wide, 5 and 10 high
    assert raw.categories == {1: "cat", 2: "dog"}


@pytest.mark.parametrize(
    "names", [["cat", "dog"], {1: "dog", 0: "cat"}, [" cat", "dog "]], ids=["list", "dict", "spaces"]
)
def test_names(tmp_path, names):
    raw = read_yolo(write_yolo(tmp_path, {"a": BOX}, names=names, nc=2), "train")
    assert list(raw.categories.values()) == ["cat", "dog"]


def test_a_number_of_classes_alone_gives_numbered_names(tmp_path):
    raw = read_yolo(write_yolo(tmp_path, {"a": BOX}, names=None, nc=2), "train")
    assert list(raw.categories.values()) == ["class_0", "class_1"]


def test_names_that_are_numbers_are_names(tmp_path):
    raw = read_yolo(write_yolo(tmp_path, {"a": BOX}, names=[7, 8]), "train")
    assert list(raw.categories.values()) == ["7", "8"]


@pytest.mark.parametrize(
    ("image", "labels"),
    [
        ("/d/images/train/a.jpg", "/d/labels/train/a.txt"),
        ("/d/train/images/a.b.jpg", "/d/train/labels/a.b.txt"),
        ("/images/d/images/a.jpg", "/images/d/labels/a.txt"),
        ("/d/pictures/a.jpg", "/d/pictures/a.txt"),
        ("/d/images_1/a.jpg", "/d/images_1/a.txt"),
    ],
)
def test_where_the_label_file_lies(image, labels):
    assert label_file(Path(image)) == Path(labels)


def test_splits_as_folders_lists_and_text_files(tmp_path):
    for name in ("images/train/a", "images/train/deep/b", "images/more/c", "images/val/d"):
        write_image(tmp_path / f"{name}.png")
        write(tmp_path / f"{name}.txt".replace("images", "labels"), BOX)
    write(tmp_path / "images" / "train" / "notes.md", "no image")
    write(
        tmp_path / "lists" / "val.txt", f"./../images/val/d.png\n\nimages/more/c.png\n{tmp_path}/images/train/a.png\n"
    )
    splits = {"train": ["images/train", "images/more"], "val": "lists/val.txt", "test": None}
    root = write_yolo(tmp_path, {}, **splits)
    assert list_yolo_splits(root) == ["train", "val"]
    found = {split: [image.file_name for image in read_yolo(root, split).images] for split in ("train", "val")}
    assert found["train"] == ["images/more/c.png", "images/train/a.png", "images/train/deep/b.png"]
    assert found["val"] == ["images/more/c.png", "images/train/a.png", "images/val/d.png"]
    assert all(len(read_yolo(root, split).annotations) == 3 for split in found)


@pytest.mark.parametrize("path", [".", "{root}", "/where/it/was/made", "../datasets/elsewhere"])
def test_the_root_is_where_path_says_or_where_the_file_lies(tmp_path, path):
    root = write_yolo(tmp_path / "set", {"a": BOX}, path=path.format(root=tmp_path / "set"))
    for where in (root, root / "data.yaml"):
        assert len(read_yolo(where, "train").images) == 1


def test_the_root_may_lie_elsewhere(tmp_path):
    write_yolo(tmp_path / "set", {"a": BOX})
    config = write(tmp_path / "configs" / "mine.yaml", "path: ../set\ntrain: images/train\nnames: [cat, dog]\n")
    assert len(read_yolo(config, "train").images) == 1
    assert len(read_yolo(config.parent, "train").images) == 1  # the only YAML file there with names


def test_roboflows_paths_are_understood(tmp_path):
    write_image(tmp_path / "train" / "images" / "a.png")
    write(tmp_path / "train" / "labels" / "a.txt", BOX)
    write(tmp_path / "data.yaml", "train: ../train/images\nval: ../valid/images\nnc: 1\nnames: ['cat']\n")
    assert boxes_of(read_yolo(tmp_path, "train")) == [[15, 5, 10, 10]]


def test_images_outside_the_root_keep_their_whole_path(tmp_path):
    image = write_image(tmp_path / "far" / "images" / "a.png")
    write(tmp_path / "far" / "labels" / "a.txt", BOX)
    root = write_yolo(tmp_path / "set", {}, train=str(tmp_path / "far" / "images"))
    assert read_yolo(root, "train").images[0].file_name == str(image)
    assert len(open_split(root, "train")[0][1]["boxes"]) == 1


def test_keypoints_after_the_box_are_left_alone(tmp_path):
    root = write_yolo(tmp_path, {"a": f"{BOX} 0.1 0.1 2 0.2 0.2 2"}, kpt_shape=[2, 3])
    assert boxes_of(read_yolo(root, "train")) == [[15, 5, 10, 10]]
    assert read_yolo(root, "train").annotations[0].segmentation is None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_are_upright(tmp_path, orientation):
    """As Ultralytics reads them; and the image is then loaded so too, where a turn by a quarter tells."""
    root = write_yolo(tmp_path, {})
    exif = Image.Exif()
    exif[0x0112] = orientation
    write_image(root / "images" / "train" / "a.jpg", exif=exif)
    write(root / "labels" / "train" / "a.txt", BOX)
    upright = SIZE[::-1] if orientation > 4 else SIZE
    image = read_yolo(root, "train").images[0]
    assert (image.width, image.height) == upright
    pixels, target = open_split(root, "train")[0]
    assert pixels.shape[:0:-1] == upright
    assert target["boxes"].shape == (1, 4)


def test_a_box_up_to_the_border_does_not_jut_out_by_rounding(tmp_path):
    root = write_yolo(tmp_path, {"a": "0 0.166667 0.5 0.333335 1.000001"})
    assert boxes_of(read_yolo(root, "train"))[0][:2] == [0, 0]
    assert open_split(root, "train").clipped == 0
    twin = write_yolo(tmp_path / "twin", {"a": "0 0.1666 0.5 0.3334 1"})
    assert boxes_of(read_yolo(twin, "train"))[0][0] == pytest.approx(-0.0001 * SIZE[0])
    assert open_split(twin, "train").clipped == 1


# The same data set as COCO and as YOLO


def as_yolo(coco: Path, root: Path, digits: int = 6) -> Path:
    """A YOLO copy of a data set in COCO's layout, with linked images."""
    content = json.loads((coco / "annotations" / "instances_train.json").read_text())
    labels = {
        image["id"]: root / "labels" / "train" / f"{Path(image['file_name']).stem}.txt" for image in content["images"]
    }
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    for path in labels.values():
        write(path, "")
    for image in content["images"]:
        target = root / "images" / "train" / image["file_name"]
        target.parent.mkdir(parents=True, exist_ok=True)
        os.symlink(coco / "images" / image["file_name"], target)
    for entry in content["annotations"]:
        x, y, w, h = entry["bbox"]
        width, height = sizes[entry["image_id"]]
        shares = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
        with open(labels[entry["image_id"]], "a") as file:
            print(entry["category_id"] - 1, *(f"{share:.{digits}f}" for share in shares), file=file)
    names = {number: category["name"] for number, category in enumerate(content["categories"])}
    write(root / "data.yaml", yaml.safe_dump({"path": str(root), "train": "images/train", "names": names}))
    return root


def farthest(one: CocoDataset, other: CocoDataset) -> float:
    """The largest difference between boxes of two data sets whose images and labels are the same, in pixels."""
    assert one.classes == other.classes
    assert len(one) == len(other)
    differences = []
    for (image, target), (other_image, other_target) in zip(one, other, strict=True):
        assert torch.equal(image, other_image)
        assert torch.equal(target["labels"], other_target["labels"])
        differences.append((target["boxes"] - other_target["boxes"]).abs().max().item())
    return max(differences)


def test_a_yolo_copy_gives_the_targets_of_the_coco_original(tmp_path):
    coco = draw_dataset(tmp_path / "coco", train=12, val=0, test=0, size=96)
    original = open_split(coco, "train", "coco")
    assert farthest(open_split(as_yolo(coco, tmp_path / "yolo"), "train"), original) < 1e-3
    assert 1e-3 < farthest(open_split(as_yolo(coco, tmp_path / "coarse", digits=3), "train"), original) < 0.2


# Defects

BAD_LINES = [
    ("wrong columns", "0 0.5 0.5 0.25", "4 columns"),
    ("wrong columns", f"{BOX} 0.9", "6 columns"),
    ("wrong columns", "0 0.1 0.1 0.2 0.2 0.3 0.3 0.4", "8 columns"),
    ("not a number", "0 0.5 half 0.25 0.5", "'half'"),
    ("not a number", "cat 0.5 0.5 0.25 0.5", "'cat'"),
    ("not a number", "0 0.5 nan 0.25 0.5", "'nan'"),
    ("not a number", "0 0.5 0.5 0.25 inf", "'inf'"),
    ("not normalised", "0 20 10 10 10", "20"),
    ("not normalised", "0 0.5 -0.002 0.25 0.5", "-0.002"),
    ("not normalised", "0 0.1 0.1 0.2 0.2 1.3 0.3", "1.3"),
    ("unknown class", "2 0.5 0.5 0.25 0.5", "from 0 to 1"),
    ("unknown class", "-1 0.5 0.5 0.25 0.5", "from 0 to 1"),
    ("unknown class", "0.5 0.5 0.5 0.25 0.5", "from 0 to 1"),
    ("degenerate box", "0 0.5 0.5 0 0.5", "0 0.5"),
    ("duplicate object", "1 0.5 0.5 0.5 0.5", "line 1"),
    ("duplicate object", "1.0  0.50 0.5 0.5 5e-1", "line 1"),
]


@pytest.mark.parametrize(("reason", "line", "text"), BAD_LINES)
def test_a_line_that_can_not_be_used_is_named(tmp_path, reason, line, text):
    root = write_yolo(tmp_path, {"a": f"1 0.5 0.5 0.5 0.5\n\n{line}\n"})
    defect = only_defect(root)
    assert defect.reason == reason
    assert f"{root / 'labels' / 'train' / 'a.txt'}: line 3: " in defect.message
    assert text in defect.message
    dataset = open_split(root, "train", "yolo", skip_bad=True)
    assert dataset.skipped == {reason: 1}
    assert len(dataset[0][1]["boxes"]) == 1


@pytest.mark.parametrize(
    "line", ["1 0.5 0.5 1.0009 0.5", "1 0.5 0.5 0.5 0.50001", "0 0.5 0.5 0.5 0.5", "1.0 -0 1 .5 .5"]
)
def test_a_line_of_that_kind_that_can_be_used_is(tmp_path, line):
    assert read_yolo(write_yolo(tmp_path, {"a": f"1 0.5 0.5 0.5 0.5\n{line}\n"}), "train").defects == []


def test_images_that_can_not_be_read_are_named(tmp_path):
    root = write_yolo(tmp_path, dict.fromkeys("abc", BOX))
    write(root / "images" / "train" / "a.png", "")
    write(root / "images" / "train" / "b.png", "no image")
    raw = read_yolo(root, "train")
    assert [defect.reason for defect in raw.defects] == ["unreadable image"] * 2
    assert str(root / "images" / "train" / "a.png") in raw.defects[0].message
    assert [(image.id, image.file_name) for image in raw.images] == [(3, "images/train/c.png")]
    assert len(open_split(root, "train", skip_bad=True)) == 1


def test_listed_images_that_are_missing_or_listed_twice_are_named(tmp_path):
    root = write_yolo(tmp_path, {"a": BOX}, train="train.txt")
    write(root / "train.txt", "images/train/a.png\nimages/train/nowhere.png\nimages/train/../train/a.png\n")
    raw = read_yolo(root, "train")
    assert sorted(defect.reason for defect in raw.defects) == ["duplicate image", "missing image file"]
    assert len(raw.images) == 1


def test_a_label_file_that_is_no_text_is_named(tmp_path):
    root = write_yolo(tmp_path, {"a": BOX, "b": b"\xff\xfe\x00"})
    defect = only_defect(root)
    assert defect.reason == "unreadable label file"
    assert str(root / "labels" / "train" / "b.txt") in defect.message


def test_a_split_without_any_label_file_is_refused(tmp_path):
    root = write_yolo(tmp_path, {"a": None, "b": None})
    with pytest.raises(DataError) as error:
        read_yolo(root, "train")
    assert str(root / "labels" / "train" / "a.txt") in str(error.value)


BAD_CONFIGS = [
    ("", "expected keys with values"),
    ("names: [a\n", "not YAML"),
    ("[" * 5000, "nested too deeply"),
    ("names: [cat]\n", "at least one split"),
    ("train: images/train\n", "names: expected a list"),
    ("train: images/train\nnames: []\n", "names: expected a list"),
    ("train: images/train\nnames: [yes, cat]\n", "names: 0: expected a name, in quotes"),
    ("train: images/train\nnames: [cat, cat]\n", "each class once"),
    ("train: images/train\nnames: {0: cat, 2: dog}\n", "the classes 0, 1, 2"),
    ("train: images/train\nnames: [cat]\nnc: 2\n", "nc: expected 1"),
    ("train: 3\nnames: [cat]\n", "train: expected a folder, a text file"),
    ("train: images/nowhere\nnames: [cat]\n", "images/nowhere"),
    ("train: labels\nnames: [cat]\n", "expected images in labels"),
    ("val: images/train\nnames: [cat]\n", "the splits there are: val"),
    ("train: images/train\nnames: [cat]\npath: 5\n", "path: expected a folder"),
    ("train: images/train\nnames: [cat]\nkpt_shape: 5\n", "kpt_shape: expected"),
    ("train: 2001-99-99\nnames: [cat]\n", "not YAML"),
    ('train: "\\ud800"\nnames: [cat]\n', "train: expected a folder"),
    (b"\xff\xff", "not YAML"),
    ("!!python/object/apply:os.system ['true']", "not YAML"),
]


@pytest.mark.parametrize(("content", "text"), BAD_CONFIGS)
def test_a_config_that_can_not_be_used_is_named(tmp_path, content, text):
    root = write_yolo(tmp_path, {"a": BOX})
    write(root / "data.yaml", content)
    with pytest.raises(DataError) as error:
        read_yolo(root, "train")
    message = str(error.value)
    assert message.startswith(str(root / "data.yaml"))
    assert text in message
    assert "\n" not in message


def test_a_folder_without_a_config_is_named(tmp_path):
    assert list_yolo_splits(tmp_path) == []
    with pytest.raises(DataError, match=r"expected YOLO's data\.yaml"):
        read_yolo(tmp_path, "train")


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    config=st.binary(max_size=80) | st.text(max_size=60).map(lambda text: f"names: {text}\ntrain: {text}".encode()),
    label=st.binary(max_size=200) | st.lists(st.floats() | st.integers(0, 2), max_size=8).map(str).map(str.encode),
)
def test_garbage_is_a_data_error_at_most(tmp_path, config, label):
    root = write_yolo(tmp_path, {"a": BOX, "b": label})
    assert len(read_yolo(root, "train").images) == 2
    write(root / "data.yaml", config)
    with contextlib.suppress(DataError):
        read_yolo(root, "train")


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_every_line_is_read_or_named(tmp_path, seed):
    rng = random.Random(seed)
    words = ["0", "1", "7", "0.5", "0.25", "-0.1", "1e3", "nan", "x", "0.75", "0.5", "0.5"]
    lines = [" ".join(rng.choices(words, k=rng.choice([4, 5, 5, 5, 7, 8]))) for _ in range(6)]
    raw = read_yolo(write_yolo(tmp_path, {"a": "\n".join(lines)}), "train")
    assert len(raw.annotations) + len(raw.defects) == 6
