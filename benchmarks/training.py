"""Images per second of `nats train`'s loop, against a bare loop over torchvision's own detector.

One run of the Trainer, as `nats train` makes it (its data set, checks, clipping, log, progress bar), is cut into rounds
of some steps. After each round a bare loop takes the same images, in the same batches:

    nats   Trainer.run() on a timm backbone inside our Faster R-CNN
    bare   torchvision's FasterRCNN on torchvision's ResNet and CocoDetection; DataLoader, forward, backward, clip, step

Both have the same weights at the start, batch size, image sizes, flips, optimiser, precision and number of workers. A
checkpoint is taken out of its round and charged as it comes in training: one per time through the split. Evaluation is
no part of it. The rounds of both take turns, so that a change of the machine's clock or load meets both alike; the
ratio of the throughputs, nats to bare, is taken per round; reported are its median and quartiles, by the process's CPU
time (where others use the machine too; without workers only, whose time is not in it) and by the wall clock.

With --genotype two more bare loops take the same images, over our detector on the plain backbone and, with equal
weights, on the regrouped one; their forward and backward passes are timed apart, and the ratio of the times, regrouped
to plain, is taken per round.

The goals are a throughput of at least 0.95 of the bare loop's, and passes of at most 1.10 times the plain backbone's.
The CSV file is written after each round.

    python benchmarks/training.py --data data/nwpu-vhr10-512 --weights weights/resnet18.tin_64 --csv training.csv
    python benchmarks/training.py --data data/nwpu-vhr10-512 --genotype default --csv training_backbone.csv
"""

import argparse
import copy
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torchvision
from common import positive, write_csv
from latency import choose_genotype
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import CocoDetection
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops.misc import FrozenBatchNorm2d
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes
from tqdm import tqdm

import nats_zoo
from nats_zoo import Genotype, NatsError
from nats_zoo.base.names import VARIANT_PREFIX
from nats_zoo.detection import TrainConfig, Trainer
from nats_zoo.detection.data.formats.coco import find_split
from nats_zoo.detection.models.config import DetectorConfig
from nats_zoo.detection.models.create import build_detector
from nats_zoo.detection.runs.loop import Interrupted
from nats_zoo.search.choosing.profile import device_name

GOAL = 0.95
MAX_RATIO = 1.10  # of the regrouped backbone's passes to the plain one's
PASSES = ("forward", "backward")
BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101")  # the same network, and names, in timm and torchvision
CLOCKS = ("cpu", "wall")
STAGES = ("layer4", "layer3", "layer2", "layer1", "conv1")
POOLED = 7


class Seconds(NamedTuple):
    """What something took."""

    cpu: float
    wall: float

    def __sub__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.cpu - other.cpu, self.wall - other.wall)

    def __add__(self, other: tuple) -> "Seconds":
        return Seconds(self.cpu + other[0], self.wall + other[1])


def now(device: str) -> Seconds:
    """The process's clocks, once the device has done its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return Seconds(time.process_time(), time.perf_counter())


# --- the bare loop ----------------------------------------------------------------------------------------------------


class BareData(CocoDetection):
    """torchvision's COCO data set with targets as its detectors take them, by image id."""

    def __init__(self, folder: Path, annotations: Path, flip: float):
        super().__init__(folder, annotations)
        self.labels = {category: label for label, category in enumerate(sorted(self.coco.cats), start=1)}
        self.augment = v2.Compose([v2.RandomHorizontalFlip(flip), v2.ToDtype(torch.float32, scale=True)])

    def __getitem__(self, image_id: int) -> tuple[Tensor, dict[str, Tensor]]:
        image = F.to_image(self._load_image(image_id))
        found = [entry for entry in self._load_target(image_id) if not entry.get("iscrowd")]
        boxes = torch.tensor([entry["bbox"] for entry in found], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        target = {
            "boxes": BoundingBoxes(boxes, format="XYXY", canvas_size=image.shape[-2:]),
            "labels": torch.tensor([self.labels[entry["category_id"]] for entry in found], dtype=torch.int64),
        }
        return self.augment(image, target)


def create_bare_detector(config: DetectorConfig) -> FasterRCNN:
    """torchvision's detector of a plain Faster R-CNN's config, with the same names in its state dict."""
    norm = FrozenBatchNorm2d if config.norm == "frozen" else nn.BatchNorm2d
    network = torchvision.models.get_model(config.backbone.partition(".")[0], weights=None, norm_layer=norm)
    trained = (*STAGES[: config.trainable_layers], *(("bn1",) if config.trainable_layers >= len(STAGES) else ()))
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    stages = {f"layer{number}": str(number - 1) for number in (1, 2, 3, 4)}
    channels = [network.inplanes // 2**halvings for halvings in (3, 2, 1, 0)]
    return FasterRCNN(
        BackboneWithFPN(network, stages, channels, config.fpn_channels),
        min_size=config.min_size,
        max_size=config.max_size,
        image_mean=list(config.image_mean),
        image_std=list(config.image_std),
        box_head=TwoMLPHead(config.fpn_channels * POOLED**2, config.head_size),
        box_predictor=FastRCNNPredictor(config.head_size, config.num_classes),
        box_batch_size_per_image=config.roi_samples,
    )


def create_backbones(plain: nn.Module, genotype: Genotype | None) -> dict[str, nn.Module]:
    """Our detector on the plain backbone and, with equal weights, on the regrouped one; none without a genotype."""
    if genotype is None:
        return {}
    backbone = VARIANT_PREFIX + plain.config.backbone
    config = dataclasses.replace(plain.config, backbone=backbone, genotype=genotype.to_dict())
    regrouped = build_detector(config)
    regrouped.load_state_dict(plain.state_dict())
    return {"plain": copy.deepcopy(plain), "nats": regrouped}


def collate(batch: Sequence[tuple]) -> tuple[list, list]:
    """Images and targets in lists."""
    images, targets = zip(*batch, strict=True)
    return list(images), list(targets)


class BareLoop:
    """What one writes by hand.

    Args:
        detector: is trained.
        config: of the run.
        device: on which to run.

    Attributes:
        spent: in forward passes, and in backward passes, so far.
    """

    def __init__(self, detector: nn.Module, config: TrainConfig, device: str):
        self.config, self.device = config, device
        annotations, folder = find_split(config.data, config.train_split, config.images)
        self.data = BareData(folder, annotations, config.flip)
        self.detector = detector
        self.spent = dict.fromkeys(PASSES, Seconds(0.0, 0.0))
        format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.detector.to(device, memory_format=format).train()
        self.parameters = [p for p in self.detector.parameters() if p.requires_grad]
        lr = config.lr_per_image * config.batch_size / 100  # as in a warm-up
        self.optimizer = torch.optim.SGD(
            self.parameters, lr=lr, momentum=config.momentum, weight_decay=config.weight_decay
        )

    def run(self, batches: Sequence[Sequence[int]]) -> float:
        """Train on batches of image ids; returns the last loss."""
        loader = DataLoader(
            self.data, batch_sampler=batches, num_workers=self.config.workers, collate_fn=collate,
            pin_memory=torch.device(self.device).type == "cuda",
        )  # fmt: skip
        for images, targets in loader:
            loss = self._step(images, targets)
        return loss

    def timed_run(self, batches: Sequence[Sequence[int]]) -> dict[str, Seconds]:
        """Train as `run` does; returns what the forward and the backward passes took."""
        before = dict(self.spent)
        self.run(batches)
        return {name: self.spent[name] - before[name] for name in PASSES}

    def _step(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> float:
        images = [image.to(self.device) for image in images]
        targets = [{key: value.to(self.device) for key, value in target.items()} for target in targets]
        start = now(self.device)
        with self._precision():
            loss = sum(self.detector(images, targets).values())
        value = loss.item()
        middle = now(self.device)
        loss.backward()
        for name, spent in zip(PASSES, (middle - start, now(self.device) - middle), strict=True):
            self.spent[name] = self.spent[name] + spent
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return value

    def _precision(self) -> Any:
        if self.config.precision == "bf16":
            return torch.autocast(torch.device(self.device).type, torch.bfloat16)
        return nullcontext()


# --- turns ------------------------------------------------------------------------------------------------------------


class Done(Exception):
    """All rounds are measured."""


class TimedTrainer(Trainer):
    """A training run that stops its clocks after each round, while the bare loop has its turn.

    Args:
        config: of the run.
        measurement: is given what each round took.
        round_steps: steps in a round.
    """

    def __init__(self, config: TrainConfig, measurement: "Measurement", round_steps: int):
        super().__init__(config)
        self.measurement, self.round_steps = measurement, round_steps
        self.timed_device = str(self.accelerator.device)
        bare = create_bare_detector(self.plain_detector.config)
        bare.load_state_dict(self.plain_detector.state_dict())
        self.bare = BareLoop(bare, config, self.timed_device)
        self.backbones = {
            name: BareLoop(detector, config, self.timed_device)
            for name, detector in create_backbones(self.plain_detector, measurement.genotype).items()
        }
        self.seen: list[list[int]] = []
        self.start: Seconds | None = None
        self.checkpoint_time = Seconds(0.0, 0.0)

    def train_step(self, batches: list[tuple]) -> dict[str, float]:
        if self.start is None:
            self.start = now(self.timed_device)  # the first batch is loaded by now, and one more at the round's end
        elif self.step % self.round_steps == 0:
            self._end_round()
        self.seen += [[target["image_id"] for target in targets] for _, targets in batches]
        return super().train_step(batches)

    def _end_round(self) -> None:
        ours = now(self.timed_device) - self.start - self.checkpoint_time
        bare = self._time_bare()
        passes = {name: loop.timed_run(self.seen) for name, loop in self.backbones.items()}
        self.measurement.add_backbones(passes)
        self.checkpoint()  # which may have been no part of this round
        self.measurement.add(sum(map(len, self.seen)), ours, bare, self.checkpoint_time)
        self.seen, self.checkpoint_time = [], Seconds(0.0, 0.0)
        self.start = now(self.timed_device)

    def _time_bare(self) -> Seconds:
        start = now(self.timed_device)
        self.bare.run(self.seen)
        return now(self.timed_device) - start

    def checkpoint(self) -> None:
        """Save the state; what that takes is taken out of the round."""
        start = now(self.timed_device)
        super().checkpoint()
        self.checkpoint_time = now(self.timed_device) - start


class Measurement:
    """The rounds so far.

    Args:
        args: the command line.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.facts = args, {}
        self.images: list[int] = []
        self.ours: list[Seconds] = []
        self.bare: list[Seconds] = []
        self.left = args.warmup
        self.genotype: Genotype | None = None
        self.passes: list[dict[str, dict[str, Seconds]]] = []
        self.checkpoints: list[Seconds] = []
        self.split_images = 1

    def run(self) -> None:
        """Train for as many rounds as asked for, in a folder that is removed afterwards.

        Raises:
            NatsError: data, weights or options that can not be used.
        """
        if self.args.genotype:
            self.genotype = choose_genotype(self.args.genotype, VARIANT_PREFIX + self.args.backbone, self.args.seed)
        with tempfile.TemporaryDirectory(prefix="nats_training_") as folder:
            trainer = TimedTrainer(create_config(self.args, folder), self, self.args.steps)
            self.split_images = len(trainer.train_data)
            self.facts = describe_run(self.args, str(trainer.accelerator.device))
            try:
                trainer.run()
            except Done:
                return

    def add_backbones(self, passes: dict[str, dict[str, Seconds]]) -> None:
        """Take what a round's passes took, by backbone and pass, before `add` ends it; none without a genotype."""
        if passes and not self.left:
            self.passes.append(passes)

    def add(self, images: int, ours: Seconds, bare: Seconds, checkpoint: Seconds) -> None:
        """Take a round's times; warm-up rounds are dropped.

        Args:
            images: in the round.
            ours, bare: what either took for them.
            checkpoint: what one took.

        Raises:
            Done: it was the last.
        """
        if self.left:
            self.left -= 1
            return
        share = images / self.split_images
        charged = Seconds(ours.cpu + share * checkpoint.cpu, ours.wall + share * checkpoint.wall)
        self.checkpoints.append(checkpoint)
        self.images.append(images)
        self.ours.append(charged)
        self.bare.append(bare)
        if self.args.csv:
            write_csv(self.rows(), self.args.csv)
        ratios = {clock: getattr(bare, clock) / getattr(charged, clock) for clock in CLOCKS}
        speed = f"nats {images / charged.cpu:.2f} images/s by the CPU clock, {ratios['cpu']:.3f} of bare"
        tqdm.write(f"round {len(self.ours)}: {images} images, {speed}; {ratios['wall']:.3f} by the wall clock")
        if len(self.ours) == self.args.rounds:
            raise Done

    def rows(self) -> list[dict[str, Any]]:
        """One row per clock, and one per clock and pass of the backbones, with all that it depends on."""
        rows = [self._row(clock) for clock in CLOCKS]
        if self.passes:
            rows += [self._pass_row(clock, names) for names in (*((p,) for p in PASSES), PASSES) for clock in CLOCKS]
        return rows

    def _pass_row(self, clock: str, names: tuple[str, ...]) -> dict[str, Any]:
        """A row of the passes with these names, taken together."""
        nats, plain = (
            [sum(getattr(passes[arm][name], clock) for name in names) for passes in self.passes]
            for arm in ("nats", "plain")
        )
        low, median, high = quartiles([own / theirs for own, theirs in zip(nats, plain, strict=True)])
        facts = {"clock": clock, "passes": " and ".join(names), "genotype": self.args.genotype}
        facts |= {f"{arm}_ms_per_image": 1000 * sum(times) / sum(self.images[: len(self.passes)] or [1])
                  for arm, times in (("nats", nats), ("plain", plain))}  # fmt: skip
        return facts | {"ratio": median, "ratio_q1": low, "ratio_q3": high, "rounds": len(nats), **self.facts}

    def _row(self, clock: str) -> dict[str, Any]:
        ours, bare = ([getattr(each, clock) for each in times] for times in (self.ours, self.bare))
        low, median, high = quartiles([theirs / own for own, theirs in zip(ours, bare, strict=True)])
        return {
            "clock": clock,
            "nats_images_per_second": sum(self.images) / sum(ours),
            "bare_images_per_second": sum(self.images) / sum(bare),
            "ratio": median,
            "ratio_q1": low,
            "ratio_q3": high,
            "rounds": len(ours),
            "images": sum(self.images),
            "checkpoint_seconds": statistics.median(getattr(each, clock) for each in self.checkpoints),
            **self.facts,
        }


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile."""
    return tuple(statistics.quantiles(values, n=4, method="inclusive")) if len(values) > 1 else tuple(values) * 3


# --- results ----------------------------------------------------------------------------------------------------------


def describe_run(args: argparse.Namespace, device: str) -> dict[str, Any]:
    """The flags, the device's name and the versions that a throughput depends on."""
    keys = ("backbone", "min_size", "max_size", "batch", "fpn_channels", "head_size", "roi_samples", "precision")
    facts: dict[str, Any] = {key: getattr(args, key) for key in (*keys, "memory_format", "workers", "steps", "seed")}
    facts |= {"data": Path(args.data).name, "split": args.split, "weights": Path(args.weights or "random").name}
    facts |= {"threads": torch.get_num_threads(), "device_name": device_name(device)}
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "timm": timm.__version__}
    return facts | versions | {"nats_zoo": nats_zoo.__version__}


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print one line per clock, and whether the goal is met."""
    backbones = [row for row in rows if "passes" in row]
    rows = [row for row in rows if "passes" not in row]
    print("clock  nats images/s  bare images/s  ratio  quartiles")
    for row in rows:
        print(f"{row['clock']:<5}  {row['nats_images_per_second']:13.2f}  {row['bare_images_per_second']:13.2f}"
              f"  {row['ratio']:5.3f}  {row['ratio_q1']:.3f} to {row['ratio_q3']:.3f}")  # fmt: skip
    print(goal_line(rows), flush=True)
    for row in backbones:
        print(f"{row['clock']:<5}  {row['passes']:<20}  {row['nats_ms_per_image']:8.1f} ms an image,"
              f" {row['ratio']:.3f} of plain ({row['ratio_q1']:.3f} to {row['ratio_q3']:.3f}),"
              f" goal {MAX_RATIO}: {'met' if row['ratio'] <= MAX_RATIO else 'missed'}")  # fmt: skip


def goal_line(rows: Sequence[Mapping[str, Any]]) -> str:
    """Whether the ratio is as high as it should be, by each clock."""
    missed = [row["clock"] for row in rows if row["ratio"] < GOAL]
    return f"goal of at least {GOAL}: " + (f"missed by the clock: {', '.join(missed)}" if missed else "met")


# --- the command ------------------------------------------------------------------------------------------------------


def create_config(args: argparse.Namespace, folder: str) -> TrainConfig:
    """The run's options, those of `nats train`."""
    return TrainConfig(
        data=args.data, output=str(Path(folder) / "run"), format="coco", train_split=args.split, val_split=None,
        backbone=args.backbone, weights=args.weights, min_size=args.min_size, max_size=args.max_size,
        fpn_channels=args.fpn_channels, head_size=args.head_size, roi_samples=args.roi_samples,
        batch_size=args.batch, precision=args.precision, workers=args.workers, seed=args.seed,
        channels_last=args.memory_format == "channels_last",
        epochs=1000, lr_steps=(), warmup_steps=1_000_000,  # until the rounds are over, in the warm-up
    )  # fmt: skip


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data", required=True, help="folder of a COCO-layout data set")
    add("--split", default="train")
    add("--backbone", default="resnet18", choices=BACKBONES)
    add("--genotype", metavar="NAME", help="also time a backbone with it, named as for latency.py")
    add("--weights", help="the backbone's: a folder or file; without it random ones, nothing frozen")
    add("--min-size", type=positive, default=320, help="short side of the resized images in pixels")
    add("--max-size", type=positive, default=533, help="limit on the long side")
    add("--batch", type=positive, default=2, help="images per step")
    add("--fpn-channels", type=positive, default=256, help="channels of the feature pyramid")
    add("--head-size", type=positive, default=1024, help="width of the box head")
    add("--roi-samples", type=positive, default=512, help="regions per image on which the box head is trained")
    add("--precision", choices=("no", "bf16"), default="no", help="mixed precision")
    add("--memory-format", choices=("contiguous", "channels_last"), default="contiguous", help="of the weights")
    add("--workers", type=int, default=0, help="data loading processes; the CPU clock does not count them")
    add("--rounds", type=positive, default=10, help="timed rounds")
    add("--steps", type=positive, default=8, help="in a round")
    add("--warmup", type=positive, default=1, help="rounds before timing starts")
    add("--threads", type=positive, help="CPU threads; without it torch's own choice")
    add("--seed", type=int, default=0)
    add("--csv", type=Path, metavar="FILE", help="also write the rows there")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table and write the CSV file; returns the exit code."""
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    measurement = Measurement(args)
    try:
        measurement.run()
    except NatsError as error:
        print(f"training: {error}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt):
        return 130
    finally:
        if measurement.ours:
            print_table(measurement.rows())
    return 0


if __name__ == "__main__":
    sys.exit(main())
