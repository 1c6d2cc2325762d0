"""`nats evaluate`: detectors and other programs' results files, in one process or two, and the report on errors."""

import contextlib
import io
import itertools
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from nats_zoo import NatsError
from nats_zoo.cli import commands as cli
from nats_zoo.detection import create_detector, from_pretrained, save_detector
from nats_zoo.detection.data.dataset import CocoDataset
from nats_zoo.detection.data.opening import open_split
from nats_zoo.detection.evaluation.coco import CocoEvaluation
from nats_zoo.detection.evaluation.error_sheets import _span
from nats_zoo.detection.evaluation.errors import FALSE_KINDS, MISSED_KINDS, best_threshold, find_errors
from nats_zoo.detection.evaluation.evaluate import evaluate_model
from nats_zoo.detection.evaluation.report import _class_curves
from nats_zoo.detection.metrics import Metrics
from tests.support.two_processes import launch_two

CLASSES = {7: "cat", 12: "dog", 90: "bus"}
SMALL = {"fpn_channels": 8, "head_size": 16, "mask_channels": 8, "min_size": 64, "max_size": 128, "detections": 20}
FIGURES = ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"]
FIGURES += ["ar_1", "ar_10", "ar_100", "ar_small", "ar_medium", "ar_large"]


def polygon(x, y, w, h):
    return [x, y, x + w, y, x + w, y + h, x + w / 2, y + 0.7 * h, x, y + h]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Seven noisy images of odd sizes with sparse ids; the third has no object, and there is a crowd region."""
    root = tmp_path_factory.mktemp("evaluation") / "data"
    (root / "images").mkdir(parents=True)
    (root / "annotations").mkdir()
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number, image_id in enumerate((501, 3, 77, 20, 21, 1000, 8)):
        width, height = 141 + 10 * (number % 3), 123 + 4 * number
        pixels = rng.integers(0, 255, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
        image.save(root / "images" / f"{number}.png")
        images.append({"id": image_id, "file_name": f"{number}.png", "width": width, "height": height})
        for _ in range(0 if number == 2 else 4):
            w, h = rng.uniform(12, 110, 2).round(1).tolist()
            x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
            entry = {"image_id": image_id, "category_id": list(CLASSES)[len(annotations) % 3], "bbox": [x, y, w, h]}
            entry |= {"id": len(annotations) + 5, "area": w * h * 0.85, "iscrowd": int(len(annotations) == 6)}
            annotations.append(entry | {"segmentation": [polygon(x, y, w, h)]})
    categories = [{"id": key, "name": name} for key, name in CLASSES.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / "instances_val.json").write_text(json.dumps(content))
    return root


def content_of(data: Path) -> dict:
    return json.loads((data / "annotations" / "instances_val.json").read_text())


def perturbed(content: dict, kind: str = "both", seed: int = 0) -> list[dict]:
    """Another program's results: most objects, displaced, some of another class, and a false alarm per image."""
    rng = np.random.default_rng(seed)
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    ids = [category["id"] for category in content["categories"]]
    results = []
    for entry in content["annotations"]:
        if rng.random() > 0.15:
            category = entry["category_id"] if rng.random() < 0.85 else int(rng.choice(ids))
            box = (np.array(entry["bbox"]) + rng.normal(0, 4, 4)).clip(1).tolist()
            results.append({"image_id": entry["image_id"], "category_id": category, "bbox": box})
    results += [{"image_id": key, "category_id": ids[0], "bbox": [5.0, 5.0, 30.0, 20.0]} for key in sizes]
    for result in results:
        result["score"] = rng.random()
        (rle,) = coco_mask.frPyObjects([polygon(*result["bbox"])], *sizes[result["image_id"]])
        if kind != "bbox":
            result["segmentation"] = {"size": list(rle["size"]), "counts": rle["counts"].decode()}
        if kind == "segm":
            del result["bbox"]
    return results


def by_hand(annotations: Path, results: Path, iou_type: str) -> list[float]:
    """The twelve figures of pycocotools from files, in percent. Masks have no boxes then: their own area counts."""
    if iou_type == "segm":
        found = [{key: value for key, value in one.items() if key != "bbox"} for one in json.loads(results.read_text())]
        results = results.with_name("masks_only.json")
        results.write_text(json.dumps(found))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(str(results)), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [100 * value for value in evaluation.stats]


def figures_of(metrics: Metrics) -> list[float]:
    return [-100 if getattr(metrics, name) is None else getattr(metrics, name) for name in FIGURES]


def write_results(folder: Path, results: list[dict]) -> Path:
    path = folder / "found.json"
    path.write_text(json.dumps(results))
    return path


def evaluate(*arguments) -> int:
    return cli.main(["evaluate", *map(str, arguments), "--workers", "0"])


# Results files


@pytest.mark.parametrize("kind", ["bbox", "segm", "both"])
def test_a_results_file_gives_pycocotools_figures(data, tmp_path, kind, capsys):
    path = write_results(tmp_path, perturbed(content_of(data), kind))
    before = path.read_bytes()
    assert evaluate(path, data, "--split", "val", "--output", tmp_path / "out") == 0
    saved = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (saved.pop("split"), saved.pop("transpose"), saved.pop("results")) == ("val", False, str(path))
    metrics = Metrics.from_dict(saved)
    annotations = data / "annotations" / "instances_val.json"
    assert figures_of(metrics) == pytest.approx(by_hand(annotations, path, "bbox"))
    assert 5 < metrics.ap < 95
    if kind == "bbox":
        assert metrics.mask is None
    else:
        assert figures_of(metrics.mask) == pytest.approx(by_hand(annotations, path, "segm"))
    assert capsys.readouterr().out == metrics.table() + "\n"
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["metrics.json"]
    assert path.read_bytes() == before


def test_a_results_file_on_other_formats(data, tmp_path):
    """The same objects as VOC's XML files beside COCO's: the format decides which are read."""
    root = shutil.copytree(data, tmp_path / "data")
    (root / "Annotations").mkdir()
    (root / "ImageSets" / "Main").mkdir(parents=True)
    content = content_of(data)
    for image in content["images"]:
        objects = ""
        for entry in (entry for entry in content["annotations"] if entry["image_id"] == image["id"]):
            x, y, w, h = entry["bbox"]
            corners = {"xmin": x + 1, "ymin": y + 1, "xmax": x + w, "ymax": y + h}
            corners = "".join(f"<{key}>{value}</{key}>" for key, value in corners.items())
            name = CLASSES[entry["category_id"]]
            objects += f"<object><name>{name}</name><difficult>{entry['iscrowd']}</difficult>"
            objects += f"<bndbox>{corners}</bndbox></object>"
        size = f"<size><width>{image['width']}</width><height>{image['height']}</height></size>"
        text = f"<annotation><filename>{image['file_name']}</filename>{size}{objects}</annotation>"
        (root / "Annotations" / f"{Path(image['file_name']).stem}.xml").write_text(text)
    stems = sorted(Path(image["file_name"]).stem for image in content["images"])
    (root / "ImageSets" / "Main" / "val.txt").write_text("\n".join(stems))
    voc = open_split(root, "val", format="voc").to_coco()
    path = write_results(tmp_path, perturbed(voc, "bbox"))
    (tmp_path / "voc.json").write_text(json.dumps(voc))
    metrics = evaluate_model(str(path), str(root), "val", format="voc")
    assert figures_of(metrics) == pytest.approx(by_hand(tmp_path / "voc.json", path, "bbox"))
    with pytest.raises(NatsError, match=r"found\.json: results: image_id"):
        evaluate_model(str(path), str(root), "val")


def test_unknown_images_and_categories_are_named_with_exit_code_2(data, tmp_path, capsys):
    results = perturbed(content_of(data), "bbox")
    for result, image_id in zip(results, (40, 2, 41, 42, 43, 44, 45), strict=False):
        result["image_id"] = image_id
    path = write_results(tmp_path, results)
    assert evaluate(path, data, "--split", "val", "--output", tmp_path / "out") == 2
    expected = (
        f"nats: {path}: results: image_id: expected images of the data set, it has no 2, 40, 41, 42, 43 and 2 more"
    )
    assert capsys.readouterr().err == expected + "\n"
    write_results(tmp_path, [{**result, "image_id": 3, "category_id": 1} for result in results])
    assert evaluate(path, data, "--split", "val") == 2
    assert capsys.readouterr().err.endswith("category_id: expected categories of the data set, it has no 1\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"image_id": 3, "category_id": 7, "score": 1}]', "[[", None])
def test_a_file_that_is_no_results_is_one_line(data, tmp_path, capsys, text):
    path = tmp_path / "found.json"
    if text is not None:
        path.write_text(text)
    assert evaluate(path, data, "--split", "val") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"nats: {path}: ")
    assert err.count("\n") == 1


def test_results_of_images_that_are_left_out_on_request_are_left_out_too(data, tmp_path):
    root = shutil.copytree(data, tmp_path / "data")
    (root / "images" / "4.png").write_bytes(b"")
    results = perturbed(content_of(data))
    path = write_results(tmp_path, results)
    metrics = evaluate_model(str(path), str(root), "val", skip_bad=True)
    kept = [result for result in results if result["image_id"] != 21]
    assert len(kept) < len(results)
    whole = CocoDataset(data / "annotations" / "instances_val.json", data / "images", masks=True)
    rest = whole.select([index for index, image_id in enumerate(whole.image_ids) if image_id != 21])
    assert metrics == CocoEvaluation(rest, kept).metrics()


# Detectors


def save_network(folder: Path, framework: str = "maskrcnn", **options) -> Path:
    """Random weights, under which all classes are found about equally often."""
    torch.manual_seed(0)
    detector = create_detector(framework, "resnet18", weights=None, **{**SMALL, **options})
    predictor = detector.roi_heads.box_predictor
    with torch.no_grad():
        predictor.cls_score.bias.zero_()
        predictor.cls_score.weight *= 0.1
    return save_detector(detector, folder)


@pytest.fixture(scope="module")
def model(data, tmp_path_factory) -> Path:
    """A Mask R-CNN that finds nothing in some of the images."""
    folder = tmp_path_factory.mktemp("model")
    options = {"num_classes": 4, "classes": tuple(CLASSES.values())}
    detector = from_pretrained(save_network(folder / "loose", **options))
    dataset = open_split(data, "val")
    with torch.no_grad():
        best = sorted(detector([dataset[index][0]])[0]["scores"].max().item() for index in range(len(dataset)))
    return save_network(folder / "strict", score_thresh=(best[2] + best[3]) / 2, **options)


def test_two_processes_equal_one_byte_for_byte(data, model, tmp_path, capsys):
    """Images of odd sizes, seven of them, some without detections, with masks; through `accelerate launch`."""
    arguments = ["evaluate", str(model), str(data), "--split", "val", "--workers", "0", "--report"]
    done = launch_two("-m", "nats_zoo", *arguments, "--output", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert cli.main([*arguments, "--output", str(tmp_path / "one")]) == 0
    printed = capsys.readouterr().out
    assert done.stdout.replace(str(tmp_path / "two"), str(tmp_path / "one")) == printed
    for name in ("results.json", "metrics.json", "report/errors.json", "report/report.md"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()

    results = json.loads((tmp_path / "one" / "results.json").read_text())
    assert 0 < len({result["image_id"] for result in results}) < 7
    assert all(result["segmentation"]["counts"] for result in results)
    saved = json.loads((tmp_path / "one" / "metrics.json").read_text())
    assert saved["mask"] is not None
    again = evaluate_model(str(tmp_path / "one" / "results.json"), str(data), "val")
    assert again.to_dict() == {key: value for key, value in saved.items() if key in again.to_dict()}


def test_classes_are_matched_by_name_and_others_dropped(data, tmp_path, capsys):
    """A detector with more classes, in another order, than the data set."""
    names = ("bus", "N/A", "cat", "bird", "dog")
    folder = save_network(tmp_path / "model", "fasterrcnn", num_classes=6, classes=names, detections=600)
    evaluate_model(str(folder), str(data), "val", output=str(tmp_path / "out"))
    assert f"left out: 2 classes that {folder} finds" in capsys.readouterr().err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    detector, dataset = from_pretrained(folder), open_split(data, "val")
    ids = {name: key for key, name in CLASSES.items()}
    expected, dropped = [], 0
    with torch.no_grad():
        for index, image_id in enumerate(dataset.image_ids):
            (found,) = detector([dataset[index][0]])
            for label, score in zip(found["labels"].tolist(), found["scores"].tolist(), strict=True):
                if names[label - 1] in ids:
                    expected.append((image_id, ids[names[label - 1]], score))
                else:
                    dropped += 1
    assert dropped
    assert len({category_id for _, category_id, _ in expected}) > 1
    assert [(each["image_id"], each["category_id"], each["score"]) for each in results] == expected


def test_a_class_that_the_detector_does_not_know_is_named(data, tmp_path, capsys):
    folder = save_network(tmp_path / "model", "fasterrcnn", num_classes=4, classes=("bus", "cat", "horse"))
    assert evaluate(folder, data, "--split", "val") == 2
    err = capsys.readouterr().err
    assert err.endswith("instances_val.json: class 'dog': the detector does not find it, only bus, cat, horse\n")


def test_a_detector_without_names_has_as_many_classes_as_the_data_set(data, tmp_path):
    named = save_network(tmp_path / "named", "fasterrcnn", num_classes=4, classes=tuple(CLASSES.values()))
    same = save_network(tmp_path / "same", "fasterrcnn", num_classes=4)
    assert evaluate_model(str(same), str(data), "val") == evaluate_model(str(named), str(data), "val")
    more = save_network(tmp_path / "more", "fasterrcnn", num_classes=5)
    with pytest.raises(NatsError, match=r"3 classes, the detector finds 4 without names$"):
        evaluate_model(str(more), str(data), "val")


# Errors


def place(category_id: int, *bbox: float, **more) -> dict:
    return {"image_id": 3, "category_id": category_id, "bbox": list(bbox), **more}


def test_every_error_has_its_kind():
    objects = {
        1: place(7, 0, 0, 100, 100),  # found, and once more
        2: place(7, 200, 0, 50, 50),  # found as a dog
        3: place(12, 300, 0, 50, 50),  # badly placed
        4: place(12, 400, 0, 80, 80),  # unseen, the larger
        5: place(7, 500, 0, 20, 20),  # unseen; what lies on it has too low a score
        6: place(7, 0, 200, 100, 100, iscrowd=1),
        7: place(90, 200, 200, 40, 40),  # found
    }
    found = [
        place(7, 0, 0, 100, 90, score=0.9),
        place(7, 0, 0, 100, 80, score=0.95),
        place(12, 200, 0, 50, 45, score=0.8),
        place(12, 320, 0, 50, 50, score=0.85),  # IoU 3/7
        place(90, 600, 600, 30, 30, score=0.7),  # nothing there
        place(90, 345, 0, 50, 50, score=0.65),  # another class at IoU 0.05 is nothing either
        place(7, 10, 210, 30, 30, score=0.6),  # in the crowd
        place(90, 200, 200, 40, 40, score=0.5),
        place(7, 500, 0, 20, 20, score=0.1),
        *(place(7, 600, 10 * i, 5, 5, score=0.4 - 0.01 * i) for i in range(20)),  # keep the threshold above 0.1
    ]
    truth = COCO()
    truth.dataset = {
        "images": [{"id": 3, "width": 700, "height": 700}],
        "annotations": [{"id": key, **entry} for key, entry in objects.items()],
        "categories": [{"id": key, "name": name} for key, name in CLASSES.items()],
    }
    errors = find_errors(CocoEvaluation(truth, found))
    assert errors.threshold == 0.5
    assert (errors.objects, errors.detections, errors.correct) == (6, 7, 2)
    assert [(error.kind, error.detection, error.truth, round(error.iou, 3)) for error in errors.false] == [
        ("duplicate", 1, 1, 0.9),
        ("localisation", 4, 3, 0.429),
        ("confusion", 3, 2, 0.9),
        ("background", 5, None, 0),
        ("background", 6, None, 0),
    ]
    missed = [("unseen", 4), ("confused", 2), ("mislocated", 3), ("unseen", 5)]
    assert [tuple(miss) for miss in errors.missed] == missed
    assert errors.confusions == {(7, 12): 1}
    assert errors.to_dict() == {
        **{"threshold": 0.5, "detections": 7, "objects": 6, "correct": 2},
        "false": {"duplicate": 1, "confusion": 1, "localisation": 1, "background": 2},
        "missed": {"confused": 1, "mislocated": 1, "unseen": 2},
    }


@pytest.mark.parametrize("seed", range(3))
def test_errors_add_up(data, seed):
    results = perturbed(content_of(data), "bbox", seed)
    errors = find_errors(CocoEvaluation(data / "annotations" / "instances_val.json", results))
    numbers = errors.to_dict()
    assert set(numbers["false"]) == set(FALSE_KINDS)
    assert set(numbers["missed"]) == set(MISSED_KINDS)
    assert errors.correct + sum(numbers["false"].values()) == errors.detections
    assert errors.correct + sum(numbers["missed"].values()) == errors.objects == 23
    scores = [results[error.detection - 1]["score"] for error in errors.false]
    assert scores == sorted(scores, reverse=True)
    assert min(scores) >= errors.threshold


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans())), st.integers(0, 5))
def test_the_threshold_has_the_highest_f1(detections, more):
    scores = np.array([score / 10 for score, _ in detections])
    correct = np.array([hit for _, hit in detections], dtype=bool)
    objects = int(correct.sum()) + more

    def f1(threshold: float) -> float:
        kept = scores >= threshold
        return 2 * (kept & correct).sum() / max(1, kept.sum() + objects)

    threshold = best_threshold(scores, correct, objects)
    assert f1(threshold) == max(map(f1, scores), default=0)
    assert threshold in scores or not len(scores)


# The report


PICTURES = {"pr_curves", "ap_by_class", "ap_by_size", "pr_curves_by_class"}
SHEETS = {"false_positives", "duplicates", "confusions", "localisation", "missed"}


def test_the_report_is_tables_and_pictures(data, tmp_path, capsys):
    path = write_results(tmp_path, perturbed(content_of(data)))
    output = tmp_path / "out"
    assert evaluate(path, data, "--split", "val", "--report", "--output", output) == 0
    report = output / "report"
    assert capsys.readouterr().out.endswith(f"\n\n{report / 'report.md'}\n")
    text = (report / "report.md").read_text()
    metrics = evaluate_model(str(path), str(data), "val")
    assert text.startswith("# found.json on data val\n\n7 images, 23 objects, ")
    assert f"| boxes | {metrics.ap:.1f} | {metrics.ap50:.1f} |" in text
    assert f"| masks | {metrics.mask.ap:.1f} | {metrics.mask.ap50:.1f} |" in text
    figures = [each.per_class["dog"][key] for each in (metrics, metrics.mask) for key in ("ap", "ap50")]
    assert f"| dog | 8 | {' | '.join(f'{figure:.1f}' for figure in figures)} |" in text
    numbers = json.loads((report / "errors.json").read_text())
    for kind, number in numbers["false"].items():
        assert f"| {kind} | {number} | {100 * number / numbers['detections']:.1f} % |" in text
    shown = re.findall(r"!\[[^]]+\]\((\w+)\.png\)", text)
    assert PICTURES < set(shown) <= PICTURES | SHEETS
    assert {file.stem for file in report.iterdir()} == {*shown, "report", "errors"}
    for name in shown:
        with Image.open(report / f"{name}.png") as image:
            image.load()
            assert min(image.size) > 200
            assert len(image.convert("RGB").getcolors(2**24)) > 20


def test_an_earlier_report_is_replaced_whole_and_nothing_else_is(data, tmp_path):
    content = content_of(data)
    output = tmp_path / "out"
    arguments = {"split": "val", "output": str(output), "report": True}
    evaluate_model(str(write_results(tmp_path, perturbed(content))), str(data), **arguments)
    assert (output / "report" / "missed.png").exists()
    perfect = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 1.0}
        for a in content["annotations"]
        if not a["iscrowd"]
    ]
    path = str(write_results(tmp_path, perfect))
    evaluate_model(path, str(data), **arguments)
    assert {file.stem for file in (output / "report").iterdir()} == {*PICTURES, "report", "errors"}
    assert "precision 100.0 %, recall 100.0 %" in (output / "report" / "report.md").read_text()

    other = tmp_path / "other" / "report"
    other.mkdir(parents=True)
    (other / "thesis.tex").write_text("mine")
    with pytest.raises(NatsError, match=r"report: expected no such folder, or an earlier report to replace$"):
        evaluate_model(path, str(data), **{**arguments, "output": str(other.parent)})
    assert [file.name for file in other.iterdir()] == ["thesis.tex"]


def test_a_report_of_no_detections_in_the_default_folder(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_results(tmp_path, [])
    assert evaluate(path, data, "--split", "val", "--report") == 0
    numbers = json.loads(Path("evaluation/report/errors.json").read_text())
    assert (numbers["detections"], numbers["missed"]["unseen"]) == (0, 23)
    assert Path("evaluation/report/missed.png").exists()


def test_a_report_without_objects(data, tmp_path):
    content = content_of(data)
    root = shutil.copytree(data, tmp_path / "data")
    (root / "annotations" / "instances_val.json").write_text(json.dumps({**content, "annotations": []}))
    path = write_results(tmp_path, perturbed(content, "bbox"))
    metrics = evaluate_model(str(path), str(root), "val", output=str(tmp_path / "out"), report=True)
    assert metrics.ap is None
    report = tmp_path / "out" / "report"
    assert {file.stem for file in report.iterdir()} == {"report", "errors", "false_positives"}
    assert "| boxes | - | - |" in (report / "report.md").read_text()


def test_curves_of_eighty_classes_are_readable():
    """Each has a panel with a title that is on the picture and on no other title."""
    images = [{"id": 1, "width": 100, "height": 100}]
    categories = [{"id": key, "name": f"a class numbered {key}"} for key in range(1, 81)]
    boxes = [{"image_id": 1, "category_id": key, "bbox": [key, 10, 50, 50]} for key in range(1, 81)]
    truth = COCO()
    truth.dataset = {"images": images, "annotations": boxes, "categories": categories}
    evaluation = CocoEvaluation(truth, [{**box, "score": 0.5} for box in boxes[:60]])
    figure = _class_curves(evaluation)
    FigureCanvasAgg(figure).draw()
    panels = [axes for axes in figure.axes if axes.axison]
    assert len(panels) == 80
    titles = [axes.title.get_window_extent() for axes in panels]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(titles, 2))
    assert all(0 <= title.x0 < title.x1 <= figure.bbox.width for title in titles)
    assert min(axes.get_window_extent().width for axes in panels) > 0.9 * figure.dpi
    curves = [axes.lines[0].get_data() for axes in panels]
    areas = [float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum()) for x, y in curves]  # numpy 2 has a function for it
    assert areas == pytest.approx([1.0] * 60 + [0.0] * 20)


@given(st.floats(-50, 500), st.floats(0.1, 300), st.integers(1, 400))
def test_a_crop_lies_in_the_image_and_holds_what_is_shown(start, length, limit):
    first, extent = _span(start, start + length, limit)
    assert first >= 0
    assert 1 <= extent <= limit - first
    visible = max(0, min(start, limit)), min(limit, max(start + length, 0))
    assert first <= math.ceil(visible[0])
    assert first + extent >= math.floor(visible[1])
