"""`mopo eval`: runs, plain models and files of responses, on the same prompts and by the same judges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mopo_cli.base.console import stage
from mopo_cli.base.errors import UserError
from mopo_cli.base.files import read_json
from mopo_cli.base.types import Example, Objective
from mopo_cli.config.schema import EvalConfig
from mopo_cli.data.prepare import as_text
from mopo_cli.evaluation.measure import data_answers, win_rates
from mopo_cli.evaluation.records import Evaluated, Measured, Wording, settled
from mopo_cli.evaluation.responses import Given, Responded, preference_objectives, thresholds_of
from mopo_cli.judging.judges import Answers, Judge, PreferenceFeatures, ScoreJudge, own_judge
from mopo_cli.judging.scorers import Scale, Scores, fit_scale
from mopo_cli.maths.significance import Comparison, bootstrap_ci, distinct, dominance, verdict


@dataclass
class Column:
    """An objective or a scorer beside them, with its judge."""

    name: str
    judge: Judge
    objective: Objective | None = None


# --------------------------------------------------------------------------------------------- judgement
def judge_all(
    settings: EvalConfig,
    given: Given,
    responded: Sequence[Responded],
    features: PreferenceFeatures | None,
    scorers: dict[str, Scores],
) -> tuple[list[Evaluated], dict[str, Scale], list[Comparison], list[dict[str, Any]]]:
    """Every number of every entrant, the scales of the scores, who dominates whom, and a line for each response."""
    columns = columns_of(settings, given, features, scorers)
    fixed = earlier_scales(settings.normalisation)
    measured: list[dict[str, Measured]] = [{} for _ in responded]
    scales: dict[str, Scale] = {}
    by_prompt: list[dict[str, np.ndarray]] = [{} for _ in responded]
    lines: list[list[dict[str, Any]]] = [response_lines(given.examples, one) for one in responded]
    own = data_answers(given.examples, features.encoder if features else None)
    with stage("judging", len(columns)) as progress:
        for number, column in enumerate(columns, start=1):
            data = column.judge.measure(given.examples, own)
            ours = [column.judge.measure(given.examples, one.answers) for one in responded]
            theirs = [one.reference and column.judge.measure(given.examples, one.reference) for one in responded]
            scale = fixed.get(column.name) or fitted_scale(column, responded, theirs, data, ours)
            if scale:
                scales[column.name] = scale
            for i, one in enumerate(responded):
                found = judge_one(settings, given, column, one, ours[i], theirs[i], data, scale)
                measured[i][column.name], by_prompt[i][column.name] = found
                add_scores(lines[i], column, ours[i], data, scale)
            progress.advance(number)
    names = [o.name for o in given.data.objectives]
    evaluated = [
        record(settings, one, {n: found[n] for n in names}, {n: v for n, v in found.items() if n not in names})
        for one, found in zip(responded, measured, strict=True)
    ]
    compared = {
        one.entrant.name: np.stack([rates[name] for name in names or by_prompt[0]], axis=1)
        for one, rates in zip(responded, by_prompt, strict=True)
    }
    comparisons = dominance(compared, names or list(by_prompt[0]), settings.permutations, settings.seed)
    return evaluated, scales, comparisons, [line for of in lines for line in of]


def columns_of(
    settings: EvalConfig, given: Given, features: PreferenceFeatures | None, scorers: dict[str, Scores]
) -> list[Column]:
    """The objectives, each with its gold scorer where one is named for it, then the scorers that judge none."""
    gold = {config.objective: name for name, config in settings.scorers.items() if config.objective is not None}
    judging = preference_objectives(given.home) if features and given.home else []
    columns = []
    for objective in given.data.objectives:
        if objective.name in gold:
            judge: Judge = score_judge(settings, gold[objective.name], scorers)
        else:
            place = judging.index(objective.name) if objective.name in judging else 0
            judge = own_judge(objective, given.data.world, features, place)
        columns.append(Column(objective.name, judge, objective))
    beside = [name for name, config in settings.scorers.items() if config.objective is None]
    return columns + [Column(name, score_judge(settings, name, scorers)) for name in beside]


def score_judge(settings: EvalConfig, name: str, scorers: dict[str, Scores]) -> ScoreJudge:
    return ScoreJudge(scorers[name], f"scorer {name}", settings.scorers[name].margin)


def judge_one(
    settings: EvalConfig,
    given: Given,
    column: Column,
    one: Responded,
    ours: list[Any],
    theirs: list[Any] | None,
    data: list[Any],
    scale: Scale | None,
) -> tuple[Measured, np.ndarray]:
    """One column of one entrant, and its (N,) values by prompt that runs are compared by: win rates, else scores."""
    answered = [i for i, e in enumerate(given.examples) if e.responses]
    draws, seed = settings.evaluation.bootstrap, settings.seed
    rates = _means(win_rates(column.judge, [ours[i] for i in answered], [data[i] for i in answered]))
    rate, interval = _mean(rates, draws, seed)
    beside = _mean(_means(win_rates(column.judge, ours, theirs)) if theirs else np.array([]), draws, seed)
    raw = [column.judge.scores(one) for one in ours]
    scores = _means(raw) if raw[0] is not None else np.array([])  # type: ignore[arg-type]
    score = _mean(scores, draws, seed)
    shown = _mean(scale(scores), draws, seed) if scale and len(scores) else (math.nan, (math.nan, math.nan))
    threshold = thresholds_of(given, one.entrant).get(column.name)
    asked = threshold is not None and not math.isnan(rate)
    known = one.entrant.summary.get("objectives", {}).get(column.name, {})
    measured = Measured(
        column.objective.role if column.objective else "scorer",
        threshold,
        rate,
        interval,
        known.get("estimated_win_rate"),
        bool(rate >= threshold) if asked and threshold is not None else None,
        column.judge.title,
        verdict(interval, threshold) if asked else None,
        *beside,
        *score,
        *shown,
    )
    if column.judge.title == "exact" and column.name in one.exact:
        measured = settled(replace(measured, exact_win_rate=one.exact[column.name]), one.exact[column.name])
    return measured, rates if len(rates) == len(given.examples) else scores


def _means(values: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([float(v.mean()) for v in values])


def _mean(values: np.ndarray, draws: int, seed: int) -> tuple[float, tuple[float, float]]:
    if not len(values):
        return math.nan, (math.nan, math.nan)
    return float(values.mean()), bootstrap_ci(values, draws, seed)


def fitted_scale(
    column: Column,
    responded: Sequence[Responded],
    theirs: Sequence[list[Any] | None],
    data: list[Any],
    ours: Sequence[list[Any]],
) -> Scale | None:
    """Fitted on the first reference's responses, else on the data's, else on the first entrant's."""
    sources = [(found, f"the reference of {one.entrant.name}") for one, found in zip(responded, theirs, strict=True)]
    sources += [(data, "the data's responses"), (ours[0], f"the responses of {responded[0].entrant.name}")]
    for found, title in sources:
        scores = [column.judge.scores(one) for one in found or ()]
        if scores and all(s is not None and len(s) for s in scores):
            return fit_scale(np.concatenate(scores), title)  # type: ignore[arg-type]
    return None


def earlier_scales(path: str | None) -> dict[str, Scale]:
    """The normalisation of an earlier evaluation.json; UserError where it is none."""
    if path is None:
        return {}
    try:
        return {name: Scale(**values) for name, values in read_json(Path(path).expanduser())["normalisation"].items()}
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"normalisation={path}: not an evaluation.json of mopo eval") from None


def response_lines(examples: Sequence[Example], one: Responded) -> list[dict[str, Any]]:
    return [
        {"run": one.entrant.name, "prompt": as_text(e.prompt), "response": text, "place": (i, m),
         "win_rate": {}, "score": {}, "normalised_score": {}}
        for i, e in enumerate(examples)
        for m, text in enumerate(one.answers.texts[i])
    ]  # fmt: skip


def add_scores(
    lines: Sequence[dict[str, Any]], column: Column, ours: list[Any], data: list[Any], scale: Scale | None
) -> None:
    """Write one column's numbers into the lines of an entrant's responses."""
    scores = [column.judge.scores(one) for one in ours]
    wins = [column.judge.wins(one, other) for one, other in zip(ours, data, strict=True)]
    for line in lines:
        i, m = line["place"]
        if wins[i].shape[1]:
            line["win_rate"][column.name] = round(float(wins[i][m].mean()), 4)
        found = scores[i]
        if found is not None:
            line["score"][column.name] = float(found[m])
            if scale:
                line["normalised_score"][column.name] = float(scale(found[m]))


def record(
    settings: EvalConfig, one: Responded, objectives: dict[str, Measured], scorers: dict[str, Measured]
) -> Evaluated:
    return Evaluated(
        one.entrant.name,
        one.entrant.path,
        one.entrant.kind,
        objectives,
        scorers,
        one.kl,
        one.cut_off,
        wording(one.answers),
        wording(one.reference) if one.reference else None,
        one.oracle,
        len(one.answers.texts),
        sum(map(len, one.answers.texts)),
        settings.seed,
        one.seconds,
    )


def wording(answers: Answers) -> Wording:
    texts = [text for of in answers.texts for text in of]
    return Wording(float(np.mean([len(text.split()) for text in texts])), distinct(texts, 1), distinct(texts, 2))
