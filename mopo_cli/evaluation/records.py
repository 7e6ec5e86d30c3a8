"""What evaluation is given and what it gives: the records that report, card and tracker read."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TypeVar

from mopo_cli.models.policy import Policy, Snapshot
from mopo_cli.models.preference import PreferenceModel


@dataclass(slots=True)
class Models:
    """What evaluation needs besides data."""

    policy: Policy
    initial: Snapshot  # the first reference
    judge: PreferenceModel
    condition: str = ""  # what stands in front of each prompt when the policy is asked; the reference never sees it
    cache: str | None = None  # where the reference's log-probs of an enumerable world are kept for other runs


@dataclass(frozen=True, slots=True)
class ObjectiveResult:
    """One objective of summary.json."""

    role: str
    threshold: float | None
    win_rate: float
    win_rate_ci95: tuple[float, float]
    estimated_win_rate: float | None
    satisfied: bool | None  # by the exact win rate where it is known; None for the primary, of which nothing is asked
    judge: str  # "exact", "computed", "preference model" or a gold scorer's name
    satisfied_with_confidence: str | None = None  # "yes", "no" or "undecided" at 95 %


@dataclass(frozen=True, slots=True)
class Exact:
    """Exact numbers of an enumerable world; `gap` is how much of the optimum's primary win rate is missing."""

    win_rate: dict[str, float]
    optimum: dict[str, float]
    gap: float
    kl: float
    optimum_kl: float
    optimum_duals: dict[str, float]
    duality_gap: float
    feasible: bool
    attainable: dict[str, float]
    reference: dict[str, float]
    support_mass: float  # probability of the world's responses under the policy; win rates are conditional on them
    front: list[dict[str, float]] = field(default_factory=list)  # vertices of the exact front, whatever the KL


@dataclass(frozen=True, slots=True)
class Sample:
    prompt: str
    response: str
    scores: dict[str, float]  # win rate against the data's responses, by objective


@dataclass(frozen=True, slots=True)
class Evaluation:
    objectives: dict[str, ObjectiveResult]
    kl: float
    samples: list[Sample] = field(repr=False)
    oracle: Exact | None = None


R = TypeVar("R", bound=ObjectiveResult)


def settled(result: R, exact: float) -> R:
    """The result with its threshold judged by the exact win rate, which leaves no doubt."""
    if result.threshold is None:
        return result
    kept = exact >= result.threshold
    return replace(result, satisfied=kept, satisfied_with_confidence="yes" if kept else "no")


def kept(result: ObjectiveResult) -> str:
    """Whether the threshold is kept, for a table; with a question mark where the interval leaves it open."""
    if result.satisfied is None:
        return ""
    doubt = "?" if result.satisfied_with_confidence == "undecided" else ""
    return f"[green]yes{doubt}[/]" if result.satisfied else f"[red]no{doubt}[/]"


@dataclass(frozen=True, slots=True)
class Measured(ObjectiveResult):
    """One objective or gold scorer of one entrant; NaN where there is nothing to compare with."""

    reference_win_rate: float = math.nan  # against the responses of the entrant's own reference
    reference_win_rate_ci95: tuple[float, float] = (math.nan, math.nan)
    score: float = math.nan  # mean of the judge's raw scores
    score_ci95: tuple[float, float] = (math.nan, math.nan)
    normalised_score: float = math.nan  # in standard deviations from the mean of the reference's responses
    normalised_score_ci95: tuple[float, float] = (math.nan, math.nan)
    exact_win_rate: float | None = None


@dataclass(frozen=True, slots=True)
class Wording:
    """What a source's responses look like: mean words, and the shares of different words and pairs of words."""

    words: float
    distinct_1: float
    distinct_2: float


@dataclass(frozen=True, slots=True)
class Evaluated:
    """All numbers of one entrant."""

    name: str
    path: str
    kind: str
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
