"""`mopo train`: data, reference, preference model, alignment, evaluation, run directory."""

from __future__ import annotations

import time

from accelerate import Accelerator
from accelerate.utils import set_seed
from omegaconf import DictConfig

from mopo_cli.algorithms.contract import algorithm_of
from mopo_cli.base.processes import part_ways
from mopo_cli.config.schema import TrainConfig
from mopo_cli.evaluation.records import Models
from mopo_cli.pipeline.finish import evaluate_run, finish
from mopo_cli.pipeline.heldout import heldout_win_rates
from mopo_cli.pipeline.outcome import Outcome
from mopo_cli.runs.directory import RunDirectory
from mopo_cli.runs.session import quiet_libraries, recorded
from mopo_cli.runs.tracking import check_logger
from mopo_cli.training.checkpoints import Setting
from mopo_cli.training.inputs import prepare_inputs
from mopo_cli.training.preference import fit_or_load_judge
from mopo_cli.training.reference import fit_or_load_reference


def check(config: TrainConfig) -> None:
    """Everything that can be told before data and model are loaded: UserError where they do not suit each other."""
    check_logger(config.logger, config.run.name)
    algorithm_of(config)


def train(config: TrainConfig, composed: DictConfig, run: RunDirectory, accelerator: Accelerator) -> None:
    """The whole main path. Bad input raises UserError before the run directory exists."""
    started = time.perf_counter()
    quiet_libraries()
    set_seed(config.seed)
    algorithm = algorithm_of(config)
    inputs = prepare_inputs(config, algorithm.longest_condition)
    data, policy = inputs.data, inputs.policy
    if check := getattr(algorithm, "check", None):
        check(inputs)
    with recorded(accelerator, config, composed, run, data) as tracker:
        fit_or_load_reference(config, accelerator, inputs, run.reference)
        initial = policy.snapshot()
        judge, accuracy = fit_or_load_judge(config, accelerator, inputs, run.preference_model)
        setting = Setting(config, accelerator, inputs, judge, initial, run, tracker)
        aligned = algorithm.align(setting)
        part_ways()
        if not accelerator.is_main_process:
            return
        policy.save(run.model)
        if aligned.directions is not None:
            aligned.directions.save(run.model)
        models = Models(policy, initial, aligned.condition, config.cache)
        outcome = Outcome(
            config=config,
            objectives=data.objectives,
            aligned=aligned,
            evaluation=evaluate_run(config, inputs, models, judge, aligned, run),
            heldout_accuracy=dict(zip(data.names, accuracy, strict=True)),
            history=tracker.history,
            rows={split: len(examples) for split, examples in inputs.examples.items()},
            heldout_win_rate=heldout_win_rates(setting, aligned),
        )
        finish(outcome, data.provenance, run, tracker, started)
