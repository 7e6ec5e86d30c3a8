"""`make quality`: the embedded world's exact win rates over thresholds and seeds, beside what was asked of them.

Runs three sweeps into outputs/quality/ (those that are there already are only read) and prints the table of
docs/results.md with the commands and with what its numbers were never used for. By default on a split of the world's
prompts and on seeds that no setting was chosen by; other arguments are overrides of all three sweeps:

    make quality ARGS="--data-seed 0 --seeds 0,1,2"        # in-sample: what hparams/default was tuned on
    make quality ARGS="--seeds 3 hparams=smoke"            # a minute: does it run at all?
"""

from __future__ import annotations

import argparse
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
TUNED_DATA, TUNED_SEEDS = 0, (0, 1, 2)  # what conf/hparams/default.yaml was chosen by: its exact gaps on test prompts
DATA, SEEDS = 1, (3, 4, 5)  # what nothing was chosen by
TAU = 0.08
SHORT = 0.02  # how far below the threshold, or the optimum, the mean over seeds may lie
APART = 0.03  # how far the run's own estimate may lie from the exact value
COLUMNS = (
    "run",
    "objective",
    "threshold",
    "exact win rate, mean (least to most of the seeds)",
    "optimum of (P)",
    "own estimate",
    "kept",
    "close",
)

Row = dict[str, str]


# --------------------------------------------------------------------------------------------- the world
def tested(data_seed: int) -> tuple[World, list[str]]:
    """The world and its test prompts."""
    corpus = assistant(data_seed=data_seed)
    assert isinstance(corpus.world, World)
    return corpus.world, [str(example.prompt) for example in corpus.test or ()]


def world_limits(data_seed: int) -> tuple[float, float]:
    """The exact harmless win rate at the unconstrained helpful optimum with mu as reference, and what is attainable."""
    world, prompts = tested(data_seed)
    columns = [SCORED.index("helpful"), SCORED.index("harmless")]
    win_rates = np.stack([world.win_rates(prompt) for prompt in prompts])[:, :, columns]
    log_mu = np.log(np.stack([world.mu(prompt) for prompt in prompts]))
    free = oracle.solve(win_rates, log_mu, TAU, np.array([-np.inf]))
    return float(free.win_rates[1]), float(free.attainable[0])


def origin(data_seed: int, seeds: Sequence[int]) -> str:
    """Whether the numbers are in-sample: what was tuned on what."""
    tuned = f"`hparams/default` was tuned by exact gaps on the test prompts of `dataset.data_seed={TUNED_DATA}`, seeds "
    tuned += ", ".join(map(str, TUNED_SEEDS))
    listed = ", ".join(map(str, seeds))
    if data_seed == TUNED_DATA:
        which = "in-sample" if set(seeds) & set(TUNED_SEEDS) else "in-sample but for the seeds"
        return f"{tuned}. These numbers ({listed}) are {which}: on the same prompts."
    prompts, before = tested(data_seed)[1], set(tested(TUNED_DATA)[1])
    shared = sum(prompt in before for prompt in prompts)
    again = "" if not set(seeds) & set(TUNED_SEEDS) else "; some seeds are the same"
    return (
        f"{tuned}. These numbers are of `dataset.data_seed={data_seed}`, seeds {listed}, by which nothing was chosen: "
        f"other training rows, and {len(prompts)} test prompts of which {shared} were test prompts there, too{again}. "
        "The topics, the scores and mu are the world's, the same in both."
    )


# --------------------------------------------------------------------------------------------- the runs
def sweep(directory: Path, overrides: Sequence[str]) -> list[Row]:
    """The lines of a sweep's results.csv; its command is printed, and run where there are none yet."""
    command = [sys.executable, "-m", "mopo_cli", "sweep", "-m", *overrides, "logger=none", f"sweep.dir={directory}"]
    print("$ mopo", " ".join(command[3:]), flush=True)
    if not (directory / "results.csv").exists():
        subprocess.run(command, check=True)
    with open(directory / "results.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if row["state"] != "failed"]


# --------------------------------------------------------------------------------------------- the table
def table(rows: Sequence[Row], label: str, secondaries: Sequence[str]) -> list[str]:
    """Markdown lines for one setting: a line an objective, mean over seeds with the smallest and largest.

    Where no policy keeps the thresholds there is no optimum: what is attainable stands in its place.
    """
    lines = []
    for name in ("helpful", *secondaries):
        exact, own = ([float(row[f"{kind}/{name}"]) for row in rows] for kind in ("exact", "estimated"))
        best = [float(row[f"optimum/{name}"]) for row in rows if row.get(f"optimum/{name}")]
        asked = float(rows[0][f"threshold/{name}"]) if name != "helpful" else None
        known = len(best) == len(rows)
        bound = asked if asked is not None else mean(best) if known else None
        met = "–" if bound is None else _yes(mean(exact) >= bound - SHORT)
        cells = [
            label,
            name,
            "" if asked is None else f"{asked:.3f}",
            f"{mean(exact):.3f} ({min(exact):.3f} to {max(exact):.3f})",
            f"{mean(best):.3f}" if known else _attainable(rows, name),
            f"{mean(own):.3f}",
            met,
            _yes(abs(mean(own) - mean(exact)) <= APART),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _yes(holds: bool) -> str:
    return "yes" if holds else "**no**"


def _attainable(rows: Sequence[Row], name: str) -> str:
    most = [float(row[f"attainable/{name}"]) for row in rows if row.get(f"attainable/{name}")]
    return f"none: {mean(most):.3f} is attainable" if most else "none"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="make quality", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data-seed", type=int, default=DATA, help="of the world's prompts and rows (%(default)s)")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="of the runs (%(default)s)")
    parser.add_argument("--root", type=Path, default=ROOT, help="where the sweeps go (%(default)s)")
    asked, overrides = parser.parse_known_args(arguments)
    seeds = [int(seed) for seed in asked.seeds.split(",")]
    place = asked.root / f"data-{asked.data_seed}-seeds-{'-'.join(map(str, seeds))}"  # a name in Hydra's grammar
    common = [f"dataset.data_seed={asked.data_seed}", f"seed={asked.seeds}"]
    low, high = world_limits(asked.data_seed)
    thresholds = [round(low + share * (high - low), 3) for share in (0.25, 0.5, 0.75)]
    listed = ",".join(map(str, thresholds))
    pair = ["objectives=assistant_pair", f"objectives.harmless.threshold={listed}"]
    paper = ["algorithm=mopo_paper", "hparams=paper"]
    given = {override.partition("=")[0] for override in overrides}
    runs = {
        name: sweep(place / name, [*(o for o in [*own, *common] if o.partition("=")[0] not in given), *overrides])
        for name, own in (("pair", pair), ("default", []), ("paper", paper))
    }
    print(
        f"\nharmless: {low:.3f} at the unconstrained helpful optimum (tau {TAU}), {high:.3f} attainable; thresholds "
        f"{thresholds}.\n\n{origin(asked.data_seed, seeds)}\n"
    )
    print(f"| {' | '.join(COLUMNS)} |")
    print("|" + "---|" * len(COLUMNS))
    for threshold in thresholds:
        chosen = [row for row in runs["pair"] if float(row["threshold/harmless"]) == threshold]
        print("\n".join(table(chosen, f"K = 2, b = {threshold}", ["harmless"])))
    print("\n".join(table(runs["default"], "K = 3, the default", ["harmless", "concise"])))
    print("\n".join(table(runs["paper"], "K = 3, mopo_paper", ["harmless", "concise"])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
