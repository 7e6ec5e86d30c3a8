"""Figures of `mopo plan` and `mopo synthetic`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from mopo_cli.report.figures import COLOURS, STYLE

if TYPE_CHECKING:
    from mopo_cli.planning.attainable import PairFront, Plan
    from mopo_cli.planning.tabular import Problem, Record


# --------------------------------------------------------------------------------------------- mopo synthetic
REACHED = {"exact": (COLOURS[0], "o"), "sampled": (COLOURS[1], "^")}  # by the preferences a run saw
SCHEDULED = COLOURS[2]
OPTIMUM: dict[str, Any] = {"markersize": 9, "fillstyle": "none", "label": "optimum at b"}


def draw_structure(name: str, problems: Sequence[Problem], records: Sequence[Record], path: Path) -> Path:
    """One figure a structure: exact front, regularised front, and what the first recipe reached; a panel for each K."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):  # type: ignore[arg-type]
        figure, axes = plt.subplots(
            1, len(problems), figsize=(5.2 * len(problems), 4.4), squeeze=False, layout="constrained"
        )
        for axis, problem in zip(axes[0], problems, strict=True):
            size = problem.optima.shape[1]
            chosen = _first_recipes([r for r in records if size == r.K])
            draw = _plane if size == 2 else _projection
            draw(axis, problem, chosen)
            axis.set_title(f"{name.replace('_', ' ')}, K = {size}")
        figure.savefig(path)
        plt.close(figure)
    return path


def _first_recipes(records: Sequence[Record]) -> list[Record]:
    """The first recipe's records: one for each kind of preferences, and those on the schedule."""
    found: dict[tuple[str, bool], Record] = {}
    for record in records:
        found.setdefault((record.preferences, record.beta is not None), record)
    return list(found.values())


def _plane(axis: Axes, problem: Problem, records: Sequence[Record]) -> None:
    """Two objectives: the secondary's win rate against the primary's."""
    front = problem.front[np.argsort(problem.front[:, 1])]
    axis.plot(front[:, 1], front[:, 0], color="black", marker=".", label="exact front")
    curve = problem.regularised
    axis.plot(curve[:, 1], curve[:, 0], color="0.55", linestyle="--", label="optima of (P) as λ moves")
    axis.plot(*problem.optima[:, [1, 0]].T, "o", color="0.55", **OPTIMUM)
    _reached(axis, records, 1, 0)
    axis.set(xlabel="win rate, secondary", ylabel="win rate, primary")
    axis.legend(fontsize=8)


def _projection(axis: Axes, problem: Problem, records: Sequence[Record]) -> None:
    """Three objectives or more: the first two secondaries, over what is left for the primary at those thresholds."""
    shown = axis.tricontourf(
        problem.regularised[:, 1], problem.regularised[:, 2], problem.regularised[:, 0], 12, cmap="Greys", alpha=0.6
    )
    axis.use_sticky_edges = False  # what lies on the region's edge keeps a margin
    axis.figure.colorbar(shown, ax=axis, label="primary's win rate at the optimum of (P)")
    axis.plot(*problem.optima[:, [1, 2]].T, "o", color="0.35", **OPTIMUM)
    _reached(axis, records, 1, 2)
    axis.set(xlabel="win rate, first secondary", ylabel="win rate, second secondary")
    axis.legend(fontsize=8)


def _reached(axis: Axes, records: Sequence[Record], x: int, y: int) -> None:
    for record in records:
        points = np.array(record.reached)
        if record.beta is None:
            colour, marker = REACHED[record.preferences]
            axis.plot(
                points[:, x],
                points[:, y],
                marker,
                color=colour,
                markersize=5,
                linestyle="none",
                label=f"reached, {record.preferences} preferences",
            )
            continue
        axis.plot(
            points[:, x],
            points[:, y],
            "s",
            color=SCHEDULED,
            markersize=5,
            linestyle="none",
            label="reached on the schedule, by β",
        )
        for point, betas in _together(record.beta, points[:, [x, y]]):
            axis.annotate(
                ", ".join(f"{beta:g}" for beta in betas),
                point,
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=7,
                color=SCHEDULED,
            )


def _together(betas: Sequence[float], points: np.ndarray) -> list[tuple[tuple[float, float], list[float]]]:
    """Betas by the point they reached; those that a reader could not tell apart share one."""
    groups: list[tuple[tuple[float, float], list[float]]] = []
    for beta, (x, y) in zip(betas, points.tolist(), strict=True):
        near = next((found for at, found in groups if abs(at[0] - x) < 0.01 and abs(at[1] - y) < 0.01), None)
        if near is None:
            groups.append(((x, y), [beta]))
        else:
            near.append(beta)
    return groups


# --------------------------------------------------------------------------------------------- mopo plan
def draw_plan(plan: Plan, path: Path) -> Path:
    """The predicted front of each pair of objectives, with its band, and the exact one where it is known."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = len(plan.pairs)
    columns = min(count, 3)
    rows = -(-count // columns)
    with plt.rc_context(STYLE):  # type: ignore[arg-type]
        figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 4.0 * rows), squeeze=False)
        for axis, front in zip(axes.flat, plan.pairs, strict=False):
            _pair(axis, front, plan)
        for axis in list(axes.flat)[count:]:
            axis.set_axis_off()
        axes[0][0].legend(fontsize=8, loc="lower left")
        figure.tight_layout()
        figure.savefig(path)
        plt.close(figure)
    return path


def _pair(axis: Axes, front: PairFront, plan: Plan) -> None:
    x = np.array([p.threshold for p in front.points])
    y, half = np.array([p.win_rate for p in front.points]), np.array([p.ci95 for p in front.points])
    axis.fill_between(x, y - half, y + half, color=COLOURS[0], alpha=0.2, linewidth=0, label="95 % band")
    axis.plot(x, y, color=COLOURS[0], marker="o", markersize=3.5, label="predicted front")
    if front.exact_front is not None:
        exact = np.array(front.exact_front)
        inside = (exact[:, 0] >= x.min() - 0.02) & (exact[:, 0] <= x.max() + 0.02)
        axis.plot(*exact[inside].T, color="black", linestyle="--", linewidth=1.2, label="exact front")
    first, second = plan.objectives[front.primary], plan.objectives[front.secondary]
    axis.plot([second.reference], [first.reference], marker="*", color=COLOURS[6], markersize=10, linestyle="none",
              label="reference")  # fmt: skip
    if second.threshold is not None:
        axis.axvline(second.threshold, color=COLOURS[1], linestyle=":", linewidth=1.4, label="threshold asked")
    axis.set(xlabel=f"win rate, {front.secondary}", ylabel=f"win rate, {front.primary}")
    axis.set_title(f"{front.primary} against {front.secondary}", fontsize=10)
