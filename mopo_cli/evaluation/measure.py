"""Evaluation: responses to test prompts, judged against the data's and the reference's, with intervals over prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mopo_cli.base.types import Example, Objective, PreferenceData
from mopo_cli.data.prepare import as_text, unit_numbers
from mopo_cli.evaluation.records import UNKNOWN, Evaluation, Interval, Measured, ScoredSample, Wording
from mopo_cli.evaluation.responses import Responded, Settings, data_responses
from mopo_cli.judging.judges import Judge, JudgedResponses, PreferenceFeatures, ScoreJudge, own_judge, win_rates
from mopo_cli.judging.scorers import Scale, fit_scale
from mopo_cli.maths.significance import distinct, mean_ci, verdict, win_rate_ci


@dataclass(frozen=True, slots=True)
class Criterion:
    """An objective, or a scorer beside them, with its judge."""

    name: str
    judge: Judge
    objective: Objective | None = None


@dataclass(frozen=True, slots=True)
class Judged:
    """What a column's judge says of one entrant: arrays of each prompt's M responses."""

    column: Criterion
    win_rates: list[np.ndarray]  # (M,) against the data's responses; NaN where the data have none
    reference_win_rates: list[np.ndarray]  # (M,) against the reference's; no array at all without a reference
    scores: list[np.ndarray] | None  # (M,); None of a judge that only compares
    scale: Scale | None


def columns_of(
    data: PreferenceData,
    features: PreferenceFeatures | None,
    gold: Mapping[str, ScoreJudge] | None = None,
    beside: Mapping[str, ScoreJudge] | None = None,
) -> list[Criterion]:
    """The objectives, each with its gold scorer where there is one for it, then the scorers that judge none."""
    gold = gold or {}
    judges = [gold[o.name] if o.name in gold else own_judge(o, data.world, features) for o in data.objectives]
    columns = [Criterion(o.name, judge, o) for o, judge in zip(data.objectives, judges, strict=True)]
    return columns + [Criterion(name, judge) for name, judge in (beside or {}).items()]


def evaluate(
    settings: Settings,
    examples: Sequence[Example],
    columns: Sequence[Criterion],
    responded: Sequence[Responded],
    features: PreferenceFeatures | None,
    scales: Mapping[str, Scale] | None = None,
    advance: Callable[[int], None] = lambda columns: None,
) -> tuple[list[Evaluation], dict[str, Scale]]:
    """Every number of every entrant, by the same judges on the same prompts, and the scales of the scores.

    scales: of an earlier evaluation, which stay. advance: told how many columns are judged.
    """
    data = data_responses(examples, features.encoder if features else None)
    judged: list[list[Judged]] = [[] for _ in responded]
    scales_used: dict[str, Scale] = {}
    for number, column in enumerate(columns, start=1):
        theirs = column.judge.measure(examples, data)
        ours = [column.judge.measure(examples, r.responses) for r in responded]
        references = [column.judge.measure(examples, r.reference) if r.reference else None for r in responded]
        scale = (scales or {}).get(column.name) or fitted_scale(column.judge, responded, references, theirs, ours)
        if scale:
            scales_used[column.name] = scale
        for table, measures, reference in zip(judged, ours, references, strict=True):
            table.append(_judged(column, measures, theirs, reference, scale))
        advance(number)
    evaluations = [evaluation_of(settings, examples, r, table) for r, table in zip(responded, judged, strict=True)]
    return evaluations, scales_used


def _judged(
    column: Criterion, ours: list[Any], data: list[Any], reference: list[Any] | None, scale: Scale | None
) -> Judged:
    judge = column.judge
    scores = [judge.scores(measure) for measure in ours]
    return Judged(
        column,
        win_rates=win_rates(judge, ours, data),
        reference_win_rates=win_rates(judge, ours, reference) if reference else [],
        scores=None if scores[0] is None else scores,  # type: ignore[arg-type]  # a judge scores all or none
        scale=scale,
    )


def evaluation_of(
    settings: Settings, examples: Sequence[Example], responded: Responded, judged: Sequence[Judged]
) -> Evaluation:
    units = unit_numbers(examples)
    measured = [(j.column, measured_by(responded, j, units)) for j in judged]
    subject, texts = responded.subject, responded.responses.texts
    return Evaluation(
        name=subject.name,
        path=subject.path,
        kind=subject.kind,
        objectives={column.name: m for column, m in measured if column.objective},
        scorers={column.name: m for column, m in measured if not column.objective},
        kl=responded.kl,
        cut_off=responded.cut_off,
        wording=wording(responded.responses),
        reference_wording=wording(responded.reference) if responded.reference else None,
        oracle=responded.oracle,
        prompts=len(texts),
        independent_prompts=len(np.unique(units)),
        support_mass=responded.exact.support_mass if responded.exact else None,
        responses=sum(map(len, texts)),
        seed=settings.seed,
        seconds=responded.seconds,
        samples=scored_samples(examples, responded, judged),
        by_prompt={j.column.name: _values(j) for j in judged},
    )


def measured_by(responded: Responded, judged: Judged, units: np.ndarray) -> Measured:
    """One column of one entrant. units (N,): numbers, the same of prompts that are not independent of each other."""
    column, subject = judged.column, responded.subject
    rates, scores = _means(judged.win_rates), _means(judged.scores or [])
    rate, interval = _with_interval(rates, units, win_rate_ci)
    reference_rate, reference_interval = _with_interval(_means(judged.reference_win_rates), units, win_rate_ci)
    score, score_interval = _with_interval(scores, units, mean_ci)
    scaled = judged.scale(scores) if judged.scale else np.empty(0)
    normalised, normalised_interval = _with_interval(scaled, units, mean_ci)
    threshold = subject.thresholds.get(column.name)
    bound = None if math.isnan(rate) else threshold
    measured = Measured(
        role=column.objective.role if column.objective else "scorer",
        threshold=threshold,
        win_rate=rate,
        win_rate_ci95=interval,
        estimated_win_rate=subject.estimated.get(column.name),
        satisfied=None if bound is None else rate >= bound,
        judge=column.judge.title,
        satisfied_with_confidence=verdict(interval, bound),
        reference_win_rate=reference_rate,
        reference_win_rate_ci95=reference_interval,
        score=score,
        score_ci95=score_interval,
        normalised_score=normalised,
        normalised_score_ci95=normalised_interval,
    )
    exact = responded.exact if column.judge.title == "exact" else None
    return measured if exact is None else measured.settled(exact.win_rate[column.name], exact.bounds_of(column.name))


def _with_interval(
    values: np.ndarray, units: np.ndarray, interval: Callable[[np.ndarray, np.ndarray], Interval]
) -> tuple[float, Interval]:
    """The mean of the (N,) values that are known, and its interval; of no values at all, neither."""
    known = ~np.isnan(values)
    if not known.any():
        return math.nan, UNKNOWN
    return float(values[known].mean()), interval(values[known], units[known])


def _means(values: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([float(v.mean()) for v in values])


def _values(judged: Judged) -> np.ndarray:
    """(N,) values by prompt that runs are compared by: win rates, or scores where some prompt has no data."""
    rates = _means(judged.win_rates)
    return _means(judged.scores or []) if np.isnan(rates).any() else rates


def scored_samples(examples: Sequence[Example], responded: Responded, judged: Sequence[Judged]) -> list[ScoredSample]:
    samples = []
    for i, (example, texts) in enumerate(zip(examples, responded.responses.texts, strict=True)):
        for m, text in enumerate(texts):
            rates = {j.column.name: round(float(j.win_rates[i][m]), 4) for j in judged}
            scores = {j.column.name: float(j.scores[i][m]) for j in judged if j.scores}
            samples.append(
                ScoredSample(
                    responded.subject.name,
                    as_text(example.prompt),
                    text,
                    win_rate={name: rate for name, rate in rates.items() if not math.isnan(rate)},
                    score=scores,
                    normalised_score={
                        j.column.name: float(j.scale(j.scores[i][m])) for j in judged if j.scores and j.scale
                    },
                    group=example.group,
                )
            )
    return samples


def fitted_scale(
    judge: Judge,
    responded: Sequence[Responded],
    references: Sequence[list[Any] | None],
    data: list[Any],
    ours: Sequence[list[Any]],
) -> Scale | None:
    """Fitted on the first reference's responses, else on the data's, else on the first entrant's."""
    names = [r.subject.name for r in responded]
    sources = [(reference, f"the reference of {n}") for n, reference in zip(names, references, strict=True)]
    sources += [(data, "the data's responses"), (ours[0], f"the responses of {names[0]}")]
    for measures, title in sources:
        scores = [judge.scores(measure) for measure in measures or ()]
        if scores and all(s is not None and len(s) for s in scores):
            return fit_scale(np.concatenate(scores), title)  # type: ignore[arg-type]
    return None


def wording(responses: JudgedResponses) -> Wording:
    texts = [text for of_prompt in responses.texts for text in of_prompt]
    return Wording(float(np.mean([len(text.split()) for text in texts])), distinct(texts, 1), distinct(texts, 2))
