"""Evaluate a saved detector, or the results file of any program, on a data set."""

import sys
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from ...base.errors import NatsError
from ...base.files import write_json
from ...hub.client import with_revision
from ..data.annotations import RawData
from ..data.dataset import CocoDataset
from ..data.opening import Format, read_split
from ..metrics import Metrics
from ..models.folder import from_pretrained
from ..runs.config import Precision, RunConfig, check_at_least
from ..runs.setup import create_accelerator
from .coco import CocoEvaluation, evaluate, has_masks, load_results, save_results
from .predict import predict

REPORT_OUTPUT = "evaluation"  # the output folder of a report when none is named

SHOWN_NAMES = 5  # of a detector's classes, in a message


def evaluate_model(
    model: str,
    data: str,
    split: str = "test",
    *,
    format: Format | None = None,
    images: str | None = None,
    skip_bad: bool = False,
    batch_size: int = 1,
    precision: Precision | None = None,
    workers: int = 0,
    output: str | None = None,
    transpose: bool = False,
    report: bool = False,
    revision: str | None = None,
) -> Metrics:
    """Evaluate a detector, or the results file of any program, with COCO's metrics of boxes and masks.

    Args:
        model: a detector's folder or Hub repository, org/name or org/name@revision; or results in COCO's format, a
            file FILE.json of another program, with boxes, masks or both.
        data: folder of a data set (COCO, Pascal VOC or YOLO), or its annotation file or data.yaml.
        split: split to evaluate on.
        format: coco, voc or yolo; default: told by looking, the first of these that is there.
        images: folder of the images, if it is not found by itself; not for YOLO.
        skip_bad: leave out and count entries of the data set that can not be used, instead of refusing them.
        batch_size: images per batch and process; AP moves a little with it (padding).
        precision: 'no' (float32), 'bf16' or 'fp16'; null: what `accelerate config` says.
        workers: data loading processes.
        output: folder for metrics.json and results.json (COCO results format; not of a results file).
        transpose: swap rows and columns of all images and boxes: the data set's transposed twin.
        report: write report/report.md into the output folder (default: evaluation): precision-recall curves, AP by
            class and size, numbers and pictures of the worst errors.
        revision: branch, tag or commit of the Hub repository, as after its @.

    Raises:
        NatsError: a model, results file, data set, split, option or output folder that can not be used.
    """
    model = with_revision(model, revision)
    folder = _output_folder(output, report)
    check_at_least(1, batch_size=batch_size)
    check_at_least(0, workers=workers)
    accelerator = create_accelerator(precision)
    options = {"skip_bad": skip_bad, "transpose": transpose}
    raw = read_split(data, split, format, images=images)
    if model.endswith(".json"):
        run = _read_run(model, raw, options)
    else:
        run = _predicted_run(model, raw, options, accelerator, batch_size, workers)
    if run.dataset.left_out and accelerator.is_main_process:
        print(run.dataset.left_out, file=sys.stderr)
    evaluation = CocoEvaluation(run.dataset, run.results, source=run.source)
    metrics = evaluation.metrics()
    if folder is not None and accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"split": split, "transpose": transpose, **run.settings}
        write_json(folder / "metrics.json", {**settings, **metrics.to_dict()})
        if run.source is None:
            save_results(run.results, folder / "results.json")
        if report:
            from .report import write_report  # matplotlib and all

            write_report(folder / "report", run.dataset, evaluation, f"{run.title} on {Path(data).name} {split}")
    return metrics


@dataclass
class _Run:
    """What is evaluated; `source` is the results' file, if they come from one, `settings` go into metrics.json."""

    dataset: CocoDataset
    results: list[dict]
    settings: dict
    source: str | None = None
    title: str = ""


def _output_folder(output: str | None, report: bool) -> Path | None:
    if output is None and not report:
        return None
    folder = Path(REPORT_OUTPUT if output is None else output)
    if folder.is_file():
        raise NatsError(f"{folder}: expected a folder, found a file")
    if report and (folder / "report").exists() and not (folder / "report" / "report.md").is_file():
        raise NatsError(f"{folder / 'report'}: expected no such folder, or an earlier report to replace")
    return folder


def _read_run(path: str, raw: RawData, options: dict) -> _Run:
    results = load_results(path)
    dataset = CocoDataset.from_raw(raw, masks=has_masks(results) and raw.has_masks(), **options)
    # Those of images that are left out on request are not of unknown images
    left_out = {image.id for image in raw.images if type(image.id) is int} - set(dataset.image_ids)
    kept = [result for result in results if result["image_id"] not in left_out]
    return _Run(dataset, kept, {"results": path}, path, Path(path).name)


def _predicted_run(
    model: str, raw: RawData, options: dict, accelerator: Accelerator, batch_size: int, workers: int
) -> _Run:
    detector = from_pretrained(model)
    dataset = CocoDataset.from_raw(raw, masks=detector.config.masks and raw.has_masks(), **options)
    category_ids = match_classes(detector, dataset)
    if None in category_ids and accelerator.is_main_process:
        unknown = category_ids.count(None)
        print(f"left out: {unknown} classes that {model} finds and {raw.path} does not have", file=sys.stderr)
    detector = accelerator.prepare_model(detector, evaluation_mode=True)
    results = predict(detector, dataset, accelerator, batch_size, workers, category_ids=category_ids)
    return _Run(dataset, results, {"batch_size": batch_size}, title=model)


def match_classes(detector: nn.Module, dataset: CocoDataset) -> tuple[int | None, ...]:
    """Find the data set's category for each of a detector's labels 1, 2, ..., by the names of classes.

    Args:
        detector: what `from_pretrained` returned. One whose config names no classes must have as many as the data
            set, and they are taken to be in the same order.
        dataset: on which it is evaluated.

    Returns:
        Category ids; None for a class that is not the data set's.

    Raises:
        NatsError: a class of the data set that the detector does not know.
    """
    names = detector.config.classes
    if not names:
        count = detector.config.num_classes - 1
        if count != len(dataset.classes):
            raise NatsError(
                f"{dataset.annotations}: {len(dataset.classes)} classes, the detector finds {count} without names"
            )
        return dataset.category_ids
    for name in dataset.classes:
        if name not in names:
            known = ", ".join(names[:SHOWN_NAMES]) + (", ..." if len(names) > SHOWN_NAMES else "")
            raise NatsError(f"{dataset.annotations}: class {name!r}: the detector does not find it, only {known}")
    ids = dict(zip(dataset.classes, dataset.category_ids, strict=True))
    return tuple(ids.get(name) for name in names)


def evaluate_detector(detector: nn.Module, data: CocoDataset, accelerator: Accelerator, config: RunConfig) -> Metrics:
    """COCO metrics of a detector on a data set."""
    return evaluate(data, predict(detector, data, accelerator, config.eval_batch_size, config.workers))


def log_record(metrics: Metrics) -> dict[str, float | None]:
    """What the log keeps of an evaluation, in percent."""
    record = {"AP": metrics.ap, "AP50": metrics.ap50, "AP75": metrics.ap75}
    if metrics.mask is not None:
        record |= {"mask_AP": metrics.mask.ap, "mask_AP50": metrics.mask.ap50, "mask_AP75": metrics.mask.ap75}
    return record
