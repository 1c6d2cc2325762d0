"""Detections drawn on images can be read; names stay on the image, apart from each other and off small objects."""

import colorsys
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageColor

from nats_zoo import NatsError
from nats_zoo.detection.pictures.drawing import (
    PALETTE,
    class_colour,
    draw_detections,
    erode,
    mask_colour,
    text_colour,
)
from nats_zoo.detection.pictures.label_placement import place_labels
from nats_zoo.detection.pictures.sheet import comparison_sheet

COLOURS = np.array([ImageColor.getrgb(colour) for colour in PALETTE])


def overlap(one, other):
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0) * max(height, 0)


def place(boxes, sizes, image):
    return [found.box for found in place_labels(boxes, [[size] for size in sizes], image)]


# --- where names go ---------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(
    boxes=st.lists(st.tuples(*[st.floats(-500, 4500)] * 4), min_size=1, max_size=6),
    image=st.tuples(st.integers(1, 4000), st.integers(1, 4000)),
    share=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_names_stay_inside_the_image_at_their_full_size(boxes, image, share):
    size = tuple(max(1, int(part * side)) for part, side in zip(share, image, strict=True))
    for left, top, right, bottom in place(boxes, [size] * len(boxes), image):
        assert (right - left, bottom - top) == size
        assert 0 <= left < right <= image[0]
        assert 0 <= top < bottom <= image[1]


def test_the_name_of_a_lonely_box_stands_on_its_upper_left_corner():
    assert place([(100, 100, 200, 200)], [(60, 20)], (400, 400)) == [(100, 80, 160, 100)]


@pytest.mark.parametrize("box", [(100, 0, 200, 90), (330, 100, 400, 200), (0, 0, 90, 90), (350, 350, 400, 400)])
def test_at_the_images_border_a_name_still_touches_its_box(box):
    ((left, top, right, bottom),) = place([box], [(60, 20)], (400, 400))
    assert overlap((left - 1, top - 1, right + 1, bottom + 1), box) > 0


def test_names_of_a_crowd_do_not_cover_each_other_or_their_small_objects():
    boxes = [(x, y, x + 40, y + 40) for x in range(20, 360, 70) for y in range(30, 360, 70)]
    places = place(boxes, [(60, 16)] * len(boxes), (400, 400))
    assert sum(overlap(one, other) for one, other in itertools.combinations(places, 2)) == 0
    assert sum(overlap(one, box) for one, box in itertools.product(places, boxes)) == 0


def test_boxes_upon_each_other_get_names_apart():
    places = place([(100, 100, 200, 200)] * 5, [(60, 20)] * 5, (400, 400))
    assert sum(overlap(one, other) for one, other in itertools.combinations(places, 2)) == 0


def test_a_name_is_cut_short_only_where_its_long_form_has_no_room():
    (alone,) = place_labels([(100, 100, 130, 130)], [[(90, 16), (30, 16)]], (400, 400))
    assert alone.form == 0
    grid = [(x, y, x + 30, y + 30) for x in range(40, 320, 34) for y in range(40, 320, 46)]
    places = place_labels(grid, [[(90, 16), (30, 16)]] * len(grid), (400, 400))
    forms = [found.form for found in places]
    assert 0.5 < np.mean(forms) < 1  # those at the grid's border have room
    long = place(grid, [(90, 16)] * len(grid), (400, 400))
    pairs = itertools.combinations(range(len(grid)), 2)
    hidden = [(overlap(places[i].box, places[j].box), overlap(long[i], long[j])) for i, j in pairs]
    assert sum(both[0] for both in hidden) == 0 < sum(both[1] for both in hidden)


def test_no_boxes_have_no_names():
    assert place_labels([], [], (10, 10)) == []


# --- text and lines ---------------------------------------------------------------------------------------------------


def one_box(side, box, name="cell"):
    corners = torch.tensor([box], dtype=torch.float32) * side
    scores = torch.tensor([0.9])
    return np.asarray(draw_detections(Image.new("RGB", (side, side)), corners, torch.tensor([1]), scores, [name]))


def letters(picture):
    """Pixels of white letters on blue, on a black image."""
    return picture.astype(int).min(axis=-1) > 200


def test_the_whole_text_shows_wherever_the_box_lies():
    boxes = [(0.4, 0.4, 0.6, 0.6), (0, 0, 0.2, 0.2), (0.8, 0.8, 1, 1), (0.8, 0, 1, 0.2), (-0.2, 0.8, 0.2, 1.3)]
    counts = [int(letters(one_box(400, box)).sum()) for box in boxes]
    assert min(counts) > 50
    assert len(set(counts)) == 1


@pytest.mark.parametrize("side", [8, 64, 100, 640, 2000])
def test_text_grows_with_the_image_and_tiny_images_are_enlarged(side):
    picture = one_box(side, (0.25, 0.5, 0.75, 0.9))
    assert picture.shape[0] % side == 0
    assert picture.shape[0] >= 384
    rows, columns = np.nonzero(letters(picture))
    assert np.ptp(rows) > picture.shape[0] / 80
    assert np.ptp(rows) >= 8
    assert np.ptp(columns) < picture.shape[1] / 2


@pytest.mark.parametrize(("width", "height"), [(1, 1), (3000, 2), (5, 900), (64, 4000)])
def test_images_of_any_shape_are_drawn_on_and_not_blown_up(width, height):
    boxes, labels = torch.tensor([[0.0, 0, width, height]]), torch.tensor([3])
    picture = draw_detections(Image.new("RGB", (width, height)), boxes, labels, classes=["a", "b", "long name"])
    assert picture.width % width == picture.height % height == 0
    assert max(picture.size) <= max(3000, width, height)
    assert np.asarray(picture).any()


def test_not_enlarged_a_picture_keeps_the_images_size():
    boxes = torch.tensor([[10.0, 20, 40, 50]])
    picture = draw_detections(Image.new("RGB", (64, 64)), boxes, torch.tensor([1]), classes=["a"], enlarge=False)
    assert picture.size == (64, 64)
    assert letters(np.asarray(picture)).any()


def test_a_name_longer_than_the_image_is_cut_at_its_end():
    box = (0, 0.5, 0.9, 0.9)
    short, long = (one_box(400, box, name) for name in ("verylongname", "verylongname" * 30))
    np.testing.assert_array_equal(long[:, :80], short[:, :80])
    assert (long[:, 300:390] != short[:, 300:390]).any()
    assert not letters(long)[:, -2:].any()  # no letter touches the border


def test_lines_leave_the_object_free_and_show_on_any_ground():
    boxes, labels = torch.tensor([[100.0, 100, 200, 200]]), torch.tensor([3])
    inside = {}
    for shade in (0, 128, 255):
        picture = draw_detections(Image.new("RGB", (400, 400), (shade,) * 3), boxes, labels, classes=["c"])
        pixels = np.asarray(picture).astype(int)
        inside[shade] = pixels[101:199, 101:199]
        assert (np.abs(inside[shade] - shade).max(axis=-1) == 0).all()
        row = pixels[150, 90:101].sum(axis=-1)
        assert np.ptp(row) > 250  # yellow on white has a dark edge
    assert len(inside) == 3


def test_only_detections_above_the_threshold_are_drawn_and_the_original_is_kept():
    image = Image.new("RGB", (400, 400))
    boxes = torch.tensor([[20.0, 40, 120, 120], [200, 40, 300, 120], [20, 240, 120, 320]])
    labels, scores = torch.tensor([1, 2, 10]), torch.tensor([0.9, 0.4, 0.7])
    picture = np.asarray(draw_detections(image, boxes, labels, scores, ["a", "b"], threshold=0.5)).astype(int)
    found = [(np.abs(picture - colour).max(axis=-1) == 0).sum() > 300 for colour in COLOURS[:2]]
    assert found == [True, False]
    assert (picture[235:325, 15:125] > 0).any()  # label 10 has no name and is drawn all the same
    everything = np.asarray(draw_detections(image, boxes, labels, classes=["a", "b"])).astype(int)
    assert (np.abs(everything - COLOURS[1]).max(axis=-1) == 0).sum() > 300
    assert image.getextrema() == ((0, 0),) * 3


def test_nothing_detected_leaves_the_picture_as_it_was():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (400, 500, 3), dtype=np.uint8))
    empty = torch.zeros(0, dtype=torch.int64)
    for masks in (None, torch.zeros(0, 1, 400, 500)):
        drawn = draw_detections(image, torch.zeros(0, 4), empty, torch.zeros(0), masks=masks)
        np.testing.assert_array_equal(np.asarray(drawn), np.asarray(image))


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"labels": torch.tensor([1])}, r"labels: expected 2, as many as boxes, found 1"),
        ({"scores": torch.tensor([1.0])}, r"scores: expected 2, as many as boxes, found 1"),
        ({"masks": torch.zeros(3, 50, 60)}, r"masks: expected 2, as many as boxes, found 3"),
        ({"masks": torch.zeros(2, 60, 50)}, r"masks\[\d\]: expected 60x50 pixels, as the image, found 50x60"),
    ],
)
def test_what_does_not_belong_together_is_refused(changed, expected):
    arguments = {"boxes": torch.tensor([[1.0, 2, 30, 40]] * 2), "labels": torch.tensor([1, 2]), **changed}
    with pytest.raises(NatsError, match=expected):
        draw_detections(Image.new("RGB", (60, 50)), **arguments)


# --- masks ------------------------------------------------------------------------------------------------------------


def disc(size, centre, radius):
    rows, columns = np.mgrid[: size[1], : size[0]]
    return (rows - centre[1]) ** 2 + (columns - centre[0]) ** 2 <= radius**2


def shrink(mask, width):
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(mask, width), (2 * width + 1,) * 2)
    return windows.all(axis=(2, 3))


def draw_masks(masks, labels=(1, 1), image=None):
    image = image or Image.new("RGB", (400, 400), (128,) * 3)
    boxes = torch.tensor([[50.0, 50, 150, 150], [250, 50, 350, 150]])
    return np.asarray(draw_detections(image, boxes, torch.tensor(labels), masks=masks)).astype(int)


def two_discs():
    return np.stack([disc((400, 400), (100, 100), 50), disc((400, 400), (300, 100), 50)])


def test_a_mask_in_any_form_gives_the_same_picture():
    discs = two_discs()
    expected = draw_masks(discs)
    soft = torch.where(torch.from_numpy(discs), 0.6, 0.4)
    for masks in (torch.from_numpy(discs), discs.astype(np.uint8), soft, soft[:, None].to(torch.bfloat16), list(discs)):
        forms = masks.float() if isinstance(masks, torch.Tensor) and masks.dtype == torch.bfloat16 else masks
        np.testing.assert_array_equal(draw_masks(forms), expected)
    assert (draw_masks(~discs) != expected).any()


def test_a_mask_is_filled_through_which_the_image_shows_and_outlined():
    ground = np.random.default_rng(0).integers(60, 200, (400, 400, 3), dtype=np.uint8)
    image = Image.fromarray(ground)
    discs = two_discs()
    picture, plain = draw_masks(discs, image=image), draw_masks(None, image=image)
    inner = disc((400, 400), (100, 100), 40)
    change = (picture - plain)[inner]
    assert (change != 0).mean() > 0.9
    correlation = np.corrcoef(picture[inner][:, 1], ground[inner][:, 1])[0, 1]
    assert correlation > 0.99  # a blend with one colour
    outline = discs[0] & ~shrink(discs[0], 1)
    assert (picture[outline] == mask_colour(1, 0)).all(axis=-1).mean() > 0.8
    free = ~(discs[0] | discs[1])
    np.testing.assert_array_equal(picture[free], plain[free])


def test_instances_of_a_class_differ_in_lightness_and_keep_its_hue():
    picture = draw_masks(two_discs())
    assert (picture[100, 100] != picture[100, 300]).any()
    for label, instance in itertools.product(range(1, 8), range(5)):
        hue, shade = (
            colorsys.rgb_to_hsv(*(channel / 255 for channel in colour))[0]
            for colour in (ImageColor.getrgb(class_colour(label)), mask_colour(label, instance))
        )
        assert shade == pytest.approx(hue, abs=0.02)


def test_masks_of_a_small_image_are_enlarged_with_it():
    mask = np.zeros((1, 64, 64), dtype=bool)
    mask[0, 16:32, 8:40] = True
    boxes, labels = torch.tensor([[8.0, 16, 40, 32]]), torch.tensor([1])
    pictures = [
        np.asarray(draw_detections(Image.new("RGB", (64, 64)), boxes, labels, masks=masks)) for masks in (mask, None)
    ]
    rows, columns = np.nonzero((pictures[0] != pictures[1]).any(axis=-1))
    assert (rows.max(), columns.min(), columns.max()) == (32 * 6 - 1, 8 * 6, 40 * 6 - 1)


@settings(max_examples=50)
@given(
    st.integers(1, 5), st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**32 - 1), st.sampled_from([0.5, 0.95])
)
def test_erosion_keeps_what_has_only_mask_around_it(width, height, columns, seed, share):
    mask = np.random.default_rng(seed).random((height, columns)) < share
    np.testing.assert_array_equal(erode(mask, width), shrink(mask, width))


# --- colours ----------------------------------------------------------------------------------------------------------


def test_class_colours_repeat_but_not_soon():
    assert len({class_colour(label) for label in range(1, 8)}) == 7
    assert class_colour(8) == class_colour(1)


@pytest.mark.parametrize("colour", PALETTE)
def test_letters_stand_out_from_their_ground(colour):
    """At least 4.5 : 1, which WCAG 2 asks of text."""
    linear = [((c / 255 + 0.055) / 1.055) ** 2.4 if c > 10 else c / 255 / 12.92 for c in ImageColor.getrgb(colour)]
    luminance = np.dot(linear, [0.2126, 0.7152, 0.0722])
    letters_luminance = {"black": 0.0, "white": 1.0}[text_colour(colour)]
    low, high = sorted((luminance, letters_luminance))
    assert (high + 0.05) / (low + 0.05) >= 4.5


# --- sheets -----------------------------------------------------------------------------------------------------------


def test_sheets_lay_columns_side_by_side(tmp_path):
    columns = {
        "ground truth": [Image.new("RGB", (300, 200), "red"), Image.new("RGB", (200, 300), "red")],
        "plain": [Image.new("RGB", (300, 200), "lime"), Image.new("L", (30, 20), 0)],
        "NATS " + "long" * 99: [Image.new("RGB", (300, 200), "blue"), Image.new("RGB", (2000, 3000), "blue")],
    }
    comparison_sheet(columns, tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    centres = []
    for colour in ([255, 0, 0], [0, 255, 0], [0, 0, 255]):
        rows, across = np.nonzero(np.abs(sheet - colour).max(axis=-1) == 0)
        centres.append(across.mean())
        assert rows.min() > 20  # below the titles
    assert centres[1] - centres[0] == pytest.approx(centres[2] - centres[1], abs=2)
    assert centres[1] - centres[0] > 480 - 200
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


@pytest.mark.parametrize("columns", [{}, {"a": []}, {"a": [Image.new("L", (5, 5))], "b": []}])
def test_uneven_sheets_are_refused(columns, tmp_path):
    with pytest.raises(NatsError, match=r"sheet\.png: expected columns of equally many images"):
        comparison_sheet(columns, tmp_path / "sheet.png")
    assert not any(tmp_path.iterdir())
