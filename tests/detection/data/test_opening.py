"""COCO, VOC and YOLO told apart by looking, and read alike."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from nats_zoo import NatsError
from nats_zoo.detection.data.drawn import draw_dataset
from nats_zoo.detection.data.opening import detect_format, find_formats, list_splits, open_split, read_split
from tests.support.paths import SHARED_DATA


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    return draw_dataset(tmp_path_factory.mktemp("drawn") / "data", train=4, val=2, test=0, size=64)


@pytest.fixture
def coco(drawn, tmp_path) -> Path:
    return shutil.copytree(drawn, tmp_path / "data")


def content_of(root: Path, split: str) -> dict:
    return json.loads((root / "annotations" / f"instances_{split}.json").read_text())


def add_voc(root: Path, split: str = "train") -> None:
    """The same boxes as XML files with the splits as lists."""
    content = content_of(root, split)
    names = {category["id"]: category["name"] for category in content["categories"]}
    for image in content["images"]:
        objects = ""
        for entry in (entry for entry in content["annotations"] if entry["image_id"] == image["id"]):
            x, y, w, h = entry["bbox"]
            corners = {"xmin": x, "ymin": y, "xmax": x + w, "ymax": y + h}
            bndbox = "".join(f"<{key}>{value}</{key}>" for key, value in corners.items())
            objects += f"<object><name>{names[entry['category_id']]}</name><bndbox>{bndbox}</bndbox></object>"
        size = f"<size><width>{image['width']}</width><height>{image['height']}</height></size>"
        path = root / "Annotations" / Path(image["file_name"]).with_suffix(".xml")
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"<annotation><filename>{image['file_name']}</filename>{size}{objects}</annotation>")
    listing = root / "ImageSets" / "Main" / f"{split}.txt"
    listing.parent.mkdir(parents=True, exist_ok=True)
    listing.write_text("\n".join(Path(image["file_name"]).stem for image in content["images"]))
    (root / "labels.txt").write_text("\n".join(names.values()))


def add_yolo(root: Path, split: str = "train") -> None:
    """The same boxes as label files, with the split as a list."""
    content = content_of(root, split)
    (root / "labels").mkdir(exist_ok=True)
    for image in content["images"]:
        width, height = image["width"], image["height"]
        lines = []
        for entry in (entry for entry in content["annotations"] if entry["image_id"] == image["id"]):
            x, y, w, h = entry["bbox"]
            shares = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
            lines.append(" ".join(map(str, (entry["category_id"] - 1, *shares))))
        (root / "labels" / Path(image["file_name"]).with_suffix(".txt")).write_text("\n".join(lines))
    (root / f"{split}_images.txt").write_text("\n".join(f"images/{i['file_name']}" for i in content["images"]))
    names = [category["name"] for category in content["categories"]]
    (root / "data.yaml").write_text(yaml.safe_dump({split: f"{split}_images.txt", "names": names}))


def test_told_apart_by_looking_and_coco_before_voc_before_yolo(coco):
    assert find_formats(coco) == ["coco"]
    add_yolo(coco)
    assert find_formats(coco) == ["coco", "yolo"]
    add_voc(coco)
    assert find_formats(coco) == ["coco", "voc", "yolo"]
    for format, folder in (("coco", "annotations"), ("voc", "Annotations"), ("yolo", None)):
        assert detect_format(coco) == format
        if folder:
            shutil.rmtree(coco / folder)


@pytest.mark.parametrize("format", ["voc", "yolo"])
def test_the_formats_give_the_same_targets(coco, format):
    add_voc(coco)
    add_yolo(coco)
    one, other = open_split(coco, "train", "coco"), open_split(coco, "train", format)
    assert one.classes == other.classes
    assert one.image_ids == other.image_ids
    assert len(one) == len(other) == 4
    for (image, target), (other_image, other_target) in zip(one, other, strict=True):
        assert torch.equal(image, other_image)
        assert torch.equal(target["labels"], other_target["labels"])
        assert (target["boxes"] - other_target["boxes"]).abs().max() < 1e-3


@pytest.mark.parametrize("format", ["coco", "voc", "yolo"])
def test_options_reach_the_data_set(coco, format):
    add_voc(coco)
    add_yolo(coco)
    plain, turned = (open_split(coco, "train", format, transpose=transpose) for transpose in (False, True))
    assert torch.equal(turned[0][0], plain[0][0].mT)
    assert torch.equal(turned[0][1]["boxes"], plain[0][1]["boxes"][:, [1, 0, 3, 2]])
    seen = []
    open_split(coco, "train", format, transforms=lambda image, target: seen.append(image) or (image, target))[0]
    assert seen[0].dtype == torch.uint8


def test_masks_are_read_where_they_are_asked_for(coco):
    assert "masks" not in open_split(coco, "train")[0][1]
    assert open_split(coco, "train", masks=True)[0][1]["masks"].shape[1:] == (64, 64)


def test_splits_are_listed_in_the_usual_order(coco):
    for name in ("a_odd", "trainval"):
        shutil.copy(coco / "annotations" / "instances_train.json", coco / "annotations" / f"instances_{name}.json")
    assert list_splits(coco) == ["train", "trainval", "val", "test", "a_odd"]
    add_voc(coco)
    assert list_splits(coco, "voc") == ["train"]
    with pytest.raises(NatsError, match=r"expected data\.yaml \(YOLO\), found none"):
        list_splits(coco, "yolo")


def test_an_annotation_file_is_a_data_set_of_one_split(coco, tmp_path):
    path = coco / "annotations" / "instances_val.json"
    assert (detect_format(path), list_splits(path)) == ("coco", ["val"])
    assert len(open_split(path, "whatever")) == 2
    loose = shutil.copy(path, coco / "mine.json")
    assert read_split(loose, "mine").folder == coco / "images"
    shutil.copytree(coco / "images", tmp_path / "elsewhere")
    assert read_split(path, "val", images=tmp_path / "elsewhere").folder == tmp_path / "elsewhere"
    with pytest.raises(NatsError, match="images: expected a folder"):
        read_split(path, "val", images="nowhere")
    alone = shutil.copy(path, tmp_path / "alone.json")
    with pytest.raises(NatsError) as error:
        read_split(alone, "alone")
    assert str(error.value).startswith(f"{alone}: file_name: ")


def test_a_config_is_a_data_set(coco):
    add_yolo(coco)
    assert detect_format(coco / "data.yaml") == "yolo"
    assert list_splits(coco / "data.yaml") == ["train"]
    assert len(open_split(coco / "data.yaml", "train")) == 4


def test_images_are_found_by_data_yaml_alone(coco):
    add_yolo(coco)
    with pytest.raises(NatsError, match="images: expected none for YOLO"):
        read_split(coco, "train", "yolo", images="images")


def test_what_is_no_data_set_is_told_what_was_looked_for(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(NatsError) as error:
        detect_format(tmp_path)
    for text in (tmp_path, "annotations/instances_SPLIT.json", "Annotations/*.xml", "data.yaml"):
        assert str(text) in str(error.value)
    for path in (tmp_path / "a.png", tmp_path / "nowhere"):
        with pytest.raises(NatsError, match=re.escape(f"{path}: expected")):
            detect_format(path)
    with pytest.raises(NatsError, match="format: expected one of coco, voc, yolo, found 'tfrecord'"):
        open_split(tmp_path, "train", "tfrecord")


def test_a_split_that_is_not_there_is_named(coco):
    add_voc(coco)
    add_yolo(coco)
    for format in ("coco", "voc", "yolo"):
        with pytest.raises(NatsError, match="night"):
            open_split(coco, "night", format)


@pytest.mark.parametrize(
    ("name", "formats", "splits"),
    [
        ("bccd", ["coco", "voc"], ["train", "val", "test"]),
        ("neu-det", ["coco", "voc"], ["train", "val"]),
        ("nwpu-vhr10-512", ["coco"], ["train", "val"]),
    ],
)
def test_real_data_is_told_apart(name, formats, splits):
    if not (SHARED_DATA / name).is_dir():
        pytest.skip(f"needs {SHARED_DATA / name}")
    assert find_formats(SHARED_DATA / name) == formats
    assert list_splits(SHARED_DATA / name) == splits
