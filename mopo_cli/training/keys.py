"""What a fitted stage depends on, as the name of its directory in the cache.

Settings enter whole, less those named here that cannot matter to the stage: one that is added later counts.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from mopo_cli.config.schema import TrainConfig
from mopo_cli.models.policy import digest_of
from mopo_cli.training.cache import key_of
from mopo_cli.training.inputs import Inputs

SEEN = (  # settings of the model that its weights and the token rows show, or that change no number
    *("name", "path", "init", "architecture", "tokenizer", "dtype", "max_length", "chat_template"),
    *("trust_remote_code", "revision", "attention", "gradient_checkpointing", "compile"),
)
ADAPTER_SEEN = ("r", "alpha", "target_modules", "quantise")
APART = (  # settings of a run that no policy's training sees, or that its key has by other means
    *("tau", "beta", "epsilon", "t0", "sft", "preference_model", "onpolicy", "sampling", "evaluation", "token_budget"),
    *(
        "log_every",
        "checkpoint_every",
        "cache",
        "run",
        "dataset",
        "model",
        "objectives",
        "algorithm",
        "logger",
        "debug",
    ),
)


def reference_key(config: TrainConfig, inputs: Inputs) -> str:
    """What the SFT reference depends on; inputs.policy has not been trained yet."""
    texts = _texts(inputs, ("train",))
    return key_of("reference", inputs.policy.digest(), texts, asdict(config.sft), config.seed, _training(config))


def judge_key(config: TrainConfig, inputs: Inputs) -> str:
    """What the preference model depends on: the reference it starts from (inputs.policy), and the labels it sees."""
    splits = ("train", "heldout")
    return key_of(
        "preference_model",
        inputs.policy.digest(),
        _texts(inputs, splits),
        _labels(inputs, splits),
        inputs.data.names,
        asdict(config.preference_model),
        config.seed,
        _training(config),
    )


def policy_key(config: TrainConfig, inputs: Inputs, judge: nn.Module, name: str, about: Sequence[object]) -> str:
    """What a policy depends on that an algorithm has trained, from inputs.policy as it is, on the training data."""
    return key_of(
        f"policy-{name}",
        inputs.policy.digest(),
        digest_of(judge),
        _texts(inputs, ("train", "heldout")),
        _labels(inputs, ("train",)),
        inputs.data.names,
        _without(asdict(config), APART),
        _training(config),
        *about,
    )


def _training(config: TrainConfig) -> dict[str, Any]:
    """How a model is trained, where its weights do not show it: precision, LoRA's dropout, and how many processes share
    a step, each with a batch."""
    model = _without(asdict(config.model), SEEN)
    return {**model, "lora": _without(model["lora"], ADAPTER_SEEN), "processes": os.environ.get("WORLD_SIZE", "1")}


def _without(settings: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in names}


def _texts(inputs: Inputs, splits: Iterable[str]) -> str:
    """Of the token rows: data, tokenizer and template in one."""
    return " ".join(inputs.tokens[split].digest() for split in splits)


def _labels(inputs: Inputs, splits: Iterable[str]) -> str:
    labels = hashlib.sha256()
    for split in splits:
        for example in inputs.examples[split]:
            labels.update(repr((example.pairs, example.labels)).encode())
    return labels.hexdigest()
