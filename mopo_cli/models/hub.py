"""Where a model's files come from, and what is said when they cannot be had."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_session, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import AutoConfig, PreTrainedConfig

from mopo_cli.base.errors import UserError
from mopo_cli.base.files import read_record
from mopo_cli.base.secrets import holds_masked
from mopo_cli.base.text import two_lines
from mopo_cli.config.schema import ModelConfig
from mopo_cli.models import gguf

SAFE_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5")
OLDER_KEYS = ("rope_theta", "rope_scaling", "torch_dtype")  # spellings of transformers 4 that it still reads
ADAPTER_RECORD = "adapter_config.json"
WHOLE_WEIGHTS = ("model*.safetensors", "pytorch_model*")  # other tools put a config.json beside an adapter, not these
HUB_TIMEOUT = 5.0  # seconds until the hub counts as unreachable


def read_config(config: ModelConfig) -> PreTrainedConfig:
    """The config of the model at model.path (of the base model, where that holds an adapter)."""
    path, base = source(config), base_of_adapter(config)
    if base is not None:
        return read_config(base)
    try:
        built = AutoConfig.from_pretrained(path, **hub_arguments(config))
    except Exception as error:
        raise UserError(cannot_load("config", config, error)) from error
    encoder = getattr(built, "is_decoder", True) is False and not built.model_type.startswith("gpt_neox")
    if encoder or getattr(built, "is_encoder_decoder", False):
        raise UserError(f"model.path={path}: a {built.model_type} is no causal (decoder-only) language model")
    return built


def base_of_adapter(config: ModelConfig) -> ModelConfig | None:
    """Where model.path holds a LoRA adapter and no whole model: the config of the model below it."""
    path = Path(source(config))
    record = path / ADAPTER_RECORD
    if not record.is_file() or any(next(path.glob(pattern), None) for pattern in WHOLE_WEIGHTS):
        return None
    try:
        values = json.loads(record.read_text(encoding="utf-8"))
        base, revision = values["base_model_name_or_path"], values.get("revision")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"model.path={config.path}: its adapter_config.json names no base model") from error
    if not base:
        raise UserError(f"model.path={config.path}: an adapter whose base model is not known; merge it into its base")
    if os.path.realpath(os.path.expanduser(base)) == os.path.realpath(path):
        raise UserError(f"model.path={config.path}: an adapter that names itself as its base model")
    return replace(config, path=base, revision=revision)


def weight_arguments(config: ModelConfig) -> dict[str, Any]:
    """What from_pretrained takes besides hub_arguments where it reads weights; UserError where a directory has none.

    Of the hub's older models some have pickles only (OPT): of these, tensors are read and nothing else.
    """
    path = source(config)
    if is_local(path):
        check_weights(Path(path), f"model.path={config.path}")
    return {"use_safetensors": True if is_local(path) else None, "weights_only": True}


def with_key(text: str, key: str) -> str:
    """A message about `model.path` that speaks of another key, and of no random weights."""
    text = re.sub(r"(; )?or (to a hub id; or )?model\.init=random.*", "", text)
    return re.sub(r"(?<![\w./-])model\.(?=(path|revision|trust_remote_code)\b)", f"{key}.", text)


# --------------------------------------------------------------------------------------------- places and messages
def is_local(path: str) -> bool:
    return path.startswith(("/", ".", "~")) or path.lower().endswith(".gguf") or os.path.isdir(path)


def source(config: ModelConfig) -> str:
    """model.path, checked where it is a directory; for a GGUF file the directory that it was converted into."""
    if not config.path:
        raise UserError(
            "model.path: not set. Set model.path=DIR (a model directory) or to a hub id; or model.init=random with a "
            "model.architecture"
        )
    if holds_masked(config.path):
        raise UserError(f"model.path={config.path}: its secret was masked when it was written; give the value itself")
    if not is_local(config.path):
        return _of_package(config) or config.path
    path = os.path.expanduser(config.path)
    file = gguf.gguf_in(Path(path))
    if file is not None:
        return str(gguf.converted(file))
    if not os.path.isdir(path):
        raise UserError(f"model.path={config.path}: no such directory")
    if not any((Path(path) / name).is_file() for name in ("config.json", ADAPTER_RECORD)):
        raise UserError(f"model.path={config.path}: not a model directory (it has no config.json)")
    check_adapter(Path(path))
    return path


def _of_package(config: ModelConfig) -> str | None:
    """A model of the hub out of an installed package, where the hub does not answer and its cache does not hold it."""
    file = gguf.packaged(str(config.path))
    if file is None or hub_answers() or try_to_load_from_cache(str(config.path), "config.json") is not None:
        return None
    return str(gguf.converted(file))


def check_weights(directory: Path, what: str) -> None:
    """UserError (naming `what`) where a model's weights are in another form than safetensors: a pickle may run code."""
    if any(next(directory.glob(pattern), None) for pattern in SAFE_WEIGHTS):
        return
    pickles = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
    if not pickles:
        raise UserError(f"{what}: it holds no weights (no file named model.safetensors)")
    raise UserError(
        f"{what}: its weights are in {pickles[0]}; mopo reads safetensors only. Where you trust them, convert them in "
        "Python: transformers.AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(DIR)"
    )


def check_adapter(directory: Path) -> None:
    """UserError where an adapter's config would have PEFT import a module that it names."""
    record = directory / ADAPTER_RECORD
    if record.is_file() and read_record(record).get("megatron_config"):
        raise UserError(f"{record}: megatron_config names a module to import; mopo reads adapters without it")


def hub_arguments(config: ModelConfig) -> dict[str, Any]:
    """What every from_pretrained takes. Without a network only the cache is asked: each try would take 20 seconds."""
    offline = not is_local(str(config.path)) and not hub_answers()
    return {
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
        "local_files_only": offline,
    }


@functools.cache
def hub_answers() -> bool:
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception:  # whatever the HTTP library of this version raises
        return False
    return True


def cannot_load(what: str, config: ModelConfig, error: BaseException) -> str:
    path, causes = config.path, list(_causes(error))
    if "trust_remote_code" in str(error):
        return f"model.path={path}: its code is not part of transformers; model.trust_remote_code=true runs it"
    if is_local(str(path)):
        return f"model.path={path}: cannot load its {what}: {two_lines(error)}"
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
    found = two_lines(error) if hub_answers() else "the hub does not answer, and it is not in the cache."
    return (
        f"model.path={path}: cannot load the {what} from the hub: {found} To work offline: `hf download {path} "
        "--local-dir DIR` on a machine with a network, then model.path=DIR; or model.init=random for random weights"
    )


def cannot_build(config: ModelConfig, error: BaseException) -> str:
    key = f"model.attention={config.attention}" if "attn" in str(error) or "ttention" in str(error) else "model"
    return f"{key}: {two_lines(error)}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
