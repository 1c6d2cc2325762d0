"""The genotype: which dilation each output channel of each convolution uses. Plain data, read strictly.

A genotype file is JSON:

    {"format": 1,
     "architecture": "resnet50",
     "convs": {"layer2.0.conv2": [[80, 1, 1], [32, 3, 3], [16, 1, 3]]},
     "gains": {"layer2.0.conv2": [1.0, 0.93, 1.1]},
     "provenance": {"method": "mixture", "space": "C"}}

Each run is `[channels, dilation_h, dilation_w]`, in the convolution's own output-channel order.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..base.errors import GenotypeError, one_line, short
from ..base.files import MAX_BYTES, is_deeper, read_json, write_text
from ..base.reading import Reader
from ..base.text import text_table
from ..version import __version__
from .merging import merge_convs
from .runs import MAX_CHANNELS, MAX_DILATION, PLAIN, Dilation, Run, Runs

FORMAT = 1
MAX_FILE_BYTES = MAX_BYTES
MAX_DEPTH = 64  # of provenance: JSON is read and written recursively, and from any depth of the program's own stack

# Methods that look at networks, which this room does not know: `networks` hands them in when nats_zoo is imported.
_OF_NETWORKS: dict[str, Callable[..., "Genotype"]] = {}

_ARCHITECTURE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}")


@dataclass(frozen=True)
class Genotype:
    """The whole discovered scheme of one architecture. Treat its dictionaries as read-only.

        >>> genotype = Genotype("resnet18", {"layer4.1.conv2": [[384, 1, 1], [128, 1, 3]]})
        >>> genotype.dilation_shares()
        {'layer4.1.conv2': {(1, 1): 0.75, (1, 3): 0.25}}

    Attributes:
        architecture: timm's name of the plain network, such as `resnet50`.
        convs: runs per convolution, keyed by the convolution's name in the plain network. The channels of a
            convolution's runs add up to its `out_channels`. Convolutions not named stay plain.
        gains: optional factor on the kernel, one per run, for some of the convolutions.
        provenance: where it comes from: method, space, dataset, weights, seed, command, metrics.
        source: what error messages call it (a file's path); not part of the genotype.
    """

    architecture: str
    convs: Mapping[str, Runs]
    gains: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    source: str = field(default="genotype", compare=False, repr=False)

    def __post_init__(self) -> None:
        read = Reader(self.source, GenotypeError)
        if not isinstance(self.architecture, str) or not _ARCHITECTURE.fullmatch(self.architecture):
            raise read.wrong("architecture", "a timm model name", self.architecture)  # no folder: files are named so
        convs = {
            name: Runs(read_run(read, run, name) for run in read.sequence(runs, name, "a list of runs"))
            for name, runs in read.object(self.convs, "convs").items()
        }
        gains = {
            name: _read_gains(read, values, name, convs) for name, values in read.object(self.gains, "gains").items()
        }
        provenance = _read_provenance(read, self.provenance)
        for name, value in (("convs", convs), ("gains", gains), ("provenance", provenance)):
            object.__setattr__(self, name, value)

    def __hash__(self) -> int:
        return hash(self.fingerprint())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Genotype":
        """Read a genotype file.

        Raises:
            GenotypeError: naming the file, the convolution or key, and what was expected.
        """
        return cls.from_dict(read_json(path, GenotypeError, MAX_FILE_BYTES), source=str(path))

    @classmethod
    def from_dict(cls, data: Any, source: str = "genotype") -> "Genotype":
        """Build from the JSON form; `source` is what error messages call it."""
        read = Reader(source, GenotypeError)
        found = read.object(data, "").get("format", FORMAT)
        if type(found) is int and found > FORMAT:  # first: a newer format has other keys
            newer = f"is of a newer format ({short(found)}), this nats-zoo {__version__} reads up to {FORMAT}"
            raise GenotypeError(f"{source}: {newer}: upgrade nats-zoo")
        read.number(found, "format", str(FORMAT), least=FORMAT, most=FORMAT, kinds=(int,))
        values = read.keys(data, "", ("format", "architecture", "convs"), ("gains", "provenance"))
        return cls(**{key: value for key, value in values.items() if key != "format"}, source=source)

    @classmethod
    def from_ic_conv(cls, path: str | os.PathLike, architecture: str) -> "Genotype":
        """Read one of Inception Convolution's published pattern files (arXiv 2012.13587).

        They are JSON lists with one object per 3x3 convolution of the four stages in network order,
        `{"(dilation_h - 1, dilation_w - 1)": channels}`, channels packed in that order. For grouped convolutions
        (ResNeXt) the files count cardinality groups instead, as is told by their sum.

        Args:
            path: the pattern file.
            architecture: timm's name of the network it was made for, such as `resnet50`.

        Raises:
            GenotypeError: malformed file, or a pattern that does not fit the architecture.
        """
        return _OF_NETWORKS["from_ic_conv"](path, architecture)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, a deep copy made of plain dicts, lists, strings and numbers."""
        data: dict[str, Any] = {
            "format": FORMAT,
            "architecture": self.architecture,
            "convs": {name: [list(run) for run in runs] for name, runs in self.convs.items()},
        }
        if self.gains:
            data["gains"] = {name: list(values) for name, values in self.gains.items()}
        if self.provenance:
            data["provenance"] = json.loads(json.dumps(self.provenance))
        return data

    def save(self, path: str | os.PathLike) -> None:
        """Write the genotype file: beside its target, then renamed, so that it is whole or absent."""
        write_text(path, _format_json(self.to_dict()))

    def fingerprint(self) -> str:
        """sha256 (hex) over what the network computes: architecture, runs and gains, not the provenance."""
        content = {k: v for k, v in self.to_dict().items() if k != "provenance"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def transfer(self, architecture: str) -> "Genotype":
        """This genotype on another architecture: nothing is searched.

        The convolutions of both plain networks that can be regrouped (see `stages.searchable_convs`) correspond by
        stage, by relative depth and by relative position. Within a stage, block j of the target's m takes block
        floor((j + 0.5) / m * n) of the source's n, where a block is the module that a convolution lies in; so do the
        convolutions within a block. Within a convolution, unit u of the target's U takes the dilation of channel
        floor((u + 0.5) / U * C) of the source's C; a unit is a channel, or a cardinality group where there are any.
        A stage that the source has not stays plain. Convolutions that come out wholly plain are left out. Gains are
        dropped, because they were calibrated on the source's weights; so are convolutions that lie in no stage, such as
        1x1 ones. The provenance names both.

        Args:
            architecture: timm's name of the target, such as `resnet101`.

        Returns:
            A genotype whose provenance holds `method: "transfer"`, the source's architecture, name and fingerprint,
            and its provenance under `source_provenance`; this very genotype, if it is the same architecture.

        Raises:
            GenotypeError: an architecture that timm does not know or that has no convolution to regroup, or a
                genotype that does not fit its own.
        """
        return _OF_NETWORKS["transfer"](self, architecture)

    def merge(self, max_dilations: int) -> "Genotype":
        """The nearest genotype with at most `max_dilations` different dilations in each convolution.

        A convolution that has more keeps those of its own dilations that move its channels least: the set S of at
        most `max_dilations` that minimises the sum over channels of min over (h', w') in S of |h - h'| + |w - w'|,
        found exactly. Among equals, the set that leaves more channels unchanged, then the one that comes first when
        its dilations are sorted. A channel moves to the nearest dilation in S, to the smaller (height, then width) of
        equally near ones. Runs keep their channels.

        The gain of a run that moves becomes 1, because it was calibrated for another dilation.

        Returns:
            A genotype with the same provenance and in it `merged`: the share of channels that moved, the mean distance
            over all channels, and the fingerprint of the genotype before; this very genotype, if nothing moves.

        Raises:
            GenotypeError: `max_dilations` is no positive integer, or a convolution has too many different dilations
                to try all sets (9 never are, nor 20).
        """
        merged = merge_convs(self.convs, self.gains, max_dilations=max_dilations, source=self.source)
        if merged is None:
            return self
        convs, gains, facts = merged
        facts["source_fingerprint"] = self.fingerprint()
        if "merged" in self.provenance:
            facts["earlier"] = self.provenance["merged"]
        provenance = {**self.provenance, "merged": facts}
        return Genotype(self.architecture, convs, gains, provenance, source=f"{self.source} merged")

    def dilation_shares(self) -> dict[str, dict[Dilation, float]]:
        """Share of output channels per dilation, for each convolution (the paper's intensity I^g), in 0..1."""
        shares: dict[str, dict[Dilation, float]] = {}
        for name, runs in self.convs.items():
            counts = runs.counts()
            shares[name] = {
                dilation: counts[dilation] / runs.channels for dilation in sorted(counts, key=Dilation.order)
            }
        return shares

    def share_changed(self) -> float:
        """Share of the named convolutions' output channels whose dilation is not (1, 1), in 0..1."""
        runs = self.all_runs()
        return (runs.channels - runs.counts()[PLAIN]) / runs.channels if runs else 0.0

    def all_runs(self) -> Runs:
        """Those of all named convolutions, one after another."""
        return Runs(run for runs in self.convs.values() for run in runs)

    def __str__(self) -> str:
        shares = self.dilation_shares()
        columns = sorted({d for row in shares.values() for d in row}, key=Dilation.order)
        rows = [["convolution", "channels", *map(str, columns)]]
        for name, row in shares.items():
            cells = [f"{row[d]:.0%}" if d in row else "." for d in columns]
            rows.append([name, str(self.convs[name].channels), *cells])
        title = f"{self.architecture}: {len(shares)} convolutions, {self.share_changed():.0%} of channels changed"
        return "\n".join([title, *text_table(rows, "<", ">", ">6")])


def method_of_networks(function: Callable[..., Genotype]) -> Callable[..., Genotype]:
    """Decorate what `Genotype`'s method of the same name calls.

    @method_of_networks
    def transfer(genotype, architecture): ...
    """
    _OF_NETWORKS[function.__name__] = function
    return function


def _read_provenance(read: Reader, provenance: Any) -> dict[str, Any]:
    """A deep copy in plain JSON data, as it will be read back."""
    content = read.object(provenance, "provenance")
    try:
        text = json.dumps(content, allow_nan=False, ensure_ascii=False)
        copy = json.loads(text.encode())  # encoded: half a surrogate pair could not be written into a model card
    except (TypeError, ValueError, RecursionError) as error:
        raise GenotypeError(f"{read.source}: provenance must be plain JSON data: {one_line(error)[:200]}") from error
    if is_deeper(copy, MAX_DEPTH):
        raise GenotypeError(f"{read.source}: provenance is nested too deeply, expected at most {MAX_DEPTH} levels")
    return copy


def read_run(read: Reader, run: Any, name: str) -> Run:
    """Read one run of a file, `[channels, dilation_h, dilation_w]`; `name` is the convolution's.

    >>> read_run(Reader("mine.json", GenotypeError), [80, 1, 3], "layer2.0.conv2").dilation
    (1, 3)
    """
    kind = "a run [channels, dilation_h, dilation_w] of positive integers"
    limits = f"{kind}, at most {MAX_CHANNELS} channels and a dilation of {MAX_DILATION}"
    values = read.sequence(run, name, kind, 3)
    for value, most in zip(values, (MAX_CHANNELS, MAX_DILATION, MAX_DILATION), strict=True):
        if type(value) is not int or not 1 <= value <= most:  # type(): True is an int to Python
            raise read.wrong(name, limits, run)
    return Run(*values)


def _read_gains(read: Reader, values: Any, name: str, convs: Mapping[str, Runs]) -> tuple[float, ...]:
    if name not in convs:
        raise GenotypeError(f"{read.source}: gains name the convolution {name!r}, which is not among convs")
    number = len(convs[name])
    values = read.sequence(values, name, f"{number} gains, one per run", number)
    return tuple(float(read.number(value, name, "a gain, a finite number")) for value in values)


def _format_json(data: dict[str, Any]) -> str:
    """One line per convolution: a diff of two genotypes is then readable."""
    blocks = []
    for key, value in data.items():
        if key in ("convs", "gains"):
            rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in value.items())
            blocks.append(f"  {json.dumps(key)}: {{\n{rows}\n  }}")
        else:
            blocks.append(f"  {json.dumps(key)}: " + json.dumps(value, indent=2).replace("\n", "\n  "))
    return "{\n" + ",\n".join(blocks) + "\n}\n"
