"""Evaluation: responses of the policy on test prompts, judged against the data's responses; exact where enumerable."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from rich.table import Table
from scipy.special import logsumexp
from torch import nn

from mopo_cli import config as configs
from mopo_cli import oracle, pareto
from mopo_cli.config import EvaluationConfig, SamplingConfig
from mopo_cli.console import say, show, stage
from mopo_cli.data.assistant import World
from mopo_cli.data.prepare import as_text
from mopo_cli.data.tokens import Collator, Encoder
from mopo_cli.errors import UserError
from mopo_cli.inputs import Inputs, judged_test, prepare_inputs
from mopo_cli.judging import JudgedRows, computed_rates, judge_samples
from mopo_cli.models.logprobs import all_logps
from mopo_cli.models.preference import PreferenceModel, load_preference_model
from mopo_cli.models.reference import Snapshot, reference_logps, snapshot
from mopo_cli.models.sampling import sample
from mopo_cli.models.save import load_weights
from mopo_cli.runs import RunDirectory, write_atomic, write_json
from mopo_cli.session import quiet_libraries
from mopo_cli.types import Example, Objective, PreferenceData


@dataclass(slots=True)
class Models:
    """What evaluation needs besides data."""

    policy: nn.Module
    initial: Snapshot  # the first reference
    encoder: Encoder
    collate: Collator
    judge: PreferenceModel


@dataclass(frozen=True, slots=True)
class ObjectiveResult:
    """One objective of summary.json."""

    role: str
    threshold: float | None
    win_rate: float
    win_rate_ci95: tuple[float, float]
    estimated_win_rate: float | None
    satisfied: bool | None  # by the exact win rate where it is known; None for the primary, of which nothing is asked
    judge: str  # "exact", "computed" or "preference model"


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


def bootstrap_ci(values: np.ndarray, draws: int, seed: int) -> tuple[float, float]:
    """95 % percentile interval of the mean of (n,) values, prompts resampled."""
    if len(values) < 2 or draws < 1:
        return float(values.mean()), float(values.mean())
    rng = np.random.default_rng(seed)
    means = np.array([values[rng.integers(len(values), size=len(values))].mean() for _ in range(draws)])
    return tuple(float(x) for x in np.quantile(means, [0.025, 0.975]))  # type: ignore[return-value]


def judge_of(objective: Objective, world: object | None) -> str:
    if objective.scorer is not None:
        return "computed"
    return "exact" if isinstance(world, World) else "preference model"


def judged_win_rates(
    data: PreferenceData, examples: Sequence[Example], texts: Sequence[list[str]], model_rates: Sequence[torch.Tensor]
) -> np.ndarray:
    """(n, M, K) win rates of M texts a prompt against the data's responses, each objective by its best judge."""
    rates = np.stack([r.double().numpy() for r in model_rates])
    for k, objective in enumerate(data.objectives):
        judge = judge_of(objective, data.world)
        for i, example in enumerate(examples):
            if judge == "exact":
                rates[i, :, k] = _exact_rates(data.world, objective, example, texts[i])  # type: ignore[arg-type]
            elif judge == "computed":
                rates[i, :, k] = computed_rates(objective, example, texts[i])
    return rates


def _exact_rates(world: World, objective: Objective, example: Example, texts: list[str]) -> np.ndarray:
    responses = [str(r) for r in example.responses]
    k = world.objectives.index(objective.source)
    return world.preferences(str(example.prompt), texts, responses)[k].mean(axis=1)


def evaluate_samples(
    models: Models,
    data: PreferenceData,
    test: JudgedRows,
    thresholds: dict[str, float],
    estimated: dict[str, float],
    config: EvaluationConfig,
    sampling: SamplingConfig,
    seed: int,
) -> Evaluation:
    """Win rates of sampled responses on test prompts, with bootstrap intervals over prompts, and the sampled KL."""
    count = min(config.prompts, len(test.examples))
    numbers = np.random.default_rng([seed, 11]).permutation(len(test.examples))[:count].tolist()
    examples = [test.examples[i] for i in numbers]
    asked = [test.tokens[i].prompt for i in numbers]
    drawn = sample(models.policy, models.encoder, asked, config.responses, sampling, seed + 104729)
    tokens, model_rates = judge_samples(models.judge, test, numbers, drawn, models.collate)
    texts = [[d.text for d in draws] for draws in drawn]
    rates = judged_win_rates(data, examples, texts, model_rates)
    now = all_logps(models.policy, tokens, models.collate)
    before = reference_logps(models.policy, models.initial, tokens, models.collate)
    kl = float(np.mean([float((a - b).mean()) for a, b in zip(now, before, strict=True)]))
    results = {}
    for k, objective in enumerate(data.objectives):
        values = rates[:, :, k].mean(axis=1)
        asked = thresholds.get(objective.name)
        results[objective.name] = ObjectiveResult(
            objective.role,
            asked,
            float(values.mean()),
            bootstrap_ci(values, config.bootstrap, seed),
            estimated.get(objective.name),
            None if asked is None else bool(values.mean() >= asked),
            judge_of(objective, data.world),
        )
    names = data.names
    samples = [
        Sample(as_text(e.prompt), t, dict(zip(names, rates[i, m].round(4).tolist(), strict=True)))
        for i, e in enumerate(examples)
        for m, t in enumerate(texts[i])
    ]
    return Evaluation(results, kl, samples)


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
    world, asked = data.world, [str(e.prompt) for e in data.test[:prompts]]
    rows = [models.encoder.row(prompt, world.responses(prompt)) for prompt in asked]
    columns = [world.objectives.index(o.source) for o in data.objectives]
    win_rates = np.stack([world.win_rates(prompt)[:, columns] for prompt in asked])
    log_policy, mass = _conditional(all_logps(models.policy, rows, models.collate))
    log_reference, _ = _conditional(reference_logps(models.policy, models.initial, rows, models.collate))
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


def settle(evaluation: Evaluation, exact: Exact | None) -> Evaluation:
    """The evaluation with `satisfied` decided by the exact win rates, where there are any."""
    if exact is None:
        return evaluation
    objectives = {
        name: result
        if result.threshold is None
        else replace(result, satisfied=exact.win_rate[name] >= result.threshold)
        for name, result in evaluation.objectives.items()
    }
    return replace(evaluation, objectives=objectives)


def _named(names: Sequence[str], values: np.ndarray) -> dict[str, float]:
    return dict(zip(names, (float(v) for v in values), strict=True))


def _conditional(logps: Sequence[torch.Tensor]) -> tuple[np.ndarray, float]:
    values = torch.stack(list(logps)).double().numpy()
    total = logsumexp(values, axis=1, keepdims=True)
    return values - total, float(np.exp(total).mean())


def write_samples(run: RunDirectory, samples: Sequence[Sample]) -> None:
    write_atomic(run.samples, "".join(json.dumps(asdict(s), ensure_ascii=False) + "\n" for s in samples))


def show_results(evaluation: Evaluation, exact: Exact | None, run: RunDirectory) -> None:
    """The final table and where everything is."""
    table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in ("objective", "role", "threshold", "win rate", "satisfied"):
        table.add_column(column, justify="left" if column in ("objective", "role") else "right", no_wrap=True)
    if exact:
        for column in ("exact", "optimum"):
            table.add_column(column, justify="right", no_wrap=True)
    for name, r in evaluation.objectives.items():
        verdict = "" if r.satisfied is None else "[green]yes[/]" if r.satisfied else "[red]no[/]"
        half = (r.win_rate_ci95[1] - r.win_rate_ci95[0]) / 2
        asked = "" if r.threshold is None else f"{r.threshold:.3f}"
        row = [name, r.role, asked, f"{r.win_rate:.3f} ± {half:.3f}", verdict]
        table.add_row(*row, *([f"{exact.win_rate[name]:.3f}", f"{exact.optimum[name]:.3f}"] if exact else []))
    say("")
    show(table)
    kl = f"KL to the reference {evaluation.kl:.3f} nats"
    say(kl + (f" (exact {exact.kl:.3f}, optimum {exact.optimum_kl:.3f})\n" if exact else "\n"))
    say(f"run directory  {run.path}")
    say(f"summary        {run.summary}")
    say(f"model          {run.model}")
    for path in sorted(run.figures.glob("*.png")):
        say(f"figure         {path}")
    if run.report.exists():
        say(f"report         {run.report}")


# --------------------------------------------------------------------------------------------- mopo eval


def newest_run(root: Path = Path("outputs/train")) -> Path:
    """The run that was finished last under `root`; UserError where there is none."""
    finished = sorted(root.glob("*/summary.json"), key=lambda path: path.stat().st_mtime)
    if not finished:
        raise UserError(f"run: no finished run under {root}/; give one by run=DIR, or train one with `mopo train`")
    return finished[-1].parent


def command(composed: DictConfig) -> int:
    """`mopo eval`: load a finished run, evaluate it with these settings, write evaluation.json beside its summary."""
    settings: configs.EvalConfig = configs.typed(composed, configs.EvalConfig)
    run = RunDirectory(Path(settings.run).expanduser() if settings.run else newest_run())
    if not run.summary.exists() or not run.model.is_dir():
        raise UserError(f"run={run.path}: no finished run there (it has no summary.json and model/)")
    summary = run.results()
    trained = configs.typed(OmegaConf.create(run.settings()), configs.TrainConfig)
    quiet_libraries()
    inputs = prepare_inputs(trained, run)
    data = inputs.data
    models, test = load_run(run, inputs)
    thresholds = {name: o["threshold"] for name, o in summary["objectives"].items() if o["threshold"] is not None}
    estimated = {name: o["estimated_win_rate"] for name, o in summary["objectives"].items()}
    started = time.perf_counter()
    with stage("evaluation", 1) as progress:
        result = evaluate_samples(
            models, data, test, thresholds, estimated, settings.evaluation, settings.sampling, settings.seed
        )
        exact = exact_evaluation(models, data, thresholds, trained.tau, settings.evaluation.exact_prompts)
        result = settle(result, exact)
        progress.advance(1)
    record: dict[str, Any] = {
        "objectives": {name: asdict(value) for name, value in result.objectives.items()},
        "kl": result.kl,
        "oracle": asdict(exact) if exact else None,
        "seed": settings.seed,
        "prompts": min(settings.evaluation.prompts, len(data.test)),
        "responses": settings.evaluation.responses,
        "seconds": time.perf_counter() - started,
    }
    write_json(run.path / "evaluation.json", record)
    write_samples(run, result.samples)
    show_results(result, exact, run)
    say(f"evaluation     {run.path / 'evaluation.json'}")
    return 0


def load_run(run: RunDirectory, inputs: Inputs) -> tuple[Models, JudgedRows]:
    """The models of a finished run and its judged test rows."""
    judge, _ = load_preference_model(run.preference_model, inputs.policy)
    if run.reference.is_dir():
        load_weights(inputs.policy, run.reference)
    initial = snapshot(inputs.policy)
    load_weights(inputs.policy, run.model)
    return Models(inputs.policy, initial, inputs.encoder, inputs.collate, judge), judged_test(judge, inputs)
