"""`make baselines`: every method beside MOPO, on the embedded world and (QA=FILE) on qa_feedback.

Runs `mopo sweep experiment=baselines` and `baselines_qa` into outputs/baselines/ (what has ended there stays), prints
the table and draws the figures; `--write` puts both into docs/results.md. Other arguments are overrides of both sweeps.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np

from mopo_cli.config.overrides import in_grammar
from mopo_cli.maths import pareto
from mopo_cli.report import marks
from mopo_cli.report.marks import rows
from mopo_cli.report.theme import INK, OPTIMUM, below, drawing, save, spec_of
from mopo_cli.runs.find import read_sweep
from mopo_cli.runs.record import RunRecord

ROOT = Path("outputs/baselines")
DOCS = Path(__file__).parents[2] / "docs"
SLACK = 0.01  # win rate by which a threshold may be missed and still count as met, the same for every method
ASKED = {"algorithm.weights": "weights", "algorithm.direction": "a direction", "threshold": "a threshold"}
COLOURS = {"a threshold": "#D55E00", "weights": "#0072B2", "a direction": "#009E73"}
OTHERS, EDGE = "the other methods", "exact front, whatever the KL"
Range = tuple[float, float, float]  # mean over seeds, least, most


@dataclass(frozen=True)
class Policy:
    """One run that has ended. Win rates and KL are exact where the world is known, else sampled."""

    method: str
    seed: int
    asked: str  # the trade-off, as the sweep has it
    by: str  # what that is: a value of ASKED
    threshold: float | None
    point: np.ndarray  # (2,) win rates, the primary's first
    kl: float
    optimum: np.ndarray | None  # (2,) of (P) at the threshold
    optimum_kl: float | None
    steps: int
    samples: int
    seconds: float


@dataclass(frozen=True)
class World:
    """What the fronts of a sweep are measured by."""

    names: tuple[str, ...]
    worst: np.ndarray  # (2,) hypervolume is counted from here
    front: np.ndarray | None  # (m, 2) the exact one, of all policies whatever their KL


@dataclass(frozen=True)
class Row:
    """One method's line of the table, over its seeds."""

    method: str
    hypervolume: Range
    kept: str  # of its own thresholds
    met: str  # of all thresholds, by the best of its policies
    short: Range | None  # of the optimum's primary win rate there
    kl: tuple[float, float]  # the least and the most of a trade-off, mean over seeds
    steps: float
    samples: float
    seconds: float


# --------------------------------------------------------------------------------------------- the runs


def sweep(directory: Path, overrides: Sequence[str]) -> None:
    """Run what is missing of a preset, two at a time on two cores."""
    command = [sys.executable, "-m", "mopo_cli", "sweep", *overrides, "launcher=parallel", "launcher.threads=1",
               "logger=none", f"sweep.dir={directory}"]  # fmt: skip
    print("$ mopo", " ".join(command[3:]), flush=True)
    done = subprocess.run(command)
    if done.returncode:
        raise SystemExit(done.returncode)  # it has said why, and how to go on


def policies_of(directory: Path) -> tuple[list[Policy], World]:
    """The runs of a sweep that have ended, in its order."""
    runs = [run for run in read_sweep(directory) if run.finished]
    if not runs:
        raise SystemExit(f"{directory}: none of its runs has ended")
    names = runs[0].names
    exact = all(run.exact for run in runs)
    found = (runs[0].summary.get("oracle") or {}).get("front") if exact else None
    front = np.array([[point[name] for name in names] for point in found]) if found else None
    worst = np.array([runs[0].objectives[name].worst for name in names])
    return [policy_of(run, exact) for run in runs], World(names, worst, front)


def policy_of(run: RunRecord, exact: bool) -> Policy:
    by, asked = trade_off(run)
    oracle, train = run.oracle, run.summary["train"]
    threshold = float(asked) if by == ASKED["threshold"] else None
    known = exact and threshold is not None and not run.out_of_reach
    return Policy(
        method=str(run.summary["algorithm"]),
        seed=int(run.summary["seed"]),
        asked=asked,
        by=by,
        threshold=threshold,
        point=run.points(exact),
        kl=oracle["kl"] if exact else run.summary["kl"],
        optimum=np.array([oracle["optimum"][name] for name in run.names]) if known else None,
        optimum_kl=oracle["optimum_kl"] if known else None,
        steps=train["steps"] - train["reused_steps"],
        samples=train["samples"] - train["reused_samples"],
        seconds=train["alignment_seconds"],
    )


def trade_off(run: RunRecord) -> tuple[str, str]:
    """By what a run was told its trade-off, and the trade-off, as the sweep has it."""
    for key, value in run.varying.items():
        known = key if key in ASKED else key.rpartition(".")[2]
        if known in ASKED and value not in ("", "null"):
            return ASKED[known], value
    raise SystemExit(f"{run.path}: the sweep gave it no weights, direction or threshold")


# --------------------------------------------------------------------------------------------- the table


def rows_of(policies: Sequence[Policy], world: World) -> list[Row]:
    """A row a method, in the sweep's order."""
    asked = optima(policies)
    return [row_of([p for p in policies if p.method == method], policies, world, asked)
            for method in dict.fromkeys(p.method for p in policies)]  # fmt: skip


def optima(policies: Sequence[Policy]) -> dict[tuple[int, float], float | None]:
    """By seed and threshold that some method was asked to keep: the primary's win rate at the optimum of (P)."""
    return {(p.seed, p.threshold): None if p.optimum is None else float(p.optimum[0])
            for p in policies if p.threshold is not None}  # fmt: skip


def row_of(
    own: Sequence[Policy], every: Sequence[Policy], world: World, asked: dict[tuple[int, float], float | None]
) -> Row:
    seeds = sorted({p.seed for p in own})
    promised = [p for p in own if p.threshold is not None]
    kept = sum(p.point[1] >= p.threshold - SLACK for p in promised if p.threshold is not None)
    best = {(seed, b): primary_at(own, seed, b) for seed, b in asked if seed in seeds}
    missing = [
        optimum - reached
        for key, optimum in asked.items()
        if optimum is not None and (reached := best.get(key)) is not None
    ]
    kls = [np.mean([p.kl for p in own if p.asked == setting]) for setting in dict.fromkeys(p.asked for p in own)]
    cost = [[sum(getattr(p, what) for p in own if p.seed == seed) for seed in seeds]
            for what in ("steps", "samples", "seconds")]  # fmt: skip
    return Row(
        method=own[0].method,
        hypervolume=spread([volume(own, every, world, seed) for seed in seeds]),
        kept=f"{kept} of {len(promised)}" if promised else "–",
        met=f"{sum(value is not None for value in best.values())} of {len(best)}",
        short=spread(missing) if missing else None,
        kl=(float(min(kls)), float(max(kls))),
        steps=float(np.mean(cost[0])),
        samples=float(np.mean(cost[1])),
        seconds=float(np.mean(cost[2])),
    )


def volume(own: Sequence[Policy], every: Sequence[Policy], world: World, seed: int) -> float:
    """Hypervolume of a method's policies of one seed, as a share of what any policy at all dominates where that is
    known, else of what all methods' policies of that seed dominate together."""

    def of(some: Sequence[Policy]) -> float:
        return pareto.hypervolume(np.array([p.point for p in some if p.seed == seed]), world.worst)

    whole = of(every) if world.front is None else pareto.dominated_volume(world.front, world.worst)
    return of(own) / whole


def primary_at(own: Sequence[Policy], seed: int, threshold: float) -> float | None:
    """The primary's win rate of the best policy of a seed that meets a threshold; None where none does."""
    return max((float(p.point[0]) for p in own if p.seed == seed and p.point[1] >= threshold - SLACK), default=None)


def optimal(policies: Sequence[Policy]) -> list[Policy]:
    """The exact optima of (P) at the thresholds that were asked, as policies of a method that nobody has."""
    found = {(p.seed, p.threshold): p for p in policies if p.optimum is not None}
    return [
        replace(p, method="optimum of (P)", point=p.optimum, kl=p.optimum_kl or 0.0, steps=0, samples=0, seconds=0.0)
        for p in found.values()
        if p.optimum is not None
    ]


def spread(values: Sequence[float]) -> Range:
    return float(np.mean(values)), float(np.min(values)), float(np.max(values))


def table(policies: Sequence[Policy], world: World) -> str:
    """The rows as Markdown. The first is the exact solution of the same regularised problem, where it is known."""
    exact = world.front is not None
    heads = ["method", "hypervolume, % of " + ("the exact front's" if exact else "all methods'"), "own thresholds kept",
             "thresholds met", *(["below the optimum there"] if exact else []), "KL, nats", "updates a front",
             "samples a front", "seconds a front"]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    best = optimal(policies)
    if best:
        row = row_of(best, policies, world, optima(policies))
        lines.append(line(row, exact).replace("| 0 | 0 | 0 |", "| – | – | – |"))
    return "\n".join(lines + [line(row, exact) for row in rows_of(policies, world)])


def line(row: Row, exact: bool) -> str:
    cells = [row.method, ranged(row.hypervolume, 100, 1), row.kept, row.met]
    cells += [ranged(row.short, 1, 3) if row.short else "–"] if exact else []
    cells += [f"{row.kl[0]:.2f} to {row.kl[1]:.2f}", number(row.steps), number(row.samples), f"{row.seconds:.0f}"]
    return f"| {' | '.join(cells)} |"


def ranged(values: Range, scale: float, digits: int) -> str:
    mean, low, high = (f"{scale * value:.{digits}f}" for value in values)
    return f"{mean} ({low} to {high})"


def number(value: float) -> str:
    return f"{value:,.0f}".replace(",", " ")


# --------------------------------------------------------------------------------------------- the figure


def draw(policies: Sequence[Policy], world: World, path: Path, title: str) -> list[Path]:
    """A panel a method: its policies, mean over seeds with least and most, before all others and the exact front."""
    methods = list(dict.fromkeys(p.method for p in policies))
    columns = min(5, len(methods)) if len(methods) != 6 else 3
    kinds = {f"told {by}": colour for by, colour in COLOURS.items() if any(p.by == by for p in policies)}
    kinds |= {OTHERS: "#cccccc"} | ({EDGE: INK} if world.front is not None else {})
    share = "the exact front's" if world.front is not None else "that of all methods together"
    caption = f"{title}: policies of each method, mean and range over seeds; hypervolume in % of {share}."
    caption += " Crosses: the optimum of (P) at a threshold." if optimal(policies) else ""
    with drawing():
        panels = [_panel(method, policies, world, kinds) for method in methods]
        spec = spec_of(alt.concat(*panels, columns=columns, spacing=20))
    files = [path.with_suffix(kind) for kind in (".png", ".svg")]
    return save(spec | {"title": below(caption, 230 * columns)}, *files)


def means_of(own: Sequence[Policy]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n, 2) means over seeds of a method's trade-offs, in their order, with the least and the most."""
    found = [np.array([p.point for p in own if p.asked == setting]) for setting in dict.fromkeys(p.asked for p in own)]
    return (
        np.array([f.mean(0) for f in found]),
        np.array([f.min(0) for f in found]),
        np.array([f.max(0) for f in found]),
    )


def _panel(method: str, policies: Sequence[Policy], world: World, kinds: dict[str, str]) -> alt.LayerChart:
    means = {m: means_of([p for p in policies if p.method == m]) for m in dict.fromkeys(p.method for p in policies)}
    volume = next(row.hypervolume[0] for row in rows_of(policies, world) if row.method == method)
    across, up = _spans(policies, world)
    base = rows({}).encode(
        marks.number(alt.X, "x", f"win rate, {world.names[1]}", across),
        marks.number(alt.Y, "y", f"win rate, {world.names[0]}", up),
    )  # fmt: skip
    legend = alt.Legend(title=None, symbolType="stroke", symbolSize=300, symbolStrokeWidth=2, columns=5)
    scale = alt.Scale(domain=list(kinds), range=list(kinds.values()))

    def line(points: np.ndarray, kind: str, width: float, **mark: Any) -> alt.Chart:
        places = [{"x": x, "y": y, "i": i} for i, (y, x) in enumerate(points.tolist())]
        chart = base.mark_line(strokeWidth=width, clip=True, **mark).encode(alt.Order("i:Q"))
        chart.data = alt.InlineData(values=places)
        return chart.encode(alt.StrokeDatum(kind, type="nominal", scale=scale, legend=legend))

    own = f"told {next(p.by for p in policies if p.method == method)}"
    mean, low, high = means[method]
    layers = [line(points, OTHERS, 1.0) for other, (points, _, _) in means.items() if other != method]
    if world.front is not None:
        layers.append(line(pareto.upper_edge(world.front), EDGE, 1.3))
    if best := optimal(policies):
        optima = rows(*({"x": x, "y": y} for y, x in means_of(best)[0].tolist()))
        layers.append(optima.mark_point(**OPTIMUM, color=INK).encode(alt.X("x:Q"), alt.Y("y:Q")))
    layers.append(line(mean, own, 1.6, point={"color": kinds[own], "size": 30}))
    ends = [{"x": m[1], "y": m[0], "left": a[1], "right": b[1], "low": a[0], "high": b[0]}
            for m, a, b in zip(mean.tolist(), low.tolist(), high.tolist(), strict=True)]  # fmt: skip
    bars = rows(*ends).mark_rule(color=kinds[own], strokeWidth=1.2)
    layers.append(bars.encode(alt.X("left:Q"), alt.X2("right"), alt.Y("y:Q")))
    layers.append(bars.encode(alt.X("x:Q"), alt.Y("low:Q"), alt.Y2("high")))
    return marks.layered(*layers).properties(width=170, height=150, title=f"{method}  {100 * volume:.0f} %")


def _spans(policies: Sequence[Policy], world: World) -> list[tuple[float, float]]:
    """What the policies and the front's part beside them take: across, the second objective, and up, the first."""
    points = [p.point for p in policies]
    points += [] if world.front is None else list(world.front[(world.front >= world.worst).all(1)])
    return [marks.span_of([float(point[k]) for point in points], 0.05) for k in (1, 0)]


# --------------------------------------------------------------------------------------------- docs/results.md


def section(name: str, text: str, document: str) -> str:
    """The document with what stands between the markers of a section made anew."""
    start, end = f"<!-- {name}: made by `make baselines` -->", f"<!-- end of {name} -->"
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(document):
        raise SystemExit(f"docs/results.md: has no {start} ... {end}")
    return pattern.sub(lambda _: f"{start}\n\n{text}\n\n{end}", document)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="make baselines", description=__doc__)
    parser.add_argument("--qa", help="dev_feedback.json of qa_feedback; without it the embedded world alone")
    parser.add_argument("--root", type=Path, default=ROOT, help="where the sweeps go (%(default)s)")
    parser.add_argument("--write", action="store_true", help="put table and figures into docs/")
    asked, overrides = parser.parse_known_args(arguments)
    presets = {"baselines": ("The embedded world", [])}
    if asked.qa:
        presets["baselines_qa"] = ("qa_feedback", [f"dataset.path={in_grammar(asked.qa)}"])
    for name, (title, own) in presets.items():
        directory = asked.root / name
        sweep(directory, [f"experiment={name}", *own, *overrides])
        policies, world = policies_of(directory)
        text = table(policies, world)
        print(f"\n{text}\n")
        target = (DOCS / "figures" if asked.write else asked.root) / f"{name}.png"
        for path in draw(policies, world, target, title):
            print(f"figure         {path}")
        if asked.write:
            document = DOCS / "results.md"
            picture = f"[![{title}: each method's front](figures/{name}.png)](figures/{name}.svg)"
            document.write_text(section(name, f"{text}\n\n{picture}", document.read_text(encoding="utf-8")),
                                encoding="utf-8")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
