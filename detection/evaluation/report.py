"""The report on an evaluation: precision-recall curves, AP by class and size, and the worst errors as pictures."""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from ...base.files import atomic_folder, write_json, write_text
from ...base.text import markdown_table
from ...pictures.style import DPI
from ..data.dataset import CocoDataset
from ..metrics import Metrics, in_percent
from .coco import CocoEvaluation
from .error_sheets import ErrorSheets
from .errors import FALSE_KINDS, MISSED_KINDS, ErrorBreakdown, FalsePositive, Missed, find_errors

BOX_COLOUR, MASK_COLOUR = "#0072B2", "#D55E00"
LIGHT = "#a9cbe3"
MAX_PANELS = 100  # classes with a curve of their own; of more, those with the lowest AP50
MAX_CONFUSIONS = 15  # pairs of classes in the report's table

SIZES = {"all": "sizes", "small": "below 32² pixels", "medium": "32² to 96²", "large": "above 96²"}

# File name, kind of error and heading of each sheet.
SHEETS = {
    "false_positives": ("background", "False positives on the background, the highest score first"),
    "duplicates": ("duplicate", "Objects found once more, the highest score first"),
    "confusions": ("confusion", "Objects taken for another class, the highest score first"),
    "localisation": ("localisation", "Badly placed boxes, the highest score first"),
    "missed": ("unseen", "Objects that were not seen at all, the largest first"),
}


def write_report(folder: str | Path, dataset: CocoDataset, evaluation: CocoEvaluation, title: str) -> ErrorBreakdown:
    """Write report.md, errors.json and the pictures that it shows, in place of an earlier report.

    Args:
        folder: is created.
        dataset: the images; without random transforms.
        evaluation: of results on that data set.
        title: what was evaluated on what.

    Returns:
        The errors in numbers.

    Raises:
        DataError: if an image can not be loaded.
    """
    metrics, errors = evaluation.metrics(), find_errors(evaluation)
    with atomic_folder(folder) as new:
        pictures = [*_draw_charts(new, evaluation, metrics), *_draw_sheets(new, dataset, evaluation, errors)]
        write_json(new / "errors.json", errors.to_dict())
        write_text(new / "report.md", _text(title, evaluation, metrics, errors, pictures))
    return errors


Picture = tuple[str, str]  # a file's name and its heading


# --- charts -----------------------------------------------------------------------------------------------------------


def _draw_charts(folder: Path, evaluation: CocoEvaluation, metrics: Metrics) -> Iterable[Picture]:
    charts = {
        "pr_curves": ("Precision and recall, mean over classes", lambda: _overall_curves(evaluation)),
        "ap_by_class": ("AP by class", lambda: _class_bars(metrics)),
        "ap_by_size": ("AP by size of objects", lambda: _size_bars(evaluation, metrics)),
        "pr_curves_by_class": ("Precision and recall by class, IoU 0.5", lambda: _class_curves(evaluation)),
    }
    if not _measured(evaluation.boxes):
        return
    for name, (heading, draw) in charts.items():
        draw().savefig(folder / f"{name}.png", dpi=DPI, metadata={"Software": None})
        yield f"{name}.png", heading


def _measured(evaluation: COCOeval) -> list[int]:
    """Indices of the classes that have objects."""
    return np.flatnonzero((evaluation.eval["precision"][0, :, :, 0, -1] > -1).all(axis=0)).tolist()


def _overall_curves(evaluation: CocoEvaluation) -> Figure:
    figure = Figure(figsize=(5.2, 4.6), layout="constrained")
    axes = _recall_axes(figure.add_subplot())
    kinds = (("boxes", evaluation.boxes, BOX_COLOUR), ("masks", evaluation.masks, MASK_COLOUR))
    for kind, each, colour in kinds:
        if each is None:
            continue
        for iou, style in ((0.5, "-"), (0.75, "--")):
            curve = _precision(each, iou)[:, _measured(each)].mean(axis=1)
            label = f"{kind}, IoU {iou:.2f}: AP {100 * curve.mean():.1f}"
            axes.plot(each.params.recThrs, curve, style, color=colour, label=label)
    axes.set(xlabel="recall", ylabel="precision")
    axes.legend(loc="lower left", fontsize=8)
    return figure


def _precision(evaluation: COCOeval, iou: float) -> np.ndarray:
    """(recalls, classes), objects of all sizes."""
    threshold = int(np.abs(evaluation.params.iouThrs - iou).argmin())
    return evaluation.eval["precision"][threshold, :, :, 0, -1]


def _recall_axes(axes: Axes) -> Axes:
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.set_aspect("equal")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _class_curves(evaluation: CocoEvaluation) -> Figure:
    precision = _precision(evaluation.boxes, 0.5)
    shown = _measured(evaluation.boxes)
    total = len(shown)
    if total > MAX_PANELS:
        worst = sorted(shown, key=lambda k: precision[:, k].mean())[:MAX_PANELS]
        shown = [k for k in shown if k in set(worst)]
    columns = min(max(3, total), 10 if total > 30 else 5)
    rows = math.ceil(len(shown) / columns)
    width, height = 0.5 + 1.5 * columns, 0.9 + 1.65 * rows
    figure = Figure(figsize=(width, height))
    # Neither the constrained layout nor shared axes, which take many seconds with as many panels
    margins = {"left": 0.35 / width, "right": 1 - 0.1 / width, "bottom": 0.3 / height, "top": 1 - 0.6 / height}
    grid = figure.subplots(rows, columns, squeeze=False, gridspec_kw={**margins, "wspace": 0.2, "hspace": 0.3})
    for axes, k in zip(grid.flat, shown, strict=False):
        _class_panel(_recall_axes(axes), evaluation, k)
    for axes in grid.flat[len(shown) :]:
        axes.set_axis_off()
    left_out = f", the {len(shown)} of {total} classes with the lowest AP50" if total > len(shown) else ""
    legend = "" if evaluation.masks is None else "; filled: boxes, dashed: masks"
    title = f"precision over recall, AP50 in percent{left_out}{legend}"
    figure.text(0.35 / width, 1 - 0.1 / height, title, fontsize=9, va="top")
    return figure


def _class_panel(axes: Axes, evaluation: CocoEvaluation, k: int) -> None:
    recalls = evaluation.boxes.params.recThrs
    curve = _precision(evaluation.boxes, 0.5)[:, k]
    axes.fill_between(recalls, curve, color=BOX_COLOUR, alpha=0.2, linewidth=0)
    axes.plot(recalls, curve, color=BOX_COLOUR, linewidth=1)
    if evaluation.masks is not None:
        axes.plot(recalls, _precision(evaluation.masks, 0.5)[:, k], "--", color=MASK_COLOUR, linewidth=1)
    name = evaluation.truth.cats[evaluation.boxes.params.catIds[k]]["name"]
    axes.set_title(f"{_cut(name, 15)}: {100 * curve.mean():.0f}", fontsize=8, pad=3)
    axes.set_xticks((0, 0.5, 1), ("0", ".5", "1"), fontsize=6)
    axes.set_yticks((0, 0.5, 1), ("0", ".5", "1"), fontsize=6)


def _cut(name: str, length: int) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


def _class_bars(metrics: Metrics) -> Figure:
    found = ((name, row["ap"], row["ap50"]) for name, row in metrics.per_class.items())
    rows = [(name, ap, ap50) for name, ap, ap50 in found if ap is not None and ap50 is not None]
    rows.sort(key=lambda row: row[1])
    figure = Figure(figsize=(6.4, 1.1 + 0.2 * max(4, len(rows))), layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(rows))
    axes.barh(places, [ap for _, ap, _ in rows], 0.75, color=BOX_COLOUR, label="AP", zorder=2)
    axes.barh(places, [ap50 for _, _, ap50 in rows], 0.75, color=LIGHT, label="AP50", zorder=1)
    if metrics.mask is not None:
        masks = np.array([metrics.mask.per_class[name]["ap"] for name, _, _ in rows], dtype=float)
        axes.plot(masks, places, "D", color=MASK_COLOUR, markersize=4, zorder=3, label="AP of masks")
    for place, (_, ap, ap50) in enumerate(rows):
        axes.text(ap50 + 1, place, f"{ap:.1f}", va="center", fontsize=7)
    axes.set_yticks(places, [_cut(name, 24) for name, _, _ in rows], fontsize=8)
    axes.set(xlim=(0, 108), ylim=(-0.6, len(rows) - 0.4), xlabel="percent; the number is AP")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return figure


def _size_bars(evaluation: CocoEvaluation, metrics: Metrics) -> Figure:
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.add_subplot()
    counts = _size_counts(evaluation)
    kinds = {"boxes": metrics} | ({"masks": metrics.mask} if metrics.mask is not None else {})
    width = 0.7 / len(kinds)
    for index, ((kind, each), colour) in enumerate(zip(kinds.items(), (BOX_COLOUR, MASK_COLOUR), strict=False)):
        values = [each.ap, each.ap_small, each.ap_medium, each.ap_large]
        places = np.arange(4) + (index - (len(kinds) - 1) / 2) * width
        axes.bar(places, [value or 0 for value in values], width * 0.94, color=colour, label=kind)
        for place, value in zip(places, values, strict=True):
            axes.text(place, (value or 0) + 1, in_percent(value), ha="center", fontsize=8)
    ticks = [f"{name}\n{SIZES[name]}\n{count:,} objects" for name, count in counts.items()]
    axes.set_xticks(range(4), ticks, fontsize=8)
    axes.set(ylim=(0, 108), ylabel="AP, percent")
    axes.spines[["top", "right"]].set_visible(False)
    if len(kinds) > 1:
        axes.legend(fontsize=8, frameon=False, ncols=2)
    return figure


def _size_counts(evaluation: CocoEvaluation) -> dict[str, int]:
    areas = np.array([each["area"] for each in evaluation.truth.anns.values() if not each["iscrowd"]])
    ranges = zip(evaluation.boxes.params.areaRngLbl, evaluation.boxes.params.areaRng, strict=True)
    return {label: int(((areas >= least) & (areas <= most)).sum()) for label, (least, most) in ranges}


# --- sheets of errors -------------------------------------------------------------------------------------------------


def _draw_sheets(
    folder: Path, dataset: CocoDataset, evaluation: CocoEvaluation, errors: ErrorBreakdown
) -> Iterable[Picture]:
    sheets = ErrorSheets(dataset, evaluation, errors.threshold)
    for name, (kind, heading) in tqdm(SHEETS.items(), "draw errors", leave=False, disable=None):
        found: list[FalsePositive | Missed] = [*errors.false, *errors.missed]
        chosen = [error for error in found if error.kind == kind]
        if chosen:
            sheets.draw(chosen, f"{heading} ({len(chosen):,} in all)", folder / f"{name}.png")
            yield f"{name}.png", heading


# --- text -------------------------------------------------------------------------------------------------------------


def _text(
    title: str, evaluation: CocoEvaluation, metrics: Metrics, errors: ErrorBreakdown, pictures: Iterable[Picture]
) -> str:
    shown = [f"## {heading}\n\n![{heading}]({name})" for name, heading in pictures]
    charts = [part for part in shown if not any(f"({name}.png)" in part for name in SHEETS)]
    sheets = [part for part in shown if part not in charts]
    images = len(evaluation.boxes.params.imgIds)
    parts = [
        f"# {title}",
        f"{images:,} images, {errors.objects:,} objects, {len(evaluation.found.anns):,} detections of any score.",
        f"## COCO's metrics, percent\n\n{_overall_table(metrics)}",
        *charts,
        f"## Classes\n\n{_class_table(evaluation, metrics)}",
        f"## Errors\n\n{_error_text(errors)}",
        _confusion_text(evaluation, errors),
        *sheets,
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _overall_table(metrics: Metrics) -> str:
    head = {
        **{"ap": "AP", "ap50": "AP50", "ap75": "AP75", "ap_small": "AP small", "ap_medium": "AP medium"},
        **{"ap_large": "AP large", "ar_1": "AR 1", "ar_10": "AR 10", "ar_100": "AR 100"},
    }
    kinds = {"boxes": metrics, "masks": metrics.mask}
    rows = [(kind, *(in_percent(getattr(m, key)) for key in head)) for kind, m in kinds.items() if m is not None]
    return markdown_table(("", *head.values()), rows)


def _class_table(evaluation: CocoEvaluation, metrics: Metrics) -> str:
    rows = []
    for category_id, category in sorted(evaluation.truth.cats.items()):
        entries = [evaluation.truth.anns[i] for i in evaluation.truth.getAnnIds(catIds=[category_id], iscrowd=False)]
        kinds = filter(None, (metrics, metrics.mask))
        figures = [in_percent(m.per_class[category["name"]][key]) for m in kinds for key in ("ap", "ap50")]
        rows.append((category["name"], f"{len(entries):,}", *figures))
    masks = () if metrics.mask is None else ("mask AP", "mask AP50")
    return markdown_table(("class", "objects", "AP", "AP50", *masks), rows)


def _error_text(errors: ErrorBreakdown) -> str:
    numbers = errors.to_dict()
    found, objects = errors.detections, errors.objects
    return "\n\n".join(
        [
            f"Of the detections with a score of at least {errors.threshold:.3f}, the threshold with the highest F1 at"
            f" IoU 0.5: precision {_share(errors.correct, found)}, recall {_share(errors.correct, objects)}."
            " Boxes are matched as for AP; crowd regions, and what lies in them, do not count.",
            markdown_table(
                ("detections", "number", "share", "lies on"),
                [
                    ("correct", f"{errors.correct:,}", _share(errors.correct, found), "an object of its class"),
                    *((kind, f"{n:,}", _share(n, found), FALSE_KINDS[kind]) for kind, n in numbers["false"].items()),
                    ("all", f"{found:,}", "", ""),
                ],
            ),
            markdown_table(
                ("objects", "number", "share", "what lies on it"),
                [
                    ("found", f"{errors.correct:,}", _share(errors.correct, objects), "a detection of its class"),
                    *(
                        (f"missed: {kind}", f"{n:,}", _share(n, objects), MISSED_KINDS[kind])
                        for kind, n in numbers["missed"].items()
                    ),
                    ("all", f"{objects:,}", "", ""),
                ],
            ),
        ]
    )


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _confusion_text(evaluation: CocoEvaluation, errors: ErrorBreakdown) -> str:
    names = {category_id: category["name"] for category_id, category in evaluation.truth.cats.items()}
    pairs = sorted(errors.confusions.items(), key=lambda each: (-each[1], each[0]))[:MAX_CONFUSIONS]
    rows = [(f"{names[truth]} as {names[found]}", number) for (truth, found), number in pairs]
    return (
        f"### Most frequent confusions\n\n{markdown_table(('object, as what it was found', 'number'), rows)}"
        if rows
        else ""
    )
