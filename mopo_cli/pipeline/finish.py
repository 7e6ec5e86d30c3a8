"""How a run ends: evaluation, warnings, summary.json, the model card, figures and the final table."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from mopo_cli.algorithms.contract import Aligned
from mopo_cli.base.console import say, stage, warn
from mopo_cli.base.files import write_json
from mopo_cli.config.schema import TrainConfig
from mopo_cli.evaluation.card import model_card
from mopo_cli.evaluation.measure import columns_of, evaluate
from mopo_cli.evaluation.records import Evaluation, Models
from mopo_cli.evaluation.responses import Subject, evaluated_prompts, responses_of
from mopo_cli.evaluation.show import show_results, write_samples
from mopo_cli.judging.judges import PreferenceFeatures
from mopo_cli.models.preference import PreferenceModel
from mopo_cli.pipeline.diagnostics import warnings
from mopo_cli.pipeline.outcome import Outcome
from mopo_cli.runs.directory import RunDirectory
from mopo_cli.runs.tracking import Tracker
from mopo_cli.training.inputs import Inputs


def evaluate_run(
    config: TrainConfig, inputs: Inputs, models: Models, judge: PreferenceModel, aligned: Aligned, run: RunDirectory
) -> Evaluation:
    """As `mopo eval` evaluates the run, but for what needs samples of the reference."""
    data = inputs.data
    thresholds = aligned.thresholds or {o.name: o.threshold for o in data.objectives if o.threshold is not None}
    subject = Subject(config.run.name, str(run.path), "run", thresholds, aligned.estimated)
    features = PreferenceFeatures(judge, data.names, models.policy.encoder, models.policy.collate)
    with stage("evaluation", 2) as progress:
        examples = evaluated_prompts(inputs.examples["test"], config.evaluation.prompts, config.seed)
        responded = responses_of(models, config, data, examples, subject, config.tau, compared=False)
        progress.advance(1)
        (evaluation,), _ = evaluate(config, examples, columns_of(data, features), [responded], features)
        progress.advance(2)
    return evaluation


def finish(outcome: Outcome, provenance: dict[str, Any], run: RunDirectory, tracker: Tracker, started: float) -> None:
    """Write everything, summary.json last, and show the result."""
    evaluation, aligned = outcome.evaluation, outcome.aligned
    signs = warnings(outcome)
    summary = outcome.summary(signs)
    write_samples(run, evaluation.samples)
    adapter = bool(outcome.config.model.lora.r)
    card = model_card(run.settings(), summary, provenance, adapter, directions=aligned.directions)
    (run.model / "README.md").write_text(card, encoding="utf-8")
    summary["train"]["wall_seconds"] = time.perf_counter() - started
    publish(tracker, evaluation, summary)
    write_json(run.summary, summary)
    run.set_state(outcome.state, step=aligned.work.steps)
    tracker.figures(write_report(run))
    sync = tracker.finish()
    for text in signs:
        warn(text) if not text.startswith("note") else say(text)
    show_results(evaluation, run)
    if sync:
        say(f"upload to Weights & Biases: {sync}")


def write_report(run: RunDirectory) -> list[Path]:
    """report.html and the figures, whose paths it returns. A run has ended well even where they cannot be made."""
    from mopo_cli.report.build import write_run_report

    try:
        return write_run_report(run)
    except Exception as error:
        warn(f"no report.html ({type(error).__name__}: {error}); once mended: mopo report \"run='{run.path}'\"")
        return []


def publish(tracker: Tracker, evaluation: Evaluation, summary: dict[str, Any]) -> None:
    names = list(evaluation.objectives)
    rows = [[s.prompt, s.response, *(s.win_rate[name] for name in names)] for s in evaluation.samples[:100]]
    tracker.table("samples", ["prompt", "response", *names], rows)
    for text in summary["warnings"]:
        if not text.startswith("note"):
            tracker.alert(text)
    tracker.summarise(summary)
