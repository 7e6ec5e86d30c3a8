"""`make quality`: the embedded world's exact win rates over thresholds and seeds, beside what was asked of them.

Runs three sweeps into outputs/quality/ (those that are there already are only read) and prints the table of
docs/results.md.
"""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import numpy as np

from mopo_cli.data.assistant import SCORED, World, assistant
from mopo_cli.maths import oracle

ROOT = Path("outputs/quality")
SEEDS = "seed=0,1,2"
TAU = 0.08
SHORT = 0.02  # how far below the threshold, or the optimum, the mean over seeds may lie
APART = 0.03  # how far the run's own estimate may lie from the exact value

Row = dict[str, str]


def world_limits() -> tuple[float, float]:
    """The exact harmless win rate at the unconstrained helpful optimum with mu as reference, and what is attainable."""
    corpus = assistant()
    world = corpus.world
    assert isinstance(world, World)
    prompts = [str(example.prompt) for example in corpus.test or ()]
    win_rates = np.stack([world.win_rates(prompt) for prompt in prompts])[
        :, :, [SCORED.index("helpful"), SCORED.index("harmless")]
    ]
    log_mu = np.log(np.stack([world.mu(prompt) for prompt in prompts]))
    free = oracle.solve(win_rates, log_mu, TAU, np.array([-np.inf]))
    return float(free.win_rates[1]), float(free.attainable[0])


def sweep(name: str, overrides: Sequence[str]) -> list[Row]:
    directory = ROOT / name
    if not (directory / "results.csv").exists():
        command = [sys.executable, "-m", "mopo_cli", "sweep", "-m", *overrides, "logger=none", f"sweep.dir={directory}"]
        print("$ mopo", " ".join(command[3:]), flush=True)
        subprocess.run(command, check=True)
    with open(directory / "results.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table(rows: Sequence[Row], label: str, secondaries: Sequence[str]) -> list[str]:
    """Markdown lines for one setting: a line an objective, mean over seeds with the smallest and largest."""
    lines = []
    for name in ("helpful", *secondaries):
        exact, optimum, own = (
            [float(row[f"{kind}/{name}"]) for row in rows] for kind in ("exact", "optimum", "estimated")
        )
        asked = float(rows[0][f"threshold/{name}"]) if name != "helpful" else None
        bound = mean(optimum) if asked is None else asked
        met = mean(exact) >= bound - SHORT
        close = abs(mean(own) - mean(exact)) <= APART
        lines.append(
            f"| {label} | {name} | {'' if asked is None else f'{asked:.3f}'} | {mean(exact):.3f} "
            f"({min(exact):.3f} to {max(exact):.3f}) | {mean(optimum):.3f} | {mean(own):.3f} | "
            f"{'yes' if met else '**no**'} | {'yes' if close else '**no**'} |"
        )
    return lines


def main() -> int:
    low, high = world_limits()
    thresholds = [round(low + share * (high - low), 3) for share in (0.25, 0.5, 0.75)]
    print(
        f"harmless: {low:.3f} at the unconstrained helpful optimum (tau {TAU}), {high:.3f} attainable; "
        f"thresholds {thresholds}"
    )
    listed = ",".join(map(str, thresholds))
    pair = sweep("pair", ["objectives=assistant_pair", f"objectives.harmless.threshold={listed}", SEEDS])
    default = sweep("default", [SEEDS])
    paper = sweep("paper", ["algorithm=mopo_paper", "hparams=paper", SEEDS])
    columns = (
        "run",
        "objective",
        "threshold",
        "exact win rate (seeds)",
        "optimum of (P)",
        "own estimate",
        "kept",
        "close",
    )
    print(f"\n| {' | '.join(columns)} |")
    print("|" + "---|" * len(columns))
    for threshold in thresholds:
        chosen = [row for row in pair if float(row["threshold/harmless"]) == threshold]
        print("\n".join(table(chosen, f"K = 2, b = {threshold}", ["harmless"])))
    print("\n".join(table(default, "K = 3, the default", ["harmless", "concise"])))
    print("\n".join(table(paper, "K = 3, mopo_paper", ["harmless", "concise"])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
