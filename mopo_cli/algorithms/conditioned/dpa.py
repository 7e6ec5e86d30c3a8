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

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mopo_cli.algorithms.conditioned.lessons import Lesson, Lessons, ScoredData, listed, standardised
from mopo_cli.algorithms.conditioned.rounds import Count, ItemLessons, Round, Share, TaughtInRounds, WholeNumber
from mopo_cli.algorithms.rollouts import Samples
from mopo_cli.data.directions import Directions, spelled
from mopo_cli.training.stage import mix

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


@dataclass(frozen=True)
class Dpa(TaughtInRounds):
    """The settings of algorithm=dpa."""

    rounds: WholeNumber = 3
    first_share: Share = 0.4
    prompts: Count = 500
    responses: Count = 8
    directions: Count = 2  # of each prompt

    name = "dpa"

    @property
    def longest_condition(self) -> str:
        return self.spell(np.ones(len(self.names)))

    def spell(self, wish: np.ndarray) -> str:
        return spelled(self.names, (100.0 * wish).tolist(), 0)

    def outer(self, data: ScoredData) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return (0.0,) * len(self.names), (100.0,) * len(self.names)

    def directions_at(self, low: tuple[float, ...], high: tuple[float, ...]) -> Directions:
        return Directions(self.names, low, high, "l2", 0)

    def first_lessons(self, data: ScoredData) -> Lessons:
        """The best of a row's own responses for each of some directions."""

        def of_row(i: int) -> list[Lesson]:
            vectors = drawn_directions(self.directions, len(self.names), mix(data.seed, 6, i))
            chosen = [(v, best(data.scores[i], v)) for v in vectors]
            return [Lesson(i, self.spell(v), data.rows[i].responses[g]) for v, g in chosen if g is not None]

        return Lessons(len(data.rows), of_row)

    def wishes(self, data: ScoredData, prompts: int, seed: int) -> np.ndarray:
        return drawn_directions(prompts * self.directions, len(self.names), seed)

    def lessons(
        self, data: ScoredData, samples: Sequence[Samples], wishes: np.ndarray
    ) -> tuple[ItemLessons, dict[str, float]]:
        items: ItemLessons = {}
        gains: list[float] = []
        for drawn, v in zip(samples, wishes, strict=True):
            rewards = standardised(drawn.scores, data.scales)
            if (g := best(rewards, v, drawn.usable.numpy())) is not None:
                items.setdefault(drawn.row, []).append(Lesson(drawn.row, drawn.condition, drawn.responses[g]))
                gains.append(float(rewards[g] @ v - (rewards @ v).mean()))
        return items, {"best above their mean": float(np.mean(gains))}

    def round_lessons(self, data: ScoredData, rounds: Sequence[Round]) -> Lessons:
        return listed(rounds[-1].items)
