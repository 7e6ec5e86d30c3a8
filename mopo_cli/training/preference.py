"""The preference model's stage: labelled pairs, their loss, the fit, and what an earlier fit has left."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mopo_cli.base.console import Progress, say, stage, stage_name
from mopo_cli.base.errors import NotFiniteError
from mopo_cli.base.types import Example
from mopo_cli.config.schema import PreferenceModelConfig, TrainConfig
from mopo_cli.data.batches import Collator, TokenBatch, batch_rows
from mopo_cli.data.table import TokenRow, row_length
from mopo_cli.models.logprobs import budget_batches, gather_slots
from mopo_cli.models.preference import (
    PreferenceModel,
    build_preference_model,
    load_preference_model,
    save_preference_model,
)
from mopo_cli.training import keys
from mopo_cli.training.cache import kept
from mopo_cli.training.inputs import Inputs
from mopo_cli.training.loop import Progressed, Task, Trainer
from mopo_cli.training.reference import limited_steps

JUDGED = 1000  # held-out rows that decide when a preference model is at its best


@dataclass(frozen=True, slots=True)
class PairBatch:
    """Labelled pairs of a token batch: index (P, 3) row, a, b; labels (P, K), NaN where missing."""

    tokens: TokenBatch
    index: Tensor
    labels: Tensor


def pair_logits(model: PreferenceModel, batch: PairBatch) -> Tensor:
    """(P, K) logits of the first response of each pair over the second."""
    features = gather_slots(model(batch.tokens), batch.tokens.slot)
    row, a, b = batch.index.unbind(-1)
    return model.logits(features[row, a], features[row, b])


def pair_batch(
    examples: Sequence[Example], rows: Sequence[TokenRow], collate: Collator, device: torch.device
) -> PairBatch:
    """All labelled pairs of some rows."""
    index = [(b, i, j) for b, example in enumerate(examples) for i, j in example.pairs]
    labels = [row for example in examples for row in example.labels]
    return PairBatch(
        collate(rows).to(device),
        torch.tensor(index, device=device),
        torch.tensor(labels, dtype=torch.float32, device=device),
    )


@torch.no_grad()
def heldout_logits(
    model: PreferenceModel, examples: Sequence[Example], rows: Sequence[TokenRow], collate: Collator
) -> tuple[Tensor, Tensor]:
    """(P, K) logits and labels of every labelled pair of some rows, on the CPU."""
    device = next(model.parameters()).device
    model.eval()
    logits, labels = [], []
    for numbers in budget_batches(rows, collate, device):
        batch = pair_batch([examples[i] for i in numbers], [rows[i] for i in numbers], collate, device)
        logits.append(pair_logits(model, batch).cpu())
        labels.append(batch.labels.cpu())
    model.train()
    return torch.cat(logits), torch.cat(labels)


def fit_preference_model(
    accelerator: Accelerator,
    model: PreferenceModel,
    train: tuple[Sequence[Example], Sequence[TokenRow]],
    heldout: tuple[Sequence[Example], Sequence[TokenRow]],
    collate: Collator,
    config: PreferenceModelConfig,
    seed: int,
    stage: Progress,
) -> list[float]:
    """`train_preference_model` on the labelled pairs."""
    rows = train[1]
    size = config.batch_size * accelerator.num_processes
    task = labelled_task(accelerator, model, train, collate, lambda step: batch_rows(len(rows), size, seed, step))
    return train_preference_model(accelerator, model, task, heldout, collate, config, stage)


def labelled_task(
    accelerator: Accelerator,
    model: PreferenceModel,
    train: tuple[Sequence[Example], Sequence[TokenRow]],
    collate: Collator,
    rows_of: Callable[[int], list[int]],
) -> Task:
    """The cross-entropy of each label, a mean over all that are known."""
    examples, rows = train

    def loss_of(numbers: list[int]) -> Tensor:
        batch = pair_batch([examples[i] for i in numbers], [rows[i] for i in numbers], collate, accelerator.device)
        losses, _ = preference_loss(pair_logits(model, batch), batch.labels)
        return losses.sum()

    def known(numbers: list[int]) -> int:
        return max(1, sum(not math.isnan(label) for i in numbers for row in examples[i].labels for label in row))

    return Task(
        rows_of=rows_of,
        loss_of=loss_of,
        weight_of=known,
        length_of=lambda i: row_length(rows[i]),
        source_of=lambda i: examples[i].source or str(i),
    )


def train_preference_model(
    accelerator: Accelerator,
    model: PreferenceModel,
    task: Task,
    heldout: tuple[Sequence[Example], Sequence[TokenRow]],
    collate: Collator,
    config: PreferenceModelConfig,
    stage: Progress,
) -> list[float]:
    """Train on a task, keep the weights with the best cross-entropy on (at most 1 000) held-out rows.

    Returns the held-out accuracy of each objective, over labels that are not ties.
    """
    key = "preference_model.optimiser."
    trainer = Trainer(accelerator, model, config.optimiser, config.steps, budget=collate.budget, key=key)
    glance = heldout[0][:JUDGED], heldout[1][:JUDGED]
    best: tuple[float, dict[str, Tensor]] = (math.inf, {})

    def after_step(progressed: Progressed) -> None:
        nonlocal best
        if progressed.step % 10 == 0 or progressed.step == config.steps:
            stage.advance(progressed.step, loss=float(progressed.loss))
        if progressed.step % config.evaluate_every == 0 or progressed.step == config.steps:
            losses, known = preference_loss(*heldout_logits(model, *glance, collate))
            cost = float(losses.sum() / known.sum())
            if cost < best[0]:
                best = (cost, copy.deepcopy(model.state_dict()))

    trainer.fit(task, after_step=after_step)
    accelerator.free_memory()
    if not best[1]:
        raise NotFiniteError(
            f"{stage_name()}: its loss on held-out rows was never finite; lower {key}learning_rate (now "
            f"{config.optimiser.learning_rate:g})"
        )
    model.load_state_dict(best[1])
    logits, labels = heldout_logits(model, *heldout, collate)
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return accuracy(logits, labels)


def preference_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy against soft labels, missing ones masked: (P, K) losses and (P, K) mask."""
    known = ~torch.isnan(labels)
    losses = nn.functional.binary_cross_entropy_with_logits(logits, labels.nan_to_num(0.5), reduction="none")
    return losses * known, known


def accuracy(logits: Tensor, labels: Tensor) -> list[float]:
    """(K,) share of decided labels (not ties) that the model orders right; NaN where there is none."""
    decided = ~torch.isnan(labels) & (labels != 0.5)
    right = ((logits > 0) == (labels > 0.5)) & decided
    return (right.sum(0) / decided.sum(0)).tolist()


def fit_or_load_judge(
    config: TrainConfig, accelerator: Accelerator, inputs: Inputs, own: Path | None = None
) -> tuple[PreferenceModel, list[float]]:
    """The preference model and its held-out accuracy of each objective, fitted or left by an earlier fit (cache.py)."""
    names, policy = inputs.data.names, inputs.policy
    steps = limited_steps(config.preference_model, len(inputs.tokens["train"]))
    settings = replace(config.preference_model, steps=steps)

    def fit() -> tuple[PreferenceModel, list[float]]:
        judge = build_preference_model(policy.model, len(names), settings.form, settings.skew_rank, config.seed)
        train, heldout = ((inputs.examples[s], inputs.tokens[s]) for s in ("train", "heldout"))
        with stage("preference model", settings.steps) as progress:
            return judge, fit_preference_model(
                accelerator, judge, train, heldout, policy.collate, settings, config.seed, progress
            )

    def save(fitted: tuple[PreferenceModel, list[float]], path: Path) -> None:
        judge, accuracies = fitted
        save_preference_model(judge, path, names, accuracies)

    def load(path: Path) -> tuple[PreferenceModel, list[float]]:
        fitted = load_preference_model(path, policy.model)
        say(f"preference model: from {path}")
        return fitted

    judge, accuracies = kept(accelerator, config.cache, partial(keys.judge_key, config, inputs), fit, save, load, own)
    text = ", ".join(f"{name} {value:.1%}" for name, value in zip(names, accuracies, strict=True))
    say(f"held-out accuracy of the preference model: {text}")
    return judge, accuracies
