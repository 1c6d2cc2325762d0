"""Predictions of a detector in COCO's results format, and their average precision as pycocotools computes it."""

import contextlib
import dataclasses
import io
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..batch_norm import evaluation_mode
from ..files import read_json, write_text
from .datasets import CocoDataset, DataError, collate, is_finite_number, read_annotations

_STATS = (
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar_1", "ar_10", "ar_100", "ar_small", "ar_medium", "ar_large"),
)
"""What `COCOeval.stats` holds, in its order."""


@dataclasses.dataclass(frozen=True)
class Metrics:
    """COCO's box metrics in percent, as papers print them. None: there is no such object to be found.

    Attributes:
        ap: Average precision, mean over IoU thresholds 0.50, 0.55, ..., 0.95 and over classes; 100 boxes per image.
        ap50: At IoU 0.50.
        ap75: At IoU 0.75.
        ap_small: Of objects below 32 x 32 pixels.
        ap_medium: Of objects between 32 x 32 and 96 x 96 pixels.
        ap_large: Of objects above 96 x 96 pixels.
        ar_1: Average recall with at most one box per image.
        ar_10: With at most 10.
        ar_100: With at most 100.
        ar_small: Of small objects, at most 100.
        ar_medium: Of medium objects.
        ar_large: Of large objects.
        per_class: `{"ap": ..., "ap50": ...}` by class name, in order of category id.
    """

    ap: float | None
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    ar_1: float | None
    ar_10: float | None
    ar_100: float | None
    ar_small: float | None
    ar_medium: float | None
    ar_large: float | None
    per_class: dict[str, dict[str, float | None]]

    def to_dict(self) -> dict:
        """Returns plain data that JSON can hold."""
        return dataclasses.asdict(self)

    def table(self) -> str:
        """Returns a text table: all objects and objects by size, recall, and a line per class."""
        headings = {
            **{"ap": "AP", "ap50": "AP50", "ap75": "AP75", "ap_small": "APs", "ap_medium": "APm", "ap_large": "APl"},
            **{"ar_1": "AR1", "ar_10": "AR10", "ar_100": "AR100"},
        }
        width = max(map(len, ("class", *self.per_class)))
        overall = [getattr(self, name) for name in headings]
        lines = [_line(headings.values()), _line(overall), "", f"{'class':<{width}} {_line(('AP', 'AP50'))}"]
        lines += [f"{name:<{width}} {_line((row['ap'], row['ap50']))}" for name, row in self.per_class.items()]
        return "\n".join(lines)


def _line(cells: Iterable[str | float | None]) -> str:
    texts = (cell if isinstance(cell, str) else "-" if cell is None else f"{cell:.1f}" for cell in cells)
    return " ".join(f"{text:>6}" for text in texts)


def predict(
    detector: nn.Module,
    dataset: CocoDataset,
    accelerator: Accelerator,
    batch_size: int = 1,
    num_workers: int = 0,
    progress: bool = True,
) -> list[dict]:
    """Runs a detector over a data set, which the processes share among them.

    Args:
        detector: A torchvision detector, on the accelerator's device: takes a list of images, returns a list of dicts
            of boxes, labels and scores. It is left in the mode, training or not, in which it came.
        dataset: Its transforms must not be random.
        accelerator: Knows the processes.
        batch_size: Images per process. A batch is padded to its largest image, which moves AP a little: keep to one.
        num_workers: Of the DataLoader.
        progress: Show a bar, on the main process only.

    Returns:
        On every process the boxes of all images, in the data set's order: dicts of image_id, category_id,
        bbox (x, y, width, height in pixels) and score.

    Raises:
        DataError: If an image can not be loaded, or the detector has more classes than the data set.
    """
    loader = DataLoader(dataset, batch_size, num_workers=num_workers, collate_fn=collate, generator=torch.Generator())
    found: dict[int, list[dict]] = {}
    # no_grad, as what a detector caches in inference mode (anchors) could not take part in training afterwards
    with evaluation_mode(detector), torch.no_grad():
        bar = not (progress and accelerator.is_main_process)
        for images, targets in tqdm(accelerator.prepare(loader), desc="predict", disable=bar, leave=False):
            batch = [
                (target["image_id"], _results(output, target["image_id"], dataset.category_ids))
                for output, target in zip(detector(images), targets, strict=True)
            ]
            # By image id, because the last batches are filled up with images of the first
            found.update(accelerator.gather_for_metrics(batch, use_gather_object=True))
    return [result for image_id in dataset.image_ids for result in found[image_id]]


def _results(output: dict, image_id: int, category_ids: tuple[int, ...]) -> list[dict]:
    corners = output["boxes"].float()
    boxes = torch.cat((corners[:, :2], corners[:, 2:] - corners[:, :2]), dim=1).tolist()
    results = []
    for box, label, score in zip(boxes, output["labels"].tolist(), output["scores"].tolist(), strict=True):
        if label > len(category_ids):
            raise DataError(f"the detector finds class {label}, the data set has {len(category_ids)} classes")
        if label > 0:  # RetinaNet and FCOS score the background as a class like any other
            results.append({"image_id": image_id, "category_id": category_ids[label - 1], "bbox": box, "score": score})
    return results


def evaluate(
    annotations: str | Path | COCO | CocoDataset, results: list[dict], image_ids: Iterable[int] | None = None
) -> Metrics:
    """Computes COCO's box metrics.

    Args:
        annotations: The ground truth: an annotation file, read strictly; what pycocotools has loaded; or a data set,
            which stands for its own images only, without entries that it left out.
        results: In COCO's results format, see `predict`; may be empty. Left as they are.
        image_ids: The images that count, with or without results. Default: all of `annotations`.

    Raises:
        DataError: If the file can not be used, or the results or `image_ids` name an image or a category that it
            does not hold.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it goes
        truth = _index(_ground_truth(annotations))
        counted = list(truth.imgs if image_ids is None else image_ids)
        _check_known(truth, results, counted)
        evaluation = COCOeval(truth, _index(_detections(truth, results)), "bbox")
        evaluation.params.imgIds = counted
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = map(_percent, evaluation.stats)
    return Metrics(**dict(zip(_STATS, stats, strict=True)), per_class=_per_class(truth, evaluation))


def _index(content: dict) -> COCO:
    coco = COCO()
    coco.dataset = content
    coco.createIndex()
    return coco


def _ground_truth(annotations: str | Path | COCO | CocoDataset) -> dict:
    if isinstance(annotations, CocoDataset):
        return annotations.to_coco()
    if isinstance(annotations, COCO):
        numbered = enumerate(annotations.dataset["annotations"], start=1)
        return {**annotations.dataset, "annotations": [_countable(entry, number) for number, entry in numbered]}
    return read_annotations(annotations).to_coco()


def _countable(annotation: dict, number: int) -> dict:
    """Fills in what COCOeval asks for; it takes a match with annotation id 0 for none, and writes into what it gets."""
    _, _, width, height = annotation["bbox"]
    return {"area": width * height, "iscrowd": 0, **annotation, "id": number}


def _detections(truth: COCO, results: list[dict]) -> dict:
    """Not COCO.loadRes, which fails on no results and writes into those it gets."""
    annotations = [_countable(result, number) for number, result in enumerate(results, start=1)]
    return {**truth.dataset, "annotations": annotations}


def _check_known(truth: COCO, results: list[dict], image_ids: list[int]) -> None:
    if unknown := {*image_ids, *(result["image_id"] for result in results)} - truth.imgs.keys():
        raise DataError(f"results: image_id: expected images of the annotation file, it has no {min(unknown)}")
    if unknown := {result["category_id"] for result in results} - truth.cats.keys():
        raise DataError(f"results: category_id: expected categories of the annotation file, it has no {min(unknown)}")


def _per_class(truth: COCO, evaluation: COCOeval) -> dict[str, dict[str, float | None]]:
    # (IoU thresholds, recalls, classes), over all sizes, at most 100 boxes per image
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    return {
        truth.cats[category_id]["name"]: {"ap": _mean(precision[:, :, k]), "ap50": _mean(precision[0, :, k])}
        for k, category_id in enumerate(evaluation.params.catIds)
    }


def _mean(precision: np.ndarray) -> float | None:
    """COCOeval marks a class without objects with -1 throughout."""
    return _percent(precision.mean())


def _percent(value: float) -> float | None:
    return None if value < 0 else 100 * float(value)


def save_results(results: list[dict], path: str | Path) -> None:
    """Writes COCO's results format, JSON; a file of that name is replaced when the new one is complete."""
    write_text(path, json.dumps(results))


def load_results(path: str | Path) -> list[dict]:
    """Reads COCO's results format.

    Raises:
        DataError: If the file is not a list of boxes with image_id, category_id, bbox and score.
    """
    results = read_json(path, DataError)
    if not isinstance(results, list):
        raise DataError(f"{path}: expected a list of results, got {type(results).__name__}")
    for index, result in enumerate(results):
        _check_result(f"{path}: results[{index}]", result)
    return results


def _check_result(where: str, result: object) -> None:
    if not isinstance(result, dict):
        raise DataError(f"{where}: expected an object, got {type(result).__name__}")
    for key in ("image_id", "category_id"):
        if type(result.get(key)) is not int:
            raise DataError(f"{where}: {key}: expected an integer")
    box = result.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(map(is_finite_number, box))):
        raise DataError(f"{where}: bbox: expected [x, y, width, height], four finite numbers")
    if not is_finite_number(result.get("score")):
        raise DataError(f"{where}: score: expected a finite number")
