"""Run directories as a training leaves them, written without one: for reports over many runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

PROMPTS = tuple(f"How do I do thing {i}?" for i in range(40))


def write_run(
    path: Path,
    rates: Mapping[str, float],
    thresholds: Mapping[str, float] | None = None,
    settings: Mapping[str, Any] | None = None,
    exact: bool = False,
    front: Sequence[Mapping[str, float]] = (),
    finished: bool = True,
    responses: int = 2,
    length: int = 60,
    steps: int = 200,
    seed: int = 0,
    algorithm: str | None = "mopo",  # or a method without multipliers; None: as runs of old, which do not say
    optimum: Mapping[str, float] | None = None,
    attainable: Mapping[str, float] | None = None,  # of thresholds that are out of reach
) -> Path:
    """A run whose samples have these mean win rates (the first objective is the primary one)."""
    rng = np.random.default_rng(seed)
    names, asked = list(rates), thresholds or {}
    path.mkdir(parents=True)
    config = {
        "tau": 0.08,
        "seed": seed,
        "dataset": {"_target_": "data", "path": None},
        "algorithm": {"name": algorithm, "_target_": f"methods.{algorithm.capitalize()}"} if algorithm else {
            "_target_": "mopo_cli.algorithms.mopo.Mopo"},
        "objectives": {n: {"role": "secondary" if i else "primary", "threshold": asked.get(n), "worst": 0.0}
                       for i, n in enumerate(names)},
        "run": {"name": path.name, "dir": str(path)},
    }  # fmt: skip
    for key, value in (settings or {}).items():
        *parents, last = key.split(".")
        node: Any = config
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    followed = algorithm in (None, "mopo")
    logged = [_line(s, steps, rates, asked, rng) if followed else _pair_line(s, steps, rng)
              for s in range(5, steps + 1, 5)]  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logged))
    state = "done" if finished else "running"
    (path / "status.json").write_text(json.dumps({"state": state, "step": steps, "error": None}))
    if not finished:
        return path
    noise = rng.normal(0, 0.2, (len(PROMPTS), responses, len(names)))
    scores = np.array(list(rates.values())) + noise - noise.mean(axis=(0, 1))
    lines = [
        {"prompt": prompt, "response": f"{path.name} says: " + "word " * (length // 5),
         "scores": dict(zip(names, scores[i, m].round(4).tolist(), strict=True))}
        for i, prompt in enumerate(PROMPTS) for m in range(responses)
    ]  # fmt: skip
    (path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = summary(rates, asked, exact, front, seed, optimum)
    if attainable:
        told["oracle"] |= {"feasible": False, "attainable": dict(attainable)}
    if algorithm:
        told["algorithm"] = algorithm
    if not followed:
        told["duals"] = {}
        for objective in told["objectives"].values():
            objective["estimated_win_rate"] = None
    (path / "summary.json").write_text(json.dumps(told))
    return path


def _pair_line(step: int, steps: int, rng: Any) -> dict[str, Any]:
    """What a method on labelled pairs logs."""
    far = step / steps
    return {"step": step, "loss": 0.69 - 0.2 * far + rng.normal(0, 0.01), "preferred_logp": -30 - far,
            "other_logp": -30 - 4 * far, "accuracy": min(1.0, 0.5 + 0.25 * far + rng.normal(0, 0.02))}  # fmt: skip


def _line(step: int, steps: int, rates: Mapping[str, float], asked: Mapping[str, float], rng: Any) -> dict[str, Any]:
    line: dict[str, Any] = {"step": step, "kl": 0.4 * step / steps, "loss": 1.0}
    for i, (name, rate) in enumerate(rates.items()):
        line[f"win_rate/{name}"] = 0.5 + (rate - 0.5) * step / steps + rng.normal(0, 0.004)
        if i:
            line[f"lower/{name}"] = line[f"win_rate/{name}"] - 0.01
            line[f"threshold/{name}"], line[f"dual/{name}"] = asked.get(name, 0.45), 0.3 + rng.normal(0, 0.01)
    return line


def summary(
    rates: Mapping[str, float], asked: Mapping[str, float], exact: bool, front: Sequence[Mapping[str, float]],
    seed: int, optimum: Mapping[str, float] | None = None,
) -> dict[str, Any]:  # fmt: skip
    oracle = {
        "win_rate": dict(rates),
        "optimum": optimum or {name: rate + 0.01 for name, rate in rates.items()},
        "reference": dict.fromkeys(rates, 0.5),
        "gap": 0.01,
        "kl": 0.4,
        "optimum_kl": 0.42,
        "front": list(front),
    }
    names = list(rates)
    return {
        "state": "done",
        "objectives": {
            name: {
                "role": "secondary" if i else "primary",
                "threshold": asked.get(name),
                "win_rate": rate,
                "win_rate_ci95": [rate - 0.02, rate + 0.02],
                "estimated_win_rate": rate + 0.005,
                "satisfied": None if asked.get(name) is None else rate >= asked[name],
                "judge": "exact" if exact else "preference model",
            }
            for i, (name, rate) in enumerate(rates.items())
        },
        "kl": 0.4 + 0.001 * seed,
        "duals": dict.fromkeys(names[1:], 0.3),
        "oracle": oracle if exact else None,
        "train": {
            "steps": 200,
            "reused_steps": 0,
            "samples": 50,
            "reused_samples": 0,
            "alignment_seconds": 60.0,
            "pairs_per_second": 900.0,
            "peak_memory_mb": 700.0,
            "wall_seconds": 75.0,
        },
        "heldout_accuracy": dict.fromkeys(names, 0.7),
        "warnings": ["note: nothing is wrong", "the estimate is optimistic"],
        "versions": {"mopo": "0.1.0"},
        "seed": seed,
        "command": "mopo train tau=0.1",
    }


def write_sweep(directory: Path, count: int, **how: Any) -> Path:
    """A sweep over tau, a threshold and seeds, with `count` runs."""
    records = []
    for number in range(count):
        tau, asked = 0.02 * (1 + number % 5), round(0.45 + 0.05 * (number // 5 % 4), 2)
        overrides = {"tau": f"{tau:g}", "objectives.harmless.threshold": f"{asked:g}", "seed": str(number // 20)}
        name = ",".join(f"{key}={value}" for key, value in overrides.items())
        rates = {"helpful": 0.62 - 0.8 * (asked - 0.45) - tau, "harmless": asked + 0.01, "concise": 0.5 + tau / 4}
        shift = np.random.default_rng(number).normal(0, 0.006, 3)
        rates = {key: float(rate + by) for (key, rate), by in zip(rates.items(), shift, strict=True)}
        write_run(
            directory / "runs" / name, rates, {"harmless": asked, "concise": 0.5},
            {"tau": tau, "objectives.harmless.threshold": asked}, seed=number, **how,
        )  # fmt: skip
        records.append({"id": name, "overrides": overrides, "state": "done", "error": None})
    (directory / "sweep.json").write_text(json.dumps({"runs": records}))
    return directory


FRONT = ({"helpful": 0.8, "harmless": 0.3}, {"helpful": 0.7, "harmless": 0.6}, {"helpful": 0.3, "harmless": 0.8})


def write_methods(
    directory: Path, methods: Sequence[str] = ("dpo", "mopo"), seeds: int = 2, exact: bool = True
) -> Path:
    """A sweep over methods: three trade-offs and some seeds of each; mopo by thresholds, the others by weights."""
    records = []
    for place, method in enumerate(methods):
        for harmless in (0.4, 0.5, 0.6):
            for seed in range(seeds):
                weights = f"{{helpful:{1 - harmless:g},harmless:{harmless:g}}}"
                mopo = method == "mopo"
                own = {"objectives.harmless.threshold": f"{harmless:g}"} if mopo else {"algorithm.weights": weights}
                name = f"algorithm={method},{harmless:g},seed={seed}"
                every = {"algorithm.weights": "", "objectives.harmless.threshold": "null"}
                rates = {"helpful": 1.05 - harmless - 0.02 * place + 0.001 * seed, "harmless": harmless + 0.001 * seed}
                write_run(
                    directory / "runs" / name, rates, {"harmless": harmless} if mopo else {},
                    {"objectives.harmless.worst": 0.25, "objectives.helpful.worst": 0.25}, exact=exact, front=FRONT,
                    seed=seed, algorithm=method, optimum={"helpful": 1.06 - harmless, "harmless": harmless},
                )  # fmt: skip
                overrides = {"algorithm": method, **every, **own, "seed": str(seed)}
                records.append({"id": name, "overrides": overrides, "state": "done", "error": None})
    (directory / "sweep.json").write_text(json.dumps({"runs": records}))
    return directory
