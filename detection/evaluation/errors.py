"""Which errors a detector makes: every false positive and every missed object has one kind."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from .coco import CocoEvaluation

MATCH_IOU, NEAR_IOU = 0.5, 0.1

# What a false positive lies on, by kind; the first that holds.
FALSE_KINDS = {
    "duplicate": "its own class's object at IoU >= 0.5, which a detection with a higher score has found",
    "confusion": "an object of another class at IoU >= 0.5",
    "localisation": "an object of its own class at IoU 0.1 to 0.5, and none better",
    "background": "none of these",
}
# What lies on a missed object, by kind; the first that holds.
MISSED_KINDS = {
    "confused": "a false positive of another class lies on it at IoU >= 0.5",
    "mislocated": "a false positive of its own class lies on it at IoU 0.1 to 0.5",
    "unseen": "neither",
}


class FalsePositive(NamedTuple):
    """A false positive: ids of the detection (in `CocoEvaluation.found`) and of the object that tells its kind.

    `iou` is theirs; `truth` is None for the background.
    """

    kind: str
    detection: int
    truth: int | None
    iou: float


class Missed(NamedTuple):
    """A missed object: its annotation id in `CocoEvaluation.truth`."""

    kind: str
    truth: int


@dataclasses.dataclass(frozen=True)
class ErrorBreakdown:
    """Errors by boxes at IoU 0.5, of the detections with at least a certain score. Crowd regions take no part.

    Detections are matched with objects by COCOeval: in order of score, each with the object of its class with the
    highest IoU, at least 0.5, that is still free. A detection without a match is a false positive, of one of
    `FALSE_KINDS`; one that a crowd region of its class accounts for is none, and is not counted. An object without a
    match is missed, in one of the ways of `MISSED_KINDS`.

    Attributes:
        threshold: the score; of all scores that with the highest F1, 2 TP / (detections + objects), over all classes.
        detections: how many count: true and false positives.
        objects: how many there are.
        false: False positives, highest score first.
        missed: missed objects, largest area first.
        confusions: how often an object's class was taken for a detection's: (class, found as) by category id.
    """

    threshold: float
    detections: int
    objects: int
    false: list[FalsePositive]
    missed: list[Missed]
    confusions: Counter[tuple[int, int]]

    @property
    def correct(self) -> int:
        """True positives, which are as many as the objects that were found."""
        return self.detections - len(self.false)

    def to_dict(self) -> dict:
        """The numbers as JSON can hold them."""
        return {
            "threshold": self.threshold,
            "detections": self.detections,
            "objects": self.objects,
            "correct": self.correct,
            "false": _counts(self.false, FALSE_KINDS),
            "missed": _counts(self.missed, MISSED_KINDS),
        }


def _counts(errors: Sequence[FalsePositive | Missed], kinds: Iterable[str]) -> dict[str, int]:
    found = Counter(error.kind for error in errors)
    return {kind: found[kind] for kind in kinds}


def find_errors(evaluation: CocoEvaluation) -> ErrorBreakdown:
    """Sort the errors of an evaluation, by its boxes; `ErrorBreakdown` defines them."""
    matches = _Matches(evaluation)
    threshold = best_threshold(matches.scores, matches.correct, len(matches.objects))
    kept = matches.scores >= threshold
    false: dict[int, list[int]] = defaultdict(list)  # by image
    for detection in matches.detections[kept & ~matches.correct].tolist():
        false[evaluation.found.anns[detection]["image_id"]].append(detection)
    found = set(matches.matched[kept & matches.correct].tolist())
    missed: dict[int, list[int]] = defaultdict(list)
    for truth in matches.objects:
        if truth not in found:
            missed[evaluation.truth.anns[truth]["image_id"]].append(truth)
    errors = [_sort_image(evaluation, false[i], missed[i]) for i in sorted({*false, *missed})]
    positives = [error for image_errors, _ in errors for error in image_errors]
    positives.sort(key=lambda error: -evaluation.found.anns[error.detection]["score"])
    misses = [miss for _, image_misses in errors for miss in image_misses]
    misses.sort(key=lambda miss: -evaluation.truth.anns[miss.truth]["area"])
    confusions = Counter(
        (evaluation.truth.anns[error.truth]["category_id"], evaluation.found.anns[error.detection]["category_id"])
        for error in positives
        if error.kind == "confusion"
    )
    return ErrorBreakdown(threshold, int(kept.sum()), len(matches.objects), positives, misses, confusions)


class _Matches:
    """COCOeval's matches at IoU 0.5, objects of all sizes.

    Attributes:
        detections: (N,) ids of the detections that count.
        scores: (N,) theirs.
        correct: (N,) bool.
        matched: (N,) ids of the objects, where they are correct.
        objects: ids of all objects but crowd regions.
    """

    def __init__(self, evaluation: CocoEvaluation):
        every = evaluation.boxes.params.areaRng[0]
        found = [each for each in evaluation.boxes.evalImgs if each is not None and each["aRng"] == every]
        counts = ~_join([each["dtIgnore"][0] for each in found]).astype(bool)
        self.detections = _join([each["dtIds"] for each in found]).astype(np.int64)[counts]
        self.scores = _join([each["dtScores"] for each in found])[counts]
        self.matched = _join([each["dtMatches"][0] for each in found]).astype(np.int64)[counts]
        self.correct = self.matched > 0
        self.objects = [
            truth for each in found for truth, crowd in zip(each["gtIds"], each["gtIgnore"], strict=True) if not crowd
        ]


def _join(parts: Sequence[Sequence[float]]) -> np.ndarray:
    return np.concatenate([np.asarray(part, dtype=np.float64) for part in parts] or [np.zeros(0)])


def best_threshold(scores: np.ndarray, correct: np.ndarray, objects: int) -> float:
    """The score from which on detections have the highest F1; the lowest score if all are wrong, or 0.

    Args:
        scores: (N,).
        correct: (N,) bool.
        objects: how many there are to be found.
    """
    if not len(scores):
        return 0.0
    order = np.argsort(-scores, kind="stable")
    ordered, hits = scores[order], correct[order].cumsum()
    if not hits[-1]:
        return float(ordered[-1])
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + objects)
    f1[:-1][ordered[:-1] == ordered[1:]] = -1  # a threshold takes all of a score
    return float(ordered[np.argmax(f1)])


def _sort_image(
    evaluation: CocoEvaluation, false: list[int], missed: list[int]
) -> tuple[list[FalsePositive], list[Missed]]:
    """The errors of one image, by the ids of its false positives and missed objects."""
    image_id = (evaluation.found.anns[false[0]] if false else evaluation.truth.anns[missed[0]])["image_id"]
    objects = [each for each in evaluation.truth.imgToAnns[image_id] if not each["iscrowd"]]
    detections = [evaluation.found.anns[detection] for detection in false]
    ious = _ious(detections, objects)
    same = _categories(detections)[:, None] == _categories(objects)
    own, other = np.where(same, ious, 0), np.where(same, 0, ious)
    positives = [
        _sort_false(detection, own_ious, other_ious, objects)
        for detection, own_ious, other_ious in zip(false, own, other, strict=True)
    ]
    columns = {each["id"]: column for column, each in enumerate(objects)}
    misses = [
        Missed(_missed_kind(own[:, columns[truth]].max(initial=0), other[:, columns[truth]].max(initial=0)), truth)
        for truth in missed
    ]
    return positives, misses


def _ious(detections: list[dict], objects: list[dict]) -> np.ndarray:
    """(D, G) IoU of boxes."""
    if not detections or not objects:
        return np.zeros((len(detections), len(objects)))
    boxes = [np.array([each["bbox"] for each in entries], dtype=np.float64) for entries in (detections, objects)]
    return coco_mask.iou(*boxes, [0] * len(objects))


def _categories(entries: list[dict]) -> np.ndarray:
    return np.array([each["category_id"] for each in entries], dtype=np.int64)


def _sort_false(detection: int, own: np.ndarray, other: np.ndarray, objects: list[dict]) -> FalsePositive:
    candidates = (
        ("duplicate", own, MATCH_IOU),
        ("confusion", other, MATCH_IOU),
        ("localisation", own, NEAR_IOU),
    )
    for kind, ious, least in candidates:
        if ious.max(initial=0) >= least:
            return FalsePositive(kind, detection, objects[int(np.argmax(ious))]["id"], float(ious.max()))
    return FalsePositive("background", detection, None, 0.0)


def _missed_kind(own: float, other: float) -> str:
    if other >= MATCH_IOU:
        return "confused"
    return "mislocated" if own >= NEAR_IOU else "unseen"
