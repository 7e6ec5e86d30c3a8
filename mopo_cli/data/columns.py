"""Columns and message keys beside those of the contract: which make the prompt, which are refused, which nobody reads.

What changes the meaning of a row is never left out in silence.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from mopo_cli.base.errors import RowError, Shown
from mopo_cli.base.types import Text

LAST_TURN = "\n\nAssistant:"  # where the answer starts in a Human / Assistant transcript
INSTRUCTION, INPUT = "instruction", "input"
PROMPTS = ("question", "query", INSTRUCTION, INPUT)  # other names of a prompt; an instruction may have an input
SYSTEMS = ("system", "system_prompt", "system_message")
UNREADABLE = (
    *("tools", "functions", "documents", "history", "chat_template_kwargs"),
    *("image", "images", "audio", "audios", "video", "videos"),
)
UNREAD = "unread_columns"  # in the provenance, where there are any
MOST = 50
MOST_REASONS = 20  # different ones, for which rows are left out, that are counted apart
_TELLING = frozenset((*PROMPTS, *SYSTEMS, *UNREADABLE))
_OF_PAIRS = frozenset(("prompt", "chosen", "rejected", "context"))
_OF_LISTS = frozenset(("prompt", "responses", "scores", "labels", "context"))

# Strings that are no prompt, whatever they say.
_ABOUT = ("source", "dataset", "subset", "split", "category", "task", "language", "lang", "model", "date", "timestamp")
# Keys of a message that tell where it comes from.
_ABOUT_MESSAGE = frozenset(("id", "uuid", "index", "turn", "timestamp", "created_at", "date", "language", "model"))


def is_empty(value: Any) -> bool:
    """Whether a key says nothing: null, or an empty text, list or mapping. 0 and false do say something."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def say_more(row: Mapping[str, Any]) -> bool:
    """Whether a row has columns beside those of the contract that may tell what its prompt is."""
    return not _TELLING.isdisjoint(row)


def check_columns(row: Mapping[str, Any], where: str) -> None:
    """RowError where a column holds what no prompt of this program can."""
    for name in UNREADABLE:
        if not is_empty(row.get(name)):
            raise RowError(
                where,
                f"the column {name} changes what a model is asked, and cannot be read; write what matters of it into "
                "the prompt, and take the column out",
            )


def asked_columns(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The columns that hold the prompt of a row without a `prompt`: a question, a query, an instruction with its input.

    () where there is none; RowError where it could be one or another.
    """
    found = tuple(name for name in PROMPTS if not is_empty(row.get(name)))
    if len(found) > 1 and found != (INSTRUCTION, INPUT):
        raise RowError(where, f"{' and '.join(found)} could each be the prompt; name one of them prompt")
    return found


def asked(row: Mapping[str, Any], names: tuple[str, ...], where: str) -> Any:
    """The prompt in these columns; an input stands two lines below its instruction."""
    if len(names) == 1:
        return row[names[0]]
    values = [row[name] for name in names]
    if not all(isinstance(value, str) for value in values):
        raise RowError(where, f"{' and '.join(names)} must be strings to make a prompt")
    return "\n\n".join(values)


def could_hold_prompt(row: Mapping[str, Any]) -> list[str]:
    """Columns that the contract does not know with a text in them: one may be the prompt of a row that names none."""
    return [
        name
        for name, value in row.items()
        if name not in _OF_PAIRS
        and name not in _OF_LISTS
        and isinstance(value, str | list)
        and not is_empty(value)
        and name not in _ABOUT
        and not name.lower().endswith("id")
    ]


def with_system(prompt: Text, row: Mapping[str, Any], where: str) -> Text:
    """The prompt behind the row's system message, where a column holds one."""
    found = {name: row[name] for name in SYSTEMS if not is_empty(row.get(name))}
    if not found:
        return prompt
    name, system = next(iter(found.items()))
    if len(found) > 1 or not isinstance(system, str):
        raise RowError(where, f"{' and '.join(found)} must be one string, the system message; found ", show(system))
    message = {"role": "system", "content": system}
    if isinstance(prompt, str):
        if prompt.endswith(LAST_TURN):
            raise RowError(
                where, f"the column {name} beside a prompt that is a transcript; write it into the transcript"
            )
        return [message, {"role": "user", "content": prompt}]
    if prompt[0]["role"] != "system":
        return [message, *prompt]
    if prompt[0]["content"] != system:
        raise RowError(where, f"the column {name} and the prompt's own system message differ; keep one of them")
    return prompt


def check_message(message: Mapping[str, Any], where: str, field: str) -> None:
    """RowError where a message has a key besides role and content that says something of its meaning."""
    if len(message) == 2:
        return
    for key, value in message.items():
        if key not in ("role", "content") and key not in _ABOUT_MESSAGE and not is_empty(value):
            raise RowError(
                where,
                f"a message of {field} has the key {key}, which changes what it means, and cannot be read; found ",
                show(value),
                ". A message has role and content",
            )


class Unread:
    """The columns that nothing reads, as rows are met that hold something in them; MOST of them at most."""

    def __init__(self, objectives: Sequence[str], group: str | None = None):
        self.names: list[str] = []
        self._objectives, self._group = objectives, group
        self._done: set[tuple[Any, ...]] = set()  # what rows look like of which there is nothing more to learn

    def see(self, row: Mapping[str, Any]) -> None:
        pair, asked = row.get("responses") is None, row.get("prompt") is None
        key = (*row, pair, asked)
        if key in self._done or len(self.names) >= MOST:
            return
        read = {
            self._group,
            *SYSTEMS,
            *(PROMPTS if asked else ()),
            *((*_OF_PAIRS, *self._objectives) if pair else _OF_LISTS),
        }
        others = [name for name in row if name not in read]
        self.names += [name for name in others if name not in self.names and not is_empty(row[name])]
        if all(name in self.names for name in others):
            self._done.add(key)


def show(value: Any) -> Shown:
    return Shown("null" if value is None else reprlib.repr(value))


def count_reason(counts: dict[str, int], what: str) -> None:
    """One more of `what`; of what is met after MOST_REASONS others, one more of the rest."""
    if what not in counts and len(counts) >= MOST_REASONS:
        what = "others"
    counts[what] = counts.get(what, 0) + 1


def group_of(row: Mapping[str, Any], column: str, where: str) -> str:
    """The row's group as text; RowError where it has none."""
    value = row.get(column)
    if value is None or isinstance(value, dict | list) or value == "":
        why = f"dataset.group={column}: the row has no text or number there; it has "
        raise RowError(where, why, Shown(", ".join(row)))
    return str(value)
