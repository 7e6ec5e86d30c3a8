"""`mopo eval`: runs, plain models and files of responses, on the same prompts and by the same judges."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mopo_cli.base.console import stage, warn
from mopo_cli.base.errors import UserError
from mopo_cli.base.files import read_json, read_record
from mopo_cli.base.types import Corpus, Example, PreferenceData
from mopo_cli.config.schema import EvalConfig, ObjectiveConfig
from mopo_cli.data.assistant import World
from mopo_cli.data.encoder import Encoder
from mopo_cli.data.prepare import as_text, load, resolve_objectives, unit_numbers
from mopo_cli.evaluation.entrants import Entrant, Unfinished, finished_run
from mopo_cli.evaluation.exact import exact_win_rates
from mopo_cli.evaluation.loading import (
    fitted_encoder,
    judged_objectives,
    load_features,
    load_policy,
    load_run,
    model_of,
    plain_encoder,
)
from mopo_cli.evaluation.measure import columns_of, evaluate
from mopo_cli.evaluation.records import Evaluation
from mopo_cli.evaluation.responses import (
    POLICY_SEED,
    REFERENCE_SEED,
    Responded,
    Subject,
    asked_rows,
    cut_off,
    evaluated_prompts,
    mean_log_ratio,
    responses_of,
    sampled_responses,
)
from mopo_cli.judging.judges import JudgedResponses, PreferenceFeatures, ScoreJudge
from mopo_cli.judging.scorers import STAND_IN, Scale, Scores
from mopo_cli.maths.significance import Comparison, dominance
from mopo_cli.runs.session import fingerprint


@dataclass(frozen=True, slots=True)
class Benchmark:
    """What all entrants are evaluated on."""

    data: PreferenceData
    examples: list[Example]
    home: Entrant | None  # the run whose preference model judges, and whose data these may be
    encoders: dict[str, Encoder]  # of each run and model


@dataclass(frozen=True, slots=True)
class Compared:
    """All that `mopo eval` writes and shows."""

    evaluations: list[Evaluation]
    unfinished: list[Unfinished]
    scales: dict[str, Scale]
    comparisons: list[Comparison]


# --------------------------------------------------------------------------------------------- what is asked
def prepare(settings: EvalConfig, entrants: Sequence[Entrant]) -> Benchmark:
    """Objectives, the prompts that are asked, and each run's and model's encoder; UserError where something lacks."""
    home = next((e for e in entrants if e.trained), None)
    if settings.judge:
        home = finished_run(settings.judge, "judge", settings.allow_code)
    data = load_data(settings, home, entrants)
    check_judges(settings, data, home)
    encoders, fitting = {}, []
    for entrant in entrants:
        if entrant.kind == "responses":
            fitting.append(set(entrant.rows))
        else:
            encoders[entrant.name], prompts = fitted_encoder(entrant, settings.model, data)
            fitting.append(prompts)
    shared = set.intersection(*fitting)
    test = [e for e in asked_examples(data, entrants) if as_text(e.prompt) in shared]
    if not test:
        files = _files(entrants)
        raise UserError(f"{files}: none of its prompts is in the data" if files else
                        "no test prompt fits the context (model.max_length)")  # fmt: skip
    examples = evaluated_prompts(test, settings.evaluation.prompts, settings.seed)
    return Benchmark(data, examples, home, encoders)


def _files(entrants: Sequence[Entrant]) -> str:
    return ", ".join(f"responses={e.path}" for e in entrants if e.kind == "responses")


def load_data(settings: EvalConfig, home: Entrant | None, entrants: Sequence[Entrant]) -> PreferenceData:
    """The data that `dataset` names, else the judging run's; for files of responses alone, their own rows."""
    trained = home.trained if home else None
    objectives = settings.objectives or (trained.objectives if trained else {})
    for name, scorer in settings.scorers.items():
        if scorer.objective is not None and scorer.objective not in objectives:
            raise UserError(
                f"scorers.{name}.objective={scorer.objective}: no such objective; the set has "
                f"{', '.join(objectives) or 'none'}. Set scorers.{name}.objective to one of them, or to null, which "
                "reports it beside them"
            )
    if settings.dataset:
        judged = gold_judged(settings)
        needless = {n: replace(o, computed=STAND_IN, margin=0.0) if n in judged else o for n, o in objectives.items()}
        return load(settings.dataset, needless)
    if trained is not None:
        data = load(trained.dataset, objectives)
        if not settings.objectives:
            warn_of_other_data(entrants, fingerprint(data))
        return data
    model = next((e for e in entrants if e.kind != "responses"), None)
    if model is not None:
        raise UserError(
            f"run={model.path}: a plain model, with no data of its own. Say on which prompts: dataset=NAME "
            "objectives=NAME, or judge=RUN for the data, objectives and preference model of a run"
        )
    return data_of_files(entrants, objectives)


def gold_judged(settings: EvalConfig) -> set[str]:
    """The objectives that a gold scorer judges."""
    return {scorer.objective for scorer in settings.scorers.values() if scorer.objective is not None}


def warn_of_other_data(entrants: Sequence[Entrant], asked_data: str) -> None:
    """A warning where a run was trained on other data than those that are asked: it may have seen the prompts."""
    for entrant in entrants:
        path = entrant.run.provenance
        if entrant.kind == "run" and path.exists() and read_record(path).get("fingerprint") != asked_data:
            warn(f"{entrant.path}: was trained on other data than those that are asked; it may know the prompts")


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
    answered = next((e.rows for e in entrants if e.kind == "responses"), None)
    if answered is None or not data.train:
        return list(data.test)
    tested = {as_text(e.prompt) for e in data.test}
    others = sum(key not in tested for key in answered)
    if others:
        warn(f"{others} of {len(answered)} prompts in {_files(entrants)} are no test prompts of the data")
    return [*data.test, *data.heldout, *data.train]


def check_judges(settings: EvalConfig, data: PreferenceData, home: Entrant | None) -> None:
    """UserError where an objective has nobody to judge it."""
    if needs_preference_model(settings, data):
        by_model = judged_objectives(home.run) if home else []
        who = f"the preference model of {home.path} has {', '.join(by_model)}" if home else "there is no run's"
        for objective in data.objectives:
            if objective.name in gold_judged(settings) or objective.scorer is not None or objective.name in by_model:
                continue
            raise UserError(
                f"objectives.{objective.name}: nothing judges it: no gold scorer (scorers=[NAME]), no function "
                f"(computed), and {who} preference model (judge=RUN)"
            )
    if not data.objectives and not settings.scorers:
        raise UserError("objectives: none, and no scorers; give scorers=[NAME], judge=RUN, or dataset= and objectives=")


def needs_preference_model(settings: EvalConfig, data: PreferenceData) -> bool:
    judged = gold_judged(settings)
    others = [o for o in data.objectives if o.name not in judged and o.scorer is None]
    return bool(others) and not isinstance(data.world, World)


# --------------------------------------------------------------------------------------------- responses
def respond_all(
    settings: EvalConfig, benchmark: Benchmark, entrants: Sequence[Entrant]
) -> tuple[list[Responded], PreferenceFeatures | None, list[Unfinished]]:
    """Every entrant's responses, one model in memory at a time; the preference model, where one judges; and those of
    many entrants that cannot be loaded."""
    home = benchmark.home if needs_preference_model(settings, benchmark.data) else None
    features: PreferenceFeatures | None = None
    responded, failed = [], []
    with stage("responses", len(entrants)) as progress:
        for number, entrant in enumerate(entrants, start=1):
            started = time.perf_counter()
            try:
                judges = home is not None and home.path == entrant.path
                response, judge = respond(settings, benchmark, entrant, judges)
            except UserError as error:
                if len(entrants) == 1:
                    raise
                failed.append(Unfinished(entrant.path, str(error)))
                continue
            features = judge or features
            responded.append(replace(response, seconds=time.perf_counter() - started))
            gc.collect()
            progress.advance(number)
        if not responded:
            raise UserError("; ".join(entrant.reason for entrant in failed))
        if home is not None and features is None:
            features = features_of_run(home, benchmark.data)
    return responded, features, failed


def respond(
    settings: EvalConfig, benchmark: Benchmark, entrant: Entrant, judges: bool
) -> tuple[Responded, PreferenceFeatures | None]:
    """One entrant's responses; with `judges`, its preference model as well."""
    subject = subject_of(benchmark, entrant)
    if entrant.kind == "responses":
        return responses_of_file(subject, entrant, benchmark.examples), None
    if entrant.trained is None:
        return responses_of_model(settings, benchmark, subject, entrant), None
    models, features = load_run(entrant, benchmark.encoders[entrant.name], judges, compared=True)
    return responses_of(
        models, settings, benchmark.data, benchmark.examples, subject, entrant.trained.tau, compared=True
    ), features


def subject_of(benchmark: Benchmark, entrant: Entrant) -> Subject:
    """What is asked of the entrant: a run's own thresholds, else those of the judging run, else the objective set's."""
    results = entrant.summary.get("objectives", {})
    source = results or (benchmark.home.summary.get("objectives", {}) if benchmark.home else {})
    thresholds = {o.name: o.threshold for o in benchmark.data.objectives}
    thresholds |= {n: r["threshold"] for n, r in source.items() if n in thresholds and r.get("threshold") is not None}
    estimates = {name: result.get("estimated_win_rate") for name, result in results.items()}
    return Subject(entrant.name, entrant.path, entrant.kind, without_none(thresholds), without_none(estimates))


def without_none(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}


def responses_of_model(settings: EvalConfig, benchmark: Benchmark, subject: Subject, entrant: Entrant) -> Responded:
    """Samples of a plain model, and of the model that it is compared with, where one is named."""
    examples, encoder = benchmark.examples, benchmark.encoders[entrant.name]
    condition, evaluation = entrant.condition, settings.evaluation
    policy = load_policy(model_of(entrant, settings.model), encoder, settings.seed)
    responses = sampled_responses(
        policy, examples, evaluation.responses, settings.sampling, settings.seed + POLICY_SEED, condition
    )
    exact = exact_win_rates(policy, encoder.conditioned(condition), benchmark.data, evaluation.exact_prompts)
    alone = Responded(subject, responses, cut_off=cut_off(responses), exact=exact)
    if settings.reference is None:
        return alone
    now = policy.logps(asked_rows(encoder, examples, responses, condition))
    del policy
    model = replace(settings.model, path=settings.reference)
    theirs = plain_encoder(model)
    theirs.longest_response = encoder.longest_response
    policy = load_policy(model, theirs, settings.seed)
    reference = sampled_responses(
        policy, examples, evaluation.responses, settings.sampling, settings.seed + REFERENCE_SEED
    )
    kl = None
    if theirs.tokenizer.get_vocab() == encoder.tokenizer.get_vocab():  # the same tokens: their probabilities compare
        kl = mean_log_ratio(now, policy.logps(asked_rows(encoder, examples, responses, "")))
    return replace(alone, reference=reference, kl=kl)


def responses_of_file(subject: Subject, entrant: Entrant, examples: Sequence[Example]) -> Responded:
    rows = [entrant.rows[as_text(example.prompt)] for example in examples]
    compared = all(row.reference for row in rows)
    reference = JudgedResponses([list(row.reference) for row in rows]) if compared else None
    return Responded(subject, JudgedResponses([list(row.responses) for row in rows]), reference)


def features_of_run(home: Entrant, data: PreferenceData) -> PreferenceFeatures:
    """The preference model of a run that is not evaluated itself."""
    assert home.trained is not None
    model = home.trained.model
    encoder, _ = fitted_encoder(home, model, data)
    return load_features(home.run, load_policy(model, encoder, home.trained.seed))


# --------------------------------------------------------------------------------------------- judgement
def compare(
    settings: EvalConfig,
    benchmark: Benchmark,
    responded: Sequence[Responded],
    features: PreferenceFeatures | None,
    scorers: Mapping[str, Scores],
    unfinished: list[Unfinished],
) -> Compared:
    """Every number of every entrant, the scales of the scores, and who dominates whom."""
    configs = settings.scorers
    judges = {name: ScoreJudge(scorers[name], f"scorer {name}", config.margin) for name, config in configs.items()}
    gold = {config.objective: judges[name] for name, config in configs.items() if config.objective is not None}
    beside = {name: judges[name] for name, config in configs.items() if config.objective is None}
    columns = columns_of(benchmark.data, features, gold, beside)
    fixed = earlier_scales(settings.normalisation)
    with stage("judging", len(columns)) as progress:
        evaluations, scales = evaluate(
            settings, benchmark.examples, columns, responded, features, fixed, progress.advance
        )
    names = list(evaluations[0].objectives or evaluations[0].scorers)
    by_prompt = {e.name: np.stack([e.by_prompt[name] for name in names], axis=1) for e in evaluations}
    units = unit_numbers(benchmark.examples)
    comparisons = dominance(by_prompt, names, settings.permutations, settings.seed, units)
    return Compared(evaluations, unfinished, scales, comparisons)


def earlier_scales(path: str | None) -> dict[str, Scale]:
    """The normalisation of an earlier evaluation.json; UserError where it is none."""
    if path is None:
        return {}
    try:
        return {name: Scale(**values) for name, values in read_json(Path(path).expanduser())["normalisation"].items()}
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"normalisation={path}: not an evaluation.json of mopo eval") from None
