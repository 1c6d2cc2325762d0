"""From a trained detector to a better one: search, then train plain, random and searched networks on equally.

A classifier learns on small images in which direction a bright blob has its dark partner, a detector learns to find and
name the blobs at that spacing. Then it meets blobs three times as far apart, in data of its own: as many as one would
label for a detector that fails on them.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ...base.errors import Interrupted
from ...base.files import write_text
from ...detection.data.relations import draw_relations
from ...detection.training.config import TrainConfig
from ...detection.training.trainer import Trainer
from ..config import SearchConfig
from ..controls import Searchable, random
from ..run.searcher import Searcher
from .results import evaluate_arms, write_results

NETWORK = "test_resnet"  # timm's smallest ResNet, 0.4 million parameters
CLOSE, FAR = (18, 18), (54, 54)  # pixels from a bright blob to its partner
SMALL, LARGE = 96, 192  # pixels, side of the images
IMAGES = {"classifier": 8000, "small": 480, "train": 320, "test": 100}
ARMS = ("plain", "random", "nats")

# Candidates in layer1 too: early layers carry the relation.
SPACE = "".join(f"{stage}: [1, 2, 3, [1, 3], [3, 1]]\n" for stage in (1, 2, 3, 4))
GROUPS = 4
EPOCHS, WARMUP = 1, 10  # of training on: 40 steps, 10 of them with a growing learning rate
DETECTOR: dict[str, Any] = {
    "fpn_channels": 32,
    "head_size": 64,
    "roi_samples": 32,
    "min_size": SMALL,
    "max_size": SMALL,
    "anchor_sizes": (16, 32, 64, 96, 128),
    "trainable_layers": 5,
    "norm": "live",
    "backbone": NETWORK,
}
COMMON: dict[str, Any] = {"batch_size": 8, "eval_batch_size": 8, "workers": 0, "flip": 0.0, "resume": True}
TRAINING: dict[str, Any] = {"lr_per_image": 0.0025, "lr_schedule": "cosine", "val_split": None}
# As recipes/small_data_search.yaml, with both convolutions of a block.
SEARCH: dict[str, Any] = {
    "mode": "sampled",
    "groups": GROUPS,
    "level": "single",
    "freeze_weights": True,
    "epochs": 2,
    "alpha_start": 0,
    "alpha_lr": 0.1,
    "basic_block": "both",
}


class Stage(NamedTuple):
    """A part of the demo: what it does, its share of the time, what it leaves, and how to run it."""

    title: str
    share: float
    result: Path
    run: Callable[[], Any]


def run_demo(output: str | Path = "demo", seed: int = 0) -> None:
    """Show on drawn images what dilations do for a detector: minutes on two CPU cores, no download.

    Args:
        output: folder for everything that it makes; a demo that was stopped goes on there. It gets small_data/ and
            data/, classifier/, detector/, search/, a run for each arm, results.csv, table.txt and the PNGs.
        seed: of the drawn data, the weights, the search, the random genotype and the training.

    Raises:
        NatsError: a folder that holds something else, or a demo of another seed.
        Interrupted: by Ctrl-C; the same call goes on where it stopped.

    Example:
        >>> run_demo("demo")
    """
    folder = Path(output)
    stages = _stages(folder, seed)
    if stages[0].result.exists():
        stages[0].run()  # draws nothing anew, but refuses a folder of another seed
    try:
        _run_stages(stages)
    except Interrupted as stop:
        raise Interrupted("the demo stopped behind a checkpoint; the same command goes on from there") from stop
    print(f"\n{write_results(folder, ARMS)}")


def _stages(folder: Path, seed: int) -> list[Stage]:
    small, data, space = folder / "small_data", folder / "data", folder / "space.yaml"
    classifier, detector, searched = folder / "classifier", folder / "detector" / "model", folder / "search"
    random_genotype = folder / "random_genotype.json"

    def draw() -> None:
        draw_relations(small, [CLOSE], train=IMAGES["small"], test=0, size=SMALL, seed=seed)
        draw_relations(data, [FAR], train=IMAGES["train"], test=IMAGES["test"], size=LARGE, seed=seed)
        write_text(space, SPACE)
        found = Searchable(NETWORK, str(space), groups=GROUPS, basic_block="both")
        random(found, seed).save(random_genotype)

    def classify() -> None:
        from .pretraining import pretrain

        pretrain(classifier, NETWORK, IMAGES["classifier"], seed)

    def detect() -> None:
        recipe = {**DETECTOR, **TRAINING, "weights": str(classifier), "epochs": 4, "warmup_steps": 20}
        Trainer(TrainConfig(data=str(small), output=str(detector.parent), seed=seed, **COMMON, **recipe)).run()

    def search() -> None:
        sizes: dict[str, Any] = {"min_size": LARGE, "max_size": LARGE, "init": str(detector), "backbone": NETWORK}
        config = SearchConfig(
            data=str(data), output=str(searched), space=str(space), seed=seed, note="nats demo", **COMMON, **SEARCH,
            **sizes,
        )  # fmt: skip
        Searcher(config, command="nats demo").run()

    def go_on(arm: str, genotype: Path | None) -> Callable[[], None]:
        def train() -> None:
            recipe = {**TRAINING, "init": str(detector), "min_size": LARGE, "max_size": LARGE, "backbone": NETWORK}
            recipe |= {"genotype": genotype and str(genotype), "epochs": EPOCHS, "warmup_steps": WARMUP}
            Trainer(TrainConfig(data=str(data), output=str(folder / arm), seed=seed, **COMMON, **recipe)).run()

        return train

    genotype = searched / "genotype.json"
    genotypes = {"plain": None, "random": random_genotype, "nats": genotype}
    return [
        Stage("drawing images", 3, random_genotype, draw),
        Stage("pretraining a classifier on small images", 11, classifier, classify),
        Stage("training a plain detector on small images", 25, detector, detect),
        Stage("searching dilations for images in which the parts lie further apart", 25, genotype, search),
        *(
            Stage(f"training that detector on in the new images: {arm}", 9, folder / arm / "model", go_on(arm, given))
            for arm, given in genotypes.items()
        ),
        Stage("evaluating and drawing pictures", 9, folder / "results.json", lambda: evaluate_arms(folder, ARMS)),
    ]


def _run_stages(stages: list[Stage]) -> None:
    """Run what has not left its result yet, with a line that says how far it is and what is left."""
    start, done = time.monotonic(), 0.0
    todo = [stage for stage in stages if not stage.result.exists()]
    left = sum(stage.share for stage in todo)
    for stage in todo:
        minutes = (time.monotonic() - start) / done * left / 60 if done else None
        remaining = f", about {max(1, round(minutes))} min left" if minutes else ""
        print(f"[{stages.index(stage) + 1}/{len(stages)}] {stage.title}{remaining}", flush=True)
        stage.run()
        done, left = done + stage.share, left - stage.share
