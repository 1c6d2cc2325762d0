"""Can each framework learn a few real images by heart, on the plain and on the NATS backbone?

A detector that can not overfit eight images has a wiring error: targets that do not reach the loss, anchors that miss
the objects, labels off by one, masks of other boxes. Each row is a run of `nats train`'s own trainer on the images, and
an evaluation on the same images with COCO's metrics; the goal is AP50 above 90, of masks too where there are any.

The images are drawn by the seed among those with objects. The recipe is the same for all rows, but for what differs by
framework in FRAMEWORK_OPTIONS. The CSV file gets a row as soon as it is done; the same command again skips rows that
are there.

    python benchmarks/overfit.py --data data/nwpu-vhr10-512 --weights weights/resnet18.tin_64 --csv overfit.csv
"""

import argparse
import csv
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import write_csv

import nats_zoo
from nats_zoo import NatsError
from nats_zoo.detection import CocoDataset, TrainConfig, Trainer
from nats_zoo.detection.data.formats.coco import find_split
from nats_zoo.detection.models.config import FRAMEWORKS
from nats_zoo.search.choosing.profile import device_name

GOAL = 90.0
SPLIT = "few"
# Anchors smaller than torchvision's, as most objects are small. The heads of RetinaNet and FCOS are as wide as the
# pyramid. RetinaNet's head begins with weights of 0.01: at fewer channels than 256 it hardly learns, and at 256 nothing
# happens for the first two hundred steps, so that its learning rate must not fall early. FCOS's head, with its group
# norms, learns at 64; at 256 and this learning rate the first steps drive its distances below zero, where torchvision's
# ReLU gives them no gradient (a GIoU loss of exactly 1). FCOS returns nothing below a score of 0.2 by itself.
ANCHORS = {"anchor_sizes": (16, 32, 64, 128, 256)}
LONGER = {"epochs": 160, "lr_schedule": "steps", "lr_steps": (140,)}
FRAMEWORK_OPTIONS = {
    "fasterrcnn": ANCHORS,
    "maskrcnn": ANCHORS,
    "cascade_rcnn": ANCHORS | {"masks": True},
    "retinanet": ANCHORS | {"fpn_channels": 256, "batch_size": 2} | LONGER,
    "fcos": {"fpn_channels": 64, "batch_size": 2, "score_thresh": 0.05} | LONGER,
}


def write_few(args: argparse.Namespace, folder: Path) -> Path:
    """A data set of a few images of another one, drawn by the seed among those with objects."""
    annotations, images = find_split(args.data, args.split)
    data = CocoDataset(annotations, images)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(args.seed)).tolist()
    content = json.loads(annotations.read_text(encoding="utf-8"))
    with_objects = {annotation["image_id"] for annotation in content["annotations"]}
    chosen = [data.image_ids[index] for index in order if data.image_ids[index] in with_objects][: args.images]
    if len(chosen) < args.images:
        raise NatsError(f"{annotations}: expected {args.images} images with objects, found {len(chosen)}")
    content["images"] = [image for image in content["images"] if image["id"] in chosen]
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] in chosen]
    (folder / "annotations").mkdir()
    (folder / "annotations" / f"instances_{SPLIT}.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / SPLIT).symlink_to(images.resolve(), target_is_directory=True)
    return folder


def train_config(framework: str, backbone: str, data: Path, output: Path, args: argparse.Namespace) -> TrainConfig:
    """One row's training: no augmentation, as the images are to be learnt as they are."""
    options: dict[str, Any] = dict(
        data=str(data),
        output=str(output),
        train_split=SPLIT,
        val_split=SPLIT,
        framework=framework,
        backbone=backbone,
        weights=args.weights,
        fpn_channels=args.fpn_channels,
        head_size=args.head_size,
        mask_channels=args.fpn_channels,
        roi_samples=args.roi_samples,
        trainable_layers=5,
        calibration_images=args.images,
        min_size=args.size,
        max_size=2 * args.size,
        batch_size=args.batch,
        epochs=args.epochs,
        lr_per_image=args.lr_per_image,
        lr_schedule="cosine",
        warmup_steps=20,
        flip=0.0,
        precision=args.precision,
        channels_last=True,
        workers=0,
        seed=args.seed,
    )
    options |= FRAMEWORK_OPTIONS[framework]
    return TrainConfig(**options, eval_every=options["epochs"])


def measure(framework: str, backbone: str, data: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Train one row and evaluate it."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        metrics = Trainer(train_config(framework, backbone, data, Path(folder) / "run", args)).run()
        seconds = time.perf_counter() - started
    masks = {} if metrics.mask is None else {"mask_ap": metrics.mask.ap, "mask_ap50": metrics.mask.ap50}
    figures = {"ap": metrics.ap, "ap50": metrics.ap50, "mask_ap": "", "mask_ap50": "", **masks}
    return {key: value if value == "" else round(value, 1) for key, value in figures.items()} | {
        "seconds": round(seconds)
    }


def describe(framework: str, backbone: str, args: argparse.Namespace) -> dict[str, Any]:
    """The settings that tell a row from others, as the framework's options leave them."""
    config = train_config(framework, backbone, Path(args.data), Path("run"), args)
    keys = ("min_size", "epochs", "batch_size", "lr_per_image", "fpn_channels", "head_size", "roi_samples", "precision")
    weights = "random" if args.weights is None else Path(args.weights).name
    data = {"data": Path(args.data).name, "split": args.split, "images": args.images, "weights": weights}
    settings = {key: getattr(config, key) for key in (*keys, "seed")}
    return {"framework": framework, "backbone": backbone, **data, **settings}


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """Where a row was measured."""
    versions = {"torch": torch.__version__, "nats_zoo": nats_zoo.__version__}
    return {"device": device_name("cpu"), "threads": torch.get_num_threads(), **versions}


def read_rows(path: Path | None) -> list[dict[str, Any]]:
    """The rows of a CSV file, texts; none without a file."""
    if path is None or not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def find_row(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The row of these settings, if it is there."""
    wanted = {key: str(value) for key, value in settings.items()}
    return next((row for row in rows if all(str(row.get(key)) == value for key, value in wanted.items())), None)


def print_row(row: Mapping[str, Any], old: bool) -> None:
    """One line of the table."""
    reached = all(float(row[key]) > GOAL for key in ("ap50", "mask_ap50") if row[key] != "")
    figures = " ".join(f"{row[key]!s:>9}" for key in ("ap", "ap50", "mask_ap", "mask_ap50"))
    end = f"{row['seconds']:>5} s  {'reached' if reached else 'MISSED'}{', from the file' if old else ''}"
    print(f"{row['framework']:<13} {row['backbone']:<14} {figures} {end}", flush=True)


def run(args: argparse.Namespace) -> None:
    """Measure all frameworks and backbones that are not there yet."""
    rows = read_rows(args.csv)
    print(f"{device_name('cpu')}, {torch.get_num_threads()} threads, {args.precision}, torch {torch.__version__}")
    print("framework     backbone              AP      AP50   mask AP mask AP50    time")
    with tempfile.TemporaryDirectory() as folder:
        data = write_few(args, Path(folder))
        for framework in args.framework:
            for backbone in args.backbone:
                settings = describe(framework, backbone, args)
                found = find_row(rows, settings)
                if found is None:
                    rows.append(settings | measure(framework, backbone, data, args) | machine(args))
                    if args.csv:
                        write_csv(rows, args.csv)
                print_row(found or rows[-1], old=found is not None)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", maxsplit=1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data", required=True, metavar="FOLDER", help="a data set in COCO's layout, with masks for those frameworks")
    add("--split", default="train", help="whose images are drawn")
    add("--weights", metavar="FOLDER", help="the backbone's: a timm model's folder; without it random ones")
    add("--framework", nargs="+", choices=FRAMEWORKS, default=[*FRAMEWORKS])
    add("--backbone", nargs="+", default=["resnet18", "nats_resnet18"], help="plain and NATS")
    add("--images", type=int, default=8, help="how many")
    add("--size", type=int, default=256, metavar="PIXELS", help="short side of the resized images")
    add("--epochs", type=int, default=80, help="times through the images")
    add("--batch", type=int, default=4, help="images per step, in R-CNNs")
    add("--lr-per-image", type=float, default=0.005)
    add("--fpn-channels", type=int, default=64, help="of the pyramid and the mask head, in R-CNNs")
    add("--head-size", type=int, default=256, help="of the box head")
    add("--roi-samples", type=int, default=128, help="regions per image on which the box head is trained")
    add("--precision", choices=("no", "bf16"), default="bf16")
    add("--seed", type=int, default=0)
    add("--threads", type=int, help="CPU threads; without it torch's own choice")
    add("--csv", type=Path, metavar="FILE", help="also write the rows there, and skip those that are there")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for, print the table and write the CSV file; returns the exit code."""
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        run(args)
    except NatsError as error:
        print(f"overfit: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
