"""Evaluate a saved detector on a data set."""

from pathlib import Path

from ..errors import NatsError
from ..files import write_json
from .coco_eval import Metrics, evaluate, predict, save_results
from .config import Precision, check_at_least
from .datasets import CocoDataset, find_split
from .hub import from_pretrained
from .trainer import create_accelerator


def evaluate_model(
    model: str,
    data: str,
    split: str = "test",
    images: str | None = None,
    skip_bad: bool = False,
    batch_size: int = 1,
    precision: Precision | None = None,
    workers: int = 0,
    output: str | None = None,
    transpose: bool = False,
) -> Metrics:
    """COCO metrics of a detector's folder or Hub repository on a split; writes metrics and results if asked.

    The arguments are those of `nats evaluate`.

    Raises:
        NatsError: a model, data set, split, option or output folder that can not be used.
    """
    if output is not None and Path(output).is_file():
        raise NatsError(f"{output}: expected a folder, found a file")
    check_at_least(1, batch_size=batch_size)
    check_at_least(0, workers=workers)
    annotations, image_folder = find_split(data, split, images)
    dataset = CocoDataset(annotations, image_folder, skip_bad=skip_bad, transpose=transpose)
    accelerator = create_accelerator(precision)
    detector = accelerator.prepare_model(from_pretrained(model), evaluation_mode=True)
    results = predict(detector, dataset, accelerator, batch_size, workers)
    metrics = evaluate(dataset, results)
    if output is not None and accelerator.is_main_process:
        folder = Path(output)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"split": split, "transpose": transpose, "batch_size": batch_size}
        write_json(folder / "metrics.json", {**settings, **metrics.to_dict()})
        save_results(results, folder / "results.json")
    return metrics
