"""`make bench-commands`: wall time and memory of the main commands on this machine, beside their targets."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple


class Line(NamedTuple):
    what: str
    measured: float
    target: float
    unit: str


def seconds(arguments: list[str], repeats: int) -> float:
    """Median wall time of a command over `repeats` runs, after one that warms the file cache."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        subprocess.run([str(Path(sys.executable).parent / "mopo"), *arguments], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - started)
    return median(times[1:])


def train() -> tuple[float, float, dict]:
    """Wall time, peak resident megabytes of the process, and summary of one default run."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "run"
        started = time.perf_counter()
        subprocess.run(
            [str(Path(sys.executable).parent / "mopo"), "train", "cache=null", f"run.dir={directory}"],
            check=True, stdout=subprocess.DEVNULL, env={**os.environ, "WANDB_MODE": "offline"},
        )  # fmt: skip
        wall = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        return wall, peak, json.loads((directory / "summary.json").read_text())


def sweep() -> tuple[float, float, float]:
    """Wall time of a sweep of twelve smoke runs, the sum of its training times, and the wall time of one run alone."""
    mopo = str(Path(sys.executable).parent / "mopo")
    with tempfile.TemporaryDirectory() as folder:

        def timed(*arguments: str) -> float:
            started = time.perf_counter()
            command = [mopo, *arguments, "hparams=smoke", "logger=none"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder)
            return time.perf_counter() - started

        alone = timed("train", "cache=null")
        wall = timed("sweep", "beta=0.9,0.95,0.99,1.0", "tau=0.06,0.08,0.1", "sweep.name=s")
        told = json.loads((Path(folder) / "outputs" / "sweep" / "s" / "sweep.json").read_text())
        return wall, sum(record["seconds"] for record in told["runs"]), alone


def synthetic() -> float:
    """Wall time of the whole benchmark."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        mopo = str(Path(sys.executable).parent / "mopo")
        subprocess.run([mopo, "synthetic", f"run.dir={folder}/run"], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - started


def oracle(prompts: int, objectives: int) -> float:
    """Median seconds of the exact dual on random preferences, eight responses a prompt; three secondaries bind."""
    import numpy as np

    from mopo_cli.maths.oracle import policy_win_rates, solve, tilt

    times = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        win_rates = rng.random((prompts, 8, objectives))
        log_reference = np.full((prompts, 8), -np.log(8))
        prices = np.full(objectives - 1, 0.5)
        b = policy_win_rates(tilt(win_rates, log_reference, 0.08, prices), win_rates)[1:]
        started = time.perf_counter()
        assert solve(win_rates, log_reference, 0.08, b).feasible
        times.append(time.perf_counter() - started)
    return median(times)


def dual_update() -> float:
    """Median seconds of one correction of three multipliers, from an estimate on samples."""
    import torch

    from mopo_cli.algorithms.mopo.core import Lagrangian, MopoSettings
    from mopo_cli.maths.estimates import sampled_estimate

    names = ("helpful", "harmless", "concise", "faithful")
    point = Lagrangian(MopoSettings(names, (0.5, 0.5, 0.5), 0.08, 1.0, "auto", float("inf")))
    estimate = sampled_estimate(torch.rand(1000, 2, 4), 0.08, "auto", 0.2)
    times = []
    for _ in range(50):
        started = time.perf_counter()
        point.observe(estimate)
        times.append(time.perf_counter() - started)
    return median(times)


def main() -> int:
    lines = [
        Line("mopo --help", seconds(["--help"], 5), 0.3, "s"),
        Line("mopo train --cfg job", seconds(["train", "--cfg", "job"], 5), 1.5, "s"),
    ]
    wall, peak, summary = train()
    part = summary["train"]
    lines += [
        Line("mopo train (embedded default, W&B offline)", wall, 150, "s"),
        Line("  peak resident memory", peak, 2000, "MB"),
        Line(
            "  on-policy estimate / alignment time", 100 * part["estimate_seconds"] / part["alignment_seconds"], 25, "%"
        ),
    ]
    step = part["alignment_seconds"] / part["steps"]
    wall_of_sweep, trained, alone = sweep()
    once, twice, wide = oracle(10_000, 4), oracle(20_000, 4), oracle(10_000, 8)
    lines += [
        Line("  dual update / step", 100 * dual_update() / step, 1, "%"),
        Line("mopo synthetic", synthetic(), 60, "s"),
        Line("mopo sweep of 12 smoke runs / their training times", wall_of_sweep / trained, 1.15, "x"),
        Line("  / 12 x mopo train hparams=smoke", wall_of_sweep / (12 * alone), 0.5, "x"),
        Line("exact dual, 10 000 prompts, 8 responses, K = 4", once, 0.5, "s"),
        Line("  20 000 prompts / 10 000", twice / once, 2.2, "x"),
        Line("  K = 8 / K = 4", wide / once, 2.2, "x"),
    ]
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}\n")
    print(f"| {'what':<48} | measured | target |\n|{'-' * 50}|---------:|-------:|")
    for line in lines:
        print(f"| {line.what:<48} | {line.measured:.2f} {line.unit} | ≤ {line.target:g} {line.unit} |")
    print(
        f"\nfresh responses {part['fresh_seconds']:.1f} s of {part['alignment_seconds']:.1f} s of alignment; "
        f"{part['pairs_per_second']:.0f} pairs/s, {part['tokens_per_second']:.0f} tokens/s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
