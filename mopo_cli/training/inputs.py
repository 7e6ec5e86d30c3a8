"""What a run works on: data, encoded rows and an untrained policy, checked before anything is written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mopo_cli.base.console import say, stage, warn
from mopo_cli.base.errors import UserError
from mopo_cli.base.types import Example, PreferenceData
from mopo_cli.config.schema import TrainConfig
from mopo_cli.data.columns import UNREAD
from mopo_cli.data.prepare import SEEN, as_text, load
from mopo_cli.data.table import TokenTable
from mopo_cli.models.policy import Policy
from mopo_cli.models.tokenizers import load_tokenizer
from mopo_cli.training import cache

TEXT = 5_000_000  # characters, at most, that a tokenizer is trained on
LONGEST = 50_000  # characters that one text adds to them
RUN = 1000  # characters without the end of a sentence, or of nothing else, from which a text is cut up
_LONG_RUN = re.compile(rf"[^.!?\n]{{{RUN}}}|[.!?\n]{{{RUN}}}")
SPLITS = ("train", "heldout", "test")


@dataclass
class Inputs:
    """Data and the policy, with the token rows and examples of each split that fit the policy's context."""

    data: PreferenceData
    policy: Policy
    tokens: dict[str, TokenTable]
    examples: dict[str, list[Example]]


def prepare_inputs(config: TrainConfig, longest_condition: str = "") -> Inputs:
    """Data, policy and encoded rows, with room for the longest condition that the policy will be told.

    Raises UserError where they do not fit each other.
    """
    with stage("data and model", 1) as progress:
        data = load(config.dataset, config.objectives)
        tokenizer = load_tokenizer(config.model, texts_of(data.train))
        policy = Policy.load(config.model, tokenizer, config.seed, config.token_budget)
        inputs = encode(config, data, policy, longest_condition)
        progress.advance(1)
    _say_notes(config, inputs)
    _check_sizes(config, inputs)
    return inputs


def encode(config: TrainConfig, data: PreferenceData, policy: Policy, longest_condition: str) -> Inputs:
    """The rows of each split that fit the context, in the layout that suits them."""
    policy.encoder.room = policy.encoder.condition_tokens(longest_condition)
    overlong = str(config.dataset.get("overlong") or "error")
    tokens, examples = {}, {}
    for split in SPLITS:
        of_split = getattr(data, split)
        table = cache.encoded(config.cache, policy.encoder, of_split)
        tokens[split], examples[split] = policy.encoder.fitting(table, of_split, overlong)
    if len(tokens["train"]) and not config.model.compile:
        policy.attend_apart(tokens["train"])
    return Inputs(data, policy, tokens, examples)


def _say_notes(config: TrainConfig, inputs: Inputs) -> None:
    """What a user should know of data and model before hours are spent on them."""
    found = inputs.data.provenance
    for key in ("sample", "test_sample"):
        if note := found.get(key):
            say(f"data: {note}")
    if unread := found.get(UNREAD):
        say(f"data: columns that nothing reads: {', '.join(map(str, unread))}")  # type: ignore[call-overload]
    if rendered := sum(inputs.policy.encoder.rendered(example.prompt) for example in inputs.examples["train"]):
        say(
            f"data: {rendered:,} of {len(inputs.examples['train']):,} training prompts are rendered already, with "
            "special tokens around their turns: they are taken as they are"
        )
    if seen := found.get(SEEN):
        warn(
            f"{seen} test prompts are in the training or held-out rows as well, so the win rates on the test set will "
            "flatter; take them out of one"
        )
    if config.model.init == "pretrained" and not config.model.lora.r and config.optimiser.learning_rate > 1e-4:
        warn(
            f"optimiser.learning_rate={config.optimiser.learning_rate:g} suits a small model from scratch; full "
            "fine-tuning of a pretrained one wants about 1e-5: use hparams=pretrained"
        )
    if config.model.dtype == "bfloat16" and not config.model.lora.r:
        warn(
            "model.dtype=bfloat16: weights with 8 bits of precision lose most small updates; model.dtype=float32 with "
            "model.mixed_precision=bf16 keeps them, and is as fast"
        )
    if not inputs.policy.collate.packed:
        name = config.model.name or config.model.path
        say(f"{name}: its attention takes no packed mask; each response is encoded behind a prompt of its own")


def _check_sizes(config: TrainConfig, inputs: Inputs) -> None:
    """UserError where a split is left without rows, or where a row alone is above the token budget."""
    for split, rows in inputs.tokens.items():
        if not rows:
            raise UserError(
                f"no {split} row fits the context of {config.model.max_length} tokens; raise model.max_length"
            )
    for split, rows in inputs.tokens.items():
        check_budget(config.token_budget, rows, inputs.examples[split])


def check_budget(budget: int | None, rows: TokenTable, examples: Sequence[Example]) -> None:
    """UserError where a row alone is above the token budget; it names the longest."""
    longest = int(rows.lengths.argmax())
    size = int(rows.lengths[longest])
    if budget is not None and size > budget:
        row = rows[longest]
        raise UserError(
            f"token_budget={budget}: {examples[longest].source} alone has {size} tokens (a prompt of "
            f"{len(row.prompt)} with {len(row.responses)} responses of {size - len(row.prompt)}); give {size} or "
            "more, or leave long rows out by a smaller model.max_length with dataset.overlong=drop"
        )


def texts_of(examples: Sequence[Example]) -> Iterator[str]:
    """What a tokenizer trained on the data sees: prompts as they are rendered, and responses.

    Of much text it sees every second example, or every third and so on: its words are known long before the end, and
    training takes time and memory in proportion.
    """
    size = sum(min(len(str(text)), LONGEST) for e in examples for text in (e.prompt, *e.responses))
    examples = examples[:: -(-size // TEXT) or 1]
    for example in examples:
        yield from _cut(as_text(example.prompt) + "\n")
    for example in examples:
        for response in example.responses:
            yield from _cut(as_text(response))


def _cut(text: str) -> Iterator[str]:
    """The text, as far as a tokenizer learns from it, in pieces where something in it is no sentence: training takes
    the square of the longest word or sentence."""
    text = text[:LONGEST]
    if len(text) <= RUN or not _LONG_RUN.search(text):
        yield text
        return
    for start in range(0, len(text), RUN):
        yield text[start : start + RUN]
