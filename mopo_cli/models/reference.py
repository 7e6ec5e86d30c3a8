"""The reference policy as a snapshot of the trainable parameters, swapped in to compute log-probs.

No second model is held: with LoRA a snapshot is the adapter, with full fine-tuning one copy of the weights on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mopo_cli.data.batches import Collator
from mopo_cli.data.table import TokenRow
from mopo_cli.models.logprobs import all_logps

Snapshot = dict[str, Tensor]


def snapshot(policy: nn.Module) -> Snapshot:
    """A CPU copy of the trainable parameters."""
    return {name: p.detach().to("cpu", copy=True) for name, p in policy.named_parameters() if p.requires_grad}


@torch.no_grad()
def put(policy: nn.Module, weights: Snapshot) -> None:
    """Copy a snapshot into the policy."""
    for name, p in policy.named_parameters():
        if name in weights:
            p.copy_(weights[name])


@contextmanager
def loaded(policy: nn.Module, weights: Snapshot) -> Iterator[nn.Module]:
    """The policy with `weights` in place of its own, which come back at the end."""
    own = {name: p.data for name, p in policy.named_parameters() if name in weights}
    try:
        for name, p in policy.named_parameters():
            if name in weights:
                p.data = weights[name].to(p.device)
        yield policy
    finally:
        for name, p in policy.named_parameters():
            if name in own:
                p.data = own[name]


def reference_logps(policy: nn.Module, weights: Snapshot, rows: Sequence[TokenRow], collate: Collator) -> list[Tensor]:
    """(G,) log pi_ref of each row's responses."""
    with torch.no_grad(), loaded(policy, weights):
        return all_logps(policy, rows, collate)
