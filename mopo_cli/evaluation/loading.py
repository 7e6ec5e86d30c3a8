"""Finished runs and plain models as policies that can be asked, and preference models as judges."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from mopo_cli.base.errors import UserError
from mopo_cli.base.files import CHECKSUMS, damage, read_record
from mopo_cli.base.types import PreferenceData
from mopo_cli.config.schema import ModelConfig
from mopo_cli.data.encoder import Encoder
from mopo_cli.data.prepare import as_text
from mopo_cli.evaluation.entrants import Entrant
from mopo_cli.evaluation.records import Models
from mopo_cli.judging.judges import PreferenceFeatures
from mopo_cli.models.policy import Policy
from mopo_cli.models.preference import load_preference_model
from mopo_cli.models.tokenizers import load_tokenizer, saved_tokenizer
from mopo_cli.runs.directory import RunDirectory


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """A UserError where what is read from `path` is torn, or was written under another config or version.

    Where it has checksums, these are looked at first.
    """
    if (path / CHECKSUMS).exists() and (reason := damage(path)) is not None:
        raise UserError(f"{path}: {reason}")
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of safetensors, torch, peft or transformers
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:2])[:200] if lines else type(error).__name__
        raise UserError(f"{path}: cannot be read, or does not fit the run's config ({reason})") from error


def model_of(entrant: Entrant, plain: ModelConfig) -> ModelConfig:
    """The model config of a run, or `plain` with the path of a plain model."""
    return entrant.trained.model if entrant.trained else replace(plain, path=entrant.path)


def plain_encoder(model: ModelConfig) -> Encoder:
    """Of a model that is no run."""
    return Encoder(load_tokenizer(model, []), model.max_length, model.chat_template)


def encoder_of(entrant: Entrant, model: ModelConfig) -> Encoder:
    if entrant.kind != "run":
        return plain_encoder(model)
    with reading(entrant.run.model):
        tokenizer = saved_tokenizer(entrant.run.model, model.trust_remote_code)
        if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
            raise ValueError("its tokenizer has no end-of-text or no padding token: is tokenizer_config.json whole?")
    return Encoder(tokenizer, model.max_length, model.chat_template)


def fitted_encoder(entrant: Entrant, plain: ModelConfig, data: PreferenceData) -> tuple[Encoder, set[str]]:
    """The entrant's encoder, which has seen the data's lengths, and the prompts that fit it."""
    encoder = encoder_of(entrant, model_of(entrant, plain))
    encoder.room = encoder.condition_tokens(entrant.condition)
    fitting = [encoder.rows(part, "drop")[1] for part in (data.train, data.heldout, data.test) if part]
    return encoder, {as_text(example.prompt) for part in fitting for example in part}


def load_policy(config: ModelConfig, encoder: Encoder, seed: int) -> Policy:
    """The model of a config, on the accelerator where there is one, to be asked by an encoder."""
    policy = Policy.load(config, encoder.tokenizer, seed)
    encoder.end_at(policy.encoder.ends)
    policy.encoder = encoder
    if torch.cuda.is_available() and not config.lora.quantise:
        policy.model.to("cuda")
    return policy


def load_run(
    entrant: Entrant, encoder: Encoder, judges: bool, compared: bool
) -> tuple[Models, PreferenceFeatures | None]:
    """A run's policy, and its preference model with `judges`; its first reference is known only if it is `compared`."""
    assert entrant.trained is not None
    run, config = entrant.run, entrant.trained
    policy = load_policy(config.model, encoder, config.seed)
    features = load_features(run, policy) if judges else None
    if compared and run.reference.is_dir():
        with reading(run.reference):
            policy.load_weights(run.reference)
    initial = policy.snapshot() if compared else {}
    with reading(run.model):
        policy.load_weights(run.model)
    cache = config.cache if config.cache and Path(config.cache).is_dir() else None
    return Models(policy, initial, entrant.condition, cache), features


def judged_objectives(run: RunDirectory) -> list[str]:
    """The objectives that a run's preference model judges."""
    return list(read_record(run.preference_model / "preference_model.json").get("objectives", []))


def load_features(run: RunDirectory, policy: Policy) -> PreferenceFeatures:
    """The preference model of a run, on the architecture of its policy; UserError where there is none."""
    if not (run.preference_model / "preference_model.json").is_file():
        raise UserError(f"{run.preference_model}: no preference model there, which would judge")
    with reading(run.preference_model):
        model, _ = load_preference_model(run.preference_model, policy.model)
    return PreferenceFeatures(model, judged_objectives(run), policy.encoder, policy.collate)
