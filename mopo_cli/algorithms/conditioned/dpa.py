"""DPA: one policy that is told a direction, by rejection sampling on a vector of rewards.

Source: Wang et al. 2024, *Arithmetic Control of LLMs for Diverse User Preferences*, arXiv 2402.18571. There K = 2; here
K is any. Readings taken where the paper leaves something open:

- Round 0, the conditioned SFT that the rounds start from, treats the data's responses to a prompt as samples: for each
  direction the one of highest v.r is learnt.
- Reward vectors are the preference model's values, or a computed objective's scores, divided by their standard
  deviation over the training responses, so that a direction means the same whatever the units.
- A direction's components are drawn as |N(0, 1)| and are zero with probability 1/5 each, so that the corners and
  faces, which users ask for, are met in training; it is told in percent of a unit vector, as "helpful 80 harmless 60".
- A sample that does not end, or is less likely under the reference than nearly all of the data's responses, is never
  chosen: no judge has seen such text.
"""

from __future__ import annotations

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
from mopo_cli.data.directions import Directions, spelled
from mopo_cli.training.checkpoints import Setting, Work
from mopo_cli.training.stage import kept_policy, mix

ZERO = 0.2  # probability that an objective is not asked for at all


def drawn_directions(count: int, objectives: int, seed: int) -> np.ndarray:
    """(count, K) unit vectors without a negative component."""
    rng = np.random.default_rng(seed)
    vectors = np.abs(rng.standard_normal((count, objectives))) * (rng.random((count, objectives)) >= ZERO)
    none = ~vectors.any(1)
    vectors[none, rng.integers(objectives, size=int(none.sum()))] = 1.0
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def best(rewards: np.ndarray, direction: np.ndarray, usable: np.ndarray | None = None) -> int | None:
    """Which of (n, K) responses has the highest v.r, among the usable ones; None where none is."""
    scores = rewards @ direction
    if usable is not None:
        scores = np.where(usable, scores, -np.inf)
    chosen = int(scores.argmax())
    return chosen if np.isfinite(scores[chosen]) else None


class Dpa:
    """The settings of algorithm=dpa. `direction` says where this run is evaluated, and changes nothing in training."""

    def __init__(
        self,
        names: tuple[str, ...],
        unscored: tuple[str, ...] = (),
        direction: dict[str, float] | None = None,
        rounds: int = 3,
        first_share: float = 0.4,
        prompts: int = 500,
        directions: int = 2,
        responses: int = 8,
    ):
        check_scored(unscored, "dpa")
        check_settings(first_share, rounds=(rounds, 0), prompts=(prompts, 1), directions=(directions, 1),
                       responses=(responses, 1))  # fmt: skip
        self.names, self.rounds, self.first_share = names, rounds, first_share
        self.prompts, self.directions, self.responses = prompts, directions, responses
        size = len(names)
        self.told = Directions(names, (0.0,) * size, (100.0,) * size, "l2", 0)
        self.condition = self.told.condition(direction, "algorithm.direction")
        self.longest_condition = self.spell(np.ones(size))

    def spell(self, direction: np.ndarray) -> str:
        return spelled(self.names, (100.0 * direction).tolist(), 0)

    def align(self, setting: Setting) -> Aligned:
        work = Work()
        own = [self.rounds, self.first_share, self.prompts, self.directions, self.responses]
        found = kept_policy(setting, "dpa", [policy_settings(setting), own], work, lambda: self.fit(setting, work))
        return Aligned(
            finished(work),
            aim=aim_of(setting, alike=True),
            condition=self.condition,
            directions=self.told,
            off_support=found["off_support"],
        )

    def fit(self, setting: Setting, work: Work) -> dict[str, Any]:
        values = data_values(setting)
        scales = fit_scales(values)
        rewards = [standardised(v, scales) for v in values]
        seed, rows, size = setting.config.seed, setting.inputs.tokens["train"], len(self.names)
        sampler = Sampler(setting, work) if self.rounds else None

        def of_data(i: int) -> list[Lesson]:
            """The best of a row's own responses for each of some directions."""
            chosen = [(v, best(rewards[i], v)) for v in drawn_directions(self.directions, size, mix(seed, 6, i))]
            return [Lesson(i, self.spell(v), rows[i].responses[g]) for v, g in chosen if g is not None]

        def draw(t: int) -> Round:
            assert sampler is not None
            numbers = np.random.default_rng(mix(seed, 7, t)).permutation(len(rows))[: self.prompts].tolist()
            vectors = drawn_directions(len(numbers) * self.directions, size, mix(seed, 8, t))
            asked = [
                (i, self.spell(v)) for i, v in zip(np.repeat(numbers, self.directions).tolist(), vectors, strict=True)
            ]
            samples = sampler(asked, self.responses, mix(seed, 9, t), f"samples (round {t} of {self.rounds})")
            items: dict[int, list[Lesson]] = {}
            gains: list[float] = []
            for one, v in zip(samples, vectors, strict=True):
                r = standardised(one.values, scales)
                if (g := best(r, v, one.usable)) is not None:
                    items.setdefault(one.row, []).append(Lesson(one.row, one.condition, one.responses[g]))
                    gains.append(float(r[g] @ v - (r @ v).mean()))
            off = unusable(samples)
            told = {"samples": float(len(asked) * self.responses), "best above their mean": float(np.mean(gains)),
                    "off the data's support": off}  # fmt: skip
            return Round(list(items.values()), len(asked) * self.responses, off, told)

        parts = split_steps(setting.config.steps, self.first_share, self.rounds)
        rounds = fit_rounds(
            setting, "dpa", parts, Lessons(len(rows), of_data), draw, lambda drawn: listed(drawn[-1].items), work
        )
        off = rounds[-1].off_support if rounds else 0.0
        return {"scales": {n: asdict(s) for n, s in zip(self.names, scales, strict=True)}, "off_support": off}
