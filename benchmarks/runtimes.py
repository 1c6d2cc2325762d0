"""CPU time of exported NATS backbones in ONNX Runtime and OpenVINO against their plain twins, in float32 and int8.

Each network is written as `nats export` writes it and opened in one runtime:

    as it is   as it trains
    deploy     the deployment form, timm.utils.reparameterize_model, in which narrow dilations are computed together
    separate   the deployment form with a convolution for each dilation

All of them take turns in one run, on one image; the ratio to the plain network is taken per round, of the process's
CPU time, so that other work on the machine disturbs it least. `difference` is how far a network's maps are from
torch's, the root mean square relative to the map's own, the worst of the four maps: in float32 a large one ends the
run, in int8 the plain network's is what to compare it with.

The int8 networks are quantised by the runtimes' own tools, onnxruntime.quantization and NNCF, on a few drawn images.
The weights are random and batch norms measured on these images, which changes no time.

    pip install 'nats-zoo[runtimes]'
    python benchmarks/runtimes.py --threads 1 --size 512x512 --csv runtimes.csv
    python benchmarks/runtimes.py --threads 1 --profile   # which operators the time goes to
"""

import argparse
import itertools
import json
import logging
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from common import height_x_width, positive, write_csv
from latency import choose_genotype, plain_name, summarise
from torch import Tensor, nn
from torchvision.io import decode_image
from tqdm import tqdm

import nats_zoo
from nats_zoo import NatsError, recalibrate_bn
from nats_zoo.detection.data.drawn import draw_dataset
from nats_zoo.networks.deploy import Form, in_form
from nats_zoo.networks.export import INPUT_NAME, export
from nats_zoo.search.choosing.profile import device_name

GOALS = {"default": 1.03, "uniform": 1.05}
PRECISIONS = ("float32", "int8")
FORMS: tuple[Form, ...] = ("as it is", "deploy", "separate")
MAX_DIFFERENCE = 1e-4  # in float32
IMAGES = 4  # to measure batch norms and to quantise
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Session = Callable[[np.ndarray], Sequence[np.ndarray]]


# --- the runtimes -----------------------------------------------------------------------------------------------------


class OnnxRuntime:
    """ONNX Runtime on a CPU."""

    packages = ("onnxruntime",)

    def open(self, path: Path, threads: int) -> Session:
        """A function of one batch, (N, 3, H, W), that returns the maps."""
        session = self._session(path, threads)
        return lambda images: session.run(None, {INPUT_NAME: images})

    def quantise(self, path: Path, target: Path, images: np.ndarray) -> None:
        """Write the int8 network, calibrated on the images one by one."""
        from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Reader(CalibrationDataReader):
            left = iter(images)

            def get_next(self) -> dict[str, np.ndarray] | None:
                image = next(self.left, None)
                return None if image is None else {INPUT_NAME: image[None]}

        prepared = target.with_suffix(".prepared.onnx")
        logging.disable(logging.WARNING)
        quant_pre_process(path, prepared, skip_symbolic_shape=True)  # folds batch norms
        # On x64 signed activations stay float32 in part. Without VNNI, products of 8 times 8 bits overflow 16 bits.
        options = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "reduce_range": True}
        quantize_static(prepared, target, Reader(), per_channel=True, **options)
        logging.disable(logging.NOTSET)

    def profile(self, path: Path, threads: int, images: np.ndarray, repeats: int) -> dict[str, float]:
        """Milliseconds per pass in each kind of operator."""
        session = self._session(path, threads, profile=str(path.with_suffix("")))
        for _ in range(repeats):
            session.run(None, {INPUT_NAME: images})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        spent: dict[str, float] = defaultdict(float)
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                spent[event["args"]["op_name"]] += event["dur"] / 1000 / repeats
        return spent

    def _session(self, path: Path, threads: int, profile: str | None = None) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting would count as work
        if profile:
            options.enable_profiling, options.profile_file_prefix = True, profile
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class OpenVino:
    """OpenVINO on a CPU."""

    packages = ("openvino", "nncf")

    def open(self, path: Path, threads: int) -> Session:
        """A function of one batch, (N, 3, H, W), that returns the maps."""
        compiled = self._compile(path, threads)
        return lambda images: list(compiled(images).values())

    def quantise(self, path: Path, target: Path, images: np.ndarray) -> None:
        """Write the int8 network, calibrated on the images one by one."""
        import nncf
        import openvino

        nncf.set_log_level(logging.ERROR)
        network = openvino.Core().read_model(path)
        data = nncf.Dataset([image[None] for image in images])
        openvino.save_model(nncf.quantize(network, data, subset_size=len(images)), target, compress_to_fp16=False)

    def profile(self, path: Path, threads: int, images: np.ndarray, repeats: int) -> dict[str, float]:
        """Milliseconds per pass in each kind of operator."""
        request = self._compile(path, threads, PERF_COUNT=True).create_infer_request()
        spent: dict[str, float] = defaultdict(float)
        for _ in range(repeats):
            request.infer(images)
            for node in request.get_profiling_info():
                spent[node.node_type] += node.real_time.total_seconds() * 1000 / repeats
        return spent

    def _compile(self, path: Path, threads: int, **options: Any) -> Any:
        import openvino

        # Some processors would run float32 as bfloat16.
        options |= {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        return openvino.Core().compile_model(path, "CPU", options)


RUNTIMES = {"onnxruntime": OnnxRuntime(), "openvino": OpenVino()}
SUFFIXES = {"onnxruntime": ".onnx", "openvino": ".xml"}  # of int8 networks


# --- the networks -----------------------------------------------------------------------------------------------------


class Network(NamedTuple):
    """One of those that take turns: a genotype's name, or `plain`, in a form."""

    genotype: str
    form: str

    @property
    def label(self) -> str:
        return self.genotype if self.form == "as it is" else f"{self.genotype}, {self.form}"


class Exported(NamedTuple):
    """A network's file, what torch's maps of the test image are, and the genotype's fingerprint."""

    path: Path
    maps: list[np.ndarray]
    fingerprint: str


def draw_images(count: int, size: tuple[int, int], seed: int) -> Tensor:
    """Normalised drawn images, (count, 3, H, W)."""
    side = min(size)
    with tempfile.TemporaryDirectory() as folder:
        root = draw_dataset(Path(folder) / "drawn", train=count, val=1, test=1, size=side, seed=seed)
        found = sorted((root / "images").iterdir())[:count]
        images = torch.stack([decode_image(str(path), "RGB") for path in found]).float() / 255
    images = nn.functional.interpolate(images, size, mode="bilinear")
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@torch.inference_mode()
def export_networks(args: argparse.Namespace, images: Tensor, folder: Path) -> Iterator[tuple[Network, Exported]]:
    """Write the plain network and each genotype's, in both forms."""
    # zero_init_last would zero every residual branch, and with it the difference between right and wrong dilations
    options: dict[str, Any] = dict(features_only=True, out_indices=(1, 2, 3, 4), zero_init_last=False)
    torch.manual_seed(args.seed)
    plain = timm.create_model(plain_name(args.model), **options)
    for name in ("plain", *args.genotype):
        genotype = None if name == "plain" else choose_genotype(name, args.model, args.seed)
        model = plain if genotype is None else timm.create_model(args.model, genotype=genotype, **options)
        model.load_state_dict(plain.state_dict())
        recalibrate_bn(model, images.split(2)).eval()
        for form in ("as it is",) if genotype is None else args.form:
            network = in_form(model, form)
            path = folder / f"{name}_{form.replace(' ', '_')}.onnx"
            export(network, path, "onnx", size=images.shape[-2:], dynamic=not args.fixed)
            maps = [y.numpy() for y in network(images[:1])]
            yield Network(name, form), Exported(path, maps, genotype.fingerprint()[:12] if genotype else "")


def difference(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """The worst map's root mean square of the difference, relative to its own."""
    pairs = zip(found, expected, strict=True)
    return max(float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2))) for a, b in pairs)


# --- measuring --------------------------------------------------------------------------------------------------------


def time_sessions(
    sessions: Mapping[Network, Session], images: np.ndarray, repeats: int, warmup: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """CPU and wall-clock milliseconds per pass, one entry per round, by label."""
    cpu: dict[str, list[float]] = {network.label: [] for network in sessions}
    wall: dict[str, list[float]] = {network.label: [] for network in sessions}
    for done in tqdm(range(warmup + repeats), desc="rounds", leave=False, disable=None):
        for network, run in sessions.items():
            started = time.process_time(), time.perf_counter()
            run(images)
            spent = 1000 * (time.process_time() - started[0]), 1000 * (time.perf_counter() - started[1])
            if done >= warmup:
                cpu[network.label].append(spent[0])
                wall[network.label].append(spent[1])
    return cpu, wall


def measure(args: argparse.Namespace, size: tuple[int, int], add: Callable[[list[dict[str, Any]]], None]) -> None:
    """Export the networks for images of one size, and time them in each runtime, precision and number of threads."""
    images = draw_images(IMAGES, size, args.seed)
    with tempfile.TemporaryDirectory(prefix="nats_runtimes_") as name:
        exported = dict(export_networks(args, images, Path(name)))
        for precision, runtime in itertools.product(args.precision, args.runtime):
            files = {network: each.path for network, each in exported.items()}
            if precision == "int8":
                for network, path in files.items():
                    files[network] = path.with_suffix(f".int8{SUFFIXES[runtime]}")
                    RUNTIMES[runtime].quantise(path, files[network], images.numpy())
            for threads in args.threads:
                facts = describe_run(args, runtime, precision, threads, size)
                if args.profile:
                    print_profile(RUNTIMES[runtime], files, threads, images[:1].numpy(), args.repeats, facts)
                else:
                    add(_time_files(args, RUNTIMES[runtime], files, exported, images[:1].numpy(), facts))


def _time_files(
    args: argparse.Namespace,
    runtime: OnnxRuntime | OpenVino,
    files: Mapping[Network, Path],
    exported: Mapping[Network, Exported],
    image: np.ndarray,
    facts: Mapping[str, Any],
) -> list[dict[str, Any]]:
    sessions = {network: runtime.open(path, facts["threads"]) for network, path in files.items()}
    off = {network: difference(run(image), exported[network].maps) for network, run in sessions.items()}
    for network, found in off.items():
        if facts["precision"] == "float32" and not found <= MAX_DIFFERENCE:
            raise NatsError(f"{facts['runtime']}: {network.label}: its maps are off by {found:.1e}")
    cpu, wall = time_sessions(sessions, image, args.repeats, args.warmup)
    walls = {row["network"]: row["median_ms"] for row in summarise(wall)}
    rows = []
    for network, row in zip(sessions, summarise(cpu), strict=True):
        figures = {"cpu_ms": row["median_ms"], "wall_ms": walls[network.label]}
        figures |= {key: row[key] for key in ("ratio", "ratio_q1", "ratio_q3")} | {"difference": off[network]}
        named = network._asdict() | {"fingerprint": exported[network].fingerprint}
        rows.append({"runtime": facts["runtime"], "precision": facts["precision"], **named, **figures, **facts})
    return rows


def describe_run(
    args: argparse.Namespace, runtime: str, precision: str, threads: int, size: tuple[int, int]
) -> dict[str, Any]:
    """The flags, the device's name and the versions that a time depends on."""
    facts = {"runtime": runtime, "precision": precision, "threads": threads, "size": f"{size[0]}x{size[1]}"}
    facts |= {key: getattr(args, key) for key in ("model", "fixed", "repeats", "warmup", "seed")}
    versions = {"runtime_version": " ".join(f"{name} {version(name)}" for name in RUNTIMES[runtime].packages)}
    versions |= {"torch": torch.__version__, "timm": timm.__version__, "nats_zoo": nats_zoo.__version__}
    return facts | {"device_name": device_name("cpu")} | versions


# --- results ----------------------------------------------------------------------------------------------------------

COLUMNS = ("runtime", "precision", "threads", "size", "network", "CPU ms", "ratio to plain", "difference")


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print one line per network, in the order of COLUMNS."""
    for row in rows:
        line = [f"{row['runtime']:<11}", f"{row['precision']:<9}", f"{row['threads']:7}", f"{row['size']:<8}"]
        line += [f"{Network(row['genotype'], row['form']).label:<16}", f"{row['cpu_ms']:8.1f}"]
        line += [f"{row['ratio']:.3f} ({row['ratio_q1']:.3f} to {row['ratio_q3']:.3f})", f"{row['difference']:.1e}"]
        print("  ".join(line), flush=True)


def goal_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each measurement with a goal: the better form, and whether it is as fast as it should be."""
    best: dict[tuple, Mapping[str, Any]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("runtime", "precision", "threads", "size", "genotype"))
        if row["genotype"] in GOALS and (key not in best or row["ratio"] < best[key]["ratio"]):
            best[key] = row
    return [
        f"{' '.join(map(str, key))}: {row['ratio']:.3f} {row['form']}, goal {GOALS[row['genotype']]}: "
        + ("met" if row["ratio"] <= GOALS[row["genotype"]] else "missed")
        for key, row in best.items()
    ]


def print_profile(
    runtime: OnnxRuntime | OpenVino,
    files: Mapping[Network, Path],
    threads: int,
    image: np.ndarray,
    repeats: int,
    facts: Mapping[str, Any],
) -> None:
    """Print the milliseconds per pass in each kind of operator, a column per network."""
    spent = {network.label: runtime.profile(path, threads, image, repeats) for network, path in files.items()}
    print(*(facts[key] for key in ("runtime", "precision", "threads", "size")))
    print(f"{'operator':<24}", *(f"{label:>16}" for label in spent))
    kinds = {kind for each in spent.values() for kind in each}
    for kind in sorted(kinds, key=lambda kind: -max(each.get(kind, 0.0) for each in spent.values())):
        if max(each.get(kind, 0.0) for each in spent.values()) >= 0.05:
            print(f"{kind:<24}", *(f"{each.get(kind, 0.0):16.2f}" for each in spent.values()))
    print(f"{'all':<24}", *(f"{sum(each.values()):16.2f}" for each in spent.values()), flush=True)


# --- the command ------------------------------------------------------------------------------------------------------


def threads_or_all(text: str) -> int:
    """An option's number of threads, or `all` of the machine's."""
    return os.cpu_count() or 1 if text == "all" else positive(text)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="nats_resnet50", help="a nats_* variant; its twin is the name without nats_")
    add("--genotype", nargs="+", default=["default", "uniform"], metavar="NAME", help="as for latency.py")
    add("--form", nargs="+", choices=FORMS, default=list(FORMS))
    add("--runtime", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    add("--precision", nargs="+", choices=PRECISIONS, default=["float32"])
    add("--threads", nargs="+", type=threads_or_all, default=[1], metavar="N", help="numbers of threads, or all")
    add("--size", nargs="+", type=height_x_width, default=[(512, 512)], metavar="HxW", help="of the image, in pixels")
    add("--fixed", action="store_true", help="export for this size only, as nats export --fixed does")
    add("--repeats", type=positive, default=15, help="timed rounds, at least 2")
    add("--warmup", type=positive, default=2, help="rounds before timing starts")
    add("--seed", type=int, default=0, help="of weights, images and the uniform genotype")
    add("--profile", action="store_true", help="print the time in each kind of operator instead")
    add("--csv", type=Path, metavar="FILE", help="also write the rows there, as they come")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for, print the table and write the CSV file; returns the exit code."""
    args = parse_args(argv)
    rows: list[dict[str, Any]] = []

    def add(measured: list[dict[str, Any]]) -> None:
        print_rows(measured)
        rows.extend(measured)
        if args.csv:
            write_csv(rows, args.csv)

    print(device_name("cpu"))
    if not args.profile:
        print(*COLUMNS, sep="  ")
    try:
        for size in args.size:
            measure(args, size, add)
    except NatsError as error:
        print(f"runtimes: {error}", file=sys.stderr)
        return 2
    for line in goal_lines(rows):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
