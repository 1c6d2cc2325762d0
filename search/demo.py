"""The whole path on drawn data: pretrain, search, train plain and NATS equally, compare. No download.

The classes of the data set can only be told apart by a wide receptive field along one axis (see
detection/data/drawn.py).
Pretraining, which stands for ImageNet's, sees an easy version, where the tell-tale mark is right beside its object.
"""

from pathlib import Path
from typing import Any

from ..base.errors import Interrupted
from ..base.files import write_text
from ..base.text import text_table
from ..detection.data.dataset import CocoDataset
from ..detection.data.drawn import draw_dataset
from ..detection.data.formats.coco import find_split
from ..detection.evaluation.evaluate import evaluate_model
from ..detection.metrics import Metrics, in_percent
from ..detection.models.folder import from_pretrained
from ..detection.pictures.drawing import draw_detections
from ..detection.pictures.sheet import comparison_sheet
from ..detection.prediction.predict import detect, draw_found, open_image
from ..detection.training.config import TrainConfig
from ..detection.training.trainer import Trainer
from ..genotype.genotype import Genotype
from .run.searcher import SearchConfig, Searcher

IMAGES: dict[str, Any] = {"train": 240, "val": 40, "test": 160}
SIZE = 160  # pixels
EASY_DISTANCE = 2  # pixels from an object to its mark, in the pretraining data
DISTANCE = 24
SHOWN_IMAGES = 4
THRESHOLD = 0.35

# A small detector, the same in every run.
DETECTOR = {
    "fpn_channels": 48,
    "head_size": 128,
    "roi_samples": 64,
    "min_size": SIZE,
    "max_size": SIZE,
    "anchor_sizes": (16, 32, 64, 96, 128),
    "batch_size": 8,
    "eval_batch_size": 8,
    "workers": 0,
    "resume": True,
}
PRETRAINING = {"epochs": 8, "lr_per_image": 0.002, "lr_steps": (7,), "warmup_steps": 30, "val_split": None}
SEARCH: dict[str, Any] = {
    **{"epochs": 6, "alpha_start": 1, "alpha_lr": 0.05},
    **{"lr_per_image": 0.00125, "final_lr_per_image": 0.0001},
}
TRAINING = {"epochs": 8, "lr_per_image": 0.00125, "lr_steps": (6,), "warmup_steps": 20, "val_split": None}


def run_demo(output: str | Path = "demo", seed: int = 0) -> None:
    """Search and train on a drawn data set: minutes on two CPU cores, no download.

    Args:
        output: folder for the data, the runs and the pictures; a demo that was stopped goes on there. It gets data/,
            easy_data/, pretrained/, search/, plain/ and nats/ (runs), table.txt and the PNGs.
        seed: of everything random.

    Raises:
        NatsError: a folder that holds something else.
        Interrupted: by Ctrl-C; the same call goes on where it stopped.
    """
    try:
        _run_stages(Path(output), seed)
    except Interrupted as stop:
        raise Interrupted("the demo stopped behind a checkpoint; the same command goes on from there") from stop


def _run_stages(folder: Path, seed: int) -> None:
    easy = draw_dataset(folder / "easy_data", **IMAGES, size=SIZE, distance=EASY_DISTANCE, seed=seed + 1)
    data = draw_dataset(folder / "data", **IMAGES, size=SIZE, distance=DISTANCE, seed=seed)
    common: dict[str, Any] = {**DETECTOR, "data": str(data), "seed": seed}
    _say("1/4 pretraining a plain ResNet-18 detector on easy drawn images, from random weights")
    _train(folder / "pretrained", {**common, "data": str(easy)}, PRETRAINING, backbone="resnet18", weights=None)
    weights = str(folder / "pretrained" / "model")
    _say("2/4 searching a genotype from those weights")
    genotype = _search(folder / "search", common, weights)
    _say("3/4 training both networks equally from those weights: plain")
    _train(folder / "plain", common, TRAINING, backbone="resnet18", weights=weights)
    _say("4/4 training both networks equally from those weights: NATS")
    path = str(folder / "search" / "genotype.json")
    _train(folder / "nats", common, TRAINING, backbone="nats_resnet18", weights=weights, genotype=path)
    _report(folder, data, genotype)


def _say(text: str) -> None:
    print(text, flush=True)


def _train(output: Path, common: dict[str, Any], recipe: dict[str, Any], **options: Any) -> None:
    Trainer(TrainConfig(output=str(output), **common, **recipe, **options)).run()


def _search(output: Path, common: dict[str, Any], weights: str) -> Genotype:
    config = SearchConfig(
        output=str(output),
        backbone="resnet18",
        weights=weights,
        groups=4,
        level="single",
        note="nats demo",
        **common,
        **SEARCH,
    )
    return Searcher(config, command="nats demo").run()


def _report(folder: Path, data: Path, genotype: Genotype) -> None:
    metrics = {
        arm: evaluate_model(str(folder / arm / "model"), str(data), "test", batch_size=8, output=str(folder / arm))
        for arm in ("plain", "nats")
    }
    _draw_sheet(folder, data)
    table = _table(metrics)
    write_text(folder / "table.txt", table + "\n")
    print(f"\n{genotype}\n\n{table}\n")
    print(f"{IMAGES['test']} test images. One search and one training per arm: a demonstration, not evidence.")
    for name, content in (
        ("search/report/report.md", "the search on one page, with its pictures"),
        ("detections.png", "ground truth, plain and NATS side by side"),
        ("nats/curves.png", "training curves"),
    ):
        print(f"{folder / name}: {content}")


def _table(metrics: dict[str, Metrics]) -> str:
    columns = {"AP": "ap", "AP50": "ap50", "AP75": "ap75", "APs": "ap_small", "APm": "ap_medium", "APl": "ap_large"}
    rows = [[arm, *(in_percent(getattr(m, field)) for field in columns.values())] for arm, m in metrics.items()]
    return "\n".join(text_table([["", *columns], *rows], "<9", ">7", gap=""))


def _draw_sheet(folder: Path, data: Path) -> None:
    dataset = CocoDataset(*find_split(data, "test"))
    files = [dataset.path(index) for index in range(SHOWN_IMAGES)]
    columns = {"ground truth": [_draw_truth(dataset, index, file) for index, file in enumerate(files)]}
    for arm, title in (("plain", "plain"), ("nats", "NATS")):
        detector = from_pretrained(folder / arm / "model")
        columns[title] = [_draw_found(detector, file) for file in files]
    comparison_sheet(columns, folder / "detections.png")


def _draw_truth(dataset: CocoDataset, index: int, file: Path) -> Any:
    target = dataset[index][1]
    return draw_detections(open_image(file), target["boxes"], target["labels"], classes=dataset.classes)


def _draw_found(detector: Any, file: Path) -> Any:
    image = open_image(file)
    return draw_found(image, detect(detector, image, THRESHOLD), detector.config.classes)
