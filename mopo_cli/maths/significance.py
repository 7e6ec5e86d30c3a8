"""How sure a measured win rate is: intervals, verdicts on thresholds, and dominance between runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.special import stdtrit

LEVEL = 0.05
FEWEST = 30  # independent prompts: below, there is no interval, and no verdict on a threshold
WORSE = 0.01  # of win rate: a run that is worse by less under an objective may dominate another all the same
Interval = tuple[float, float]
UNKNOWN: Interval = (math.nan, math.nan)


def win_rate_ci(values: np.ndarray, units: np.ndarray) -> Interval:
    """95 % interval of the mean of (n,) values in [0, 1]; UNKNOWN of fewer than FEWEST units.

    units (n,): whole numbers, the same of values that are not independent of each other. Wilson's score interval (1927)
    with Student's quantile and the effective sample size m (1 - m) / V, where V is the cluster-robust variance of the
    mean m. To V comes (the farther end's distance from m, over g) squared, as if one unit more had been met that lies
    there: else values that are alike by luck would be certain. g is Kish's effective number of units, the least that
    the sample size may be. docs/reading-results.md has the coverage that was measured.
    """
    count = len(np.unique(units))
    if count < FEWEST:
        return UNKNOWN
    mean, variance, g = _clustered(values, units)
    t = float(stdtrit(g - 1.0, 1.0 - LEVEL / 2.0))
    spread = mean * (1.0 - mean)
    size = max(g, spread / (variance + (max(mean, 1.0 - mean) / g) ** 2))
    centre, scale = mean + t**2 / (2.0 * size), 1.0 + t**2 / size
    half = t * math.sqrt(spread / size + t**2 / (4.0 * size**2))
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def mean_ci(values: np.ndarray, units: np.ndarray) -> Interval:
    """95 % interval of the mean of (n,) values without bounds: Student's, with the cluster-robust variance; UNKNOWN of
    fewer than FEWEST units."""
    if len(np.unique(units)) < FEWEST:
        return UNKNOWN
    mean, variance, g = _clustered(values, units)
    half = float(stdtrit(g - 1.0, 1.0 - LEVEL / 2.0)) * math.sqrt(variance)
    return mean - half, mean + half


def _clustered(values: np.ndarray, units: np.ndarray) -> tuple[float, float, float]:
    """The mean of (n,) values, its variance robust to dependence within units, and Kish's effective number of units."""
    _, numbered, sizes = np.unique(units, return_inverse=True, return_counts=True)
    mean, count = float(values.mean()), len(sizes)
    sums = np.bincount(numbered, weights=values - mean)
    variance = float((sums**2).sum()) / len(values) ** 2 * count / (count - 1)
    return mean, variance, len(values) ** 2 / float((sizes**2).sum())


def verdict(interval: Interval, threshold: float | None) -> str | None:
    """Whether a threshold is kept: "yes" where the whole interval is at or above it, "no" where all of it is below,
    else (or where the interval is unknown) "undecided"; None where nothing is asked."""
    if threshold is None:
        return None
    low, high = interval
    return "yes" if low >= threshold else "no" if high < threshold else "undecided"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs on the same prompts: mean difference of win rates (first minus second) and adjusted p, by objective."""

    first: str
    second: str
    difference: dict[str, float]
    p: dict[str, float]  # two-sided, of no difference
    dominates: str | None  # the run that dominates the other; None where neither does
    margin: float = WORSE


def dominance(
    win_rates: Mapping[str, np.ndarray], objectives: Sequence[str], permutations: int, seed: int, units: np.ndarray
) -> list[Comparison]:
    """Which runs dominate which, from (n, K) win rates a run: a row a prompt, the same prompts in the same order.

    A dominates B where it is significantly better under one objective, and under no other worse by WORSE or more, which
    is tested as well (non-inferiority): a difference that only seems to be none is no evidence. Both are one-sided
    sign-flip permutation tests, paired by prompt, of the sums over units (n,), whole numbers that prompts share which
    are not independent of each other. Better under one of K objectives: Bonferroni's K p. And under every objective not
    worse: the largest p, as all must hold (intersection-union test, Berger 1982). The larger of the two is the p of the
    claim, adjusted by Holm's method over all ordered pairs of runs, so that the chance of any false claim is at most
    5 %; of fewer than FEWEST units nothing is claimed. The differences' own p are two-sided, adjusted over all pairs
    and objectives. At least `permutations` random flips are drawn; more where many pairs are compared, since the least
    p that can be found is 1 / (1 + flips).
    """
    pairs = list(combinations(win_rates, 2))
    if not pairs:
        return []
    gaps = np.stack([win_rates[a] - win_rates[b] for a, b in pairs]).transpose(0, 2, 1)  # (pairs, K, n)
    size = gaps.shape[0] * gaps.shape[1]
    summed = _by_unit(np.concatenate([gaps, gaps + WORSE, WORSE - gaps]).reshape(3 * size, -1), units)
    greater, less = sign_flip_p(summed, max(permutations, 80 * size), seed)
    greater, less = greater.reshape(3, *gaps.shape[:2]), less.reshape(3, *gaps.shape[:2])
    differ = holm(np.minimum(2.0 * np.minimum(greater[0], less[0]), 1.0).ravel()).reshape(gaps.shape[:2])
    claims = np.concatenate([_claim(greater[0], greater[1]), _claim(less[0], greater[2])])
    first, second = np.split(holm(claims) < LEVEL, 2)
    enough = len(np.unique(units)) >= FEWEST
    return [
        Comparison(
            a,
            b,
            dict(zip(objectives, gap.mean(1).tolist(), strict=True)),
            dict(zip(objectives, p.tolist(), strict=True)),
            None if not enough else a if over else b if under else None,
        )
        for (a, b), gap, p, over, under in zip(pairs, gaps, differ, first, second, strict=True)
    ]


def _claim(better: np.ndarray, not_worse: np.ndarray) -> np.ndarray:
    """(pairs,) p of: better under one objective at least, and worse by WORSE under none; from (pairs, K) p of each."""
    return np.maximum(np.minimum(better.shape[1] * better.min(1), 1.0), not_worse.max(1))


def _by_unit(rows: np.ndarray, units: np.ndarray) -> np.ndarray:
    """(T, G) sums of (T, n) over the columns of each unit."""
    _, numbered = np.unique(units, return_inverse=True)
    return np.stack([np.bincount(numbered, weights=row) for row in rows])


def sign_flip_p(differences: np.ndarray, flips: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(T,) one-sided p-values of (T, n) paired differences: how often random signs give a mean as far above 0, and
    below."""
    rng = np.random.default_rng(seed)
    size = differences.shape[1]
    observed = differences.sum(1)
    above, below = np.zeros(len(differences)), np.zeros(len(differences))
    chunk = max(1, min(flips, 2**22 // size))
    for start in range(0, flips, chunk):
        signs = rng.integers(0, 2, (min(chunk, flips - start), size), dtype=np.int8) * 2.0 - 1.0
        drawn = signs @ differences.T
        above += (drawn >= observed - 1e-12).sum(0)
        below += (drawn <= observed + 1e-12).sum(0)
    return (1 + above) / (1 + flips), (1 + below) / (1 + flips)


def holm(p: np.ndarray) -> np.ndarray:
    """p-values adjusted for having been looked at together (Holm 1979): the step-down form of Bonferroni."""
    order = np.argsort(p)
    scaled = p[order] * (len(p) - np.arange(len(p)))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted


def distinct(texts: Sequence[str], n: int) -> float:
    """The share of different ones among all n-grams of words of the texts (Li et al. 2016); 0 where there is none."""
    grams = [tuple(words[i : i + n]) for text in texts for words in [text.split()] for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
