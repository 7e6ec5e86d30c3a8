"""Weights on disk: a directory that AutoModelForCausalLM (or PEFT) loads, whole or absent."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from mopo_cli.base.files import whole
from mopo_cli.models.parts import ADAPTER, inner, lora_of

ADAPTER_FILE = "adapter_model.safetensors"


def save_model(policy: nn.Module, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Safetensors, config and tokenizer; with LoRA the adapter alone."""
    model = inner(policy)
    cache = model.config.use_cache
    model.config.use_cache = True
    with whole(directory) as place:
        model.save_pretrained(place, safe_serialization=True)
        tokenizer.save_pretrained(place)
    model.config.use_cache = cache


@torch.no_grad()
def load_weights(policy: nn.Module, directory: Path) -> None:
    """Put what `save_model` left in `directory` into a policy of the same shape, but for the rank of LoRA."""
    model = inner(policy)
    saved = saved_weights(model, directory)
    if (directory / ADAPTER_FILE).exists():
        from peft import set_peft_model_state_dict

        set_rank(model, *rank_and_alpha(directory))
        set_peft_model_state_dict(model, saved)
    else:
        model.load_state_dict(saved)


def saved_weights(model: nn.Module, directory: Path) -> dict[str, Tensor]:
    """What `directory` holds, by name: an adapter's weights, or all of a model's."""
    if (directory / ADAPTER_FILE).exists():
        return load_file(directory / ADAPTER_FILE)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=next(model.parameters()).dtype).state_dict()


def rank_and_alpha(directory: Path) -> tuple[int, float]:
    """Of the adapter in `directory`."""
    record = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    return record["r"], record["lora_alpha"]


def set_rank(policy: nn.Module, rank: int, alpha: float) -> None:
    """Gives a policy with LoRA new adapters where its rank or alpha is another; weights must be put in after."""
    model, lora = inner(policy), lora_of(policy)
    if lora is None or (lora.r, lora.lora_alpha) == (rank, alpha):
        return
    wanted = copy.deepcopy(lora)
    wanted.r, wanted.lora_alpha = rank, int(alpha)
    model.delete_adapter(ADAPTER)
    model.add_adapter(ADAPTER, wanted)
    model.set_adapter(ADAPTER)
