"""SFT on preferred responses: the baseline that clones winners.

The weight of a response is the preference for it, so with weights over objectives it is the weighted sum of cloning
each objective's winners; a tie clones both responses by half.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from mopo_cli.algorithms.contract import Aligned
from mopo_cli.algorithms.pairwise.batches import PairFit, PairLogps, aligned_on_pairs, weighted_labels
from mopo_cli.config.checks import normalised_weights
from mopo_cli.training.checkpoints import Setting


def cloned(values: Tensor, label: Tensor) -> Tensor:
    """(P,) p values(y) + (1-p) values(y'), with (P, 2) values and the preference p (P,) for the first response."""
    return label * values[:, 0] + (1.0 - label) * values[:, 1]


@dataclass(frozen=True)
class Sft:
    """The settings of algorithm=sft. The loss is a mean over cloned tokens, as the reference's own."""

    names: tuple[str, ...]
    weights: Mapping[str, float] | None = None

    longest_condition = ""

    def __post_init__(self) -> None:
        _ = self.shares  # raises where they are wrong

    @property
    def shares(self) -> tuple[float, ...]:
        """(K,) the weights, which sum to one."""
        return normalised_weights(self.names, self.weights)

    def loss(self, pairs: PairLogps) -> Tensor:
        """(P,) minus the log-probs of the cloned responses."""
        labels = weighted_labels(pairs.labels, pairs.weights)
        return -labels.weight * cloned(pairs.policy, labels.label)

    def tokens(self, pairs: PairLogps) -> Tensor:
        """(P,) the tokens that are cloned."""
        labels = weighted_labels(pairs.labels, pairs.weights)
        return labels.weight * cloned(pairs.lengths, labels.label)

    def align(self, setting: Setting) -> Aligned:
        fit = PairFit("alignment (sft)", self.loss, self.shares, with_reference=False, count=self.tokens)
        return aligned_on_pairs(setting, fit)
