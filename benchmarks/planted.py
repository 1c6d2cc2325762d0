"""Planted recovery: does a search find the dilations that a network is known to have?

The teacher is a timm ResNet with a genotype drawn at random: each group of the searched convolutions takes any
candidate. The student is a supernet on the teacher's own weights, which does not know the genotype. It is distilled at
the outputs of the searched stages,

    loss = mean over the maps of  MSE(student's map, teacher's map) / variance of the teacher's map,

on random crops of the images below a folder, and searches as in each mode: in `mixture` and `sampled` by Adam on alpha,
in `sensitivity` by scores and trials. The teacher's kernels are tied to all candidates, so that only the dilations are
unknown; with --train-kernels the searched kernels move as well, and start from the teacher's.

A dilation that is as large as the map can not be told from others. Crops smaller than 3 times the largest dilation of
a stage times the stage's stride are refused: space C needs 480 pixels. An image with a shorter side is enlarged.

Chance is what drawing a candidate for each group would find. For each group that is missed, one line says what took
its place and how much that matters: `alike` is the loss that the teacher itself has when only this group takes the
found candidate, near 0 if the two look alike on these images or the group's output does not get through the ReLU.

The CSV file gets a row for each seed and mode as soon as it is done. The same command again skips rows that are there.

    python benchmarks/planted.py --weights weights/resnet18.tin_64 --images data/nwpu-vhr10-512/images \
        --mode mixture sampled sensitivity --seed 0 1 2 3 --csv planted.csv
"""

import argparse
import copy
import csv
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from common import positive, write_csv
from PIL import Image
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import nats_zoo
from nats_zoo import Genotype, NatsError, transform
from nats_zoo.base.errors import one_line
from nats_zoo.folders.weights import weights_overlay
from nats_zoo.genotype.runs import Dilation, Runs
from nats_zoo.networks.batch_norm import recalibrate_bn
from nats_zoo.networks.transform import architecture_of
from nats_zoo.search import (
    SearchedConv2d,
    SearchSpace,
    build_supernet,
    calibrate,
    decode_network,
    draw_pairs,
    find_space,
)
from nats_zoo.search.choosing.profile import device_name
from nats_zoo.search.run.sensitivity import SensitivitySearch, score
from nats_zoo.search.space import count_groups, searched_convs
from nats_zoo.search.supernet.build import MODES

SUFFIXES = (".jpg", ".jpeg", ".png")
LEAST_SIDES = 3  # side of a map, in units of the largest dilation
# Crops are functions of the seed and a number: those to learn from count up from 0, the others have their own.
HELD_BACK, CALIBRATION = 10**6, 2 * 10**6


# --- the teacher ------------------------------------------------------------------------------------------------------


class Planted(NamedTuple):
    """A teacher and what a student may know of it.

    Attributes:
        plain: the teacher's weights at plain dilations.
        teacher: the network with the planted genotype.
        candidates: by convolution.
        truth: index of each group's planted candidate, (groups,), by convolution.
    """

    plain: nn.Module
    teacher: nn.Module
    candidates: dict[str, tuple]
    truth: dict[str, Tensor]

    def chance(self) -> float:
        """Share of the groups that a random genotype gets right."""
        rights = [1 / len(self.candidates[name]) for name, chosen in self.truth.items() for _ in chosen]
        return statistics.mean(rights)


def create_plain(model_name: str, weights: str | None, seed: int) -> nn.Module:
    """A headless timm ResNet with given or random weights.

    Raises:
        NatsError: no ResNet of timm's, or weights that do not fit.
    """
    torch.manual_seed(seed)
    if not timm.is_model(model_name):
        raise NatsError(f"--model: timm has no model {model_name!r}")
    # zero_init_last would zero every residual branch, and with it the difference between any two dilations
    options: dict[str, Any] = dict(num_classes=0, zero_init_last=False)
    if weights is not None:
        options |= dict(pretrained=True, pretrained_cfg_overlay=weights_overlay(model_name, weights))
    try:
        network = timm.create_model(model_name, **options)
    except TypeError as error:
        raise NatsError(f"--model {model_name}: expected a ResNet: {one_line(error)}") from error
    return network.requires_grad_(False)


def plant(plain: nn.Module, space: SearchSpace, groups: int, seed: int) -> Planted:
    """Draw a genotype; each group takes any candidate of its stage."""
    generator = torch.Generator().manual_seed(seed)
    candidates = searched_convs(plain, space)
    truth = {}
    for name, dilations in candidates.items():
        count = count_groups(plain.get_submodule(name), name, groups, None)
        truth[name] = torch.randint(len(dilations), (count,), generator=generator)
    unplanted = Planted(plain, plain, candidates, truth)
    return unplanted._replace(teacher=regrouped(unplanted, truth))


def runs_of(chosen: Tensor, dilations: Sequence[tuple], out_channels: int) -> tuple:
    """A convolution's runs for a candidate per group."""
    return Runs.of((dilations[index] for index in chosen.tolist()), each=out_channels // len(chosen))


def regrouped(planted: Planted, chosen: Mapping[str, Tensor]) -> nn.Module:
    """The plain network with other candidates, (groups,) of each convolution."""
    modules = dict(planted.plain.named_modules())
    runs = {
        name: runs_of(chosen[name], dilations, modules[name].out_channels)
        for name, dilations in planted.candidates.items()
    }
    return transform(copy.deepcopy(planted.plain), Genotype(architecture_of(planted.plain), runs))


def settle_norms(planted: Planted, batches: Sequence[Tensor], norm: str) -> None:
    """Give teacher and plain network the same batch norms: of the batch, or the teacher's own, measured and frozen."""
    if norm == "calibrated":
        recalibrate_bn(planted.teacher, batches)
        planted.plain.load_state_dict(planted.teacher.state_dict())
        for network in (planted.plain, planted.teacher):
            freeze_batch_norm_2d(network)
        calibrate_at(planted, planted.teacher, planted.truth, batches)
    for network in (planted.plain, planted.teacher):
        network.train(norm == "live")


def calibrate_at(planted: Planted, network: nn.Module, chosen: Mapping[str, Tensor], batches: Sequence[Tensor]) -> None:
    """Give a network, which has these candidates, the statistics that a student would measure there: the very same."""
    student = copy.deepcopy(planted.plain)
    (groups,) = {len(indices) for indices in chosen.values()}
    searched = build_supernet(student, planted.candidates, groups, mode="sensitivity")
    student.to(batches[0].device)
    for name, conv in searched.items():
        conv.current.copy_(chosen[name])
        conv.measures_all = False
    calibrate(student, searched.values(), batches)
    network.load_state_dict(decode_network(student, searched).state_dict())


# --- images -----------------------------------------------------------------------------------------------------------


class Crops:
    """Random crops of a folder's images, mirrored or not; a batch is a function of the seed and its number.

    Args:
        folder: all jpg and png files below it.
        side: of the crops in pixels; a smaller image is enlarged.
        batch: crops per batch.
        seed: of all that is drawn.
        mean, std: normalisation of RGB in 0..1.

    Raises:
        NatsError: no image there, or one that can not be read.
    """

    def __init__(self, folder: Path, side: int, batch: int, seed: int, mean: Sequence[float], std: Sequence[float]):
        self.paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not self.paths:
            raise NatsError(f"--images {folder}: expected a folder with jpg or png files")
        self.side, self.batch, self.seed, self.mean, self.std = side, batch, seed, list(mean), list(std)

    def __call__(self, number: int) -> Tensor:
        """Batch (N, 3, side, side) of this number."""
        generator = torch.Generator().manual_seed(self.seed * 10**7 + number)
        drawn = torch.randint(len(self.paths), (self.batch,), generator=generator)
        return torch.stack([self._crop(self.paths[index], generator) for index in drawn.tolist()])

    def _crop(self, path: Path, generator: torch.Generator) -> Tensor:
        image = _read(path)
        short = min(image.shape[1:])
        if short < self.side:
            height, width = (max(self.side, round(size * self.side / short)) for size in image.shape[1:])
            image = TF.resize(image, [height, width], antialias=True)
        top, left = (int(torch.randint(size - self.side + 1, (), generator=generator)) for size in image.shape[1:])
        image = TF.to_dtype(image[:, top : top + self.side, left : left + self.side], torch.float32, scale=True)
        image = TF.normalize(image, self.mean, self.std)
        return image.flip(2) if torch.rand((), generator=generator) < 0.5 else image


def calibration_batches(crops: Crops, args: argparse.Namespace) -> list[Tensor]:
    """What batch norms are measured on."""
    return [crops(CALIBRATION + number).to(args.device) for number in range(args.calibration_batches)]


def _read(path: Path) -> Tensor:
    try:
        with Image.open(path) as image:
            return TF.pil_to_tensor(image.convert("RGB"))
    except OSError as error:
        raise NatsError(f"{path}: not an image that can be read: {one_line(error)}") from error


def least_side(space: SearchSpace) -> int:
    """Smallest crop whose maps can tell all candidates apart: 3 times the largest dilation times the stage's stride."""
    return max(
        LEAST_SIDES * max(max(dilation) for dilation in dilations) * 2 ** (stage + 1)
        for stage, dilations in space.candidates.items()
    )


# --- distillation -----------------------------------------------------------------------------------------------------


class Distillation:
    """The loss of a student, whose stages take the place of the teacher's.

    Stem and layer1 are the same in both, and without a gradient: they run once.

    Args:
        teacher: the teacher.
        at: `layers`: the maps of layer2, layer3 and layer4; `blocks`: of every block in them.
        autocast: what the forward passes run under.
    """

    def __init__(self, teacher: nn.Module, at: str, autocast: Callable[[], Any]):
        self.teacher, self.at, self.autocast = teacher, at, autocast

    @torch.no_grad()
    def prepare(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What the searched stages take, and the teacher's maps: all that a loss needs to know of images."""
        teacher = self.teacher
        with self.autocast():
            x = teacher.maxpool(teacher.act1(teacher.bn1(teacher.conv1(images))))
            x = teacher.layer1(x)
            return x, self.maps(teacher, x)

    def maps(self, network: nn.Module, x: Tensor) -> list[Tensor]:
        """The outputs that are compared."""
        maps = []
        for stage in (network.layer2, network.layer3, network.layer4):
            for block in stage:
                x = block(x)
                maps.append(x)
            if self.at == "layers":
                del maps[-len(stage) : -1]
        return maps

    def loss(self, student: nn.Module, x: Tensor, targets: Sequence[Tensor]) -> Tensor:
        """Mean over the maps of the squared error relative to the teacher's variance."""
        with self.autocast():
            maps = self.maps(student, x)
        errors = [F.mse_loss(y.float(), t.float()) / t.float().var() for y, t in zip(maps, targets, strict=True)]
        return torch.stack(errors).mean()


# --- searches ---------------------------------------------------------------------------------------------------------


class Student:
    """A supernet on the teacher's weights, and how it is searched.

    Args:
        planted: the teacher.
        distillation: the loss.
        crops: images.
        mode: of the search.
        args: the command line.
    """

    def __init__(self, planted: Planted, distillation: Distillation, crops: Crops, mode: str, args: argparse.Namespace):
        self.planted, self.distillation, self.crops, self.mode, self.args = planted, distillation, crops, mode, args
        self.measured = calibration_batches(crops, args) if args.norm == "calibrated" else []
        self.network = copy.deepcopy(planted.plain)
        self.searched: dict[str, SearchedConv2d] = build_supernet(
            self.network, planted.candidates, args.groups, mode=mode, kernels="tied", norm=args.norm
        )
        self.network.requires_grad_(False).to(args.device)
        self.steps = 0

    def search(self) -> None:
        """Search to the end; `chosen` then holds the result."""
        if self.mode == "sensitivity":
            self._try_changes()
        else:
            self._learn_alpha()

    def recovered(self) -> dict[str, Tensor]:
        """Which groups of each convolution took the planted candidate."""
        return {name: conv.chosen().cpu() == self.planted.truth[name] for name, conv in self.searched.items()}

    def _learn_alpha(self) -> None:
        args, convs = self.args, self.searched.values()
        alphas = [conv.alpha.requires_grad_(True) for conv in convs]
        optimizers = [torch.optim.Adam(alphas, lr=args.lr, betas=MODES[self.mode].alpha_betas)]
        if args.train_kernels:
            kernels = [conv.kernels.requires_grad_(True) for conv in convs]
            optimizers.append(torch.optim.Adam(kernels, lr=args.kernel_lr))
        with tqdm(range(args.steps), desc=f"{self.mode} steps", leave=False, disable=None) as bar:
            for step in bar:
                if args.norm == "calibrated" and step % args.calibrate_every == 0:
                    self._calibrate(step)
                loss = self._learn(step, optimizers)
                bar.set_postfix(loss=f"{loss:.3g}", recovered=self._count())
                self.steps = step + 1

    def _learn(self, step: int, optimizers: Sequence[torch.optim.Optimizer]) -> float:
        draw_pairs(self.searched.values(), self.crops.seed, step)
        loss = self.distillation.loss(self.network, *self._batch(step))
        if not loss.isfinite():
            raise NatsError(f"{self.mode}: the loss of step {step} is not finite; a lower --lr may help")
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        return loss.item()

    def _batch(self, number: int) -> tuple[Tensor, list[Tensor]]:
        return self.distillation.prepare(self.crops(number).to(self.args.device))

    def _calibrate(self, step: int = 0, current_only: bool = False) -> None:
        """Measure the candidates' statistics anew: what comes before them has changed."""
        for conv in self.searched.values():
            conv.measures_all = not current_only
        numbers = iter(range(len(self.measured)))
        calibrate(
            self.network,
            self.searched.values(),
            self.measured,
            lambda: draw_pairs(self.searched.values(), self.crops.seed, step, CALIBRATION, next(numbers)),
        )

    def _try_changes(self) -> None:
        args = self.args
        scored = [self._batch(number) for number in range(args.score_batches)]
        held_back = [self._batch(HELD_BACK + number) for number in range(args.held_back_batches)]
        search = SensitivitySearch(
            self.searched, lambda: self._score(scored), lambda: self._held_back_loss(held_back), max_rounds=args.rounds
        )
        progress = search.progress
        with tqdm(desc="sensitivity trials", leave=False, disable=None) as bar:
            while not progress.done:
                if progress.size is None:
                    search.begin_round()
                else:
                    trial = search.try_changes()
                    bar.update()
                    bar.set_postfix(changes=trial.changes, loss=f"{progress.loss:.3g}", recovered=self._count())
        self.steps = progress.trials

    def _score(self, batches: Sequence[tuple]) -> dict[str, Tensor]:
        if self.args.norm == "calibrated":
            self._calibrate()
        losses = [lambda batch=batch: self.distillation.loss(self.network, *batch) for batch in batches]
        return score(self.network, self.searched, losses)

    @torch.no_grad()
    def _held_back_loss(self, batches: Sequence[tuple]) -> float:
        if self.args.norm == "calibrated":
            self._calibrate(current_only=True)
        return statistics.mean(self.distillation.loss(self.network, *batch).item() for batch in batches)

    def _count(self) -> str:
        found = torch.cat(list(self.recovered().values()))
        return f"{int(found.sum())}/{len(found)}"


# --- results ----------------------------------------------------------------------------------------------------------


class Miss(NamedTuple):
    """A group that did not take the planted candidate.

    Attributes:
        probability: of the found candidate; None in a sensitivity search.
        alike: loss of the teacher with only this group at the found candidate.
    """

    conv: str
    group: int
    planted: str
    found: str
    probability: float | None
    alike: float

    def __str__(self) -> str:
        sure = "" if self.probability is None else f" (p = {self.probability:.2f})"
        return (
            f"{self.conv} group {self.group}: planted {self.planted}, found {self.found}{sure}, alike {self.alike:.2g}"
        )


def find_misses(student: Student) -> list[Miss]:
    """The groups that are missed, and what each of them alone would do to the loss."""
    misses = []
    planted = student.planted
    for name, rights in student.recovered().items():
        conv = student.searched[name]
        for group in (~rights).nonzero().flatten().tolist():
            found = conv.chosen()[group].item()
            probability = None if student.mode == "sensitivity" else conv.log_probabilities().exp()[group, found].item()
            dilations = [str(Dilation(*d)) for d in conv.candidates]
            swapped = planted.truth[name].clone()
            swapped[group] = found
            alike = loss_of_swap(student, name, swapped)
            misses.append(
                Miss(name, group, dilations[planted.truth[name][group]], dilations[found], probability, alike)
            )
    return misses


@torch.no_grad()
def loss_of_swap(student: Student, name: str, chosen: Tensor) -> float:
    """Loss, on a held-back batch, of the teacher with other candidates in one convolution."""
    planted = student.planted
    indices = planted.truth | {name: chosen}
    network = regrouped(planted, indices)
    if student.args.norm == "calibrated":
        calibrate_at(planted, network, indices, student.measured)
    inputs, targets = student.distillation.prepare(student.crops(HELD_BACK).to(student.args.device))
    return student.distillation.loss(network, inputs, targets).item()


def summarise(student: Student, seconds: float) -> dict[str, Any]:
    """Groups recovered, of all and per stage, and the misses."""
    recovered = student.recovered()
    total, stages = torch.cat(list(recovered.values())), {}
    for name, rights in recovered.items():
        stages.setdefault(name.partition(".")[0], []).append(rights)
    row = dict(recovered=int(total.sum()), groups_in_all=len(total), chance=round(student.planted.chance(), 4))
    row |= {f"recovered_{stage}": _count(torch.cat(rights)) for stage, rights in stages.items()}
    misses = "; ".join(map(str, find_misses(student)))
    return row | dict(seconds=round(seconds, 1), steps_or_trials=student.steps, misses=misses)


def _count(rights: Tensor) -> str:
    return f"{int(rights.sum())} of {len(rights)}"


def prepare(mode: str, seed: int, args: argparse.Namespace) -> Student:
    """Plant a genotype; returns a student that is yet to search."""
    plain = create_plain(args.model, args.weights, seed)
    planted = plant(plain, find_space(args.space), args.groups, seed)
    crops = Crops(args.images, args.crop, args.batch, seed, plain.default_cfg["mean"], plain.default_cfg["std"])
    for network in (planted.plain, planted.teacher):
        network.to(args.device, memory_format=torch.channels_last)
    settle_norms(planted, calibration_batches(crops, args), args.norm)
    device_type, is_mixed = torch.device(args.device).type, args.precision == "bf16"
    distillation = Distillation(
        planted.teacher, args.at, lambda: torch.autocast(device_type, torch.bfloat16, enabled=is_mixed)
    )
    return Student(planted, distillation, crops, mode, args)


def measure(mode: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Plant a genotype and search in one mode; returns the results of `summarise`."""
    student = prepare(mode, seed, args)
    start = time.perf_counter()
    student.search()
    return summarise(student, time.perf_counter() - start)


# What a row is a function of: a row of the same values is not measured again.
KEYS = (
    "model", "weights", "images", "space", "groups", "norm", "at", "train_kernels", "crop", "batch", "steps", "lr",
    "kernel_lr", "calibrate_every", "calibration_batches", "score_batches", "held_back_batches", "rounds", "precision",
    "device",
)  # fmt: skip


def describe(mode: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """The settings of a row, as its CSV file has them."""
    return {"mode": mode, "seed": seed} | {key: getattr(args, key) for key in KEYS}


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """What the time depends on beside the settings."""
    versions = dict(torch=torch.__version__, timm=timm.__version__, nats_zoo=nats_zoo.__version__)
    return dict(threads=torch.get_num_threads(), device_name=device_name(args.device)) | versions


def read_rows(path: Path | None) -> list[dict[str, str]]:
    """The rows of an earlier run; none if there was none.

    Raises:
        NatsError: a file that is not one of ours.
    """
    if path is None or not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise NatsError(f"--csv {path}: can not be read: {one_line(error)}") from error
    expected = ("mode", "seed", *KEYS)
    missing = [key for row in rows for key in expected if row.get(key) is None]
    if missing or (not rows and path.stat().st_size):
        raise NatsError(
            f"--csv {path}: expected the rows of an earlier run, with a column {(missing or expected)[0]!r}"
        )
    return rows


def find_row(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The row with these settings, if it is there."""
    wanted = {key: "" if value is None else str(value) for key, value in settings.items()}
    return next((row for row in rows if all(str(row[key] or "") == value for key, value in wanted.items())), None)


def print_row(row: Mapping[str, Any], old: bool) -> None:
    """One line of the table, and one for each miss."""
    stages = [f"{row[f'recovered_layer{n}']:>9}" for n in (2, 3, 4) if row.get(f"recovered_layer{n}")]
    total = f"{row['recovered']} of {row['groups_in_all']}"
    line = [f"{row['mode']:<11}", f"{row['seed']:>4}", f"{total:>10}", *stages, f"{float(row['chance']):8.1%}"]
    print(*line, f"{float(row['seconds']):7.0f} s", "(there)" if old else "", sep="  ", flush=True)
    for miss in str(row["misses"]).split("; "):
        if miss:
            print("   ", miss, flush=True)


# --- the command ------------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--images", type=Path, required=True, metavar="FOLDER", help="all jpg and png files below it are used")
    add("--model", default="resnet18", help="a timm ResNet")
    add("--weights", metavar="FOLDER", help="the teacher's: a timm model's folder; without it random ones")
    add("--mode", nargs="+", choices=MODES, default=[*MODES], help="of the search")
    add("--seed", nargs="+", type=int, default=[0], help="of the genotype, the crops and the search")
    add("--space", default="C", help="A, B, C or a YAML file")
    add("--groups", type=positive, default=16, help="groups per convolution")
    add("--norm", choices=("live", "calibrated"), default="live", help="batch statistics, or measured and frozen ones")
    add("--at", choices=("layers", "blocks"), default="layers", help="whose outputs the loss compares")
    add("--train-kernels", action="store_true", help="train the searched kernels too (not in sensitivity mode)")
    add("--crop", type=positive, default=480, metavar="PIXELS", help="side of the crops")
    add("--batch", type=positive, default=2, help="crops per step")
    add("--steps", type=positive, default=60, help="of alpha")
    add("--lr", type=float, default=0.1, help="of alpha's Adam")
    add("--kernel-lr", type=float, default=1e-4, help="of the kernels' Adam")
    add("--calibrate-every", type=positive, default=20, metavar="STEPS", help="with --norm calibrated")
    add("--calibration-batches", type=positive, default=8, help="with --norm calibrated")
    add("--score-batches", type=positive, default=4, help="in sensitivity mode")
    add("--held-back-batches", type=positive, default=2, help="in sensitivity mode")
    add("--rounds", type=positive, default=100, help="most rounds of scoring in sensitivity mode")
    add("--precision", choices=("no", "bf16"), default="no", help="mixed precision")
    add("--device", default="cpu", help="cpu, cuda, cuda:1")
    add("--threads", type=positive, help="CPU threads; without it torch's own choice")
    add("--csv", type=Path, metavar="FILE", help="also write the rows there, and skip those that are there")
    return parser.parse_args(argv)


def check_crop(args: argparse.Namespace) -> None:
    """Refuse crops whose maps are too small.

    Raises:
        NatsError: says how large they must be.
    """
    least = least_side(find_space(args.space))
    if args.crop < least:
        rule = f"{LEAST_SIDES} times the largest dilation times the stride of its stage"
        raise NatsError(f"--crop {args.crop}: expected at least {least}, {rule}")


def run(args: argparse.Namespace) -> None:
    """Measure all seeds and modes that are not there yet."""
    check_crop(args)
    rows = read_rows(args.csv)
    print(f"{device_name(args.device)}, {torch.get_num_threads()} threads, {args.precision}, torch {torch.__version__}")
    print("mode         seed   recovered     layer2     layer3     layer4    chance       time")
    for seed in args.seed:
        for mode in args.mode:
            settings = describe(mode, seed, args)
            found = find_row(rows, settings)
            if found is None:
                row = settings | measure(mode, seed, args) | machine(args)
                rows.append(row)
                if args.csv:
                    write_csv(rows, args.csv)
            print_row(found or row, old=found is not None)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for, print the table and write the CSV file; returns the exit code."""
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        run(args)
    except NatsError as error:
        print(f"planted: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
