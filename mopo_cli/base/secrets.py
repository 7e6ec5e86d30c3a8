"""Secrets in what is written down: a token in a command, an address or a config becomes MASK.

What cannot be told from an ordinary value (a bare password under a name of its own) stays as it is.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")
MASK = "MASKED-SECRET"  # as a shell, YAML, Hydra and an address take it without quotes
NAME = (
    r"(?:(?:[a-z0-9]+[_-])*"  # aws_, x-amz-
    r"(?:api[_-]?key|access[_-]?key(?:[_-]?id)?|private[_-]?key|secret(?:[_-][a-z0-9]+)*|pass(?:word|wd|phrase)|pwd|"
    r"credentials?|signature|(?:access|api|auth|bearer|gh|github|gitlab|hf|hub|id|private|refresh|security|session|"
    r"wandb)[_-]?token)|token)"
)
NAMED = re.compile(NAME, re.IGNORECASE)
SHAPES = (  # a secret's shape, and what takes its place
    (re.compile(r"(?<=://)[^\s/@?#'\"]+@"), f"{MASK}@"),  # of whoever an address logs in as
    (re.compile(rf"(?<![A-Za-z0-9_])({NAME})([=:]|%3D)[^\s&,;'\"}})\]]+", re.IGNORECASE), rf"\1\2{MASK}"),
    (re.compile(rf"([{{,]\s*{NAME}\s*:\s*)[^\s,}}]+", re.IGNORECASE), rf"\1{MASK}"),
    (re.compile(r"(?<=[?&])(sig|key)=[^\s&'\"]+", re.IGNORECASE), rf"\1={MASK}"),
    (re.compile(r"(?<![A-Za-z0-9])(key[=:]\s?)[0-9a-f]{40}(?![0-9a-f])", re.IGNORECASE), rf"\1{MASK}"),  # W&B
    (re.compile(r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{16,}"), MASK),
    (re.compile(r"(?<![A-Za-z0-9])sk-[A-Za-z0-9_-]{16,}"), MASK),
    (re.compile(r"(?<![A-Za-z0-9])(?:gh[pousr]_|github_pat_|glpat-|wandb_v1_|xox[abprs]-)[\w-]{16,}"), MASK),
    (re.compile(r"(?<![A-Za-z0-9])(?:AKIA|ASIA)[0-9A-Z]{16}(?![0-9A-Z])"), MASK),  # AWS
    (re.compile(r"(?<![A-Za-z0-9])eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+"), MASK),  # a JSON web token
    (re.compile(r"(?<=[Bb]earer )[\w.~+/-]{12,}=*"), MASK),
)


def masked(value: T, name: str = "") -> T:
    """The value with MASK for each secret in its texts, at any depth; `name` is the key that it stands under."""
    if isinstance(value, dict):
        return {key: masked(item, str(key)) for key, item in value.items()}  # type: ignore[return-value]
    if isinstance(value, list | tuple):
        return type(value)(masked(item, name) for item in value)  # type: ignore[return-value,call-arg]
    if value in (None, "") or isinstance(value, bool):
        return value
    if isinstance(value, str | int) and NAMED.fullmatch(name):
        return MASK  # type: ignore[return-value]
    return _masked_text(value) if isinstance(value, str) else value  # type: ignore[return-value]


def _masked_text(text: str) -> str:
    for shape, instead in SHAPES:
        text = shape.sub(instead, text)
    return text


def masked_command(words: Sequence[str]) -> str:
    """A command as a shell takes it, without the secrets in its overrides."""
    return shlex.join(map(_masked_word, words))


def _masked_word(word: str) -> str:
    key, equals, _ = word.partition("=")
    return f"{key}={MASK}" if equals and NAMED.fullmatch(key.rpartition(".")[2]) else _masked_text(word)


def holds_masked(value: Any) -> bool:
    """Whether a secret of it was masked when it was written, so that the value itself is not known any more."""
    if isinstance(value, dict):
        return any(map(holds_masked, value.values()))
    if isinstance(value, list | tuple):
        return any(map(holds_masked, value))
    return isinstance(value, str) and MASK in value
