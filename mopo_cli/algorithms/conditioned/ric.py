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
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np

from mopo_cli.algorithms.conditioned.lessons import Lesson, Lessons, ScoredData, listed, standardised
from mopo_cli.algorithms.conditioned.rounds import Count, ItemLessons, Round, Share, TaughtInRounds, WholeNumber
from mopo_cli.algorithms.contract import EVALUATED
from mopo_cli.algorithms.rollouts import Samples
from mopo_cli.config.checks import between, one_of
from mopo_cli.data.directions import MAPS, Directions, spelled
from mopo_cli.training.stage import mix

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


@dataclass(frozen=True)
class Ric(TaughtInRounds):
    """The settings of algorithm=ric. `map`, like `direction`, says where this run is evaluated."""

    rounds: WholeNumber = 2
    first_share: Share = 0.6
    prompts: Count = 2000
    responses: Count = 1
    map: Annotated[str, one_of(*MAPS, be=f"{', '.join(MAPS[:-1])} or {MAPS[-1]}")] = field(
        default="l2", metadata=EVALUATED
    )
    extremes: Annotated[str, one_of("data", "normal")] = "data"
    quantile: Annotated[float, between(0, 1, "[")] = 0.7
    data_rows: WholeNumber = 1000

    name = "ric"

    @property
    def longest_condition(self) -> str:
        return self.spell(np.full(len(self.names), -LARGEST))

    def spell(self, wish: np.ndarray) -> str:
        return spelled(self.names, wish.clip(-LARGEST, LARGEST).tolist(), 1)

    def outer(self, data: ScoredData) -> tuple[tuple[float, ...], tuple[float, ...]]:
        low, high = outer_scores(np.concatenate(data.scores), self.extremes, mix(data.seed, 6))
        return tuple(low.tolist()), tuple(high.tolist())

    def directions_at(self, low: tuple[float, ...], high: tuple[float, ...]) -> Directions:
        return Directions(self.names, low, high, self.map, 1)

    def of_data(self, data: ScoredData, i: int) -> list[Lesson]:
        """Every response of a row behind the scores that it has."""
        responses = zip(data.scores[i], data.rows[i].responses, strict=True)
        return [Lesson(i, self.spell(score), response) for score, response in responses]

    def first_lessons(self, data: ScoredData) -> Lessons:
        places = [(i, g) for i, s in enumerate(data.scores) for g in range(0, len(s), TOGETHER)]
        return Lessons(len(places), lambda n: self.of_data(data, places[n][0])[places[n][1] :][:TOGETHER])

    def wishes(self, data: ScoredData, prompts: int, seed: int) -> np.ndarray:
        low, high = self.outer(data)
        return online_targets(prompts, np.array(low), np.array(high), seed)

    def lessons(
        self, data: ScoredData, samples: Sequence[Samples], wishes: np.ndarray
    ) -> tuple[ItemLessons, dict[str, float]]:
        responses = [(s.row, r) for s in samples for r, ok in zip(s.responses, s.usable.tolist(), strict=True) if ok]
        scores = np.concatenate([standardised(s.scores[s.usable], data.scales) for s in samples])
        good = outstanding(scores, self.quantile)
        items: ItemLessons = {}
        for (i, response), score, ok in zip(responses, scores, good, strict=True):
            if ok:
                items.setdefault(i, []).append(Lesson(i, self.spell(score), response))
        return items, {"kept": float(good.sum())}

    def round_lessons(self, data: ScoredData, rounds: Sequence[Round]) -> Lessons:
        """All samples so far, and some of the data's outstanding responses."""
        good = outstanding(np.concatenate(data.scores), self.quantile)
        of_rows = np.split(good, np.cumsum([len(s) for s in data.scores])[:-1])
        rows = [i for i, ok in enumerate(of_rows) if ok.any()]
        order = np.random.default_rng(mix(data.seed, 10)).permutation(rows)[: self.data_rows].tolist()
        items = [[lesson for lesson, ok in zip(self.of_data(data, i), of_rows[i], strict=True) if ok] for i in order]
        return listed([*(item for drawn in rounds for item in drawn.items), *items])
