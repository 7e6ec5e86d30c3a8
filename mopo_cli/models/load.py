"""A policy or a classifier with its tokenizer: from the hub, a local directory, or (a policy) with random weights."""

from __future__ import annotations

import difflib
import functools
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, get_session
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mopo_cli.config import LoraConfig, ModelConfig, TokenizerConfig
from mopo_cli.errors import UserError
from mopo_cli.models.logprobs import backbone_of, compute_in, unwrap

PAD, EOS = "<pad>", "</s>"
TOKENIZER_FILES = ("*tokeniz*", "*vocab*", "*.model", "*.tiktoken", "merges.txt")
OLDER_KEYS = ("rope_theta", "rope_scaling", "torch_dtype")  # spellings of transformers 4 that it still reads
HUB_TIMEOUT = 5.0  # seconds until the hub counts as unreachable


# --------------------------------------------------------------------------------------------- tokenizers


def load_tokenizer(config: ModelConfig, texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """The model's tokenizer, or one trained on `texts`: where model.tokenizer.train says so, or where random weights
    leave no tokenizer to reach. Raises UserError where there is none, or one that knows no text.
    """
    if _trains_tokenizer(config):
        tokenizer = train_tokenizer(texts, replace(config.tokenizer, vocab_size=_vocabulary(config)))
        tokenizer.model_max_length = config.max_length
    else:
        tokenizer = _pretrained_tokenizer(config)
    if config.chat_template not in ("auto", "always"):
        template = Path(config.chat_template)
        if not template.is_file():
            raise UserError(f"model.chat_template={config.chat_template}: must be auto, always or a Jinja file")
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def _trains_tokenizer(config: ModelConfig) -> bool:
    if config.tokenizer.train and config.init != "random":
        raise UserError(
            "model.tokenizer.train=true needs model.init=random: pretrained weights belong to a tokenizer of their own"
        )
    if config.tokenizer.train or config.init != "random":
        return config.tokenizer.train
    if config.path and _is_local(config.path):
        return not _holds_tokenizer(_source(config))
    return bool(config.architecture) or not config.path


def _holds_tokenizer(directory: str) -> bool:
    return any(next(Path(directory).glob(pattern), None) for pattern in TOKENIZER_FILES)


def _vocabulary(config: ModelConfig) -> int:
    """Tokens to train: those asked for, as far as the architecture has embeddings for them."""
    size = config.architecture.get("vocab_size")
    if size is None and not config.architecture and config.path:
        size = _read_config(config).get_text_config().vocab_size
    return min(config.tokenizer.vocab_size, int(size or config.tokenizer.vocab_size))


def _pretrained_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    path = _source(config)
    # transformers builds an empty tokenizer where the files are missing
    missing = f"model.path={path}: it holds no tokenizer (tokenizer.json, …). Copy the model's tokenizer files there"
    if _is_local(path) and not _holds_tokenizer(path):
        raise UserError(missing)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **_hub_arguments(config))
    except Exception as error:
        raise UserError(_cannot_load("tokenizer", config, error)) from error
    if not set(tokenizer("a word", add_special_tokens=False)["input_ids"]) - {tokenizer.unk_token_id}:
        raise UserError(missing)
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.path={path}: its tokenizer has no end-of-sequence token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> PreTrainedTokenizerFast:
    """A byte-level BPE. With `across_words`, merges may span the spaces inside a sentence (superwords)."""
    tokenizer = Tokenizer(models.BPE())
    if config.across_words:
        sentence = pre_tokenizers.Split(Regex(r"\s*[^.!?\n]+[.!?\n]*|\s+|[.!?\n]+"), behavior="isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([sentence, byte_level])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, bos_token=EOS)


# --------------------------------------------------------------------------------------------- models


def load_policy(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """The causal language model to align, with LoRA adapters where asked; what is random is drawn from `seed`.

    Dropout is off: the log-probs of policy and reference are compared, and noise in one of them is no signal. Raises
    UserError where the model cannot be had, or does not fit the tokenizer or model.max_length.
    """
    _check_lora(config.lora)
    random = config.init == "random"
    built = _described_config(config, tokenizer) if random and config.architecture else _read_config(config)
    _check_fits(config, built, tokenizer)
    _disable_dropout(built)
    model = _random_model(config, built, seed) if random else _pretrained_model(config, built)
    model.config.use_cache = False
    # A fresh one: a checkpoint's own (temperature, repetition penalty) would sample from something else than pi.
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    if config.mixed_precision == "bf16":
        compute_in(model, torch.bfloat16)
    if config.lora.r:
        with _seeded(seed):
            model = add_lora(model, config.lora)
    if config.compile:
        _compile(model)
    return model


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
        raise UserError(f"model.architecture: {_one_line(error)}") from error


def _read_config(config: ModelConfig) -> PreTrainedConfig:
    """The config of the model at model.path (of the base model, where that holds an adapter)."""
    path, base = _source(config), _base_of_adapter(config)
    if base is not None:
        return _read_config(base)
    try:
        built = AutoConfig.from_pretrained(path, **_hub_arguments(config))
    except Exception as error:
        raise UserError(_cannot_load("config", config, error)) from error
    encoder = getattr(built, "is_decoder", True) is False and not built.model_type.startswith("gpt_neox")
    if encoder or getattr(built, "is_encoder_decoder", False):
        raise UserError(f"model.path={path}: a {built.model_type} is no causal (decoder-only) language model")
    return built


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
            raise UserError(_cannot_build(config, error)) from error


def _pretrained_model(config: ModelConfig, built: PreTrainedConfig) -> PreTrainedModel:
    base = _base_of_adapter(config)
    if base is not None:
        return _merged(_pretrained_model(base, built), config)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
            _source(config),
            config=built,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attention,
            output_loading_info=True,
            **_hub_arguments(config),
            **_quantisation(config),
        )
    except Exception as error:
        raise UserError(_cannot_load("model", config, error)) from error
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would draw these at random and go on
        shown = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise UserError(f"model.path={config.path}: {len(missing)} weights are not in its files: {shown}")
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
        lora_alpha=int(lora.alpha),
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, peft)  # type: ignore[return-value]
    except ValueError as error:
        raise UserError(f"model.lora.target_modules={lora.target_modules}: {_one_line(error)}") from error


def _base_of_adapter(config: ModelConfig) -> ModelConfig | None:
    """Where model.path holds nothing but a LoRA adapter: the config of the model below it."""
    path = Path(_source(config))
    record = path / "adapter_config.json"
    if not record.is_file() or (path / "config.json").is_file():
        return None
    try:
        base = json.loads(record.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError) as error:
        raise UserError(f"model.path={config.path}: its adapter_config.json names no base model") from error
    if not base:
        raise UserError(f"model.path={config.path}: an adapter whose base model is not known; merge it into its base")
    return replace(config, path=base, revision=None)


def _merged(model: PreTrainedModel, config: ModelConfig) -> PreTrainedModel:
    from peft import PeftModel

    try:
        merged: PreTrainedModel = PeftModel.from_pretrained(model, _source(config)).merge_and_unload()  # type: ignore
    except Exception as error:
        raise UserError(_cannot_load("adapter", config, error)) from error
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
        path = _source(config)
        settings = _hub_arguments(config)
        tokenizer = AutoTokenizer.from_pretrained(path, **settings)
        model, report = AutoModelForSequenceClassification.from_pretrained(  # type: ignore[misc]
            path,
            dtype=getattr(torch, config.dtype),
            output_loading_info=True,
            **({} if outputs is None else {"num_labels": outputs}),
            **settings,
        )
    except UserError as error:
        raise UserError(_with_key(str(error), key)) from None
    except Exception as error:
        raise UserError(_with_key(_cannot_load("classifier", config, error), key)) from error
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


def _with_key(text: str, key: str) -> str:
    """A message about `model.path` that speaks of another key, and of no random weights."""
    text = re.sub(r"(; )?or (to a hub id; or )?model\.init=random.*", "", text)
    return re.sub(r"(?<![\w./-])model\.(?=(path|revision|trust_remote_code)\b)", f"{key}.", text)


# --------------------------------------------------------------------------------------------- places and messages


def _is_local(path: str) -> bool:
    return path.startswith(("/", ".", "~")) or os.path.isdir(path)


def _source(config: ModelConfig) -> str:
    """model.path, checked where it is a directory."""
    if not config.path:
        raise UserError(
            "model.path: not set. Set model.path=DIR (a model directory) or to a hub id; or model.init=random with a "
            "model.architecture"
        )
    if not _is_local(config.path):
        return config.path
    path = os.path.expanduser(config.path)
    if not os.path.isdir(path):
        raise UserError(f"model.path={config.path}: no such directory")
    if not any((Path(path) / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise UserError(f"model.path={config.path}: not a model directory (it has no config.json)")
    return path


def _hub_arguments(config: ModelConfig) -> dict[str, Any]:
    """What every from_pretrained takes. Without a network only the cache is asked: each try would take 20 seconds."""
    offline = not _is_local(str(config.path)) and not _hub_answers()
    return {
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
        "local_files_only": offline,
    }


@functools.cache
def _hub_answers() -> bool:
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception:  # whatever the HTTP library of this version raises
        return False
    return True


def _cannot_load(what: str, config: ModelConfig, error: BaseException) -> str:
    path, causes = config.path, list(_causes(error))
    if "trust_remote_code" in str(error):
        return f"model.path={path}: its code is not part of transformers; model.trust_remote_code=true runs it"
    if _is_local(str(path)):
        return f"model.path={path}: cannot load its {what}: {_one_line(error)}"
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return (
            f"model.path={path}: a gated model. Accept its licence at https://huggingface.co/{path}, then log in with "
            "`hf auth login` or set HF_TOKEN"
        )
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        return f"model.revision={config.revision}: {path} has no such revision on the hub"
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return (
            f"model.path={path}: no such model on the hub, and no such directory here (a private model needs "
            "`hf auth login`)"
        )
    found = _one_line(error) if _hub_answers() else "the hub does not answer, and it is not in the cache."
    return (
        f"model.path={path}: cannot load the {what} from the hub: {found} To work offline: `hf download {path} "
        "--local-dir DIR` on a machine with a network, then model.path=DIR; or model.init=random for random weights"
    )


def _cannot_build(config: ModelConfig, error: BaseException) -> str:
    key = f"model.attention={config.attention}" if "attn" in str(error) or "ttention" in str(error) else "model"
    return f"{key}: {_one_line(error)}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _one_line(error: BaseException) -> str:
    """The first two lines of a message, as the first is often only a heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) if lines else type(error).__name__
    return text if len(text) <= 300 else text[:297] + "…"
