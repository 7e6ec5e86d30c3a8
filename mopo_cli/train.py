"""`mopo train`: data, reference, preference model, alignment, evaluation, run directory."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed
from omegaconf import DictConfig

from mopo_cli import cache
from mopo_cli import config as configs
from mopo_cli.config import TrainConfig
from mopo_cli.console import say, stage
from mopo_cli.errors import UserError
from mopo_cli.evaluation import Models
from mopo_cli.inputs import Inputs, build_method, prepare_inputs
from mopo_cli.models.preference import (
    PreferenceModel,
    build_preference_model,
    load_preference_model,
    save_preference_model,
)
from mopo_cli.models.reference import snapshot
from mopo_cli.models.save import load_weights, save_model
from mopo_cli.pretrain import fit_preference_model, fit_reference, limited_steps
from mopo_cli.processes import build_accelerator, part_ways
from mopo_cli.results import Outcome, finish
from mopo_cli.runs import RunDirectory
from mopo_cli.session import claim_run, quiet_libraries, recorded
from mopo_cli.stages import Setting
from mopo_cli.tracking import wandb_mode


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
    names = sorted(config.objectives, key=lambda name: config.objectives[name].role != "primary")
    build_method(config, tuple(names), (None,) * (len(names) - 1))


def train(config: TrainConfig, composed: DictConfig, run: RunDirectory, accelerator: Accelerator) -> Outcome:
    """The whole main path. Bad input raises UserError before the run directory exists."""
    started = time.perf_counter()
    quiet_libraries()
    set_seed(config.seed)
    inputs = prepare_inputs(config)
    if check := getattr(inputs.method, "check", None):
        check(inputs)
    with recorded(accelerator, config, composed, run, inputs.data) as tracker:
        fit_or_load_reference(config, accelerator, inputs, run.reference)
        initial = snapshot(inputs.policy)
        judge, accuracy = fit_or_load_judge(config, accelerator, inputs, run.preference_model)
        aligned = inputs.method.align(Setting(config, accelerator, inputs, judge, initial, run, tracker))
        part_ways()
        if not accelerator.is_main_process:
            return Outcome("infeasible" if aligned.infeasible else "done")
        models = Models(inputs.policy, initial, inputs.encoder, inputs.collate, judge, aligned.condition, config.cache)
        return finish(config, inputs, models, aligned, accuracy, run, tracker, started)


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


__all__ = ["Outcome", "command", "train"]
