"""DPO, IPO and their variants: one loss on the difference of log-ratios, for one objective or a weighting of several.

Sources: Rafailov et al. 2023, arXiv 2305.18290, eq. 7 (sigmoid); Azar et al. 2023, arXiv 2310.12036, eq. 17 (ipo);
Zhao et al. 2023, arXiv 2305.10425, with Liu et al. 2023, arXiv 2309.06657 (hinge); Mitchell 2023, "A note on DPO with
noisy preferences", eq. 3 (smoothing); Ray Chowdhury et al. 2024, arXiv 2403.00409, the unbiased loss of rDPO (robust).
Their beta, the strength of the KL term, is tau here.

IPO's h is a sum over tokens, as eric-mitchell/direct-preference-optimization has it; with `length_normalised` it is a
difference of means over tokens, as TRL has it. Values of tau do not carry over from one to the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mopo_cli.algorithms.contract import Aligned, trained_on
from mopo_cli.algorithms.pairwise.batches import (
    Beside,
    PairFit,
    PairLogps,
    aligned_on_pairs,
    fit_pairs,
    weighted_labels,
)
from mopo_cli.base.errors import UserError
from mopo_cli.config.checks import between, checked, normalised_weights, one_of
from mopo_cli.training.checkpoints import Setting, Work
from mopo_cli.training.stage import kept_policy

LOSSES = ("sigmoid", "ipo", "hinge", "robust")


def log_ratio_difference(policy: Tensor, reference: Tensor, lengths: Tensor, length_normalised: bool) -> Tensor:
    """h (P,) = log pi/pi_ref of the first response less that of the second, from (P, 2) log-probs and lengths.

    Length-normalised, each log-ratio is divided by its response's tokens: a mean over tokens instead of a sum.
    """
    ratios = policy - reference
    if length_normalised:
        ratios = ratios / lengths
    return ratios[:, 0] - ratios[:, 1]


def pair_loss(h: Tensor, label: Tensor, tau: float, loss: str = "sigmoid", smoothing: float = 0.0) -> Tensor:
    """(P,) losses at log-ratio differences h (P,) and labels (P,) in [0, 1], the preference for the first response.

    sigmoid: -p log s(tau h) - (1-p) log s(-tau h), with p the label moved by `smoothing` towards its opposite.
    ipo: (h - (2p-1) / (2 tau))^2; smoothing moves its target. hinge: p max(0, 1 - tau h) + (1-p) max(0, 1 + tau h).
    robust: the sigmoid loss made unbiased under labels flipped with probability `smoothing`: its mean over such flips
    is the sigmoid loss of the label before.
    """
    p = label * (1.0 - smoothing) + (1.0 - label) * smoothing
    if loss == "sigmoid":
        return -p * logsigmoid(tau * h) - (1.0 - p) * logsigmoid(-tau * h)
    if loss == "ipo":
        return (h - (2.0 * p - 1.0) / (2.0 * tau)) ** 2
    if loss == "hinge":
        return p * torch.relu(1.0 - tau * h) + (1.0 - p) * torch.relu(1.0 + tau * h)
    if loss == "robust":
        q = (label - smoothing) / (1.0 - 2.0 * smoothing)
        return -q * logsigmoid(tau * h) - (1.0 - q) * logsigmoid(-tau * h)
    raise UserError(f"algorithm.loss={loss}: must be {' or '.join(LOSSES)}")


@dataclass(frozen=True)
class Dpo:
    """The settings of algorithm=dpo and algorithm=ipo.

    With weights the loss is sum_k w_k L(D_k): each objective's own loss, a mean over the pairs that it has judged.
    """

    names: tuple[str, ...]
    tau: float
    loss: Annotated[str, one_of(*LOSSES)] = "sigmoid"
    weights: Mapping[str, float] | None = None
    smoothing: Annotated[float, between(0, 0.5, "[", be="a number in [0, 0.5)")] = 0.0
    length_normalised: bool = False

    longest_condition = ""

    def __post_init__(self) -> None:
        checked(self, "algorithm.")
        _ = self.shares  # raises where they are wrong

    @property
    def shares(self) -> tuple[float, ...]:
        """(K,) the weights, which sum to one."""
        return normalised_weights(self.names, self.weights)

    @property
    def title(self) -> str:
        return "ipo" if self.loss == "ipo" else "dpo"

    def losses(self, pairs: PairLogps) -> Tensor:
        """(P,)"""
        h = log_ratio_difference(pairs.policy, pairs.reference, pairs.lengths, self.length_normalised)
        labels = weighted_labels(pairs.labels, pairs.weights)
        return labels.weight * pair_loss(h, labels.label, self.tau, self.loss, self.smoothing)

    def pair_fit(self, title: str, first: int = 0, beside: Beside | None = None) -> PairFit:
        return PairFit(f"alignment ({title})", self.losses, self.shares, beside=beside, first=first)

    def align(self, setting: Setting) -> Aligned:
        return aligned_on_pairs(setting, self.pair_fit(self.title))

    def expert(self, setting: Setting, name: str, work: Work, first: int) -> None:
        """Leaves in setting.inputs.policy what this makes of the reference; trained once for all runs that ask for it.

        name: the objective that it is for. The run's count of steps goes on from `first`.
        """
        setting.inputs.policy.put(setting.initial)

        def fit() -> dict[str, Any]:
            fit_pairs(setting, self.pair_fit(f"{self.title} on {name}", first), work)
            return {}

        kept_policy(setting, f"{self.title}-{name}", [trained_on(self)], work, fit)
