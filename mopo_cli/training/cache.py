"""Fitted stages and encoded rows, kept by content: nothing is fitted or encoded twice from the same data, tokenizer,
weights and settings."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedConfig

from mopo_cli import __version__
from mopo_cli.base.console import say, warn
from mopo_cli.base.files import whole
from mopo_cli.base.processes import agree
from mopo_cli.base.types import Example
from mopo_cli.data.batches import Collator
from mopo_cli.data.encoder import Encoder
from mopo_cli.data.table import TokenRow, TokenTable
from mopo_cli.models.logprobs import all_logps
from mopo_cli.models.parts import lora_of

UNTOLD = ("architectures", "transformers_version", "use_cache", "dtype", "torch_dtype", "attn_implementation")
WORTH_KEEPING = 8_000_000  # characters of prompts and responses, below which encoding them anew is as fast


def kept_logps(
    accelerator: Accelerator | None, root: str | None, model: nn.Module, rows: Sequence[TokenRow], collate: Collator
) -> list[Tensor]:
    """(G,) log-probs of each row's responses under a model as it is: from an earlier run, else computed and kept.

    Without an accelerator this process works for itself.
    """
    found: list[list[Tensor]] = []

    def compute() -> None:
        found.append(all_logps(model, rows, collate))

    def save(path: Path) -> None:
        with whole(path) as place:
            np.save(place / "logps.npy", torch.cat(found[0]).numpy())

    def load(path: Path) -> None:
        values = torch.from_numpy(np.load(path / "logps.npy"))
        found.append(list(values.split([len(row.responses) for row in rows])))

    def key() -> str:
        return _key("logps", weights_hash(model), _rows_hash(rows))

    fitted(accelerator, root, key, None, compute, save, load)
    return found[0]


def weights_hash(model: nn.Module) -> str:
    """Of every parameter and buffer, with its name, kind and shape, of the scale of adapters, and of what the model's
    config says besides: heads and activations, say."""
    digest = hashlib.sha256()
    for part in model.modules():
        if isinstance(config := getattr(part, "config", None), PreTrainedConfig):
            about = {key: value for key, value in config.to_dict().items() if key not in UNTOLD and key[:1] != "_"}
            digest.update(json.dumps(about, sort_keys=True, default=str).encode())
            break
    if lora := lora_of(model):
        digest.update(f"lora {lora.r} {lora.lora_alpha}".encode())
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _rows_hash(rows: Sequence[TokenRow]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((row.prompt, row.responses)).encode())
    return digest.hexdigest()


def _key(kind: str, *parts: object) -> str:
    """A directory's name: what is in it, and a hash of all that it depends on."""
    versions = (__version__, torch.__version__, transformers.__version__)
    return f"{kind}-{hashlib.sha256(json.dumps([versions, *parts], default=str).encode()).hexdigest()[:20]}"


@contextmanager
def _held(root: Path, key: str) -> Iterator[None]:
    """Holds root/key: whoever comes second waits, and finds what the first has left."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / f".{key}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def encoded(root: str | None, encoder: Encoder, examples: Sequence[Example]) -> TokenTable:
    """The token rows of all examples: encoded, or mapped from root where the same texts have been encoded before.

    Small data, and what a tokenizer without a serial form makes, are encoded each time.
    """
    size = sum(len(str(text)) for example in examples for text in (example.prompt, *example.responses))
    if root is None or size < WORTH_KEEPING or not encoder.tokenizer.is_fast:
        return encoder.table(examples)
    path = Path(root).expanduser() / tokens_key(encoder, examples)
    try:
        with _held(path.parent, path.name):
            if not path.is_dir():
                encoder.table(examples).save(path)
            else:
                say(f"tokens: from {path}")
        return TokenTable.load(path)
    except OSError as error:
        warn(f"cache={root}: encoded rows cannot be kept there ({error.strerror or error})")
        return encoder.table(examples)


def tokens_key(encoder: Encoder, examples: Sequence[Example]) -> str:
    """What the encoded rows depend on, whichever of them fit the context."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((example.prompt, example.responses)).encode("utf-8", "surrogatepass"))
    tokenizer = encoder.tokenizer
    about = tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map  # type: ignore[attr-defined]
    settings = encoder.chat_template, encoder.condition, type(tokenizer).__name__, tokenizers.__version__
    return _key("tokens", about, settings, digest.hexdigest())


def fitted(
    accelerator: Accelerator | None,
    root: str | None,
    key: Callable[[], str],
    own: Path | None,
    fit: Callable[[], None],
    save: Callable[[Path], None],
    load: Callable[[Path], None],
) -> None:
    """A stage's result: from the run's `own` directory, else from root/key, else fitted anew and left in both.

    `save` writes a whole directory or none. The run gets links to the cache's files, so it stays whole if the cache
    goes.
    """
    if own is not None and own.is_dir():
        return load(own)
    main = accelerator is None or accelerator.is_main_process
    if root is None:
        fit()
        if own is not None and main:
            save(own)
        return None
    path = Path(root).expanduser() / key()
    with _held(path.parent, path.name) if main else nullcontext():
        if path.is_dir() if accelerator is None else agree(accelerator, path.is_dir):
            load(path)
        else:
            fit()
            if main:
                save(path)
    if own is not None and main:
        _link(path, own)
    return None


def _link(source: Path, target: Path) -> None:
    """A copy of a directory that shares its files where the file system can; whole or absent."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        shutil.copytree(source, temporary, copy_function=os.link)
    except (OSError, shutil.Error):  # another file system
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(source, temporary)
    temporary.rename(target)
