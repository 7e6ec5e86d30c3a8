"""Fitted stages and encoded rows, kept by content: nothing is fitted or encoded twice from the same data, tokenizer,
weights and settings."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TypeVar

import numpy as np
import tokenizers
import torch
import transformers
from accelerate import Accelerator
from filelock import FileLock
from torch import Tensor

from mopo_cli import __version__
from mopo_cli.base.console import say, warn
from mopo_cli.base.errors import NotFiniteError, UserError
from mopo_cli.base.files import CHECKSUMS, damage, seal, whole
from mopo_cli.base.processes import agree
from mopo_cli.base.text import first_line
from mopo_cli.base.types import Example
from mopo_cli.data.encoder import Encoder
from mopo_cli.data.table import TokenRow, TokenTable
from mopo_cli.models.logprobs import all_finite
from mopo_cli.models.policy import Policy

T = TypeVar("T")
WORTH_KEEPING = 8_000_000  # characters of prompts and responses, below which encoding them anew is as fast


def kept_logps(
    accelerator: Accelerator | None, root: str | None, policy: Policy, rows: Sequence[TokenRow]
) -> list[Tensor]:
    """(G,) log-probs of each row's responses under a policy as it is: from an earlier run, else computed and kept.

    Without an accelerator this process works for itself. Raises NotFiniteError where one is NaN or infinite.
    """

    def fit() -> list[Tensor]:
        logps = policy.logps(rows)
        if not all_finite(logps):
            raise NotFiniteError(
                "log-probs of the data's responses are not finite under the model as it is: its weights are out of "
                "bounds (lower the learning rate that they were trained with), or model.dtype is too narrow for them"
            )
        return logps

    def save(logps: list[Tensor], path: Path) -> None:
        with whole(path) as place:
            np.save(place / "logps.npy", torch.cat(logps).numpy())

    def load(path: Path) -> list[Tensor]:
        values = torch.from_numpy(np.load(path / "logps.npy"))
        return list(values.split([len(row.responses) for row in rows]))

    def key() -> str:
        return key_of("logps", policy.digest(), _rows_hash(rows))

    return kept(accelerator, root, key, fit, save, load)


def _rows_hash(rows: Sequence[TokenRow]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((row.prompt, row.responses)).encode())
    return digest.hexdigest()


def key_of(kind: str, *parts: object) -> str:
    """A directory's name: what is in it, and a hash of all that it depends on."""
    versions = (__version__, torch.__version__, transformers.__version__)
    return f"{kind}-{hashlib.sha256(json.dumps([versions, *parts], default=str).encode()).hexdigest()[:20]}"


@contextmanager
def _held(root: Path, key: str) -> Iterator[None]:
    """Holds root/key: whoever comes second waits, and finds what the first has left."""
    root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / f".{key}.lock", thread_local=False)
    with suppress(NotImplementedError):  # a file system without locks
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


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
            if _intact(path):
                say(f"tokens: from {path}")
            else:
                _leave(encoder.table(examples).save, path)
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
    settings = (
        encoder.chat_template,
        encoder.condition,
        sorted(encoder.ends),
        type(tokenizer).__name__,
        tokenizers.__version__,
    )
    return key_of("tokens", about, settings, digest.hexdigest())


def kept(
    accelerator: Accelerator | None,
    root: str | None,
    key: Callable[[], str],
    fit: Callable[[], T],
    save: Callable[[T, Path], None],
    load: Callable[[Path], T],
    own: Path | None = None,
) -> T:
    """A stage's result: loaded from the run's `own` directory or from root/key, else fitted anew and left in both.

    `save` writes a whole directory or none. Both places have checksums: what is torn is thrown away and fitted anew.
    The run gets links to the cache's files, so it stays whole if the cache goes; nothing is written into either, only
    in its place.
    """

    def there(place: Path, old: bool = False) -> bool:
        return _intact(place, old) if accelerator is None else agree(accelerator, lambda: _intact(place, old))

    if own is not None and there(own, old=True):
        return _loaded(load, own)
    main = accelerator is None or accelerator.is_main_process
    if root is None:
        result = fit()
        if own is not None and main:
            _leave(lambda place: save(result, place), own)
        return result
    path = Path(root).expanduser() / key()
    with _held(path.parent, path.name) if main else nullcontext():
        if there(path):
            result = _loaded(load, path)
        else:
            result = fit()
            if main:
                _leave(lambda place: save(result, place), path)
    if own is not None and main:
        _link(path, own)
    return result


def _intact(path: Path, old: bool = False) -> bool:
    """Whether a result is there, as it was written; one that is damaged is thrown away, with a warning.

    old: also one without checksums, as version 0.1 left them in runs.
    """
    if not path.is_dir() or (old and not (path / CHECKSUMS).exists()):
        return path.is_dir()
    if (reason := damage(path)) is None:
        return True
    warn(f"{path}: {reason}; it is thrown away, and made anew")
    shutil.rmtree(path)
    return False


def _loaded(load: Callable[[Path], T], path: Path) -> T:
    """UserError where it cannot be read: whole by its checksums, or without any."""
    try:
        return load(path)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of safetensors, torch, peft or transformers
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{path}: cannot be read ({reason}); remove it, and it is made anew") from error


def _leave(save: Callable[[Path], None], path: Path) -> None:
    """What `save` writes, with its checksums; whole or absent."""
    with whole(path) as place:
        save(place)
        seal(place)


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
