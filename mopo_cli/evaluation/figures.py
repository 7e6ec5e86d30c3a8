"""The figure of `mopo eval`: win rates and scores of every entrant, with intervals and thresholds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from mopo_cli.report.figures import COLOURS, STYLE

if TYPE_CHECKING:
    from mopo_cli.evaluation.records import Evaluation, Measured


Pick = Callable[["Measured"], tuple[float, tuple[float, float]]]
PANELS: dict[str, tuple[str, Pick, str, str]] = {
    "data": ("win rate against the data", lambda r: (r.win_rate, r.win_rate_ci95), "o", COLOURS[0]),
    "reference": (
        "win rate against the reference",
        lambda r: (r.reference_win_rate, r.reference_win_rate_ci95),
        "s",
        COLOURS[2],
    ),
}
THRESHOLD = COLOURS[1]
LONGEST = 34  # characters of an entrant's name


def draw_evaluation(evaluated: Sequence[Evaluation], normalisation: Mapping[str, Any], directory: Path) -> Path:
    """Write evaluation.png: a column an objective (or scorer), win rates above and normalised scores below."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "evaluation.png"
    names = [*evaluated[0].objectives, *evaluated[0].scorers]
    scored = [name for name in names if name in normalisation]
    rows = 1 + bool(scored)
    height = 0.42 * len(evaluated) * rows + 1.5 * rows
    with plt.rc_context(STYLE):  # type: ignore[arg-type]
        figure, axes = plt.subplots(
            rows, len(names), figsize=(3.2 * len(names) + 1.6, height), squeeze=False, sharey=True, layout="constrained"
        )
        for column, name in enumerate(names):
            _rates(axes[0][column], name, evaluated)
            if rows == 2:
                _scores(axes[1][column], name, evaluated, normalisation.get(name))
        axes[0][0].set_yticks(range(len(evaluated)), [_label(one.name) for one in evaluated])
        axes[0][0].set_ylim(len(evaluated) - 0.4, -0.6)
        _key(figure, evaluated, names)
        if scored:
            fitted = dict.fromkeys(scale["fitted_on"] for scale in normalisation.values())
            figure.supxlabel(f"scores normalised on {_label('; '.join(fitted), 100)}", fontsize=8.5, color="0.35")
        figure.savefig(path)
        plt.close(figure)
    return path


def _label(text: str, longest: int = LONGEST) -> str:
    """A name as it is: no mathematics between dollar signs, and not longer than there is room."""
    short = text if len(text) <= longest else text[: longest - 1] + "…"
    return short.replace("$", r"\$")


def _measured(one: Evaluation, name: str) -> Measured:
    return one.objectives.get(name) or one.scorers[name]


def _rates(axis: Axes, name: str, evaluated: Sequence[Evaluation]) -> None:
    for offset, (_, pick, marker, colour) in zip((-0.1, 0.1), PANELS.values(), strict=True):
        for y, one in enumerate(evaluated):
            _point(axis, *pick(_measured(one, name)), y + offset, marker, colour)
    for y, one in enumerate(evaluated):
        r = _measured(one, name)
        if r.threshold is not None:
            axis.plot([r.threshold] * 2, [y - 0.36, y + 0.36], color=THRESHOLD, linestyle="--", linewidth=1.5)
        if r.exact_win_rate is not None:
            axis.plot([r.exact_win_rate], [y - 0.1], marker="D", color="black", markersize=3.5, linestyle="none")
    axis.axvline(0.5, color="0.6", linewidth=0.8)
    axis.set_title(_label(name), fontsize=11)
    axis.set_xlabel("win rate (0.5 is parity)", fontsize=9)
    axis.grid(axis="y", visible=False)


def _scores(axis: Axes, name: str, evaluated: Sequence[Evaluation], scale: Mapping[str, Any] | None) -> None:
    if scale is None:
        axis.text(0.5, 0.5, "its judge only compares", transform=axis.transAxes, ha="center", fontsize=8, color="0.4")
        axis.set_xticks([])
        return
    for y, one in enumerate(evaluated):
        r = _measured(one, name)
        _point(axis, r.normalised_score, r.normalised_score_ci95, y, "o", COLOURS[4])
    axis.axvline(0.0, color="0.6", linewidth=0.8)
    judge = _measured(evaluated[0], name).judge
    axis.set_xlabel(
        f"normalised score, {_label(judge)}\nmean {scale['mean']:.3g}, deviation {scale['std']:.3g}", fontsize=8.5
    )
    axis.grid(axis="y", visible=False)


def _point(axis: Axes, value: float, interval: tuple[float, float], y: float, marker: str, colour: str) -> None:
    if not math.isnan(value):
        bar = [[value - interval[0]], [interval[1] - value]]
        axis.errorbar([value], [y], xerr=bar, fmt=marker, color=colour, capsize=3, markersize=5.5)


def _key(figure: Any, evaluated: Sequence[Evaluation], names: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    found = [_measured(one, name) for one in evaluated for name in names]
    handles = [
        Line2D([], [], marker=marker, color=colour, linestyle="none", label=f"{title}, 95 % CI")
        for title, pick, marker, colour in PANELS.values()
        if any(not math.isnan(pick(r)[0]) for r in found)
    ]
    if any(r.threshold is not None for r in found):
        handles.append(Line2D([], [], color=THRESHOLD, linestyle="--", label="threshold"))
    if any(r.exact_win_rate is not None for r in found):
        handles.append(Line2D([], [], marker="D", color="black", markersize=4, linestyle="none", label="exact"))
    if handles:
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=8)
