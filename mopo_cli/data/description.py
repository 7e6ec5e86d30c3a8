"""A data set in numbers, and what they mean for training on it: the content of `mopo data`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mopo_cli.base.types import Example, Objective, PreferenceData
from mopo_cli.data.prepare import prompt_key
from mopo_cli.data.statistics import (
    PairArrays,
    WithError,
    WithinRows,
    longer_preferred,
    mean,
    ratio,
    sign_agreement,
    tabulate,
    true_correlation,
    within_rows,
)

SAME_ORDER = 0.8  # from this correlation on, a constraint on one objective is not expected to bind
SMALL = 0.3  # an interval within +- this holds no relation worth naming
FEW_PAIRS = 100  # labelled training pairs, below which an objective is hardly learnt
FEW_PROMPTS = 30  # below which a confidence interval means little
COIN_FLIPS = 0.25  # of triples are cyclic where labels are coin flips; no score gives more (see _circular)
NOT_COMPARED, TOO_FEW, UNCLEAR = "not compared", "too few", "too noisy"
SAME, TOGETHER, UNRELATED, CONFLICT = "same order", "pull together", "unrelated", "conflict"


@dataclass(frozen=True, slots=True)
class Part:
    """The size of one split."""

    rows: int
    prompts: int
    labelled_pairs: int


@dataclass(frozen=True, slots=True)
class Spread:
    """A few quantiles of a count."""

    min: float
    median: float
    q95: float
    max: float


@dataclass(frozen=True, slots=True)
class Labels:
    """The labels of one objective; first + ties + second = 1, as shares of the pairs it judged."""

    role: str
    threshold: float | None
    source: str
    computed: bool
    labelled_pairs: int
    training_pairs: int
    judged: float  # share of all labelled pairs
    first: float
    ties: float
    second: float
    first_wins: WithError  # share of the decided pairs
    cyclic: WithError  # share of the decided triples
    signal: WithError  # 12 Var of a response's true win rate: 1 for a ranking, 0 for coin flips
    longer_wins: WithError  # share of the decided pairs whose lengths differ
    length_correlation: float  # of the preference with the difference in words


@dataclass(frozen=True, slots=True)
class Relation:
    """How two objectives rank the responses to one prompt.

    method "ranks" (three responses a row or more): `observed` is the mean over rows of Spearman's correlation of win
    rates counted from the labels, which label noise pulls towards 0; `correlation` is freed of that noise
    (statistics.true_correlation). method "signs" (two responses): both are 2a - 1 for the agreement a; a single label
    cannot tell noise from disagreement, so where labels err independently the truth lies further from 0.
    `ci95` is the interval that the verdict rests on, within [-1, 1].
    """

    objectives: tuple[str, str]
    agreement: WithError  # among the pairs that both decided
    method: str
    observed: WithError
    correlation: WithError
    ci95: tuple[float, float]
    verdict: str


@dataclass(frozen=True, slots=True)
class Description:
    provenance: dict[str, object]
    parts: dict[str, Part]
    responses: Spread
    words: dict[str, Spread]
    identical_pairs: float  # share of the labelled pairs whose two responses are the same text
    test_prompts_seen: int  # test prompts that are in the training or held-out rows as well
    objectives: dict[str, Labels]
    relations: list[Relation]


def describe(data: PreferenceData) -> Description:
    """All the numbers. Labels are described over all splits together, sizes for each split."""
    parts = {"train": data.train, "heldout": data.heldout, "test": data.test}
    table = tabulate([example for part in parts.values() for example in part])
    within = within_rows(table)
    seen = {prompt_key(example) for part in (data.train, data.heldout) for example in part}
    places = range(len(data.names))
    return Description(
        provenance=data.provenance,
        parts={name: _part(examples) for name, examples in parts.items()},
        responses=_spread(table.sizes),
        words={"prompt": _spread(table.prompt_words), "response": _spread(table.response_words)},
        identical_pairs=float(table.identical.mean()),
        test_prompts_seen=len(seen & {prompt_key(example) for example in data.test}),
        objectives={o.name: _labels(o, k, table, within, len(data.train)) for k, o in enumerate(data.objectives)},
        relations=[relate(data.names, table, within, j, k) for j, k in itertools.combinations(places, 2)],
    )


def _part(examples: Sequence[Example]) -> Part:
    prompts = {prompt_key(example) for example in examples}
    return Part(len(examples), len(prompts), sum(len(example.pairs) for example in examples))


def _spread(values: np.ndarray) -> Spread:
    return Spread(*(float(value) for value in np.quantile(values, [0.0, 0.5, 0.95, 1.0])))


def _labels(objective: Objective, k: int, table: PairArrays, within: WithinRows, training_rows: int) -> Labels:
    judged = ~np.isnan(table.labels[:, k])
    decided = judged & (table.labels[:, k] != 0.5)
    labels = table.labels[judged, k]
    longer, correlation = longer_preferred(table, k)
    return Labels(
        role=objective.role,
        threshold=objective.threshold,
        source=objective.source,
        computed=objective.scorer is not None,
        labelled_pairs=int(judged.sum()),
        training_pairs=int((judged & (table.row < training_rows)).sum()),
        judged=float(judged.mean()),
        first=float((labels > 0.5).mean()),
        ties=float((labels == 0.5).mean()),
        second=float((labels < 0.5).mean()),
        first_wins=mean((table.labels[decided, k] > 0.5).astype(float), table.cluster[decided]),
        cyclic=ratio(within.cyclic[:, k], within.triples[:, k], table.prompt),
        signal=mean(3.0 * within.cross[:, k, k], table.prompt),
        longer_wins=longer,
        length_correlation=correlation,
    )


def relate(names: Sequence[str], table: PairArrays, within: WithinRows, j: int, k: int) -> Relation:
    """How objectives j and k relate; see Relation for the statistic."""
    share, (low, high) = sign_agreement(table, j, k)
    if np.median(table.sizes) >= 3:
        method = "ranks"
        observed = mean(within.ranks[:, j, k], table.prompt)
        correlation = true_correlation(within.cross, table.prompt, j, k)
        low, high = correlation.low, correlation.high
    else:
        method = "signs"
        observed = correlation = WithError(2 * share.value - 1, 2 * share.se, share.n)
        low, high = 2 * low - 1, 2 * high - 1
    known = not (math.isnan(low) or math.isnan(high))
    interval = (max(low, -1.0), min(high, 1.0)) if known else (math.nan, math.nan)
    judged = ~np.isnan(table.labels[:, [j, k]]).any(axis=1)
    verdict = _verdict(interval, len(np.unique(table.cluster[judged])))
    return Relation((names[j], names[k]), share, method, observed, correlation, interval, verdict)


def _verdict(interval: tuple[float, float], prompts: int) -> str:
    """A word for the interval; it claims no more than the whole interval supports."""
    low, high = interval
    if prompts < FEW_PROMPTS:
        return TOO_FEW if prompts else NOT_COMPARED
    if math.isnan(low):
        return UNCLEAR
    if low >= SAME_ORDER:
        return SAME
    if low > 0 or high < 0:
        return TOGETHER if low > 0 else CONFLICT
    return UNRELATED if max(-low, high) < SMALL else UNCLEAR


# What the numbers mean
def warnings_of(found: Description) -> list[str]:
    """What will go wrong, or is probably not meant."""
    texts = []
    if found.test_prompts_seen:
        texts.append(
            f"{found.test_prompts_seen} of {found.parts['test'].prompts} test prompts are in the training or held-out "
            "rows as well, so the win rates on the test set will flatter; take them out of one"
        )
    for name, labels in found.objectives.items():
        texts += _label_warnings(name, labels)
    for relation in found.relations:
        if relation.verdict == SAME and found.objectives[relation.objectives[0]].role == "primary":
            texts.append(_never_binds(relation))
    return texts


def _label_warnings(name: str, labels: Labels) -> list[str]:
    texts = []
    if labels.training_pairs < FEW_PAIRS:
        texts.append(
            f"{name}: only {labels.training_pairs} labelled pairs to train on; its preference model and its win rates "
            f"will be guesses below some {FEW_PAIRS}"
        )
    if labels.ties == 1:
        texts.append(f"{name}: every label is a tie, so there is nothing to learn from; leave the objective out")
    elif labels.second == 1 or (labels.first == 1 and labels.cyclic.n > 0):
        which = "first" if labels.first == 1 else "second"
        texts.append(f"{name}: every label prefers the {which} response of its pair; check how the labels are made")
    elif labels.signal.n >= FEW_PROMPTS and labels.signal.low <= 0 and not _circular(labels):
        texts.append(
            f"{name}: no response wins more often than others beyond chance, so no policy can do better or worse than "
            "today; its labels are coin flips, or go in circles"
        )
    return texts


def _never_binds(relation: Relation) -> str:
    """Only said where the whole 95 % interval lies at or above SAME_ORDER."""
    primary, secondary = relation.objectives
    how = (
        "rank the responses to a prompt alike"
        if relation.method == "ranks"
        else f"prefer the same response in {100 * relation.agreement.value:.0f} % of the pairs"
    )
    return (
        f"{primary} and {secondary} {how} (correlation {relation.correlation.value:.2f}, at least "
        f"{relation.ci95[0]:.2f}). What improves {primary} improves {secondary}: the constraint is not expected to "
        f"bind, its multiplier stays 0, and the method reduces to maximising {primary} alone"
    )


def notes_of(found: Description) -> list[str]:
    """What is worth knowing, and may well be meant."""
    texts = []
    for name, labels in found.objectives.items():
        texts += _label_notes(name, labels)
    if not any(labels.first == 1 for labels in found.objectives.values()):  # else chosen comes first, by convention
        texts += [text for name, labels in found.objectives.items() for text in _position_notes(name, labels)]
    primary = next(name for name, labels in found.objectives.items() if labels.role == "primary")
    of_primary = {r.objectives[1]: r.verdict for r in found.relations if r.objectives[0] == primary}
    conflicts = " and ".join(name for name, verdict in of_primary.items() if verdict == CONFLICT)
    if conflicts:
        texts.append(f"{primary} conflicts with {conflicts}: maximising {primary} alone would cost them")
    apart = " and ".join(name for name, verdict in of_primary.items() if verdict == NOT_COMPARED)
    if apart:
        texts.append(
            f"{primary} and {apart} were never judged on the same pair: whether they conflict shows only once a "
            "preference model is trained"
        )
    alike = [r.objectives for r in found.relations if r.verdict == SAME and primary not in r.objectives]
    texts += [f"{first} and {second} rank responses alike: one constraint would do for both" for first, second in alike]
    return texts


def _label_notes(name: str, labels: Labels) -> list[str]:
    texts = []
    if labels.first == 1 and labels.cyclic.n == 0:
        texts.append(f"every label of {name} prefers the first response, as it should where rows are chosen / rejected")
    if _circular(labels):
        texts.append(
            f"{name} goes in circles: {100 * labels.cyclic.value:.0f} % of triples, where coin flips give 25 % and no "
            "score gives more. Its cycles can be learnt with preference_model.form=general only"
        )
    return texts


def _position_notes(name: str, labels: Labels) -> list[str]:
    wins = labels.first_wins
    if 0 < wins.value < 1 and (wins.low > 0.55 or wins.high < 0.45):
        return [
            f"{name} prefers the first of two responses in {100 * wins.value:.0f} % of the decided pairs: their order "
            "is not random, or the judge minds it"
        ]
    return []


def _circular(labels: Labels) -> bool:
    """Whether more triples are cyclic than any score can explain.

    With P(a over b) = sigmoid(u_a - u_b) and independent labels, a triple is cyclic with probability
    2 / ((1 + x)(1 + y)(1 + z)) for odds x, y, z around the triangle, xyz = 1; that is at most 2 / 8.
    """
    return labels.cyclic.n >= FEW_PROMPTS and labels.cyclic.low > COIN_FLIPS
