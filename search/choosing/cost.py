"""What dilations cost on one machine: a table of measured costs per convolution, and what it predicts.

n output channels at dilation g take t_g(n) = a_g + b_g n seconds. A convolution that runs at a set S of dilations takes

    t(S) = sum_{g in S} (a_g + b_g n_g) + (join, if S has more than one)

where join is what it takes to gather kernels by dilation and to put outputs back in their order. Costs are given
relative to t_plain, the plain convolution's time.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...base.errors import NatsError
from ...base.files import read_json, write_text
from ...base.reading import Reader
from ...base.text import text_table
from ...genotype.genotype import Genotype
from ...genotype.runs import MAX_CHANNELS, PLAIN, Dilation
from ...networks.transform import check_architecture
from ..space import SearchError

FORMAT = 1
MAX_FILE_BYTES = 2**24
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class ConvCost:
    """Measured costs of one convolution, in seconds.

    Attributes:
        channels: output channels.
        plain: of the plain convolution.
        join: beside the convolutions themselves, if there is more than one dilation.
        dilations: a_g and b_g of t_g(n) = a_g + b_g n, by dilation (height, width); the plain one is among them.
    """

    channels: int
    plain: float
    join: float
    dilations: Mapping[Dilation, tuple[float, float]]

    def seconds(self, channels: Mapping[Dilation, int]) -> float:
        """Predicted time with so many output channels at each dilation."""
        used = {dilation: n for dilation, n in channels.items() if n}
        parts = [self.dilations[dilation][0] + self.dilations[dilation][1] * n for dilation, n in used.items()]
        return sum(parts) + (self.join if len(used) > 1 else 0.0)


@dataclass(frozen=True)
class CostTable:
    """Measured costs of a network's convolutions, and all that they depend on. Treat its dictionaries as read-only.

    Attributes:
        architecture: timm's name of the plain network.
        device: the CPU's or GPU's model name.
        torch: torch's version.
        size: of the images, (height, width) in pixels.
        batch: images per forward pass.
        memory_format, dtype: of weights and images.
        threads: of the CPU.
        convs: costs by the convolution's name in the network.
        source: what error messages call it (a file's path); not part of the table.

    Example:
        >>> costs = CostTable.load("costs.json")  # of nats profile
        >>> print(costs)
    """

    architecture: str
    device: str
    torch: str
    size: tuple[int, int]
    batch: int
    memory_format: str
    dtype: str
    threads: int
    convs: Mapping[str, ConvCost]
    source: str = field(default="costs", compare=False, repr=False)

    def relative(self, name: str, channels_per_dilation: Mapping[Dilation, int]) -> float:
        """Predicted t(S) / t_plain of one convolution.

        Args:
            name: of the convolution.
            channels_per_dilation: output channels at each dilation; they add up to the convolution's.

        Raises:
            SearchError: a convolution or dilation that was not measured, or another number of channels.
        """
        cost = self._cost(name, channels_per_dilation)
        total = sum(channels_per_dilation.values())
        if total != cost.channels or min(channels_per_dilation.values(), default=0) < 0:
            raise SearchError(
                f"{self.source}: {name}: was measured with {cost.channels} output channels, found {total}"
            )
        return cost.seconds(channels_per_dilation) / cost.plain

    def of_groups(self, name: str, candidates: Sequence[Dilation], num_groups: int) -> Callable[[Sequence[int]], float]:
        """t(S) / t_plain as a function of the number of groups that take each candidate: the cost of `choose`.

        Raises:
            SearchError: as `relative`, or channels that the groups do not divide.
        """
        cost = self._cost(name, candidates)
        if num_groups < 1 or cost.channels % num_groups:
            raise SearchError(f"{self.source}: {name}: its {cost.channels} channels are not {num_groups} equal groups")
        size = cost.channels // num_groups

        def relative(counts: Sequence[int]) -> float:
            channels = {dilation: n * size for dilation, n in zip(candidates, counts, strict=True)}
            return cost.seconds(channels) / cost.plain

        return relative

    def network(self, genotype: Genotype) -> float:
        """Predicted time of all convolutions of the table, relative to the plain ones.

        The rest of the network is not in the table, and costs the same whatever the genotype.

        Raises:
            GenotypeError: a genotype of another architecture.
            SearchError: one that changes a convolution, or uses a dilation, that was not measured.
        """
        check_architecture(genotype, self.architecture)
        shares = genotype.dilation_shares()
        unknown = [name for name in shares if name not in self.convs and set(shares[name]) != {PLAIN}]
        if unknown:
            raise SearchError(f"{self.source}: the convolution {unknown[0]!r} was not measured")
        seconds = 0.0
        for name, cost in self.convs.items():
            channels = genotype.convs[name].counts() if name in shares else {PLAIN: cost.channels}
            seconds += self.relative(name, channels) * cost.plain
        return seconds / sum(cost.plain for cost in self.convs.values())

    def expected(self, name: str, p: Tensor, candidates: Sequence[Dilation]) -> Tensor:
        """Expected t(S) / t_plain of one convolution if each group draws its candidate by itself; differentiable.

        E[t] = sum_g a_g (1 - prod_i (1 - p_i^g)) + b_g sum_i p_i^g C / N + join (1 - sum_g prod_i p_i^g)

        for N groups of C / N output channels. Where p is one-hot it is the cost of that assignment.

        Args:
            name: of the convolution.
            p: probabilities, (groups, candidates); each row adds up to 1.
            candidates: the dilation of each column.

        Returns:
            A scalar, of p's type and on its device.

        Raises:
            SearchError: a convolution or candidate that was not measured, or a p of another shape.
        """
        cost = self._cost(name, candidates)
        if p.ndim != 2 or p.shape[1] != len(candidates):
            raise SearchError(f"{name}: expected p of (groups, {len(candidates)}), found the shape {tuple(p.shape)}")
        fits = [cost.dilations[dilation] for dilation in candidates]
        start = p.new_tensor([a / cost.plain for a, _ in fits])
        slope = p.new_tensor([b * cost.channels / cost.plain for _, b in fits])
        used = 1 - (1 - p).prod(0)
        several = 1 - p.prod(0).sum()
        return (start * used).sum() + (slope * p.mean(0)).sum() + cost.join / cost.plain * several

    def expected_total(
        self, probabilities: Mapping[str, Tensor], candidates: Mapping[str, Sequence[Dilation]]
    ) -> Tensor:
        """Expected time of all convolutions of the table, relative to the plain ones; differentiable.

        Where the probabilities are one-hot it is `network` of that genotype: other convolutions are plain.

        Args:
            probabilities: (groups, candidates) by the convolution's name; at least one.
            candidates: of each of these convolutions.
        """
        total = sum(cost.plain for cost in self.convs.values())
        expected = {name: self.expected(name, p, candidates[name]) for name, p in probabilities.items()}
        changes = [(relative - 1) * (self.convs[name].plain / total) for name, relative in expected.items()]
        return 1 + sum(changes[1:], changes[0])

    def check(self, architecture: str, convs: Mapping[str, Sequence[Dilation]] | Iterable[str]) -> None:
        """See that the table is of this architecture and has these convolutions, at these dilations if they are given.

        Raises:
            SearchError: naming what is missing.
        """
        if architecture != self.architecture:
            raise SearchError(
                f"{self.source}: architecture: the costs are those of {self.architecture!r}, expected {architecture!r}"
            )
        for name, candidates in (convs if isinstance(convs, Mapping) else dict.fromkeys(convs, ())).items():
            self._cost(name, candidates)

    def _cost(self, name: str, dilations: Sequence[Dilation] | Mapping[Dilation, int]) -> ConvCost:
        if name not in self.convs:
            raise SearchError(f"{self.source}: the convolution {name!r} was not measured")
        for dilation in dilations:
            if dilation not in self.convs[name].dilations:
                measured = ", ".join(str(Dilation(*d)) for d in self.convs[name].dilations)
                raise SearchError(
                    f"{self.source}: {name}: the dilation {Dilation(*dilation)} was not measured, only {measured}"
                )
        return self.convs[name]

    @classmethod
    def load(cls, path: str | os.PathLike) -> "CostTable":
        """Read a file that `save` wrote.

        Raises:
            SearchError: naming the file, the key and what was expected.
        """
        return cls.from_dict(read_json(path, SearchError, MAX_FILE_BYTES), str(path))

    @classmethod
    def from_dict(cls, data: Any, source: str = "costs") -> "CostTable":
        """Build from the JSON form; `source` is what error messages call it."""
        read = Reader(source, SearchError)
        data = read.keys(data, "", ("format", *_FACTS, "convs"))
        read.number(data["format"], "format", f"format {FORMAT}", least=FORMAT, most=FORMAT, kinds=(int,))
        height, width = read.sequence(data["size"], "size", "[height, width]", 2)
        convs = read.object(data["convs"], "convs")
        if not convs:
            raise read.wrong("convs", "at least one convolution", convs)
        return cls(
            architecture=read.text(data["architecture"], "architecture"),
            device=read.text(data["device"], "device"),
            torch=read.text(data["torch"], "torch"),
            batch=_count(read, data["batch"], "batch"),
            threads=_count(read, data["threads"], "threads"),
            size=(_count(read, height, "size"), _count(read, width, "size")),
            memory_format=read.one_of(data["memory_format"], "memory_format", MEMORY_FORMATS),
            dtype=read.one_of(data["dtype"], "dtype", DTYPES),
            convs={name: _read_conv(read, cost, name) for name, cost in convs.items()},
            source=source,
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        convs = {
            name: {
                "channels": cost.channels,
                "plain": cost.plain,
                "join": cost.join,
                "dilations": {str(Dilation(*dilation)): list(ab) for dilation, ab in cost.dilations.items()},
            }
            for name, cost in self.convs.items()
        }
        facts = {key: getattr(self, key) for key in _FACTS}
        return {"format": FORMAT, **facts, "size": list(self.size), "convs": convs}

    def save(self, path: str | os.PathLike) -> None:
        """Write the table as JSON, one line per convolution."""
        data = self.to_dict()
        rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(cost)}" for name, cost in data.pop("convs").items())
        facts = "".join(f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in data.items())
        write_text(path, f'{{\n{facts}  "convs": {{\n{rows}\n  }}\n}}\n')

    def __str__(self) -> str:
        return _format_table(self)


_FACTS = ("architecture", "device", "torch", "size", "batch", "memory_format", "dtype", "threads")


def _read_conv(read: Reader, data: Any, name: str) -> ConvCost:
    data = read.keys(data, name, ("channels", "plain", "join", "dilations"))
    dilations: dict[Dilation, tuple[float, float]] = {}
    for key, pair in read.object(data["dilations"], f"{name}: dilations").items():
        try:
            dilation = Dilation.parse(key)
        except NatsError:
            raise read.wrong(f"{name}: dilations", "keys like '1x3'", key) from None
        a, b = read.sequence(pair, f"{name}: {key}", "[a, b]", 2)
        dilations[dilation] = (_seconds(read, a, f"{name}: {key}"), _seconds(read, b, f"{name}: {key}"))
    if PLAIN not in dilations:
        raise read.wrong(f"{name}: dilations", f"{PLAIN} among them", list(data["dilations"]))
    channels = _count(read, data["channels"], f"{name}: channels")
    plain = _seconds(read, data["plain"], f"{name}: plain")
    if not plain:
        raise read.wrong(f"{name}: plain", "a positive number of seconds", plain)
    return ConvCost(channels, plain, _seconds(read, data["join"], f"{name}: join"), dilations)


def _count(read: Reader, value: Any, key: str) -> int:
    return read.number(value, key, "a positive integer", least=1, most=MAX_CHANNELS, kinds=(int,))


def _seconds(read: Reader, value: Any, key: str) -> float:
    return float(read.number(value, key, "seconds, a finite number that is not negative", least=0, most=1e9))


# --- showing ----------------------------------------------------------------------------------------------------------


def _format_table(table: CostTable) -> str:
    dilations = sorted({d for cost in table.convs.values() for d in cost.dilations}, key=Dilation.order)
    height, image_width = table.size
    lines = [
        f"{table.architecture}: {table.batch} x {height}x{image_width}, {table.dtype}, {table.memory_format};"
        f" {table.device}, {table.threads} threads, torch {table.torch}",
        "time of all channels / of a quarter of them, each relative to the plain convolution's share",
    ]
    rows = [["convolution", "channels", "plain ms", "join", *(str(Dilation(*d)) for d in dilations)]]
    for name, cost in table.convs.items():
        cells = [_cell(cost, dilation) for dilation in dilations]
        rows.append([name, str(cost.channels), f"{1000 * cost.plain:.3f}", f"{cost.join / cost.plain:.2f}", *cells])
    return "\n".join([*lines, *text_table(rows, "<", ">", ">", ">5", ">10")])


def _cell(cost: ConvCost, dilation: Dilation) -> str:
    if dilation not in cost.dilations:
        return "."
    a, b = cost.dilations[dilation]
    whole, quarter = ((a + b * cost.channels * share) / (cost.plain * share) for share in (1, 1 / 4))
    return f"{whole:.2f}/{quarter:.2f}"
