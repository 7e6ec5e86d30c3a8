"""RiC: one policy that is told scores, learnt from responses with the scores that they have.

Source: Yang et al. 2024, *Rewards-in-Context*, arXiv 2402.10207, and its code. Readings taken where these leave
something open or differ:

- Scores are the preference model's values, or a computed objective's, standardised over the training responses and
  rounded to 0.1; they stand in front of the prompt, as "helpful 1.2 harmless -0.4", not between prompt and response.
- The code asks for targets between the extremes of 1e5 normal draws, about -4.3 and 4.3, which no data reach:
  extremes=normal. The default, extremes=data, asks for the training responses' own outer quantiles. Both are stored.
  On the embedded world (K = 2, 600 steps) one policy's exact win rates range from (0.83, 0.22) to (0.14, 0.80) by the
  data's extremes, and from (0.59, 0.54) to (0.38, 0.66) by the normal ones, which are scores it has never met.
- The filter keeps a sample where any score reaches the quantile of that score over the samples; the data's responses
  are filtered by quantiles of their own, as in the code.
- A sample that does not end, or is less likely under the reference than nearly all of the data's responses, is left
  out before: no judge has seen such text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from mopo_cli.algorithms.conditioned.lessons import (
    Lesson,
    Lessons,
    Round,
    check_scored,
    check_settings,
    data_values,
    fit_rounds,
    fit_scales,
    listed,
    policy_settings,
    split_steps,
    standardised,
)
from mopo_cli.algorithms.contract import Aligned, aim_of, finished
from mopo_cli.algorithms.rollouts import Sampler, unusable
from mopo_cli.base.errors import UserError
from mopo_cli.data.directions import MAPS, Directions, spelled
from mopo_cli.training.checkpoints import Setting, Work
from mopo_cli.training.stage import kept_policy, mix

EXTREMES = ("data", "normal")
OUTER = 0.01  # of the data's scores lie below the lowest target, and above the highest
LARGEST = 9.9  # scores beyond are told as this
TOGETHER = 2  # responses of a row that one item of a batch learns


def outer_scores(scores: np.ndarray, extremes: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(K,) lowest and highest targets for (n, K) standardised scores, rounded to 0.1 as conditions are."""
    if extremes == "normal":
        draws = np.random.default_rng(seed).standard_normal(100_000)
        low, high = np.full(scores.shape[1], draws.min()), np.full(scores.shape[1], draws.max())
    else:
        low, high = np.quantile(scores, OUTER, axis=0), np.quantile(scores, 1.0 - OUTER, axis=0)
    return low.clip(-LARGEST, LARGEST).round(1), high.clip(-LARGEST, LARGEST).round(1)


def online_targets(count: int, low: np.ndarray, high: np.ndarray, seed: int) -> np.ndarray:
    """(count, K) targets drawn evenly between the outer ones, all but each row's lowest then set to the highest.

    The lowest is found as a share of the way from low to high, which is the code's where all objectives have one range.
    """
    parts = np.random.default_rng(seed).random((count, len(low)))
    lowest = parts.argmin(1)[:, None] == np.arange(len(low))
    return low + np.where(lowest, parts, 1.0) * (high - low)


def outstanding(scores: np.ndarray, quantile: float) -> np.ndarray:
    """(n,) whether any of a response's (n, K) scores reaches that score's quantile over all n."""
    return np.any(scores >= np.quantile(scores, quantile, axis=0), axis=1)


class Ric:
    """The settings of algorithm=ric. `direction` and `map` say where this run is evaluated, and change nothing in
    training."""

    def __init__(
        self,
        names: tuple[str, ...],
        unscored: tuple[str, ...] = (),
        direction: dict[str, float] | None = None,
        map: str = "l2",
        extremes: str = "data",
        rounds: int = 2,
        first_share: float = 0.6,
        prompts: int = 2000,
        responses: int = 1,
        quantile: float = 0.7,
        data_rows: int = 1000,
    ):
        check_scored(unscored, "ric")
        check_settings(first_share, rounds=(rounds, 0), prompts=(prompts, 1), responses=(responses, 1),
                       data_rows=(data_rows, 0))  # fmt: skip
        if map not in MAPS:
            raise UserError(f"algorithm.map={map}: must be {', '.join(MAPS[:-1])} or {MAPS[-1]}")
        if extremes not in EXTREMES:
            raise UserError(f"algorithm.extremes={extremes}: must be {' or '.join(EXTREMES)}")
        if not 0 <= quantile < 1:
            raise UserError(f"algorithm.quantile={quantile}: must be in [0, 1)")
        self.names, self.map, self.extremes, self.rounds, self.first_share = names, map, extremes, rounds, first_share
        self.prompts, self.responses, self.quantile, self.data_rows = prompts, responses, quantile, data_rows
        self.direction = direction
        zeros = (0.0,) * len(names)
        Directions(names, zeros, zeros, map, 1).condition(direction, "algorithm.direction")  # told before anything else
        self.longest_condition = self.spell(np.full(len(names), -LARGEST))

    def spell(self, scores: np.ndarray) -> str:
        return spelled(self.names, scores.clip(-LARGEST, LARGEST).tolist(), 1)

    def align(self, setting: Setting) -> Aligned:
        work = Work()
        own = [
            self.extremes,
            self.rounds,
            self.first_share,
            self.prompts,
            self.responses,
            self.quantile,
            self.data_rows,
        ]
        found = kept_policy(setting, "ric", [policy_settings(setting), own], work, lambda: self.fit(setting, work))
        told = Directions(self.names, tuple(found["low"]), tuple(found["high"]), self.map, 1)
        return Aligned(
            finished(work),
            aim=aim_of(setting, alike=True),
            condition=told.condition(self.direction, "algorithm.direction"),
            directions=told,
            off_support=found["off_support"],
        )

    def fit(self, setting: Setting, work: Work) -> dict[str, Any]:
        values = data_values(setting)
        scales = fit_scales(values)
        scores = [standardised(v, scales) for v in values]
        seed, rows = setting.config.seed, setting.inputs.tokens["train"]
        low, high = outer_scores(np.concatenate(scores), self.extremes, mix(seed, 6))
        sampler = Sampler(setting, work) if self.rounds else None

        def of_data(i: int) -> list[Lesson]:
            """Every response of a row behind the scores that it has."""
            return [Lesson(i, self.spell(s), r) for s, r in zip(scores[i], rows[i].responses, strict=True)]

        places = [(i, g) for i, s in enumerate(scores) for g in range(0, len(s), TOGETHER)]
        offline = Lessons(len(places), lambda n: of_data(places[n][0])[places[n][1] :][:TOGETHER])

        def draw(t: int) -> Round:
            assert sampler is not None
            numbers = np.random.default_rng(mix(seed, 7, t)).permutation(len(rows))[: self.prompts].tolist()
            targets = online_targets(len(numbers), low, high, mix(seed, 8, t))
            asked = [(i, self.spell(target)) for i, target in zip(numbers, targets, strict=True)]
            samples = sampler(asked, self.responses, mix(seed, 9, t), f"samples (round {t} of {self.rounds})")
            flat = [(one.row, r) for one in samples for r, ok in zip(one.responses, one.usable, strict=True) if ok]
            found = np.concatenate([standardised(one.values[one.usable], scales) for one in samples])
            keep = outstanding(found, self.quantile)
            kept: dict[int, list[Lesson]] = {}
            for (i, response), score, good in zip(flat, found, keep, strict=True):
                if good:
                    kept.setdefault(i, []).append(Lesson(i, self.spell(score), response))
            off, count = unusable(samples), len(asked) * self.responses
            told = {"samples": float(count), "kept": float(keep.sum()), "off the data's support": off}
            return Round(list(kept.values()), count, off, told)

        def learnt(rounds: Sequence[Round]) -> Lessons:
            """All samples so far, and some of the data's outstanding responses."""
            return listed([*(item for one in rounds for item in one.items), *good])

        keep = np.split(outstanding(np.concatenate(scores), self.quantile), np.cumsum([len(s) for s in scores])[:-1])
        order = np.random.default_rng(mix(seed, 10)).permutation([i for i, some in enumerate(keep) if some.any()])
        good = [
            [lesson for lesson, ok in zip(of_data(i), keep[i], strict=True) if ok]
            for i in order[: self.data_rows].tolist()
        ]
        parts = split_steps(setting.config.steps, self.first_share, self.rounds)
        rounds = fit_rounds(setting, "ric", parts, offline, draw, learnt, work)
        return {
            "scales": {name: asdict(scale) for name, scale in zip(self.names, scales, strict=True)},
            "low": low.tolist(),
            "high": high.tolist(),
            "off_support": rounds[-1].off_support if rounds else 0.0,
        }
