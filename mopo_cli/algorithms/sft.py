"""SFT on preferred responses: the baseline that clones winners.

The weight of a response is the preference for it, so with weights over objectives it is the weighted sum of cloning
each objective's winners; a tie clones both responses by half.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mopo_cli.pairwise import PairLogps, fit_pairs, judged, normalised_weights, weighted_labels
from mopo_cli.stages import Aligned, Setting, Work, finished
from mopo_cli.types import Example


def preferred_loss(logps: Tensor, label: Tensor) -> Tensor:
    """(P,) -p log pi(y) - (1-p) log pi(y') for log-probs (P, 2) and the preference p (P,) for the first response."""
    return -label * logps[:, 0] - (1.0 - label) * logps[:, 1]


class Sft:
    """The settings of algorithm=sft. The loss is a mean over tokens, as the reference's own (pretrain.py)."""

    longest_condition = ""

    def __init__(self, names: tuple[str, ...], weights: dict[str, float] | None = None):
        self.weights = normalised_weights(names, weights)

    def loss(self, pairs: PairLogps) -> Tensor:
        """(P,)"""
        asked = weighted_labels(pairs.labels, torch.tensor(self.weights))
        return asked.weight * preferred_loss(pairs.policy, asked.label)

    def align(self, setting: Setting) -> Aligned:
        work = Work()
        tokens = [[len(r) for r in row.responses] for row in setting.inputs.tokens["train"]]
        examples = setting.inputs.examples["train"]

        def weigh(numbers: list[int]) -> float:
            return sum(cloned_tokens(examples[i], tokens[i], self.weights) for i in numbers)

        fit_pairs(
            setting, self.loss, self.weights, work, title="alignment (sft)", with_reference=False, weigh=weigh
        )  # fmt: skip
        return Aligned(finished(work))


def cloned_tokens(example: Example, lengths: list[int], weights: tuple[float, ...]) -> float:
    """The tokens of an example's preferred responses, each pair's counted with its weight."""
    total = 0.0
    for p in judged(example, [k for k, weight in enumerate(weights) if weight > 0]):
        a, b = example.pairs[p]
        for label, weight in zip(example.labels[p], weights, strict=True):
            if label == label and weight > 0:
                total += weight * (label * lengths[a] + (1.0 - label) * lengths[b])
    return total
