"""What evaluation is given and what it gives: the records that summary, card, figures, tracker and console read."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from mopo_cli.models.policy import Policy, Snapshot

Interval = tuple[float, float]
UNKNOWN = (math.nan, math.nan)
SUMMARY = ("role", "threshold", "win_rate", "win_rate_ci95", "estimated_win_rate", "satisfied", "judge",
           "satisfied_with_confidence")  # fmt: skip  # what summary.json tells of an objective


@dataclass(frozen=True, slots=True)
class Models:
    """The policy that is evaluated, and its first reference."""

    policy: Policy
    initial: Snapshot  # of the first reference
    condition: str = ""  # what stands in front of each prompt when the policy is asked; the reference never sees it
    cache: str | None = None  # where the reference's log-probs of an enumerable world are kept for other runs


@dataclass(frozen=True, slots=True)
class Measured:
    """One objective or gold scorer of one entrant; NaN where there is nothing to compare with."""

    role: str
    threshold: float | None
    win_rate: float
    win_rate_ci95: Interval
    estimated_win_rate: float | None  # the run's own last word
    satisfied: bool | None  # by the exact win rate where it is known; None for the primary, of which nothing is asked
    judge: str  # "exact", "computed", "preference model" or a gold scorer's name
    satisfied_with_confidence: str | None = None  # "yes", "no" or "undecided" at 95 %
    reference_win_rate: float = math.nan  # against the responses of the entrant's own reference
    reference_win_rate_ci95: Interval = UNKNOWN
    score: float = math.nan  # mean of the judge's raw scores
    score_ci95: Interval = UNKNOWN
    normalised_score: float = math.nan  # in standard deviations from the mean of the reference's responses
    normalised_score_ci95: Interval = UNKNOWN
    exact_win_rate: float | None = None

    @property
    def margin(self) -> float:
        """Half the width of the win rate's 95 % interval."""
        low, high = self.win_rate_ci95
        return (high - low) / 2

    def settled(self, exact: float) -> Measured:
        """With the exact win rate, by which the threshold is judged without a doubt."""
        satisfied = None if self.threshold is None else exact >= self.threshold
        verdict = None if satisfied is None else "yes" if satisfied else "no"
        return replace(self, exact_win_rate=exact, satisfied=satisfied, satisfied_with_confidence=verdict)

    def summary(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in SUMMARY}


@dataclass(frozen=True, slots=True)
class Exact:
    """Exact numbers of an enumerable world; `gap` is how much of the optimum's primary win rate is missing.

    Thresholds that are out of reach have no optimum: everything about one is None.
    """

    win_rate: dict[str, float]
    optimum: dict[str, float] | None
    gap: float | None
    kl: float
    optimum_kl: float | None
    optimum_duals: dict[str, float] | None
    duality_gap: float | None
    feasible: bool
    attainable: dict[str, float]
    reference: dict[str, float]
    support_mass: float  # probability of the world's responses under the policy; win rates are conditional on them
    front: list[dict[str, float]] = field(default_factory=list)  # vertices of the exact front, whatever the KL
    shortfall: float = 0.0  # what all thresholds must be lowered by before they can be met together


@dataclass(frozen=True, slots=True)
class Wording:
    """What a source's responses look like: mean words, and the shares of different words and pairs of words."""

    words: float
    distinct_1: float
    distinct_2: float


@dataclass(frozen=True, slots=True)
class ScoredSample:
    """A response with what the judges say of it: a line of scores.jsonl."""

    run: str
    prompt: str
    response: str
    win_rate: dict[str, float]  # against the data's responses to the same prompt
    score: dict[str, float]
    normalised_score: dict[str, float]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All that was measured of one entrant."""

    name: str
    path: str
    kind: str  # "run", "model" or "responses"
    objectives: dict[str, Measured]
    scorers: dict[str, Measured]  # gold scorers that judge no objective
    kl: float | None  # to its reference, nats a response
    cut_off: float | None  # share of samples that had not ended at sampling.max_new_tokens
    wording: Wording
    reference_wording: Wording | None
    oracle: Exact | None
    prompts: int
    responses: int  # in all
    seed: int
    seconds: float
    samples: list[ScoredSample] = field(repr=False)
    by_prompt: dict[str, np.ndarray] = field(repr=False, compare=False)  # (N,) win rates, or scores without data

    @property
    def measured(self) -> dict[str, Measured]:
        """Objectives, then the scorers beside them."""
        return {**self.objectives, **self.scorers}

    def numbers(self) -> dict[str, Any]:
        """What evaluation.json tells of it."""
        values = asdict(replace(self, samples=[], by_prompt={}))
        return {key: value for key, value in values.items() if key not in ("samples", "by_prompt")}
