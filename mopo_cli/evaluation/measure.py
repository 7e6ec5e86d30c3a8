"""Evaluation: responses of the policy to test prompts, judged against the data's responses; exact where enumerable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from mopo_cli.base.types import Example, PreferenceData
from mopo_cli.config.schema import EvaluationConfig, SamplingConfig
from mopo_cli.data.encoder import Encoder
from mopo_cli.data.prepare import as_text, prompt_key
from mopo_cli.data.table import TokenRow
from mopo_cli.evaluation.records import Evaluation, Exact, Models, ObjectiveResult, Sample, settled
from mopo_cli.judging.judges import Answers, Judge, PreferenceFeatures, encoded_prompt, own_judge
from mopo_cli.maths.significance import bootstrap_ci, verdict
from mopo_cli.models.policy import Policy

POLICY_SEED, REFERENCE_SEED = 104729, 15485863  # apart, so that their samples are independent


def evaluated_prompts(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """At most `count` different prompts drawn by the seed, each with all the data's responses to it."""
    merged: dict[tuple[str, str], Example] = {}
    for example in examples:
        key = prompt_key(example), example.context
        before = merged.get(key)
        responses = (*before.responses, *example.responses) if before else example.responses
        merged[key] = replace(before or example, responses=responses, pairs=(), labels=())
    rows = list(merged.values())
    return [rows[i] for i in np.random.default_rng([seed, 11]).permutation(len(rows))[:count].tolist()]


def data_answers(examples: Sequence[Example], encoder: Encoder | None = None) -> Answers:
    """The data's own responses."""
    texts = [[as_text(response) for response in e.responses] for e in examples]
    tokens = None
    if encoder is not None:
        tokens = [
            TokenRow(encoded_prompt(encoder, e), [encoder.response_ids(r) for r in e.responses]) for e in examples
        ]
    return Answers(texts, tokens, encoder)


def sampled_answers(
    policy: Policy,
    examples: Sequence[Example],
    responses: int,
    sampling: SamplingConfig,
    seed: int,
    condition: str = "",
) -> Answers:
    """`responses` samples of the policy to each prompt, which is asked behind `condition`; the rows are without it."""
    told = policy.encoder.conditioned(condition)
    asked = [encoded_prompt(told, example) for example in examples]
    drawn = policy.sample(asked, responses, sampling, seed)
    plain = [encoded_prompt(policy.encoder, example) for example in examples] if condition else asked
    tokens = [TokenRow(prompt, [d.ids for d in draws]) for prompt, draws in zip(plain, drawn, strict=True)]
    return Answers([[d.text for d in draws] for draws in drawn], tokens, policy.encoder)


def win_rates(judge: Judge, ours: Sequence[object], theirs: Sequence[object]) -> list[np.ndarray]:
    """(M,) mean win rates of each prompt's M responses against the others to the same prompt, from their measures."""
    return [judge.wins(first, second).mean(axis=1) for first, second in zip(ours, theirs, strict=True)]


def evaluate_samples(
    models: Models,
    data: PreferenceData,
    test: Sequence[Example],
    thresholds: dict[str, float],
    estimated: dict[str, float],
    config: EvaluationConfig,
    sampling: SamplingConfig,
    seed: int,
) -> Evaluation:
    """Win rates of sampled responses on test prompts, with bootstrap intervals over prompts, and the sampled KL."""
    examples = evaluated_prompts(test, config.prompts, seed)
    given = data_answers(examples, models.policy.encoder)
    answers = sampled_answers(models.policy, examples, config.responses, sampling, seed + POLICY_SEED, models.condition)
    features = PreferenceFeatures(models.judge, models.policy.encoder, models.policy.collate)
    results, rates = {}, {}
    for k, objective in enumerate(data.objectives):
        judge = own_judge(objective, data.world, features, k)
        found = win_rates(judge, judge.measure(examples, answers), judge.measure(examples, given))
        rates[objective.name] = found
        values = np.array([r.mean() for r in found])
        asked = thresholds.get(objective.name)
        interval = bootstrap_ci(values, config.bootstrap, seed)
        results[objective.name] = ObjectiveResult(
            objective.role,
            asked,
            float(values.mean()),
            interval,
            estimated.get(objective.name),
            None if asked is None else bool(values.mean() >= asked),
            judge.title,
            verdict(interval, asked),
        )
    return Evaluation(results, sampled_kl(models, examples, answers), samples_of(examples, answers, rates))


def sampled_kl(models: Models, examples: Sequence[Example], answers: Answers) -> float:
    """KL to the first reference in nats a response, from the policy's own samples."""
    assert answers.tokens is not None
    now = models.policy.logps(asked_rows(models.policy.encoder, examples, answers, models.condition))
    before = models.policy.logps_under(models.initial, answers.tokens)
    return mean_log_ratio(now, before)


def asked_rows(encoder: Encoder, examples: Sequence[Example], answers: Answers, condition: str) -> list[TokenRow]:
    """Sampled responses behind the prompts that were asked: with the condition in front."""
    assert answers.tokens is not None
    told = encoder.conditioned(condition)
    return [TokenRow(encoded_prompt(told, e), row.responses) for e, row in zip(examples, answers.tokens, strict=True)]


def mean_log_ratio(now: Sequence[torch.Tensor], before: Sequence[torch.Tensor]) -> float:
    """Over prompts, of each one's mean over its responses: on a policy's own samples, its KL in nats a response."""
    return float(np.mean([float((a - b).mean()) for a, b in zip(now, before, strict=True)]))


def samples_of(examples: Sequence[Example], answers: Answers, rates: dict[str, list[np.ndarray]]) -> list[Sample]:
    return [
        Sample(as_text(e.prompt), text, {name: round(float(found[i][m]), 4) for name, found in rates.items()})
        for i, e in enumerate(examples)
        for m, text in enumerate(answers.texts[i])
    ]


def settle(evaluation: Evaluation, exact: Exact | None) -> Evaluation:
    """The evaluation with `satisfied` decided by the exact win rates, where there are any."""
    if exact is None:
        return evaluation
    objectives = {name: settled(r, exact.win_rate[name]) for name, r in evaluation.objectives.items()}
    return replace(evaluation, objectives=objectives)
