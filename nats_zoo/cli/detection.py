"""Commands about detectors: their data, training, evaluation and use."""

from pathlib import Path
from typing import Any

from ..base.errors import NatsError
from .command import Command, print_once, typed_command


def _data(report_data: Any, options: dict[str, Any]) -> None:
    from ..detection.data_report.report import summarise_defects

    skip_bad = options.pop("skip_bad")
    report, written = report_data(**options)
    print(f"{report}\n")
    print(*written, sep="\n")
    if report.defects and not skip_bad:
        raise NatsError(summarise_defects(report))


def _train(config: type, options: dict[str, Any]) -> None:
    from ..detection import Trainer

    trainer = Trainer(config(**options), command=typed_command())
    metrics = trainer.run()
    if metrics is not None:
        print_once(f"{metrics.table()}\n")
    folder = trainer.folder.path
    best = f", of the highest AP: {folder / 'best'}" if (folder / "best").exists() else ""
    print_once(f"model: {folder / 'model'}{best}")


def _evaluate(evaluate_model: Any, options: dict[str, Any]) -> None:
    from ..detection.evaluation.evaluate import REPORT_OUTPUT

    print_once(evaluate_model(**options).table())
    if options["report"]:
        print_once(f"\n{Path(options['output'] or REPORT_OUTPUT) / 'report' / 'report.md'}")


def _predict(predict_images: Any, options: dict[str, Any]) -> None:
    from tqdm import tqdm

    if options["model"] is None:
        options["model"], *options["images"] = options["images"]
    if not options["images"]:
        raise NatsError(f"images: expected some beside the model, {options['model']}; see nats predict --help")
    for line in predict_images(**options):
        tqdm.write(line)  # above the bar, if there is one


SKIP_BAD = "end with exit code 0 in spite of defects, which training with --skip_bad leaves out."
MODEL = (
    "a detector's folder or Hub repository, org/name or org/name@revision; without this option the first of the IMAGES"
    " is it."
)
COMMANDS = {
    "data": Command(
        "what is in a data set, and what is wrong with it",
        "detection.data_report.report:report_data",
        _data,
        more={"--skip_bad": {"type": bool, "default": False, "help": SKIP_BAD}},
    ),
    "train": Command("train a detector on a timm backbone", "detection.training.config:TrainConfig", _train),
    "evaluate": Command(
        "COCO metrics of a detector or a results file",
        "detection.evaluation.evaluate:evaluate_model",
        _evaluate,
        defaults={"workers": 2},
    ),
    "predict": Command(
        "draw what a detector finds on images and videos",
        "detection.prediction.predict:predict_images",
        _predict,
        words=("images", "classes"),
        skip=("model",),
        more={"--model": {"type": str, "help": MODEL}},
    ),
}
