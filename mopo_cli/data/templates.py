"""What a tokenizer's chat template puts around turns: how an answer begins, by which token it ends."""

from __future__ import annotations

from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from mopo_cli.base.errors import UserError
from mopo_cli.base.types import Message

ASKED, ANSWERED = "q7zxasked", "a7zxanswered"  # stand for the user's message and the answer
SPACE_MARKS = ("▁", "Ġ")  # the first character of a token with a space in front


@dataclass(frozen=True, slots=True)
class Turns:
    """between: the text from the user's message to the answer, without white space around it; "" without a template.
    lead: what must be added to a rendered prompt, of a template that knows no generation prompt. space: white space in
    front of an answer, where there is only that. end: the token that ends an answer.
    begins: whether a conversation starts with the tokenizer's beginning of a text."""

    between: str
    lead: str
    space: str
    end: int
    begins: bool = True


def turns_of(tokenizer: PreTrainedTokenizerBase) -> Turns:
    """What the tokenizer's template does with a question and its answer; without one, an answer ends by eos."""
    plain = Turns("", "", "", int(tokenizer.eos_token_id))  # type: ignore[arg-type]
    if not getattr(tokenizer, "chat_template", None):
        return plain
    question, answer = {"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}
    try:
        whole = render(tokenizer, [question, answer], opened=False)
        closed, asked = (render(tokenizer, [question], opened) for opened in (False, True))
    except (UserError, TypeError, ValueError):  # a template for something else than a chat
        return plain
    before, found, after = whole.partition(ANSWERED)
    if not found:
        return plain
    lead = before[len(asked) :] if asked == closed and before.startswith(asked) else ""
    text, space = (lead, "") if lead.strip() else ("", "" if _puts_space(tokenizer) else lead)
    bos = tokenizer.bos_token
    begins = not bos or whole.startswith(str(bos))
    return Turns(before.partition(ASKED)[2].strip(), text, space, _first_special(tokenizer, after), begins)


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], opened: bool) -> str:
    """The messages as the template has them; with `opened` up to the answer, which an assistant's last message begins.

    Raises UserError where the template refuses them.
    """
    begun = opened and messages[-1]["role"] == "assistant"
    try:
        return tokenizer.apply_chat_template(  # type: ignore[return-value]
            messages, tokenize=False, add_generation_prompt=opened and not begun, continue_final_message=begun
        )
    except TemplateError as error:
        raise UserError(f"the tokenizer's chat template refuses this prompt: {error}") from error
    except ValueError as error:
        if not begun:
            raise
        raise UserError(f"the tokenizer's chat template cannot go on with the assistant's message: {error}") from error


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that are no text: special ones and those that were added to the vocabulary."""
    return {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", ())}


def frame_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The special tokens that stand around turns, as text: not those for what is unknown, masked or padding."""
    no_frame = (tokenizer.unk_token, getattr(tokenizer, "mask_token", None), tokenizer.pad_token)
    others = [token for token in no_frame if token != tokenizer.eos_token]
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    names = dict.fromkeys((*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)))
    return tuple(name for name in names if name not in others and name.strip())


def _first_special(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """The special token that the text starts with, white space aside; else eos."""
    special = special_ids(tokenizer)
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:  # type: ignore[union-attr]
        if token in special:
            return int(token)
        if str(tokenizer.decode([token])).strip():
            break
    return int(tokenizer.eos_token_id)  # type: ignore[arg-type]


def _puts_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer reads every text as if a space stood in front."""
    first = tokenizer.convert_ids_to_tokens(tokenizer("x", add_special_tokens=False)["input_ids"][:1])  # type: ignore
    return bool(first) and str(first[0]).startswith(SPACE_MARKS)
