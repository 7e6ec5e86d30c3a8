"""`mopo train`: data, reference, preference model, alignment, evaluation, run directory."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from omegaconf import DictConfig
from torch import Tensor

from mopo_cli import cache, diagnostics
from mopo_cli import config as configs
from mopo_cli.algorithms.mopo import Estimate, Mopo
from mopo_cli.alignment import Alignment, latest_checkpoint
from mopo_cli.config import PreferenceModelConfig, SftConfig, TrainConfig
from mopo_cli.console import say, stage, warn
from mopo_cli.errors import UserError
from mopo_cli.evaluation import Models
from mopo_cli.inputs import Inputs, build_method, prepare_inputs
from mopo_cli.judging import judge_rows
from mopo_cli.models.preference import (
    PreferenceModel,
    build_preference_model,
    load_preference_model,
    save_preference_model,
)
from mopo_cli.models.reference import snapshot
from mopo_cli.models.save import load_weights, save_model
from mopo_cli.pretrain import fit_preference_model, fit_reference
from mopo_cli.processes import build_accelerator, part_ways
from mopo_cli.results import Outcome, finish
from mopo_cli.runs import RunDirectory
from mopo_cli.session import claim_run, quiet_libraries, recorded
from mopo_cli.tracking import Tracker, wandb_mode
from mopo_cli.trainer import Progressed, Trainer


def command(composed: DictConfig) -> int:
    """Train one run; its exit status."""
    config: TrainConfig = configs.typed(composed, TrainConfig)
    check(config)
    accelerator = build_accelerator()
    try:
        run = claim_run(accelerator, composed)
        config.run.name = composed.run.name
        outcome = train(config, composed, run, accelerator)
    except UserError:
        part_ways()
        raise
    return 1 if outcome.state == "failed" else 0


def check(config: TrainConfig) -> None:
    """Everything that can be told before data and model are loaded: UserError where a setting is wrong."""
    configs.check_train(config)
    wandb_mode(config.logger)
    build_method(config, tuple(config.objectives), (None,) * (len(config.objectives) - 1))


def train(config: TrainConfig, composed: DictConfig, run: RunDirectory, accelerator: Accelerator) -> Outcome:
    """The whole main path. Bad input raises UserError before the run directory exists."""
    started = time.perf_counter()
    quiet_libraries()
    set_seed(config.seed)
    inputs = prepare_inputs(config)
    with recorded(accelerator, config, composed, run, inputs.data) as tracker:
        fit_or_load_reference(config, accelerator, inputs, run.reference)
        initial = snapshot(inputs.policy)
        judge, accuracy = fit_or_load_judge(config, accelerator, inputs, run.preference_model)
        alignment, estimate = align(config, accelerator, inputs, judge, initial, run, tracker)
        models = Models(alignment.policy, initial, inputs.encoder, inputs.collate, judge)
        part_ways()
        if not accelerator.is_main_process:
            return Outcome("infeasible" if inputs.method.infeasible else "done")
        return finish(config, inputs, models, alignment, estimate, accuracy, run, tracker, started)


# --------------------------------------------------------------------------------------------- stages


def fit_or_load_reference(
    config: TrainConfig, accelerator: Accelerator, inputs: Inputs, own: Path | None = None
) -> None:
    """SFT of inputs.policy on the data's responses, or what an earlier attempt or another run has left (cache.py)."""
    if not config.sft.steps:
        return
    rows = inputs.tokens["train"]
    settings = replace(config.sft, steps=limited_steps(config.sft, len(rows)))

    def fit() -> None:
        with stage("reference (SFT)", settings.steps) as progress:
            fit_reference(accelerator, inputs.policy, rows, inputs.collate, settings, config.seed, progress)

    def save(path: Path) -> None:
        save_model(inputs.policy, inputs.tokenizer, path)

    def load(path: Path) -> None:
        load_weights(inputs.policy, path)
        say(f"reference (SFT): from {path}")

    cache.fitted(accelerator, config.cache, partial(cache.reference_key, config, inputs), own, fit, save, load)


def limited_steps(settings: SftConfig | PreferenceModelConfig, rows: int) -> int:
    """The stage's steps, but no more than its epochs over this many rows."""
    return max(1, min(settings.steps, math.ceil(settings.max_epochs * rows / settings.batch_size)))


def fit_or_load_judge(
    config: TrainConfig, accelerator: Accelerator, inputs: Inputs, own: Path | None = None
) -> tuple[PreferenceModel, list[float]]:
    """The preference model and its held-out accuracy of each objective, fitted or left by an earlier fit (cache.py)."""
    names = inputs.data.names
    steps = limited_steps(config.preference_model, len(inputs.tokens["train"]))
    settings = replace(config.preference_model, steps=steps)
    found: list[tuple[PreferenceModel, list[float]]] = []

    def fit() -> None:
        judge = build_preference_model(inputs.policy, len(names), settings.form, settings.skew_rank, config.seed)
        train, heldout = ((inputs.examples[s], inputs.tokens[s]) for s in ("train", "heldout"))
        with stage("preference model", settings.steps) as progress:
            accuracy = fit_preference_model(
                accelerator, judge, train, heldout, inputs.collate, settings, config.seed, progress
            )
        found.append((judge, accuracy))

    def save(path: Path) -> None:
        save_preference_model(found[0][0], path, names, found[0][1])

    def load(path: Path) -> None:
        found.append(load_preference_model(path, inputs.policy))
        say(f"preference model: from {path}")

    cache.fitted(accelerator, config.cache, partial(cache.judge_key, config, inputs), own, fit, save, load)
    judge, accuracy = found[0]
    text = ", ".join(f"{name} {value:.1%}" for name, value in zip(names, accuracy, strict=True))
    say(f"held-out accuracy of the preference model: {text}")
    return judge, accuracy


def align(
    config: TrainConfig,
    accelerator: Accelerator,
    inputs: Inputs,
    judge: PreferenceModel,
    initial: dict[str, Tensor],
    run: RunDirectory,
    tracker: Tracker,
) -> tuple[Alignment, Estimate]:
    """Run the method; returns the stage and its own last estimate of R_k."""
    method = inputs.method
    accumulation, budget = config.gradient_accumulation, config.token_budget
    trainer = Trainer(accelerator, inputs.policy, config.optimiser, config.steps, accumulation, budget)
    judged = [
        judge_rows(judge, inputs.data.objectives, inputs.examples[s], inputs.tokens[s], inputs.collate, labels)
        for s, labels in (("train", method.labels), ("heldout", "observed"))
    ]
    alignment = Alignment(
        accelerator,
        trainer,
        method,
        inputs.encoder,
        judge,
        *judged,
        batch_size=config.batch_size,
        onpolicy=config.onpolicy,
        sampling=config.sampling,
        seed=config.seed,
        initial=initial,
        collate=inputs.collate,
        cache=config.cache,
    )
    checkpoint = latest_checkpoint(run.checkpoints) if config.run.resume else None
    start = alignment.restore(checkpoint) if checkpoint else 0
    tracker.rewind(start)
    alignment.prepare(start)

    with stage(
        f"alignment ({config.algorithm['_target_'].rpartition('.')[2].lower()})", config.steps, start
    ) as progress:

        def after_step(progressed: Progressed) -> bool:
            step = progressed.step
            alignment.after_step(progressed)
            last = step == config.steps or bool(method.infeasible)
            if step % config.log_every == 0 or last:
                tracker.log(step, **metrics(method, alignment, progressed))
                progress.advance(step, loss=float(progressed.loss), **dual_numbers(method))
            if step % config.checkpoint_every == 0 and not last:
                alignment.save(run.checkpoints, step)
                if accelerator.is_main_process:
                    run.set_state("running", step=step)
            if step == config.debug.fail_at_step:
                raise RuntimeError(f"debug.fail_at_step={step}: this run was asked to fail here")
            return last

        def before_step(step: int) -> None:
            alignment.before_step(step)
            if step == 0:
                for text in diagnostics.unattainable(
                    inputs.data.objectives, method.state.thresholds, alignment.pool_attainable
                ):
                    warn(text)
                    tracker.alert(text)

        trainer.fit(alignment.task(), before_step, after_step, start)
    return alignment, alignment.final_estimate(config.steps)


def dual_numbers(method: Mopo) -> dict[str, float]:
    return {f"λ {name}": value for name, value in zip(method.names[1:], method.state.duals, strict=True)}


def metrics(method: Mopo, alignment: Alignment, progressed: Progressed) -> dict[str, Any]:
    """One line of metrics.jsonl."""
    state = method.state
    seconds = (time.perf_counter() - alignment.timing.started) / alignment.accelerator.num_processes
    line: dict[str, Any] = {
        "loss": float(progressed.loss),
        "learning_rate": progressed.learning_rate,
        "kl": alignment.kl,
        "epsilon": state.epsilon,
        "n_eff": state.n_eff,
        "off_support": alignment.off_support,
        "refreshes": alignment.refreshes,
        "pairs_per_second": alignment.pairs / seconds,
        "tokens_per_second": alignment.tokens / seconds,
    }
    for k, name in enumerate(method.names):
        if state.win_rates is not None:
            line[f"win_rate/{name}"] = state.win_rates[k]
    for j, name in enumerate(method.names[1:]):
        line |= {f"dual/{name}": state.duals[j], f"threshold/{name}": state.thresholds[j], f"chi/{name}": state.chi[j]}
        if state.lower is not None:
            line[f"lower/{name}"] = state.lower[j]
    return line


__all__ = ["Outcome", "command", "train"]
