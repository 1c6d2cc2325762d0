"""What a search costs per image, against plain training of the same detector on the same data.

A Faster R-CNN trains in turn as a plain detector and in each mode of the search. One round is what the bilevel schedule
repeats, on the same drawn images and boxes for all:

    plain         two updates of the weights
    mixture       an update of the weights and one of alpha, each on a batch of its own
    sampled       the same, with pairs of candidates drawn for each
    sensitivity   the scoring pass on both batches: one backward pass for dL/dy, the candidates forward only

An update is forward, backward and the optimiser's step (SGD for the weights, Adam for alpha); time is per image passed
forward and backward, averaged over the round. Arms take turns, so that a change of the machine's clock or load meets
all of them alike, and the ratio to plain is taken per round; reported are medians and the interquartile range (IQR) of
the ratios. Not part of it: what `calibrated` batch norms cost once in an epoch, and, in sensitivity mode, trials.

Peak memory is measured first, each arm in a process of its own, over two rounds. On a CPU, `total` is the process's
largest resident set (Python and torch included) and `growth` what came on top of its level just before the first round
(gradients, momentum and activations, but no weights); on a GPU the same of memory allocated.

The goal is a sampled search at no more than 1.6 times plain training in time, total memory and growth. The CSV file is
written after each round, so that an interrupted run keeps what it has.

    python benchmarks/search_cost.py --model resnet18 resnet50 --mode mixture sampled sensitivity \
        --kernels tied untied --weights resnet18=weights/resnet18.tin_64 --size 512x512 --csv search_cost.csv
"""

import argparse
import ctypes
import dataclasses
import gc
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from common import height_x_width, positive, synchronise, write_csv
from torch import Tensor, nn
from tqdm import tqdm

import nats_zoo
from nats_zoo import NatsError
from nats_zoo.detection import create_detector
from nats_zoo.detection.models.create import freeze, recalibrate_backbone, resized_batches
from nats_zoo.detection.runs.loop import set_lr
from nats_zoo.models.named import wake_branches
from nats_zoo.search import SearchConfig, build_supernet, calibrate, draw_pairs, find_space
from nats_zoo.search.choosing.profile import device_name
from nats_zoo.search.run.searcher import create_alpha_optimizer, create_weight_optimizer, split_parameters
from nats_zoo.search.run.sensitivity import score
from nats_zoo.search.space import searched_convs
from nats_zoo.search.supernet.build import MODES, is_tied

GOAL = 1.6
MIB = 2**20
ERROR_PREFIX = "search_cost: "
TRAINABLE_LAYERS = 3  # as in published Faster R-CNNs on pretrained backbones
NUM_CLASSES = 21
UPDATES = 2  # in a round
MEMORY_ROUNDS = 2  # optimisers have their state from the second on
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
RECIPE = SearchConfig(data="", output="", mode="mixture")  # the recipe's learning rates and decays


class Arm(NamedTuple):
    """What is trained: a plain detector, or a supernet of a mode with tied or untied kernels."""

    mode: str
    kernels: str | None = None

    @property
    def name(self) -> str:
        return self.mode if self.kernels is None else f"{self.mode} {self.kernels}"


PLAIN = Arm("plain")


# --- what is timed ----------------------------------------------------------------------------------------------------


def draw_batches(args: argparse.Namespace) -> list[tuple[list[Tensor], list[dict[str, Tensor]]]]:
    """The images and boxes of a round: UPDATES batches, the same for every arm."""
    generator = torch.Generator().manual_seed(args.seed)
    height, width = args.size
    batches = []
    for _ in range(UPDATES):
        images = [torch.rand(3, height, width, generator=generator).to(args.device) for _ in range(args.batch)]
        batches.append((images, [_draw_target(height, width, generator, args.device) for _ in images]))
    return batches


def _draw_target(height: int, width: int, generator: torch.Generator, device: str) -> dict[str, Tensor]:
    """Eight boxes, with sides of an eighth to a half of the image's."""
    sides = torch.tensor([width, height]) * (0.125 + 0.375 * torch.rand(8, 2, generator=generator))
    corners = (torch.tensor([width, height]) - sides) * torch.rand(8, 2, generator=generator)
    labels = torch.randint(1, NUM_CLASSES, (8,), generator=generator)
    return {"boxes": torch.cat([corners, corners + sides], 1).to(device), "labels": labels.to(device)}


def create_plain_detector(model: str, images: Sequence[Tensor], args: argparse.Namespace) -> nn.Module:
    """A detector whose backbone's batch norms were measured on these images, and are frozen unless --norm is live.

    Raises:
        NatsError: no such network, or weights that do not fit.
    """
    norm = "live" if args.norm == "live" else "frozen"
    sizes = dict(min_size=min(args.size), max_size=max(args.size))  # images are not resized
    sizes |= dict(fpn_channels=args.fpn_channels, head_size=args.head_size, roi_samples=args.roi_samples)
    torch.manual_seed(args.seed)
    images, weights = [image.cpu() for image in images], args.weights.get(model)
    if weights is not None:
        options = dict(weights=weights, trainable_layers=TRAINABLE_LAYERS, norm=norm, calibration=[images])
        return create_detector("fasterrcnn", model, NUM_CLASSES, **options, **sizes)
    detector = create_detector("fasterrcnn", model, NUM_CLASSES, weights=None, **sizes)
    wake_branches(detector.backbone.body)
    recalibrate_backbone(detector, [images])
    detector.config = dataclasses.replace(detector.config, norm=norm, trainable_layers=TRAINABLE_LAYERS)
    return freeze(detector)


class Trainee:
    """One arm's detector with its optimisers.

    Args:
        model: timm's name of the backbone.
        arm: what is trained.
        batches: of a round.
        args: the command line.
    """

    def __init__(self, model: str, arm: Arm, batches: Sequence[tuple], args: argparse.Namespace):
        self.arm, self.batches, self.args = arm, batches, args
        detector = create_plain_detector(model, batches[0][0], args)
        body = detector.backbone.body
        self.searched = {}
        if arm != PLAIN:
            convs = searched_convs(body, find_space(args.space))
            self.searched = build_supernet(body, convs, args.groups, mode=arm.mode, kernels=arm.kernels, norm=args.norm)
        self.detector = detector.to(args.device, memory_format=MEMORY_FORMATS[args.memory_format]).train()
        if self.searched and args.norm == "calibrated":
            self._draw(0)
            calibrate(body, self.searched.values(), resized_batches(detector, [batches[0][0][:1]]))
        weights, alphas = split_parameters(detector)
        sgd = create_weight_optimizer(RECIPE, weights)
        set_lr(sgd, RECIPE.lr_per_image * args.batch)
        self.optimizers = [sgd, sgd]
        if arm.mode in ("mixture", "sampled"):
            self.optimizers = [sgd, create_alpha_optimizer(dataclasses.replace(RECIPE, mode=arm.mode), alphas)]

    def round(self, number: int) -> None:
        """Pass each batch once forward and backward."""
        if self.arm.mode == "sensitivity":
            losses = [lambda batch=batch: self._loss(batch, number) for batch in self.batches]
            score(self.detector, self.searched, losses)
            return
        for update, (batch, optimizer) in enumerate(zip(self.batches, self.optimizers, strict=True)):
            self._draw(number, update)
            self._loss(batch, number).backward()
            optimizer.step()
            for each in self.optimizers:  # alpha's update throws the weights' gradients away, and the other way round
                each.zero_grad()

    def _draw(self, *seeds: int) -> None:
        draw_pairs(self.searched.values(), self.args.seed, *seeds)

    def _loss(self, batch: tuple, number: int) -> Tensor:
        torch.manual_seed(number)  # the proposals that are trained on
        device_type = torch.device(self.args.device).type
        with torch.autocast(device_type, torch.bfloat16, enabled=self.args.precision == "bf16"):
            loss = sum(self.detector(*batch).values())
        if not loss.isfinite():
            raise NatsError(f"{self.arm.name}: the loss of round {number} is not finite")
        return loss


# --- time -------------------------------------------------------------------------------------------------------------


def time_rounds(
    rounds: Mapping[str, Callable[[int], Any]],
    args: argparse.Namespace,
    after_round: Callable[[Mapping[str, list[float]]], None],
) -> dict[str, list[float]]:
    """Seconds of each round of each arm; arms take turns.

    Args:
        rounds: by arm, takes the round's number.
        args: repeats, warmup, device and clock.
        after_round: is given all times so far.
    """
    times: dict[str, list[float]] = {name: [] for name in rounds}
    for number in tqdm(range(args.warmup + args.repeats), desc="rounds", leave=False, disable=None):
        for name, round_ in rounds.items():
            elapsed = _time_once(round_, number, args)
            if number >= args.warmup:
                times[name].append(elapsed)
        if number >= args.warmup:
            after_round(times)
    return times


def _time_once(round_: Callable[[int], Any], number: int, args: argparse.Namespace) -> float:
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    synchronise(args.device)
    start = clock()
    round_(number)
    synchronise(args.device)
    return clock() - start


def summarise(times: Mapping[str, Sequence[float]], images_per_round: int) -> dict[str, dict[str, float]]:
    """By arm: median seconds per image passed, median and quartiles of the per-round ratio to `plain`."""
    rows = {}
    for name, values in times.items():
        ratios = [value / plain for value, plain in zip(values, times[PLAIN.name], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        seconds = statistics.median(values) / images_per_round
        rows[name] = dict(seconds_per_image=seconds, ratio=median, ratio_q1=low, ratio_q3=high, rounds=len(values))
    return rows


# --- memory -----------------------------------------------------------------------------------------------------------


def measure_memory(model: str, arm: Arm, args: argparse.Namespace) -> dict[str, float]:
    """Peak memory of an arm in MiB, from a process of its own.

    Raises:
        NatsError: that process failed.
    """
    settings = vars(args) | dict(model=[model], csv=None, weights=args.weights, arm=arm)
    command = [sys.executable, __file__, "--memory-of", json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"its process ended with exit code {done.returncode}"])[-1]
        raise NatsError(f"{model} {arm.name}: {last.removeprefix(ERROR_PREFIX)}")
    return json.loads(done.stdout.splitlines()[-1])


def memory_of(settings: Mapping[str, Any]) -> dict[str, float]:
    """What `measure_memory` runs in its process."""
    args = argparse.Namespace(**settings)
    if args.threads:
        torch.set_num_threads(args.threads)
    trainee = Trainee(args.model[0], Arm(*args.arm), draw_batches(args), args)
    level = start_peak(args.device)
    for number in range(MEMORY_ROUNDS):
        trainee.round(number)
    peak = peak_memory(args.device)
    return dict(total_mib=peak / MIB, growth_mib=(peak - level) / MIB)


def start_peak(device: str) -> int:
    """Forget the peak so far where that is possible; returns the present level in bytes."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return_free_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS
        return _status("VmRSS")
    except OSError:  # not Linux, or not allowed: the level is then at most the peak so far
        return peak_memory(device)


def return_free_memory() -> None:
    """Give the system what building a network left behind, so that it is no part of the level (in glibc's malloc)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_memory(device: str) -> int:
    """Peak memory of this process in bytes.

    On Linux not getrusage's: its peak begins with that of the process that started this one.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        return _status("VmHWM")
    except OSError:
        import resource  # not on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status: no {key}")


# --- results ----------------------------------------------------------------------------------------------------------


class Measurement:
    """The rows of one network, completed as results come.

    Args:
        model: timm's name of the backbone.
        arms: plain first.
        args: the command line.
        finished: rows of other networks, which come before these in the CSV file.
    """

    def __init__(self, model: str, arms: Sequence[Arm], args: argparse.Namespace, finished: Sequence[Mapping]):
        self.model, self.arms, self.args, self.finished = model, arms, args, list(finished)
        self.memory: dict[str, dict[str, float]] = {}
        self.times: dict[str, dict[str, float]] = {}

    def run(self) -> None:
        """Measure memory, then time."""
        for arm in self.arms if self.args.memory else ():
            found = self.memory[arm.name] = measure_memory(self.model, arm, self.args)
            total, growth = f"total {found['total_mib']:.0f} MiB", f"growth {found['growth_mib']:.0f} MiB"
            print(f"{self.model} {arm.name}: {total}, {growth}", flush=True)
        batches = draw_batches(self.args)
        trainees = {arm.name: Trainee(self.model, arm, batches, self.args) for arm in self.arms}
        time_rounds({name: trainee.round for name, trainee in trainees.items()}, self.args, self._take)

    def _take(self, times: Mapping[str, Sequence[float]]) -> None:
        images = UPDATES * self.args.batch
        self.times = summarise(times, images)
        if self.args.csv:
            write_csv(self.finished + self.rows(), self.args.csv)
        plain = times[PLAIN.name][-1]
        ratios = [f"{name} {values[-1] / plain:.2f}" for name, values in times.items() if name != PLAIN.name]
        print(f"{self.model} round {len(times[PLAIN.name])}: plain {plain / images:.3f} s per image, times that:",
              ", ".join(ratios), flush=True)  # fmt: skip

    def rows(self) -> list[dict[str, Any]]:
        """One row per arm, with all that it depends on."""
        rows = []
        for arm in self.arms:
            memory = self._with_ratios(self.memory[arm.name]) if self.memory else {}
            arm_facts = dict(model=self.model, mode=arm.mode, kernels=arm.kernels or "")
            rows.append(arm_facts | self.times[arm.name] | memory | describe_run(self.model, self.args))
        return rows

    def _with_ratios(self, memory: Mapping[str, float]) -> dict[str, float]:
        plain = self.memory[PLAIN.name]
        ratios = {f"{key.removesuffix('_mib')}_ratio": value / plain[key] for key, value in memory.items()}
        return {key: round(value, 1) for key, value in memory.items()} | ratios


def describe_run(model: str, args: argparse.Namespace) -> dict[str, Any]:
    """The flags, the device's name and the versions that a cost depends on."""
    keys = ("batch", "norm", "groups", "space", "fpn_channels", "head_size", "roi_samples", "precision")
    keys += ("memory_format", "device", "repeats", "warmup", "clock", "seed")
    facts = dict(size=f"{args.size[0]}x{args.size[1]}", weights=args.weights.get(model) or "random")
    facts |= dict(trainable_layers=TRAINABLE_LAYERS) | {key: getattr(args, key) for key in keys}
    versions = dict(torch=torch.__version__, timm=timm.__version__, nats_zoo=nats_zoo.__version__)
    return facts | dict(threads=torch.get_num_threads(), device_name=device_name(args.device)) | versions


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print one line per arm, and one for each sampled arm that says whether the goal is met."""
    print("network     arm                  s per image  ratio to plain    IQR of ratio   total    growth")
    for row in rows:
        name = Arm(row["mode"], row["kernels"] or None).name
        line = f"{row['model']:<10}  {name:<19}  {row['seconds_per_image']:11.3f}  {row['ratio']:14.3f}"
        line += f"  {row['ratio_q1']:.3f} to {row['ratio_q3']:.3f}"
        if "total_ratio" in row:
            line += f"  {row['total_ratio']:6.3f}  {row['growth_ratio']:8.3f}"
        print(line)
    for line in goal_lines(rows):
        print(line, flush=True)


def goal_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whether each sampled arm costs at most GOAL times plain training, in all that was measured."""
    lines = []
    for row in rows:
        if row["mode"] != "sampled":
            continue
        measured = dict(time=row["ratio"])
        if "total_ratio" in row:
            measured |= {"total memory": row["total_ratio"], "growth": row["growth_ratio"]}
        missed = [what for what, ratio in measured.items() if ratio > GOAL]
        figures = ", ".join(f"{what} {ratio:.2f}" for what, ratio in measured.items())
        verdict = f"missed in {', '.join(missed)}" if missed else "met"
        lines.append(f"goal of at most {GOAL}: {row['model']} sampled {row['kernels']}: {figures}: {verdict}")
    return lines


# --- the command ------------------------------------------------------------------------------------------------------


def list_arms(args: argparse.Namespace) -> list[Arm]:
    """Plain, and each mode with the kernels asked for; sensitivity, which trains none, with tied ones."""
    arms = [PLAIN]
    for mode, kernels in itertools.product(args.mode, args.kernels):
        own = ("tied" if is_tied(mode, None) else "untied") if mode == "sensitivity" or kernels == "own" else kernels
        arms.append(Arm(mode, own))
    return list(dict.fromkeys(arms))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", nargs="+", default=["resnet18"], help="timm names of the backbone")
    add("--weights", nargs="+", type=_named, default=[], metavar="MODEL=FOLDER", help="a backbone's; else random ones")
    add("--mode", nargs="+", choices=MODES, default=["mixture", "sampled"])
    add(
        "--kernels",
        nargs="+",
        choices=("tied", "untied", "own"),
        default=["own"],
        help="tied, untied, or the mode's own: untied in mixture, tied in sampled; sensitivity has tied ones only",
    )
    add("--size", type=height_x_width, default=(512, 512), metavar="HxW", help="of the images in pixels")
    add("--batch", type=positive, default=2, help="images per update")
    add("--groups", type=positive, default=16, help="groups per convolution")
    add("--space", default="C", help="A, B, C or a YAML file")
    add("--norm", choices=("calibrated", "live", "frozen"), default="calibrated", help="batch norm, as in a search")
    add("--fpn-channels", type=positive, default=256, help="channels of the feature pyramid")
    add("--head-size", type=positive, default=1024, help="width of the box head")
    add("--roi-samples", type=positive, default=512, help="regions per image on which the box head is trained")
    add("--precision", choices=("no", "bf16"), default="no", help="mixed precision")
    add("--memory-format", choices=MEMORY_FORMATS, default="contiguous", help="of the weights")
    add("--device", default="cpu", help="cpu, cuda, cuda:1")
    add("--repeats", type=positive, default=10, help="timed rounds")
    add("--warmup", type=positive, default=1, help="rounds before timing starts")
    add("--threads", type=positive, help="CPU threads; without it torch's own choice")
    add("--clock", choices=("wall", "cpu"), default="wall", help="cpu: this process's time, where others run too")
    add("--no-memory", dest="memory", action="store_false", help="leave out what is measured in further processes")
    add("--seed", type=int, default=0, help="of weights, images and pairs")
    add("--csv", type=Path, metavar="FILE", help="also write the rows there")
    add("--memory-of", help=argparse.SUPPRESS)  # a process of measure_memory's
    args = parser.parse_args(argv)
    args.weights = dict(args.weights)
    return args


def _named(text: str) -> tuple[str, str]:
    model, _, path = text.partition("=")
    if not model or not path:
        raise argparse.ArgumentTypeError(f"{text!r}: expected MODEL=FOLDER")
    return model, path


def run(args: argparse.Namespace) -> None:
    """Measure every network; what is known of one that is interrupted is printed too."""
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"{device_name(args.device)}, {torch.get_num_threads()} threads, {args.precision}, torch {torch.__version__}")
    rows: list[dict[str, Any]] = []
    for model in args.model:
        measurement = Measurement(model, list_arms(args), args, rows)
        try:
            measurement.run()
        finally:
            if measurement.times:
                rows += measurement.rows()
                print_table(rows[-len(measurement.arms) :])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for, print the table and write the CSV file; returns the exit code."""
    args = parse_args(argv)
    try:
        if args.memory_of:
            print(json.dumps(memory_of(json.loads(args.memory_of))))
        else:
            run(args)
    except NatsError as error:
        print(f"{ERROR_PREFIX}{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
