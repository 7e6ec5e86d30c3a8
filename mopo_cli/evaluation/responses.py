"""What an entrant says to the test prompts, and how far its policy is from its reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from mopo_cli.base.types import Example, PreferenceData
from mopo_cli.config.schema import EvalConfig, SamplingConfig, TrainConfig
from mopo_cli.data.encoder import Encoder
from mopo_cli.data.prepare import as_text, prompt_key
from mopo_cli.data.table import TokenRow
from mopo_cli.evaluation.exact import exact_evaluation
from mopo_cli.evaluation.records import Exact, ExactRates, Models
from mopo_cli.judging.judges import JudgedResponses, encoded_prompt
from mopo_cli.models.policy import Policy

POLICY_SEED, REFERENCE_SEED = 104729, 15485863  # apart, so that their samples are independent
Settings = EvalConfig | TrainConfig  # both tell how much is sampled, how, and by which seed


@dataclass(frozen=True, slots=True)
class Subject:
    """Who is evaluated, and what is asked of it."""

    name: str
    path: str
    kind: str  # "run", "model" or "responses"
    thresholds: dict[str, float] = field(default_factory=dict)
    estimated: dict[str, float] = field(default_factory=dict)  # a run's own last word on its win rates


@dataclass(frozen=True, slots=True)
class Responded:
    """The subject's responses to each test prompt, and its reference's."""

    subject: Subject
    responses: JudgedResponses
    reference: JudgedResponses | None = None
    kl: float | None = None
    cut_off: float | None = None
    oracle: Exact | None = None
    exact: ExactRates | None = None  # exact win rates, also of a model that has no reference
    seconds: float = 0.0


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


def data_responses(examples: Sequence[Example], encoder: Encoder | None = None) -> JudgedResponses:
    """The data's own responses."""
    texts = [[as_text(response) for response in e.responses] for e in examples]
    tokens = None
    if encoder is not None:
        tokens = [
            TokenRow(encoded_prompt(encoder, e), [encoder.response_ids(r, e.prompt) for r in e.responses])
            for e in examples
        ]
    return JudgedResponses(texts, tokens, encoder)


def sampled_responses(
    policy: Policy, examples: Sequence[Example], count: int, sampling: SamplingConfig, seed: int, condition: str = ""
) -> JudgedResponses:
    """`count` samples of the policy to each prompt, which is asked behind `condition`; the rows are without it."""
    conditioned = policy.encoder.conditioned(condition)
    prompts = [encoded_prompt(conditioned, example) for example in examples]
    drawn = policy.sample(prompts, count, sampling, seed)
    plain = [encoded_prompt(policy.encoder, example) for example in examples] if condition else prompts
    tokens = [TokenRow(prompt, [d.ids for d in draws]) for prompt, draws in zip(plain, drawn, strict=True)]
    return JudgedResponses([[d.text for d in draws] for draws in drawn], tokens, policy.encoder)


def responses_of(
    models: Models,
    settings: Settings,
    data: PreferenceData,
    examples: Sequence[Example],
    subject: Subject,
    tau: float,
    compared: bool,
) -> Responded:
    """Samples of a policy, the KL to its first reference and exact numbers where there are any; with `compared` samples
    of the reference as well."""
    policy, count, sampling, seed = models.policy, settings.evaluation.responses, settings.sampling, settings.seed
    responses = sampled_responses(policy, examples, count, sampling, seed + POLICY_SEED, models.condition)
    reference = None
    if compared:
        with policy.swapped(models.initial):
            reference = sampled_responses(policy, examples, count, sampling, seed + REFERENCE_SEED)
    oracle = exact_evaluation(models, data, subject.thresholds, tau, settings.evaluation.exact_prompts)
    return Responded(
        subject,
        responses,
        reference,
        kl=sampled_kl(models, examples, responses),
        cut_off=cut_off(responses),
        oracle=oracle,
        exact=oracle,
    )


def sampled_kl(models: Models, examples: Sequence[Example], responses: JudgedResponses) -> float:
    """KL to the first reference in nats a response, from the policy's own samples."""
    now = models.policy.logps(asked_rows(models.policy.encoder, examples, responses, models.condition))
    return mean_log_ratio(now, models.policy.logps_under(models.initial, responses.tokens or []))


def asked_rows(
    encoder: Encoder, examples: Sequence[Example], responses: JudgedResponses, condition: str
) -> list[TokenRow]:
    """Sampled responses behind the prompts that were asked: with the condition in front."""
    conditioned = encoder.conditioned(condition)
    rows = zip(examples, responses.tokens or [], strict=True)
    return [TokenRow(encoded_prompt(conditioned, example), row.responses) for example, row in rows]


def mean_log_ratio(now: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    """Over prompts, of each one's mean over its responses: on a policy's own samples, its KL in nats a response."""
    return float(np.mean([float((a - b).mean()) for a, b in zip(now, before, strict=True)]))


def cut_off(responses: JudgedResponses) -> float:
    """The share of samples that do not end with an end of turn."""
    assert responses.tokens is not None
    assert responses.encoder is not None
    ends = responses.encoder.ends
    ended = [ids[-1] in ends for row in responses.tokens for ids in row.responses]
    return 1.0 - sum(ended) / len(ended)
