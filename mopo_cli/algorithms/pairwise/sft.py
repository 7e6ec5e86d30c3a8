"""SFT on preferred responses: the baseline that clones winners.

The weight of a response is the preference for it, so with weights over objectives it is the weighted sum of cloning
each objective's winners; a tie clones both responses by half.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mopo_cli.algorithms.contract import Aligned, aim_of, finished
from mopo_cli.algorithms.pairwise.batches import PairLogps, fit_pairs, weighted_labels
from mopo_cli.config.checks import normalised_weights
from mopo_cli.training.checkpoints import Setting, Work


def cloned(values: Tensor, label: Tensor) -> Tensor:
    """(P,) p values(y) + (1-p) values(y'), with (P, 2) values and the preference p (P,) for the first response."""
    return label * values[:, 0] + (1.0 - label) * values[:, 1]


class Sft:
    """The settings of algorithm=sft. The loss is a mean over cloned tokens, as the reference's own (pretrain.py)."""

    longest_condition = ""

    def __init__(self, names: tuple[str, ...], weights: Mapping[str, float] | None = None):
        self.weights = normalised_weights(names, weights)

    def loss(self, pairs: PairLogps) -> Tensor:
        """(P,) minus the log-probs of the cloned responses."""
        asked = weighted_labels(pairs.labels, pairs.weights)
        return -asked.weight * cloned(pairs.policy, asked.label)

    def tokens(self, pairs: PairLogps) -> Tensor:
        """(P,) the tokens that are cloned."""
        asked = weighted_labels(pairs.labels, pairs.weights)
        return asked.weight * cloned(pairs.lengths, asked.label)

    def align(self, setting: Setting) -> Aligned:
        work = Work()
        title = "alignment (sft)"
        fit_pairs(setting, self.loss, self.weights, work, title=title, with_reference=False, count=self.tokens)
        return Aligned(finished(work), aim=aim_of(setting, alike=False))
