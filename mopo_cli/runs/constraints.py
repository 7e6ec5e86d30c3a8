"""What is said of a run's thresholds: the one record that console, warnings, card, page and sweep tables word alike.

Everything comes from what summary.json has of an objective, so a run says the same while it ends and ever after.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OF_OPTIMUM = ("optimum", "gap", "optimum_kl", "optimum_duals", "duality_gap")  # which there is only one of if feasible
WORDS = {"yes": "kept", "no": "missed", "undecided": "undecided"}  # a verdict at 95 %, wherever it is told
OWN_MARK = "*"  # behind a threshold that no user asked for
OWN_NOTE = "*: no threshold of yours: the run set it itself, on its schedule or as good as the data's responses"


@dataclass(frozen=True, slots=True)
class Constraint:
    """R_j >= threshold, and what became of it."""

    name: str
    threshold: float
    asked: bool  # by the user; else the run's own, on its schedule
    verdict: str  # "yes", "no" or "undecided" at 95 %; "" where nothing was measured
    win_rate: float
    margin: float  # half the 95 % interval; NaN where the prompts are too few for one
    exact: float | None = None

    @property
    def found(self) -> str:
        """The number that carries the verdict: the sampled win rate where its interval does, else the exact one."""
        low, high = self.win_rate - self.margin, self.win_rate + self.margin
        carries = {"yes": low >= self.threshold, "no": high < self.threshold}.get(self.verdict, True)
        if carries or self.exact is None:
            return f"win rate {self.win_rate:.3f}" + ("" if math.isnan(self.margin) else f" ± {self.margin:.3f}")
        return f"exact win rate {self.exact:.3f}"

    @property
    def outcome(self) -> str:
        """One word, with the number where the threshold is not surely kept."""
        word = WORDS.get(self.verdict, "not measured")
        return word if self.verdict in ("yes", "") else f"{word}: {self.found}"


def verdict_of(result: Mapping[str, Any]) -> str:
    """An objective's verdict in summary.json; of runs of old, which had no interval's, by the win rate alone."""
    told = result.get("satisfied_with_confidence")
    satisfied = result.get("satisfied")
    return str(told) if told else "" if satisfied is None else "yes" if satisfied else "no"


def constraints_of(
    results: Mapping[str, Mapping[str, Any]], oracle: Mapping[str, Any] | None, asked: Mapping[str, float | None]
) -> list[Constraint]:
    """Those of an evaluation's objectives (as in summary.json) that have a threshold; `asked`: the user's own."""
    exact = (oracle or {}).get("win_rate") or {}
    return [
        Constraint(
            name,
            float(result["threshold"]),
            asked.get(name) is not None,
            verdict_of(result),
            float(result["win_rate"]),
            _half(*result["win_rate_ci95"]),
            exact.get(name),
        )
        for name, result in results.items()
        if result.get("threshold") is not None
    ]


def _half(low: float | None, high: float | None) -> float:
    return math.nan if low is None or high is None else (float(high) - float(low)) / 2


def asked_of(settings: Mapping[str, Any]) -> dict[str, float | None]:
    """The thresholds that a config's user has set, None where there is none."""
    nodes = settings.get("objectives")
    nodes = nodes if isinstance(nodes, Mapping) else {}
    return {str(name): node.get("threshold") for name, node in nodes.items() if isinstance(node, Mapping)}


def known_oracle(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The oracle of a summary.json, without an optimum where the thresholds have none; empty where nothing is exact."""
    oracle = dict(summary.get("oracle") or {})
    return oracle if oracle.get("feasible", True) else {**oracle, **dict.fromkeys(OF_OPTIMUM)}


def out_of_reach(
    thresholds: Mapping[str, float], attainable: Mapping[str, float], shortfall: float | None = None
) -> str:
    """Why there is no optimum, and what is attainable instead; `shortfall` as an Optimum of maths/oracle.py has it."""
    alone = {name: b for name, b in thresholds.items() if b > attainable.get(name, 1.0)}
    if alone or len(thresholds) == 1:
        return "; ".join(_beyond(name, b, attainable.get(name)) for name, b in (alone or thresholds).items())
    asked = _listed([f"{name} at least {b:.3f}" for name, b in thresholds.items()])
    most = _listed([f"{name} {attainable[name]:.3f}" for name in thresholds if name in attainable])
    lower = f"; lowered by {shortfall:.3f} each, all are" if shortfall else ""
    return f"{asked} are out of reach together: each alone is attainable ({most}){lower}"


def _beyond(name: str, threshold: float, most: float | None) -> str:
    known = "" if most is None else f": at most {most:.3f} is attainable"
    return f"{name} at least {threshold:.3f} is out of reach{known}"


def _listed(texts: Sequence[str]) -> str:
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 2 else texts)
