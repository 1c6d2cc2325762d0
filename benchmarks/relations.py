"""Does a search hear what drawn data ask for? Spacings of every kind: uniform dilations, random and searched ones.

Everything begins with the plain detector that `nats demo` trained on close pairs (18 pixels). It goes on equally in
every arm, on pairs that lie further apart: with the plain network, with one dilation in all searched convolutions, with
a random genotype and with the searched one, both in the demo's space and groups. One row per arm in the CSV file; a run
that was stopped goes on behind the last.

    nats demo --output demo --seed 0
    python benchmarks/relations.py --detector demo/detector/model --output runs/relations --csv relations.csv

`--collect demo/0 demo/1 ...` writes the figures of several demos into the CSV file instead.
"""

import argparse
import csv
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import positive, write_csv

from nats_zoo.base.files import read_json, write_text
from nats_zoo.detection import CocoDataset, TrainConfig, Trainer
from nats_zoo.detection.data.formats.coco import find_split
from nats_zoo.detection.data.relations import draw_relations
from nats_zoo.detection.evaluation.evaluate import evaluate_model
from nats_zoo.genotype.genotype import Genotype
from nats_zoo.search import SearchConfig, Searcher
from nats_zoo.search.controls import Searchable, random, uniform
from nats_zoo.search.demo import stages
from nats_zoo.search.demo.results import share_right

# (across, down) of the partners, in pixels; uniform arms that could be right for them.
KINDS: dict[str, tuple[list[tuple[int, int]], tuple[tuple[int, int], ...]]] = {
    "isotropic": ([(54, 54)], ((2, 2), (3, 3))),
    "wide": ([(54, 18)], ((1, 3), (3, 1))),
    "tall": ([(18, 54)], ((3, 1), (1, 3))),
    "mixed": ([(18, 18), (54, 54)], ((2, 2), (3, 3))),
}
SIZES = {"min_size": stages.LARGE, "max_size": stages.LARGE}


def search(data: Path, detector: str, output: Path, space: Path, seed: int, groups: int) -> Genotype:
    """The demo's search on a data set."""
    options = {**stages.COMMON, **stages.SEARCH, **SIZES, "groups": groups}
    config = SearchConfig(data=str(data), output=str(output), space=str(space), init=detector, seed=seed, **options)
    return Searcher(config, command="benchmarks/relations.py").run()


def train(
    data: Path, detector: str, output: Path, genotype: Genotype | None, seed: int, epochs: int
) -> dict[str, float]:
    """Train the regrouped detector on; figures on the test images."""
    path = None if genotype is None else output.with_suffix(".json")
    if genotype is not None and path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        genotype.save(path)
    options = {**stages.COMMON, **stages.TRAINING, **SIZES, "warmup_steps": stages.WARMUP, "epochs": epochs}
    config = TrainConfig(
        data=str(data), output=str(output), init=detector, genotype=path and str(path), seed=seed, **options
    )
    Trainer(config).run()
    metrics = evaluate_model(str(output / "model"), str(data), batch_size=8, output=str(output))
    right = share_right(CocoDataset(*find_split(data, "test")), read_json(output / "results.json"))
    return {"AP": round(metrics.ap or 0.0, 2), "right": round(100 * right, 1)}


def run_kind(kind: str, args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """All arms of a kind of data that have no row yet."""
    spacings, dilations = KINDS[kind]
    folder, seed = args.output / f"{kind}_{args.seed}", args.seed
    data = draw_relations(folder / "data", spacings, train=args.images, test=args.test, size=stages.LARGE, seed=seed)
    space = folder / "space.yaml"
    write_text(space, stages.SPACE)
    where = Searchable(stages.NETWORK, str(space), groups=stages.GROUPS, basic_block="both")
    arms: dict[str, Any] = {
        "plain": lambda: None,
        "searched": lambda: search(data, args.detector, folder / "search", space, seed, stages.GROUPS),
        "random": lambda: random(where, seed),
        **{f"{d[0]}x{d[1]}": lambda d=d: uniform(where, d) for d in dilations},
    }
    for arm, make in arms.items():
        if any(row["kind"] == kind and row["seed"] == str(seed) and row["arm"] == arm for row in rows):
            continue
        begin = time.process_time()
        genotype = make()
        searched = time.process_time() - begin
        figures = train(data, args.detector, folder / arm, genotype, seed, args.epochs)
        seconds = {"search_s": round(searched), "train_s": round(time.process_time() - begin - searched)}
        rows.append({"kind": kind, "seed": str(seed), "arm": arm, "epochs": args.epochs, **figures, **seconds})
        write_csv(rows, args.csv)
        print(rows[-1], flush=True)


def collect(folders: list[Path], path: Path) -> None:
    """results.csv of several demos, with the folder's name, which should be the seed."""
    rows: list[Mapping[str, Any]] = []
    for folder in folders:
        with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
            rows += [{"seed": folder.name, **row} for row in csv.DictReader(file)]
    write_csv(rows, path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detector", help="the plain detector, demo/detector/model")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--output", type=Path, default=Path("runs/relations"))
    parser.add_argument("--csv", type=Path, default=Path("relations.csv"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=positive, default=stages.EPOCHS)
    parser.add_argument("--images", type=positive, default=stages.IMAGES["train"])
    parser.add_argument("--test", type=positive, default=stages.IMAGES["test"])
    parser.add_argument("--collect", nargs="+", type=Path, help="folders of demos")
    args = parser.parse_args(arguments)
    if args.collect:
        return collect(args.collect, args.csv)
    if not args.detector:
        parser.error("--detector: expected the folder of a detector, such as demo/detector/model")
    rows: list[dict[str, Any]] = []
    if args.csv.is_file():
        with args.csv.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    for kind in args.kinds:
        run_kind(kind, args, rows)
    return None


if __name__ == "__main__":
    main()
