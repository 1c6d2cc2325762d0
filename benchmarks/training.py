"""Images per second of `nats train` against a bare loop over torchvision's own detector, on the same images.

Two arms take turns in one process, a round of some steps each, so that a change of the machine's clock or load meets
both alike:

    bare    torchvision's detector, data set and transforms, a DataLoader, and nothing in its loop but forward,
            backward and SGD's step
    nats    Trainer as the command runs it: augmentation by seed and epoch, seeded steps, losses looked at, gradients
            clipped, log and progress bar; with the end of an epoch, where one falls into a round, its checkpoint

They start from the same weights, see the same images in the same order at the same size, and train the same layers;
before timing, both detectors' losses on one batch are compared. The ratio of images per second, nats to bare, is taken
per round; reported are medians and quartiles, by the wall clock and by this process's CPU time, which other work on the
machine disturbs less (but which leaves out the processes of --workers, and waiting for a GPU). The first round of each
arm warms up and is not counted. Not part of it: evaluation.

The goal is a ratio of at least 0.95. The CSV file is written after each configuration.

    python benchmarks/training.py --data data/nwpu-vhr10-512 --model resnet18 --weights weights/resnet18.tin_64 \
        --size 320x320 --threads 1 --clock cpu --csv training.csv
"""

import argparse
import csv
import itertools
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torchvision
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.ops.misc import FrozenBatchNorm2d
from torchvision.transforms import v2

import nats_zoo
from nats_zoo import NatsError
from nats_zoo.detection import TrainConfig, Trainer
from nats_zoo.detection.datasets import collate, find_split
from nats_zoo.detection.loop import EpochSampler
from nats_zoo.files import atomic_file
from nats_zoo.search.profile import device_name

GOAL = 0.95
ERROR_PREFIX = "training: "
LR_PER_IMAGE = 1e-4  # without warm-up, from random heads
MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4
LOSS_TOLERANCE = 1e-3  # relative; the two differ in the order of sums
BUILDERS = {"fasterrcnn": FasterRCNN, "maskrcnn": MaskRCNN, "retinanet": RetinaNet, "fcos": FCOS}
ONE_STAGE = ("retinanet", "fcos")
ARMS = ("bare", "nats")


class Times(NamedTuple):
    """Seconds of a round: of the wall clock and of this process's CPU time."""

    wall: float
    cpu: float


# --- the bare loop ----------------------------------------------------------------------------------------------------


def create_bare_detector(ours: nn.Module, device: torch.device) -> nn.Module:
    """torchvision's detector of the same modules, with the same weights and trained layers.

    Raises:
        NatsError: torchvision has no such framework or backbone.
    """
    config = ours.config
    if config.framework not in BUILDERS:
        raise NatsError(f"framework: torchvision has no {config.framework}, expected one of {', '.join(BUILDERS)}")
    name = config.backbone.partition(".")[0].removeprefix("nats_")
    if name not in torchvision.models.list_models(torchvision.models) or "res" not in name:
        raise NatsError(f"model: torchvision has no residual network {name!r}")
    pyramid: dict[str, Any] = {}
    if config.framework in ONE_STAGE:
        pyramid = {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)}
    backbone = resnet_fpn_backbone(
        backbone_name=name,
        weights=None,
        norm_layer=FrozenBatchNorm2d if config.norm == "frozen" else nn.BatchNorm2d,
        trainable_layers=min(config.trainable_layers, 5),
        **pyramid,
    )
    sizes = {"min_size": config.min_size, "max_size": config.max_size}
    pixels = {"image_mean": list(config.image_mean), "image_std": list(config.image_std)}
    anchors = {}
    if config.framework == "retinanet":  # as torchvision's builder has them, three sizes per level
        anchors = {"anchor_generator": ours.anchor_generator}
    detector = BUILDERS[config.framework](backbone, config.num_classes, **sizes, **pixels, **anchors)
    detector.load_state_dict(ours.state_dict())
    return detector.to(device)


def bare_batches(trainer: Trainer, args: argparse.Namespace) -> Iterator[tuple]:
    """Batches of torchvision's own data set and transforms, without end, in the order in which the trainer's come."""
    annotations, images = find_split(args.data, args.split)
    transforms = v2.Compose(
        [v2.ToImage(), v2.RandomHorizontalFlip(trainer.config.flip), v2.ToDtype(torch.float32, scale=True)]
    )
    coco = torchvision.datasets.CocoDetection(images, annotations, transforms=transforms)
    keys = ["boxes", "labels", *(["masks"] if trainer.config.wants_masks else [])]
    data = torchvision.datasets.wrap_dataset_for_transforms_v2(coco, target_keys=keys)
    places = {image_id: place for place, image_id in enumerate(coco.ids)}
    order = [places[image_id] for image_id in trainer.train_data.image_ids]
    sampler = EpochSampler(len(order), trainer.config.seed)
    for sampler.epoch in itertools.count():
        chosen = [order[index] for index in sampler]
        yield from DataLoader(
            data, args.batch, sampler=chosen, num_workers=args.workers, collate_fn=_Collate(trainer.config.wants_masks)
        )


class _Collate:
    """Lists of images and targets; torchvision's data set gives an empty target for an image without objects."""

    def __init__(self, masks: bool):
        self.masks = masks

    def __call__(self, batch: Sequence[tuple[Tensor, dict]]) -> tuple[list[Tensor], list[dict]]:
        images, targets = collate(batch)
        return images, [self._complete(target, image) for image, target in zip(images, targets, strict=True)]

    def _complete(self, target: dict, image: Tensor) -> dict:
        empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
        if self.masks:
            empty["masks"] = torch.zeros(0, *image.shape[-2:], dtype=torch.uint8)
        return {key: target.get(key, value) for key, value in empty.items()}


class BareLoop:
    """Forward, backward, step.

    Args:
        trainer: whose weights and images are taken.
        args: the command line.
    """

    def __init__(self, trainer: Trainer, args: argparse.Namespace):
        self.device, self.precision = trainer.accelerator.device, args.precision
        self.detector = create_bare_detector(trainer.plain_detector, self.device).train()
        self.optimizer = torch.optim.SGD(
            [p for p in self.detector.parameters() if p.requires_grad],
            lr=LR_PER_IMAGE * args.batch,
            momentum=MOMENTUM,
            weight_decay=WEIGHT_DECAY,
        )
        self.batches = bare_batches(trainer, args)

    def round(self, steps: int) -> None:
        for images, targets in itertools.islice(self.batches, steps):
            loss = self.loss(images, targets)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    def loss(self, images: list[Tensor], targets: list[dict]) -> Tensor:
        images, targets = send_to_device(images, self.device), send_to_device(targets, self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return sum(self.detector(images, targets).values())


# --- turns ------------------------------------------------------------------------------------------------------------


class Enough(Exception):
    """All rounds are done."""


class TimedTrainer(Trainer):
    """Lets the bare loop have its turn before every so many steps, and keeps the times of both.

    A step's images are loaded before it begins, so that a round of ours holds the loading of the next one's first batch
    instead of its own.

    Args:
        config: of the run.
        args: the command line.

    Attributes:
        times: by arm, one entry per counted round.
    """

    def __init__(self, config: TrainConfig, args: argparse.Namespace):
        super().__init__(config)
        self.args = args
        self.bare = BareLoop(self, args)
        self.times: dict[str, list[Times]] = {arm: [] for arm in ARMS}

    def train_step(self, batches: list[tuple]) -> dict[str, float]:
        if self.step % self.args.steps == 0:
            self._turn(self.step // self.args.steps)
        return super().train_step(batches)

    def _turn(self, done: int) -> None:
        """`done`: rounds of ours, of which the first warms up."""
        now = self._now()
        if done > 1:
            self.times["nats"].append(Times(now.wall - self._start.wall, now.cpu - self._start.cpu))
        if done > self.args.rounds:
            raise Enough
        self._start = self._now()
        self.bare.round(self.args.steps)
        now = self._now()
        if done:
            self.times["bare"].append(Times(now.wall - self._start.wall, now.cpu - self._start.cpu))
        self._start = now

    def _now(self) -> Times:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.accelerator.device)
        return Times(time.perf_counter(), time.process_time())


def check_same_work(trainer: TimedTrainer) -> tuple[float, float]:
    """(nats, bare) losses on one batch with the same random numbers.

    Raises:
        NatsError: they differ, though both networks are plain.
    """
    images, targets = send_to_device(collate(trainer.train_data[index] for index in range(2)), trainer.bare.device)
    losses = []
    for detector in (trainer.plain_detector, trainer.bare.detector):
        torch.manual_seed(0)
        with torch.no_grad():
            losses.append(float(sum(detector.train()(images, targets).values())))
    is_plain = trainer.plain_detector.config.genotype is None
    tolerance = LOSS_TOLERANCE if trainer.args.precision == "no" else 0.1
    if is_plain and not math.isclose(*losses, rel_tol=tolerance):
        raise NatsError(f"the two detectors are not the same: losses {losses[0]:.5f} and {losses[1]:.5f} on one batch")
    return losses[0], losses[1]


def measure(model: str, framework: str, args: argparse.Namespace) -> dict[str, list[Times]]:
    """Times of each round, by arm.

    Raises:
        NatsError: data, weights or a network that can not be used.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = TimedTrainer(create_config(model, framework, Path(folder) / "run", args), args)
        ours, bare = check_same_work(trainer)
        print(f"{framework} {model}: losses on one batch: nats {ours:.5f}, bare {bare:.5f}", flush=True)
        try:
            trainer.run()
        except Enough:
            return trainer.times
    raise NatsError(f"rounds: the run ended before {args.rounds} rounds of {args.steps} steps")


def create_config(model: str, framework: str, output: Path, args: argparse.Namespace) -> TrainConfig:
    """The run that is timed: the default recipe, at the size and batch asked for."""
    images = args.batch * args.steps * (args.rounds + 2)
    count = len(torchvision.datasets.CocoDetection(*reversed(find_split(args.data, args.split))).ids)
    return TrainConfig(
        data=str(args.data),
        output=str(output),
        train_split=args.split,
        val_split=None,
        framework=framework,
        backbone=model,
        weights=args.weights.get(model),
        min_size=min(args.size),
        max_size=max(args.size),
        batch_size=args.batch,
        workers=args.workers,
        precision=args.precision,
        epochs=1 + math.ceil(images / count),
        lr_per_image=LR_PER_IMAGE,
        warmup_steps=0,
        lr_steps=(),
        seed=args.seed,
    )


# --- results ----------------------------------------------------------------------------------------------------------


def summarise(times: Mapping[str, Sequence[Times]], images: int) -> dict[str, dict[str, float]]:
    """By arm: median images per second, and median and quartiles of the rounds' ratio to `bare`, by both clocks.

    Args:
        times: by arm.
        images: of a round.
    """
    rows: dict[str, dict[str, float]] = {}
    for arm in ARMS:
        rows[arm] = {}
        for clock, prefix in (("wall", ""), ("cpu", "cpu_")):
            own, bare = ([getattr(each, clock) for each in times[name]] for name in (arm, "bare"))
            low, median, high = quartiles([other / mine for mine, other in zip(own, bare, strict=True)])
            rows[arm][f"{prefix}images_per_second"] = images / statistics.median(own)
            rows[arm] |= {f"{prefix}ratio": median, f"{prefix}ratio_q1": low, f"{prefix}ratio_q3": high}
    return rows


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The three quartiles; of one value, three times that."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def create_rows(
    model: str, framework: str, times: Mapping[str, Sequence[Times]], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of the CSV file, with what they were measured on."""
    settings = {
        "rounds": args.rounds,
        "steps": args.steps,
        "batch": args.batch,
        "size": f"{args.size[0]}x{args.size[1]}",
        "data": f"{args.data.name} {args.split}",
        "weights": Path(args.weights[model]).name if model in args.weights else "",
        "precision": args.precision,
        "workers": args.workers,
        "clock": args.clock,
        "seed": args.seed,
        "threads": torch.get_num_threads(),
        "device_name": device_name(_device()),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "nats_zoo": nats_zoo.__version__,
    }
    found = summarise(times, args.steps * args.batch)
    return [{"framework": framework, "model": model, "arm": arm, **found[arm], **settings} for arm in ARMS]


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def print_table(rows: Sequence[Mapping[str, Any]], clock: str) -> None:
    """Images per second and ratios by one clock, and whether the goal is met."""
    prefix = "cpu_" if clock == "cpu" else ""
    print(f"{'framework':<11}  {'model':<16}  {'arm':<4}  images/s ({clock})  ratio to bare    IQR of ratio")
    for row in rows:
        line = f"{row['framework']:<11}  {row['model']:<16}  {row['arm']:<4}  {row[f'{prefix}images_per_second']:15.2f}"
        line += f"  {row[f'{prefix}ratio']:13.3f}  {row[f'{prefix}ratio_q1']:.3f} to {row[f'{prefix}ratio_q3']:.3f}"
        print(line)
    ratio = rows[-1][f"{prefix}ratio"]
    print(f"goal of at least {GOAL}: {ratio:.3f}: {'met' if ratio >= GOAL else 'missed'}", flush=True)


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the rows as a CSV file, atomically."""
    with atomic_file(path) as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


# --- the command ------------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of a data set in COCO's layout")
    add("--split", default="train", help="of the data set")
    add("--model", nargs="+", default=["resnet18"], help="timm names of residual networks that torchvision has too")
    add("--framework", nargs="+", choices=BUILDERS, default=["fasterrcnn"], help="detectors")
    add("--weights", nargs="+", type=_named, default=[], metavar="MODEL=FOLDER", help="a backbone's; else random ones")
    add("--size", type=_size, default=(800, 1333), metavar="SHORTxLONG", help="of the resized images, in pixels")
    add("--batch", type=_positive, default=2, help="images per step")
    add("--workers", type=int, default=0, help="data loading processes of each arm")
    add("--precision", choices=("no", "bf16"), default="no", help="mixed precision")
    add("--rounds", type=_positive, default=10, help="timed rounds of each arm")
    add("--steps", type=_positive, default=5, help="of a round")
    add("--threads", type=_positive, help="CPU threads; without it torch's own choice")
    add("--clock", choices=("wall", "cpu"), default="wall", help="of the table; cpu: where others use the machine too")
    add("--seed", type=int, default=0, help="of weights, images and augmentation")
    add("--csv", type=Path, metavar="FILE", help="also write the rows there")
    args = parser.parse_args(argv)
    args.weights = dict(args.weights)
    if args.clock == "cpu" and args.workers:
        parser.error("--clock cpu counts one process only, expected --workers 0 with it")
    return args


def _named(text: str) -> tuple[str, str]:
    model, _, path = text.partition("=")
    if not model or not path:
        raise argparse.ArgumentTypeError(f"{text!r}: expected MODEL=FOLDER")
    return model, path


def _size(text: str) -> tuple[int, int]:
    short, _, long = text.partition("x")
    return _positive(short), _positive(long)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def run(args: argparse.Namespace) -> None:
    """Measure every framework on every network."""
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"{device_name(_device())}, {torch.get_num_threads()} threads, {args.precision}, torch {torch.__version__}")
    rows: list[dict[str, Any]] = []
    for framework, model in itertools.product(args.framework, args.model):
        measured = create_rows(model, framework, measure(model, framework, args), args)
        print_table(measured, args.clock)
        rows += measured
        if args.csv:
            write_csv(rows, args.csv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for, print the table and write the CSV file; returns the exit code."""
    args = parse_args(argv)
    try:
        run(args)
    except NatsError as error:
        print(f"{ERROR_PREFIX}{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
