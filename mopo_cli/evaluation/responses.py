"""The responses that `mopo eval` judges: which prompts are asked, and what every entrant says to them."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mopo_cli.base.console import stage, warn
from mopo_cli.base.errors import UserError
from mopo_cli.base.files import read_json
from mopo_cli.base.types import Corpus, Example, PreferenceData
from mopo_cli.config.schema import EvalConfig, ModelConfig, ObjectiveConfig
from mopo_cli.data.assistant import World
from mopo_cli.data.encoder import Encoder
from mopo_cli.data.prepare import as_text, load, resolve_objectives
from mopo_cli.evaluation.entrants import Entrant, Unfinished, finished_run
from mopo_cli.evaluation.exact import exact_evaluation, exact_win_rates
from mopo_cli.evaluation.measure import (
    POLICY_SEED,
    REFERENCE_SEED,
    asked_rows,
    evaluated_prompts,
    mean_log_ratio,
    sampled_answers,
    sampled_kl,
)
from mopo_cli.evaluation.records import Exact, Models
from mopo_cli.judging.judges import Answers, PreferenceFeatures
from mopo_cli.judging.scorers import STAND_IN
from mopo_cli.models.policy import Policy
from mopo_cli.models.preference import load_preference_model
from mopo_cli.models.tokenizers import load_tokenizer
from mopo_cli.runs.directory import RunDirectory
from mopo_cli.runs.session import fingerprint


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
                f"{', '.join(objectives) or 'none'}. Set scorers.{name}.objective to one of them, or to null, which "
                "reports it beside them"
            )
    if settings.dataset:
        needless = {n: replace(o, computed=STAND_IN, margin=0.0) if n in judged else o for n, o in objectives.items()}
        return load(settings.dataset, needless)
    if trained is not None:
        data = load(trained.dataset, objectives)
        check_same_data(entrants, None if settings.objectives else fingerprint(data))
        return data
    if any(entrant.kind != "responses" for entrant in entrants):
        model = next(e for e in entrants if e.kind != "responses")
        raise UserError(
            f"run={model.path}: a plain model, with no data of its own. Say on which prompts: dataset=NAME "
            "objectives=NAME, or judge=RUN for the data, objectives and preference model of a run"
        )
    return data_of_files(entrants, objectives)


def check_same_data(entrants: Sequence[Entrant], found: str | None) -> None:
    """A warning where a run was trained on other data than those that are asked: it may have seen the prompts."""
    for entrant in entrants:
        path = entrant.run.provenance
        if found and entrant.kind == "run" and path.exists() and read_json(path).get("fingerprint") != found:
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
    encoder.room = encoder.condition_tokens(entrant.condition)
    kept = [encoder.rows(part, "drop")[1] for part in (data.train, data.heldout, data.test) if part]
    return encoder, {as_text(example.prompt) for part in kept for example in part}


def tokenizer_of(entrant: Entrant, model: ModelConfig) -> PreTrainedTokenizerBase:
    if entrant.kind == "run":
        with reading(entrant.run.model):
            return AutoTokenizer.from_pretrained(entrant.run.model)
    return load_tokenizer(model, [])


# --------------------------------------------------------------------------------------------- responses
def respond_all(
    settings: EvalConfig, given: Given, entrants: Sequence[Entrant], encoders: dict[str, Encoder]
) -> tuple[list[Responded], PreferenceFeatures | None, list[Unfinished]]:
    """Every entrant's responses, one model in memory at a time; the preference model, where one judges; and those of
    many entrants that cannot be loaded."""
    wanted = needs_preference_model(settings, given.data)
    features: PreferenceFeatures | None = None
    responded, failed = [], []
    with stage("responses", len(entrants)) as progress:
        for number, entrant in enumerate(entrants, start=1):
            started = time.perf_counter()
            judges = wanted and given.home is not None and given.home.path == entrant.path
            try:
                one, found = respond(settings, given, entrant, encoders.get(entrant.name), judges)
            except UserError as error:
                if len(entrants) == 1:
                    raise
                failed.append(Unfinished(entrant.path, str(error)))
                continue
            features = found or features
            one.seconds = time.perf_counter() - started
            responded.append(one)
            gc.collect()
            progress.advance(number)
        if not responded:
            raise UserError("; ".join(one.reason for one in failed))
        if wanted and features is None and given.home is not None:
            features = features_of_run(settings, given.home, given.data)
    return responded, features, failed


def respond(
    settings: EvalConfig, given: Given, entrant: Entrant, encoder: Encoder | None, judges: bool
) -> tuple[Responded, PreferenceFeatures | None]:
    """One entrant's responses; with `judges`, its preference model as well."""
    if encoder is None:
        return answers_of_file(entrant, given.examples), None
    if entrant.kind == "model":
        return respond_model(settings, given, entrant, encoder), None
    return respond_run(settings, given, entrant, encoder, judges)


def needs_preference_model(settings: EvalConfig, data: PreferenceData) -> bool:
    judged = {scorer.objective for scorer in settings.scorers.values()}
    others = [o for o in data.objectives if o.name not in judged and o.scorer is None]
    return bool(others) and not isinstance(data.world, World)


def asked_policy(config: ModelConfig, encoder: Encoder, seed: int) -> Policy:
    """The model of a config, on the accelerator where there is one, to be asked by an encoder."""
    policy = Policy.load(config, encoder.tokenizer, seed)
    policy.encoder = encoder
    if torch.cuda.is_available() and not config.lora.quantise:
        policy.model.to("cuda")
    return policy


def respond_run(
    settings: EvalConfig, given: Given, entrant: Entrant, encoder: Encoder, judges: bool
) -> tuple[Responded, PreferenceFeatures | None]:
    """Samples of a run's policy and of its reference, the KL between them, and exact numbers where there are any."""
    assert entrant.trained is not None
    run, model = entrant.run, entrant.trained.model
    policy = asked_policy(model, encoder, entrant.trained.seed)
    features = PreferenceFeatures(load_judge(run, policy), encoder, policy.collate) if judges else None
    with reading(run.path):
        if run.reference.is_dir():
            policy.load_weights(run.reference)
        initial = policy.snapshot()
        policy.load_weights(run.model)
    kept = entrant.trained.cache if entrant.trained.cache and Path(entrant.trained.cache).is_dir() else None
    models = Models(policy, initial, None, entrant.condition, kept)  # type: ignore[arg-type]  # nobody judges
    answers = sampled(settings, policy, given.examples, POLICY_SEED, entrant.condition)
    with policy.swapped(initial):
        reference = sampled(settings, policy, given.examples, REFERENCE_SEED)
    exact = exact_evaluation(
        models, given.data, thresholds_of(given, entrant), entrant.trained.tau, settings.evaluation.exact_prompts
    )
    one = Responded(entrant, answers, reference, sampled_kl(models, given.examples, answers), cut_off(answers), exact)
    one.exact = exact.win_rate if exact else {}
    return one, features


def sampled(
    settings: EvalConfig,
    policy: Policy,
    examples: Sequence[Example],
    seed: int,
    condition: str = "",
) -> Answers:
    return sampled_answers(
        policy, examples, settings.evaluation.responses, settings.sampling, settings.seed + seed, condition
    )


def respond_model(settings: EvalConfig, given: Given, entrant: Entrant, encoder: Encoder) -> Responded:
    """Samples of a plain model, and of the model that it is compared with, where one is named."""
    model = model_of(settings, entrant)
    policy = asked_policy(model, encoder, settings.seed)
    condition = entrant.condition
    answers = sampled(settings, policy, given.examples, POLICY_SEED, condition)
    one = Responded(entrant, answers, cut_off=cut_off(answers))
    told = encoder.conditioned(condition)
    one.exact = exact_win_rates(policy, told, given.data, settings.evaluation.exact_prompts)
    if settings.reference is None:
        return one
    now = policy.logps(asked_rows(encoder, given.examples, answers, condition))
    del policy
    other = replace(settings.model, path=settings.reference)
    tokenizer = load_tokenizer(other, [])
    theirs = Encoder(tokenizer, other.max_length, other.chat_template)
    theirs.longest_response = encoder.longest_response
    reference = asked_policy(other, theirs, settings.seed)
    one.reference = sampled(settings, reference, given.examples, REFERENCE_SEED)
    if tokenizer.get_vocab() == encoder.tokenizer.get_vocab():  # the same tokens, so their probabilities compare
        before = reference.logps(asked_rows(encoder, given.examples, answers, ""))
        one.kl = mean_log_ratio(now, before)
    return one


def answers_of_file(entrant: Entrant, examples: Sequence[Example]) -> Responded:
    rows = [entrant.rows[as_text(example.prompt)] for example in examples]
    compared = all(row.reference for row in rows)
    return Responded(
        entrant,
        Answers([list(row.responses) for row in rows]),
        Answers([list(row.reference) for row in rows]) if compared else None,
    )


def load_judge(run: RunDirectory, policy: Policy) -> Any:
    if not (run.preference_model / "preference_model.json").is_file():
        raise UserError(f"{run.preference_model}: no preference model there, which would judge")
    with reading(run.preference_model):
        return load_preference_model(run.preference_model, policy.model)[0]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """A UserError where what is read from `path` is torn, or was written under another config or version."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of safetensors, torch, peft or transformers
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        told = " ".join(lines[:2])[:200] if lines else type(error).__name__
        raise UserError(f"{path}: cannot be read, or does not fit the run's config ({told})") from error


def features_of_run(settings: EvalConfig, home: Entrant, data: PreferenceData) -> PreferenceFeatures:
    """The preference model of a run that is not evaluated itself."""
    assert home.trained is not None
    encoder, _ = encoder_of(settings, home, data)
    policy = asked_policy(home.trained.model, encoder, home.trained.seed)
    return PreferenceFeatures(load_judge(home.run, policy), encoder, policy.collate)


def cut_off(answers: Answers) -> float:
    """The share of samples that do not end with the end-of-sequence token."""
    assert answers.tokens is not None
    assert answers.encoder is not None
    end = answers.encoder.tokenizer.eos_token_id
    ended = [ids[-1] == end for row in answers.tokens for ids in row.responses]
    return 1.0 - sum(ended) / len(ended)


def thresholds_of(given: Given, entrant: Entrant) -> dict[str, float]:
    """What is asked of the entrant: a run's own thresholds, else those of the judging run, else the objective set's."""
    summary = entrant.summary or (given.home.summary if given.home else {})
    asked = {o.name: o.threshold for o in given.data.objectives}
    for name, result in summary.get("objectives", {}).items():
        if name in asked and result.get("threshold") is not None:
            asked[name] = result["threshold"]
    return {name: value for name, value in asked.items() if value is not None}
