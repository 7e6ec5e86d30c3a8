"""Batches of labelled pairs for losses on log-probs, and the weights that methods give to objectives."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mopo_cli.cache import kept_logps
from mopo_cli.data.tokens import row_length
from mopo_cli.errors import UserError
from mopo_cli.models.logprobs import response_logps
from mopo_cli.stages import Setting, Work, descend, rows_a_step, step_rows
from mopo_cli.trainer import Task, joined
from mopo_cli.types import Example


@dataclass(frozen=True, slots=True)
class PairLogps:
    """What a loss may see of P labelled pairs: column 0 is the first response, column 1 the second."""

    policy: Tensor  # (P, 2) log-probs, with gradient
    reference: Tensor  # (P, 2) those of the reference; zeros where it was not asked for
    lengths: Tensor  # (P, 2) response tokens
    labels: Tensor  # (P, K) I_k of the first over the second, NaN where nobody judged
    rewards: Tensor | None = None  # (P, 2, K) of each response, where a method brings some


@dataclass(frozen=True, slots=True)
class WeightedLabels:
    """Labels under weights: (P,) their weighted mean over the objectives that were judged, and (P,) those's weight."""

    label: Tensor
    weight: Tensor


@dataclass(frozen=True, slots=True)
class Beside:
    """What else each step trains on: a task of its own, whose losses join the pairs' in one mean."""

    task: Task
    places: int  # of a step's rows, that it takes
    notes: Callable[[], dict[str, Tensor]]


def normalised_weights(
    names: Sequence[str], weights: Mapping[str, float] | None, key: str = "algorithm.weights"
) -> tuple[float, ...]:
    """(K,) weights of the objectives that sum to one; all on the primary where none are given.

    Raises UserError where they name other objectives, are negative or not finite, or all zero.
    """
    if weights is None:
        return tuple(float(k == 0) for k in range(len(names)))
    given = "{" + ", ".join(f"{name}: {value}" for name, value in weights.items()) + "}"
    unknown = [name for name in weights if name not in names]
    if unknown:
        raise UserError(f"{key}={given}: {unknown[0]} is no objective; the set has {', '.join(names)}")
    for name, value in weights.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise UserError(f"{key}.{name}={value}: must be a number, 0 or more")
    total = sum(weights.values())
    if total <= 0:
        raise UserError(f"{key}={given}: all are zero; at least one must be above 0")
    return tuple(float(weights.get(name, 0.0)) / total for name in names)


def weighted_labels(labels: Tensor, weights: Tensor) -> WeightedLabels:
    """(P, K) labels and (K,) weights; a missing label has no weight, and a pair without any the label 1/2.

    A loss linear in its label, times the weight, is then the weighted sum of each objective's own loss.
    """
    known = ~torch.isnan(labels)
    taken = known * weights.to(labels)
    weight = taken.sum(-1)
    label = (taken * labels.nan_to_num(0.5)).sum(-1) / weight.clamp(min=1e-12)
    return WeightedLabels(torch.where(weight > 0, label, 0.5), weight)


def judged(example: Example, used: Sequence[int]) -> list[int]:
    """Which of an example's pairs have a label of one of these objectives."""
    return [p for p, row in enumerate(example.labels) if any(not math.isnan(row[k]) for k in used)]


def fit_pairs(
    setting: Setting,
    loss: Callable[[PairLogps], Tensor],
    weights: Sequence[float],
    work: Work,
    *,
    title: str,
    steps: int | None = None,
    rewards: Sequence[Tensor] | None = None,
    with_reference: bool = True,
    weigh: Callable[[list[int]], float] | None = None,
    beside: Beside | None = None,
    first: int = 0,
) -> None:
    """Train setting.inputs.policy on the training pairs that have a label of an objective with weight above 0.

    loss: unreduced (P,); an update descends on its sum over the pairs of config.batch_size prompts, divided by their
    number, or by `weigh` of the prompts. Rows of `beside` take the places of some of the prompts. rewards: (G, K) of
    each training row's responses. Raises UserError where no pair has such a label.
    """
    config, inputs = setting.config, setting.inputs
    examples, tokens = inputs.examples["train"], inputs.tokens["train"]
    used = [k for k, weight in enumerate(weights) if weight > 0]
    rows = [i for i, example in enumerate(examples) if judged(example, used)]
    if not rows:
        names = ", ".join(inputs.data.names[k] for k in used)
        raise UserError(f"algorithm.weights: no training pair has a label of {names}")
    steps = config.steps if steps is None else steps
    taken = step_rows(setting, len(rows), rows_a_step(setting) - (beside.places if beside else 0))
    visited = sorted({rows[i] for step in range(steps) for i in taken(step)}) if with_reference else []
    found = kept_logps(
        setting.accelerator, config.cache, inputs.policy, [tokens[i] for i in visited], inputs.collate
    ) if visited else []  # fmt: skip
    reference = dict(zip(visited, found, strict=True))
    notes: dict[str, Tensor] = {}

    def batch(numbers: list[int]) -> PairLogps:
        device = setting.accelerator.device
        chosen = [tokens[i] for i in numbers]
        tensors = inputs.collate(chosen).to(device)
        logps = response_logps(inputs.policy, tensors)
        pairs = [(b, *examples[i].pairs[p], p) for b, i in enumerate(numbers) for p in judged(examples[i], used)]
        index = torch.tensor([(b, a, c) for b, a, c, _ in pairs], device=device)
        labels = [examples[numbers[b]].labels[p] for b, _, _, p in pairs]

        def of_pairs(values: Sequence[Tensor]) -> Tensor:
            padded = torch.nn.utils.rnn.pad_sequence(list(values), batch_first=True).to(device)
            return torch.stack([padded[index[:, 0], index[:, 1]], padded[index[:, 0], index[:, 2]]], 1)

        lengths = of_pairs([torch.tensor([float(len(r)) for r in row.responses]) for row in chosen])
        policy = torch.stack([logps[index[:, 0], index[:, 1]], logps[index[:, 0], index[:, 2]]], 1)
        return PairLogps(
            policy,
            of_pairs([reference[i] for i in numbers]) if with_reference else torch.zeros_like(policy),
            lengths,
            torch.tensor(labels, dtype=torch.float32, device=device),
            None if rewards is None else of_pairs([rewards[i] for i in numbers]),
        )

    def loss_of(numbers: list[int]) -> Tensor:
        pairs = batch(numbers)
        notes.update(_notes(pairs, weights))
        return loss(pairs).sum()

    def pairs_of(numbers: list[int]) -> int:
        return sum(len(judged(examples[i], used)) for i in numbers)

    task = Task(
        rows_of=lambda step: [rows[i] for i in taken(step)],
        loss_of=loss_of,
        weight_of=weigh or pairs_of,
        length_of=lambda i: row_length(tokens[i]),
    )
    if beside is None:
        descend(setting, task, work, title=title, steps=steps, pairs_of=pairs_of, notes=lambda: notes, first=first)
        return
    both = joined(task, beside.task, len(tokens))
    descend(
        setting,
        both,
        work,
        title=title,
        steps=steps,
        pairs_of=lambda numbers: int(both.weight_of(numbers)),
        notes=lambda: {**notes, **beside.notes()},
        first=first,
    )


@torch.no_grad()
def _notes(pairs: PairLogps, weights: Sequence[float]) -> dict[str, Tensor]:
    """Log-probs of preferred and other responses, which may both fall while their difference grows, and the order."""
    label = weighted_labels(pairs.labels, torch.tensor(weights)).label
    decided = label != 0.5
    sign = torch.where(label > 0.5, 1.0, -1.0)[decided]
    policy, ratio = pairs.policy[decided], (pairs.policy - pairs.reference)[decided]
    better = torch.where(sign > 0, policy[:, 0], policy[:, 1])
    worse = torch.where(sign > 0, policy[:, 1], policy[:, 0])
    return {
        "preferred_logp": better.mean(),
        "other_logp": worse.mean(),
        "accuracy": ((ratio[:, 0] - ratio[:, 1]) * sign > 0).float().mean(),
    }
