"""`mopo eval`: runs, plain models and files of responses, on the same prompts and by the same judges."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mopo_cli import config as configs
from mopo_cli import evaluation_report
from mopo_cli.config import EvalConfig, ModelConfig, ObjectiveConfig
from mopo_cli.console import stage, warn
from mopo_cli.data.assistant import World
from mopo_cli.data.prepare import as_text, load, resolve_objectives
from mopo_cli.data.tokens import Collator, Encoder
from mopo_cli.entrants import Entrant, check_alike, find_entrants, finished_run
from mopo_cli.errors import UserError
from mopo_cli.evaluation import (
    POLICY_SEED,
    REFERENCE_SEED,
    Exact,
    Models,
    ObjectiveResult,
    data_answers,
    evaluated_prompts,
    exact_evaluation,
    exact_win_rates,
    sampled_answers,
    sampled_kl,
    settled,
    win_rates,
)
from mopo_cli.judges import Answers, Judge, PreferenceFeatures, ScoreJudge, own_judge
from mopo_cli.models.load import load_policy, load_tokenizer
from mopo_cli.models.logprobs import all_logps, can_pack
from mopo_cli.models.preference import load_preference_model
from mopo_cli.models.reference import loaded, snapshot
from mopo_cli.models.save import load_weights
from mopo_cli.runs import RunDirectory, read_json
from mopo_cli.scorers import STAND_IN, Classifier, Scale, Scores, check_scorers, fit_scale, load_scorer
from mopo_cli.session import fingerprint, quiet_libraries
from mopo_cli.significance import Comparison, bootstrap_ci, distinct, dominance, verdict
from mopo_cli.types import Corpus, Example, Objective, PreferenceData


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


@dataclass
class Given:
    """What all entrants are evaluated on."""

    data: PreferenceData
    examples: list[Example]
    home: Entrant | None  # the run whose preference model judges, and whose data these may be


@dataclass
class Responded:
    """An entrant's responses, and its reference's."""

    entrant: Entrant
    answers: Answers
    reference: Answers | None = None
    kl: float | None = None
    cut_off: float | None = None
    oracle: Exact | None = None
    exact: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class Column:
    """An objective or a scorer beside them, with its judge."""

    name: str
    judge: Judge
    objective: Objective | None = None


def command(composed: DictConfig) -> int:
    """Evaluate, write the numbers, show them; exit status 0 though some runs may be unfinished."""
    settings: EvalConfig = configs.typed(composed, EvalConfig)
    configs.check_eval(settings)
    check_scorers(settings.scorers, settings.functions)
    quiet_libraries()
    entrants, unfinished = find_entrants(settings)
    check_alike(entrants)
    with stage("data", 1):
        given, texts = prepare(settings, entrants)
        scorers = {name: load_scorer(name, config) for name, config in settings.scorers.items()}
    responded, features = respond_all(settings, given, entrants, texts)
    evaluated, scales, comparisons, scores = judge_all(settings, given, responded, features, scorers)
    report_cuts(scorers)
    alone = entrants[0].run if len(entrants) == 1 and not unfinished and entrants[0].kind == "run" else None
    directory = alone.path if alone else Path(settings.dir).expanduser()
    evaluation_report.write(directory, alone, evaluated, unfinished, scales, comparisons, scores)
    evaluation_report.show_all(evaluated, unfinished, scales, comparisons, directory)
    return 0


# --------------------------------------------------------------------------------------------- what is asked


def prepare(settings: EvalConfig, entrants: Sequence[Entrant]) -> tuple[Given, dict[str, Encoder]]:
    """Objectives, the prompts that are asked, and each run's and model's encoder; UserError where something lacks."""
    home = finished_run(settings.judge, "judge") if settings.judge else next((e for e in entrants if e.trained), None)
    data = load_data(settings, home, entrants)
    check_judges(settings, data, home)
    encoders, fitting = {}, None
    for entrant in entrants:
        if entrant.kind == "responses":
            keys = set(entrant.rows)
        else:
            encoders[entrant.name], keys = encoder_of(settings, entrant, data)
        fitting = keys if fitting is None else fitting & keys
    test = [e for e in asked_examples(data, entrants) if as_text(e.prompt) in (fitting or ())]
    if not test:
        raise UserError(f"{_files(entrants)}: none of its prompts is in the data" if _files(entrants) else
                        "no test prompt fits the context (model.max_length)")  # fmt: skip
    return Given(data, evaluated_prompts(test, settings.evaluation.prompts, settings.seed), home), encoders


def _files(entrants: Sequence[Entrant]) -> str:
    return ", ".join(f"responses={e.path}" for e in entrants if e.kind == "responses")


def load_data(settings: EvalConfig, home: Entrant | None, entrants: Sequence[Entrant]) -> PreferenceData:
    """The data that `dataset` names, else the judging run's; for files of responses alone, their own rows."""
    trained = home.trained if home else None
    objectives = settings.objectives or (trained.objectives if trained else {})
    judged = {scorer.objective for scorer in settings.scorers.values()} - {None}
    for name, scorer in settings.scorers.items():
        if scorer.objective is not None and scorer.objective not in objectives:
            raise UserError(
                f"scorers.{name}.objective={scorer.objective}: no such objective; the set has "
                f"{', '.join(objectives) or 'none'}. Set scorers.{name}.objective to one of them, or to null: it is then "
                "reported beside them"
            )
    if settings.dataset:
        needless = {n: replace(o, computed=STAND_IN, margin=0.0) if n in judged else o for n, o in objectives.items()}
        return load(settings.dataset, needless)
    if trained is not None:
        data = load(trained.dataset, objectives)
        found = home.run.provenance if home else None
        if found is not None and found.exists() and read_json(found).get("fingerprint") != fingerprint(data):
            if not settings.objectives:
                warn(f"{found.parent}: its data have changed since it was trained; test prompts may be others")
        return data
    if any(entrant.kind != "responses" for entrant in entrants):
        model = next(e for e in entrants if e.kind != "responses")
        raise UserError(
            f"run={model.path}: a plain model, with no data of its own. Say on which prompts: dataset=NAME "
            "objectives=NAME, or judge=RUN for the data, objectives and preference model of a run"
        )
    return data_of_files(entrants, objectives)


def data_of_files(entrants: Sequence[Entrant], objectives: dict[str, ObjectiveConfig]) -> PreferenceData:
    """The prompts of files of responses, without any responses of a data set."""
    first, others = entrants[0], entrants[1:]
    shared = [key for key in first.rows if all(key in other.rows for other in others)]
    rows = [first.rows[key] for key in shared]
    examples = [Example(row.prompt, (), (), (), row.context, first.path) for row in rows]
    sources = tuple(node.source or name for name, node in objectives.items())
    return PreferenceData(resolve_objectives(objectives, Corpus(sources, ())), (), (), examples, {"files": first.path})


def asked_examples(data: PreferenceData, entrants: Sequence[Entrant]) -> list[Example]:
    """Test rows; where files of responses answer other rows of the data as well, those too."""
    if not any(entrant.kind == "responses" for entrant in entrants) or not data.train:
        return list(data.test)
    rows = [*data.test, *data.heldout, *data.train]
    answered = next(e.rows for e in entrants if e.kind == "responses")
    tested = {as_text(e.prompt) for e in data.test}
    others = sum(key not in tested for key in answered)
    if others:
        warn(f"{others} of {len(answered)} prompts in {_files(entrants)} are no test prompts of the data")
    return rows


def check_judges(settings: EvalConfig, data: PreferenceData, home: Entrant | None) -> None:
    """UserError where an objective has nobody to judge it."""
    judged = {scorer.objective for scorer in settings.scorers.values()}
    for objective in data.objectives:
        if objective.name in judged or objective.scorer is not None or isinstance(data.world, World):
            continue
        known = preference_objectives(home) if home else []
        if objective.name not in known:
            found = f"the preference model of {home.path} has {', '.join(known)}" if home else "there is no run's"
            raise UserError(
                f"objectives.{objective.name}: nothing judges it: no gold scorer (scorers=[NAME]), no function "
                f"(computed), and {found} preference model (judge=RUN)"
            )
    if not data.objectives and not settings.scorers:
        raise UserError("objectives: none, and no scorers; give scorers=[NAME], judge=RUN, or dataset= and objectives=")


def preference_objectives(home: Entrant) -> list[str]:
    return list(read_json(home.run.preference_model / "preference_model.json").get("objectives", []))


def model_of(settings: EvalConfig, entrant: Entrant) -> ModelConfig:
    """The model config of a run, or `model` with the plain model's path."""
    return entrant.trained.model if entrant.trained else replace(settings.model, path=entrant.path)


def encoder_of(settings: EvalConfig, entrant: Entrant, data: PreferenceData) -> tuple[Encoder, set[str]]:
    """The entrant's encoder, which has seen the data's lengths, and the test prompts that fit it."""
    model = model_of(settings, entrant)
    encoder = Encoder(tokenizer_of(entrant, model), model.max_length, model.chat_template)
    kept = [encoder.rows(part, "drop")[1] for part in (data.train, data.heldout, data.test) if part]
    return encoder, {as_text(example.prompt) for part in kept for example in part}


def tokenizer_of(entrant: Entrant, model: ModelConfig) -> PreTrainedTokenizerBase:
    if entrant.kind == "run":
        return AutoTokenizer.from_pretrained(entrant.run.model)
    return load_tokenizer(model, [])


# --------------------------------------------------------------------------------------------- responses


def respond_all(
    settings: EvalConfig, given: Given, entrants: Sequence[Entrant], encoders: dict[str, Encoder]
) -> tuple[list[Responded], PreferenceFeatures | None]:
    """Every entrant's responses, one model in memory at a time; and the preference model, where one judges."""
    wanted = needs_preference_model(settings, given.data)
    features: PreferenceFeatures | None = None
    responded = []
    with stage("responses", len(entrants)) as progress:
        for number, entrant in enumerate(entrants, start=1):
            started = time.perf_counter()
            if entrant.kind == "responses":
                one = answers_of_file(entrant, given.examples)
            elif entrant.kind == "model":
                one = respond_model(settings, given, entrant, encoders[entrant.name])
            else:
                judges = wanted and given.home is not None and given.home.path == entrant.path
                one, found = respond_run(settings, given, entrant, encoders[entrant.name], judges)
                features = found or features
            one.seconds = time.perf_counter() - started
            responded.append(one)
            gc.collect()
            progress.advance(number)
        if wanted and features is None and given.home is not None:
            features = features_of_run(settings, given.home, given.data)
    return responded, features


def needs_preference_model(settings: EvalConfig, data: PreferenceData) -> bool:
    judged = {scorer.objective for scorer in settings.scorers.values()}
    others = [o for o in data.objectives if o.name not in judged and o.scorer is None]
    return bool(others) and not isinstance(data.world, World)


def on_device(policy: nn.Module, model: ModelConfig) -> nn.Module:
    return policy.to("cuda") if torch.cuda.is_available() and not model.lora.quantise else policy


def respond_run(
    settings: EvalConfig, given: Given, entrant: Entrant, encoder: Encoder, judges: bool
) -> tuple[Responded, PreferenceFeatures | None]:
    """Samples of a run's policy and of its reference, the KL between them, and exact numbers where there are any."""
    assert entrant.trained is not None
    run, model = entrant.run, entrant.trained.model
    policy = on_device(load_policy(model, encoder.tokenizer, entrant.trained.seed), model)
    collate = Collator(int(encoder.tokenizer.pad_token_id), can_pack(policy, model.max_length))  # type: ignore[arg-type]
    try:
        features = PreferenceFeatures(load_judge(run, policy), encoder, collate) if judges else None
        if run.reference.is_dir():
            load_weights(policy, run.reference)
        initial = snapshot(policy)
        load_weights(policy, run.model)
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise UserError(f"run={run.path}: its weights do not fit its config ({_first_line(error)})") from error
    models = Models(policy, initial, encoder, collate, None)  # type: ignore[arg-type]  # no judge is asked here
    answers = sampled(settings, policy, encoder, given.examples, POLICY_SEED)
    with loaded(policy, initial):
        reference = sampled(settings, policy, encoder, given.examples, REFERENCE_SEED)
    exact = exact_evaluation(
        models, given.data, thresholds_of(given, entrant), entrant.trained.tau, settings.evaluation.exact_prompts
    )
    one = Responded(entrant, answers, reference, sampled_kl(models, answers), cut_off(answers), exact)
    one.exact = exact.win_rate if exact else {}
    return one, features


def sampled(
    settings: EvalConfig, policy: nn.Module, encoder: Encoder, examples: Sequence[Example], seed: int
) -> Answers:
    return sampled_answers(
        policy, encoder, examples, settings.evaluation.responses, settings.sampling, settings.seed + seed
    )


def respond_model(settings: EvalConfig, given: Given, entrant: Entrant, encoder: Encoder) -> Responded:
    """Samples of a plain model, and of the model that it is compared with, where one is named."""
    model = model_of(settings, entrant)
    policy = on_device(load_policy(model, encoder.tokenizer, settings.seed), model)
    collate = Collator(int(encoder.tokenizer.pad_token_id), can_pack(policy, model.max_length))  # type: ignore[arg-type]
    answers = sampled(settings, policy, encoder, given.examples, POLICY_SEED)
    one = Responded(entrant, answers, cut_off=cut_off(answers))
    one.exact = exact_win_rates(policy, encoder, collate, given.data, settings.evaluation.exact_prompts)
    if settings.reference is None:
        return one
    assert answers.tokens is not None
    now = all_logps(policy, answers.tokens, collate)
    del policy
    other = replace(settings.model, path=settings.reference)
    tokenizer = load_tokenizer(other, [])
    reference = on_device(load_policy(other, tokenizer, settings.seed), other)
    theirs = Encoder(tokenizer, other.max_length, other.chat_template)
    theirs.longest_response = encoder.longest_response
    one.reference = sampled(settings, reference, theirs, given.examples, REFERENCE_SEED)
    if tokenizer.get_vocab() == encoder.tokenizer.get_vocab():  # the same tokens, so their probabilities compare
        before = all_logps(reference, answers.tokens, collate)
        one.kl = float(np.mean([float((a - b).mean()) for a, b in zip(now, before, strict=True)]))
    return one


def answers_of_file(entrant: Entrant, examples: Sequence[Example]) -> Responded:
    rows = [entrant.rows[as_text(example.prompt)] for example in examples]
    compared = all(row.reference for row in rows)
    return Responded(
        entrant,
        Answers([list(row.responses) for row in rows]),
        Answers([list(row.reference) for row in rows]) if compared else None,
    )


def load_judge(run: RunDirectory, policy: nn.Module) -> Any:
    if not (run.preference_model / "preference_model.json").is_file():
        raise UserError(f"{run.preference_model}: no preference model there, which would judge")
    return load_preference_model(run.preference_model, policy)[0]


def features_of_run(settings: EvalConfig, home: Entrant, data: PreferenceData) -> PreferenceFeatures:
    """The preference model of a run that is not evaluated itself."""
    assert home.trained is not None
    encoder, _ = encoder_of(settings, home, data)
    policy = on_device(load_policy(home.trained.model, encoder.tokenizer, home.trained.seed), home.trained.model)
    collate = Collator(int(encoder.tokenizer.pad_token_id), can_pack(policy, home.trained.model.max_length))  # type: ignore[arg-type]
    try:
        return PreferenceFeatures(load_judge(home.run, policy), encoder, collate)
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise UserError(f"judge={home.path}: its preference model cannot be read ({_first_line(error)})") from error


def cut_off(answers: Answers) -> float:
    """The share of samples that do not end with the end-of-sequence token."""
    assert answers.tokens is not None and answers.encoder is not None
    end = answers.encoder.tokenizer.eos_token_id
    ended = [ids[-1] == end for row in answers.tokens for ids in row.responses]
    return 1.0 - sum(ended) / len(ended)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:200] if lines else type(error).__name__


def thresholds_of(given: Given, entrant: Entrant) -> dict[str, float]:
    """What is asked of the entrant: a run's own thresholds, else those of the judging run, else the objective set's."""
    summary = entrant.summary or (given.home.summary if given.home else {})
    asked = {o.name: o.threshold for o in given.data.objectives}
    for name, result in summary.get("objectives", {}).items():
        if name in asked and result.get("threshold") is not None:
            asked[name] = result["threshold"]
    return {name: value for name, value in asked.items() if value is not None}


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


def report_cuts(scorers: dict[str, Scores]) -> None:
    for name, scorer in scorers.items():
        if isinstance(scorer, Classifier) and scorer.cut:
            warn(f"scorers.{name}: {scorer.cut} texts were longer than its {scorer.longest()} tokens and were cut")
