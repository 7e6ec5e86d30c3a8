"""What a run ends with: evaluation, warnings, summary.json, the model card, figures and the final table."""

from __future__ import annotations

import math
import platform
import resource
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from mopo_cli import __version__
from mopo_cli.algorithms.contract import Aligned
from mopo_cli.base.console import say, stage, warn
from mopo_cli.base.files import write_json
from mopo_cli.config.compose import algorithm_name
from mopo_cli.config.schema import TrainConfig
from mopo_cli.evaluation import diagnostics
from mopo_cli.evaluation.card import model_card
from mopo_cli.evaluation.exact import exact_evaluation
from mopo_cli.evaluation.measure import evaluate_samples, settle
from mopo_cli.evaluation.records import Evaluation, Exact, Models
from mopo_cli.evaluation.show import show_results, write_samples
from mopo_cli.runs.directory import RunDirectory
from mopo_cli.runs.tracking import Tracker
from mopo_cli.training.inputs import Inputs


@dataclass
class Outcome:
    """What a run ended with."""

    state: str
    summary: dict[str, Any] | None = None  # what is written is known to the main process only
    evaluation: Evaluation | None = None
    oracle: Exact | None = None


def finish(
    config: TrainConfig,
    inputs: Inputs,
    models: Models,
    aligned: Aligned,
    accuracy: list[float],
    run: RunDirectory,
    tracker: Tracker,
    started: float,
) -> Outcome:
    """Save the model, evaluate, write summary.json last, and show the result."""
    models.policy.save(run.model)
    if aligned.directions is not None:
        aligned.directions.save(run.model)
    asked = {o.name: o.threshold for o in inputs.data.objectives if o.threshold is not None}
    thresholds = aligned.thresholds or asked
    with stage("evaluation", 2) as progress:
        test = inputs.examples["test"]
        evaluation = evaluate_samples(
            models, inputs.data, test, thresholds, aligned.estimated, config.evaluation, config.sampling, config.seed
        )
        progress.advance(1)
        exact = exact_evaluation(models, inputs.data, thresholds, config.tau, config.evaluation.exact_prompts)
        evaluation = settle(evaluation, exact)
        progress.advance(2)
    signs = diagnostics.warnings(facts(config, inputs, aligned, evaluation, exact, accuracy, tracker))
    state = "infeasible" if aligned.infeasible else "done"
    summary = summarise(config, inputs, aligned, evaluation, exact, accuracy, signs, state)
    write_samples(run, evaluation.samples)
    figures = draw(tracker.history, evaluation, exact, run)
    card = model_card(
        run.settings(), summary, inputs.data.provenance, bool(config.model.lora.r), directions=aligned.directions
    )
    (run.model / "README.md").write_text(card, encoding="utf-8")
    summary["train"]["wall_seconds"] = time.perf_counter() - started
    publish(tracker, evaluation, figures, signs, summary)
    write_json(run.summary, summary)
    run.set_state(state, step=aligned.work.steps)
    write_report(run)
    sync = tracker.finish()
    for text in signs:
        warn(text) if not text.startswith("note") else say(text)
    show_results(evaluation, exact, run)
    if sync:
        say(f"upload to Weights & Biases: {sync}")
    return Outcome(state, summary, evaluation, exact)


def write_report(run: RunDirectory) -> None:
    """report.html. The run has ended well even where its page cannot be made; that is said."""
    from mopo_cli.report.build import write_run_report

    try:
        write_run_report(run)
    except Exception as error:
        warn(f"no report.html ({type(error).__name__}: {error}); once mended: mopo report \"run='{run.path}'\"")


def facts(
    config: TrainConfig,
    inputs: Inputs,
    aligned: Aligned,
    evaluation: Evaluation,
    exact: Exact | None,
    accuracy: list[float],
    tracker: Tracker,
) -> diagnostics.RunFacts:
    names, results = inputs.data.names, evaluation.objectives
    return diagnostics.RunFacts(
        objectives=inputs.data.objectives,
        tau=config.tau,
        beta=config.beta,
        t0=config.t0,
        steps=config.steps,
        batch_size=config.batch_size,
        prompts=min(config.onpolicy.prompts, len(inputs.examples["heldout"])),
        duals=[
            *([line[f"dual/{name}"] for name in names[1:]] for line in tracker.history if f"dual/{names[-1]}" in line),
            *([list(aligned.duals.values())] if aligned.duals else []),
        ],
        thresholds=[results[name].threshold for name in names[1:]],
        n_eff=[line["n_eff"] for line in tracker.history if "n_eff" in line],
        estimator=aligned.estimator,
        kl=evaluation.kl,
        entropy=aligned.entropy,
        off_support=aligned.off_support,
        attainable=list(exact.attainable.values()) if exact else aligned.attainable,
        infeasible=aligned.infeasible,
        estimated=aligned.estimated,
        evaluated={name: result.win_rate for name, result in results.items()},
        noise={name: (r.win_rate_ci95[1] - r.win_rate_ci95[0]) / 2 for name, r in results.items()},
        heldout_accuracy=dict(zip(names, accuracy, strict=True)),
    )


def summarise(
    config: TrainConfig,
    inputs: Inputs,
    aligned: Aligned,
    evaluation: Evaluation,
    exact: Exact | None,
    accuracy: list[float],
    signs: list[str],
    state: str,
) -> dict[str, Any]:
    """summary.json but for its wall-clock time."""
    names = inputs.data.names
    work = aligned.work
    seconds = work.timing.seconds or math.inf
    return {
        "state": state,
        "algorithm": algorithm_name(config),
        "condition": aligned.condition,
        "objectives": {name: asdict(result) for name, result in evaluation.objectives.items()},
        "kl": evaluation.kl,
        "off_support": aligned.off_support,
        "duals": aligned.duals,
        "oracle": asdict(exact) if exact else None,
        "train": {
            "steps": work.steps,
            "reused_steps": work.reused_steps,
            "samples": work.samples,
            "reused_samples": work.reused_samples,
            "pairs_per_second": work.pairs / seconds,
            "tokens_per_second": work.tokens / seconds,
            "peak_memory_mb": peak_memory_mb(),
            "alignment_seconds": work.timing.seconds,
            "estimate_seconds": work.timing.estimate,
            "fresh_seconds": work.timing.fresh,
        },
        "heldout_accuracy": dict(zip(names, accuracy, strict=True)),
        "warnings": signs,
        "versions": {
            "mopo": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "seed": config.seed,
        "command": shlex.join(["mopo", *sys.argv[1:]]),
    }


def peak_memory_mb() -> float:
    """Peak of the accelerator's memory where there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def draw(
    history: Sequence[dict[str, Any]], evaluation: Evaluation, exact: Exact | None, run: RunDirectory
) -> list[Path]:
    from mopo_cli.report.figures import Point, draw_run

    results = evaluation.objectives.values()
    asked = len(results) == 1 or any(result.threshold is not None for result in results)
    points = [
        Point(
            name,
            result.role,
            result.threshold,
            result.win_rate,
            *result.win_rate_ci95,
            exact=exact.win_rate[name] if exact else None,
            optimum=exact.optimum[name] if exact and asked else None,
        )
        for name, result in evaluation.objectives.items()
    ]
    return draw_run(history, points, run.figures)


def publish(
    tracker: Tracker, evaluation: Evaluation, figures: Sequence[Path], signs: Sequence[str], summary: dict[str, Any]
) -> None:
    names = list(evaluation.objectives)
    rows = [[s.prompt, s.response, *(s.scores[name] for name in names)] for s in evaluation.samples[:100]]
    tracker.table("samples", ["prompt", "response", *names], rows)
    tracker.figures(figures)
    for text in signs:
        if not text.startswith("note"):
            tracker.alert(text)
    tracker.summarise(summary)
