"""MODPO: DPO on the pairs of one objective, with a margin from the rewards of the others.

Source: Zhou et al. 2023, arXiv 2310.03708, the loss L_MODPO. Its beta, the strength of the KL term, is tau here. With
exact rewards r_j and labels of objective k that follow Bradley-Terry, the optimum is that of RL on the weighted sum of
all rewards: pi proportional to pi_ref exp(sum_k w_k r_k / tau).

The scale of the rewards sets the trade-off. Here they are log-odds of preference, whether they are values of the
preference model or tau times the log-ratio of a policy trained by DPO, and so is what DPO reads from the labels of k:
all objectives are on one scale. `normalise` divides each margin's reward by its spread instead: it suits an objective
whose labels are nearly without noise (a computed one), where log-odds have no bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import torch
from torch import Tensor

from mopo_cli.algorithms.contract import Aligned
from mopo_cli.algorithms.pairwise.batches import PairFit, PairLogps, aligned_on_pairs, labelled_rows, visited_rows
from mopo_cli.algorithms.pairwise.dpo import Dpo, log_ratio_difference, pair_loss
from mopo_cli.base.errors import UserError
from mopo_cli.config.checks import checked, normalised_weights, one_of
from mopo_cli.models.preference import features_of
from mopo_cli.training.cache import kept_logps
from mopo_cli.training.checkpoints import Setting, Work

LOSSES = ("sigmoid", "hinge")


def modpo_loss(h: Tensor, label: Tensor, margin: Tensor, weight: float, tau: float, loss: str = "sigmoid") -> Tensor:
    """(P,) losses at log-ratio differences h (P,), with z = (tau h - margin) / weight in place of DPO's tau h.

    label: (P,) in [0, 1], the preference of objective k for the first response. margin: (P,) sum_j w_j (r_j(y) -
    r_j(y')) over the others. weight: w_k, above 0.
    sigmoid: -p log s(z) - (1-p) log s(-z). hinge: p max(0, 1 - z) + (1-p) max(0, 1 + z).
    """
    return pair_loss((tau * h - margin) / weight, label, 1.0, loss)


def spread(rewards: Mapping[int, Tensor]) -> Tensor:
    """(K,) root mean square of the difference between two responses to one prompt, from (G, K) rewards a prompt."""
    total, pairs = torch.zeros(()), 0
    for values in rewards.values():  # the sum over all pairs of squared differences is G times that from the mean
        total = total + len(values) * ((values - values.mean(0)) ** 2).sum(0)
        pairs += len(values) * (len(values) - 1) // 2
    return (total / max(1, pairs)).sqrt()


@dataclass(frozen=True)
class Modpo:
    """The settings of algorithm=modpo: which objective's pairs, and where the margins of the others come from."""

    names: tuple[str, ...]
    tau: float
    preference_form: str = "bradley_terry"
    weights: Mapping[str, float] | None = None  # None: equal
    pairs: str | None = None
    margin: Annotated[str, one_of("preference_model", "implicit")] = "preference_model"
    normalise: bool = False
    loss: Annotated[str, one_of(*LOSSES)] = "sigmoid"

    longest_condition = ""

    def __post_init__(self) -> None:
        checked(self, "algorithm.")
        if self.others and self.margin == "preference_model" and self.preference_form != "bradley_terry":
            raise UserError(
                f"algorithm.margin=preference_model: preference_model.form={self.preference_form} compares responses "
                "and gives them no values; set preference_model.form=bradley_terry, or algorithm.margin=implicit"
            )

    @cached_property
    def shares(self) -> tuple[float, ...]:
        """(K,) the weights, which sum to one."""
        return normalised_weights(self.names, dict.fromkeys(self.names, 1.0) if self.weights is None else self.weights)

    @cached_property
    def trained(self) -> int:
        """The objective k whose pairs are trained on: its weight must not be 0, by which the loss divides.

        Where the primary has none, the secondary with the largest weight is taken, as at the end of the paper's front.
        """
        shares = self.shares
        if self.pairs is None:
            return 0 if shares[0] > 0 else max(range(len(shares)), key=lambda k: shares[k])
        if self.pairs not in self.names:
            raise UserError(f"algorithm.pairs={self.pairs}: is no objective; the set has {', '.join(self.names)}")
        if shares[self.names.index(self.pairs)] == 0:
            raise UserError(
                f"algorithm.pairs={self.pairs}: its weight is 0, and the loss divides by it; give it a weight above 0, "
                "or train on the pairs of another objective"
            )
        return self.names.index(self.pairs)

    @cached_property
    def others(self) -> list[int]:
        return [k for k, share in enumerate(self.shares) if share > 0 and k != self.trained]

    def losses(self, pairs: PairLogps) -> Tensor:
        """(P,)"""
        h = log_ratio_difference(pairs.policy, pairs.reference, pairs.lengths, False)
        margin = torch.zeros_like(h)
        if pairs.rewards is not None:
            weights = torch.tensor([self.shares[j] for j in self.others]).to(h)
            margin = (pairs.rewards[:, 0] - pairs.rewards[:, 1]) @ weights
        k = self.trained
        return modpo_loss(h, pairs.labels[:, k], margin, self.shares[k], self.tau, self.loss)

    def align(self, setting: Setting) -> Aligned:
        work, steps = Work(), setting.config.steps
        weights = tuple(float(k == self.trained) for k in range(len(self.names)))
        rows = visited_rows(setting, labelled_rows(setting, weights), steps)
        rewards = self.rewards(setting, rows, work) if self.others else None
        setting.inputs.policy.put(setting.initial)
        first = len(self.others) * steps if self.margin == "implicit" else 0
        fit = PairFit("alignment (modpo)", self.losses, weights, rewards=rewards, first=first)
        return aligned_on_pairs(setting, fit, work, alike=True)

    def rewards(self, setting: Setting, rows: Sequence[int], work: Work) -> dict[int, Tensor]:
        """(G, J) rewards of each row's responses under the other objectives."""
        inputs = setting.inputs
        tokens = [inputs.tokens["train"][i] for i in rows]
        if self.margin == "implicit":
            columns = self._log_ratios(setting, rows, work)
        else:
            features = features_of(setting.judge, tokens, inputs.policy.collate)
            columns = [feature[:, self.others, 0] for feature in features]
        rewards = dict(zip(rows, columns, strict=True))
        if not self.normalise:
            return rewards
        scale = spread(rewards).clamp(min=1e-12)
        return {row: values / scale for row, values in rewards.items()}

    def _log_ratios(self, setting: Setting, rows: Sequence[int], work: Work) -> list[Tensor]:
        """(G, J) tau log pi_j/pi_ref of each row's responses, pi_j trained by DPO on the pairs of objective j."""
        inputs, config = setting.inputs, setting.config
        tokens = [inputs.tokens["train"][i] for i in rows]

        def logps() -> list[Tensor]:
            return kept_logps(setting.accelerator, config.cache, inputs.policy, tokens)

        before = logps()  # the policy is the reference still
        columns = []
        for place, j in enumerate(self.others):
            name = self.names[j]
            Dpo(self.names, self.tau, weights={name: 1.0}).expert(setting, name, work, place * config.steps)
            columns.append([self.tau * (now - then) for now, then in zip(logps(), before, strict=True)])
        return [torch.stack(values, dim=-1) for values in zip(*columns, strict=True)]
