"""How sure a measured win rate is: intervals, verdicts on thresholds, and dominance between runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

LEVEL = 0.05


def bootstrap_ci(values: np.ndarray, draws: int, seed: int) -> tuple[float, float]:
    """95 % percentile interval of the mean of (n,) values, prompts resampled."""
    if len(values) < 2 or draws < 1:
        return float(values.mean()), float(values.mean())
    rng, size = np.random.default_rng(seed), len(values)
    chunk = max(1, 2**22 // size)
    parts = [rng.integers(size, size=(min(chunk, draws - at), size)) for at in range(0, draws, chunk)]
    means = np.concatenate([values[part].mean(1) for part in parts])
    return tuple(float(x) for x in np.quantile(means, [0.025, 0.975]))  # type: ignore[return-value]


def verdict(interval: tuple[float, float], threshold: float | None) -> str | None:
    """Whether a threshold is kept: "yes" where the whole 95 % interval is at or above it, "no" where all of it is
    below, else "undecided"; None where nothing is asked."""
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
    p: dict[str, float]
    dominates: str | None  # the run that dominates the other; None where neither does


def dominance(
    win_rates: Mapping[str, np.ndarray], objectives: Sequence[str], permutations: int, seed: int
) -> list[Comparison]:
    """Which runs dominate which, from (n, K) win rates a run: a row a prompt, the same prompts in the same order.

    A dominates B where A's mean win rate is at least B's under every objective, and significantly higher under one.
    The test is paired by prompt: a two-sided sign-flip permutation test of the mean difference, which assumes nothing
    but that the sign of a prompt's difference would be a coin's if the runs were equal. p-values are adjusted by Holm's
    method over all pairs of runs and all objectives of this call, so that the chance of any false claim of a difference
    is at most 5 %. At least `permutations` random flips are drawn; more where many pairs are compared, since the least
    p that can be found is 1 / (1 + flips).
    """
    pairs = list(combinations(win_rates, 2))
    if not pairs:
        return []
    gaps = np.stack([win_rates[a] - win_rates[b] for a, b in pairs])  # (pairs, n, K)
    tests = gaps.transpose(0, 2, 1).reshape(-1, gaps.shape[1])
    raw = sign_flip_p(tests, max(permutations, 40 * len(tests)), seed)
    adjusted = holm(raw).reshape(len(pairs), -1)
    means = gaps.mean(1)
    return [
        Comparison(
            a,
            b,
            dict(zip(objectives, mean.tolist(), strict=True)),
            dict(zip(objectives, p.tolist(), strict=True)),
            _dominating(a, b, mean, p),
        )
        for (a, b), mean, p in zip(pairs, means, adjusted, strict=True)
    ]


def _dominating(first: str, second: str, mean: np.ndarray, p: np.ndarray) -> str | None:
    for name, gap in ((first, mean), (second, -mean)):
        if (gap >= 0).all() and ((gap > 0) & (p < LEVEL)).any():
            return name
    return None


def sign_flip_p(differences: np.ndarray, flips: int, seed: int) -> np.ndarray:
    """(T,) two-sided p-values of (T, n) paired differences: how often random signs give a mean as far from 0."""
    rng = np.random.default_rng(seed)
    size = differences.shape[1]
    observed = np.abs(differences.sum(1))
    as_far = np.zeros(len(differences))
    chunk = max(1, min(flips, 2**22 // size))
    for start in range(0, flips, chunk):
        signs = rng.integers(0, 2, (min(chunk, flips - start), size), dtype=np.int8) * 2.0 - 1.0
        as_far += (np.abs(signs @ differences.T) >= observed - 1e-12).sum(0)
    return (1 + as_far) / (1 + flips)


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
