"""What a run works on: data, encoded rows, an untrained policy and the method, checked before anything is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mopo_cli.algorithms.contract import Method, build_method
from mopo_cli.base.console import say, stage, warn
from mopo_cli.base.errors import UserError
from mopo_cli.base.types import Example, PreferenceData
from mopo_cli.config.schema import TrainConfig
from mopo_cli.data.batches import Collator
from mopo_cli.data.encoder import Encoder
from mopo_cli.data.prepare import as_text, load
from mopo_cli.data.table import TokenTable
from mopo_cli.models.attention import attend_by_rows
from mopo_cli.models.load import load_policy
from mopo_cli.models.logprobs import can_pack
from mopo_cli.models.tokenizers import load_tokenizer
from mopo_cli.runs.directory import RunDirectory
from mopo_cli.training import cache

LONG = 128  # tokens of a row, on average, from which attention to each apart beats padding; not on a GPU
TEXT = 5_000_000  # characters, at most, that a tokenizer is trained on


@dataclass
class Inputs:
    """Data and untrained models, checked before anything is written."""

    data: PreferenceData
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    policy: nn.Module
    collate: Collator
    tokens: dict[str, TokenTable]
    examples: dict[str, list[Example]]
    method: Method


def prepare_inputs(config: TrainConfig, run: RunDirectory | None = None) -> Inputs:
    """Data and an untrained policy; with the tokenizer of a finished run, where there is one, else a new one."""
    with stage("data and model", 1) as progress:
        data = load(config.dataset, config.objectives)
        if run is None:
            tokenizer = load_tokenizer(config.model, texts_of(data.train))
        else:
            tokenizer = AutoTokenizer.from_pretrained(run.model)
        policy = load_policy(config.model, tokenizer, config.seed)
        method = build_method(config, data.names, data.thresholds)
        encoder = Encoder(tokenizer, config.model.max_length, config.model.chat_template)
        encoder.room = encoder.condition_tokens(method.longest_condition)
        encoded = {name: _encoded(config, encoder, getattr(data, name)) for name in ("train", "heldout", "test")}
        progress.advance(1)
    for note in (data.provenance.get(name) for name in ("sample", "test_sample")):
        if note:
            say(f"data: {note}")
    for name, (rows, _) in encoded.items():
        if not rows:
            raise UserError(
                f"no {name} row fits the context of {config.model.max_length} tokens; raise model.max_length"
            )
    if config.model.init == "pretrained" and not config.model.lora.r and config.optimiser.learning_rate > 1e-4:
        warn(
            f"optimiser.learning_rate={config.optimiser.learning_rate:g} suits a small model from scratch; full "
            "fine-tuning of a pretrained one wants about 1e-5: use hparams=pretrained"
        )
    packed = can_pack(policy, config.model.max_length)
    if not packed:
        name = config.model.name or config.model.path
        say(f"{name}: its attention takes no packed mask; each response is encoded behind a prompt of its own")
    check_budget(config.token_budget, encoded)
    rows = encoded["train"][0]
    long = int(rows.lengths.sum()) > LONG * len(rows)
    on_cpu = not torch.cuda.is_available()
    apart = packed and long and on_cpu and not config.model.compile and attend_by_rows(policy)
    return Inputs(
        data,
        tokenizer,
        encoder,
        policy,
        Collator(int(tokenizer.pad_token_id), packed, apart, config.token_budget),  # type: ignore[arg-type]
        {name: rows for name, (rows, _) in encoded.items()},
        {name: examples for name, (_, examples) in encoded.items()},
        method,
    )


def check_budget(budget: int | None, encoded: dict[str, tuple[TokenTable, list[Example]]]) -> None:
    """UserError where a row alone is above the token budget; it names the longest."""
    for rows, examples in encoded.values():
        longest = int(rows.lengths.argmax())
        size = int(rows.lengths[longest])
        if budget is not None and size > budget:
            row = rows[longest]
            raise UserError(
                f"token_budget={budget}: {examples[longest].source} alone has {size} tokens (a prompt of "
                f"{len(row.prompt)} with {len(row.responses)} responses of {size - len(row.prompt)}); give {size} or "
                "more, or leave long rows out by a smaller model.max_length with dataset.overlong=drop"
            )


def _encoded(config: TrainConfig, encoder: Encoder, examples: Sequence[Example]) -> tuple[TokenTable, list[Example]]:
    overlong = str(config.dataset.get("overlong") or "error")
    return encoder.fitting(cache.encoded(config.cache, encoder, examples), examples, overlong)


def texts_of(examples: Sequence[Example]) -> Iterator[str]:
    """What a tokenizer trained on the data sees: prompts as they are rendered, and responses.

    Of much text it sees every second example, or every third and so on: its words are known long before the end, and
    training takes time and memory in proportion.
    """
    size = sum(len(str(text)) for example in examples for text in (example.prompt, *example.responses))
    examples = examples[:: -(-size // TEXT) or 1]
    yield from (as_text(example.prompt) + "\n" for example in examples)
    yield from (as_text(response) for example in examples for response in example.responses)
