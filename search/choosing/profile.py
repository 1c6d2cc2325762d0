"""Measures what each convolution of a network costs at its candidate dilations, on the machine at hand."""

import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from operator import truediv
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...base.errors import NatsError, one_line
from ...base.files import output_file
from ...genotype.runs import PLAIN, Dilation
from ...models.named import find_network
from ...networks.batch_norm import evaluation_mode
from ...networks.regrouped_conv import RegroupedConv2d
from ...networks.transform import architecture_of
from ..space import SearchError, find_space, searched_convs
from .cost import DTYPES, MEMORY_FORMATS, ConvCost, CostTable

SHARES = (1 / 8, 1 / 4, 1 / 2, 1)  # of a convolution's channels, at which each dilation is timed
PIECES = 16  # into which the outputs are cut when their joining is timed, as with 16 groups
LEAST_SECONDS = 5e-4  # that a timing lasts; shorter calls are timed several at once

Dtype = Literal["float32", "bfloat16", "float16"]
MemoryFormat = Literal["contiguous", "channels_last"]


def profile(
    body: nn.Module,
    convs: Mapping[str, Sequence[Dilation]],
    size: int | tuple[int, int] = 512,
    batch: int = 1,
    *,
    device: str = "cpu",
    dtype: Dtype = "float32",
    memory_format: MemoryFormat = "contiguous",
    repeats: int = 10,
    warmup: int = 2,
) -> CostTable:
    """Measure what each convolution costs at each of its candidates, by itself and forward only.

    One batch goes through the network, to see the size of each convolution's input. Then a convolution's candidates
    take turns with the plain convolution, each at several numbers of channels, in the code that a RegroupedConv2d
    runs; what counts is the median over rounds of the ratio to the plain one. Convolutions of one shape are measured
    once. The network's weights do not matter.

    Args:
        body: a plain timm network; on torch's meta device it costs nothing to send the batch through.
        convs: candidates by the convolution's name in the network; the plain dilation is measured anyway.
        size: of the images, in pixels; a number, or (height, width).
        batch: images per forward pass.
        device: where convolutions are timed: cpu, cuda, cuda:1.
        dtype, memory_format: of weights and images.
        repeats, warmup: rounds that are timed, and rounds before.

    Raises:
        SearchError: an unknown convolution, one that no image comes through, or an option out of range.
        GenotypeError: a convolution that can not be regrouped.
    """
    size = (size, size) if isinstance(size, int) else (size[0], size[1])
    _check_options(body, convs, size, batch, repeats, warmup)
    placement = _Placement(_find_device(device), DTYPES[dtype], MEMORY_FORMATS[memory_format])
    shapes = _shapes(body, list(convs), size, batch)
    wanted: dict[_Shape, dict[Dilation, None]] = {}
    for name, candidates in convs.items():
        wanted.setdefault(shapes[name], {PLAIN: None}).update(dict.fromkeys(Dilation(*d) for d in candidates))
    measured = {}
    for shape, dilations in tqdm(wanted.items(), desc="convolutions", leave=False, disable=None):
        measured[shape] = _measure(shape, list(dilations), placement, repeats, warmup)
    return CostTable(
        architecture=architecture_of(body) or type(body).__name__,
        device=device_name(device),
        torch=torch.__version__,
        size=size,
        batch=batch,
        memory_format=memory_format,
        dtype=dtype,
        threads=torch.get_num_threads(),
        convs={name: measured[shapes[name]] for name in convs},
    )


def profile_network(
    backbone: str,
    space: str = "C",
    size: int | tuple[int, int] = 512,
    batch: int = 1,
    *,
    convs: tuple[str, ...] = (),
    basic_block: Literal["conv2", "both"] = "conv2",
    dtype: Dtype = "float32",
    memory_format: MemoryFormat = "contiguous",
    device: str = "cpu",
    threads: int | None = None,
    repeats: int = 10,
    output: str = "costs.json",
) -> tuple[CostTable, Path]:
    """Measure what each convolution costs at each candidate dilation on this machine, for `nats search --costs`.

    Args:
        backbone: a plain timm network, or a variant for its plain twin.
        space: the candidate dilations and stages, as for a search: A, B, C or a YAML file.
        size: of the images, in pixels; a number, or [height, width].
        batch: images per forward pass.
        convs: names of the convolutions, or patterns with * and ?, instead of those that a search would search.
        basic_block: which convolutions of a ResNet's BasicBlocks.
        dtype: of weights and images.
        memory_format: of weights and images.
        device: cpu, cuda, cuda:1.
        threads: of the CPU; default: torch's own choice.
        repeats: timed rounds.
        output: JSON file.

    Returns:
        The costs, of convolutions as genotypes name them, and the file.

    Raises:
        NatsError: no such network or space, no convolution to search, or an option out of range.
    """
    target = output_file(output)
    if threads is not None and threads < 1:
        raise NatsError(f"threads: expected a positive number, found {threads}")
    if threads is not None:
        torch.set_num_threads(threads)
    plain = replace(find_network(backbone), genotype=None)
    found = find_space(space)
    with torch.device("meta"):  # names and shapes are all that is needed
        network = plain.build()
    options: dict[str, Any] = {"device": device, "dtype": dtype, "memory_format": memory_format, "repeats": repeats}
    table = profile(network, searched_convs(network, found, convs, basic_block), size, batch, **options)
    table.save(target)
    return table, target


def device_name(device: str | torch.device) -> str:
    """The GPU's or the CPU's model name."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


class _Placement(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    memory_format: torch.memory_format

    def put(self, images: Tensor) -> Tensor:
        return images.to(device=self.device, dtype=self.dtype, memory_format=self.memory_format)


class _Shape(NamedTuple):
    """All that a convolution's time depends on, beside its dilations."""

    kind: type[nn.Conv2d]
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    groups: int
    bias: bool
    input: tuple[int, ...]  # (N, in_channels, H, W)

    @classmethod
    def of(cls, conv: nn.Conv2d, images: Tensor) -> "_Shape":
        return cls(
            type(conv),
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            tuple(images.shape),
        )

    @property
    def unit(self) -> int:
        """Output channels that stay together: those of a cardinality group."""
        return self.out_channels // self.groups if self.groups > 1 else 1

    def part(self, channels: int) -> "_Shape":
        """The same convolution with fewer output channels; in a grouped one with fewer groups."""
        if self.groups == 1:
            return self._replace(out_channels=channels)
        groups = channels // self.unit
        in_channels = self.in_channels // self.groups * groups
        images = (self.input[0], in_channels, *self.input[2:])
        return self._replace(in_channels=in_channels, out_channels=channels, groups=groups, input=images)

    def regrouped(self, runs: Sequence[Sequence[int]], placement: _Placement) -> RegroupedConv2d:
        """With random weights."""
        shape = (self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation)
        conv = RegroupedConv2d.from_conv(self.kind(*shape, self.groups, self.bias), runs)
        placed = conv.to(placement.device, placement.dtype).to(memory_format=placement.memory_format)
        return placed.eval()


def _check_options(
    body: nn.Module, convs: Mapping[str, Any], size: tuple[int, int], batch: int, repeats: int, warmup: int
) -> None:
    at_least = (("size", min(size), 1), ("batch", batch, 1), ("repeats", repeats, 1), ("warmup", warmup, 0))
    for name, value, least in at_least:
        if value < least:
            raise SearchError(f"{name}: expected at least {least}, found {value}")
    if not convs:
        raise SearchError("convs: expected at least one convolution to measure")
    modules = dict(body.named_modules())
    for name in convs:
        if not isinstance(modules.get(name), nn.Conv2d):
            raise SearchError(f"{name}: the network has no convolution of this name")


def _find_device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # no such device, or torch was built without it
        raise SearchError(f"device: {name}: {one_line(error)}") from error


@torch.no_grad()
def _shapes(body: nn.Module, names: list[str], size: tuple[int, int], batch: int) -> dict[str, _Shape]:
    """Each convolution's shape and that of its input."""
    seen: dict[str, _Shape] = {}
    convs = {name: body.get_submodule(name) for name in names}
    handles = [
        conv.register_forward_pre_hook(lambda conv, inputs, name=name: seen.update({name: _Shape.of(conv, inputs[0])}))
        for name, conv in convs.items()
    ]
    weight = next(body.parameters())
    first = next(module for module in body.modules() if isinstance(module, nn.Conv2d))
    try:
        with evaluation_mode(body):
            body(weight.new_zeros(batch, first.in_channels, *size))
    except (RuntimeError, AssertionError) as error:
        raise SearchError(f"size: the network takes no images of {size[0]} x {size[1]}: {one_line(error)}") from error
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in names if name not in seen]
    if missing:
        raise SearchError(f"{missing[0]}: no image comes through it, so it can not be measured")
    return seen


def _measure(
    shape: _Shape, dilations: Sequence[Dilation], placement: _Placement, repeats: int, warmup: int
) -> ConvCost:
    counts = _channel_counts(shape)
    inputs = {shape.part(n).input for n in counts}  # a single one, unless convolutions are grouped
    placed = {size: placement.put(torch.rand(size)) for size in inputs}
    images = {n: placed[shape.part(n).input] for n in counts}
    calls: dict[Any, Callable[[], Any]] = {
        (dilation, n): _call(shape.part(n), dilation, images[n], placement) for dilation in dilations for n in counts
    }
    if len(dilations) > 1 and len(counts) > 1:
        calls["join"] = _join_call(shape, dilations[:2], images[shape.out_channels], placement)
    times = _time_interleaved(calls, placement.device, repeats, warmup)
    plain = times[PLAIN, shape.out_channels]
    ratios = {key: statistics.median(map(truediv, own, plain)) for key, own in times.items()}
    seconds = {key: ratio * statistics.median(plain) for key, ratio in ratios.items()}
    fits = {dilation: fit_line({n: seconds[dilation, n] for n in counts}) for dilation in dilations}
    return ConvCost(shape.out_channels, statistics.median(plain), seconds.get("join", 0.0), fits)


def _channel_counts(shape: _Shape) -> list[int]:
    units = shape.out_channels // shape.unit
    return sorted({max(1, round(units * share)) * shape.unit for share in SHARES})


def _call(shape: _Shape, dilation: Dilation, images: Tensor, placement: _Placement) -> Callable[[], Any]:
    conv = shape.regrouped([(shape.out_channels, *dilation)], placement)
    return lambda: conv(images)


class _Join(RegroupedConv2d):
    """What a RegroupedConv2d does beside convolving: it gathers kernels and puts outputs, here given, in order."""

    def __init__(self, conv: RegroupedConv2d, outputs: Mapping[tuple[int, int], Tensor]):
        shape = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        super().__init__(*shape, conv.groups, conv.bias is not None, runs=conv.runs, device="meta")
        self.weight, self.bias, self.outputs = conv.weight, conv.bias, outputs

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, branch: Any) -> Tensor:
        return self.outputs[branch.dilation]


@torch.no_grad()
def _join_call(
    shape: _Shape, dilations: Sequence[Dilation], images: Tensor, placement: _Placement
) -> Callable[[], Any]:
    """Pieces that take turns between two dilations, so that all kernels and outputs are copied."""
    units = shape.out_channels // shape.unit
    pieces = min(PIECES, units)
    cuts = [units * i // pieces * shape.unit for i in range(pieces + 1)]
    runs = [(stop - start, *dilations[i % 2]) for i, (start, stop) in enumerate(pairwise(cuts))]
    conv = shape.regrouped(runs, placement)
    outputs = conv(images).split([sum(branch.channels) for branch in conv._branches], 1)
    by_dilation = {
        branch.dilation: placement.put(output) for branch, output in zip(conv._branches, outputs, strict=True)
    }
    join = _Join(conv, by_dilation)
    return lambda: join(images)


def _time_interleaved(
    calls: Mapping[Any, Callable[[], Any]], device: torch.device, repeats: int, warmup: int
) -> dict[Any, list[float]]:
    """Seconds per call, one entry per round, of calls that take turns."""
    times: dict[Any, list[float]] = {key: [] for key in calls}
    with torch.inference_mode():
        once = {key: _time(call, 1, device) for key, call in calls.items()}
        at_once = {key: max(1, min(100, math.ceil(LEAST_SECONDS / seconds))) for key, seconds in once.items()}
        for done in range(warmup + repeats):
            for key, call in calls.items():
                elapsed = _time(call, at_once[key], device)
                if done >= warmup:
                    times[key].append(elapsed)
    return times


def _time(call: Callable[[], Any], times: int, device: torch.device) -> float:
    """Seconds per call, after one that is not timed: in a network a convolution's input was just written too."""
    call()
    _synchronise(device)
    start = time.perf_counter()
    for _ in range(times):
        call()
    _synchronise(device)
    return (time.perf_counter() - start) / times


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fit_line(seconds: Mapping[int, float]) -> tuple[float, float]:
    """a, b >= 0 of t(n) = a + b n, by least squares among the lines through the time of the most channels.

    They pass through it because one dilation for all channels, the plain one before all, is a genotype of its own and
    was measured: its relative cost is then exact.

    Args:
        seconds: t by n; where there is one n only, a is 0.
    """
    whole = max(seconds)
    steps = [(whole - n, seconds[whole] - t) for n, t in seconds.items() if n < whole]
    steepest = seconds[whole] / whole
    slope = sum(n * t for n, t in steps) / sum(n * n for n, _ in steps) if steps else steepest
    slope = min(max(slope, 0.0), steepest)
    return max(seconds[whole] - slope * whole, 0.0), slope
