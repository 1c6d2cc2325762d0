"""Latency of NATS variants against their plain timm twins, as detection backbones (features_only, four maps).

Three networks with the same weights take turns in one run, so that a change of the machine's clock or load meets
all of them alike:

    plain   timm's network
    nats    the same network with a genotype
    naive   the same computation as published code of this kind does it: one small convolution per run of channels

each in one form at a time:

    eager     as created
    deploy    the deployment form, timm.utils.reparameterize_model; plain and naive get their batch norms folded alike
    compile   the deployment form compiled by inductor, with freezing
    graphs    the deployment form compiled by inductor, replayed as CUDA graphs (on a CPU: compiled without freezing)

A round times each network once; the ratio to plain is taken per round. Reported are the median latency, the median
ratio and the interquartile range (IQR) of the ratios. Before timing, nats and naive must give the same maps. The CSV
file is written after each measurement, so that an interrupted run keeps what it has. On a GPU `float32` is without and
`tf32` with tensor cores that round the factors to 10 bits.

    python benchmarks/latency.py --model nats_resnet50 --genotype uniform ic16 --form eager deploy compile \
        --size 512x512 800x1216 --batch 1 8 --memory-format channels_last --csv latency.csv
"""

import argparse
import copy
import functools
import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from common import height_x_width, positive, synchronise, write_csv
from timm.utils import reparameterize_model
from torch import Tensor, nn
from tqdm import tqdm

import nats_zoo
from nats_zoo import Genotype, NatsError, RegroupedConv2d
from nats_zoo.base.names import VARIANT_PREFIX
from nats_zoo.folders.find_genotype import find_genotype
from nats_zoo.genotype.catalogue import DEFAULT_GENOTYPES, default_genotype
from nats_zoo.genotype.runs import Dilation, Run, Runs
from nats_zoo.search.choosing.profile import device_name
from nats_zoo.search.space import SPACES, SearchSpace, count_groups, searched_convs

GROUPS = 16
IC16 = SearchSpace("ic16", dict.fromkeys((1, 2, 3, 4), tuple((h, w) for h in range(1, 5) for w in range(1, 5))))
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COMPILE: dict[str, dict[str, Any]] = {"compile": {"options": {"freezing": True}}, "graphs": {"mode": "reduce-overhead"}}
FORMS = ("eager", "deploy", *COMPILE)
NETWORKS = ("plain", "nats", "naive")
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class NaiveRegroupedConv2d(nn.Module):
    """What a RegroupedConv2d computes, as one convolution per run whose outputs are concatenated.

    Shape:
        as the RegroupedConv2d it is made from.
    """

    def __init__(self, conv: RegroupedConv2d):
        super().__init__()
        self.pieces = nn.ModuleList()
        self.in_ranges: list[tuple[int, int]] = []
        outs, ins = conv.out_channels // conv.groups, conv.in_channels // conv.groups
        start = 0
        weight, bias = conv.plain_kernel()
        for run in conv.runs:
            stop = start + run.channels
            groups = 1 if conv.groups == 1 else run.channels // outs
            self.in_ranges.append((0, ins) if conv.groups == 1 else (start // outs * ins, stop // outs * ins))
            own_bias = None if bias is None else bias[start:stop]
            self.pieces.append(_conv_of_run(conv, run, groups, weight[start:stop], own_bias))
            start = stop

    def forward(self, x: Tensor) -> Tensor:
        pairs = zip(self.pieces, self.in_ranges, strict=True)
        return torch.cat([piece(x[:, start:stop]) for piece, (start, stop) in pairs], 1)


def _conv_of_run(conv: RegroupedConv2d, run: Run, groups: int, weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    dilation = tuple(d * d0 for d, d0 in zip(run.dilation, conv.dilation, strict=True))
    padding = tuple(
        p + (d - d0) * (k - 1) // 2
        for p, d, d0, k in zip(conv.padding, dilation, conv.dilation, conv.kernel_size, strict=True)
    )
    shape = (weight.shape[1] * groups, run.channels, conv.kernel_size, conv.stride, padding, dilation, groups)
    piece = nn.Conv2d(*shape, bias=bias is not None)
    piece.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        piece.bias = nn.Parameter(bias.detach().clone())
    return piece


def uniform_genotype(architecture: str, seed: int = 0) -> Genotype:
    """A genotype drawn uniformly from space C: each of 16 groups per convolution takes any candidate, in layer2..4.

    Raises:
        SearchError: a network without such convolutions, or whose channels 16 does not divide.
    """
    rng = random.Random(seed)
    convs = {}
    for name, conv, candidates in _searched(architecture, SPACES["C"]):
        groups = count_groups(conv, name, GROUPS, None)
        drawn = [rng.choice(candidates) for _ in range(groups)]
        convs[name] = Runs.of(drawn, conv.out_channels // groups)
    provenance = {"method": "uniform", "space": "C", "groups": GROUPS, "seed": seed}
    return Genotype(architecture, convs, provenance=provenance)


def ic16_genotype(architecture: str) -> Genotype:
    """All 16 dilations (1..4) x (1..4) in equal contiguous shares, in all four stages: Inception Convolution's kind.

    Raises:
        SearchError: a network without such convolutions, or whose channels 16 does not divide.
    """
    convs = {}
    for name, conv, dilations in _searched(architecture, IC16):
        channels = conv.out_channels // count_groups(conv, name, len(dilations), None)
        convs[name] = tuple(Run(channels, *dilation) for dilation in dilations)
    return Genotype(architecture, convs, provenance={"method": "ic16"})


def _searched(architecture: str, space: SearchSpace) -> Iterator[tuple[str, nn.Conv2d, tuple[Dilation, ...]]]:
    with torch.device("meta"):
        model = timm.create_model(architecture)
    for name, candidates in searched_convs(model, space).items():
        yield name, model.get_submodule(name), candidates


def plain_name(model_name: str) -> str:
    """timm's name of a variant's plain twin.

    Raises:
        NatsError: the name is no variant's.
    """
    architecture = model_name.removeprefix(VARIANT_PREFIX)
    if architecture == model_name or architecture not in DEFAULT_GENOTYPES:
        variants = ", ".join(VARIANT_PREFIX + name for name in DEFAULT_GENOTYPES)
        raise NatsError(f"--model {model_name}: expected one of {variants}")
    return architecture


def choose_genotype(name: str, model_name: str, seed: int) -> Genotype:
    """The genotype that `--genotype NAME` means for a variant.

    Raises:
        GenotypeError: `default` where none is published, or no such file.
    """
    architecture = plain_name(model_name)
    if name == "uniform":
        return uniform_genotype(architecture, seed)
    if name == "ic16":
        return ic16_genotype(architecture)
    return find_genotype(default_genotype(architecture) if name == "default" else name)


def build_networks(model_name: str, genotype: Genotype, form: str = "eager") -> dict[str, nn.Module]:
    """The plain, nats and naive backbones in eval mode, float32 on CPU, with the same random weights.

    Args:
        form: `eager`, or `deploy` (`compile` and `graphs` are deployed, not yet compiled).
    """
    # zero_init_last would zero every residual branch, and with it the difference between right and wrong dilations
    options: dict[str, Any] = dict(features_only=True, out_indices=(1, 2, 3, 4), zero_init_last=False)
    plain = timm.create_model(plain_name(model_name), **options).eval()
    nats, naive, empty = (
        timm.create_model(model_name, genotype=own, **options).eval()
        for own in (genotype, genotype, Genotype(genotype.architecture, {}))
    )
    for network in (nats, naive, empty):
        network.load_state_dict(plain.state_dict())
    if form != "eager":
        plain, nats = reparameterize_model(empty), reparameterize_model(nats)
        for block in [module for module in naive.modules() if hasattr(module, "fold_batch_norms")]:
            block.fold_batch_norms()
    for name, module in list(naive.named_modules()):
        if isinstance(module, RegroupedConv2d):
            naive.set_submodule(name, NaiveRegroupedConv2d(module))
    return {"plain": plain.eval(), "nats": nats.eval(), "naive": naive.eval()}


@torch.inference_mode()
def check_equal(nats: nn.Module, naive: nn.Module, images: Tensor) -> None:
    """Compare the maps of both networks, to 1e-4 of each map's largest value.

    Args:
        images: (N, 3, H, W).

    Raises:
        NatsError: they differ, so that timing them would compare different computations.
    """
    for index, (ours, theirs) in enumerate(zip(nats(images), naive(images), strict=True)):
        difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        if not difference < 1e-4:  # NaN fails too
            raise NatsError(f"latency: map {index} of nats and naive differ by {difference:.2g} of its largest value")


def time_interleaved(
    networks: Mapping[str, Callable[[Tensor], Any]], images: Tensor, repeats: int, warmup: int
) -> dict[str, list[float]]:
    """Milliseconds per forward pass, one entry per round, for networks that take turns.

    Args:
        images: (N, 3, H, W), on the networks' device.
    """
    times: dict[str, list[float]] = {name: [] for name in networks}
    with torch.inference_mode():
        for done in tqdm(range(warmup + repeats), desc="rounds", leave=False, disable=None):
            for name, network in networks.items():
                elapsed = _time_once(network, images)
                if done >= warmup:
                    times[name].append(elapsed)
    return times


def _time_once(network: Callable[[Tensor], Any], images: Tensor) -> float:
    synchronise(images.device)
    start = time.perf_counter()
    network(images)
    synchronise(images.device)
    return 1000 * (time.perf_counter() - start)


def summarise(times: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """One row per network: median latency in ms, median and quartiles of the per-round ratio to `plain`."""
    rows = []
    for name, values in times.items():
        ratios = [value / plain for value, plain in zip(values, times["plain"], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        rows.append(dict(network=name, median_ms=statistics.median(values), ratio=median, ratio_q1=low, ratio_q3=high))
    return rows


class Case(NamedTuple):
    """One measurement: what varies between the rows of a table."""

    model: str
    genotype: str
    max_dilations: int | None
    form: str
    memory_format: str
    size: tuple[int, int]
    batch: int
    dtype: str

    @property
    def label(self) -> str:
        merged = "" if self.max_dilations is None else f" k={self.max_dilations}"
        return f"{self.model} {self.genotype}{merged}"

    def facts(self) -> dict[str, Any]:
        """What a CSV row says of it."""
        return self._asdict() | dict(size=f"{self.size[0]}x{self.size[1]}")


def cases(args: argparse.Namespace) -> list[Case]:
    """Every combination of what the command line lists."""
    axes = (args.model, args.genotype, args.max_dilations, args.form, args.memory_format, args.size, args.batch)
    axes += (args.dtype,)
    return [Case(*values) for values in itertools.product(*axes)]


@functools.lru_cache(maxsize=1)  # cases that differ in batch and dtype follow each other
def _checked_networks(
    model: str, genotype_name: str, max_dilations: int | None, form: str, size: tuple[int, int], seed: int
) -> tuple[Genotype, dict[str, nn.Module]]:
    """The genotype and what `build_networks` builds with it, compared on an image."""
    genotype = choose_genotype(genotype_name, model, seed)
    genotype = genotype if max_dilations is None else genotype.merge(max_dilations)
    networks = build_networks(model, genotype, form)
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(seed))
    check_equal(networks["nats"], networks["naive"], image)
    return genotype, networks


def measure(case: Case, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Build, check and time the networks; returns the rows of `summarise` with all that they depend on."""
    genotype, built = _checked_networks(*case[:4], case.size, args.seed)
    images = torch.rand(case.batch, 3, *case.size, generator=torch.Generator().manual_seed(args.seed))
    networks: dict[str, Any] = {}
    placement = dict(device=args.device, dtype=DTYPES[case.dtype], memory_format=MEMORY_FORMATS[case.memory_format])
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = case.dtype == "tf32"
    torch.compiler.reset()
    for name, network in built.items():
        if name in ("plain", *args.network):
            networks[name] = copy.deepcopy(network).to(**placement)
            if case.form in COMPILE:
                networks[name] = torch.compile(networks[name], **COMPILE[case.form])
    times = time_interleaved(networks, images.to(**placement), args.repeats, args.warmup)
    facts = case.facts() | dict(
        share_changed=round(genotype.share_changed(), 4),
        share_moved=round(genotype.provenance.get("merged", {}).get("share_moved", 0.0), 4),
        fingerprint=genotype.fingerprint()[:12],
    )
    return [facts | row | describe_run(args) for row in summarise(times)]


def describe_run(args: argparse.Namespace) -> dict[str, Any]:
    """The other flags, the device's name and the versions that a latency depends on."""
    flags = {key: getattr(args, key) for key in ("device", "repeats", "warmup", "seed")}
    versions = dict(torch=torch.__version__, timm=timm.__version__, nats_zoo=nats_zoo.__version__)
    return flags | dict(threads=torch.get_num_threads(), device_name=device_name(args.device)) | versions


HEADER = ("form", "memory format", "dtype", "size", "batch", "network", "median ms", "ratio to plain", "IQR of ratio")


def print_rows(case: Case, rows: Sequence[Mapping[str, Any]], width: int) -> None:
    """Print one line per network, in the columns of HEADER behind the label, `width` characters wide."""
    facts = case.facts()
    for row in rows:
        line = [f"{case.label:<{width}}", f"{case.form:<7}", f"{case.memory_format:<13}", f"{case.dtype:<8}"]
        line += [f"{facts['size']:<8}", f"{case.batch:5}", f"{row['network']:<7}"]
        line += [f"{row['median_ms']:9.2f}", f"{row['ratio']:14.3f}"]
        print(*line, f"{row['ratio_q1']:.3f} to {row['ratio_q3']:.3f}", sep="  ", flush=True)


def print_header(width: int) -> None:
    """Print the names of the columns."""
    widths = (7, 13, 8, 8, 5, 7, 9, 14, 12)
    print(" " * width, *(f"{name:<{w}}" for name, w in zip(HEADER, widths, strict=True)), sep="  ")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", nargs="+", default=["nats_resnet50"], help="nats_* variants; a twin is the name without nats_")
    add(
        "--genotype",
        nargs="+",
        default=["uniform", "ic16"],
        metavar="NAME",
        help="uniform: drawn from space C, 16 groups, layer2 to layer4; ic16: 16 dilations in equal contiguous shares, "
        "layer1 to layer4; default: the variant's own; else a published name or a file",
    )
    add(
        "--max-dilations",
        nargs="+",
        type=positive,
        default=[None],
        metavar="K",
        help="merge the genotype to at most K dilations per convolution",
    )
    add("--form", nargs="+", choices=FORMS, default=["eager", "deploy"], help="how the networks run")
    add("--size", nargs="+", type=height_x_width, default=[(512, 512)], metavar="HxW", help="input sizes in pixels")
    add("--batch", nargs="+", type=positive, default=[1], help="images per forward pass")
    add("--memory-format", nargs="+", choices=MEMORY_FORMATS, default=["contiguous"], help="of weights and images")
    add("--dtype", nargs="+", choices=DTYPES, default=["float32"], help="of weights and images")
    add("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="which to time; plain always")
    add("--device", default="cpu", help="cpu, cuda, cuda:1")
    add("--repeats", type=_at_least_two, default=20, help="timed rounds")
    add("--warmup", type=positive, default=3, help="rounds before timing starts")
    add("--threads", type=positive, help="CPU threads; without it torch's own choice")
    add("--seed", type=int, default=0, help="of the images and of the uniform genotype")
    add("--csv", type=Path, metavar="FILE", help="also write the rows there")
    return parser.parse_args(argv)


def _at_least_two(text: str) -> int:
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"{value} is too few for quartiles, expected at least 2")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for, print the table and write the CSV file; returns the exit code."""
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    planned, rows = cases(args), []
    width = max(len(case.label) for case in planned)
    print(f"{device_name(args.device)}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print_header(width)
    for case in tqdm(planned, desc="measurements", leave=False, disable=None):
        try:
            measured = measure(case, args)
        except NatsError as error:
            print(f"latency: {error}", file=sys.stderr)
            return 2
        print_rows(case, measured, width)
        rows += measured
        if args.csv:
            write_csv(rows, args.csv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
