"""Statistics of small paired comparisons, and of genotypes that several seeds found.

Differences are taken within blocks (same training seed, same data), so that what a block has in common cancels. Few
blocks show little: at a standard deviation of 0.8 of the differences, a true difference of 1 is seen at the 5% level
in 24% of studies of 3 blocks, 56% of 5, 86% of 8. Needs scipy: pip install 'nats-zoo[benchmarks]'.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import permutation_test, t

ENOUGH_BLOCKS = 8  # fewer are described, not tested
RANDOM_FLIPS = 100_000  # more than all flips of 16 pairs, which are then gone through one by one
SHUFFLES = 2000
LEVEL = 0.95


class Paired(NamedTuple):
    """What the differences of n pairs say.

    Attributes:
        differences: one per pair.
        mean: of the differences.
        sd: their standard deviation (n - 1); None for one pair.
        low, high: ends of the mean's 95% confidence interval by Student's t; None for one pair.
        p: two-sided, of the sign-flip permutation test.
    """

    differences: tuple[float, ...]
    mean: float
    sd: float | None
    low: float | None
    high: float | None
    p: float

    @property
    def is_descriptive(self) -> bool:
        """Whether there are too few pairs to conclude anything."""
        return len(self.differences) < ENOUGH_BLOCKS


def paired(differences: Sequence[float], seed: int = 0) -> Paired:
    """Mean, interval and test of paired differences.

    Args:
        differences: one per pair, at least one.
        seed: of the random sign flips, used beyond 16 pairs only.
    """
    sd, margin = spread(differences)
    mean, p = statistics.fmean(differences), sign_flip_p(differences, seed)
    low, high = (None, None) if margin is None else (mean - margin, mean + margin)
    return Paired(tuple(differences), mean, sd, low, high, p)


def spread(differences: Sequence[float]) -> tuple[float | None, float | None]:
    """Standard deviation (n - 1), and half the mean's 95% confidence interval by Student's t; None for one pair."""
    n = len(differences)
    if n == 1:
        return None, None
    sd = statistics.stdev(differences)
    return sd, float(t.ppf((1 + LEVEL) / 2, n - 1)) * sd / math.sqrt(n)


def sign_flip_p(differences: Sequence[float], seed: int = 0) -> float:
    """Two-sided p-value of the hypothesis that each difference is as likely to have the other sign.

    The share of sign flips whose sum is at least as far from zero as the observed one: of all 2^n up to 16 pairs
    (the smallest p is then 2 / 2^n); beyond, of 100,000 random ones and the observed one.
    """
    total = np.abs(differences).sum()
    if len(differences) == 1 or total == 0:  # the library refuses one pair; and no flip moves a sum of zeros
        return 1.0

    def far_from_zero(values: np.ndarray, axis: int) -> np.ndarray:
        return np.abs(values.sum(axis) / total).round(9)  # equal sums, added up in another order

    options = {"permutation_type": "samples", "alternative": "greater", "n_resamples": RANDOM_FLIPS}
    return float(permutation_test((differences,), far_from_zero, rng=seed, **options).pvalue)


class Agreement(NamedTuple):
    """How far several seeds' genotypes agree, over all pairs of them.

    Attributes:
        observed: share of the output channels on which two genotypes have the same dilation.
        expected: the same if each had its shares on random channels: sum over dilations of the product of shares.
        p: share of shuffles (each convolution's groups permuted, in every genotype) that agree at least as much.
        pairs: of genotypes.
    """

    observed: float
    expected: float
    p: float
    pairs: int

    @property
    def beyond_chance(self) -> float | None:
        """(observed - expected) / (1 - expected): 0 at chance, 1 where all agree; None where chance is all."""
        return None if self.expected > 1 - 1e-12 else (self.observed - self.expected) / (1 - self.expected)


Layout = Mapping[str, tuple[np.ndarray, int]]
"""By convolution: the dilation of each group as an integer, (genotypes, groups), and the channels of a group."""


def agreement(layout: Layout, seed: int = 0, shuffles: int = SHUFFLES) -> Agreement:
    """Agreement of all pairs of genotypes, against chance.

    Args:
        layout: see `Layout`; at least two genotypes.
        seed: of the shuffles.
        shuffles: how many.
    """
    channels = sum(codes.shape[1] * size for codes, size in layout.values())
    genotypes = next(iter(layout.values()))[0].shape[0]
    pairs = math.comb(genotypes, 2)
    per_channel = pairs * channels
    observed = sum(size * _equal_pairs(codes) for codes, size in layout.values())
    expected = sum(size * _expected_equal_pairs(codes) for codes, size in layout.values())
    rng = np.random.default_rng(seed)
    as_far = 0
    for _ in range(shuffles):
        drawn = sum(size * _equal_pairs(rng.permuted(codes, axis=1)) for codes, size in layout.values())
        as_far += drawn >= observed
    return Agreement(float(observed / per_channel), float(expected / per_channel), (1 + as_far) / (1 + shuffles), pairs)


def _equal_pairs(codes: np.ndarray) -> int:
    """Over all groups: pairs of genotypes with the same dilation there. codes: (genotypes, groups)."""
    return sum(int((codes[i + 1 :] == codes[i]).sum()) for i in range(len(codes) - 1))


def _expected_equal_pairs(codes: np.ndarray) -> float:
    """The mean of `_equal_pairs` over all permutations of each genotype's groups."""
    groups = codes.shape[1]
    shares = np.stack([(codes == code).mean(1) for code in np.unique(codes)])  # (dilations, genotypes)
    together = shares.sum(1) ** 2 - (shares**2).sum(1)  # ordered pairs of different genotypes
    return groups * float(together.sum()) / 2
