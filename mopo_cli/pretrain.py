"""The two stages before alignment: the reference model by SFT on the data's responses, and the preference model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mopo_cli.config import PreferenceModelConfig, SftConfig
from mopo_cli.console import Stage
from mopo_cli.data.tokens import Collator, TokenRow, batch_rows, row_length
from mopo_cli.models.logprobs import budget_batches, sequence_logps
from mopo_cli.models.preference import PairBatch, PreferenceModel, accuracy, preference_loss
from mopo_cli.trainer import Progressed, Task, Trainer
from mopo_cli.types import Example

JUDGED = 1000  # held-out rows that decide when a preference model is at its best


def limited_steps(settings: SftConfig | PreferenceModelConfig, rows: int) -> int:
    """The stage's steps, but no more than its epochs over this many rows."""
    return max(1, min(settings.steps, math.ceil(settings.max_epochs * rows / settings.batch_size)))


def fit_reference(
    accelerator: Accelerator,
    policy: nn.Module,
    rows: Sequence[TokenRow],
    collate: Collator,
    config: SftConfig,
    seed: int,
    stage: Stage,
) -> float:
    """SFT on every response of the data, so that the policy imitates mu. Returns the last loss, nats a token.

    The loss is a mean over tokens of the batch, so each response weighs as in log mu(y|x), not by its length.
    """
    trainer = Trainer(accelerator, policy, config.optimiser, config.steps, budget=collate.budget)
    size = config.batch_size * accelerator.num_processes
    last = math.nan

    def loss_of(numbers: list[int]) -> Tensor:
        batch = collate([rows[i] for i in numbers]).to(accelerator.device)
        return -sequence_logps(trainer.model, batch).sum()

    task = Task(
        rows_of=lambda step: batch_rows(len(rows), size, seed, step),
        loss_of=loss_of,
        weight_of=lambda numbers: sum(len(response) for i in numbers for response in rows[i].responses),
        length_of=lambda i: row_length(rows[i]),
    )

    def after_step(progressed: Progressed) -> None:
        nonlocal last
        if progressed.step % 10 == 0 or progressed.step == config.steps:
            last = float(progressed.loss)
            stage.advance(progressed.step, loss=last)

    trainer.fit(task, after_step=after_step)
    accelerator.free_memory()
    return last


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
        logits.append(model.pair_logits(batch).cpu())
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
    stage: Stage,
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
        losses, _ = preference_loss(model.pair_logits(batch), batch.labels)
        return losses.sum()

    def known(numbers: list[int]) -> int:
        return max(1, sum(not math.isnan(label) for i in numbers for row in examples[i].labels for label in row))

    return Task(rows_of=rows_of, loss_of=loss_of, weight_of=known, length_of=lambda i: row_length(rows[i]))


def train_preference_model(
    accelerator: Accelerator,
    model: PreferenceModel,
    task: Task,
    heldout: tuple[Sequence[Example], Sequence[TokenRow]],
    collate: Collator,
    config: PreferenceModelConfig,
    stage: Stage,
) -> list[float]:
    """Train on a task, keep the weights with the best cross-entropy on (at most 1 000) held-out rows.

    Returns the held-out accuracy of each objective, over labels that are not ties.
    """
    trainer = Trainer(accelerator, model, config.optimiser, config.steps, budget=collate.budget)
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
    model.load_state_dict(best[1])
    logits, labels = heldout_logits(model, *heldout, collate)
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return accuracy(logits, labels)
