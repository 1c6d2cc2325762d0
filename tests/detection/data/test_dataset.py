"""COCO data sets: what is read, what is refused and how it is named; augmentation is a function of its seed."""

import copy
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

from nats_zoo import NatsError
from nats_zoo.detection.data.augment import eval_transforms, train_transforms
from nats_zoo.detection.data.dataset import CocoDataset, collate
from nats_zoo.detection.data.defects import DataError
from nats_zoo.detection.data.formats.coco import find_split, read_annotations
from nats_zoo.detection.evaluation.coco import evaluate
from tests.support.paths import SHARED_DATA

# Category ids are sparse and out of order; image 30 has no box, image 40 a crowd and a box that juts out
CONTENT = {
    "images": [
        {"id": 20, "file_name": "red.png", "width": 40, "height": 30},
        {"id": 30, "file_name": "grey.jpg", "width": 20, "height": 50},
        {"id": 40, "file_name": "deep/blue.png", "width": 32, "height": 32},
    ],
    "annotations": [
        {"id": 1, "image_id": 20, "category_id": 7, "bbox": [5, 6, 10, 12], "area": 77.5, "iscrowd": 0},
        {"id": 2, "image_id": 40, "category_id": 3, "bbox": [-4, 20.5, 10, 20], "iscrowd": 0},
        {"id": 3, "image_id": 20, "category_id": 3, "bbox": [0, 0, 40, 30]},
        {"id": 4, "image_id": 40, "category_id": 3, "bbox": [1, 1, 30, 30], "area": 500, "iscrowd": 1},
    ],
    "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
}


def write_annotations(folder: Path, content: object) -> Path:
    path = folder / "annotations" / "instances_val.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def draw_images(folder: Path) -> Path:
    (folder / "deep").mkdir(parents=True)
    red = Image.new("RGB", (40, 30))
    red.paste((255, 0, 0), (5, 6, 15, 18))
    red.save(folder / "red.png")
    Image.new("L", (20, 50), 128).save(folder / "grey.jpg")
    Image.new("RGB", (32, 32), (0, 0, 255)).save(folder / "deep" / "blue.png")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return draw_images(tmp_path_factory.mktemp("images") / "val")


@pytest.fixture
def dataset(tmp_path, images) -> CocoDataset:
    return CocoDataset(write_annotations(tmp_path, CONTENT), images)


# Items


def test_classes_are_labelled_in_order_of_category_id(dataset):
    assert dataset.classes == ("cat", "dog")
    assert dataset.category_ids == (3, 7)
    assert dataset.image_ids == (20, 30, 40)
    assert len(dataset) == 3
    assert dataset.skipped == {}


def test_item_is_what_torchvision_detectors_take(dataset):
    image, target = dataset[0]
    assert isinstance(image, tv_tensors.Image)
    assert image.dtype == torch.float32
    assert image.shape == (3, 30, 40)
    assert torch.equal(image[:, 6, 5], torch.tensor([1.0, 0.0, 0.0]))
    assert isinstance(target["boxes"], tv_tensors.BoundingBoxes)
    assert target["boxes"].canvas_size == (30, 40)
    assert target["boxes"].dtype == torch.float32
    assert target["boxes"].tolist() == [[5, 6, 15, 18], [0, 0, 40, 30]]
    assert target["labels"].tolist() == [2, 1]
    assert target["labels"].dtype == torch.int64
    assert target["image_id"] == 20
    assert target["area"].tolist() == [77.5, 1200]
    assert target["iscrowd"].tolist() == [0, 0]


def test_grey_image_without_boxes_stays_and_becomes_rgb(dataset):
    image, target = dataset[1]
    assert image.shape == (3, 50, 20)
    assert image.unique().tolist() == pytest.approx([128 / 255])
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == target["area"].shape == target["iscrowd"].shape == (0,)


def test_crowd_is_no_target_and_a_box_that_juts_out_is_clipped_and_counted(dataset):
    _, target = dataset[2]
    assert target["boxes"].tolist() == [[0, 20.5, 6, 32]]
    assert dataset.clipped == 1


# Transposed


def test_the_transposed_twin_swaps_rows_and_columns_of_pixels_sizes_and_boxes(tmp_path, images):
    path = write_annotations(tmp_path, CONTENT)
    plain, twin = CocoDataset(path, images), CocoDataset(path, images, transpose=True)
    for (image, target), (turned, swapped) in zip(plain, twin, strict=True):
        assert type(turned) is tv_tensors.Image
        assert torch.equal(turned, image.transpose(1, 2))
        assert swapped["boxes"].canvas_size == target["boxes"].canvas_size[::-1]
        assert torch.equal(swapped["boxes"], target["boxes"][:, [1, 0, 3, 2]])
        assert all(torch.equal(swapped[key], target[key]) for key in ("labels", "area", "iscrowd"))
        assert swapped["image_id"] == target["image_id"]
    assert twin.clipped == plain.clipped == 1
    assert twin.select([2]).to_coco()["images"] == twin.to_coco()["images"][2:]


def test_transposing_twice_is_the_identity(tmp_path, images):
    content = read_annotations(write_annotations(tmp_path, CONTENT))
    turned = content.transposed()
    assert turned.to_coco() != content.to_coco()
    assert turned.transposed().to_coco() == content.to_coco()
    again = write_annotations(tmp_path, turned.to_coco())
    twice = CocoDataset(again, transposed_files(images, tmp_path / "turned"), transpose=True)
    check_same_items(twice, CocoDataset(write_annotations(tmp_path, CONTENT), lossless(images, tmp_path)))


def test_the_transposed_twin_equals_transposed_files(tmp_path, images):
    """The oracle: the same data set with every file rewritten by Pillow."""
    path = write_annotations(tmp_path, CONTENT)
    twin = CocoDataset(path, lossless(images, tmp_path), transpose=True)
    rewritten = CocoDataset(write_annotations(tmp_path, twin.to_coco()), transposed_files(images, tmp_path / "turned"))
    check_same_items(twin, rewritten)
    assert twin.to_coco() == rewritten.to_coco()


def check_same_items(one: CocoDataset, other: CocoDataset) -> None:
    for (image, target), (other_image, other_target) in zip(one, other, strict=True):
        assert torch.equal(image, other_image)
        assert target["boxes"].canvas_size == other_target["boxes"].canvas_size
        for key in ("boxes", "labels", "area", "iscrowd"):
            assert torch.equal(target[key], other_target[key]), key


def lossless(images: Path, folder: Path) -> Path:
    """Copies under the same names, all of them PNG inside."""
    return rewrite(images, folder / "lossless", lambda image: image)


def transposed_files(images: Path, folder: Path) -> Path:
    return rewrite(images, folder, lambda image: image.transpose(Image.Transpose.TRANSPOSE))


def rewrite(images: Path, folder: Path, change) -> Path:
    for path in images.rglob("*.*"):
        target = folder / path.relative_to(images)
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            change(image).save(target, "PNG")
    return folder


def test_a_perfect_prediction_has_ap_100_on_the_transposed_twin_only(tmp_path, images):
    twin = CocoDataset(write_annotations(tmp_path, CONTENT), images, transpose=True)
    results = [
        {"image_id": entry["image_id"], "category_id": entry["category_id"], "bbox": entry["bbox"], "score": 0.9}
        for entry in twin.to_coco()["annotations"]
        if not entry["iscrowd"]
    ]
    assert evaluate(twin, results).ap == pytest.approx(100)
    assert evaluate(CocoDataset(twin.annotations, images), results).ap < 50


@pytest.mark.parametrize("transpose", [False, True])
def test_boxes_of_the_twin_move_with_the_pixels(tmp_path, images, transpose):
    """Under random flips too, which come after it."""
    path = write_annotations(tmp_path, CONTENT)
    data = CocoDataset(path, images, train_transforms(0.5, 0.5), transpose=transpose)
    for epoch in range(6):
        data.set_epoch(epoch)
        image, target = data[0]
        rows, columns = torch.where(image[0] == 1)
        box = [columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1]
        assert target["boxes"][0].tolist() == box
        assert (box[2] - box[0], box[3] - box[1]) == ((12, 10) if transpose else (10, 12))


def test_the_size_of_a_file_is_checked_as_annotated_not_as_transposed(tmp_path):
    images = draw_images(tmp_path / "images")
    Image.new("RGB", (30, 40)).save(images / "red.png")
    twin = CocoDataset(write_annotations(tmp_path, CONTENT), images, transpose=True)
    with pytest.raises(DataError, match="expected 40x30 pixels as annotated, the file stores 30x40"):
        twin[0]


@pytest.mark.parametrize(
    ("box", "clipped"),
    [
        ([-1, 5, 10, 10], [0, 5, 9, 15]),
        ([5, -1, 10, 10], [5, 0, 15, 9]),
        ([35, 5, 10, 10], [35, 5, 40, 15]),
        ([5, 25, 10, 10], [5, 25, 15, 30]),
        ([0, 0, 40, 30], None),
    ],
)
def test_clipping_at_each_side_is_counted(tmp_path, images, box, clipped):
    content = {**CONTENT, "annotations": [{"id": 1, "image_id": 20, "category_id": 3, "bbox": box}]}
    dataset = CocoDataset(write_annotations(tmp_path, content), images)
    assert dataset[0][1]["boxes"].tolist() == [clipped or [0, 0, 40, 30]]
    assert dataset.clipped == (clipped is not None)


def test_collate_keeps_sizes(dataset):
    images, targets = collate([dataset[0], dataset[1]])
    assert [image.shape[-2:] for image in images] == [(30, 40), (50, 20)]
    assert [target["image_id"] for target in targets] == [20, 30]


def test_a_torchvision_detector_trains_on_a_batch(dataset):
    detector = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=3, min_size=64)
    losses = detector(*collate(dataset[i] for i in range(3)))
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_to_coco_reads_back_the_same(dataset, tmp_path, images):
    again = CocoDataset(write_annotations(tmp_path, dataset.to_coco()), images)
    assert again.to_coco() == dataset.to_coco()
    annotations = {(a["image_id"], tuple(a["bbox"])): a for a in again.to_coco()["annotations"]}
    assert set(annotations) == {(a["image_id"], tuple(a["bbox"])) for a in CONTENT["annotations"]}
    assert annotations[40, (1, 1, 30, 30)]["iscrowd"] == 1
    assert annotations[20, (0, 0, 40, 30)]["area"] == 1200


def test_select_keeps_only_the_chosen_images_and_an_epoch_of_its_own(tmp_path, images):
    path = write_annotations(tmp_path, CONTENT)
    whole = CocoDataset(path, images, train_transforms(jitter=0.5))
    part = whole.select([2, 0])
    assert part.image_ids == (40, 20)
    assert part.classes == whole.classes
    assert whole.image_ids == (20, 30, 40)
    assert torch.equal(part[1][0], whole[0][0])
    assert {a["image_id"] for a in part.to_coco()["annotations"]} == {20, 40}
    part.set_epoch(1)
    assert not torch.equal(part[1][0], whole[0][0])
    whole.set_epoch(1)
    assert torch.equal(part[1][0], whole[0][0])


# Bad entries


def edit(key: str, index: int, **fields):
    def change(content: dict) -> None:
        content[key][index].update(fields)

    return change


def drop(key: str, index: int, field: str):
    def change(content: dict) -> None:
        del content[key][index][field]

    return change


BAD_ENTRIES = {
    "image id missing": (drop("images", 1, "id"), "images[1]: id: expected an integer", "bad id"),
    "image id text": (edit("images", 1, id="30"), "images[1]: id: expected an integer", "bad id"),
    "image id twice": (edit("images", 1, id=20), "image 20: id: expected each id once", "duplicate id"),
    "no file name": (drop("images", 1, "file_name"), "image 30: file_name: expected", "no file name"),
    "no width": (drop("images", 1, "width"), "image 30: width: expected a positive", "no size"),
    "height 0": (edit("images", 1, height=0), "image 30: height: expected a positive", "no size"),
    "no file": (edit("images", 1, file_name="x.jpg"), "image 30: file_name: expected", "missing image file"),
    "no folder": (edit("images", 1, file_name="x/grey.jpg"), "image 30: file_name: expected", "missing image file"),
    "null in name": (edit("images", 1, file_name="\0/x"), "image 30: file_name: expected", "missing image file"),
    "annotation id missing": (drop("annotations", 0, "id"), "annotations[0]: id: expected an integer", "bad id"),
    "annotation id twice": (edit("annotations", 0, id=2), "annotation 2: id: expected each id once", "duplicate id"),
    "unknown image": (edit("annotations", 0, image_id=21), "annotation 1: image_id: expected", "unknown image"),
    "image id true": (edit("annotations", 0, image_id=True), "annotation 1: image_id: expected", "unknown image"),
    "image id list": (edit("annotations", 0, image_id=[20]), "annotation 1: image_id: expected", "unknown image"),
    "unknown category": (edit("annotations", 0, category_id=1), "annotation 1: category_id", "unknown category"),
    "no box": (drop("annotations", 0, "bbox"), "annotation 1: bbox: expected [x, y,", "degenerate box"),
    "box of three": (edit("annotations", 0, bbox=[1, 2, 3]), "annotation 1: bbox: expected [x, y,", "degenerate box"),
    "box of text": (edit("annotations", 0, bbox=["1", 2, 3, 4]), "annotation 1: bbox: expected", "degenerate box"),
    "box with nan": (edit("annotations", 0, bbox=[1, 2, float("nan"), 4]), "annotation 1: bbox", "degenerate box"),
    "box with inf": (edit("annotations", 0, bbox=[1, 2, float("inf"), 4]), "annotation 1: bbox", "degenerate box"),
    "box too large": (edit("annotations", 0, bbox=[1, 2, 10**400, 4]), "annotation 1: bbox", "degenerate box"),
    "width 0": (edit("annotations", 0, bbox=[1, 2, 0, 4]), "annotation 1: bbox: expected a width", "degenerate box"),
    "height -1": (edit("annotations", 0, bbox=[1, 2, 3, -1]), "annotation 1: bbox: expected a width", "degenerate box"),
    "too thin": (edit("annotations", 0, bbox=[1, 2, 0.005, 4]), "annotation 1: bbox: expected a", "degenerate box"),
    "sliver": (edit("annotations", 0, bbox=[-9.995, 0, 10, 5]), "a box inside 40x30 pixels", "box outside image"),
    "outside": (edit("annotations", 0, bbox=[41, 0, 5, 5]), "a box inside 40x30 pixels", "box outside image"),
    "beside": (edit("annotations", 0, bbox=[-5, 0, 5, 5]), "a box inside 40x30 pixels", "box outside image"),
    "area text": (edit("annotations", 0, area="large"), "annotation 1: area: expected", "bad area"),
    "crowd 2": (edit("annotations", 0, iscrowd=2), "annotation 1: iscrowd: expected 0 or 1", "bad iscrowd"),
}


def assert_one_line(error: BaseException, *parts: str) -> None:
    message = str(error)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(("change", "expected", "reason"), BAD_ENTRIES.values(), ids=BAD_ENTRIES.keys())
def test_bad_entry_is_refused_by_name_or_left_out_and_counted(tmp_path, images, change, expected, reason):
    content = copy.deepcopy(CONTENT)
    change(content)
    path = write_annotations(tmp_path, content)
    with pytest.raises(DataError) as error:
        CocoDataset(path, images)
    assert_one_line(error.value, f"{path}: ", expected)

    dataset = CocoDataset(path, images, skip_bad=True)
    assert dataset.skipped == {reason: 1}
    kept = dataset.to_coco()
    assert (len(kept["images"]), len(kept["annotations"])) in {(2, 4), (3, 3)}
    assert all(torch.isfinite(target["boxes"]).all() for _, target in dataset)


def test_boxes_of_an_image_that_is_left_out_are_not_counted_besides(tmp_path, images):
    content = copy.deepcopy(CONTENT)
    edit("images", 0, file_name="gone.png")(content)
    edit("annotations", 1, bbox=[0, 0, 0, 0])(content)
    dataset = CocoDataset(write_annotations(tmp_path, content), images, skip_bad=True)
    assert dataset.skipped == {"missing image file": 1, "degenerate box": 1}
    assert dataset.image_ids == (30, 40)
    assert len(dataset.to_coco()["annotations"]) == 1


BAD_FILES = {
    "empty": ("", "the file is empty"),
    "blank": (" \n", "the file is empty"),
    "no JSON": ("{'images': 3", "not JSON"),
    "no text": (b"\x89PNG\r\n\x1a\n\xff\xff", "not JSON"),
    "deep": ("[" * 200_000, "nested too deeply"),
    "a list": ("[]", "expected an object with images, annotations and categories"),
    "no images": ({"images": None}, "images: expected a list of objects, found None"),
    "images no list": ({"images": {}}, "images: expected a list of objects"),
    "images of numbers": ({"images": [1]}, "images[0]: expected an object"),
    "no image": ({"images": []}, "images: expected at least one usable image, found none"),
    "annotations no list": ({"annotations": "x"}, "annotations: expected a list"),
    "categories no list": ({"categories": 1}, "categories: expected a list"),
    "no category": ({"categories": []}, "categories: expected at least one category"),
    "category 0": ({"categories": [{"id": 0, "name": "cat"}]}, "categories[0]: id: expected a positive integer"),
    "category text": ({"categories": [{"id": "1", "name": "cat"}]}, "categories[0]: id: expected a positive integer"),
    "category true": ({"categories": [{"id": True, "name": "cat"}]}, "categories[0]: id: expected a positive integer"),
    "no name": ({"categories": [{"id": 1}]}, "categories[0]: name: expected a name"),
    "id twice": ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "categories[1]: expected an id"),
    "name twice": ({"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}, "categories[1]: expected an id"),
}


@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.parametrize(("content", "expected"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_file_is_refused_by_name(tmp_path, images, content, expected, skip_bad):
    path = tmp_path / "instances.json"
    if isinstance(content, dict):
        content = json.dumps({**CONTENT, **content})
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as error:
        CocoDataset(path, images, skip_bad=skip_bad)
    assert_one_line(error.value, f"{path}: ", expected)


def test_file_that_is_not_there_is_refused_by_name(tmp_path, images):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(DataError) as error:
            CocoDataset(path, images)
        assert_one_line(error.value, f"{path}: can not be read")


def test_no_usable_image_says_what_became_of_them(tmp_path):
    path = write_annotations(tmp_path, CONTENT)
    with pytest.raises(DataError) as error:
        CocoDataset(path, tmp_path / "nowhere", skip_bad=True)
    assert_one_line(error.value, f"{path}: images", "3 with missing image file")


def test_data_errors_are_bad_input():
    assert issubclass(DataError, NatsError)


# Bad images


def write_one_image(folder: Path, name: str, width: int = 12, height: int = 8) -> CocoDataset:
    content = {**CONTENT, "annotations": [], "images": [{"id": 5, "file_name": name, "width": width, "height": height}]}
    return CocoDataset(write_annotations(folder, content), folder)


def test_size_other_than_annotated_is_refused(tmp_path):
    Image.new("RGB", (8, 12)).save(tmp_path / "a.png")
    dataset = write_one_image(tmp_path, "a.png")
    with pytest.raises(DataError) as error:
        dataset[0]
    assert_one_line(error.value, f"{dataset.annotations}: image 5: {tmp_path / 'a.png'}", "12x8", "8x12")


def test_pixels_are_taken_as_stored_whatever_the_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to display
    stored = Image.new("RGB", (12, 8))
    stored.paste((255, 255, 255), (0, 0, 6, 8))
    stored.save(tmp_path / "a.jpg", exif=exif, quality=100)
    image, _ = write_one_image(tmp_path, "a.jpg")[0]
    assert image.shape == (3, 8, 12)
    assert image[:, :, :6].mean() > 0.95
    assert image[:, :, 6:].mean() < 0.05


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n broken"])
def test_file_that_is_no_image_is_refused(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    dataset = write_one_image(tmp_path, "a.png")
    with pytest.raises(DataError) as error:
        dataset[0]
    assert_one_line(error.value, f"{dataset.annotations}: image 5: {tmp_path / 'a.png'}: can not be decoded")


def test_truncated_image_is_refused_in_one_line_from_a_worker_too(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (8, 12, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[: len(whole) // 2 + 250])
    dataset = write_one_image(tmp_path, "a.jpg")
    with pytest.raises(DataError) as here:
        dataset[0]
    with pytest.raises(DataError) as from_worker:
        next(iter(DataLoader(dataset, num_workers=1, collate_fn=collate)))
    assert_one_line(here.value, "image 5", "can not be decoded")
    assert str(from_worker.value) == str(here.value)


def test_an_image_with_any_broken_byte_is_decoded_or_refused(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (12, 8), (200, 100, 50)).save(path)
    whole = path.read_bytes()
    dataset = write_one_image(tmp_path, path.name)
    refused = 0
    for position in range(len(whole)):
        for value in (0, 5, 255):
            path.write_bytes(whole[:position] + bytes([value]) + whole[position + 1 :])
            try:
                assert dataset[0][0].shape == (3, 8, 12)
            except DataError as error:
                assert_one_line(error, f"{dataset.annotations}: image 5: {path}")
                refused += 1
    assert refused > 0


@pytest.mark.parametrize(("name", "dtype"), [("a.png", np.uint16), ("a.tiff", np.float32), ("b.tiff", np.int32)])
def test_more_than_eight_bits_are_refused_rather_than_clipped(tmp_path, name, dtype):
    Image.fromarray(np.full((8, 12), 40_000, dtype=dtype)).save(tmp_path / name)
    with pytest.raises(DataError) as error:
        write_one_image(tmp_path, name)[0]
    assert_one_line(error.value, "image 5", "expected 8 bits per channel")


# Finding a split


@pytest.mark.parametrize("folder", ["val", "images", "images/val", "JPEGImages", "."])
def test_find_split_finds_the_images_of_each_layout(tmp_path, folder):
    path = write_annotations(tmp_path, CONTENT)
    (tmp_path / "images").mkdir()  # there, but with other files in it
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "other.png")
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30)).save(tmp_path / folder / "red.png")
    annotations, images = find_split(tmp_path, "val")
    assert annotations == path
    assert images.resolve() == (tmp_path / folder).resolve()


def test_find_split_takes_a_folder_relative_to_the_root_or_absolute(tmp_path, images):
    write_annotations(tmp_path, CONTENT)
    (tmp_path / "elsewhere").mkdir()
    assert find_split(tmp_path, "val", "elsewhere")[1] == tmp_path / "elsewhere"
    assert find_split(str(tmp_path), "val", images)[1] == images


def test_find_split_names_what_it_looked_for(tmp_path):
    with pytest.raises(DataError) as error:
        find_split(tmp_path, "val")
    path = tmp_path / "annotations" / "instances_val.json"
    assert_one_line(error.value, f"{tmp_path}: ", "'val'", str(path))

    write_annotations(tmp_path, CONTENT)
    with pytest.raises(DataError) as error:
        find_split(tmp_path, "val")
    assert_one_line(error.value, f"{path}: ", "'red.png'", str(tmp_path / "JPEGImages"), str(tmp_path / "images/val"))

    with pytest.raises(DataError) as error:
        find_split(tmp_path, "val", "nowhere")
    assert_one_line(error.value, f"{tmp_path}: images: ", str(tmp_path / "nowhere"))

    path.write_text("")
    with pytest.raises(DataError) as error:
        find_split(tmp_path, "val")
    assert_one_line(error.value, f"{path}: ")


# Augmentation


def items_by_id(loader) -> dict[int, tuple[torch.Tensor, list]]:
    found = {}
    for batch_images, targets in loader:
        for image, target in zip(batch_images, targets, strict=True):
            found[target["image_id"]] = (torch.as_tensor(image), target["boxes"].tolist())
    return found


def equal_items(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[key][0], other[key][0]) and one[key][1] == other[key][1] for key in one
    )


@pytest.fixture
def augmented(tmp_path, images) -> CocoDataset:
    return CocoDataset(write_annotations(tmp_path, CONTENT), images, train_transforms(0.5, 0.5, jitter=0.5), seed=3)


def test_augmentation_depends_on_neither_order_nor_workers_nor_other_randomness(augmented):
    plain = items_by_id(DataLoader(augmented, collate_fn=collate))
    torch.manual_seed(99)
    random.seed(99)
    reversed_in_workers = DataLoader(augmented, 2, sampler=[2, 1, 0], num_workers=2, collate_fn=collate)
    assert equal_items(plain, items_by_id(reversed_in_workers))


def test_augmentation_leaves_the_global_generator_alone(augmented):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    augmented[0]
    assert torch.equal(torch.rand(3), expected)


def test_each_epoch_and_each_seed_augments_differently_and_repeats(augmented, images):
    first = items_by_id(DataLoader(augmented, collate_fn=collate))
    augmented.set_epoch(1)
    second = items_by_id(DataLoader(augmented, collate_fn=collate))
    assert not equal_items(first, second)
    augmented.set_epoch(0)
    assert equal_items(first, items_by_id(DataLoader(augmented, collate_fn=collate)))
    other_seed = CocoDataset(augmented.annotations, images, augmented.transforms, seed=4)
    assert not equal_items(first, items_by_id(DataLoader(other_seed, collate_fn=collate)))


def test_each_image_is_augmented_differently(tmp_path, images):
    twins = [{"id": number, "file_name": "red.png", "width": 40, "height": 30} for number in range(4)]
    path = write_annotations(tmp_path, {**CONTENT, "images": twins, "annotations": []})
    dataset = CocoDataset(path, images, train_transforms(jitter=0.5))
    pixels = {tuple(image.flatten().tolist()) for image, _ in dataset}
    assert len(pixels) == 4


def test_set_epoch_reaches_workers_that_persist(augmented):
    loader = DataLoader(augmented, num_workers=1, persistent_workers=True, collate_fn=collate)
    for epoch in (0, 1):
        augmented.set_epoch(epoch)
        assert equal_items(items_by_id(loader), items_by_id(DataLoader(augmented, collate_fn=collate)))


def test_boxes_move_with_the_pixels(tmp_path, images):
    """The first box of red.png is exactly its red rectangle: find it again in the pixels, whatever the flips."""
    dataset = CocoDataset(write_annotations(tmp_path, CONTENT), images, train_transforms(0.5, 0.5))
    seen = set()
    for epoch in range(20):
        dataset.set_epoch(epoch)
        image, target = dataset[0]
        rows, columns = torch.where(image[0] == 1)
        box = [columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1]
        assert target["boxes"][0].tolist() == box
        seen.add(tuple(box))
    assert len(seen) == 4


def test_jitter_changes_pixels_and_not_boxes(tmp_path, images):
    path = write_annotations(tmp_path, CONTENT)
    plain, jittered = (CocoDataset(path, images, train_transforms(flip=0, jitter=j))[0] for j in (0, 0.5))
    assert not torch.equal(plain[0], jittered[0])
    assert jittered[0].min() >= 0
    assert jittered[0].max() <= 1
    assert torch.equal(plain[1]["boxes"], jittered[1]["boxes"])


@pytest.mark.parametrize("name", ["flip", "vertical_flip", "jitter"])
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_impossible_augmentation_is_refused(name, value):
    with pytest.raises(NatsError, match=f"^{name}: expected a number in 0..1, found"):
        train_transforms(**{name: value})


def write_one_box(folder: Path, width: int, height: int, box: tuple) -> Path:
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": width, "height": height}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": box}],
        "categories": CONTENT["categories"],
    }
    return write_annotations(folder, content)


def boxes_around(limit: int) -> st.SearchStrategy:
    return st.tuples(*[st.floats(-1.2 * limit, 1.2 * limit)] * 4)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(width=st.integers(1, 10_000), height=st.integers(1, 10_000), box=boxes_around(10_000))
def test_a_box_is_kept_when_some_of_it_is_visible(tmp_path, width, height, box):
    kept = read_annotations(write_one_box(tmp_path, width, height, box), skip_bad=True)
    x, y, w, h = box
    visible = min(w, h, min(x + w, width) - max(x, 0), min(y + h, height) - max(y, 0))
    assert (kept.skipped == {}) == (visible >= 0.01)
    assert len(kept.images[0].boxes) + sum(kept.skipped.values()) == 1


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(width=st.integers(1, 60), height=st.integers(1, 60), box=boxes_around(60), mirror=st.booleans())
def test_every_kept_box_lies_in_its_image_and_has_an_extent(tmp_path, width, height, box, mirror):
    Image.new("L", (width, height)).save(tmp_path / "a.png", compress_level=0)
    path = write_one_box(tmp_path, width, height, box)
    transforms = train_transforms(flip=1, vertical_flip=1) if mirror else eval_transforms()
    dataset = CocoDataset(path, tmp_path, transforms, skip_bad=True)
    boxes = dataset[0][1]["boxes"]
    assert len(boxes) == 1 - sum(dataset.skipped.values())
    for x1, y1, x2, y2 in boxes.tolist():
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= height


# Real data

REAL_SPLITS = [
    ("bccd", "train", 205),
    ("bccd", "val", 87),
    ("bccd", "test", 72),
    ("nwpu-vhr10-512", "train", 520),
    ("nwpu-vhr10-512", "val", 130),
    ("neu-det", "train", 1439),
    ("neu-det", "val", 360),
]


@pytest.mark.parametrize(("name", "split", "count"), REAL_SPLITS)
def test_real_data_loads_whole(name, split, count):
    if not (SHARED_DATA / name).is_dir():
        pytest.skip(f"needs {SHARED_DATA / name}")
    dataset = CocoDataset(*find_split(SHARED_DATA / name, split))
    assert len(dataset) == count
    for image, target in dataset:
        height, width = image.shape[-2:]
        x1, y1, x2, y2 = target["boxes"].T
        assert ((x1 >= 0) & (x1 < x2) & (x2 <= width) & (y1 >= 0) & (y1 < y2) & (y2 <= height)).all()
        assert ((target["labels"] >= 1) & (target["labels"] <= len(dataset.classes))).all()
