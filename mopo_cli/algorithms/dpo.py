"""DPO, IPO and their variants: one loss on the difference of log-ratios, for one objective or a weighting of several.

Sources: Rafailov et al. 2023, arXiv 2305.18290, eq. 7 (sigmoid); Azar et al. 2023, arXiv 2310.12036, eq. 17 (ipo);
Zhao et al. 2023, arXiv 2305.10425, with Liu et al. 2023, arXiv 2309.06657 (hinge); Chowdhury et al. 2024,
arXiv 2403.00409, eq. 9 (robust). Their beta, the strength of the KL term, is tau here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mopo_cli.errors import UserError
from mopo_cli.pairwise import PairLogps, fit_pairs, normalised_weights, weighted_labels
from mopo_cli.stages import Aligned, Setting, Work, finished

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
    robust: the sigmoid loss made unbiased under labels flipped with probability `smoothing` (arXiv 2403.00409, eq. 9).
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


class Dpo:
    """The settings of algorithm=dpo and algorithm=ipo.

    With weights the loss is sum_k w_k L(D_k), each objective's own loss on the pairs that it has judged.
    """

    longest_condition = ""

    def __init__(
        self,
        names: tuple[str, ...],
        tau: float,
        loss: str = "sigmoid",
        weights: dict[str, float] | None = None,
        smoothing: float = 0.0,
        length_normalised: bool = False,
    ):
        if loss not in LOSSES:
            raise UserError(f"algorithm.loss={loss}: must be {' or '.join(LOSSES)}")
        if not 0 <= smoothing < 0.5:
            raise UserError(f"algorithm.smoothing={smoothing}: must be in [0, 0.5)")
        self.weights = normalised_weights(names, weights)
        self.tau, self.form, self.smoothing, self.length_normalised = tau, loss, smoothing, length_normalised

    def loss(self, pairs: PairLogps) -> Tensor:
        """(P,)"""
        h = log_ratio_difference(pairs.policy, pairs.reference, pairs.lengths, self.length_normalised)
        asked = weighted_labels(pairs.labels, torch.tensor(self.weights))
        return asked.weight * pair_loss(h, asked.label, self.tau, self.form, self.smoothing)

    def align(self, setting: Setting) -> Aligned:
        work = Work()
        title = "alignment (ipo)" if self.form == "ipo" else "alignment (dpo)"
        fit_pairs(setting, self.loss, self.weights, work, title=title)
        return Aligned(finished(work))
