"""Predictions of a detector in COCO's results format, and their average precision as pycocotools computes it."""

import contextlib
import io
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ...base.files import read_json, write_text
from ..data.checking import check_annotations
from ..data.dataset import CocoDataset
from ..data.defects import DataError, is_finite_number, is_positive_int
from ..data.formats.coco import read_coco
from ..data.masks import read_runs
from ..metrics import Metrics

_STATS = (  # what `COCOeval.stats` holds, in its order
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar_1", "ar_10", "ar_100", "ar_small", "ar_medium", "ar_large"),
)
SHOWN_IDS = 5  # of unknown ones, in a message


def evaluate(
    annotations: str | Path | COCO | CocoDataset,
    results: list[dict],
    image_ids: Iterable[int] | None = None,
    source: str | Path | None = None,
) -> Metrics:
    """Compute COCO's metrics, of boxes and, where the results and the ground truth have them, of masks.

    The figures are those of `COCO.loadRes` and `COCOeval`, also in that results with a box are counted as small,
    medium or large by their box, and results with nothing but a mask by their mask.

    Args:
        annotations: the ground truth: an annotation file, read strictly; what pycocotools has loaded; or a data set,
            which stands for its own images only, without entries that it left out, and for masks only if it was
            opened with them.
        results: in COCO's results format, see `predict` and `load_results`; may be empty. Left as they are.
        image_ids: the images that count, with or without results. Default: all of `annotations`.
        source: the file of the results, for messages.

    Example:
        >>> results = predict(detector, dataset, Accelerator())
        >>> print(evaluate(dataset, results).table())

        >>> es:
        >>> DataError: if the file can not be used, or the results or `image_ids` name an image or a category that it
        ...     does not hold, or a mask is of another size than its image.
    """
    return CocoEvaluation(annotations, results, image_ids, source).metrics()


class CocoEvaluation:
    """Results matched with ground truth by pycocotools; `evaluate` and its arguments tell the rest.

    Attributes:
        truth: the ground truth that counts, and perhaps images that do not.
        found: the results, with ids from 1 in their order.
        boxes: COCOeval by IoU of boxes, accumulated and summarised.
        masks: the same by IoU of masks, or None.
    """

    def __init__(
        self,
        annotations: str | Path | COCO | CocoDataset,
        results: list[dict],
        image_ids: Iterable[int] | None = None,
        source: str | Path | None = None,
    ):
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it goes
            self.truth = _index(_ground_truth(annotations, masks=has_masks(results)))
            counted = list(self.truth.imgs if image_ids is None else image_ids)
            _check_known(self.truth, results, counted, f"{source}: results" if source else "results")
            # Not COCO.loadRes, which fails on no results and writes into those it is given
            entries = [_detection(result, number) for number, result in enumerate(results, start=1)]
            self.found = _index({**self.truth.dataset, "annotations": entries})
            self.boxes = self._match(self.found, "bbox", counted)
            compares_masks = (not results or has_masks(results)) and has_masks(self.truth.anns.values())
            self.masks = self._match(_by_mask_area(self.found), "segm", counted) if compares_masks else None

    def _match(self, found: COCO, iou_type: str, image_ids: list[int]) -> COCOeval:
        evaluation = COCOeval(self.truth, found, iou_type)
        evaluation.params.imgIds = image_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return evaluation

    def metrics(self) -> Metrics:
        """The figures of boxes, and those of masks in them."""
        mask = None if self.masks is None else self._metrics(self.masks)
        return self._metrics(self.boxes, mask)

    def _metrics(self, evaluation: COCOeval, mask: Metrics | None = None) -> Metrics:
        stats = map(_percent, evaluation.stats)
        figures = dict(zip(_STATS, stats, strict=True))
        return Metrics(**figures, per_class=_per_class(self.truth, evaluation), mask=mask)


def has_masks(entries: Iterable[dict]) -> bool:
    """Whether there are entries, annotations or results in COCO's terms, and all of them have a segmentation."""
    entries = list(entries)
    return bool(entries) and all(entry.get("segmentation") for entry in entries)


def _index(content: dict) -> COCO:
    coco = COCO()
    coco.dataset = content
    coco.createIndex()
    return coco


def _ground_truth(annotations: str | Path | COCO | CocoDataset, masks: bool) -> dict:
    if isinstance(annotations, CocoDataset):
        return annotations.to_coco()
    if isinstance(annotations, COCO):
        numbered = enumerate(annotations.dataset["annotations"], start=1)
        return {**annotations.dataset, "annotations": [_countable(entry, number) for number, entry in numbered]}
    raw = read_coco(annotations)
    return check_annotations(raw, skip_bad=False, masks=masks and raw.has_masks()).to_coco()


def _countable(annotation: dict, number: int) -> dict:
    """With all that COCOeval asks for, which takes a match with id 0 for none and writes into what it gets."""
    _, _, width, height = annotation["bbox"]
    return {"area": width * height, "iscrowd": 0, **annotation, "id": number}


def _detection(result: dict, number: int) -> dict:
    if result.get("bbox"):
        box, area = result["bbox"], result["bbox"][2] * result["bbox"][3]
    else:
        box = coco_mask.toBbox(result["segmentation"]).tolist()
        area = float(coco_mask.area(result["segmentation"]))
    return {**result, "id": number, "bbox": box, "area": area, "iscrowd": 0}


def _by_mask_area(found: COCO) -> COCO:
    """By size, masks count by their own area, not their box's: what the field does, by taking the boxes out first."""
    results = found.dataset["annotations"]
    return _index(
        {
            **found.dataset,
            "annotations": [{**result, "area": float(coco_mask.area(result["segmentation"]))} for result in results],
        }
    )


def _check_known(truth: COCO, results: list[dict], image_ids: list[int], name: str) -> None:
    if unknown := {*image_ids, *(result["image_id"] for result in results)} - truth.imgs.keys():
        raise DataError(f"{name}: image_id: expected images of the data set, it has no {_listed(unknown)}")
    if unknown := {result["category_id"] for result in results} - truth.cats.keys():
        raise DataError(f"{name}: category_id: expected categories of the data set, it has no {_listed(unknown)}")
    for index, result in enumerate(results):
        image, segmentation = truth.imgs[result["image_id"]], result.get("segmentation")
        size = [image.get("height"), image.get("width")]
        if isinstance(segmentation, dict) and list(segmentation["size"]) != size:
            found = f"expected {size}, image {image['id']}'s [height, width], found {segmentation['size']}"
            raise DataError(f"{name}[{index}]: segmentation: size: {found}")


def _listed(ids: set[int]) -> str:
    shown = ", ".join(map(str, sorted(ids)[:SHOWN_IDS]))
    return shown if len(ids) <= SHOWN_IDS else f"{shown} and {len(ids) - SHOWN_IDS:,} more"


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
    """Write COCO's results format, JSON; a file of that name is replaced when the new one is complete."""
    write_text(path, json.dumps(results))


def load_results(path: str | Path) -> list[dict]:
    """Read COCO's results format.

    Raises:
        DataError: if the file is not a list of results with image_id, category_id, score, and bbox or segmentation or
            both: all of them the same.
    """
    results = read_json(path, DataError, most_bytes=None, most_levels=None)
    if not isinstance(results, list):
        raise DataError(f"{path}: expected a list of results, found {type(results).__name__}")
    for index, result in enumerate(results):
        _check_result(f"{path}: results[{index}]", result)
        for key in ("bbox", "segmentation"):
            if bool(result.get(key)) != bool(results[0].get(key)):
                wanted = f"a {key}" if results[0].get(key) else f"no {key}"
                raise DataError(f"{path}: results[{index}]: {key}: expected {wanted}, as in results[0]")
    return results


def _check_result(where: str, result: object) -> None:
    if not isinstance(result, dict):
        raise DataError(f"{where}: expected an object, found {type(result).__name__}")
    for key in ("image_id", "category_id"):
        if type(result.get(key)) is not int:
            raise DataError(f"{where}: {key}: expected an integer")
    box, segmentation = result.get("bbox"), result.get("segmentation")
    if box or not segmentation:
        _check_box(where, box)
    if segmentation:
        _check_segmentation(f"{where}: segmentation", segmentation)
    if not is_finite_number(result.get("score")):
        raise DataError(f"{where}: score: expected a finite number")


def _check_box(where: str, box: object) -> None:
    if not (isinstance(box, list) and len(box) == 4 and all(map(is_finite_number, box))):
        raise DataError(f"{where}: bbox: expected [x, y, width, height], four finite numbers")


def _check_segmentation(where: str, segmentation: object) -> None:
    size = segmentation.get("size") if isinstance(segmentation, dict) else None
    right = isinstance(size, list) and len(size) == 2 and all(map(is_positive_int, size))
    if not isinstance(segmentation, dict) or not isinstance(size, list) or not right:
        raise DataError(f"{where}: expected run lengths, an object of size [height, width] in pixels and counts")
    if not isinstance(segmentation.get("counts"), str):
        raise DataError(f"{where}: counts: expected compressed run lengths, a string")
    read_runs(where, segmentation, *size)  # pycocotools reads past the end of broken ones
