"""A policy or a classifier with its tokenizer: from the hub, a local directory, or (a policy) with random weights."""

from __future__ import annotations

import difflib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mopo_cli.base.errors import UserError
from mopo_cli.base.text import two_lines
from mopo_cli.config.schema import LoraConfig, ModelConfig
from mopo_cli.data.templates import special_ids, turns_of
from mopo_cli.models.hub import (
    OLDER_KEYS,
    base_of_adapter,
    cannot_build,
    cannot_load,
    hub_arguments,
    is_local,
    read_config,
    source,
    weight_arguments,
    with_key,
)
from mopo_cli.models.parts import ADAPTER, backbone_of, check_complete, compute_in, lora_of, unwrap

NOT_PLAIN = (  # of a LoRA's config: what has more than a sum of two factors
    *("use_dora", "modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters", "lora_bias"),
    *("use_qalora", "alora_invocation_tokens", "bias"),
)


# --------------------------------------------------------------------------------------------- models
def load_policy(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """The causal language model to align, with LoRA adapters where asked; what is random is drawn from `seed`.

    Dropout is off: the log-probs of policy and reference are compared, and noise in one of them is no signal. Raises
    UserError where the model cannot be had, or does not fit the tokenizer or model.max_length.
    """
    _check_lora(config.lora)
    random = config.init == "random"
    built = _described_config(config, tokenizer) if random and config.architecture else read_config(config)
    _check_fits(config, built, tokenizer)
    _disable_dropout(built)
    model = _random_model(config, built, seed) if random else _pretrained_model(config, built)
    model.config.use_cache = False
    # A fresh one: a checkpoint's own (temperature, repetition penalty) would sample from something else than pi.
    ends = _ends(tokenizer, *(() if random else (model.generation_config, model.config, built.get_text_config())))
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        bos_token_id=tokenizer.bos_token_id,
    )
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    if config.mixed_precision == "bf16":
        compute_in(model, torch.bfloat16)
    if config.lora.r:
        below = None if random else base_of_adapter(config)
        with _seeded(seed):
            model = add_lora(model, config.lora) if below is None else continued(model, config)
        _name_base(model, below or config)
    if config.compile:
        _compile(model)
    return model


def _ends(tokenizer: PreTrainedTokenizerBase, *told: GenerationConfig | PreTrainedConfig | None) -> list[int]:
    """The tokens at which a response ends: the tokenizer's, the one its template puts behind an answer, and those that
    a pretrained model's own settings name, where the tokenizer has them as special tokens."""
    found = [int(tokenizer.eos_token_id), turns_of(tokenizer).end]  # type: ignore[arg-type]
    special = special_ids(tokenizer)
    for settings in told:
        ends = getattr(settings, "eos_token_id", None)
        found += [end for end in (ends if isinstance(ends, list | tuple) else [ends]) if end in special]
    return list(dict.fromkeys(found))


def ends_of(model: nn.Module) -> list[int]:
    """The tokens at which the responses of a loaded policy end."""
    ends = unwrap(model).generation_config.eos_token_id  # type: ignore[union-attr]
    return list(ends) if isinstance(ends, list | tuple) else [int(ends)]  # type: ignore[arg-type]


def _compile(model: nn.Module) -> None:
    """torch.compile of the transformer, once for all lengths; copies of it (the preference model's) stay plain."""
    if find_spec("torch._inductor") is None or (not torch.cuda.is_available() and not shutil.which("g++")):
        raise UserError("model.compile=true: torch.compile needs a C++ compiler (g++) on this machine; found none")
    backbone = backbone_of(unwrap(model))
    if backbone is not None:
        backbone.compile(dynamic=True)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _described_config(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """model.architecture as transformers' config; a key that this model type does not have is a UserError."""
    values = dict(config.architecture)
    model_type = values.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        close = difflib.get_close_matches(str(model_type), list(CONFIG_MAPPING.keys()), n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UserError(f"model.architecture.model_type={model_type}: transformers knows no such model type{hint}")
    known = {*CONFIG_MAPPING[model_type]().to_dict(), *CONFIG_MAPPING[model_type].attribute_map, *OLDER_KEYS}
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise UserError(f"model.architecture.{key}: a {model_type} has no such value{hint}")
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos", "bos")}
    values.setdefault("vocab_size", 8 * ((len(tokenizer) + 7) // 8))
    try:
        return AutoConfig.for_model(model_type, **{**special, **values})
    except Exception as error:
        raise UserError(f"model.architecture: {two_lines(error)}") from error


def _check_fits(config: ModelConfig, built: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    text = built.get_text_config()
    vocabulary = getattr(text, "vocab_size", None)
    if vocabulary and len(tokenizer) > vocabulary:
        raise UserError(f"model: the tokenizer has {len(tokenizer)} tokens, the model only {vocabulary} embeddings")
    positions = getattr(text, "max_position_embeddings", None)
    if positions and config.max_length > positions:
        raise UserError(f"model.max_length={config.max_length}: the model has {positions} positions at most")


def _disable_dropout(built: PreTrainedConfig) -> None:
    for part in {id(c): c for c in (built, built.get_text_config())}.values():
        for key, value in part.to_dict().items():
            if ("drop" in key) and isinstance(value, float) and value:
                setattr(part, key, 0.0)


def _random_model(config: ModelConfig, built: PreTrainedConfig, seed: int) -> PreTrainedModel:
    with _seeded(seed):
        try:
            return AutoModelForCausalLM.from_config(
                built, dtype=getattr(torch, config.dtype), attn_implementation=config.attention
            )
        except (ImportError, ValueError) as error:
            raise UserError(cannot_build(config, error)) from error


def _pretrained_model(config: ModelConfig, built: PreTrainedConfig) -> PreTrainedModel:
    base = base_of_adapter(config)
    if base is not None:
        below = _pretrained_model(replace(base, lora=LoraConfig(quantise=base.lora.quantise)), built)
        return below if config.lora.r else _merged(below, config)
    weights = weight_arguments(config)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
            source(config),
            config=built,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attention,
            output_loading_info=True,
            **hub_arguments(config),
            **weights,
            **_quantisation(config),
        )
    except Exception as error:
        raise UserError(cannot_load("model", config, error)) from error
    check_complete(report["missing_keys"], f"model.path={config.path}")
    return model


def _quantisation(config: ModelConfig) -> dict[str, Any]:
    if config.lora.quantise is None:
        return {}
    from transformers import BitsAndBytesConfig

    compute = getattr(torch, config.dtype)
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute, bnb_4bit_use_double_quant=True
        )
    }


# --------------------------------------------------------------------------------------------- adapters
def _check_lora(lora: LoraConfig) -> None:
    if lora.r < 0:
        raise UserError(f"model.lora.r={lora.r}: must be 0 (full fine-tuning) or more")
    if lora.quantise not in (None, "4bit"):
        raise UserError(f"model.lora.quantise={lora.quantise}: must be 4bit or null")
    if lora.quantise and not lora.r:
        raise UserError("model.lora.quantise=4bit: 4-bit weights cannot be trained; set model.lora.r (16, say)")
    if lora.quantise and find_spec("bitsandbytes") is None:
        raise UserError("model.lora.quantise=4bit: needs bitsandbytes (pip install 'mopo[quantised]')")


def add_lora(model: PreTrainedModel, lora: LoraConfig) -> PreTrainedModel:
    """Wrap the model in LoRA adapters (QLoRA where it was loaded in 4 bits)."""
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model, prepare_model_for_kbit_training

    if lora.quantise:
        model = prepare_model_for_kbit_training(model)
    peft = PeftLora(
        r=lora.r,
        lora_alpha=int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, peft)  # type: ignore[return-value]
    except ValueError as error:
        raise UserError(f"model.lora.target_modules={lora.target_modules}: {two_lines(error)}") from error


def continued(model: PreTrainedModel, config: ModelConfig) -> PreTrainedModel:
    """LoRA on the adapter at model.path: one adapter over the bare model, which starts as that adapter.

    Its first ranks are the other's, with model.lora.r more beside them, and the scale is model.lora's. So what is saved
    loads on the model that it names, which no adapter on a merged model would.
    """
    first = factors_of(model, config)
    most = max(len(a) for a, _ in first.values())
    lora, scale = config.lora, config.lora.alpha / config.lora.r
    policy = add_lora(model, replace(lora, r=lora.r + most, alpha=scale * (lora.r + most)))
    layers = _lora_layers(policy)
    if lacking := [name for name in first if name not in layers]:
        raise UserError(
            f"model.lora.target_modules={lora.target_modules}: the adapter at model.path={config.path} changes "
            f"{lacking[0]}, too; name that as well, or merge the adapter into its base"
        )
    with torch.no_grad():
        for name, (a, b) in first.items():
            layer = layers[name]
            layer.lora_A[ADAPTER].weight[: len(a)] = a
            layer.lora_B[ADAPTER].weight[:, : len(a)] = b / scale
    return policy


def factors_of(model: PreTrainedModel, config: ModelConfig) -> dict[str, tuple[Tensor, Tensor]]:
    """(r, in) A and (out, r) scaled B of each layer that the adapter at model.path changes; UserError where it is no
    plain LoRA. The model is left without it."""
    from peft import PeftModel

    weight_arguments(config)
    try:
        policy: Any = PeftModel.from_pretrained(model, source(config))
    except Exception as error:
        raise UserError(cannot_load("adapter", config, error)) from error
    about = policy.peft_config[ADAPTER].to_dict()
    layers = _lora_layers(policy)
    special = [key for key in NOT_PLAIN if about.get(key) not in (None, False, "none", [], {})]
    special += [f"{name} in it" for name, layer in layers.items() if ADAPTER not in layer.lora_A]  # embeddings
    special += [] if about.get("peft_type") == "LORA" else [str(about.get("peft_type"))]
    special += ["another one below it"] if base_of_adapter(base_of_adapter(config) or config) is not None else []
    if special:
        raise UserError(
            f"model.path={config.path}: an adapter with {special[0]}, on which no LoRA goes; merge it into its base "
            "first, or train all weights (model.lora.r=0)"
        )
    found = {}
    for name, layer in layers.items():
        a, b = (part[ADAPTER].weight.detach().clone() for part in (layer.lora_A, layer.lora_B))
        found[name] = (a, b * layer.scaling[ADAPTER])
    policy.unload()
    return found


def _lora_layers(policy: Any) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {name: layer for name, layer in unwrap(policy).named_modules() if isinstance(layer, LoraLayer)}


def _name_base(policy: PreTrainedModel, base: ModelConfig) -> None:
    """Writes into the adapter's record what it belongs to, so that it is found from any directory."""
    lora: Any = lora_of(policy)
    if base.path and is_local(base.path):
        lora.base_model_name_or_path = os.path.abspath(os.path.expanduser(base.path))
    if base.revision:
        lora.revision = base.revision


def _merged(model: PreTrainedModel, config: ModelConfig) -> PreTrainedModel:
    from peft import PeftModel

    weight_arguments(config)
    try:
        merged: PreTrainedModel = PeftModel.from_pretrained(model, source(config)).merge_and_unload()  # type: ignore
    except Exception as error:
        raise UserError(cannot_load("adapter", config, error)) from error
    for parameter in merged.parameters():  # the adapter had frozen what is below it
        parameter.requires_grad_(parameter.is_floating_point())
    return merged


# --------------------------------------------------------------------------------------------- classifiers
def load_classifier(
    config: ModelConfig, key: str, outputs: int | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence-classification model and its tokenizer, ready for padded batches; dropout is off.

    outputs: the number of its classes, where its config is known to be wrong about it. Raises UserError where it cannot
    be had, or where weights are missing (its head, say: it is no classifier); `key` is the config key in front of path.
    """
    try:
        path = source(config)
        settings = hub_arguments(config)
        weights = weight_arguments(config)
        tokenizer = AutoTokenizer.from_pretrained(path, **settings)
        model, report = AutoModelForSequenceClassification.from_pretrained(  # type: ignore[misc]
            path,
            dtype=getattr(torch, config.dtype),
            output_loading_info=True,
            **({} if outputs is None else {"num_labels": outputs}),
            **settings,
            **weights,
        )
    except UserError as error:
        raise UserError(with_key(str(error), key)) from None
    except Exception as error:
        raise UserError(with_key(cannot_load("classifier", config, error), key)) from error
    if report["missing_keys"]:  # transformers would draw these at random and go on
        shown = ", ".join(sorted(report["missing_keys"])[:3])
        raise UserError(f"{key}.path={config.path}: no sequence-classification model (its files lack {shown})")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise UserError(f"{key}.path={config.path}: its tokenizer has neither a padding token nor an end token")
    tokenizer.padding_side = "right"
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer
