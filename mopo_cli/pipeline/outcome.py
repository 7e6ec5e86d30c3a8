"""What a run ended with: the one record that its warnings, summary, model card, figures and tables are made from."""

from __future__ import annotations

import math
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import transformers

from mopo_cli import __version__
from mopo_cli.algorithms.contract import Aligned
from mopo_cli.base import invocation
from mopo_cli.base.types import Objective
from mopo_cli.config.compose import algorithm_name
from mopo_cli.config.schema import TrainConfig
from mopo_cli.evaluation.records import Evaluation
from mopo_cli.runs.constraints import Constraint, constraints_of

IDLE = 1e-3  # a multiplier below this does nothing


@dataclass(frozen=True, slots=True)
class Outcome:
    """An aligned policy with its evaluation, and what was logged on the way."""

    config: TrainConfig
    objectives: Sequence[Objective]
    aligned: Aligned
    evaluation: Evaluation
    heldout_accuracy: Mapping[str, float]
    history: Sequence[Mapping[str, Any]]  # the lines of metrics.jsonl
    rows: Mapping[str, int]  # of each split of the data
    heldout_win_rate: Mapping[str, float] = field(default_factory=dict)  # which points of a sweep are chosen by

    @property
    def state(self) -> str:
        return "infeasible" if self.aligned.infeasible else "done"

    @property
    def kl(self) -> float:
        assert self.evaluation.kl is not None
        return self.evaluation.kl

    @property
    def secondaries(self) -> list[str]:
        return [objective.name for objective in self.objectives[1:]]

    @property
    def bounds(self) -> dict[str, float]:
        """The thresholds that were asked of secondaries in the end."""
        thresholds = {name: self.evaluation.objectives[name].threshold for name in self.secondaries}
        return {name: b for name, b in thresholds.items() if b is not None}

    @property
    def constraints(self) -> list[Constraint]:
        """What became of each threshold."""
        results = {name: measured.summary() for name, measured in self.evaluation.objectives.items()}
        oracle = self.evaluation.oracle and {"win_rate": self.evaluation.oracle.win_rate}
        return constraints_of(results, oracle, {o.name: o.threshold for o in self.objectives})

    @property
    def measured_prompts(self) -> int:
        """Of one measurement on samples."""
        return min(self.config.onpolicy.prompts, self.rows["heldout"])

    @property
    def scheduled(self) -> list[str]:
        """Secondaries whose threshold the schedule sets."""
        return [objective.name for objective in self.objectives[1:] if objective.threshold is None]

    @property
    def refreshed(self) -> bool:
        return self.config.t0 < self.config.steps

    @property
    def duals(self) -> list[list[float]]:
        """(J,) multipliers at each logged step, and in the end."""
        keys, last = [f"dual/{name}" for name in self.secondaries], list(self.aligned.duals.values())
        logged = [[line[key] for key in keys] for line in self.history if keys and keys[-1] in line]
        return [*logged, last] if last else logged

    @property
    def idle(self) -> list[str]:
        """Secondaries whose multiplier did nothing at any step."""
        duals = self.duals
        return [name for j, name in enumerate(self.secondaries) if duals and all(step[j] < IDLE for step in duals)]

    @property
    def last_duals(self) -> Sequence[float]:
        duals = self.duals
        return duals[-1] if duals else ()

    @property
    def attainable(self) -> dict[str, float]:
        """What is the most that each secondary reaches alone, where it is known."""
        oracle = self.evaluation.oracle
        return oracle.attainable if oracle else dict(zip(self.secondaries, self.aligned.attainable, strict=False))

    def summary(self, warnings: list[str]) -> dict[str, Any]:
        """summary.json but for its wall-clock time."""
        aligned, work, evaluation = self.aligned, self.aligned.work, self.evaluation
        seconds = work.timing.seconds or math.inf
        return {
            "state": self.state,
            "algorithm": algorithm_name(self.config),
            "aim": aligned.aim,
            "condition": aligned.condition,
            "objectives": {name: measured.summary() for name, measured in evaluation.objectives.items()},
            "evaluation": {
                "prompts": evaluation.prompts,
                "independent_prompts": evaluation.independent_prompts,
                "responses": evaluation.responses,
            },
            "kl": evaluation.kl,
            "off_support": aligned.off_support,
            "duals": aligned.duals,
            "oracle": asdict(evaluation.oracle) if evaluation.oracle else None,
            "train": {
                "steps": work.steps,
                "reused_steps": work.reused_steps,
                "samples": work.samples,
                "reused_samples": work.reused_samples,
                "pairs_per_second": work.pairs / seconds,
                "tokens_per_second": work.tokens / seconds,
                "peak_memory_mb": peak_memory_mb(),
                "alignment_seconds": work.timing.seconds,
                "estimate_seconds": work.timing.estimate,
                "fresh_seconds": work.timing.fresh,
            },
            "heldout_accuracy": dict(self.heldout_accuracy),
            "heldout_win_rate": dict(self.heldout_win_rate),
            "warnings": warnings,
            "versions": {
                "mopo": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "seed": self.config.seed,
            "command": invocation.line(),
        }


def peak_memory_mb() -> float:
    """Peak of the accelerator's memory where there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
