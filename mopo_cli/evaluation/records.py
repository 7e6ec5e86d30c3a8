"""What evaluation is given and what it gives: the records that summary, card, figures, tracker and console read."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from mopo_cli.base.text import prompts_told
from mopo_cli.maths.significance import FEWEST, UNKNOWN, Interval, verdict
from mopo_cli.models.policy import Policy, Snapshot

LIKELY = 0.9  # of the world's responses under the policy: below, exact win rates are of too little of what it says
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
    win_rate_ci95: Interval  # UNKNOWN below FEWEST independent prompts
    estimated_win_rate: float | None  # the run's own last word
    satisfied: bool | None  # by the exact win rate where that settles it, else by the sampled one; None: nothing asked
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

    def settled(self, exact: float, bounds: Interval) -> Measured:
        """With the exact win rate, conditional on the world's responses, and what it leaves possible without that.

        Where both bounds lie on one side of the threshold it is judged without a doubt; else samples judge it.
        """
        told = replace(self, exact_win_rate=exact)
        judged = verdict(bounds, self.threshold)
        if judged in (None, "undecided"):
            return told
        return replace(told, satisfied=judged == "yes", satisfied_with_confidence=judged)

    def summary(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in SUMMARY}


@dataclass(frozen=True, slots=True)
class ExactRates:
    """Win rates of a policy in an enumerable world, conditional on the world's responses.

    bounds: of the win rates without that condition. A policy that gives the world's responses to prompt x with
    probability m_x, and wins w_x of the comparisons with them, wins between E m_x w_x and E (m_x w_x + 1 - m_x) in all.
    """

    win_rate: dict[str, float]
    bounds: dict[str, Interval]
    support_mass: float  # E m_x
    prompts: int
    independent_prompts: int

    def bounds_of(self, name: str) -> Interval:
        """The bounds of one objective; UNKNOWN where they rest on fewer than FEWEST independent prompts."""
        return self.bounds[name] if self.independent_prompts >= FEWEST else UNKNOWN


@dataclass(frozen=True, slots=True)
class Exact(ExactRates):
    """Exact numbers of an enumerable world; `gap` is how much of the optimum's primary win rate is missing.

    Thresholds that are out of reach have no optimum: everything about one is None.
    """

    optimum: dict[str, float] | None
    gap: float | None
    kl: float
    optimum_kl: float | None
    optimum_duals: dict[str, float] | None
    duality_gap: float | None
    feasible: bool
    attainable: dict[str, float]
    reference: dict[str, float]
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
    group: str = ""  # of the prompt, where the data have groups

    def line(self) -> dict[str, Any]:
        """What samples.jsonl tells of it."""
        return {"prompt": self.prompt, "response": self.response, **({"group": self.group} if self.group else {}),
                "scores": self.win_rate}  # fmt: skip


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
    independent_prompts: int  # prompts of one group count once
    support_mass: float | None  # probability of the world's responses, where exact win rates are conditional on them
    responses: int  # in all
    seed: int
    seconds: float
    samples: list[ScoredSample] = field(repr=False)
    by_prompt: dict[str, np.ndarray] = field(repr=False, compare=False)  # (N,) win rates, or scores without data

    @property
    def measured(self) -> dict[str, Measured]:
        """Objectives, then the scorers beside them."""
        return {**self.objectives, **self.scorers}

    @property
    def asked(self) -> str:
        return prompts_told(self.prompts, self.independent_prompts)

    @property
    def doubts(self) -> list[str]:
        """What keeps its numbers from carrying a verdict, as warnings."""
        found = []
        if self.independent_prompts < FEWEST:
            found.append(
                f"{self.asked}: too few for an interval, so no threshold is decided on samples; {FEWEST} independent "
                "ones are the least. Give more rows, or raise dataset.test_fraction or evaluation.prompts"
            )
        if self.support_mass is not None and self.support_mass < LIKELY:
            found.append(
                f"exact win rates are of the world's responses, which are {self.support_mass:.1%} of what the policy "
                "says: they decide a threshold only where all the rest could not change it"
            )
        return found

    def numbers(self) -> dict[str, Any]:
        """What evaluation.json tells of it."""
        values = asdict(replace(self, samples=[], by_prompt={}))
        return {key: value for key, value in values.items() if key not in ("samples", "by_prompt")}
