"""COCO evaluation against pycocotools called by hand, and predictions that do not depend on the number of processes."""

import contextlib
import copy
import importlib.util
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from nats_zoo.detection.data.dataset import CocoDataset, DataError
from nats_zoo.detection.data.formats.coco import find_split
from nats_zoo.detection.evaluation.coco import evaluate, load_results, save_results
from nats_zoo.detection.evaluation.predict import predict
from nats_zoo.detection.metrics import Metrics
from tests.support.paths import SHARED_DATA
from tests.support.two_processes import launch_two

CATEGORIES = [{"id": 90, "name": "bus"}, {"id": 2, "name": "cat"}, {"id": 5, "name": "unseen"}]
IMAGE_IDS = [70, 3, 51, 8, 1000, 21, 22]

# A stand-in for a trained torchvision detector: it knows an image by the value of its first pixel and answers with
# the image's ground truth, displaced, and a false alarm; it finds nothing in image number 2. Of a data set with masks
# it finds those too, with probabilities on both sides of 0.5.
SCRIPT = """
import json
import sys

import torch
from accelerate import Accelerator

from nats_zoo.detection.evaluation.coco import evaluate, save_results
from nats_zoo.detection.evaluation.predict import predict
from nats_zoo.detection.data.dataset import CocoDataset


class DisplacedTruth(torch.nn.Module):
    def __init__(self, dataset):
        super().__init__()
        self.targets = [dataset[index][1] for index in range(len(dataset))]
        self.finds_masks = dataset.masks
        self.frozen = torch.nn.BatchNorm2d(1)
        self.live = torch.nn.BatchNorm2d(1)

    def forward(self, images):
        assert not any(module.training for module in self.modules())
        return [self.detect(round(255 * image[0, 0, 0].item())) for image in images]

    def detect(self, number):
        generator = torch.Generator().manual_seed(number)
        target = self.targets[number]
        count = 0 if number == 2 else len(target["boxes"]) + 1
        boxes = torch.cat((target["boxes"].as_subclass(torch.Tensor), torch.tensor([[1.0, 1.0, 30.0, 30.0]])))
        boxes = boxes + 2 * torch.randn(boxes.shape, generator=generator)
        labels = torch.cat((target["labels"], torch.tensor([1])))
        scores = torch.rand(len(boxes), generator=generator)
        found = {"boxes": boxes[:count], "labels": labels[:count], "scores": scores[:count]}
        if self.finds_masks:
            found["masks"] = self.fill(boxes[:count], target["boxes"].canvas_size, generator)
        return found

    def fill(self, boxes, size, generator):
        masks = torch.zeros(len(boxes), 1, *size)
        for mask, (x1, y1, x2, y2) in zip(masks[:, 0], boxes.round().int().clip(0).tolist()):
            part = mask[y1:y2, x1:x2]
            rows, columns = (torch.linspace(-1, 1, side).abs() for side in part.shape)
            inside = rows[:, None] + columns < 1
            part.copy_(torch.where(inside, 0.45 + 0.5 * torch.rand(part.shape, generator=generator), 0.3))
        return masks


def main(annotations, images, output, batch_size, accelerator):
    dataset = CocoDataset(annotations, images, masks=True)
    results = predict(DisplacedTruth(dataset), dataset, accelerator, batch_size)
    save_results(results, f"{output}.{accelerator.process_index}.json")
    with open(f"{output}.{accelerator.process_index}.metrics", "w") as file:
        json.dump({"processes": accelerator.num_processes, **evaluate(dataset, results).to_dict()}, file)


if __name__ == "__main__":
    for batch_size in (1, 2, 5):
        main(*sys.argv[1:3], f"{sys.argv[3]}{batch_size}", batch_size, Accelerator(cpu=True))
"""


def draw_dataset(folder: Path) -> CocoDataset:
    """Seven images of odd sizes; the fourth has no box; sizes of boxes are small, medium and large.

    Masks are diamonds, and the crowd region's is given as run lengths.
    """
    generator = torch.Generator().manual_seed(0)
    images, annotations = [], []
    for number, image_id in enumerate(IMAGE_IDS):
        width, height = 161 + 10 * number, 153
        Image.new("RGB", (width, height), (number, 0, 0)).save(folder / f"{number}.png")
        images.append({"id": image_id, "file_name": f"{number}.png", "width": width, "height": height})
        for _ in range(0 if number == 3 else 4):
            side = (20, 60, 110)[len(annotations) % 3]
            x, y = (torch.rand(2, generator=generator) * 40).tolist()
            box = {"bbox": [x, y, side + x / 4, side], "area": side * (side + x / 4), "iscrowd": 0}
            box["segmentation"] = [diamond(*box["bbox"])]
            category = (90, 2)[len(annotations) % 2]
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": category, **box})
    crowd = annotations[5]
    crowd["iscrowd"] = 1
    width, height = next((each["width"], each["height"]) for each in images if each["id"] == crowd["image_id"])
    crowd["segmentation"] = {"size": [height, width], "counts": [height * 20, height * 60, height * (width - 80)]}
    path = folder / "instances_val.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES}))
    return CocoDataset(path, folder)


def diamond(x: float, y: float, width: float, height: float) -> list[float]:
    return [x, y + height / 2, x + width / 2, y, x + width, y + height / 2, x + width / 2, y + height]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> CocoDataset:
    return draw_dataset(tmp_path_factory.mktemp("drawn"))


@pytest.fixture(scope="module")
def masked(dataset) -> CocoDataset:
    return CocoDataset(dataset.annotations, dataset.images, masks=True)


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """The script as a module, and the file it came from as its `__file__`."""
    path = tmp_path_factory.mktemp("script") / "displaced_truth.py"
    path.write_text(SCRIPT)
    spec = importlib.util.spec_from_file_location("displaced_truth", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def accelerator() -> Accelerator:
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True)


def displaced_truth(content: dict, spread: float, seed: int = 0) -> list[dict]:
    """A result for every annotation, displaced, with a random score, and one false alarm per image."""
    generator = torch.Generator().manual_seed(seed)
    results = []
    for annotation in content["annotations"]:
        shift = spread * torch.randn(4, generator=generator)
        box = (torch.tensor(annotation["bbox"]) + shift).tolist()
        score = torch.rand((), generator=generator).item()
        results.append({key: annotation[key] for key in ("image_id", "category_id")} | {"bbox": box, "score": score})
    category = content["categories"][0]["id"]
    alarms = ({"image_id": image["id"], "category_id": category} for image in content["images"])
    return results + [alarm | {"bbox": [1, 1, 20, 20], "score": 0.3} for alarm in alarms]


def with_masks(content: dict, results: list[dict], keep_boxes: bool = True) -> list[dict]:
    """The same results with a diamond in each box for a mask."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    masked = []
    for result in results:
        (rle,) = coco_mask.frPyObjects([diamond(*result["bbox"])], *sizes[result["image_id"]])
        segmentation = {"size": list(rle["size"]), "counts": rle["counts"].decode()}
        kept = result if keep_boxes else {key: value for key, value in result.items() if key != "bbox"}
        masked.append({**kept, "segmentation": segmentation})
    return masked


def by_hand(annotations: Path, results: list[dict], folder: Path, iou_type: str = "bbox", **params) -> list[float]:
    """The twelve figures of pycocotools from files, in percent. Masks have no boxes then: their own area counts."""
    if iou_type == "segm":
        results = [{key: value for key, value in result.items() if key != "bbox"} for result in results]
    file = folder / "by_hand.json"
    file.write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(str(file)), iou_type)
        for name, value in params.items():
            setattr(evaluation.params, name, value)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [100 * value for value in evaluation.stats]


OVERALL = ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"]
OVERALL += ["ar_1", "ar_10", "ar_100", "ar_small", "ar_medium", "ar_large"]


def overall(metrics) -> list[float]:
    """In pycocotools' order and with its mark for no objects."""
    return [-100 if getattr(metrics, name) is None else getattr(metrics, name) for name in OVERALL]


# Figures


def test_figures_equal_pycocotools(dataset, tmp_path):
    results = displaced_truth(dataset.to_coco(), spread=4)
    metrics = evaluate(dataset.annotations, results)
    assert overall(metrics) == pytest.approx(by_hand(dataset.annotations, results, tmp_path))
    assert 5 < metrics.ap < 95
    for name, category_id in (("cat", 2), ("bus", 90)):
        ap, ap50, *_ = by_hand(dataset.annotations, results, tmp_path, catIds=[category_id])
        assert metrics.per_class[name] == pytest.approx({"ap": ap, "ap50": ap50})


@pytest.mark.parametrize("name", ["bccd", "nwpu-vhr10-512"])
def test_figures_equal_pycocotools_on_real_data(name, tmp_path):
    if not (SHARED_DATA / name).is_dir():
        pytest.skip(f"needs {SHARED_DATA / name}")
    path, _ = find_split(SHARED_DATA / name, "val")
    results = displaced_truth(json.loads(path.read_text()), spread=5)
    assert overall(evaluate(path, results)) == pytest.approx(by_hand(path, results, tmp_path))


@pytest.mark.parametrize("keep_boxes", [True, False])
def test_figures_of_masks_equal_pycocotools(dataset, masked, tmp_path, keep_boxes):
    """With a crowd region, an image without objects, sparse ids; of results with boxes and masks, or masks alone."""
    content = dataset.to_coco()
    results = with_masks(content, displaced_truth(content, spread=3), keep_boxes)
    before = copy.deepcopy(results)
    metrics = evaluate(masked, results)
    assert results == before
    figures = {kind: by_hand(dataset.annotations, results, tmp_path, kind) for kind in ("bbox", "segm")}
    assert overall(metrics) == pytest.approx(figures["bbox"])
    assert overall(metrics.mask) == pytest.approx(figures["segm"])
    assert metrics.mask.mask is None
    assert 5 < metrics.mask.ap < 95
    assert abs(metrics.mask.ap - metrics.ap) > 0.1
    for name, category_id in (("cat", 2), ("bus", 90)):
        ap, ap50, *_ = by_hand(dataset.annotations, results, tmp_path, "segm", catIds=[category_id])
        assert metrics.mask.per_class[name] == pytest.approx({"ap": ap, "ap50": ap50})
    assert evaluate(dataset.annotations, results) == metrics
    assert evaluate(COCO(str(dataset.annotations)), results) == metrics

    shifted = copy.deepcopy(results)
    for result in shifted:
        mask = np.roll(coco_mask.decode(result["segmentation"]), 9, axis=1)
        result["segmentation"]["counts"] = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
    assert evaluate(masked, shifted).mask.ap < metrics.mask.ap - 5


def test_figures_of_masks_equal_pycocotools_on_real_data(tmp_path):
    if not (SHARED_DATA / "nwpu-vhr10-512").is_dir():
        pytest.skip(f"needs {SHARED_DATA / 'nwpu-vhr10-512'}")
    path, _ = find_split(SHARED_DATA / "nwpu-vhr10-512", "val")
    content = json.loads(path.read_text())
    results = with_masks(content, displaced_truth(content, spread=2))
    metrics = evaluate(path, results)
    assert overall(metrics) == pytest.approx(by_hand(path, results, tmp_path))
    assert overall(metrics.mask) == pytest.approx(by_hand(path, results, tmp_path, "segm"))


def test_masks_are_compared_where_both_sides_have_them(dataset, masked, tmp_path):
    content = dataset.to_coco()
    boxes = displaced_truth(content, spread=3)
    masks = with_masks(content, boxes)
    assert evaluate(masked, boxes).mask is None
    assert evaluate(dataset, masks).mask is None
    assert evaluate(dataset, masks) == evaluate(masked, boxes)
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    assert evaluate(path, masks).mask is None
    assert evaluate(masked, []).mask.ap == 0
    assert evaluate(dataset, []).mask is None


def test_a_mask_of_another_size_than_its_image_is_refused(dataset, masked):
    content = dataset.to_coco()
    results = with_masks(content, displaced_truth(content, spread=3))
    results[2]["segmentation"]["size"].reverse()
    place = r"^found.json: results\[2\]: segmentation: size: "
    expected = place + r"expected \[153, 161\], image 70's .* found \[161, 153\]$"
    with pytest.raises(DataError, match=expected):
        evaluate(masked, results, source="found.json")


def test_transposed_masks_give_the_same_figures(dataset):
    """Twice transposed is what it was; the figures of the twin differ in nothing."""
    twin = CocoDataset(dataset.annotations, dataset.images, masks=True, transpose=True)
    content = dataset.to_coco()
    results = with_masks(content, displaced_truth(content, spread=3))
    turned = copy.deepcopy(results)
    for result in turned:
        x, y, width, height = result["bbox"]
        mask = np.asfortranarray(coco_mask.decode(result["segmentation"]).T)
        rle = coco_mask.encode(mask)
        result["bbox"] = [y, x, height, width]
        result["segmentation"] = {"size": list(rle["size"]), "counts": rle["counts"].decode()}
    expected = evaluate(dataset.annotations, results)
    found = evaluate(twin, turned)
    assert overall(found) == pytest.approx(overall(expected))
    assert overall(found.mask) == pytest.approx(overall(expected.mask))


def test_perfect_predictions_give_100_and_absent_objects_none(dataset):
    content = dataset.to_coco()
    found = [a for a in content["annotations"] if not a["iscrowd"]]
    metrics = evaluate(dataset, [{**a, "score": 0.5} for a in found])
    assert [metrics.ap, metrics.ap50, metrics.ap75, metrics.ar_100] == pytest.approx([100] * 4)
    assert metrics.per_class == {
        "cat": {"ap": pytest.approx(100), "ap50": pytest.approx(100)},
        "unseen": {"ap": None, "ap50": None},
        "bus": {"ap": pytest.approx(100), "ap50": pytest.approx(100)},
    }
    assert list(metrics.per_class) == ["cat", "unseen", "bus"]

    empty_image = evaluate(dataset, [], image_ids=[IMAGE_IDS[3]])
    assert overall(empty_image) == [-100] * 12


def test_no_results_give_0(dataset):
    metrics = evaluate(dataset, [])
    assert [metrics.ap, metrics.ap50, metrics.ar_100] == [0, 0, 0]
    assert metrics.per_class["cat"] == {"ap": 0, "ap50": 0}


def test_images_without_results_count(dataset, tmp_path):
    content = dataset.to_coco()
    found = [{**a, "score": 0.5} for a in content["annotations"] if a["image_id"] != 70 and not a["iscrowd"]]
    metrics = evaluate(dataset, found)
    assert overall(metrics) == pytest.approx(by_hand(dataset.annotations, found, tmp_path))
    assert metrics.ar_100 < 90


@pytest.mark.parametrize("chosen", [[3], [21, 3, 1000], (1000, 70, 8, 21)])
def test_only_the_images_asked_for_count(dataset, tmp_path, chosen):
    results = displaced_truth(dataset.to_coco(), spread=3)
    metrics = evaluate(dataset, results, iter(chosen))
    assert overall(metrics) == pytest.approx(by_hand(dataset.annotations, results, tmp_path, imgIds=list(chosen)))
    selection = dataset.select([IMAGE_IDS.index(image_id) for image_id in chosen])
    assert evaluate(selection, [r for r in results if r["image_id"] in chosen]) == metrics


def test_annotation_file_loaded_annotations_and_data_set_give_the_same_and_are_left_alone(dataset, capsys):
    results = displaced_truth(dataset.to_coco(), spread=3)
    loaded = COCO(str(dataset.annotations))
    before = copy.deepcopy((results, loaded.dataset))
    capsys.readouterr()
    metrics = evaluate(dataset, results)
    assert evaluate(loaded, results) == metrics
    assert evaluate(str(dataset.annotations), results) == metrics
    assert (results, loaded.dataset) == before
    assert capsys.readouterr() == ("", "")


def test_annotation_id_0_can_be_found_and_area_and_iscrowd_may_lack():
    """COCOeval itself takes a match with annotation id 0 for none, and fails without the two keys."""
    annotation = {"id": 0, "image_id": 1, "category_id": 1, "bbox": [10, 10, 50, 50]}
    truth = COCO()
    truth.dataset = {
        "images": [{"id": 1, "file_name": "a.png", "width": 100, "height": 100}],
        "annotations": [annotation],
        "categories": [{"id": 1, "name": "a"}],
    }
    metrics = evaluate(truth, [{**annotation, "score": 1.0}])
    assert metrics.ap == pytest.approx(100)
    assert metrics.ap_medium == pytest.approx(100)
    assert metrics.ap_small is None


def test_a_data_set_stands_for_what_it_kept(dataset, tmp_path):
    content = dataset.to_coco()
    content["annotations"][0]["bbox"][2] = 0
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="annotation 1: bbox"):
        evaluate(path, [])
    kept = CocoDataset(path, dataset.images, skip_bad=True)
    perfect = [{**a, "score": 0.5} for a in kept.to_coco()["annotations"] if not a["iscrowd"]]
    assert evaluate(kept, perfect).ap == pytest.approx(100)


@pytest.mark.parametrize(("field", "value"), [("image_id", 4), ("category_id", 1)])
def test_results_for_what_the_file_does_not_hold_are_refused(dataset, field, value):
    result = {"image_id": 3, "category_id": 2, "bbox": [1, 1, 5, 5], "score": 0.5, field: value}
    with pytest.raises(DataError, match=rf"results: {field}: expected .* it has no {value}$"):
        evaluate(dataset, [result])


def test_unknown_image_ids_are_refused(dataset):
    with pytest.raises(DataError, match=r"image_id: .* it has no 4$"):
        evaluate(dataset, [], image_ids=[3, 4])


def test_metrics_are_plain_json_and_a_table(dataset):
    metrics = evaluate(dataset, displaced_truth(dataset.to_coco(), spread=3))
    figures = json.loads(json.dumps(metrics.to_dict(), allow_nan=False))
    assert figures["ap50"] == metrics.ap50
    assert figures["per_class"]["unseen"]["ap"] is None
    head, values, _, class_head, *rows = metrics.table().splitlines()
    assert dict(zip(head.split(), values.split(), strict=True))["AP50"] == f"{metrics.ap50:.1f}"
    assert class_head.split() == ["class", "AP", "AP50"]
    assert [row.split()[0] for row in rows] == ["cat", "unseen", "bus"]
    assert rows[0].split()[1:] == [f"{metrics.per_class['cat'][key]:.1f}" for key in ("ap", "ap50")]
    assert rows[1].split()[1:] == ["-", "-"]


def test_metrics_come_back_from_their_dict_also_from_one_without_masks(dataset, masked):
    content = dataset.to_coco()
    boxes = displaced_truth(content, spread=3)
    for metrics in (evaluate(dataset, boxes), evaluate(masked, with_masks(content, boxes))):
        data = json.loads(json.dumps(metrics.to_dict()))
        assert Metrics.from_dict(data) == metrics
    old = {key: value for key, value in data.items() if key != "mask"}
    assert Metrics.from_dict(old) == evaluate(dataset, boxes)


def test_the_table_shows_boxes_then_masks(dataset, masked):
    content = dataset.to_coco()
    metrics = evaluate(masked, with_masks(content, displaced_truth(content, spread=3)))
    boxes, masks = metrics.table().split("\n\nmasks\n")
    assert boxes == f"boxes\n{evaluate(dataset, displaced_truth(content, spread=3)).table()}"
    assert f"{metrics.mask.ap:.1f}" == masks.splitlines()[1].split()[0]
    assert masks == metrics.mask.table()


# Predictions


@pytest.mark.parametrize("batch_size", [1, 3])
def test_predict_gives_every_box_of_every_image_in_coco_terms(dataset, script, accelerator, batch_size):
    detector = script.DisplacedTruth(dataset)
    results = predict(detector, dataset, accelerator, batch_size, progress=False)
    expected = []
    for number, image_id in enumerate(IMAGE_IDS):
        output = detector.detect(number)
        columns = (output[key].tolist() for key in ("boxes", "labels", "scores"))
        for (x1, y1, x2, y2), label, score in zip(*columns, strict=True):
            category_id = {1: 2, 2: 5, 3: 90}[label]
            expected.append((image_id, category_id, pytest.approx([x1, y1, x2 - x1, y2 - y1]), score))
    assert [tuple(result.values()) for result in results] == expected
    assert list(results[0]) == ["image_id", "category_id", "bbox", "score"]
    assert IMAGE_IDS[2] not in {result["image_id"] for result in results}


def test_predict_of_a_selection(dataset, script, accelerator):
    everything = predict(script.DisplacedTruth(dataset), dataset, accelerator, progress=False)
    some = predict(script.DisplacedTruth(dataset), dataset.select([5, 1]), accelerator, progress=False)
    assert some == [r for i in (IMAGE_IDS[5], IMAGE_IDS[1]) for r in everything if r["image_id"] == i]


def test_predict_gives_masks_as_pycocotools_encodes_them_one_by_one(masked, script, accelerator):
    detector = script.DisplacedTruth(masked)
    results = predict(detector, masked, accelerator, progress=False)
    expected = []
    for number in range(len(masked)):
        for mask in detector.detect(number).get("masks", []):
            rle = coco_mask.encode(np.asfortranarray((mask[0] > 0.5).numpy().astype(np.uint8)))
            expected.append({"size": rle["size"], "counts": rle["counts"].decode()})
    assert [result["segmentation"] for result in results] == expected
    assert len({each["counts"] for each in expected}) == len(expected)
    json.dumps(results, allow_nan=False)


def test_predict_drops_classes_that_are_not_the_data_sets(masked, script, accelerator):
    detector = script.DisplacedTruth(masked)
    everything = predict(detector, masked, accelerator, progress=False)
    some = predict(detector, masked, accelerator, progress=False, category_ids=(None, 5, 2))
    kept = [result for result in everything if result["category_id"] == 90]
    assert 0 < len(kept) < len(everything)
    assert some == [{**result, "category_id": 2} for result in kept]


@pytest.mark.parametrize("fails", [False, True])
def test_predict_leaves_each_module_in_its_mode_and_randomness_alone(dataset, script, accelerator, fails):
    detector = script.DisplacedTruth(dataset).train()
    detector.frozen.eval()
    if fails:
        detector.targets = []
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with pytest.raises(IndexError) if fails else contextlib.nullcontext():
        predict(detector, dataset, accelerator, progress=False)
    assert (detector.training, detector.live.training, detector.frozen.training) == (True, True, False)
    assert torch.equal(torch.rand(3), expected)


class OneBox(nn.Module):
    """Finds one box of a fixed label in every image."""

    def __init__(self, label: int):
        super().__init__()
        self.label = label

    def forward(self, images: list) -> list[dict]:
        box = {"boxes": torch.ones(1, 4), "labels": torch.tensor([self.label]), "scores": torch.ones(1)}
        return [box for _ in images]


def test_background_is_no_result_and_a_class_too_many_is_refused(dataset, accelerator):
    assert predict(OneBox(0), dataset, accelerator, progress=False) == []
    assert {r["category_id"] for r in predict(OneBox(3), dataset, accelerator, progress=False)} == {90}
    with pytest.raises(DataError, match="finds class 4, the data set has 3 classes"):
        predict(OneBox(4), dataset, accelerator, progress=False)


def test_progress_is_shown_on_request_only(dataset, accelerator, capsys):
    predict(OneBox(1), dataset, accelerator, progress=False)
    assert capsys.readouterr().err == ""
    predict(OneBox(1), dataset, accelerator)
    assert "predict" in capsys.readouterr().err


def test_two_processes_give_the_same_list_and_figures_as_one(dataset, script, accelerator, tmp_path):
    """Seven images, so that the last batch of two processes is filled up with images that came before."""
    arguments = [str(dataset.annotations), str(dataset.images)]
    done = launch_two(script.__file__, *arguments, tmp_path / "two", timeout=600)
    assert done.returncode == 0, done.stderr
    for batch_size in (1, 2, 5):
        script.main(*arguments, tmp_path / f"one{batch_size}", batch_size, accelerator)
        expected = (tmp_path / f"one{batch_size}.0.json").read_bytes()
        figures = json.loads((tmp_path / f"one{batch_size}.0.metrics").read_text())
        assert figures["mask"]["ap"] > 1
        for process in (0, 1):
            assert (tmp_path / f"two{batch_size}.{process}.json").read_bytes() == expected
            found = (tmp_path / f"two{batch_size}.{process}.metrics").read_text()
            assert found == json.dumps({**figures, "processes": 2})


# Results files

numbers = st.floats(allow_nan=False, allow_infinity=False)


@settings(deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "image_id": st.integers(),
                "category_id": st.integers(1),
                "bbox": st.lists(numbers, min_size=4, max_size=4),
                "score": numbers,
            }
        )
    )
)
def test_results_come_back_as_they_were_saved(tmp_path_factory, results):
    path = tmp_path_factory.getbasetemp() / "results.json"
    save_results(results, path)
    assert load_results(path) == results


def test_results_that_can_not_be_written_leave_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    save_results([], path)
    with pytest.raises(TypeError):
        save_results([{"score": torch.ones(1)}], path)
    assert load_results(path) == []
    assert list(tmp_path.iterdir()) == [path]


def test_masks_come_back_as_they_were_saved_empty_ones_too(masked, script, accelerator, tmp_path):
    results = predict(script.DisplacedTruth(masked), masked, accelerator, progress=False)
    rle = coco_mask.encode(np.zeros((153, 161), np.uint8, order="F"))
    results.append({**results[0], "segmentation": {"size": [153, 161], "counts": rle["counts"].decode()}})
    save_results(results, tmp_path / "results.json")
    assert load_results(tmp_path / "results.json") == results
    assert evaluate(masked, results).mask.ap > 1


GOOD_RESULT = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}
RLE = {"size": [3, 4], "counts": coco_mask.encode(np.ones((3, 4), np.uint8, order="F"))["counts"].decode()}


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ({}, "expected a list of results, found dict"),
        ([GOOD_RESULT, 1], "results[1]: expected an object, found int"),
        ([GOOD_RESULT | {"image_id": "1"}], "results[0]: image_id: expected an integer"),
        ([GOOD_RESULT | {"category_id": None}], "results[0]: category_id: expected an integer"),
        ([GOOD_RESULT | {"bbox": [1, 2, 3]}], "results[0]: bbox: expected [x, y, width, height]"),
        ([GOOD_RESULT | {"bbox": [1, 2, 3, math.nan]}], "results[0]: bbox: expected [x, y, width, height]"),
        ([GOOD_RESULT | {"score": math.inf}], "results[0]: score: expected a finite number"),
        ([{}], "results[0]: image_id: expected an integer"),
        ([{"image_id": 1, "category_id": 1, "score": 1}], "results[0]: bbox: expected [x, y, width, height]"),
        ([GOOD_RESULT | {"segmentation": [[1, 1, 5, 1, 5, 5]]}], "results[0]: segmentation: expected run lengths"),
        ([GOOD_RESULT | {"segmentation": RLE | {"size": [3]}}], "results[0]: segmentation: expected run lengths"),
        (
            [GOOD_RESULT | {"segmentation": RLE | {"counts": [0, 12]}}],
            "results[0]: segmentation: counts: expected c",
        ),
        (
            [GOOD_RESULT | {"segmentation": RLE | {"size": [3, 5]}}],
            "results[0]: segmentation: counts: expected runs",
        ),
        ([GOOD_RESULT | {"segmentation": RLE | {"counts": "P"}}], "results[0]: segmentation: counts: expected run len"),
        (
            [GOOD_RESULT, GOOD_RESULT | {"segmentation": RLE}],
            "results[1]: segmentation: expected no segment",
        ),
        (
            [GOOD_RESULT | {"segmentation": RLE}, GOOD_RESULT],
            "results[1]: segmentation: expected a segment",
        ),
    ],
)
def test_bad_results_file_is_refused_by_name(tmp_path, results, expected):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    with pytest.raises(DataError) as error:
        load_results(path)
    assert str(error.value).startswith(f"{path}: {expected}")
    assert "\n" not in str(error.value)
