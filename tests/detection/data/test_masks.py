"""Masks: read as pycocotools reads them, kept small, turned with their image, refused by name when they are none."""

import contextlib
import copy
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision import tv_tensors
from torchvision.models.detection import maskrcnn_resnet50_fpn

from nats_zoo.detection.data.augment import train_transforms
from nats_zoo.detection.data.checking import check_annotations
from nats_zoo.detection.data.dataset import CocoDataset, collate
from nats_zoo.detection.data.defects import BadEntry, DataError
from nats_zoo.detection.data.formats.coco import parse_coco, read_annotations
from nats_zoo.detection.data.masks import ImageMasks, encode
from tests.support.paths import SHARED_DATA

HEIGHT, WIDTH = 30, 40


def disc(x: float, y: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return ((columns - x) ** 2 + (rows - y) ** 2 <= radius**2).astype(np.uint8)


def compressed(mask: np.ndarray) -> dict:
    rle = coco_mask.encode(np.asfortranarray(mask))
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


def uncompressed(mask: np.ndarray) -> dict:
    """By hand: the lengths of runs of zeros and ones, in turn, down the columns."""
    flat = mask.T.flatten().tolist()
    counts, value = [0], 0
    for pixel in flat:
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


def annotation(number: int, segmentation: object, box=(0, 0, 40, 30), **more) -> dict:
    return {"id": number, "image_id": 5, "category_id": 1, "bbox": list(box), "segmentation": segmentation, **more}


TRIANGLE = [[5.5, 4, 25, 6, 8, 22.5]]
PARTS = [[1, 1, 9, 1, 9, 9, 1, 9], [20, 15, 38, 15, 30, 28]]
CONTENT = {
    "images": [
        {"id": 5, "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
        {"id": 9, "file_name": "b.png", "width": 20, "height": 10},
    ],
    "annotations": [
        annotation(1, TRIANGLE, (5, 4, 20, 19)),
        annotation(2, PARTS, (1, 1, 37, 27)),
        annotation(3, uncompressed(disc(20, 12, 7)), (13, 5, 15, 15)),
        annotation(4, compressed(disc(30, 20, 6)), (24, 14, 13, 13)),
        annotation(5, uncompressed(disc(10, 20, 9)), (1, 11, 19, 19), iscrowd=1),
    ],
    "categories": [{"id": 1, "name": "cat"}],
}


def write(folder: Path, content: dict) -> Path:
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def path(tmp_path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.new("RGB", (20, 10)).save(tmp_path / "b.png")
    return write(tmp_path, CONTENT)


@contextlib.contextmanager
def quiet():
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def load(content: Path | dict) -> COCO:
    with quiet():
        coco = COCO(content if isinstance(content, Path) else None)
        if isinstance(content, dict):
            coco.dataset = content
            coco.createIndex()
    return coco


def masks_by_pycocotools(coco: COCO, image_id: int, crowd: bool = False) -> np.ndarray:
    return np.stack(
        [coco.annToMask(a) for a in coco.loadAnns(coco.getAnnIds([image_id])) if crowd or not a.get("iscrowd")]
    )


# What a data set gives


def test_masks_of_every_form_are_those_of_pycocotools(path):
    _, target = CocoDataset(path, path.parent, masks=True)[0]
    expected = masks_by_pycocotools(load(path), 5)
    assert isinstance(target["masks"], tv_tensors.Mask)
    assert target["masks"].dtype == torch.uint8
    assert target["masks"].shape == (4, HEIGHT, WIDTH)
    assert target["masks"].is_contiguous()
    np.testing.assert_array_equal(target["masks"].numpy(), expected)
    np.testing.assert_array_equal(target["masks"][2].numpy(), disc(20, 12, 7))
    assert not np.array_equal(target["masks"].numpy(), expected[[1, 0, 2, 3]])


def test_an_image_without_objects_has_no_masks_of_its_size(path):
    _, target = CocoDataset(path, path.parent, masks=True)[1]
    assert target["masks"].shape == (0, 10, 20)
    assert target["masks"].dtype == torch.uint8
    _, turned = CocoDataset(path, path.parent, masks=True, transpose=True)[1]
    assert turned["masks"].shape == (0, 20, 10)


def test_masks_are_given_only_where_they_are_asked_for(path):
    dataset = CocoDataset(path, path.parent)
    assert "masks" not in dataset[0][1]
    assert all("segmentation" not in entry for entry in dataset.to_coco()["annotations"])


@pytest.mark.parametrize("transpose", [False, True])
def test_masks_move_with_the_pixels_and_boxes_under_flips(path, transpose):
    data = CocoDataset(path, path.parent, train_transforms(0.5, 0.5), masks=True, transpose=transpose)
    plain_image, plain = CocoDataset(path, path.parent, masks=True, transpose=transpose)[0]
    seen = set()
    for epoch in range(12):
        data.set_epoch(epoch)
        image, target = data[0]
        axes = next(axes for axes in ([], [1], [2], [1, 2]) if torch.equal(image, plain_image.flip(axes)))
        assert torch.equal(target["masks"], plain["masks"].flip(axes))
        seen.add(tuple(axes))
    assert len(seen) == 4


def test_the_transposed_twin_has_transposed_masks(path):
    plain, twin = (CocoDataset(path, path.parent, masks=True, transpose=transpose) for transpose in (False, True))
    assert torch.equal(twin[0][1]["masks"], plain[0][1]["masks"].mT)
    assert not torch.equal(twin[0][1]["masks"][:, :30, :30], plain[0][1]["masks"][:, :30, :30])
    content = twin.to_coco()
    np.testing.assert_array_equal(
        masks_by_pycocotools(load(content), 5, crowd=True),
        masks_by_pycocotools(load(path), 5, crowd=True).transpose(0, 2, 1),
    )
    checked = read_annotations(path, masks=True)
    assert checked.transposed().transposed().to_coco() == checked.to_coco() != content


def test_a_torchvision_detector_trains_on_them(path):
    torch.manual_seed(0)
    detector = maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=2, min_size=64, max_size=64, box_detections_per_img=2
    )
    losses = detector(*collate([CocoDataset(path, path.parent, masks=True)[0]]))
    assert torch.isfinite(losses["loss_mask"])


def test_decoded_masks_are_not_kept():
    """1,000 masks of a megapixel are a gigabyte when decoded."""
    square = [[100, 100, 900, 100, 900, 900, 100, 900]]
    content = {
        "images": [{"id": 5, "file_name": "a.png", "width": 1000, "height": 1000}],
        "annotations": [annotation(number, square, (100, 100, 800, 800)) for number in range(1, 1001)],
        "categories": CONTENT["categories"],
    }
    checked = check_annotations(parse_coco(Path("x"), content), masks=True)
    assert len(checked.images[0].masks) == 1000
    size = len(pickle.dumps(checked.images[0].masks.counts))
    assert size < 6_000_000
    checked.images[0].masks.decode(np.arange(1000) < 3)
    assert len(pickle.dumps(checked.images[0].masks.counts)) == size


# To COCO and back


def evaluate_by_hand(truth: COCO, results: list[dict]) -> np.ndarray:
    with quiet():
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def results_of(masks: list[np.ndarray]) -> list[dict]:
    return [
        {"image_id": 5, "category_id": 1, "segmentation": compressed(mask), "score": 0.9 - 0.1 * number}
        for number, mask in enumerate(masks)
    ]


def test_what_to_coco_gives_is_evaluated_as_the_file_is(path, tmp_path):
    """Crowd too: what lies in its region is no false detection."""
    content = json.loads(json.dumps(CocoDataset(path, path.parent, masks=True).to_coco()))
    file = load(path)
    for entry in file.dataset["annotations"]:  # which COCOeval asks for
        entry.setdefault("iscrowd", 0)
        entry.setdefault("area", entry["bbox"][2] * entry["bbox"][3])
    perfect = [file.annToMask(entry) for entry in file.dataset["annotations"] if not entry["iscrowd"]]
    in_crowd = disc(10, 20, 3)
    cases = {
        "perfect": results_of(perfect),
        "crowd": results_of([in_crowd, *perfect]),
        "apart": results_of([disc(35, 5, 3), *perfect]),
        "moved": results_of([np.roll(mask, 2, axis=1) for mask in perfect]),
    }
    stats = {name: evaluate_by_hand(load(content), results) for name, results in cases.items()}
    for name, results in cases.items():
        np.testing.assert_array_equal(stats[name], evaluate_by_hand(file, results))
    assert stats["perfect"][0] == pytest.approx(1)
    assert stats["crowd"][0] == pytest.approx(1)
    assert stats["apart"][0] < 0.9
    assert stats["moved"][0] < 0.9


def test_what_to_coco_gives_reads_back_the_same(path, tmp_path):
    dataset = CocoDataset(path, path.parent, masks=True)
    again = CocoDataset(write(tmp_path, dataset.to_coco()), tmp_path, masks=True)
    assert again.to_coco() == dataset.to_coco()
    assert torch.equal(again[0][1]["masks"], dataset[0][1]["masks"])
    part = dataset.select([1])
    assert part.to_coco()["annotations"] == []
    assert part[0][1]["masks"].shape == (0, 10, 20)


# Every form against pycocotools


def decode(segmentation: object, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    masks = ImageMasks((encode("x", segmentation, height, width),), height, width)
    return masks.decode(np.array([True]))[0].numpy()


COORDINATES = st.floats(-15, 60) | st.integers(-15, 60)


@given(st.lists(st.lists(st.tuples(COORDINATES, COORDINATES), min_size=3, max_size=8), min_size=1, max_size=3))
def test_polygons_are_filled_as_pycocotools_fills_them(polygons):
    segmentation = [[number for point in polygon for number in point] for polygon in polygons]
    coco = load({**CONTENT, "annotations": [annotation(1, segmentation)]})
    expected = coco.annToMask(coco.anns[1])
    if expected.any():
        np.testing.assert_array_equal(decode(segmentation), expected)
    else:
        with pytest.raises(DataError, match="it covers none"):
            decode(segmentation)


@st.composite
def binary_masks(draw) -> np.ndarray:
    height, width = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    pixels = draw(st.lists(st.integers(0, 1), min_size=height * width, max_size=height * width))
    return np.array(pixels, dtype=np.uint8).reshape(height, width)


@given(binary_masks())
def test_run_lengths_of_both_forms_are_the_mask_they_were_made_of(mask):
    for segmentation in (uncompressed(mask), compressed(mask)):
        if mask.any():
            np.testing.assert_array_equal(decode(segmentation, *mask.shape), mask)
        else:
            with pytest.raises(DataError, match="it covers none"):
                decode(segmentation, *mask.shape)


def test_large_run_lengths_are_read():
    """Of several characters in the compressed form, and growing and shrinking from one run to the next but one."""
    by_column = np.zeros((2000, 3000), dtype=np.uint8)
    for start, stop in ((100_000, 100_001), (100_005, 2_000_000), (2_000_100, 5_900_000)):
        by_column.reshape(-1)[start:stop] = 1
    mask = by_column.T
    np.testing.assert_array_equal(decode(compressed(mask), 3000, 2000), mask)


# Those that are none

NAN, INF = float("nan"), float("inf")
SQUARE = [1, 1, 9, 1, 9, 9, 1, 9]
RUNS = uncompressed(disc(20, 12, 7))
TEXT = compressed(disc(20, 12, 7))

BAD_MASKS = {
    "missing": (None, "expected polygons or run lengths, found None", "no mask"),
    "empty list": ([], "expected polygons or run lengths, found []", "no mask"),
    "text": ("polygon", "expected polygons or run lengths", "bad mask"),
    "number": (3, "expected polygons or run lengths", "bad mask"),
    "true": (True, "expected polygons or run lengths", "bad mask"),
    "a bare polygon": (SQUARE, "[0]: expected a polygon", "bad mask"),
    "empty polygon": ([SQUARE, []], "[1]: expected at least 3 points", "bad mask"),
    "odd": ([[*SQUARE, 3]], "[0]: expected an even number of coordinates, not 9", "bad mask"),
    "two points": ([[1, 1, 9, 9]], "[0]: expected at least 3 points", "bad mask"),
    "nan first": ([[NAN, *SQUARE[1:]]], "[0]: expected finite coordinates", "bad mask"),
    "nan last": ([[*SQUARE[:-1], NAN]], "[0]: expected finite coordinates", "bad mask"),
    "infinite": ([[*SQUARE[:-1], -INF]], "[0]: expected finite coordinates", "bad mask"),
    "huge": ([[*SQUARE[:-1], 10**400]], "[0]: expected finite coordinates", "bad mask"),
    "far": ([[1e9, 1e9, 1e9, 2e9, 2e9, 1e9]], "[0]: expected finite coordinates", "bad mask"),
    "endless": ([[0, 0, 9e5, 9e5] * 3000], "[0]: expected an outline of at most", "bad mask"),
    "words in it": ([["1", *SQUARE[1:]]], "[0]: expected a polygon", "bad mask"),
    "true in it": ([[True, *SQUARE[1:]]], "[0]: expected a polygon", "bad mask"),
    "outside": ([[50, 50, 60, 50, 60, 60]], "expected a mask that covers pixels of the 40x30 image", "bad mask"),
    "a line": ([[5, 5, 9, 5, 5, 5]], "expected a mask that covers pixels", "bad mask"),
    "no size": ({"counts": RUNS["counts"]}, "size: expected the image's [height, width], [30, 40]", "bad mask"),
    "size turned": ({**RUNS, "size": [40, 30]}, "size: expected the image's [height, width]", "bad mask"),
    "no counts": ({"size": [30, 40]}, "counts: expected run lengths", "bad mask"),
    "counts a dict": ({**RUNS, "counts": {}}, "counts: expected run lengths", "bad mask"),
    "counts empty": ({**RUNS, "counts": []}, "counts: expected run lengths", "bad mask"),
    "counts of text": ({**RUNS, "counts": ["1200"]}, "counts: expected run lengths", "bad mask"),
    "count below 0": ({**RUNS, "counts": [600, -1, 601]}, "counts: expected run lengths", "bad mask"),
    "counts too short": ({**RUNS, "counts": RUNS["counts"][:-1]}, "counts: expected runs over all 1200", "bad mask"),
    "counts too long": ({**RUNS, "counts": [*RUNS["counts"], 1]}, "they add to 1201", "bad mask"),
    "all zero": ({**RUNS, "counts": [1200]}, "it covers none", "bad mask"),
    "string empty": ({**TEXT, "counts": ""}, "counts: expected run lengths", "bad mask"),
    "string cut": ({**TEXT, "counts": TEXT["counts"][:-2]}, "counts: expected runs over all 1200", "bad mask"),
    "string that goes on": ({**TEXT, "counts": TEXT["counts"] + "P"}, "counts: expected run lengths", "bad mask"),
    "string of others": ({**TEXT, "counts": "é" + TEXT["counts"]}, "counts: expected run lengths", "bad mask"),
    "string below 0": ({**TEXT, "counts": "O" + TEXT["counts"]}, "counts: expected run lengths", "bad mask"),
}


@pytest.mark.parametrize(("segmentation", "expected", "reason"), BAD_MASKS.values(), ids=BAD_MASKS.keys())
def test_bad_mask_is_refused_by_name_or_left_out_and_counted(path, segmentation, expected, reason):
    content = copy.deepcopy(CONTENT)
    content["annotations"][1]["segmentation"] = segmentation
    write(path.parent, content)
    with pytest.raises(DataError) as error:
        CocoDataset(path, path.parent, masks=True)
    assert str(error.value).startswith(f"{path}: annotation 2: segmentation")
    assert expected in str(error.value)
    assert "\n" not in str(error.value)

    dataset = CocoDataset(path, path.parent, masks=True, skip_bad=True)
    assert dataset.skipped == {reason: 1}
    _, target = dataset[0]
    assert target["boxes"].shape == (3, 4)
    np.testing.assert_array_equal(
        target["masks"].numpy(), masks_by_pycocotools(load(write(path.parent, CONTENT)), 5)[[0, 2, 3]]
    )


def test_a_bad_mask_matters_only_where_masks_are_asked_for(path):
    content = copy.deepcopy(CONTENT)
    content["annotations"][1]["segmentation"] = [[1, 1]]
    assert len(CocoDataset(write(path.parent, content), path.parent)[0][1]["boxes"]) == 4


@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.parametrize("segmentation", [None, []])
def test_data_without_any_mask_is_refused_at_once(path, skip_bad, segmentation):
    content = copy.deepcopy(CONTENT)
    for entry in content["annotations"]:
        entry["segmentation"] = segmentation
    write(path.parent, content)
    with pytest.raises(DataError, match="segmentation: expected objects with masks, none of the 5 has one"):
        CocoDataset(path, path.parent, masks=True, skip_bad=skip_bad)


def test_an_image_too_large_for_pycocotools_is_refused_without_trying():
    with pytest.raises(BadEntry, match="expected an image of at most"):
        encode("x", [SQUARE], 10**6, 10**6)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.sampled_from(["size", "counts", "x"]), inner),
    max_leaves=12,
)
NUMBERS = st.floats() | st.integers() | st.floats(-50, 50)
NEARLY_RLE = st.fixed_dictionaries(
    {
        "size": st.just([HEIGHT, WIDTH]) | JSON,
        "counts": st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=12)
        | st.lists(st.integers(-1, 1200), max_size=6)
        | JSON,
    }
)
GARBAGE = JSON | st.lists(st.lists(NUMBERS, max_size=10), max_size=3) | NEARLY_RLE


@settings(max_examples=300)
@given(GARBAGE)
@example({"size": [HEIGHT, WIDTH], "counts": "P" * 50})
@example([[-1e6, -1e6, 1e6, 1e6, -1e6, 1e6]])
def test_anything_is_a_mask_or_a_named_defect(segmentation):
    try:
        mask = decode(segmentation)
    except BadEntry as bad:
        found = bad.defect()
    else:
        assert mask.shape == (HEIGHT, WIDTH)
        assert mask.any()
        assert set(np.unique(mask)) <= {0, 1}
        return
    assert found.reason in ("no mask", "bad mask")
    assert found.message.startswith("x: segmentation")


# Real data


def test_real_masks_are_those_of_pycocotools():
    root = SHARED_DATA / "nwpu-vhr10-512"
    if not root.is_dir():
        pytest.skip(f"needs {root}")
    path = root / "annotations" / "instances_val.json"
    coco = load(path)
    dataset = CocoDataset(path, root / "images", masks=True)
    for index in range(0, len(dataset), 5):
        masks = dataset[index][1]["masks"].numpy()
        if len(masks):
            np.testing.assert_array_equal(masks, masks_by_pycocotools(coco, dataset.image_ids[index]))
