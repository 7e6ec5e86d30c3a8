"""Policies of models that tests make."""

from __future__ import annotations

from typing import Any

from torch import nn

from mopo_cli.data.batches import Collator
from mopo_cli.data.encoder import Encoder
from mopo_cli.models.policy import Policy


def asking(model: nn.Module, tokenizer: Any = None, packed: bool = True) -> Policy:
    """A policy of a model; without a tokenizer it cannot be asked by texts, nor saved."""
    encoder: Any = None if tokenizer is None else Encoder(tokenizer, 64)
    return Policy(model, encoder, Collator(0, packed))
