"""Rows of chat models: which token ends an answer, rows that are rendered already, answers that are begun."""

from __future__ import annotations

from typing import Any

import pytest
from chats import CHATS, chat_tokenizer

from mopo_cli.base.errors import UserError
from mopo_cli.data.encoder import Encoder

ASKED: list[dict[str, str]] = [{"role": "user", "content": "is it blue?"}]
BEGUN = [*ASKED, {"role": "assistant", "content": "The sky is"}]


def encoder(name: str, chat_template: str = "auto") -> Encoder:
    return Encoder(chat_tokenizer(name), 64, chat_template)


def text(made: Encoder, ids: list[int]) -> str:
    return made.tokenizer.decode(ids)  # type: ignore[return-value]


def rendered(name: str, *answer: str) -> str:
    """A question by the tokenizer's own template, with its answer or up to it."""
    messages = [*ASKED, *({"role": "assistant", "content": one} for one in answer)]
    return chat_tokenizer(name).apply_chat_template(messages, tokenize=False, add_generation_prompt=not answer)


@pytest.mark.parametrize("name", CHATS)
class TestEnds:
    def test_an_answer_ends_as_the_template_ends_it(self, name: str):
        made = encoder(name)
        row = made.row(ASKED, ["yes it is", "no"])
        ends = [made.tokenizer.convert_ids_to_tokens(ids[-1]) for ids in row.responses]
        assert ends == [CHATS[name][3]] * 2
        assert set(made.tokenizer.convert_ids_to_tokens(list(made.ends))) == {"</s>", CHATS[name][3]}

    def test_prompt_and_answer_are_the_templates_text_up_to_the_end_of_turn(self, name: str):
        made = encoder(name)
        row = made.row(ASKED, ["yes it is"])
        whole, found = rendered(name, "yes it is"), text(made, [*row.prompt, *row.responses[0]])
        space = " " if name == "llama 2" else ""  # it has one in front of its end
        assert whole.startswith(found.removesuffix(CHATS[name][3]) + space + CHATS[name][3])

    def test_a_plain_prompt_is_answered_by_the_tokenizers_own_end(self, name: str):
        made = encoder(name)
        row = made.row("is it blue?", ["yes", "no"])
        assert text(made, row.prompt) == ("<bos>" if CHATS[name][2] else "") + "is it blue?\n"
        assert [text(made, ids) for ids in row.responses] == ["yes</s>", "no</s>"]


@pytest.mark.parametrize("name", CHATS)
class TestRendered:
    def test_a_row_that_is_rendered_already_is_encoded_as_its_messages_are(self, name: str):
        made = encoder(name)
        prompt = rendered(name)
        prompt += made.turns.lead
        space = made.turns.space
        closed = [f"{space}{answer}{CHATS[name][3]}" for answer in ("yes", "no")]
        expected = made.row(ASKED, ["yes", "no"])
        assert made.rendered(prompt)
        assert made.row(prompt, closed) == expected
        assert made.row(prompt, [f"{answer}\n" for answer in closed]) == expected, "behind an end there is nothing"
        assert made.row(prompt, [f"{space}yes", f"{space}no"]) == expected, "an end that is not there is added"
        assert encoder(name, "always").row(prompt, closed) == expected, "and it is not rendered again"

    def test_a_beginning_that_is_not_there_is_added_once(self, name: str):
        made = encoder(name)
        whole = rendered(name) + made.turns.lead
        assert text(made, made.prompt_ids(whole.removeprefix("<bos>"), "yes")) == whole


def test_ordinary_texts_are_not_rendered():
    made = encoder("llama 2")
    for prompt in ("is it blue?", "\n\nHuman: is it?\n\nAssistant:", "a < b > c", "<b>the</b>", "use <unk> or <pad>"):
        assert not made.rendered(prompt)
    assert not made.rendered(ASKED)
    assert made.rendered("<bos>[INST] is it? [/INST]")
    assert made.rendered("[INST] is it? [/INST] ")


def test_a_rendered_prompt_takes_no_condition():
    with pytest.raises(UserError, match="cannot be told a condition; give it as messages"):
        encoder("gemma").conditioned("helpful: 3").prompt_text(rendered("gemma"))


@pytest.mark.parametrize("name", CHATS)
def test_an_answer_that_is_begun_is_gone_on_with(name: str):
    made = encoder(name)
    row = made.row(BEGUN, [" blue", "black"])
    begun = rendered(name, "The sky is")
    assert text(made, row.prompt) == begun[: begun.index("The sky is") + len("The sky is")]
    assert [text(made, ids) for ids in row.responses] == [f" blue{CHATS[name][3]}", f"black{CHATS[name][3]}"]


def test_an_answer_that_is_begun_without_a_template():
    made = encoder("gemma")
    made.tokenizer = chat_tokenizer.__wrapped__("gemma")
    made.tokenizer.chat_template = None
    assert made.prompt_text(BEGUN, "blue") == "Human: is it blue?\n\nAssistant: The sky is"
    empty: Any = [*ASKED, {"role": "assistant", "content": ""}]
    assert made.prompt_text(empty, "blue") == made.prompt_text(ASKED, "blue") == "Human: is it blue?\n\nAssistant:\n"


@pytest.mark.parametrize(("responses", "end"), [(["no", " yes"], "\n"), ([" yes", "no"], "\n"), ([" a", "\nb"], "")])
def test_what_stands_between_prompt_and_responses_suits_all_of_them(responses: list[str], end: str):
    assert encoder("phi-3").prompt_text("is it?", *responses) == f"is it?{end}"


def test_a_template_that_is_for_no_chat_ends_by_eos():
    made = chat_tokenizer.__wrapped__("gemma")
    for template in ("{{ messages[0].content }}", "{{ raise_exception('no') }}", "{{ tools[0].name }}"):
        made.chat_template = template
        assert Encoder(made, 64).ends == {made.eos_token_id}
