"""Merge: a genotype with at most k different dilations in each convolution, the nearest such one."""

import math
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np

from ..base.errors import GenotypeError
from .runs import Dilation, Runs

# For one convolution; together about a second and 200 MB at most.
MAX_DIFFERENT = 1000  # different dilations
MAX_STEPS = 40_000_000  # sets of dilations, times dilations, times those in a set


def merge_convs(
    convs: Mapping[str, Runs], gains: Mapping[str, tuple[float, ...]], *, max_dilations: int, source: str
) -> tuple[dict[str, Runs], dict[str, tuple[float, ...]], dict[str, Any]] | None:
    """Find runs and gains as `Genotype.merge` describes, and what its provenance says of them; None: nothing moves.

    >>> convs = {"conv": Runs([(9, 1, 1), (1, 1, 3)])}
    >>> merge_convs(convs, {}, max_dilations=1, source="mine.json")[0]
    {'conv': (Run(channels=9, dilation_h=1, dilation_w=1), Run(channels=1, dilation_h=1, dilation_w=1))}
    """
    if type(max_dilations) is not int or max_dilations < 1:  # True is an int to Python
        raise GenotypeError(f"{source}: max_dilations must be a positive integer, found {max_dilations!r}")
    moves = {name: _moves(runs, max_dilations, f"{source}: {name}") for name, runs in convs.items()}
    if not any(moves.values()):
        return None
    merged = {
        name: Runs((run.channels, *moves[name].get(run.dilation, run.dilation)) for run in runs)
        for name, runs in convs.items()
    }
    new_gains = {
        name: tuple(1.0 if run.dilation in moves[name] else gain for run, gain in zip(convs[name], values, strict=True))
        for name, values in gains.items()
    }
    pairs = [(old, new) for name, runs in merged.items() for old, new in zip(convs[name], runs, strict=True)]
    total = sum(old.channels for old, _ in pairs)
    facts = {
        "max_dilations": max_dilations,
        "share_moved": sum(old.channels for old, new in pairs if old != new) / total,
        "mean_distance": sum(old.channels * _distance(old.dilation, new.dilation) for old, new in pairs) / total,
    }
    return merged, new_gains, facts


def _moves(runs: Runs, most: int, where: str) -> dict[Dilation, Dilation]:
    """Which dilations become which others, so that at most `most` are left; the others stay."""
    channels = runs.counts()
    if len(channels) <= most:
        return {}
    dilations = sorted(channels)
    kept = _best_set(dilations, [channels[dilation] for dilation in dilations], most, where)
    nearest = {dilation: min(kept, key=lambda other: (_distance(dilation, other), other)) for dilation in dilations}
    return {dilation: other for dilation, other in nearest.items() if dilation != other}


def _best_set(dilations: list[Dilation], channels: list[int], size: int, where: str) -> list[Dilation]:
    """The set of `size` of these (sorted) dilations that moves the channels least; all sets are tried.

    A smaller set is never better: one more dilation moves no channel further, and leaves its own where they are.
    """
    n = len(dilations)
    if n > MAX_DIFFERENT or math.comb(n, size) * n * size > MAX_STEPS:
        raise GenotypeError(f"{where}: {n} different dilations are too many to find the best {size} of them exactly")
    grid, weight = np.array(dilations), np.array(channels)
    distances = np.abs(grid[:, None] - grid).sum(-1)
    sets = np.array(list(combinations(range(n), size)))  # in lexicographic order
    nearest = distances[sets[:, 0]]
    for column in sets.T[1:]:
        np.minimum(nearest, distances[column], out=nearest)
    unchanged = weight[sets].sum(1)
    best = np.lexsort((-unchanged, nearest @ weight))[0]  # stable: the first of those that are equal in both
    return [dilations[i] for i in sets[best]]


def _distance(a: Dilation, b: Dilation) -> int:
    return abs(a[0] - b[0]) + abs(a[1] - b[1])
