"""Evaluation: responses of the policy to test prompts, judged against the data's responses; exact where enumerable."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch
from rich.table import Table
from scipy.special import logsumexp
from torch import nn

from mopo_cli import oracle, pareto
from mopo_cli.cache import kept_logps
from mopo_cli.config import EvaluationConfig, SamplingConfig
from mopo_cli.console import say, show
from mopo_cli.data.assistant import World
from mopo_cli.data.prepare import as_text, prompt_key
from mopo_cli.data.tokens import Collator, Encoder, TokenRow
from mopo_cli.judges import Answers, Judge, PreferenceFeatures, encoded_prompt, own_judge
from mopo_cli.models.logprobs import all_logps
from mopo_cli.models.preference import PreferenceModel
from mopo_cli.models.reference import Snapshot, loaded, reference_logps
from mopo_cli.models.sampling import sample
from mopo_cli.runs import RunDirectory, write_atomic
from mopo_cli.significance import bootstrap_ci, verdict
from mopo_cli.types import Example, PreferenceData

POLICY_SEED, REFERENCE_SEED = 104729, 15485863  # apart, so that their samples are independent


@dataclass(slots=True)
class Models:
    """What evaluation needs besides data."""

    policy: nn.Module
    initial: Snapshot  # the first reference
    encoder: Encoder
    collate: Collator
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
    policy: nn.Module,
    encoder: Encoder,
    examples: Sequence[Example],
    responses: int,
    sampling: SamplingConfig,
    seed: int,
    condition: str = "",
) -> Answers:
    """`responses` samples of the policy to each prompt, which is asked behind `condition`; the rows are without it."""
    told = encoder.conditioned(condition)
    asked = [encoded_prompt(told, example) for example in examples]
    drawn = sample(policy, told, asked, responses, sampling, seed)
    plain = [encoded_prompt(encoder, example) for example in examples] if condition else asked
    tokens = [TokenRow(prompt, [d.ids for d in draws]) for prompt, draws in zip(plain, drawn, strict=True)]
    return Answers([[d.text for d in draws] for draws in drawn], tokens, encoder)


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
    given = data_answers(examples, models.encoder)
    answers = sampled_answers(
        models.policy, models.encoder, examples, config.responses, sampling, seed + POLICY_SEED, models.condition
    )
    features = PreferenceFeatures(models.judge, models.encoder, models.collate)
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
    now = all_logps(models.policy, asked_rows(models.encoder, examples, answers, models.condition), models.collate)
    before = reference_logps(models.policy, models.initial, answers.tokens, models.collate)
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


def exact_evaluation(
    models: Models,
    data: PreferenceData,
    thresholds: dict[str, float],
    tau: float,
    prompts: int | None = None,
) -> Exact | None:
    """Exact win rates of the policy and the exact optimum of (P) with the first reference, where the world is known.

    Policy and reference are taken conditional on the world's responses; `support_mass` says how little that leaves out.
    """
    if not isinstance(data.world, World):
        return None
    rows, win_rates = _listed(data, data.world, models.encoder, prompts)
    told = models.encoder.conditioned(models.condition)
    asked = _listed(data, data.world, told, prompts)[0] if models.condition else rows
    log_policy, mass = _conditional(all_logps(models.policy, asked, models.collate))
    with loaded(models.policy, models.initial):
        log_reference, _ = _conditional(kept_logps(None, models.cache, models.policy, rows, models.collate))
    names = data.names
    bounds = np.array([thresholds.get(name, -math.inf) for name in names[1:]])
    best = oracle.solve(win_rates, log_reference, tau, bounds)
    reached = oracle.policy_win_rates(log_policy, win_rates)
    return Exact(
        win_rate=_named(names, reached),
        optimum=_named(names, best.win_rates),
        gap=float(best.win_rates[0] - reached[0]),
        kl=oracle.mean_kl(log_policy, log_reference),
        optimum_kl=best.kl,
        optimum_duals=_named(names[1:], best.duals),
        duality_gap=best.duality_gap,
        feasible=best.feasible,
        attainable=_named(names[1:], best.attainable),
        reference=_named(names, oracle.policy_win_rates(log_reference, win_rates)),
        support_mass=mass,
        front=[_named(names, point) for point in exact_front(win_rates)],
    )


def exact_front(win_rates: np.ndarray) -> np.ndarray:
    """(m, K) vertices of the front that any policy of the world reaches, for win_rates (N, A, K)."""
    objectives = win_rates.shape[2]
    resolution = {1: 1, 2: 40, 3: 12}.get(objectives, 6)
    points = pareto.front(win_rates, pareto.directions(objectives, resolution))
    return np.unique(points[pareto.nondominated(points)].round(6), axis=0)


def _listed(
    data: PreferenceData, world: World, encoder: Encoder, prompts: int | None
) -> tuple[list[TokenRow], np.ndarray]:
    """Rows of every response of the world to the test prompts, and their exact (N, A, K) win rates."""
    # spread over the test prompts: neighbours share a topic, and the first ones alone are no fair sample
    count = min(prompts or len(data.test), len(data.test))
    places: list[int] = np.linspace(0, len(data.test) - 1, count, dtype=int).tolist()
    asked = [str(data.test[i].prompt) for i in places]
    columns = [world.objectives.index(o.source) for o in data.objectives]
    exact = np.stack([world.win_rates(prompt)[:, columns] for prompt in asked])
    return [encoder.row(prompt, world.responses(prompt)) for prompt in asked], exact


def exact_win_rates(
    policy: nn.Module, encoder: Encoder, collate: Collator, data: PreferenceData, prompts: int | None = None
) -> dict[str, float]:
    """Exact win rates of a policy, conditional on the world's responses; none where the world cannot be listed."""
    if not isinstance(data.world, World):
        return {}
    rows, exact = _listed(data, data.world, encoder, prompts)
    log_policy, _ = _conditional(all_logps(policy, rows, collate))
    return _named(data.names, oracle.policy_win_rates(log_policy, exact))


def settle(evaluation: Evaluation, exact: Exact | None) -> Evaluation:
    """The evaluation with `satisfied` decided by the exact win rates, where there are any."""
    if exact is None:
        return evaluation
    objectives = {name: settled(r, exact.win_rate[name]) for name, r in evaluation.objectives.items()}
    return replace(evaluation, objectives=objectives)


R = TypeVar("R", bound=ObjectiveResult)


def settled(result: R, exact: float) -> R:
    """The result with its threshold judged by the exact win rate, which leaves no doubt."""
    if result.threshold is None:
        return result
    kept = exact >= result.threshold
    return replace(result, satisfied=kept, satisfied_with_confidence="yes" if kept else "no")


def _named(names: Sequence[str], values: np.ndarray) -> dict[str, float]:
    return dict(zip(names, (float(v) for v in values), strict=True))


def _conditional(logps: Sequence[torch.Tensor]) -> tuple[np.ndarray, float]:
    values = torch.stack(list(logps)).double().numpy()
    total = logsumexp(values, axis=1, keepdims=True)
    return values - total, float(np.exp(total).mean())


def write_samples(run: RunDirectory, samples: Sequence[Sample]) -> None:
    write_atomic(run.samples, "".join(json.dumps(asdict(s), ensure_ascii=False) + "\n" for s in samples))


def kept(result: ObjectiveResult) -> str:
    """Whether the threshold is kept, for a table; with a question mark where the interval leaves it open."""
    if result.satisfied is None:
        return ""
    doubt = "?" if result.satisfied_with_confidence == "undecided" else ""
    return f"[green]yes{doubt}[/]" if result.satisfied else f"[red]no{doubt}[/]"


def show_results(evaluation: Evaluation, exact: Exact | None, run: RunDirectory) -> None:
    """The final table and where everything is. A run of which no threshold was asked has no columns about them."""
    asked = len(evaluation.objectives) == 1 or any(r.threshold is not None for r in evaluation.objectives.values())
    columns = ["objective", "role", *(["threshold"] if asked else []), "win rate", *(["satisfied"] if asked else [])]
    columns += ["exact", *(["optimum"] if asked else [])] if exact else []
    table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column in ("objective", "role") else "right", no_wrap=True)
    for name, r in evaluation.objectives.items():
        half = (r.win_rate_ci95[1] - r.win_rate_ci95[0]) / 2
        cells = {
            "objective": name,
            "role": r.role,
            "threshold": "" if r.threshold is None else f"{r.threshold:.3f}",
            "win rate": f"{r.win_rate:.3f} ± {half:.3f}",
            "satisfied": kept(r),
            "exact": f"{exact.win_rate[name]:.3f}" if exact else "",
            "optimum": f"{exact.optimum[name]:.3f}" if exact else "",
        }
        table.add_row(*(cells[column] for column in columns))
    say("")
    show(table)
    if any(r.satisfied_with_confidence == "undecided" for r in evaluation.objectives.values()):
        say("?: the 95 % interval holds the threshold; more evaluation.prompts decide it")
    kl = f"KL to the reference {evaluation.kl:.3f} nats"
    best = f", optimum {exact.optimum_kl:.3f}" if exact and asked else ""
    say(kl + (f" (exact {exact.kl:.3f}{best})\n" if exact else "\n"))
    say(f"run directory  {run.path}")
    say(f"summary        {run.summary}")
    say(f"model          {run.model}")
    for path in sorted(run.figures.glob("*.png")):
        say(f"figure         {path}")
    if run.report.exists():
        say(f"report         {run.report}")
