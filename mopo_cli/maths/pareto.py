"""Fronts in win rates: what any policy reaches, how far a point lies from it, and the volume it dominates.

The win rates that policies reach form a convex set (a mixture of two policies reaches the mixture of their win rates),
so the exact front is that of a linear programme, and volumes are those of polytopes. Runs that were made are a finite
set: nobody mixes them, so theirs are non-dominated points, staircase volumes and distances, computed by moocore.
All objectives are maximised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial import ConvexHull

from mopo_cli.maths.oracle import least_slack


def front(win_rates: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """(D, K) the win rates of policies that maximise w . R, for win_rates (N, A, K) and weights (D, K) >= 0.

    With weights in all directions these are the vertices of the exact front; what lies between them is reached by
    mixing.
    """
    best = (win_rates @ directions.T).argmax(axis=1)  # (N, D)
    return np.stack([np.take_along_axis(win_rates, b[:, None, None], 1)[:, 0].mean(0) for b in best.T])


def directions(objectives: int, resolution: int) -> np.ndarray:
    """(D, K) non-negative weights that sum to one, in steps of 1 / resolution."""
    if objectives == 1:
        return np.ones((1, 1))
    rows = []
    for first in range(resolution + 1):
        rest = directions(objectives - 1, resolution - first) if first < resolution else np.zeros((1, objectives - 1))
        share = (resolution - first) / resolution
        rows.append(np.column_stack([np.full(len(rest), first / resolution), rest * share]))
    return np.concatenate(rows)


def distance_to_front(point: np.ndarray, win_rates: np.ndarray) -> float:
    """How much some policy gains on (K,) win rates in every objective at once; 0 on the front."""
    return max(0.0, least_slack(win_rates, point))


def dominated_volume(points: np.ndarray, reference: np.ndarray) -> float:
    """Hypervolume, above `reference` (K,), of what mixtures of (n, K) points reach or exceed.

    The set is the convex hull of the points and of their projections onto the reference's faces.
    """
    points = np.maximum(np.asarray(points, np.float64), reference)
    objectives = points.shape[1]
    corners = np.array(np.meshgrid(*[[False, True]] * objectives)).reshape(objectives, -1).T  # (2^K, K)
    hull = np.concatenate([np.where(corner, points, reference) for corner in corners])
    if np.any(hull.max(axis=0) <= reference):
        return 0.0
    return float(ConvexHull(hull, qhull_options="QJ Pp" if objectives > 2 else "").volume)


# --------------------------------------------------------------------------------------------- a finite set of runs
Prompts = tuple[str, ...]  # the same of prompts that are not independent of each other


@dataclass(frozen=True, slots=True)
class FrontMeasure:
    """One number of a set of runs, with its 95 % interval where the runs' samples give one."""

    value: float
    ci95: tuple[float, float] | None = None


def nondominated(points: np.ndarray | Sequence[Sequence[float]]) -> np.ndarray:
    """(n,) whether no other of the (n, K) points is at least as good in every objective and better in one."""
    import moocore

    return moocore.is_nondominated(np.asarray(points, np.float64), maximise=True, keep_weakly=True)


def hypervolume(points: np.ndarray, reference: np.ndarray) -> float:
    """Volume above `reference` (K,) that is dominated by one of the (n, K) points at least."""
    import moocore

    return float(moocore.hypervolume(np.asarray(points, np.float64), ref=reference, maximise=True))


def igd_plus(points: np.ndarray, front: np.ndarray) -> float:
    """IGD+ of (n, K) points: by how much, in win rate, they fall short of a point of the (m, K) front on average.

    Source: Ishibuchi, Masuda, Tanigaki, Nojima, *Modified distance calculation in GD and IGD*, 2015.
    """
    import moocore

    return float(moocore.igd_plus(np.asarray(points, np.float64), ref=np.asarray(front, np.float64), maximise=True))


def upper_edge(points: np.ndarray) -> np.ndarray:
    """(e, 2) corners of the upper right edge of what mixtures of (n, 2) points reach, by the first column."""
    low = points.min(axis=0) - 1.0  # so far down that the hull has an area whatever the points are
    corners = np.array([low, [low[0], points[:, 1].max()], [points[:, 0].max(), low[1]]])
    cloud = np.concatenate([points, corners])
    hull = cloud[ConvexHull(cloud).vertices]
    edge = hull[nondominated(hull)]
    return edge[np.argsort(edge[:, 0])]


def resample(runs: Sequence[tuple[Prompts, np.ndarray]], draws: int, seed: int) -> np.ndarray:
    """(draws, n, K) win rates of n runs, prompts drawn anew (those of one name together); a run is its prompts and
    (P, K) win rates on them.

    Runs on the same prompts share the draw, as they share the luck of the prompts they were asked.
    """
    means = np.empty((draws, len(runs), runs[0][1].shape[1]))
    groups: dict[Prompts, list[int]] = {}
    for i, (prompts, _) in enumerate(runs):
        groups.setdefault(prompts, []).append(i)
    rng = np.random.default_rng(seed)
    for prompts, members in groups.items():
        names, numbered = np.unique(prompts, return_inverse=True)
        count = len(names)
        weights = rng.multinomial(count, np.full(count, 1 / count), size=draws)[:, numbered]  # (draws, P)
        weights = weights / weights.sum(axis=1, keepdims=True)
        values = np.concatenate([runs[i][1] for i in members], axis=1)  # (P, members * K)
        means[:, members] = (weights @ values).reshape(draws, len(members), -1)
    return means


def measured(number: Callable[[np.ndarray], float], points: np.ndarray, redrawn: np.ndarray | None) -> FrontMeasure:
    """A number of (n, K) points with its basic bootstrap interval from (draws, n, K) redrawn ones.

    Basic (reflected), not percentile: the best of noisy points looks better than it is, by as much again in every
    redrawn set, so that percentiles of a hypervolume lie above the truth; reflected, they lie around it.
    """
    value = number(points)
    if redrawn is None:
        return FrontMeasure(value)
    low, high = np.quantile([number(drawn) for drawn in redrawn], [0.025, 0.975])
    return FrontMeasure(value, (float(2 * value - high), float(2 * value - low)))
