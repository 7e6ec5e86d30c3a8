"""Losses on comparisons of rows behind instructions, for a policy and for a preference model (see mapl.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from mopo_cli.algorithms.pairwise.instructions import Relation, Told
from mopo_cli.data.batches import Collator
from mopo_cli.models.logprobs import gather_slots, response_logps
from mopo_cli.models.preference import PreferenceModel
from mopo_cli.training.loop import Task
from mopo_cli.training.stage import Notes


# --------------------------------------------------------------------------------------------- losses
def condition_loss(margin: Tensor) -> Tensor:
    """-log s(margin), of the shape of the margins: arXiv 2505.12845's loss within a sample and across samples."""
    return -logsigmoid(margin)


def reward_margins(rewards: Tensor, index: Tensor) -> Tensor:
    """(P,) margins of P comparisons: of rewards (2D, G), D rows behind both their conditions, by `index_of`."""
    first, second = rewards[index[..., 0, 0], index[..., 0, 1]], rewards[index[..., 1, 0], index[..., 1, 1]]
    return (first - second).sum(1)


def preference_margins(model: PreferenceModel, features: Tensor, index: Tensor) -> Tensor:
    """(P, K) margins of P comparisons under each objective: of features (2D, G, K, 1 + 2 rank), by `index_of`."""
    first, second = features[index[..., 0, 0], index[..., 0, 1]], features[index[..., 1, 0], index[..., 1, 1]]
    return model.logits(first, second).sum(1)


def index_of(comparisons: Sequence[Sequence[Relation]]) -> Tensor:
    """(P, M, 2, 2): which row and response is over which, M such for each comparison of each told row."""
    flat = [
        [[[2 * d + c, g] for c, g in over] for over in comparison]
        for d, each in enumerate(comparisons)
        for comparison in each
    ]
    return torch.tensor(flat, dtype=torch.long).view(len(flat), -1 if flat else 1, 2, 2)


# --------------------------------------------------------------------------------------------- rows with instructions
Margins = Callable[[Tensor], Tensor]  # of the comparisons of some rows, by index


class ToldTask:
    """The losses of told rows, for a model that gives margins.

    It brings no weight of its own: joined to a task whose steps weigh `beside`, it adds to their mean loss a factor
    times the mean over each kind of comparison, of which a step has as many as `rows` told rows have on average.
    """

    def __init__(
        self,
        told: Sequence[Told],
        factors: dict[str, float],
        margins: Callable[[Sequence[int]], Margins],
        rows_of: Callable[[int], list[int]],
        beside: float,
        rows: int,
        notes: Notes | None = None,  # where the share of comparisons that come out right is noted
    ):
        self.told, self.margins, self.notes = told, margins, notes
        self.scales: dict[str, float] = {}
        for name, factor in factors.items():
            total = sum(len(getattr(row, name)) for row in told)
            self.scales[name] = factor * beside * len(told) / (rows * total) if total else 0.0
        self.task = Task(rows_of, self.loss_of, lambda numbers: 0.0, lambda i: told[i].length)

    def loss_of(self, numbers: list[int]) -> Tensor:
        margins = self.margins(numbers)
        losses, right = [], {}
        for name, scale in self.scales.items():
            margin = margins(index_of([getattr(self.told[i], name) for i in numbers]))
            losses.append(scale * condition_loss(margin).sum())
            right[f"{name}_accuracy"] = (margin.detach() > 0).float()
        if self.notes is not None:
            self.notes.add(lambda: right)
        return torch.stack(losses).sum()


def policy_margins(
    policy: nn.Module, told: Sequence[Told], reference: dict[int, Tensor], tau: float, collate: Collator
) -> Callable[[Sequence[int]], Margins]:
    """Margins of tau log pi / pi_ref; `reference` has the (2, G) log-probs of each row that is asked for."""

    def of(numbers: Sequence[int]) -> Margins:
        tensors = collate([row for i in numbers for row in told[i].rows])
        device = next(policy.parameters()).device
        logps = response_logps(policy, tensors.to(device))
        logps_before = [each for i in numbers for each in reference[i]]
        before = torch.nn.utils.rnn.pad_sequence(logps_before, batch_first=True).to(device)
        return lambda index: reward_margins(tau * (logps - before), index.to(device))

    return of


def model_margins(
    model: PreferenceModel, told: Sequence[Told], collate: Collator
) -> Callable[[Sequence[int]], Margins]:
    """Margins of the preference model's logits."""

    def of(numbers: Sequence[int]) -> Margins:
        device = next(model.parameters()).device
        tensors = collate([row for i in numbers for row in told[i].rows]).to(device)
        features = gather_slots(model(tensors), tensors.slot)
        return lambda index: preference_margins(model, features, index.to(device))

    return of
