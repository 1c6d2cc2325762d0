"""The drawn data set keeps its promises, read back from the files."""

import json
import signal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from nats_zoo import NatsError
from nats_zoo.detection.data.drawn import draw_dataset
from nats_zoo.detection.pictures.drawing import PALETTE

SIZE, DISTANCE, MARK = 160, 32, 8
COLOURS = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in PALETTE])


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return draw_dataset(tmp_path_factory.mktemp("drawn") / "data", train=40, val=4, test=4, seed=3)


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    root = tmp_path_factory.mktemp("drawn") / "deeper" / "twin"
    return draw_dataset(root, train=40, val=4, test=4, seed=3, transpose=True)


def annotations(root, split="train"):
    return json.loads((root / "annotations" / f"instances_{split}.json").read_text())


def pixels(root, image):
    return np.asarray(Image.open(root / "images" / image["file_name"]))


def samples(root):
    """(pixels, boxes as x, y, w, h, category ids) of each training image."""
    content = annotations(root)
    for image in content["images"]:
        entries = [entry for entry in content["annotations"] if entry["image_id"] == image["id"]]
        yield pixels(root, image), [entry["bbox"] for entry in entries], [entry["category_id"] for entry in entries]


def colour_at(image, x, y):
    """The category id whose colour fills the mark with this upper left corner; 0 where there is no such mark."""
    patch = image[max(y, 0) : y + MARK, max(x, 0) : x + MARK].reshape(-1, 3).astype(int)
    if x < 0 or y < 0 or len(patch) != MARK * MARK:
        return 0
    near = np.abs(patch[:, None] - COLOURS[:3]).max(axis=-1) < 30
    return next((label for label in (1, 2, 3) if near[:, label - 1].all()), 0)


def marks_around(image, box):
    """Category ids of the marks at the stated distance: left, right, above, below."""
    x, y, w, h = box
    row, column = y + (h - MARK) // 2, x + (w - MARK) // 2
    before, behind = -DISTANCE - MARK, DISTANCE
    places = [(x + before, row), (x + w + behind, row), (column, y + before), (column, y + h + behind)]
    return [colour_at(image, *place) for place in places]


def test_the_mark_on_the_objects_row_decides_its_class_and_the_decoy_differs(drawn):
    seen = set()
    for image, boxes, labels in samples(drawn):
        for box, label in zip(boxes, labels, strict=True):
            left, right, above, below = marks_around(image, box)
            assert sorted((left, right)) == [0, label]
            assert sorted((above, below))[0] == 0
            decoy = max(above, below)
            assert decoy not in (0, label)
            seen.add((label, decoy, left == 0, above == 0))
    assert len(seen) == 3 * 2 * 2 * 2  # every combination of class, decoy and sides comes up


def test_no_colour_but_the_marks(drawn):
    """Nothing else could tell the class: coloured pixels are exactly one mark and one decoy for each object."""
    for image, boxes, _ in samples(drawn):
        spread = image.max(axis=-1).astype(int) - image.min(axis=-1)
        assert (spread > 0).sum() == 2 * MARK * MARK * len(boxes)


def test_boxes_have_the_stated_range_of_sizes_and_lie_apart(drawn):
    sides = []
    for _, boxes, _ in samples(drawn):
        cover = np.zeros((SIZE, SIZE), dtype=int)
        for x, y, w, h in boxes:
            assert 0 <= x <= x + w <= SIZE
            assert 0 <= y <= y + h <= SIZE
            cover[y : y + h, x : x + w] += 1
            sides += [w, h]
        assert 1 <= len(boxes) <= 4
        assert cover.max() == 1
    assert 12 <= min(sides) < 15
    assert SIZE // 2 - 20 < max(sides) <= SIZE // 2


def test_shapes_stand_out_from_the_background_and_fill_their_boxes(drawn):
    for image, boxes, _ in samples(drawn):
        grey = image.min(axis=-1).astype(float)
        outside = np.ones((SIZE, SIZE), dtype=bool)
        for x, y, w, h in boxes:
            outside[y : y + h, x : x + w] = False
        background = np.median(grey[outside])
        for x, y, w, h in boxes:
            inside = np.abs(grey[y : y + h, x : x + w] - background)
            assert np.median(inside[h // 3 : 2 * h // 3 + 1, w // 3 : 2 * w // 3 + 1]) > 20
            for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
                assert edge.max() > 15


def test_masks_fill_their_boxes_and_stand_out(drawn):
    content = annotations(drawn)
    for image in content["images"]:
        grey = pixels(drawn, image).min(axis=-1).astype(float)
        for entry in (entry for entry in content["annotations"] if entry["image_id"] == image["id"]):
            mask = coco_mask.decode(entry["segmentation"])
            assert mask.shape == (SIZE, SIZE)
            assert coco_mask.toBbox(entry["segmentation"]).tolist() == entry["bbox"]
            x, y, w, h = entry["bbox"]
            corners = mask[y : y + h, x : x + w] == 0
            if corners.sum() > 50 and min(w, h) > 30:
                inside, outside = grey[mask == 1], grey[y : y + h, x : x + w][corners]
                assert abs(np.median(inside) - np.median(outside)) > 20


def test_the_twins_masks_are_transposed(drawn, twin):
    for one, other in zip(annotations(drawn)["annotations"], annotations(twin)["annotations"], strict=True):
        masks = [coco_mask.decode(entry["segmentation"]) for entry in (one, other)]
        np.testing.assert_array_equal(masks[0].T, masks[1])


def test_the_twin_is_the_transposed_data_set(drawn, twin):
    for split in ("train", "val", "test"):
        content, transposed = annotations(drawn, split), annotations(twin, split)
        assert content["images"] == transposed["images"]
        for image in content["images"]:
            np.testing.assert_array_equal(pixels(twin, image), pixels(drawn, image).swapaxes(0, 1))
        for entry, other in zip(content["annotations"], transposed["annotations"], strict=True):
            x, y, w, h = entry["bbox"]
            segmentation = other["segmentation"]  # looked at by another test
            assert other == entry | {"bbox": [y, x, h, w], "segmentation": segmentation}


def test_the_twins_marks_lie_on_the_column(twin):
    for image, boxes, labels in samples(twin):
        for box, label in zip(boxes, labels, strict=True):
            _, _, above, below = marks_around(image, box)
            assert sorted((above, below)) == [0, label]


def test_coco_reads_it_and_splits_differ(drawn):
    from pycocotools.coco import COCO

    coco = COCO(drawn / "annotations" / "instances_train.json")
    assert sorted(coco.getCatIds()) == [1, 2, 3]
    assert len(coco.getImgIds()) == 40
    assert all(entry["area"] == entry["bbox"][2] * entry["bbox"][3] for entry in coco.loadAnns(coco.getAnnIds()))
    files = sorted((drawn / "images").iterdir())
    assert len(files) == 48
    assert len({file.read_bytes() for file in files}) == 48


def contents(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_seed_decides_everything_and_more_images_leave_the_others_alone(tmp_path):
    first = contents(draw_dataset(tmp_path / "a", train=3, val=1, test=1, size=96))
    again = contents(draw_dataset(tmp_path / "b", train=3, val=1, test=1, size=96))
    other = contents(draw_dataset(tmp_path / "c", train=3, val=1, test=1, size=96, seed=1))
    more = contents(draw_dataset(tmp_path / "d", train=5, val=2, test=1, size=96))
    assert first == again
    images = [name for name in first if name.suffix == ".png"]
    assert len(images) == 5
    assert all(first[name] != other[name] for name in images)
    assert all(first[name] == more[name] for name in images)


@settings(max_examples=12, deadline=None)
@given(size=st.integers(24, 256), share=st.floats(0, 1), seed=st.integers(0, 2**32))
def test_everything_lies_inside_the_image_at_any_size_and_distance(size, share, seed, tmp_path_factory):
    mark = max(6, size // 20)
    distance = 1 + int(share * (size - size // 2 - mark - 1))
    root = tmp_path_factory.mktemp("drawn") / "data"
    draw_dataset(root, train=2, val=0, test=0, size=size, distance=distance, seed=seed)
    for image, boxes, _ in samples(root):
        assert len(boxes) >= 1
        assert all(12 <= side <= size // 2 for box in boxes for side in box[2:])
        coloured = (image.max(axis=-1).astype(int) - image.min(axis=-1) > 0).sum()
        assert coloured == 2 * mark * mark * len(boxes)  # a mark across the border would have fewer pixels


def test_a_folder_drawn_with_the_same_parameters_is_used_again(tmp_path):
    root = draw_dataset(tmp_path / "data", train=1, val=1, test=1, size=96)
    (root / "left_by_the_user").write_text("")
    assert draw_dataset(str(root), train=1, val=1, test=1, size=96, distance=19) == root
    assert (root / "left_by_the_user").exists()


@pytest.mark.parametrize("change", [{"seed": 1}, {"transpose": True}, {"train": 2}, {"size": 97}, {"distance": 20}])
def test_a_folder_drawn_with_other_parameters_is_refused_and_kept(change, tmp_path):
    parameters = {"train": 1, "val": 1, "test": 1, "size": 96}
    root = draw_dataset(tmp_path / "data", **parameters)
    before = contents(root)
    with pytest.raises(NatsError, match="data: expected a data set drawn with") as caught:
        draw_dataset(root, **parameters | change)
    assert "\n" not in str(caught.value)
    assert contents(root) == before


@pytest.mark.parametrize("what", ["empty", "foreign", "damaged", "file"])
def test_anything_else_of_that_name_is_refused_and_kept(what, tmp_path):
    root = tmp_path / "data"
    if what == "file":
        root.write_text("mine")
    else:
        root.mkdir()
        names = {"empty": [], "foreign": ["mine.txt"], "damaged": ["drawn.json"]}
        for name in names[what]:
            (root / name).write_text("mine")
    with pytest.raises(NatsError, match="data: exists and is no drawn data set"):
        draw_dataset(root, train=1, val=1, test=1, size=96)
    assert root.read_text() == "mine" if what == "file" else all(f.read_text() == "mine" for f in root.iterdir())


@pytest.mark.parametrize("parameters", [{"distance": 0}, {"distance": 73}, {"size": 23}, {"seed": -1}, {"val": -1}])
def test_parameters_out_of_range_are_named_before_anything_is_written(parameters, tmp_path):
    [name] = parameters
    with pytest.raises(NatsError, match=f"^{name}: expected"):
        draw_dataset(tmp_path / "data", **parameters)
    assert not any(tmp_path.iterdir())


def test_an_interrupted_drawing_leaves_nothing_under_the_name(tmp_path):
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            draw_dataset(tmp_path / "data", train=100_000)
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert not any(tmp_path.iterdir())
