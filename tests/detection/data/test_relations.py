"""Drawn pairs of blobs: what is drawn is what the annotations say, and depends on the parameters alone."""

import json

import numpy as np
import pytest
from PIL import Image

from nats_zoo import NatsError
from nats_zoo.detection import CocoDataset
from nats_zoo.detection.data.formats.coco import find_split
from nats_zoo.detection.data.relations import BOX, DIRECTIONS, draw_relations, relation_images


def smoothed(pixels: np.ndarray) -> np.ndarray:
    """Sums over 7x7 windows, which the noise does not hide a blob from."""
    padded = np.pad(pixels.astype(float) - 128, 3)
    return np.lib.stride_tricks.sliding_window_view(padded, (7, 7)).sum((2, 3))


def seen_direction(pixels: np.ndarray) -> tuple[int, float, float]:
    """Index of the direction from the brightest place to the darkest, and how far off that is, across and down."""
    smooth = smoothed(pixels)
    (y0, x0), (y1, x1) = (np.unravel_index(found, pixels.shape) for found in (smooth.argmax(), smooth.argmin()))
    dx, dy = float(x1 - x0), float(y1 - y0)
    return round(np.arctan2(dy, dx) / (2 * np.pi / len(DIRECTIONS))) % len(DIRECTIONS), dx, dy


def test_the_class_is_the_direction_that_the_pixels_show():
    drawn = list(relation_images(40, seed=3))
    assert len({direction for _, direction in drawn}) == len(DIRECTIONS)
    for pixels, direction in drawn:
        found, dx, dy = seen_direction(pixels)
        assert found == direction
        assert 18 * 0.85 - 2 <= np.hypot(dx, dy) <= 18 * 1.15 + 2


@pytest.mark.parametrize(("spacing", "across", "down"), [((54, 18), 54, 18), ((18, 54), 18, 54)])
def test_boxes_are_around_bright_blobs_and_partners_far_outside(tmp_path, spacing, across, down):
    data = CocoDataset(*find_split(draw_relations(tmp_path / "drawn", [spacing], train=12, test=0), "train"))
    assert data.classes == DIRECTIONS
    single = 0
    for index in range(len(data)):
        target = data[index][1]
        pixels = np.asarray(Image.open(data.path(index)))
        for x1, y1, x2, y2 in target["boxes"].tolist():
            assert (x2 - x1, y2 - y1) == pytest.approx((BOX, BOX), abs=0.1)
            assert smoothed(pixels)[round((y1 + y2) / 2), round((x1 + x2) / 2)] > 1500
        if len(target["boxes"]) == 1:
            single += 1
            _, dx, dy = seen_direction(pixels)
            angle = (int(target["labels"][0]) - 1) * 2 * np.pi / len(DIRECTIONS)
            assert dx / across == pytest.approx(np.cos(angle), abs=0.3)
            assert dy / down == pytest.approx(np.sin(angle), abs=0.3)
    assert 0 < single < len(data)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_equal_parameters_give_equal_files_and_fewer_images_the_first_of_them(tmp_path):
    one, two = (draw_relations(tmp_path / name, train=3, test=1, size=128, spacings=[(36, 36)]) for name in "ab")
    assert contents(one) == contents(two)
    less = draw_relations(tmp_path / "less", train=2, test=1, size=128, spacings=[(36, 36)])
    first = contents(one)
    assert all(first[name] == found for name, found in contents(less).items() if name.suffix == ".png")
    other = draw_relations(tmp_path / "other", train=3, test=1, size=128, spacings=[(36, 36)], seed=1)
    assert contents(other).keys() == first.keys()
    assert contents(other) != first


def test_two_pairs_can_not_be_mistaken_for_each_other(tmp_path):
    root = draw_relations(tmp_path / "drawn", [(18, 18), (54, 54)], train=60, test=0, seed=2)
    content = json.loads((root / "annotations" / "instances_train.json").read_text())
    by_image: dict[int, list] = {}
    for row in content["annotations"]:
        by_image.setdefault(row["image_id"], []).append(row["bbox"][:2])
    pairs = [np.array(places) for places in by_image.values() if len(places) == 2]
    assert len(by_image) == 60
    assert len(pairs) > 10
    assert all(np.hypot(*(one - two)) >= 26 for one, two in pairs)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"spacings": []}, r"spacings: expected pairs of 1 to 135 pixels in images of 192 pixels, found \(\)"),
        ({"spacings": [(54, 0)]}, "spacings: expected pairs of 1 to 135"),
        ({"size": 64}, r"spacings: expected pairs of 1 to 24 pixels in images of 64 pixels, found \(54, 54\)"),
        ({"train": -1}, "train: expected 0 or more, found -1"),
    ],
)
def test_bad_parameters_leave_nothing_behind(tmp_path, options, words):
    with pytest.raises(NatsError, match=words):
        draw_relations(tmp_path / "drawn", **options)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    root = draw_relations(tmp_path / "drawn", train=1, test=0)
    with pytest.raises(NatsError, match="expected a data set drawn with"):
        draw_relations(root, train=2, test=0)
    (tmp_path / "mine").mkdir()
    with pytest.raises(NatsError, match="mine: exists and is no drawn data set"):
        draw_relations(tmp_path / "mine")
