"""Figures of a run, ready for a paper: matplotlib, no display needed, colour-blind safe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

matplotlib.use("Agg")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6B6B6B", "#000000")
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "savefig.bbox": "tight",
    "savefig.dpi": 200,
}


@dataclass(frozen=True, slots=True)
class Swept:
    """One finished run of a sweep. Win rates are exact where the world is known, else with a 95 % interval."""

    varying: dict[str, str]
    state: str
    win_rate: dict[str, float]  # the primary first
    ci95: dict[str, tuple[float, float]]
    threshold: dict[str, float]
    optimum: dict[str, float] | None
    kl: float
    history: Sequence[Mapping[str, Any]]

    @property
    def label(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.varying.items() if value) or "the run"


@dataclass(frozen=True, slots=True)
class Point:
    """One objective's result: what was asked, what was reached, and the exact optimum where it is known."""

    name: str
    role: str
    threshold: float | None
    win_rate: float
    low: float
    high: float
    exact: float | None = None
    optimum: float | None = None


def draw_run(history: Sequence[Mapping[str, Any]], points: Sequence[Point], directory: Path) -> list[Path]:
    """Write figures/training.png and figures/win_rates.png; returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):  # type: ignore[arg-type]
        return [_training(history, points, directory / "training.png"), _win_rates(points, directory / "win_rates.png")]


def _series(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one number, at the lines where it was measured anew (and the last)."""
    rows = [(row["step"], row[key]) for row in history if row.get(key) is not None]
    kept = [row for i, row in enumerate(rows) if i in (0, len(rows) - 1) or row[1] != rows[i - 1][1]]
    return [r[0] for r in kept], [r[1] for r in kept]


def _training(history: Sequence[Mapping[str, Any]], points: Sequence[Point], path: Path) -> Path:
    """What the run has logged: estimates, multipliers and KL of a method that follows them, else its loss and pairs."""
    logged = {key for row in history for key, value in row.items() if value is not None}
    followed = any(key.startswith("win_rate/") for key in logged)
    panels: list[Callable[[Axes], None]] = [lambda axis: _estimates(axis, history, points)] if followed else []
    if any(key.startswith("dual/") for key in logged):
        panels.append(lambda axis: _multipliers(axis, history, points))
    if "kl" in logged:
        panels.append(lambda axis: _kl(axis, history))
    if "loss" in logged and not followed:
        panels.append(lambda axis: _line(axis, history, {"loss": ""}, "loss"))
    names = {"preferred_logp": "preferred", "other_logp": "other"}
    if names.keys() <= logged:
        panels.append(lambda axis: _line(axis, history, names, "log-prob of a response, nats"))
    if "accuracy" in logged:
        title = "pairs in the labels' order, share"
        panels.append(lambda axis: _line(axis, history, {"accuracy": ""}, title, least=0.0, most=1.0))
    figure, axes = plt.subplots(
        1, max(1, len(panels)), figsize=(4 * max(1, len(panels)), 3.4), squeeze=False, layout="constrained"
    )
    for axis, draw in zip(axes[0], panels, strict=False):
        draw(axis)
    if not panels:
        axes[0][0].set_title("no step was logged")
    figure.savefig(path)
    plt.close(figure)
    return path


def _multipliers(axis: Axes, history: Sequence[Mapping[str, Any]], points: Sequence[Point]) -> None:
    for colour, point in zip(COLOURS[1:], points[1:], strict=False):
        axis.plot(*_series(history, f"dual/{point.name}"), color=colour, label=point.name, drawstyle="steps-post")
    highest = max((v for p in points[1:] for v in _series(history, f"dual/{p.name}")[1]), default=0.0)
    axis.set(title="multipliers λ", xlabel="step", ylim=(0, 1.15 * highest or 1.0))
    axis.legend()


def _kl(axis: Axes, history: Sequence[Mapping[str, Any]]) -> None:
    axis.plot(*_series(history, "kl"), color=COLOURS[6])
    axis.set(title="KL to the reference, nats", xlabel="step")
    axis.set_ylim(bottom=0)


def _line(
    axis: Axes, history: Sequence[Mapping[str, Any]], keys: Mapping[str, str], title: str,
    least: float | None = None, most: float | None = None,
) -> None:  # fmt: skip
    """Numbers of single batches over the steps, faint, with their running mean; a legend where there are several."""
    for colour, (key, label) in zip((COLOURS[0], COLOURS[1]), keys.items(), strict=False):
        steps, values = _series(history, key)
        axis.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
        axis.plot(steps, _running_mean(values), color=colour, linewidth=1.6, label=label)
    axis.set(title=title, xlabel="step")
    axis.set_ylim(bottom=least, top=most)
    if len(keys) > 1:
        axis.legend()


def _running_mean(values: Sequence[float]) -> np.ndarray:
    """Over a tenth of the lines or so, narrower at both ends."""
    half = len(values) // 20
    return np.array([np.mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def _estimates(axis: Axes, history: Sequence[Mapping[str, Any]], points: Sequence[Point]) -> None:
    for colour, point in zip(COLOURS, points, strict=False):
        steps, values = _series(history, f"win_rate/{point.name}")
        axis.plot(steps, values, color=colour, label=point.name, marker="o", markersize=3)
        steps, lower = _series(history, f"lower/{point.name}")
        if lower:
            axis.plot(steps, lower, color=colour, linewidth=0.8, linestyle=":")
        steps, thresholds = _series(history, f"threshold/{point.name}")
        if thresholds and point.role == "secondary":
            axis.plot(steps, thresholds, color=colour, linewidth=0.9, linestyle="--")
        if steps and point.exact is not None:
            axis.plot([steps[-1]], [point.exact], marker="D", color=colour, markersize=5, clip_on=False)
    title = "estimated win rate   -- threshold   ·· lower bound" + ("   ◆ exact" if points[0].exact is not None else "")
    axis.set(xlabel="step")
    axis.set_title(title, fontsize=9)
    axis.legend(fontsize=8)


def _win_rates(points: Sequence[Point], path: Path) -> Path:
    figure, axis = plt.subplots(figsize=(6.4, 0.75 * len(points) + 1.3), layout="constrained")
    for y, (colour, point) in enumerate(zip(COLOURS, points, strict=False)):
        bar = [[point.win_rate - point.low], [point.high - point.win_rate]]
        axis.errorbar([point.win_rate], [y], xerr=bar, fmt="o", color=colour, capsize=4, markersize=7)
        if point.threshold is not None:
            axis.plot([point.threshold] * 2, [y - 0.32, y + 0.32], color=colour, linestyle="--", linewidth=1.4)
        if point.optimum is not None:
            axis.plot([point.optimum], [y + 0.22], marker="*", color="black", markersize=9, linestyle="none")
        if point.exact is not None:
            axis.plot(
                [point.exact],
                [y + 0.22],
                marker="D",
                color=colour,
                markersize=5,
                markerfacecolor="white",
                linestyle="none",
            )
    axis.axvline(0.5, color="0.6", linewidth=0.8)
    axis.set_yticks(range(len(points)), [f"{p.name}\n({p.role})" for p in points])
    axis.set_ylim(len(points) - 0.4, -0.5)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("win rate against the data's responses (0.5 is parity)")
    _key(axis, points)
    figure.savefig(path)
    plt.close(figure)
    return path


def _key(axis: Axes, points: Sequence[Point]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], marker="o", color="0.3", linestyle="none", label="sampled, 95 % CI")]
    if any(p.threshold is not None for p in points):
        handles.append(Line2D([], [], color="0.3", linestyle="--", label="threshold"))
    if any(p.exact is not None for p in points):
        handles.append(
            Line2D([], [], marker="D", color="0.3", markerfacecolor="white", linestyle="none", label="exact")
        )
    if any(p.optimum is not None for p in points):
        handles.append(Line2D([], [], marker="*", color="black", linestyle="none", label="optimum of (P)"))
    axis.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(handles), fontsize=8)


# --------------------------------------------------------------------------------------------- mopo sweep
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h", "p")
METHOD = "algorithm"  # the setting that names the method
NAMED = 16  # runs that a legend still names each


def draw_sweep(runs: Sequence[Swept], directory: Path) -> list[Path]:
    """pareto.png; trajectories.png where runs estimate; stability.png where two settings vary. Returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):  # type: ignore[arg-type]
        drawn = [_pareto(runs, directory / "pareto.png")]
        if any(row.get(f"win_rate/{name}") is not None for run in runs for row in run.history for name in run.win_rate):
            drawn.append(_trajectories(runs, directory / "trajectories.png"))
        values = _values(runs)
        if len(values) == 2 and all(run.varying.get(key) for run in runs for key in values):
            drawn.append(_stability(runs, directory / "stability.png"))
    return drawn


def _values(runs: Sequence[Swept]) -> dict[str, list[str]]:
    """The values that each setting takes, sorted as numbers where they are numbers."""
    keys = dict.fromkeys(key for run in runs for key in run.varying)
    return {key: sorted({run.varying[key] for run in runs if run.varying.get(key)}, key=_order) for key in keys}


def _order(text: str) -> tuple[float, str]:
    try:
        return float(text), text
    except ValueError:
        return float("inf"), text


def _style(run: Swept, values: Mapping[str, list[str]]) -> dict[str, Any]:
    """Colour and marker by the method where it varies; else colour by the first setting that does, marker by the next.

    Ten methods need both: eight colours can be told apart by all.
    """
    found = [options.index(run.varying[key]) if run.varying.get(key) else 0 for key, options in values.items()] + [0, 0]
    first, second = (_method(run, values), _method(run, values)) if METHOD in values else found[:2]
    return {"color": COLOURS[first % len(COLOURS)], "marker": MARKERS[second % len(MARKERS)]}


def _method(run: Swept, values: Mapping[str, list[str]]) -> int:
    return values[METHOD].index(run.varying[METHOD]) if run.varying.get(METHOD) else len(values[METHOD])


def _style_key(axis: Axes, values: Mapping[str, list[str]], optimum: bool) -> None:
    from matplotlib.lines import Line2D

    handles = []
    shown = [(METHOD, values[METHOD])] if METHOD in values else list(values.items())[:2]
    for position, (key, options) in enumerate(shown):
        for i, option in enumerate(options):
            colour, marker = (COLOURS[i % len(COLOURS)], "o") if position == 0 else ("0.4", MARKERS[i % len(MARKERS)])
            if key == METHOD:
                marker = MARKERS[i % len(MARKERS)]
            label = option if key == METHOD else f"{key} {option}"
            handles.append(Line2D([], [], linestyle="none", label=label, color=colour, marker=marker))
    if optimum:
        handles.append(
            Line2D([], [], linestyle="none", marker="o", color="0.4", fillstyle="none", label="optimum of (P)")
        )
    axis.legend(handles=handles, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _pareto(runs: Sequence[Swept], path: Path) -> Path:
    """The primary against each secondary, a point a run, with a thin line to the optimum that it aimed at."""
    names, values = list(runs[0].win_rate), _values(runs)
    figure, axes = plt.subplots(
        1,
        max(1, len(names) - 1),
        figsize=(4.8 * max(1, len(names) - 1) + 1.2, 4.2),
        squeeze=False,
        layout="constrained",
    )
    for axis, name in zip(axes[0], names[1:] or names, strict=False):
        for run in runs:
            look = _style(run, values)
            x, y = run.win_rate[name], run.win_rate[names[0]]
            bars = [
                [[v - run.ci95[n][0]], [run.ci95[n][1] - v]] for n, v in ((name, x), (names[0], y)) if n in run.ci95
            ]
            if bars:
                axis.errorbar([x], [y], xerr=bars[0], yerr=bars[-1], color=look["color"], linewidth=0.8, alpha=0.6)
            if run.optimum is not None and run.threshold:
                best = run.optimum[name], run.optimum[names[0]]
                axis.plot([x, best[0]], [y, best[1]], color=look["color"], linewidth=0.6, alpha=0.7)
                axis.plot(*([v] for v in best), marker="o", color=look["color"], fillstyle="none", markersize=7)
            axis.plot([x], [y], linestyle="none", markersize=7, **look)
        axis.set(xlabel=f"win rate, {name}", ylabel=f"win rate, {names[0]}")
        if METHOD in values and len(names) == 2:
            _join(axis, runs, names[1], names[0], values)
    _style_key(axes[0][-1], values, any(run.optimum is not None and run.threshold for run in runs))
    figure.savefig(path)
    plt.close(figure)
    return path


def _join(axis: Axes, runs: Sequence[Swept], across: str, up: str, values: Mapping[str, list[str]]) -> None:
    """A thin line through the runs of each method that no other run of it beats in both."""
    from mopo_cli.maths.pareto import nondominated

    for method in values[METHOD]:
        own = [run for run in runs if run.varying.get(METHOD) == method]
        points = np.array([[run.win_rate[across], run.win_rate[up]] for run in own])
        front = points[nondominated(points)]
        axis.plot(*front[np.argsort(front[:, 0])].T, color=_style(own[0], values)["color"], linewidth=1.0, alpha=0.7)


def _trajectories(runs: Sequence[Swept], path: Path) -> Path:
    """Every objective's estimate over the steps, with its threshold dashed, and the KL."""
    names, values = list(runs[0].win_rate), _values(runs)
    runs = [run for run in runs if any(_series(run.history, f"win_rate/{name}")[0] for name in names)]
    figure, axes = plt.subplots(1, len(names) + 1, figsize=(4.2 * (len(names) + 1), 3.6), layout="constrained")
    by_method = METHOD in values and len(runs) > NAMED
    for number, run in enumerate(runs):
        colour = plt.get_cmap("viridis")(number / len(runs)) if len(runs) > len(COLOURS) else COLOURS[number]
        if by_method:
            colour = _style(run, values)["color"]
        for axis, name in zip(axes, names, strict=False):
            label = (run.varying.get(METHOD) or "") if by_method else run.label
            axis.plot(*_series(run.history, f"win_rate/{name}"), color=colour, label=label, linewidth=1.0)
            steps, thresholds = _series(run.history, f"threshold/{name}")
            if thresholds:
                axis.plot(steps, thresholds, color=colour, linestyle="--", linewidth=0.9, drawstyle="steps-post")
        axes[-1].plot(*_series(run.history, "kl"), color=colour, linewidth=1.0)
    for axis, name in zip(axes, names, strict=False):
        axis.set(title=f"{name}, estimated" + ("   -- threshold" if name != names[0] else ""), xlabel="step")
        axis.title.set_fontsize(10)
    axes[-1].set(title="KL to the first reference, nats", xlabel="step")
    axes[-1].title.set_fontsize(10)
    handles, labels = axes[0].get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    if len(named) <= NAMED:
        figure.legend(list(named.values()), list(named), loc="outside right center", fontsize=8)
    figure.savefig(path)
    plt.close(figure)
    return path


def _stability(runs: Sequence[Swept], path: Path) -> Path:
    """Where in the plane of two settings the primary is high, the thresholds are kept, and the KL stays in bounds."""
    (across, columns), (down, rows) = _values(runs).items()
    names = list(runs[0].win_rate)
    panels = [(names[0], lambda r: r.win_rate[names[0]], "viridis")]
    panels += [
        (f"{n} less its threshold", lambda r, n=n: r.win_rate[n] - r.threshold[n], "RdBu")
        for n in names[1:]
        if all(n in r.threshold for r in runs)
    ]
    panels.append(("KL, nats", lambda r: r.kl, "magma_r"))
    figure, axes = plt.subplots(
        1, len(panels), figsize=((1.1 + 0.75 * len(columns)) * len(panels) + 1, 1.3 + 0.6 * len(rows)),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for axis, (title, number, colours) in zip(axes[0], panels, strict=True):
        table = np.full((len(rows), len(columns)), np.nan)
        for run in runs:
            table[rows.index(run.varying[down]), columns.index(run.varying[across])] = number(run)
        edge = np.nanmax(np.abs(table)) or 1.0
        limits = {"vmin": -edge, "vmax": edge} if colours == "RdBu" else {}
        shown = axis.imshow(table, cmap=colours, aspect="auto", **limits)
        for (i, j), value in np.ndenumerate(table):
            red, green, blue, _ = shown.cmap(shown.norm(value))
            dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
            axis.text(j, i, "–" if np.isnan(value) else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}",
                      ha="center", va="center", fontsize=8, color="white" if dark else "black")  # fmt: skip
        axis.set_xticks(range(len(columns)), columns)
        axis.set_yticks(range(len(rows)), rows)
        axis.set(xlabel=across, ylabel=down)
        axis.set_title(title, fontsize=10)
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
    figure.savefig(path)
    plt.close(figure)
    return path
