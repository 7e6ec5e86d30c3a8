"""One policy for all thresholds: MOPO with the thresholds in the prompt. This project's own addition.

(P) is solved for every point of a grid of thresholds at once. Each point has multipliers of its own, from the offline
dual and corrected on the policy's samples as MOPO's are; each training row is asked at one point, and its regression
target is that point's s_lambda. The policy of a threshold between two points is that of the next higher point, which
keeps the promise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mopo_cli.algorithms.contract import EVALUATED, Aligned, finished, trained_on
from mopo_cli.algorithms.mopo.alignment import MARGIN, Alignment, Thresholds
from mopo_cli.algorithms.mopo.core import MopoSettings, unattainable
from mopo_cli.algorithms.rollouts import rollout_settings
from mopo_cli.base.console import warn
from mopo_cli.base.errors import UserError
from mopo_cli.data.directions import Levels, spelled
from mopo_cli.training.checkpoints import Setting, Work
from mopo_cli.training.stage import kept_policy

LEAST = 4  # prompts of a measurement, for each point of the grid
LEVELS = 5  # thresholds of each secondary, where the prompts allow so many
REACH = 0.9  # of the way from the reference's win rate to the attainable one: the highest threshold of a grid


def grid_of(levels: Sequence[Sequence[float]]) -> list[tuple[float, ...]]:
    """Every combination of the secondaries' thresholds."""
    return list(itertools.product(*levels))


def spread_levels(least: float, best: float, count: int) -> tuple[float, ...]:
    """`count` thresholds in whole per cent from what the reference reaches to nearly what is attainable."""
    top = least + REACH * max(0.0, best - least)
    return tuple(sorted({round(float(b), 2) for b in np.linspace(least, top, count)}))


@dataclass(frozen=True)
class MopoConditioned:
    """The settings of algorithm=mopo_conditioned; see MopoSettings for tau, epsilon, delta, dual_rate and max_dual.

    levels: how many thresholds each secondary gets, or its own list. None: LEVELS, or as many as the prompts allow.
    """

    names: tuple[str, ...]
    thresholds: tuple[float | None, ...] = field(metadata=EVALUATED)
    tau: float
    epsilon: float | str
    levels: int | Mapping[str, Sequence[float]] | None = None
    delta: float = 0.2
    dual_rate: float = 0.5
    max_dual: float = 20.0
    fresh_responses: bool = True

    def __post_init__(self) -> None:
        if len(self.names) < 2:
            raise UserError("algorithm=mopo_conditioned: needs a secondary objective, whose threshold is the condition")
        object.__setattr__(self, "levels", _checked_levels(self.names[1:], self.levels))
        self.settings((0.5,) * (len(self.names) - 1), ())  # raises where a setting is wrong

    @property
    def longest_condition(self) -> str:
        return self.condition((1.0,) * (len(self.names) - 1))

    def settings(self, thresholds: Thresholds, attainable: Sequence[float]) -> MopoSettings:
        """MOPO's at one point; a threshold out of reach is cut, else its multiplier weighs down all others."""
        if attainable:
            thresholds = tuple(min(b, most - MARGIN) for b, most in zip(thresholds, attainable, strict=True))
        return MopoSettings(
            self.names,
            thresholds,
            self.tau,
            beta=1.0,
            epsilon=self.epsilon,
            t0=math.inf,
            dual_rate=self.dual_rate,
            delta=self.delta,
            max_dual=self.max_dual,
            fresh_responses=self.fresh_responses,
        )

    def condition(self, thresholds: Thresholds) -> str:
        return spelled(self.names[1:], [100.0 * b for b in thresholds], 0)

    def grid(self, stage: Alignment) -> list[Thresholds]:
        """Between what the reference reaches and what is attainable; UserError where that is too many to measure."""
        prompts, count = stage.onpolicy.prompts, len(stage.heldout.tokens)
        most = min(prompts, count) // LEAST
        if self.levels is None:
            grids = (self._spread(stage, levels) for levels in range(LEVELS, 0, -1))
            grid = next((grid for grid in grids if len(grid) <= most), [])
        elif isinstance(self.levels, int):
            grid = self._spread(stage, self.levels)
        else:
            grid = grid_of([tuple(self.levels[name]) for name in self.names[1:]])
        if not 0 < len(grid) <= most:
            size = max(len(grid), 1)
            raise UserError(
                f"algorithm.levels: a grid of {size} thresholds, each measured on {LEAST} prompts or more, needs "
                f"{LEAST * size}; there are onpolicy.prompts={prompts} of {count} held-out rows: give fewer levels, or "
                "more prompts"
            )
        return grid

    def _spread(self, stage: Alignment, levels: int) -> list[Thresholds]:
        ends = zip(stage.reached, stage.attainable, strict=True)
        return grid_of([spread_levels(least, best, levels) for least, best in ends])

    def align(self, setting: Setting) -> Aligned:
        work = Work()
        key = [trained_on(self), *rollout_settings(setting)]
        record = kept_policy(setting, "mopo_conditioned", key, work, lambda: self.fit(setting, work))
        grid, secondaries = [tuple(point) for point in record["grid"]], self.names[1:]
        levels = Levels(secondaries, tuple(tuple(sorted({p[j] for p in grid})) for j in range(len(secondaries))))
        thresholds = {  # without one, as good as the data's responses
            name: 0.5 if b is None else b for name, b in zip(secondaries, self.thresholds, strict=True)
        }
        point = levels.point(thresholds)
        for (name, b), level in zip(thresholds.items(), point, strict=True):
            if b > level + 1e-9:
                warn(f"objectives.{name}.threshold={b:g}: the policy was trained for at most {level:g}")
        for text in unattainable(setting.inputs.data.objectives, point, record["attainable"]):
            warn(text)
        place = grid.index(point)
        return Aligned(
            finished(work),
            condition=levels.told(point),
            directions=levels,
            thresholds=thresholds,
            duals=dict(zip(secondaries, record["duals"][place], strict=True)),
            estimated=dict(zip(self.names, record["estimated"][place], strict=True)),
            estimator="onpolicy",
            attainable=record["attainable"],
            off_support=record["off_support"],
        )

    def fit(self, setting: Setting, work: Work) -> dict[str, Any]:
        """Train the policy for all thresholds; the grid, and each point's multipliers and last estimate."""
        stage = Alignment(setting, self, self.settings((0.5,) * (len(self.names) - 1), ()), (), work)
        estimates = stage.train("alignment (mopo_conditioned)")
        return {
            "grid": [list(point) for point in stage.grid],
            "duals": [point.state.duals for point in stage.points],
            "estimated": [estimate.win_rates.tolist() for estimate in estimates],
            "attainable": stage.attainable,
            "off_support": stage.off_support,
        }


def _checked_levels(
    secondaries: Sequence[str], levels: int | Mapping[str, Sequence[float]] | None
) -> int | dict[str, list[float]] | None:
    """How many levels each secondary gets, or its own list; UserError where that makes no grid."""
    if levels is None:
        return None
    if isinstance(levels, int) and not isinstance(levels, bool):
        if levels < 2:
            raise UserError(f"algorithm.levels={levels}: must be 2 or more thresholds a secondary objective")
        return levels
    if not isinstance(levels, Mapping) or set(levels) != set(secondaries):
        found = ", ".join(levels) if isinstance(levels, Mapping) else levels
        raise UserError(
            f"algorithm.levels={found}: must be a number, a list for each of {', '.join(secondaries)}, or null"
        )
    for name, values in levels.items():
        right = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
        if not right or not all(isinstance(b, int | float) and 0 < b < 1 for b in values):
            raise UserError(f"algorithm.levels.{name}={values}: must be a list of win rates in (0, 1)")
    return {name: sorted({round(float(b), 2) for b in levels[name]}) for name in secondaries}
