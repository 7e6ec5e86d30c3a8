"""Texts to token ids, and rows to padded batches. Batches are a pure function of (seed, step), so a run can resume."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from itertools import chain

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from mopo_cli.base.console import count_rows
from mopo_cli.base.errors import UserError
from mopo_cli.base.processes import ONE_THREAD, TOKENIZERS
from mopo_cli.base.types import Example, Text
from mopo_cli.data.batches import BLOCK_ROWS
from mopo_cli.data.prepare import transcript
from mopo_cli.data.table import TableBuilder, TokenRow, TokenTable


class Encoder:
    """Renders and tokenises prompts and responses for one tokenizer.

    A `condition` is what a policy is told of the user's wishes: it stands in front of each prompt, as a line of its own
    or as a conversation's system message. `room` tokens of the context are kept free for it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        chat_template: str = "auto",
        condition: str = "",
        room: int = 0,
    ):
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.condition, self.room = condition, room
        self.chat_template = chat_template
        self.longest_response = max_length  # tokens; learnt from the rows encoded so far
        self._longest_seen = 0
        self._ids = lru_cache(16384)(self._encode)  # prompts and responses come again in rows and samples

    def conditioned(self, condition: str) -> Encoder:
        """This encoder, with `condition` in front of each prompt."""
        if condition == self.condition:
            return self
        other = Encoder(self.tokenizer, self.max_length, self.chat_template, condition, self.room)
        other.longest_response = self.longest_response
        return other

    def condition_tokens(self, condition: str) -> int:
        """How much longer a prompt may become by a condition, in tokens: its own, and those of a template around it."""
        if not condition:
            return 0
        prompts: list[Text] = ["x", [{"role": "user", "content": "x"}]]
        told = self.conditioned(condition)
        return max(len(told.prompt_ids(prompt, "x")) - len(self.prompt_ids(prompt, "x")) for prompt in prompts) + 1

    def prompt_text(self, prompt: Text, response: Text = "") -> str:
        """The text in front of a response. A plain prompt that would be glued to it is ended by a newline."""
        if self.condition:
            prompt = _told(prompt, self.condition, self._takes_system)
        if isinstance(prompt, str) and self.chat_template != "always":
            glued = prompt[-1:].strip() and content(response)[:1].strip()
            return prompt + ("\n" if glued else "")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if getattr(self.tokenizer, "chat_template", None):
            try:
                return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)  # type: ignore[return-value]
            except TemplateError as error:
                raise UserError(f"the tokenizer's chat template refuses this prompt: {error}") from error
        return transcript(messages) + "\n"

    @cached_property
    def _takes_system(self) -> bool:
        """Whether the tokenizer's template, where there is one, takes a system message."""
        messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "x"}]
        try:
            if getattr(self.tokenizer, "chat_template", None):
                self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError:
            return False
        return True

    def prompt_ids(self, prompt: Text, response: Text = "") -> list[int]:
        """Token ids of `prompt_text`, never empty: something must predict the response's first token."""
        return self._opened(self._ids(self.prompt_text(prompt, response), not self._templated(prompt)))

    def conditioned_prompts(self, asked: Sequence[tuple[Example, str]]) -> list[list[int]]:
        """`prompt_ids` of each example's prompt behind a condition of its own, encoded together."""
        pieces = [self.conditioned(condition)._pieces(example)[0] for example, condition in asked]
        ids = self._encode_pieces(list(dict.fromkeys(pieces)))
        return [ids[piece] for piece in pieces]

    def _templated(self, prompt: Text) -> bool:
        """Whether the tokenizer's template renders this prompt, with its own special tokens."""
        chat = not isinstance(prompt, str) or self.chat_template == "always"
        return chat and bool(getattr(self.tokenizer, "chat_template", None))

    def _opened(self, ids: Sequence[int]) -> list[int]:
        """A prompt's ids without the end that some tokenizers put there, and at least one."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if len(ids) > 1 and ids[-1] == eos:
            ids = ids[:-1]
        return list(ids) or [eos if bos is None else bos]  # type: ignore[return-value]

    def response_ids(self, response: Text) -> list[int]:
        return [*self._ids(content(response), False), self.tokenizer.eos_token_id]  # type: ignore[list-item,return-value]

    def _encode(self, text: str, special: bool) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=special)["input_ids"])  # type: ignore[arg-type]

    def _encode_all(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        """`_encode` of many texts; a fast tokenizer spreads them over the cores."""
        if not texts:
            return []
        if not self.tokenizer.is_fast:
            return [list(self._encode(text, special)) for text in texts]
        with _tokenizer_threads():
            return self.tokenizer(
                list(texts), add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False
            )["input_ids"]  # type: ignore[return-value]

    def row(self, prompt: Text, responses: Sequence[Text]) -> TokenRow:
        return TokenRow(
            self.prompt_ids(prompt, responses[0] if responses else ""), [self.response_ids(r) for r in responses]
        )

    def rows(self, examples: Sequence[Example], overlong: str = "error") -> tuple[TokenTable, list[Example]]:
        """Token rows of the examples that fit the context, with those examples.

        overlong "error" raises UserError at a row that does not fit; "drop" leaves such rows out.
        """
        return self.fitting(self.table(examples), examples, overlong)

    def table(self, examples: Sequence[Example]) -> TokenTable:
        """The row of every example, however long: `row` of each, in blocks, each text of a block once."""
        built = TableBuilder()
        count_rows(0, "encoded")
        for start in range(0, len(examples), BLOCK_ROWS):
            block = examples[start : start + BLOCK_ROWS]
            pieces = [piece for example in block for piece in self._pieces(example)]
            ids = self._encode_pieces(list(dict.fromkeys(pieces)))
            found = [ids[piece] for piece in pieces]
            sizes = np.fromiter(map(len, found), np.int64, len(found))
            flat = np.fromiter(chain.from_iterable(found), np.int32, int(sizes.sum()))
            built.add(flat, sizes, np.array([1 + len(example.responses) for example in block]))
            count_rows(len(block), "encoded")
        return built.table()

    def _pieces(self, example: Example) -> list[tuple[str, str]]:
        """(kind, text) of a row's prompt and of each response."""
        first = example.responses[0] if example.responses else ""
        try:
            text = self.prompt_text(example.prompt, first)
        except UserError as error:
            raise UserError(f"{example.source}: {error}") from error
        kind = "templated" if self._templated(example.prompt) else "prompt"
        return [(kind, text), *(("response", content(response)) for response in example.responses)]

    def _encode_pieces(self, pieces: Sequence[tuple[str, str]]) -> dict[tuple[str, str], list[int]]:
        found: dict[tuple[str, str], list[int]] = {}
        end = self.tokenizer.eos_token_id
        for kind in ("prompt", "templated", "response"):
            texts = [piece for piece in pieces if piece[0] == kind]
            ids = self._encode_all([text for _, text in texts], special=kind == "prompt")
            finished = ([*one, end] for one in ids) if kind == "response" else map(self._opened, ids)
            found.update(zip(texts, finished, strict=True))  # type: ignore[arg-type]
        return found

    def fitting(
        self, table: TokenTable, examples: Sequence[Example], overlong: str
    ) -> tuple[TokenTable, list[Example]]:
        """The rows that fit the context, with their examples; see `rows`."""
        if overlong not in ("error", "drop"):
            raise UserError(f"dataset.overlong={overlong}: must be error or drop")
        longest = table.longest_responses
        fits = table.prompt_lengths + longest <= self.max_length - self.room
        if not fits.all():
            if overlong == "error":
                self._overlong(table, examples, fits)
            table, longest = table.select(fits), longest[fits]
            examples = [example for example, ok in zip(examples, fits.tolist(), strict=True) if ok]
        self._longest_seen = max(self._longest_seen, int(longest.max(initial=0)))
        self.longest_response = self._longest_seen or self.max_length
        return table, list(examples)

    def _overlong(self, table: TokenTable, examples: Sequence[Example], fits: np.ndarray) -> None:
        i = int(fits.argmin())
        row = table[i]
        raise UserError(
            f"{examples[i].source}: prompt of {len(row.prompt)} tokens with a response of "
            f"{max(map(len, row.responses))} does not fit the context of {self.max_length - self.room} "
            f"(model.max_length{f' less {self.room} for the condition' if self.room else ''}); "
            f"{int((~fits).sum())} of {len(fits)} rows are too long. Set dataset.overlong=drop to leave them out, or "
            "raise model.max_length"
        )


@contextmanager
def _tokenizer_threads() -> Iterator[None]:
    """Lets tokenizers use all cores inside, and none after: a process that forks later must not meet its threads."""
    if os.environ.get(TOKENIZERS, ONE_THREAD) != ONE_THREAD:  # the user's own choice
        yield
        return
    os.environ[TOKENIZERS] = "true"
    try:
        yield
    finally:
        os.environ[TOKENIZERS] = ONE_THREAD


def _told(prompt: Text, condition: str, system: bool) -> Text:
    """The prompt with a condition in front: a line of text, or the (first) system message, or a line of the first
    message where the template knows no system."""
    if isinstance(prompt, str):
        return f"{condition}\n{prompt}"
    if prompt and not system:
        return [{**prompt[0], "content": f"{condition}\n{prompt[0]['content']}"}, *prompt[1:]]
    if prompt and prompt[0]["role"] == "system":
        return [{"role": "system", "content": f"{condition}\n{prompt[0]['content']}"}, *prompt[1:]]
    return [{"role": "system", "content": condition}, *prompt]


def content(response: Text) -> str:
    return response if isinstance(response, str) else response[-1]["content"]
