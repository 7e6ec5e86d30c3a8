"""Preference rows changed at random: each file is read and prepared, or refused with its place, and nothing else."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mopo_cli.base.errors import UserError
from mopo_cli.config.schema import ObjectiveConfig, TokenizerConfig
from mopo_cli.data import prepare
from mopo_cli.data.corpora import pairs
from mopo_cli.data.encoder import Encoder
from mopo_cli.models.tokenizers import train_tokenizer

OBJECTIVES = {"helpful": ObjectiveConfig("primary"), "harmless": ObjectiveConfig()}
TEXTS = (
    "",
    " ",
    "\n",
    "\x00",
    "\x1b[31m",
    "é",
    "日本",
    "\u2028",
    "\ud800",
    "a\udfffb",
    "<pad></s>",
    "x" * 3000,
    "\ufeffa",
)
TEXTS += ("\n\nHuman: a\n\nAssistant: b", "{{ x }}", "[INST] a [/INST]", "\u200b", "\U0001f600", "NaN", "1", "null")
VALUES = (
    None,
    True,
    False,
    0,
    1,
    -1,
    0.5,
    2,
    1e400,
    float("nan"),
    10**30,
    -0.0,
    [],
    {},
    [[]],
    [None],
    {"a": {"b": [1]}},
)
MESSAGES = (
    [{"role": "user", "content": "a"}],
    [{"role": "assistant", "content": "b"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    [{"role": "user"}],
    [{"content": "a"}],
    [{"role": "user", "content": None}],
    [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
    [{"role": 5, "content": "a"}],
    [{"role": ["user"], "content": "a"}],
    ["a"],
    [None],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "tool", "content": "t"}],
)
KEYS = (
    "prompt",
    "chosen",
    "rejected",
    "responses",
    "scores",
    "labels",
    "context",
    "helpful",
    "harmless",
    "system",
    "é",
    "",
)
SEEDS: tuple[dict[str, Any], ...] = (
    {"prompt": "Q?", "responses": ["a", "b"], "scores": {"helpful": [1, 0], "harmless": [0, 1]}},
    {"prompt": "Q?", "responses": ["a", "b", "c"], "labels": {"helpful": [[0, 1, 1.0]], "harmless": [[1, 2, 0.5]]}},
    {"prompt": "Q?", "chosen": "a", "rejected": "b", "helpful": 1, "harmless": 0},
    {"chosen": "Q? a", "rejected": "Q? b", "helpful": 1.0, "harmless": 0.0},
    {"chosen": [*MESSAGES[0], *MESSAGES[1]], "rejected": [*MESSAGES[0], {"role": "assistant", "content": "c"}],
     "helpful": 1, "harmless": 0},
    {"prompt": MESSAGES[0], "chosen": MESSAGES[1], "rejected": [{"role": "assistant", "content": "c"}], "helpful": 1,
     "harmless": None},
)  # fmt: skip


def value_of(rng: random.Random) -> Any:
    """Any value that a row may hold by mistake."""
    return rng.choice(rng.choice((TEXTS, VALUES, MESSAGES)))


def mutated(rng: random.Random, value: Any) -> Any:
    """The value with one change somewhere inside."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice([*value, rng.choice(KEYS)])
        if rng.random() < 0.15:
            return {name: inside for name, inside in value.items() if name != key}
        return {**value, key: mutated(rng, value.get(key))}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place, kind = rng.randrange(len(value)), rng.random()
        if kind < 0.15:
            return value[:place] + value[place + 1 :]
        if kind < 0.3:
            return [*value[:place], value_of(rng), *value[place:]]
        return [*value[:place], mutated(rng, value[place]), *value[place + 1 :]]
    if rng.random() < 0.02:
        return nested(value, rng.choice((2, 50, 2000)))
    return value_of(rng)


def nested(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = [value]
    return value


def written(rng: random.Random, row: Any) -> bytes:
    """A row as a line of a file, some of them damaged."""
    text = json.dumps(row, ensure_ascii=rng.random() < 0.7)
    line = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.06:
        place = rng.randint(0, len(line))
        line = (
            line[:place]
            + rng.choice((b"", b"\xff", b"\x00", b"\xed\xa0\x80", b"}", b'"', b"\\u12"))
            + line[place + 1 :]
        )
    return line.replace(b"\n", b" ")


def files(seed: int, count: int) -> Iterator[bytes]:
    """Files of good rows with one that is changed, `count` in all."""
    rng = random.Random(seed)
    good = [{**SEEDS[0], "prompt": f"Question {i}?"} for i in range(12)]
    for _ in range(count):
        row: Any = rng.choice(SEEDS)
        for _ in range(rng.choice((1, 1, 2, 3))):
            row = mutated(rng, row)
        lines = [json.dumps(other).encode() for other in good]
        lines.insert(rng.randrange(len(lines)), written_or_plain(rng, row))
        yield b"\n".join(lines) + b"\n"


def written_or_plain(rng: random.Random, row: Any) -> bytes:
    try:
        return written(rng, row)
    except (RecursionError, ValueError):
        return b'{"prompt": ' + b"[" * 100_000


# --------------------------------------------------------------------------------------------- what is called
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(["Question 1? a b c"] * 4, TokenizerConfig(vocab_size=300))


def wrong(path: Path, encoder: Encoder, invalid: str) -> BaseException | None:
    """What reading and preparing a file raises that is no user's error with its place."""
    dataset = {
        "_target_": f"{pairs.__module__}.{pairs.__name__}", "path": str(path), "invalid": invalid, "max_rows": 1000,
        "heldout_fraction": 0.3, "test_fraction": 0.3,
    }  # fmt: skip
    try:
        data = prepare.load(dataset, OBJECTIVES)
        for part in (data.train, data.heldout, data.test):
            encoder.rows(part, "drop")
    except UserError as error:
        message = str(error)
        placed = path.name in message or message.startswith(("dataset", "objectives"))
        return None if placed and "\n" not in message else AssertionError(f"no place, or not one line: {message!r}")
    except (Exception, RecursionError) as error:
        return error
    return None


def fuzz(seed: int, count: int) -> list[str]:
    """The rows that end in anything else than success or a user's error, with that. Writes rows.jsonl here."""
    rng, found, path = random.Random(seed), [], Path("rows.jsonl")
    encoder = Encoder(tokenizer(), 4096, "auto")
    for content in files(seed, count):
        path.write_bytes(content)
        invalid = rng.choice(("error", "drop"))
        error = wrong(path, encoder, invalid)
        if error is not None:
            row = next(line for line in content.split(b"\n") if not line.startswith(b'{"prompt": "Question '))
            found.append(f"dataset.invalid={invalid} {row[:2000]!r}: {type(error).__name__}: {str(error)[:300]}")
    return found
