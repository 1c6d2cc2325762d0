"""Control genotypes: what a searched one has to beat. Nothing is searched, everything is a function of its seed.

    uniform   one dilation in every convolution that a search would search: can this data set show an effect at all?
    random    every group draws its dilation uniformly from the space's candidates
    shares    given shares of the channels per dilation, stage by stage; the seed says which group gets which
    shuffled  another genotype's shares, convolution by convolution, on other channels: does it matter which?

The paper's path-level search (N = 1) is no control of this kind: it is a search with `groups=1`.
"""

import math
import os
import random as random_module
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

from timm.models import split_model_name_tag
from torch import nn

from ..base.errors import NatsError
from ..base.files import output_file
from ..base.names import VARIANT_PREFIX
from ..folders.find_genotype import find_genotype
from ..genotype.genotype import Genotype
from ..genotype.runs import Dilation, Run, Runs
from ..networks.stages import searchable_convs
from ..networks.timm_network import meta_network
from ..networks.transform import transform
from ..version import __version__
from .config import DEFAULT_GROUPS
from .space import SearchSpace, count_groups, find_space, genotype_names, searched_convs

Shares = Mapping[int, Mapping[tuple[int, int], float]]  # by stage
SUM_TOLERANCE = 1e-3  # of shares, so that 0.333 three times will do


@dataclass(frozen=True)
class Searchable:
    """What a search would search, and how it would group channels; the fields are those of a SearchConfig.

    Args:
        architecture: timm's name of the plain network, such as `resnet50`; a tag or `nats_` before it are ignored.
        space: A, B, C, a YAML file (see `find_space`) or a SearchSpace.
        groups, channels_per_group: how output channels are grouped; one of the two, where groups matter.
        convs: names of the convolutions, or patterns.
        basic_block: which convolutions of a BasicBlock, 'conv2' or 'both'.
    """

    architecture: str
    space: str | SearchSpace = "C"
    groups: int | None = None
    channels_per_group: int | None = None
    convs: Sequence[str] = ()
    basic_block: Literal["conv2", "both"] = "conv2"

    def __post_init__(self) -> None:
        name = split_model_name_tag(self.architecture)[0].removeprefix(VARIANT_PREFIX)
        object.__setattr__(self, "architecture", name)
        if not isinstance(self.space, SearchSpace):
            object.__setattr__(self, "space", find_space(self.space))

    def _found_space(self) -> SearchSpace:
        assert isinstance(self.space, SearchSpace), "it was looked up when this was made"
        return self.space

    def found(self) -> "Iterator[Searched]":
        """The searched convolutions, in network order.

        Raises:
            NatsError: an architecture that timm has not, or that can not be searched.
        """
        body = meta_network(self.architecture, features_only=True)
        found = searched_convs(body, self._found_space(), self.convs, self.basic_block)
        names = genotype_names(body, list(found))
        stage_of = {name: stage for stage, members in searchable_convs(body).items() for name in members}
        for name, candidates in found.items():
            conv = body.get_submodule(name)
            assert isinstance(conv, nn.Conv2d), "searched_convs finds no others"
            yield Searched(names[name], conv, candidates, stage_of[name])

    def count(self, searched: "Searched") -> int:
        """Groups of a convolution; SearchError for a split that does not fit it."""
        return count_groups(searched.conv, searched.name, self.groups, self.channels_per_group)

    def facts(self, with_groups: bool = True) -> dict[str, Any]:
        """For the provenance."""
        size = {"groups": self.groups, "channels_per_group": self.channels_per_group} if with_groups else {}
        facts = {"space": self._found_space().name, **size, "convs": list(self.convs) or None}
        facts["basic_block"] = None if self.basic_block == "conv2" else self.basic_block
        return {key: value for key, value in facts.items() if value is not None}


class Searched(NamedTuple):
    """A convolution that a search would search: its name in the plain network, and what the search may choose."""

    name: str
    conv: nn.Conv2d
    candidates: tuple[Dilation, ...]
    stage: int


class Unit(NamedTuple):
    """What `shuffled` moves: a dilation with its run's gain, if it has one."""

    dilation: Dilation
    gain: float | None


def uniform(searchable: Searchable, dilation: tuple[int, int]) -> Genotype:
    """One dilation in all the convolutions that a search would search.

    Args:
        searchable: its groups do not matter.
        dilation: (height, width); the space need not have it.

    Raises:
        NatsError: a network that can not be searched, or a dilation that is none.
    """
    dilation = Dilation.check(dilation)
    convs = {name: [Run(conv.out_channels, *dilation)] for name, conv, _, _ in searchable.found()}
    provenance = {"method": "uniform", "dilation": str(dilation), **searchable.facts(with_groups=False)}
    return _genotype(searchable.architecture, convs, provenance)


def random(searchable: Searchable, seed: int = 0) -> Genotype:
    """Every group of every searched convolution draws one of its candidates, all equally likely.

    Raises:
        NatsError: a network that can not be searched, or a split that does not divide the channels or cuts a
            cardinality group.
    """
    convs = {}
    for searched in searchable.found():
        rng = _rng("random", seed, searched.name)
        drawn = [rng.choice(searched.candidates) for _ in range(searchable.count(searched))]
        convs[searched.name] = Runs.of(drawn, searched.conv.out_channels // len(drawn))
    return _genotype(searchable.architecture, convs, {"method": "random", **searchable.facts(), "seed": seed})


def shares(searchable: Searchable, stages: Shares, seed: int = 0) -> Genotype:
    """Given shares of the groups per dilation, in every searched convolution of a stage.

    Shares are rounded to whole groups by largest remainder (of equal ones, the dilation that is listed first gets the
    group); which group gets which dilation is drawn.

    Args:
        searchable: see there.
        stages: share in 0..1 by dilation by stage, such as {3: {(1, 1): 0.5, (1, 3): 0.5}}; the shares of a stage add
            up to 1. Stages are numbered as the space's are (2 is ResNet's layer2). Stages not named stay plain. The
            space need not have the dilations.
        seed: of the draw.

    Raises:
        NatsError: as `random`; shares that are none, or of a stage that is not searched.
    """
    found = list(searchable.found())
    _check_shares(stages, {searched.stage for searched in found})
    convs = {}
    for searched in found:
        if searched.stage in stages:
            counts = round_shares(stages[searched.stage], searchable.count(searched))
            drawn = [dilation for dilation, groups in counts.items() for _ in range(groups)]
            _rng("shares", seed, searched.name).shuffle(drawn)
            convs[searched.name] = Runs.of(drawn, searched.conv.out_channels // len(drawn))
    rows = {str(stage): {str(Dilation(*d)): share for d, share in row.items()} for stage, row in stages.items()}
    provenance = {"method": "shares", **searchable.facts(), "seed": seed, "shares": rows}
    return _genotype(searchable.architecture, convs, provenance)


def shuffled(genotype: Genotype | Mapping | str | os.PathLike, seed: int = 0) -> Genotype:
    """The same shares in each convolution on other channels: its groups, permuted.

    A convolution's unit is the group that the provenance names (groups or channels_per_group), where all runs are
    whole groups; else the greatest common divisor of its runs' lengths. Either takes whole cardinality groups, as runs
    do. Gains go with their groups. Every convolution that can be laid out differently is.

    Args:
        genotype: a Genotype, its JSON form, a published name or a file's path.
        seed: of the permutations.

    Raises:
        NatsError: no such genotype, or one that does not fit its architecture.
    """
    genotype = find_genotype(genotype)
    transform(meta_network(genotype.architecture), genotype)  # refuses what does not fit
    convs, gains = {}, {}
    for name in genotype.convs:
        size = group_size(genotype, name)
        layout = _shuffle_units(_units(genotype, name, size), _rng("shuffled", seed, name))
        runs = [(unit, len(list(same)) * size) for unit, same in groupby(layout)]
        convs[name] = [Run(channels, *unit.dilation) for unit, channels in runs]
        if name in genotype.gains:
            gains[name] = tuple(unit.gain for unit, _ in runs)
    known = genotype.provenance
    provenance = {
        "method": "shuffled",
        **{key: known[key] for key in ("space", "groups", "channels_per_group") if key in known},
        "seed": seed,
        "source_fingerprint": genotype.fingerprint(),
        "source_provenance": dict(known),
    }
    return _genotype(genotype.architecture, convs, provenance, gains)


# Which options of `make_control` each kind needs, and which others it takes.
_WHERE = ("space", "convs", "basic_block")
_SIZE = ("groups", "channels_per_group")
_OPTIONS = {
    "uniform": (("backbone", "dilation"), _WHERE),
    "random": (("backbone",), (*_WHERE, *_SIZE)),
    "shares": (("backbone", "shares"), (*_WHERE, *_SIZE)),
    "shuffled": (("genotype",), ()),
}


def make_control(
    kind: Literal["uniform", "random", "shares", "shuffled"],
    backbone: str | None = None,
    space: str | None = None,
    groups: int | None = None,
    channels_per_group: int | None = None,
    convs: list[str] | None = None,
    basic_block: Literal["conv2", "both"] | None = None,
    dilation: str | None = None,
    shares: dict[int, dict[str, float]] | None = None,
    genotype: str | None = None,
    seed: int = 0,
    output: str | None = None,
) -> tuple[Genotype, Path]:
    """Make a genotype without a search, as a control for a searched one.

    Args:
        kind: uniform (one dilation everywhere), random (each group draws any candidate), shares (given shares of each
            stage's groups), or shuffled (another genotype's shares, on other channels).
        backbone: timm name of the plain network; of all kinds but shuffled.
        space: the candidate dilations and stages, as for nats search: A, B, C or a YAML file; default: C.
        groups: groups of output channels per convolution, of random and shares; default: 16.
        channels_per_group: size of the groups instead of their number.
        convs: names of the convolutions, or patterns, as for nats search.
        basic_block: which convolutions of a BasicBlock, as for nats search; default: conv2.
        dilation: of uniform, as HEIGHTxWIDTH.
        shares: of shares, by stage and dilation, such as {3: {1x1: 0.5, 1x3: 0.5}}; other stages stay plain.
        genotype: of shuffled: a published genotype's name, a genotype file, or the folder of a search or model.
        seed: of what is drawn.
        output: JSON file; default: the backbone's name, the kind and the seed, in the working folder.

    Returns:
        The genotype, and the file.

    Raises:
        NatsError: an option that the kind needs is missing, one that it does not take is there, or one is wrong.
    """
    options: dict[str, Any] = {"backbone": backbone, "space": space, "convs": convs, "basic_block": basic_block}
    options |= {"groups": groups, "channels_per_group": channels_per_group, "dilation": dilation, "shares": shares}
    options["genotype"] = genotype
    given = {name: value for name, value in options.items() if value is not None}
    needed, others = _OPTIONS[kind]
    for name in given:
        if name not in (*needed, *others):
            raise NatsError(f"{name}: is not for {kind}, which takes {', '.join((*needed, *others))}")
    for name in needed:
        if name not in given:
            raise NatsError(f"{name}: is missing, {kind} needs it")
    made = _make(kind, given, seed)
    target = output_file(output or f"{made.architecture}_{kind}_{dilation or seed}.json")
    made.save(target)
    return made, target


def _make(kind: str, options: Mapping[str, Any], seed: int) -> Genotype:
    if kind == "shuffled":
        return shuffled(options["genotype"], seed)
    size = {name: options[name] for name in _SIZE if name in options} or {"groups": DEFAULT_GROUPS}
    where = {name: options[name] for name in _WHERE if name in options}
    searchable = Searchable(options["backbone"], **where, **size)
    if kind == "uniform":
        return uniform(searchable, Dilation.parse(options["dilation"]))
    if kind == "random":
        return random(searchable, seed)
    return shares(searchable, parse_shares(options["shares"]), seed)


def group_size(genotype: Genotype, name: str) -> int:
    """Output channels of one group of a genotype's convolution; see `shuffled`."""
    lengths = [run.channels for run in genotype.convs[name]]
    common, total = math.gcd(*lengths), sum(lengths)
    groups, size = (genotype.provenance.get(key) for key in ("groups", "channels_per_group"))
    if type(groups) is int and groups > 0 and total % groups == 0:
        size = total // groups
    return size if type(size) is int and size > 0 and common % size == 0 else common


def round_shares(shares: Mapping[tuple[int, int], float], groups: int) -> dict[tuple[int, int], int]:
    """Groups per dilation, by largest remainder: none is further than one group from its exact share."""
    total = sum(shares.values())
    quotas = {dilation: round(share / total * groups, 9) for dilation, share in shares.items()}
    counts = {dilation: math.floor(quota) for dilation, quota in quotas.items()}
    by_remainder = sorted(quotas, key=lambda dilation: counts[dilation] - quotas[dilation])
    for dilation in by_remainder[: groups - sum(counts.values())]:
        counts[dilation] += 1
    return counts


def parse_shares(data: Any) -> dict[int, dict[tuple[int, int], float]]:
    """What `shares` takes, from plain data such as {3: {'1x1': 0.5, '1x3': 0.5}}.

    Raises:
        NatsError: data of another form.
    """
    if not isinstance(data, Mapping) or not all(isinstance(row, Mapping) for row in data.values()):
        raise NatsError("shares: expected {STAGE: {HEIGHTxWIDTH: SHARE, ...}, ...}" + f", found {data!r}")
    parsed: dict[int, dict[tuple[int, int], float]] = {}
    for stage, row in data.items():
        if not str(stage).isdecimal():
            raise NatsError(f"shares: expected a stage's number, found {stage!r}")
        parsed[int(stage)] = {Dilation.parse(str(dilation)): share for dilation, share in row.items()}
    return parsed


def _genotype(
    architecture: str, convs: Mapping[str, Sequence[Run]], provenance: dict[str, Any], gains: Mapping | None = None
) -> Genotype:
    provenance = {**provenance, "version": __version__}
    whole = {name: Runs(runs) for name, runs in convs.items()}
    return Genotype(architecture, whole, gains=gains or {}, provenance=provenance)


def _units(genotype: Genotype, name: str, size: int) -> list[Unit]:
    runs = genotype.convs[name]
    gains = genotype.gains.get(name, (None,) * len(runs))
    return [
        Unit(run.dilation, gain) for run, gain in zip(runs, gains, strict=True) for _ in range(run.channels // size)
    ]


def _shuffle_units(units: Sequence[Unit], rng: random_module.Random) -> list[Unit]:
    """Permuted so that the dilations lie differently, if they are not all the same."""
    before = [unit.dilation for unit in units]
    layout = list(units)
    rng.shuffle(layout)
    while len(set(before)) > 1 and [unit.dilation for unit in layout] == before:
        rng.shuffle(layout)
    return layout


def _rng(method: str, seed: int, name: str) -> random_module.Random:
    """Every convolution draws by itself, so that no draw depends on which others there are, or on their order."""
    return random_module.Random(f"{method}/{seed}/{name}")


def _check_shares(stages: Shares, known: set[int]) -> None:
    if not stages:
        raise NatsError("shares: expected shares for at least one stage")
    for stage, row in stages.items():
        where = f"shares: stage {stage}"
        if stage not in known:
            raise NatsError(f"{where}: expected one of the searched stages, {', '.join(map(str, sorted(known)))}")
        for dilation, share in row.items():
            text = str(Dilation.check(dilation))
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
                raise NatsError(f"{where}: {text}: expected a share from 0 to 1, found {share!r}")
        if abs(sum(row.values()) - 1) > SUM_TOLERANCE:
            raise NatsError(f"{where}: its shares add up to {sum(row.values()):.4g}, expected 1")
