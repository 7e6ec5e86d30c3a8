"""What a fitted stage depends on, as the name of its directory in the cache."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from torch import nn

from mopo_cli.config.schema import TrainConfig
from mopo_cli.training.cache import _key, weights_hash

if TYPE_CHECKING:
    from mopo_cli.training.inputs import Inputs


def reference_key(config: TrainConfig, inputs: Inputs) -> str:
    """What the SFT reference depends on; inputs.policy has not been trained yet."""
    return _key(
        "reference",
        weights_hash(inputs.policy),
        _texts(inputs, ("train",)),
        asdict(config.sft),
        config.seed,
        *_training(config),
    )


def judge_key(config: TrainConfig, inputs: Inputs) -> str:
    """What the preference model depends on: the reference it starts from (inputs.policy), and the labels it sees."""
    labels = hashlib.sha256()
    for name in ("train", "heldout"):
        for example in inputs.examples[name]:
            labels.update(repr((example.pairs, example.labels)).encode())
    texts = _texts(inputs, ("train", "heldout"))
    settings = asdict(config.preference_model)
    return _key(
        "preference_model",
        weights_hash(inputs.policy),
        texts,
        labels.hexdigest(),
        inputs.data.names,
        settings,
        config.seed,
        *_training(config),
    )


def policy_key(config: TrainConfig, inputs: Inputs, judge: nn.Module, name: str, about: Sequence[object]) -> str:
    """What a policy depends on that a method has trained, from inputs.policy as it is, on the training data."""
    labels = hashlib.sha256()
    for example in inputs.examples["train"]:
        labels.update(repr((example.pairs, example.labels)).encode())
    settings = asdict(config)
    general = {key: settings[key] for key in ("steps", "batch_size", "gradient_accumulation", "optimiser", "seed")}
    return _key(
        f"policy-{name}",
        weights_hash(inputs.policy),
        weights_hash(judge),
        _texts(inputs, ("train", "heldout")),
        labels.hexdigest(),
        inputs.data.names,
        general,
        *_training(config),
        *about,
    )


def _training(config: TrainConfig) -> tuple[object, ...]:
    """How a model is trained, where its weights do not show it: precision, LoRA's dropout, and how many processes share
    a step, each with a batch."""
    model = config.model
    return model.mixed_precision, model.lora.dropout, os.environ.get("WORLD_SIZE", "1")


def _texts(inputs: Inputs, parts: Sequence[str]) -> str:
    """Of the token rows: data, tokenizer and template in one."""
    return " ".join(inputs.tokens[name].digest() for name in parts)
