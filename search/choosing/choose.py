"""Which candidate each group of a searched convolution takes, with few dilations and little latency if asked for."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, combinations

import torch
from torch import Tensor

from ..space import SearchError

MAX_SETS = 20_000  # per convolution, about a second; all sets of 14 candidates, those of at most 5 of 20


def choose(
    log_p: Tensor,
    max_dilations: int | None = None,
    cost: Callable[[Sequence[int]], float] | None = None,
    cost_weight: float = 0.0,
) -> Tensor:
    """Choose a candidate for every group of one convolution.

    Without a limit and a cost every group takes its likeliest candidate, the first of equally likely ones: the
    paper's ind_i = argmax_g alpha_i^g. Otherwise all sets S of at most `max_dilations` candidates are tried, every
    group takes its likeliest in S, and the set with the largest

        sum_i max_{g in S} log p_i^g - cost_weight * t(S) / t_plain

    wins; among equals the one with fewer dilations, then the one whose candidates come first. Without a cost that is
    the likeliest of all assignments that use at most `max_dilations` candidates. With one it is the best among those
    where every group takes its likeliest candidate in a set.

    Args:
        log_p: log-probabilities, (groups, candidates).
        max_dilations: how many different candidates the groups may take together (merge); None: any number.
        cost: t(S) / t_plain for the number of groups that take each candidate, such as `CostTable.of_groups` gives.
        cost_weight: lambda, in nats of log-probability for as much time as the plain convolution takes.

    Returns:
        (groups,) indices of candidates, int64, on log_p's device.

    Raises:
        SearchError: log_p is not finite or no matrix, a limit below 1, a weight that is negative or has no cost, a cost
            that is not finite, or more than MAX_SETS sets.
    """
    _check(log_p, max_dilations, cost, cost_weight)
    if max_dilations is None and cost_weight == 0:
        return log_p.argmax(1)
    scores = log_p.detach().double().cpu()
    best: Tensor | None = None
    best_score = -math.inf
    for members in _sets(log_p.shape[1], max_dilations):
        values, places = scores[:, list(members)].max(1)
        counts = _counts(places, members, log_p.shape[1])
        if not all(counts[g] for g in members):
            continue  # equal to a smaller set, which was tried before
        score = math.fsum(values.tolist())  # exact: no tie is broken by the order of a sum
        if cost is not None and cost_weight > 0:
            score -= cost_weight * _finite(cost(counts))
        if best is None or score > best_score:
            best, best_score = torch.tensor(members)[places], score
    assert best is not None, "the first set is never skipped"
    return best.to(log_p.device)


def _check(log_p: Tensor, max_dilations: int | None, cost: Callable | None, cost_weight: float) -> None:
    if log_p.ndim != 2 or not log_p.numel():
        raise SearchError(f"log_p: expected (groups, candidates), found the shape {tuple(log_p.shape)}")
    if not log_p.isfinite().all():
        raise SearchError("log_p: expected finite log-probabilities")
    if max_dilations is not None and (type(max_dilations) is not int or max_dilations < 1):  # True is an int to Python
        raise SearchError(f"max_dilations: expected a positive integer, found {max_dilations!r}")
    if not 0 <= cost_weight < math.inf:
        raise SearchError(f"cost_weight: expected a finite number that is not negative, found {cost_weight!r}")
    if cost_weight > 0 and cost is None:
        raise SearchError("cost_weight: needs measured costs, from nats profile")


def _sets(candidates: int, most: int | None) -> Iterator[tuple[int, ...]]:
    """All nonempty sets of at most so many candidates, smaller ones first, then in lexicographic order."""
    most = candidates if most is None else min(most, candidates)
    total = sum(math.comb(candidates, size) for size in range(1, most + 1))
    if total > MAX_SETS:
        raise SearchError(
            f"max_dilations: {candidates} candidates have {total} sets of at most {most}, expected at most {MAX_SETS};"
            " a smaller max_dilations has fewer"
        )
    return chain.from_iterable(combinations(range(candidates), size) for size in range(1, most + 1))


def _counts(places: Tensor, members: Sequence[int], candidates: int) -> list[int]:
    """How many groups take each candidate, from each group's place in the set."""
    counts = [0] * candidates
    for member, count in zip(members, places.bincount(minlength=len(members)).tolist(), strict=True):
        counts[member] = count
    return counts


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise SearchError(f"cost: expected a finite number, found {value}")
    return value
