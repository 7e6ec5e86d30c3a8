"""Texts to token ids, and rows to padded batches. Batches are a pure function of (seed, step), so a run can resume."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from itertools import chain

import numpy as np
from transformers import PreTrainedTokenizerBase

from mopo_cli.base.console import count_rows
from mopo_cli.base.errors import UserError
from mopo_cli.base.processes import ONE_THREAD, TOKENIZERS
from mopo_cli.base.types import Example, Text
from mopo_cli.data.batches import BLOCK_ROWS
from mopo_cli.data.prepare import transcript
from mopo_cli.data.table import TableBuilder, TokenRow, TokenTable
from mopo_cli.data.templates import frame_tokens, render, turns_of

KINDS = ("prompt", "templated", "response", "answer", "closed")  # of texts: two of prompts, three of responses


class Encoder:
    """Renders and tokenises prompts and responses for one tokenizer.

    A `condition` is what a policy is told of the user's wishes: it stands in front of each prompt, as a line of its own
    or as a conversation's system message. `room` tokens of the context are kept free for it. `ends` are the tokens at
    which a response may end: the tokenizer's, the template's, and the model's own.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        chat_template: str = "auto",
        condition: str = "",
        room: int = 0,
        ends: Iterable[int] = (),
    ):
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.condition, self.room = condition, room
        self.chat_template = chat_template
        self.longest_response = max_length  # tokens; learnt from the rows encoded so far
        self.turns = turns_of(tokenizer)
        self.end_at(ends)
        self._frames = frame_tokens(tokenizer)
        self._longest_seen = 0
        self._ids = lru_cache(16384)(self._encode)  # prompts and responses come again in rows and samples

    def end_at(self, ends: Iterable[int]) -> None:
        """Lets responses end at these tokens as well."""
        self.ends = frozenset((int(self.tokenizer.eos_token_id), self.turns.end, *ends))  # type: ignore[arg-type]
        self._end_texts = tuple(str(self.tokenizer.convert_ids_to_tokens(end)) for end in sorted(self.ends))

    def conditioned(self, condition: str) -> Encoder:
        """This encoder, with `condition` in front of each prompt."""
        if condition == self.condition:
            return self
        other = copy.copy(self)
        other.condition, other._longest_seen = condition, 0
        return other

    def condition_tokens(self, condition: str) -> int:
        """How much longer a prompt may become by a condition, in tokens: its own, and those of a template around it."""
        if not condition:
            return 0
        prompts: list[Text] = ["x", [{"role": "user", "content": "x"}]]
        told = self.conditioned(condition)
        return max(len(told.prompt_ids(prompt, "x")) - len(self.prompt_ids(prompt, "x")) for prompt in prompts) + 1

    def prompt_text(self, prompt: Text, *responses: Text) -> str:
        """The text in front of a prompt's responses.

        A plain prompt to which one of them would be glued is ended by a newline. One that is rendered already is taken
        as it is. A conversation that ends with the assistant is gone on with.
        """
        if self.rendered(prompt):
            if self.condition:
                raise UserError("a prompt that is rendered already cannot be told a condition; give it as messages")
            return str(prompt)
        if self.condition:
            prompt = _told(prompt, self.condition, self._takes_system)
        if isinstance(prompt, str) and self.chat_template != "always":
            ended = not prompt[-1:].strip() or all(not content(response)[:1].strip() for response in responses)
            return prompt if ended else prompt + "\n"
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        begun = _goes_on(messages)
        if not begun and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if getattr(self.tokenizer, "chat_template", None):
            return render(self.tokenizer, messages, opened=True) + ("" if begun else self.turns.lead)
        return transcript(messages) + ("" if begun else "\n")

    def rendered(self, prompt: Text) -> bool:
        """Whether a plain prompt holds its turns as a template would have them: it starts or ends with a special token,
        or with what stands between a question and its answer."""
        if not isinstance(prompt, str):
            return False
        end = prompt.rstrip()
        return bool(
            prompt.lstrip().startswith(self._frames)
            or end.endswith(self._frames)
            or (self.turns.between and end.endswith(self.turns.between))
        )

    @cached_property
    def _takes_system(self) -> bool:
        """Whether the tokenizer's template, where there is one, takes a system message."""
        messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "x"}]
        try:
            if getattr(self.tokenizer, "chat_template", None):
                render(self.tokenizer, messages, opened=True)
        except UserError:
            return False
        return True

    def prompt_ids(self, prompt: Text, *responses: Text) -> list[int]:
        """Token ids of `prompt_text`, never empty: something must predict the response's first token."""
        kind, text = self._prompt_piece(self._form(prompt), prompt, responses)
        return self._opened(self._ids(text, kind == "prompt"), kind)

    def conditioned_prompts(self, asked: Sequence[tuple[Example, str]]) -> list[list[int]]:
        """`prompt_ids` of each example's prompt behind a condition of its own, encoded together."""
        pieces = [self.conditioned(condition)._pieces(example)[0] for example, condition in asked]
        ids = self._encode_pieces(list(dict.fromkeys(pieces)))
        return [ids[piece] for piece in pieces]

    def _form(self, prompt: Text) -> str:
        """Who puts special tokens around a prompt's turns: the "template", whoever "rendered" it before, or nobody."""
        if self.rendered(prompt):
            return "rendered"
        chat = not isinstance(prompt, str) or self.chat_template == "always"
        return "template" if chat and getattr(self.tokenizer, "chat_template", None) else "plain"

    def _prompt_piece(self, form: str, prompt: Text, responses: Sequence[Text]) -> tuple[str, str]:
        """("templated", text) of what brings its own beginning, else ("prompt", text)."""
        text = self.prompt_text(prompt, *responses)
        bos = self.tokenizer.bos_token
        starts = bool(bos) and text.startswith(str(bos))
        begun = form == "template" or (form == "rendered" and (starts or not self.turns.begins))
        return "templated" if begun else "prompt", text

    def _response_piece(self, form: str, prompt: Text, response: Text) -> tuple[str, str]:
        """(kind, text) of a response: "closed" where its end stands in it, "answer" where it ends as the template's
        turns do, else "response"."""
        text = content(response)
        if self.turns.space and form == "template" and text[:1].strip() and not _goes_on(prompt):
            text = self.turns.space + text
        if (stripped := text.rstrip()).endswith(self._end_texts):
            return "closed", stripped
        return "response" if form == "plain" else "answer", text

    @cached_property
    def _closes(self) -> bool:
        """Whether the tokenizer puts the end behind a text of itself."""
        return self._encode("x", True)[-1:] == (self.tokenizer.eos_token_id,)

    def _opened(self, ids: Sequence[int], kind: str) -> list[int]:
        """A prompt's ids without the end that some tokenizers put there, and at least one."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if len(ids) > 1 and ids[-1] == eos and kind == "prompt" and self._closes:
            ids = ids[:-1]
        return list(ids) or [eos if bos is None else bos]  # type: ignore[return-value]

    def response_ids(self, response: Text, prompt: Text = "") -> list[int]:
        """Token ids of a response to a prompt, which tells how it ends."""
        kind, text = self._response_piece(self._form(prompt), prompt, response)
        return self._ended(self._ids(text, False), kind)

    def _ended(self, ids: Sequence[int], kind: str) -> list[int]:
        if kind == "closed" and ids[-1] in self.ends:
            return list(ids)
        return [*ids, int(self.tokenizer.eos_token_id) if kind == "response" else self.turns.end]  # type: ignore[arg-type]

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
        return TokenRow(self.prompt_ids(prompt, *responses), [self.response_ids(r, prompt) for r in responses])

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
        prompt, form = example.prompt, self._form(example.prompt)
        try:
            first = self._prompt_piece(form, prompt, example.responses)
        except UserError as error:
            raise UserError(f"{example.source}: {error}") from error
        return [first, *(self._response_piece(form, prompt, response) for response in example.responses)]

    def _encode_pieces(self, pieces: Sequence[tuple[str, str]]) -> dict[tuple[str, str], list[int]]:
        found: dict[tuple[str, str], list[int]] = {}
        for kind in KINDS:
            texts = [piece for piece in pieces if piece[0] == kind]
            ids = self._encode_all([text for _, text in texts], special=kind == "prompt")
            finish = self._opened if kind in ("prompt", "templated") else self._ended
            found.update(zip(texts, (finish(one, kind) for one in ids), strict=True))
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


def _goes_on(prompt: Text) -> bool:
    """Whether a conversation ends with words of the assistant, which a response goes on with."""
    return not isinstance(prompt, str) and prompt[-1]["role"] == "assistant" and bool(prompt[-1]["content"].strip())
