"""Plain, control and searched networks, trained equally in several blocks: does the search beat what costs nothing?

A block has one search seed, one random draw, one shuffle and one training seed, all functions of its number. In a block
every arm is trained by the same recipe from the same weights, its batch norms recalibrated on the same images, and is
evaluated with its last weights, never the best. Arms:

    plain           the untransformed network
    uniform_HxW     one dilation, HEIGHTxWIDTH, in all searched convolutions: headroom
    random          each group draws any candidate of the search's space
    shares          hand-set shares of each stage's groups (--shares)
    path            a search with one group per convolution
    searched        a search; searched:MODE in another mode than the search's recipe has
    shuffled        the block's searched genotype, its groups permuted; shuffled:MODE where there are several searches
    file:PATH       a genotype file

The output folder receives, for each size, block and arm, the run with its genotype and log, and results.csv, report.md
and study.png, which cover everything the folder holds. The same command again goes on where it stopped, also with more
arms, blocks or sizes, or the transposed data set; another recipe is refused. Every run is a process of its own; one
that outlives a killed study is waited for. Runs on POSIX systems.

    python benchmarks/study.py --train-config recipes/neu_det_resnet18_train.yaml \
        --search-config recipes/neu_det_resnet18_search.yaml --data data/neu-det --weights weights/resnet18.tin_64 \
        --backbone resnet18 --arms plain uniform_2x2 random searched shuffled --blocks 8 --output runs/study
"""

import argparse
import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import study_report
import yaml
from common import positive
from jsonargparse import ArgumentError, ArgumentParser
from tqdm import tqdm

from nats_zoo import Genotype, NatsError
from nats_zoo.base.errors import one_line
from nats_zoo.base.files import read_json, write_json
from nats_zoo.detection import TrainConfig
from nats_zoo.detection.runs.folder import FREE_OPTIONS
from nats_zoo.folders.find_genotype import find_genotype
from nats_zoo.genotype.runs import Dilation
from nats_zoo.search import SearchConfig, controls

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
POLL_SECONDS = 0.2
ARM_KINDS = ("plain", "uniform_HxW", "random", "shares", "path", "searched", "shuffled", "file:PATH")


# --- what is asked for ------------------------------------------------------------------------------------------------


class Arm(NamedTuple):
    """One arm: its kind, and what follows in its name (a dilation, a mode, a path)."""

    kind: str
    detail: str = ""

    @property
    def name(self) -> str:
        separator = "_" if self.kind == "uniform" else ":"
        return self.kind + (separator + self.detail if self.detail else "")

    @property
    def folder(self) -> str:
        return re.sub(r"[^\w.]+", "-", self.name).strip("-")


PLAIN_ARM = Arm("plain")


def parse_arm(text: str) -> Arm:
    """The arm of a name.

    Raises:
        NatsError: no such arm.
    """
    kind, separator, detail = text.partition("_" if text.startswith("uniform") else ":")
    takes = {"uniform": True, "file": True, "searched": None, "shuffled": None}.get(kind, False)
    known = kind in ("plain", "random", "shares", "path", "uniform", "searched", "shuffled", "file")
    if not known or bool(separator) != bool(detail) or (takes is not None and takes != bool(detail)):
        raise NatsError(f"arms: {text}: expected {', '.join(ARM_KINDS)}")
    if kind == "uniform":
        Dilation.parse(detail)
    if kind == "file":
        find_genotype(detail)
    return Arm(kind, detail)


class Variant(NamedTuple):
    """What the blocks are repeated for: the size of the images, and the data set or its transposed twin."""

    min_size: int
    max_size: int
    transposed: bool

    @property
    def folder(self) -> str:
        return f"{self.min_size}x{self.max_size}{'_transposed' if self.transposed else ''}"

    @property
    def options(self) -> dict[str, Any]:
        sizes = {"min_size": self.min_size, "max_size": self.max_size}
        return {**sizes, "transpose": True} if self.transposed else sizes


@dataclass(frozen=True)
class Study:
    """Everything the command line asks for, checked."""

    output: Path
    train: Mapping[str, Any]
    search: Mapping[str, Any]
    arms: tuple[Arm, ...]
    blocks: int
    variants: tuple[Variant, ...]
    seed: int = 0
    shares: Mapping[int, Mapping[str, float]] | None = None
    keep: str = "model"
    search_modes: Mapping[Arm, str] = field(default_factory=dict)

    def seed_of(self, block: int) -> int:
        """Of the block's search, draw, shuffle and training."""
        return self.seed + block

    def searchable(self) -> controls.Searchable:
        """What the searches search; the controls draw from the same."""
        config = SearchConfig(**self.search, output="")
        size = {"groups": config.groups, "channels_per_group": config.channels_per_group}
        chosen = {"space": config.space, "convs": config.convs, "basic_block": config.basic_block}
        return controls.Searchable(config.backbone, **size, **chosen)

    def recipe(self) -> dict[str, Any]:
        """What may not change while a study goes on."""
        searched = {str(stage): dict(row) for stage, row in self.shares.items()} if self.shares else None
        free = FREE_OPTIONS - {"data"}
        return {
            "train": {key: value for key, value in self.train.items() if key not in free},
            "search": {key: value for key, value in self.search.items() if key not in free},
            "seed": self.seed,
            "shares": searched,
        }


def read_options(config_class: type, path: str | None, fixed: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's options, only those given, with `fixed` ones in their place.

    Raises:
        NatsError: a file that can not be read, or an option that the command does not have or take.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(config_class, as_group=False)
    arguments = [f"--{key}={json.dumps(value) if value is None else value}" for key, value in fixed.items()]
    config = [] if path is None else ["--config", path]
    try:
        given = parser.parse_args([*config, *arguments, "--output=unused"], defaults=False).as_dict()
    except ArgumentError as error:
        raise NatsError(f"{path or config_class.__name__}: {one_line(error)}") from error
    given = {key: value for key, value in given.items() if key not in ("config", "output", "resume", "seed")}
    config_class(**given, output="")  # refuses what does not go together
    return json.loads(json.dumps(given))


def plan_study(args: argparse.Namespace) -> Study:
    """Check the command line.

    Raises:
        NatsError: what can not be used, named.
    """
    data = Path(args.data)
    if not data.is_dir():
        raise NatsError(f"data: {args.data}: no such folder")
    weights = str(Path(args.weights).resolve()) if Path(args.weights).exists() else args.weights
    common = {"data": str(data.resolve()), "weights": weights, "backbone": args.backbone}
    train = read_options(TrainConfig, args.train_config, common)
    train |= {"val_split": args.eval_split, "eval_every": TrainConfig(**train, output="").epochs}
    mode = {} if args.search_mode is None else {"mode": args.search_mode}
    search = read_options(SearchConfig, args.search_config, {**common, **mode})
    arms = tuple(dict.fromkeys(map(parse_arm, args.arms)))
    modes = _search_modes(arms, search)
    for each in set(modes.values()):
        read_options(SearchConfig, args.search_config, {**common, "mode": each})
    _check_recipe(train, arms, args.shares)
    study = Study(
        output=Path(args.output).resolve(),
        train=train,
        search=search,
        arms=arms,
        blocks=args.blocks,
        variants=_variants(train, args),
        seed=args.seed,
        shares=_read_shares(args.shares),
        keep=args.keep,
        search_modes=modes,
    )
    _check_arms(study)
    return study


def _check_recipe(train: Mapping[str, Any], arms: Sequence[Arm], shares: str | None) -> None:
    config = TrainConfig(**train, output="")
    if config.calibration_images == 0 and config.norm != "live":
        raise NatsError("calibration_images: a fair comparison recalibrates batch norms in every arm, 0 does not")
    if config.genotype is not None:
        raise NatsError("genotype: the arms say what is trained, expected none in the training's recipe")
    if (Arm("shares") in arms) != (shares is not None):
        raise NatsError("shares: expected both the arm and the option --shares, or neither")


def _read_shares(text: str | None) -> dict[int, dict[str, float]] | None:
    if text is None:
        return None
    try:
        data = yaml.safe_load(Path(text).read_text(encoding="utf-8") if Path(text).is_file() else text)
    except yaml.YAMLError as error:
        raise NatsError(f"shares: not YAML: {one_line(error)}") from error
    controls.parse_shares(data)
    return data


def _variants(train: Mapping[str, Any], args: argparse.Namespace) -> tuple[Variant, ...]:
    config = TrainConfig(**train, output="")
    sizes = [(size, size) for size in args.sizes] if args.sizes else [(config.min_size, config.max_size)]
    return tuple(Variant(*size, args.transpose) for size in dict.fromkeys(sizes))


def _search_modes(arms: Sequence[Arm], search: Mapping[str, Any]) -> dict[Arm, str]:
    """The mode of the search from which each arm's genotype comes, of the arms that have one."""
    default = SearchConfig(**search, output="").mode
    modes = {arm: arm.detail or default for arm in arms if arm.kind in ("searched", "path")}
    searched = {mode for arm, mode in modes.items() if arm.kind == "searched"}
    for arm in arms:
        if arm.kind == "shuffled" and not arm.detail and len(searched) > 1:
            raise NatsError("arms: shuffled: there are several searches, expected shuffled:MODE")
        if arm.kind == "shuffled":
            modes[arm] = arm.detail or next(iter(searched), default)
    return modes


def _check_arms(study: Study) -> None:
    """Make each control genotype once, and each search's options: what is wrong with them shows before any run."""
    folders = [arm.folder for arm in study.arms]
    twice = [folder for folder in folders if folders.count(folder) > 1]
    if twice:
        raise NatsError(f"arms: two arms would share the folder {twice[0]}")
    for arm, mode in study.search_modes.items():
        SearchConfig(**_search_options(study, arm.kind == "path", mode), output="")
    for arm in study.arms:
        if arm not in study.search_modes:
            control_genotype(study, arm, 0)


def _search_options(study: Study, is_path: bool, mode: str) -> dict[str, Any]:
    single = {"groups": 1, "channels_per_group": None} if is_path else {}
    return {**study.search, "mode": mode, **single}


def control_genotype(study: Study, arm: Arm, block: int) -> Genotype:
    """The genotype of an arm without a search; the plain network's names no convolution."""
    seed = study.seed_of(block)
    if arm.kind == "plain":
        return Genotype(study.searchable().architecture, {})
    if arm.kind == "file":
        return find_genotype(arm.detail)
    if arm.kind == "uniform":
        return controls.uniform(study.searchable(), Dilation.parse(arm.detail))
    if arm.kind == "random":
        return controls.random(study.searchable(), seed)
    return controls.shares(study.searchable(), controls.parse_shares(study.shares), seed)


def begin_folder(study: Study) -> None:
    """Write the recipe into the study's folder, or see that it is the one that is there.

    Raises:
        NatsError: a folder that holds another recipe or something else.
    """
    path, recipe = study.output / "study.json", json.loads(json.dumps(study.recipe()))
    if path.is_file():
        _compare(path, read_json(path), recipe)
        return
    if study.output.exists() and (not study.output.is_dir() or any(study.output.iterdir())):
        raise NatsError(f"{study.output}: not a study's folder (no study.json in it) and not empty; choose another")
    study.output.mkdir(parents=True, exist_ok=True)
    write_json(path, recipe)


def _compare(path: Path, before: Any, now: Mapping[str, Any]) -> None:
    before, now = _flat(before), _flat(now)
    for key in sorted(before.keys() | now.keys()):
        was, wanted = before.get(key), now.get(key)
        if key == "shares" and None in (was, wanted):
            continue  # the arm may come later
        if was != wanted:
            raise NatsError(f"{path}: the study was begun with {key}={was!r} and can not go on with {wanted!r}")


def _flat(recipe: Any) -> dict[str, Any]:
    if not isinstance(recipe, Mapping):
        return {}
    nested = {f"{part}.{key}": value for part in ("train", "search") for key, value in recipe.get(part, {}).items()}
    return {**nested, "seed": recipe.get("seed"), "shares": recipe.get("shares")}


# --- runs -------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Task(ABC):
    """One run: a search, or the training of an arm. `done.json` in its folder says that it is finished."""

    study: Study
    variant: Variant
    block: int
    needs: tuple["Task", ...] = ()

    command = ""  # of `nats`
    process: subprocess.Popen | None = None
    began: float = 0.0
    was_begun: bool = False  # by an earlier study: how long it took is then not known

    @property
    @abstractmethod
    def own_name(self) -> str:
        """The folder's own name, in that of the variant and the block."""

    @property
    def folder(self) -> Path:
        return self.study.output / self.variant.folder / f"block_{self.block:02}" / self.own_name

    @property
    def label(self) -> str:
        return f"{self.variant.folder}, block {self.block}, {self.own_name}"

    @property
    def is_done(self) -> bool:
        return (self.folder / "done.json").is_file()

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """The run's options, apart from those that all runs have."""

    def facts(self) -> dict[str, Any]:
        """What done.json says beside the seconds."""
        return {}

    def start(self, threads: int) -> bool:
        """Start the process; False if one of an earlier, killed study is at it still."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return False
        try:
            self._write_config()
            self._spawn(lock, threads)
        finally:
            os.close(lock)  # the process holds it as long as it lives
        return True

    def _write_config(self) -> None:
        seed = self.study.seed_of(self.block)
        output = str(self.folder / "run")
        options = {**self.options(), **self.variant.options, "seed": seed, "output": output, "resume": True}
        write_json(self.folder / "config.yaml", options)  # JSON is YAML

    def _spawn(self, lock: int, threads: int) -> None:
        self.began = time.monotonic()
        self.was_begun = (self.folder / "run" / "run.json").is_file()
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-m", "nats_zoo", self.command, "--config", str(self.folder / "config.yaml")]
        with (self.folder / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                pass_fds=(lock,),
                start_new_session=True,  # Ctrl-C reaches the study alone, which then asks each run once
            )
        os.truncate(lock, 0)
        os.write(lock, f"{self.process.pid}\n".encode())

    def finish(self) -> str | None:
        """Write done.json of a process that ended well; returns what went wrong, if it did not."""
        if self.process.returncode != 0:
            return f"exit code {self.process.returncode}: {_last_line(self.folder / 'log.txt')}"
        seconds = None if self.was_begun else round(time.monotonic() - self.began, 1)
        write_json(self.folder / "done.json", {"seconds": seconds, **self.facts()})
        self.tidy()
        return None

    def tidy(self) -> None:
        """Remove what a finished run does not need."""
        if self.study.keep != "all":
            shutil.rmtree(self.folder / "run" / "checkpoints", ignore_errors=True)


@dataclass(eq=False)
class SearchTask(Task):
    """A block's search in one mode, or with one group per convolution."""

    mode: str = ""
    is_path: bool = False

    command = "search"

    @property
    def own_name(self) -> str:
        return f"search-{'path-' if self.is_path else ''}{self.mode}"

    def options(self) -> dict[str, Any]:
        return _search_options(self.study, self.is_path, self.mode)

    def genotype(self) -> Genotype:
        """What it found."""
        return Genotype.load(self.folder / "run" / "genotype.json")


@dataclass(eq=False)
class TrainTask(Task):
    """Training and evaluation of one arm."""

    arm: Arm = PLAIN_ARM

    command = "train"

    @property
    def own_name(self) -> str:
        return self.arm.folder

    def options(self) -> dict[str, Any]:
        path = self.folder / "genotype.json"
        self._genotype().save(path)
        is_plain = self.arm.kind == "plain"  # then the file is for the report only: timm's own network is trained
        return dict(self.study.train) if is_plain else {**self.study.train, "genotype": str(path)}

    def _genotype(self) -> Genotype:
        if not self.needs:
            return control_genotype(self.study, self.arm, self.block)
        found = self.needs[0].genotype()
        return controls.shuffled(found, self.study.seed_of(self.block)) if self.arm.kind == "shuffled" else found

    def facts(self) -> dict[str, Any]:
        return {
            "arm": self.arm.name,
            "block": self.block,
            "min_size": self.variant.min_size,
            "max_size": self.variant.max_size,
            "transposed": self.variant.transposed,
            "metrics": read_json(self.folder / "run" / "metrics.json"),
        }

    def tidy(self) -> None:
        super().tidy()
        if self.study.keep != "all":
            shutil.rmtree(self.folder / "run" / "best", ignore_errors=True)
        if self.study.keep == "none":
            shutil.rmtree(self.folder / "run" / "model", ignore_errors=True)


def _last_line(path: Path) -> str:
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    lines = [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]
    return lines[-1] if lines else "no output"


def plan_tasks(study: Study) -> list[Task]:
    """All runs in the order in which they are begun: block by block, in a block the searches first."""
    tasks: list[Task] = []
    for block in range(study.blocks):
        for variant in study.variants:
            searches: dict[tuple[str, bool], SearchTask] = {}
            for arm, mode in study.search_modes.items():
                key = (mode, arm.kind == "path")
                searches.setdefault(key, SearchTask(study, variant, block, mode=mode, is_path=key[1]))
            tasks += searches.values()
            for arm in study.arms:
                found = searches.get((study.search_modes.get(arm, ""), arm.kind == "path"))
                tasks.append(TrainTask(study, variant, block, (found,) if found else (), arm=arm))
    return tasks


class Runner:
    """Runs tasks, several at once, each as soon as what it needs is done.

    Args:
        tasks: in the order of preference.
        jobs: how many at once.
        threads: of each.
    """

    def __init__(self, tasks: Sequence[Task], jobs: int, threads: int):
        self.jobs, self.threads = jobs, threads
        self.waiting = [task for task in tasks if not task.is_done]
        self.running: list[Task] = []
        self.failures: dict[str, str] = {}
        self.bar = tqdm(total=len(tasks), initial=len(tasks) - len(self.waiting), desc="study", unit="run")

    def run(self) -> dict[str, str]:
        """Run all; returns what went wrong, by run. On Ctrl-C and SIGTERM the runs are asked to stop and waited for."""
        try:
            with self.bar:
                while self.waiting or self.running:
                    self._start_ready()
                    self._collect()
                    time.sleep(POLL_SECONDS)
        except BaseException:
            self._stop()
            raise
        return self.failures

    def _start_ready(self) -> None:
        held = 0  # by processes of an earlier study
        for task in list(self.waiting):
            if len(self.running) + held >= self.jobs:
                return
            broken = [need.label for need in task.needs if need.label in self.failures]
            if broken:
                self._end(task, f"needs {broken[0]}")
            elif all(need.is_done for need in task.needs):
                if task.start(self.threads):
                    self.waiting.remove(task)
                    self.running.append(task)
                else:
                    held += 1

    def _collect(self) -> None:
        for task in list(self.running):
            if task.process.poll() is not None:
                self.running.remove(task)
                self._end(task, task.finish())

    def _end(self, task: Task, problem: str | None) -> None:
        if task in self.waiting:
            self.waiting.remove(task)
        if problem:
            self.failures[task.label] = problem
        self.bar.update()
        self.bar.write(f"{task.label}: {problem or 'done'}", file=sys.stderr)
        study_report.write_results(task.study.output)

    def _stop(self) -> None:
        for task in self.running:
            task.process.send_signal(signal.SIGTERM)
        for task in self.running:
            task.process.wait()


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Refuse a second study in the same folder at the same time."""
    with (folder / "study.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise NatsError(f"{folder}: a study is running there") from error
        yield


# --- the command ------------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0],
        epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--output", required=True, help="folder of the study")
    add("--train-config", metavar="YAML", help="recipe of nats train, for all arms")
    add(
        "--search-config", metavar="YAML", help="recipe of nats search; random and shares take space and groups from it"
    )
    add("--data", help="folder of a COCO-layout data set")
    add("--weights", default="pretrained", help="the backbone's weights, as for nats train")
    add("--backbone", help="timm name of the plain network")
    add("--arms", nargs="+", default=["plain", "random", "searched"], metavar="ARM", help="see below")
    add("--blocks", type=positive, default=study_report.ENOUGH_BLOCKS, help="how many; 8 or more conclude something")
    add("--eval-split", default="val", help="split on which the last weights are evaluated")
    add("--search-mode", help="instead of the search recipe's mode")
    add("--shares", metavar="YAML", help="of the arm shares: a file, or text such as '{3: {1x1: 0.5, 1x3: 0.5}}'")
    add("--sizes", nargs="+", type=positive, metavar="PIXELS", help="square input sizes; default: the recipe's")
    add("--transpose", action="store_true", help="run on the data set's transposed twin, in the same folder")
    add("--seed", type=int, default=0, help="of block 0; the others follow")
    add("--jobs", type=positive, default=1, help="runs at once")
    add("--threads", type=positive, help="CPU threads of each run; default: the machine's, shared among the jobs")
    add("--keep", choices=("none", "model", "all"), default="model", help="weights kept of finished runs")
    add("--report-only", action="store_true", help="report what the folder holds, and run nothing")
    args = parser.parse_args(argv)
    missing = [name for name in ("train_config", "search_config", "data", "backbone") if getattr(args, name) is None]
    if missing and not args.report_only:
        parser.error(f"--{missing[0].replace('_', '-')} is missing")
    return args


def run_study(args: argparse.Namespace) -> dict[str, str]:
    """Run what is not done yet; returns what went wrong, by run."""
    study = plan_study(args)
    begin_folder(study)
    threads = args.threads or max(1, (os.cpu_count() or 1) // args.jobs)
    with only_one(study.output), sigterm_interrupts():
        return Runner(plan_tasks(study), args.jobs, threads).run()


def main(argv: Sequence[str] | None = None) -> int:
    """Run or report; returns the exit code: 0, 1 for failed runs, 2 for bad input, 130 when interrupted."""
    args = parse_args(argv)
    failures: dict[str, str] = {}
    try:
        if not args.report_only:
            failures = run_study(args)
        print(study_report.report(Path(args.output)))
    except (NatsError, OSError) as error:
        print(f"study: {one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("study: stopped; the same command goes on from there", file=sys.stderr)
        return INTERRUPTED
    for label, problem in failures.items():
        print(f"study: {label}: {problem}", file=sys.stderr)
    return FAILED if failures else 0


if __name__ == "__main__":
    sys.exit(main())
