"""Fronts in win rates: what any policy reaches, how far a point lies from it, and the volume it dominates.

The win rates that policies reach form a convex set (a mixture of two policies reaches the mixture of their win rates),
so the exact front is that of a linear programme, and volumes are those of polytopes.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial import ConvexHull

from mopo_cli.oracle import least_slack


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
