"""The reference model: SFT on the data's responses, or what an earlier run has left."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor

from mopo_cli.base.console import Progress, say, stage
from mopo_cli.config.schema import PreferenceModelConfig, SftConfig, TrainConfig
from mopo_cli.data.batches import batch_rows
from mopo_cli.data.table import TokenRow, row_length
from mopo_cli.models.logprobs import sequence_logps
from mopo_cli.models.policy import Policy
from mopo_cli.training import keys
from mopo_cli.training.cache import kept
from mopo_cli.training.inputs import Inputs
from mopo_cli.training.loop import Progressed, Task, Trainer


def fit_or_load_reference(
    config: TrainConfig, accelerator: Accelerator, inputs: Inputs, own: Path | None = None
) -> None:
    """SFT of inputs.policy on the data's responses, or what an earlier attempt or another run has left (cache.py)."""
    if not config.sft.steps:
        return
    policy, rows, examples = inputs.policy, inputs.tokens["train"], inputs.examples["train"]
    settings = replace(config.sft, steps=limited_steps(config.sft, len(rows)))

    def fit() -> None:
        with stage("reference (SFT)", settings.steps) as progress:
            sources = [example.source or str(number) for number, example in enumerate(examples)]
            fit_reference(accelerator, policy, rows, settings, config.seed, progress, sources.__getitem__)
            policy.check_finite(inputs.tokens["heldout"], "reference (SFT)", "sft.optimiser.learning_rate")

    def load(path: Path) -> None:
        policy.load_weights(path)
        say(f"reference (SFT): from {path}")

    key = partial(keys.reference_key, config, inputs)
    kept(accelerator, config.cache, key, fit, lambda _, path: policy.save(path), load, own)


def limited_steps(settings: SftConfig | PreferenceModelConfig, rows: int) -> int:
    """The stage's steps, but no more than its epochs over this many rows."""
    return max(1, min(settings.steps, math.ceil(settings.max_epochs * rows / settings.batch_size)))


def fit_reference(
    accelerator: Accelerator,
    policy: Policy,
    rows: Sequence[TokenRow],
    config: SftConfig,
    seed: int,
    stage: Progress,
    source_of: Callable[[int], str] = str,
) -> float:
    """SFT on every response of the data, so that the policy imitates mu. Returns the last loss, nats a token.

    The loss is a mean over tokens of the batch, so each response weighs as in log mu(y|x), not by its length.
    """
    budget = policy.collate.budget
    trainer = Trainer(accelerator, policy.model, config.optimiser, config.steps, budget=budget, key="sft.optimiser.")
    size = config.batch_size * accelerator.num_processes
    last = math.nan

    def loss_of(numbers: list[int]) -> Tensor:
        batch = policy.collate([rows[i] for i in numbers]).to(accelerator.device)
        return -sequence_logps(trainer.model, batch).sum()

    task = Task(
        rows_of=lambda step: batch_rows(len(rows), size, seed, step),
        loss_of=loss_of,
        weight_of=lambda numbers: sum(len(response) for i in numbers for response in rows[i].responses),
        length_of=lambda i: row_length(rows[i]),
        source_of=source_of,
    )

    def after_step(progressed: Progressed) -> None:
        nonlocal last
        if progressed.step % 10 == 0 or progressed.step == config.steps:
            last = float(progressed.loss)
            stage.advance(progressed.step, loss=last)

    trainer.fit(task, after_step=after_step)
    accelerator.free_memory()
    return last
