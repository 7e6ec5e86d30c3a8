"""Batches of labelled pairs for losses on log-probs, and the weights that methods give to objectives."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from mopo_cli.algorithms.contract import Aligned, aim_of, finished
from mopo_cli.base.errors import UserError
from mopo_cli.base.types import Example
from mopo_cli.data.table import TokenRow, row_length, spans
from mopo_cli.models.logprobs import sequence_logps
from mopo_cli.training.cache import kept_logps
from mopo_cli.training.checkpoints import Setting, Work
from mopo_cli.training.loop import Task, joined
from mopo_cli.training.stage import Notes, descend, rows_a_step, step_rows


@dataclass(frozen=True, slots=True)
class PairLogps:
    """What a loss may see of P labelled pairs: column 0 is the first response, column 1 the second."""

    policy: Tensor  # (P, 2) log-probs, with gradient
    reference: Tensor  # (P, 2) those of the reference; zeros where it was not asked for
    lengths: Tensor  # (P, 2) response tokens
    labels: Tensor  # (P, K) I_k of the first over the second, NaN where nobody judged
    weights: Tensor  # (K,) what a label of each objective counts for (see `label_weights`)
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
    notes: Notes  # what its loss notes


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


def used_objectives(weights: Sequence[float]) -> list[int]:
    return [k for k, weight in enumerate(weights) if weight > 0]


def labelled_rows(setting: Setting, weights: Sequence[float]) -> list[int]:
    """The training rows with a label of an objective that has weight; UserError where such an objective has none."""
    examples, names = setting.inputs.examples["train"], setting.inputs.data.names
    used = used_objectives(weights)
    for k in used:
        if not any(judged(example, [k]) for example in examples):
            raise UserError(
                f"algorithm.weights: {names[k]} has weight {weights[k]:g}, and none of the {len(examples)} training "
                f"rows that fit the context has a label of it. Give it weight 0, or use data that judge it"
            )
    return [i for i, example in enumerate(examples) if judged(example, used)]


def visited_rows(setting: Setting, rows: Sequence[int], steps: int, batch: int | None = None) -> list[int]:
    """Those of the labelled rows that `steps` steps go through, in order; `batch` of them a step."""
    taken = step_rows(setting, len(rows), batch)
    return sorted({rows[n] for step in range(steps) for n in taken(step)})


@dataclass(frozen=True, slots=True)
class LabelledPairs:
    """The labelled pairs of N rows in flat arrays, from which a step takes its own without a loop over pairs.

    Responses are numbered through all rows: row n of the table has those from first[n], and the pairs begin[n] to
    begin[n + 1] - 1, whose sides number responses within the row.
    """

    place: dict[int, int]  # of a row of the data in the table
    first: np.ndarray  # (N,)
    counts: np.ndarray  # (N,) responses
    begin: np.ndarray  # (N + 1,)
    sides: np.ndarray  # (P, 2)
    lengths: Tensor  # (R,) tokens of each response
    reference: Tensor  # (R,)
    labels: Tensor  # (P, K)
    weights: Tensor  # (K,)
    rewards: Tensor | None  # (R, K)

    def pairs_of(self, rows: Sequence[int]) -> int:
        return int(self._sizes(self._places(rows)).sum())

    def of(self, rows: Sequence[int], logps: Tensor) -> PairLogps:
        """The pairs of some rows, with (N,) log-probs of all their responses, row by row."""
        at = self._places(rows)
        picked, sizes, counts = spans(self.begin[at], self.begin[at + 1]), self._sizes(at), self.counts[at]
        here = np.repeat(np.cumsum(counts) - counts, sizes)[:, None] + self.sides[picked]
        there = np.repeat(self.first[at], sizes)[:, None] + self.sides[picked]
        index = torch.from_numpy(np.concatenate([here, there, picked[:, None]], axis=1))
        device = logps.device
        index = index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index.to(device)
        ours, known, pair = index[:, :2], index[:, 2:4], index[:, 4]
        return PairLogps(
            logps[ours],
            self.reference[known],
            self.lengths[known],
            self.labels[pair],
            self.weights,
            None if self.rewards is None else self.rewards[known],
        )

    def sums(self, values: Tensor) -> np.ndarray:
        """(N,) sum over each row's pairs of (P,) values."""
        before = np.concatenate([[0.0], np.cumsum(values.double().cpu().numpy())])
        return np.diff(before[self.begin])

    def _places(self, rows: Sequence[int]) -> np.ndarray:
        return np.array([self.place[i] for i in rows])

    def _sizes(self, at: np.ndarray) -> np.ndarray:
        return self.begin[at + 1] - self.begin[at]


def pair_table(
    examples: Sequence[Example],
    tokens: Sequence[TokenRow],
    rows: Sequence[int],
    weights: Sequence[float],
    label_weights: Sequence[float],
    reference: Sequence[Tensor] | None = None,
    rewards: Mapping[int, Tensor] | None = None,
    device: torch.device | str = "cpu",
) -> LabelledPairs:
    """The table of some rows' pairs that have a label of an objective with weight."""
    used = used_objectives(weights)
    chosen = [(examples[i], judged(examples[i], used)) for i in rows]
    counts = np.array([len(example.responses) for example, _ in chosen])
    lengths = torch.tensor([float(len(response)) for i in rows for response in tokens[i].responses])
    return LabelledPairs(
        {row: n for n, row in enumerate(rows)},
        np.cumsum(counts) - counts,
        counts,
        np.cumsum([0, *(len(pairs) for _, pairs in chosen)]),
        np.array([example.pairs[p] for example, pairs in chosen for p in pairs]),
        lengths.to(device),
        (torch.zeros_like(lengths) if reference is None else torch.cat(list(reference))).to(device),
        torch.tensor([example.labels[p] for example, pairs in chosen for p in pairs], dtype=torch.float32).to(device),
        torch.tensor(label_weights, dtype=torch.float32).to(device),
        None if rewards is None else torch.cat([rewards[i] for i in rows]).to(device),
    )


def label_weights(examples: Sequence[Example], weights: Sequence[float]) -> list[float]:
    """(K,) each objective's weight over the share of the pairs that it has judged, of those with any label that counts.

    Where every label is known these are the weights. Else a sum over pairs that weighs labels so, divided by the number
    of pairs, is sum_k w_k times the mean over the pairs that objective k has judged, however few they are.
    """
    used = used_objectives(weights)
    counts, pairs = [0] * len(weights), 0
    for example in examples:
        for p in judged(example, used):
            pairs += 1
            for k in used:
                counts[k] += not math.isnan(example.labels[p][k])
    return [weight * pairs / count if count else 0.0 for weight, count in zip(weights, counts, strict=True)]


@dataclass(frozen=True, slots=True)
class PairFit:
    """A training on labelled pairs: what `fit_pairs` does."""

    title: str
    loss: Callable[[PairLogps], Tensor]  # unreduced (P,)
    weights: Sequence[float]  # (K,) pairs are taken that have a label of an objective with weight above 0
    with_reference: bool = True  # the policy as it is when this begins
    rewards: Mapping[int, Tensor] | None = None  # (G, K) of the responses of each of the `visited_rows`
    count: Callable[[PairLogps], Tensor] | None = None  # (P,) what a pair weighs, without a look at the policy; None: 1
    beside: Beside | None = None  # its rows take the places of some of a step's prompts
    first: int = 0  # where the run's count of steps goes on from


def fit_pairs(setting: Setting, fit: PairFit, work: Work) -> None:
    """Train setting.inputs.policy for config.steps updates, each on all pairs of config.batch_size prompts.

    An update descends on the sum of the losses, divided by that of `count`. Raises UserError where an objective with
    weight has no label.
    """
    config, inputs, device = setting.config, setting.inputs, setting.accelerator.device
    tokens = inputs.tokens["train"]
    rows = labelled_rows(setting, fit.weights)
    size = rows_a_step(setting) - (fit.beside.places if fit.beside else 0)
    taken = step_rows(setting, len(rows), size)
    table = _table_of_steps(setting, fit, rows, size)
    counts = (
        None
        if fit.count is None
        else table.sums(fit.count(table.of(list(table.place), torch.zeros_like(table.lengths))))
    )
    notes = fit.beside.notes if fit.beside else Notes()

    def loss_of(numbers: list[int]) -> Tensor:
        batch = inputs.policy.collate([tokens[i] for i in numbers]).to(device)
        pairs = table.of(numbers, sequence_logps(inputs.policy.model, batch))
        notes.add(partial(pair_notes, replace(pairs, policy=pairs.policy.detach())))
        return fit.loss(pairs).sum()

    def weight_of(numbers: list[int]) -> float:
        return table.pairs_of(numbers) if counts is None else float(sum(counts[table.place[i]] for i in numbers))

    task = Task(
        rows_of=lambda step: [rows[n] for n in taken(step)],
        loss_of=loss_of,
        weight_of=weight_of,
        length_of=lambda i: row_length(tokens[i]),
        source_of=lambda i: inputs.examples["train"][i].source or str(i),
    )
    pairs_of = table.pairs_of
    if fit.beside:
        task = joined(task, fit.beside.task, len(tokens))
        pairs_of = lambda numbers: int(task.weight_of(numbers))  # noqa: E731
    descend(setting, task, work, title=fit.title, steps=config.steps, pairs_of=pairs_of, notes=notes, first=fit.first)


def _table_of_steps(setting: Setting, fit: PairFit, rows: Sequence[int], size: int) -> LabelledPairs:
    """The pairs of all steps, with the reference's log-probs, where they are asked for."""
    inputs, config = setting.inputs, setting.config
    examples, tokens = inputs.examples["train"], inputs.tokens["train"]
    visited, reference = visited_rows(setting, rows, config.steps, size), None
    if fit.with_reference:
        seen = [tokens[i] for i in visited]
        reference = kept_logps(setting.accelerator, config.cache, inputs.policy, seen)
    shares = label_weights([examples[i] for i in rows], fit.weights)
    return pair_table(
        examples, tokens, visited, fit.weights, shares, reference, fit.rewards, setting.accelerator.device
    )


def aligned_on_pairs(setting: Setting, fit: PairFit, work: Work | None = None, alike: bool = False) -> Aligned:
    """What an algorithm leaves that is one training on labelled pairs; alike: see `aim_of`."""
    work = work or Work()
    fit_pairs(setting, fit, work)
    return Aligned(finished(work), aim=aim_of(setting, alike))


def pair_notes(pairs: PairLogps) -> dict[str, Tensor]:
    """Of each decided pair: log-probs of the preferred and the other response, which may both fall while their
    difference grows, and whether their order is right."""
    label = weighted_labels(pairs.labels, pairs.weights).label
    decided, sign = label != 0.5, torch.where(label > 0.5, 1.0, -1.0)
    first, second = pairs.policy.unbind(1)
    ratio = pairs.policy - pairs.reference
    return {
        "preferred_logp": torch.where(sign > 0, first, second)[decided],
        "other_logp": torch.where(sign > 0, second, first)[decided],
        "accuracy": ((ratio[:, 0] - ratio[:, 1]) * sign > 0).float()[decided],
    }
