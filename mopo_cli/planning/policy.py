"""A policy on a table, one logit a prompt and action; its log-probs go through a language model's losses."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TabularPolicy(nn.Module):
    """log pi = log_softmax of the logits; starts at a reference, log_reference (N, A)."""

    def __init__(self, log_reference: Tensor):
        super().__init__()
        self.logits = nn.Parameter(log_reference.clone())

    def forward(self) -> Tensor:
        """(N, A) log-probs."""
        return torch.log_softmax(self.logits, -1)
