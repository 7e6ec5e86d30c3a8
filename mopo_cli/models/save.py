"""Weights on disk: a directory that AutoModelForCausalLM (or PEFT) loads, whole or absent."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from mopo_cli.runs import whole


def _inner(policy: nn.Module) -> nn.Module:
    while hasattr(policy, "module"):
        policy = policy.module  # type: ignore[assignment]
    return policy


def save_model(policy: nn.Module, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Safetensors, config and tokenizer; with LoRA the adapter alone."""
    model = _inner(policy)
    cache = model.config.use_cache  # type: ignore[union-attr]
    model.config.use_cache = True  # type: ignore[union-attr]
    with whole(directory) as place:
        model.save_pretrained(place, safe_serialization=True)  # type: ignore[operator]
        tokenizer.save_pretrained(place)
    model.config.use_cache = cache  # type: ignore[union-attr]


@torch.no_grad()
def load_weights(policy: nn.Module, directory: Path) -> None:
    """Put the weights saved in `directory` by `save_model` into a policy of the same shape."""
    model = _inner(policy)
    adapter = directory / "adapter_model.safetensors"
    if adapter.exists():
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, load_file(adapter))  # type: ignore[arg-type]
        return
    parameter = next(model.parameters())
    saved = AutoModelForCausalLM.from_pretrained(directory, dtype=parameter.dtype)
    model.load_state_dict(saved.state_dict())
