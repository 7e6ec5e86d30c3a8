"""The preference-row contract: one row, in any accepted format, becomes one Example.

A list row has `prompt`, `responses` and, per objective, `scores` (a number a response) or `labels` ([a, b, I] a pair).
A pair row has `chosen` and `rejected` in TRL's formats (standard or conversational, explicit or implicit prompt), and
may have a column per objective that holds I for chosen over rejected. A key that holds null counts as absent, because
Parquet cannot tell the two apart.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from os.path import commonprefix
from typing import Any

from mopo_cli.base.errors import RowError, Shown, UserError
from mopo_cli.base.types import Example, Message, Text
from mopo_cli.data import columns
from mopo_cli.data.columns import LAST_TURN, show

Labels = dict[tuple[int, int], float]  # (a, b) with a < b -> I of response a over response b
ROLES = ("system", "user", "assistant")
HUGE = 2**63  # JSON has whole numbers that no float can hold
NEXT_TURN = "\n\nHuman:"
FORMATS = "a row has prompt, responses and scores and/or labels; or chosen and rejected, with or without prompt"

# Columns of published pair files that are numbers, and are no objective.
_NOT_OBJECTIVES = {
    *("prompt", "chosen", "rejected", "responses", "scores", "labels", "context", "messages", "id", "index", "margin"),
    *("weight", "sample_weight"),
    *("score_chosen", "score_rejected", "chosen_score", "rejected_score", "chosen_rating", "rejected_rating"),
}


def example_from_row(
    row: Any,
    objectives: Sequence[str],
    where: str,
    margins: Mapping[str, float],
    chosen_means: str | None = None,
    group: str | None = None,
) -> Example:
    """Check one row and make its Example.

    labels[p][k] is in the order of `objectives`; pairs that nobody judged under any of them are left out, so `pairs`
    may be empty. Scores at most margins[objective] (default 0) apart are a tie. Where an objective has both scores and
    labels for a pair, the labels win; several labels of one pair are averaged. Two identical responses are a tie under
    every objective that judged them, since P(y > y) = 1/2 whatever a noisy judge said.

    `chosen_means` names the objective under which `chosen` beats `rejected`; a column of that name wins over it.
    `group` names the column that says which rows are about the same thing.

    Raises UserError, starting with `where`, where the row breaks the contract.
    """
    if not isinstance(row, dict):
        if isinstance(row, RowError):  # the reader could make nothing of it
            raise row
        raise RowError(where, "expected a JSON object, found ", show(row), f"; {FORMATS}")
    if columns.say_more(row):
        columns.check_columns(row, where)
    responses: tuple[str, ...]
    if is_pair_row(row):
        prompt, chosen, rejected = _pair_texts(row, where)
        responses = (chosen, rejected)
        judged = _pair_labels(row, objectives, where, chosen_means)
    else:
        prompt, responses = _list_texts(row, where)
        judged = _list_labels(row, len(responses), objectives, where, margins)
    pairs = tuple(sorted(set[tuple[int, int]]().union(*judged)))
    labels = tuple(tuple(_label(of, pair, responses) for of in judged) for pair in pairs)
    about = columns.group_of(row, group, where) if group else ""
    return Example(prompt, responses, pairs, labels, context=_context(row, where), group=about, source=where)


def is_pair_row(row: Any) -> bool:
    """Whether a row is in the chosen / rejected format."""
    return (
        isinstance(row, dict)
        and row.get("responses") is None
        and (row.get("chosen") is not None or row.get("rejected") is not None)
    )


def prompt_of_row(row: Any) -> str:
    """The prompt, as text_key has it, of the Example that a row makes; some text for a row that breaks the contract.

    A prompt that is a string is taken as it is, without a system message of the row's, unless the answers are
    conversations, which may hold another one.
    """
    if not isinstance(row, dict):
        return repr(row)
    if isinstance(prompt := row.get("prompt"), str) and not isinstance(row.get("chosen"), list):
        return prompt
    try:
        if is_pair_row(row):
            return text_key(_pair_texts(row, "")[0])
        return text_key(_list_prompt(row, ""))
    except UserError:
        return repr(row)


def text_key(prompt: Text) -> str:
    """The prompt as one string: rows with the same key belong to the same split."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


def objectives_of_row(row: Any) -> tuple[str, ...]:
    """The names of the objectives that one row carries labels for; () for a row that breaks the contract.

    In a pair row, any column that holds a number in [0, 1] counts, except the known bookkeeping columns.
    """
    if not isinstance(row, dict):
        return ()
    if is_pair_row(row):
        return tuple(name for name, value in row.items() if name not in _NOT_OBJECTIVES and _is_probability(value))
    tables = [table for key in ("scores", "labels") if isinstance(table := row.get(key), dict)]
    return tuple(dict.fromkeys(name for table in tables for name, value in table.items() if value is not None))


def undeclared_chosen(where: str) -> RowError:
    """The error for a pair row that says neither in a column nor through the config what `chosen` means."""
    return RowError(
        where,
        "nothing says under which objective `chosen` is better than `rejected`: there is no column named by "
        "an objective. Set dataset.chosen_means=<objective>, or add a column per objective with I (0 to 1) or null",
    )


def _label(of: Labels, pair: tuple[int, int], responses: Sequence[Text]) -> float:
    value = of.get(pair, math.nan)
    same = responses[pair[0]] == responses[pair[1]]
    return 0.5 if same and not math.isnan(value) else value


# Texts
def _list_texts(row: dict[str, Any], where: str) -> tuple[Text, tuple[str, ...]]:
    prompt = _list_prompt(row, where)
    _require(row, ("responses",), where)
    responses = row["responses"]
    if not isinstance(responses, list) or len(responses) < 2:
        raise RowError(where, "responses must be a list of two or more, found ", show(responses))
    return prompt, tuple(_response(response, where, f"responses[{i}]") for i, response in enumerate(responses))


def _list_prompt(row: dict[str, Any], where: str) -> Text:
    prompt = row.get("prompt")
    if prompt is None and (names := columns.asked_columns(row, where)):
        prompt = columns.asked(row, names, where)
    if prompt is None:
        raise _missing_key("prompt is", row, where)
    return _prompt(prompt, row, where)


def _prompt(prompt: Any, row: dict[str, Any], where: str) -> Text:
    text = _text(prompt, where, "prompt")
    return columns.with_system(text, row, where) if columns.say_more(row) else text


def _pair_texts(row: dict[str, Any], where: str) -> tuple[Text, str, str]:
    """(prompt, chosen, rejected) of any of TRL's formats."""
    _require(row, ("chosen", "rejected"), where)
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if type(chosen) is not type(rejected):
        raise RowError(where, "chosen and rejected must both be strings, or both be lists of messages")
    if prompt is None:
        prompt, chosen, rejected = _implicit(row, where)
    elif isinstance(chosen, list) and _holds_prompt(prompt, chosen) and _holds_prompt(prompt, rejected):
        prompt, chosen, rejected = _split_messages(chosen, rejected, where)
    return (
        _prompt(prompt, row, where),
        _response(chosen, where, "chosen"),
        _response(rejected, where, "rejected"),
    )


def _implicit(row: dict[str, Any], where: str) -> tuple[Any, Any, Any]:
    """(prompt, chosen, rejected) of a row without a `prompt`.

    In whole conversations and transcripts it is what both start with; else it stands in another column. It is guessed
    from what two texts have in common only where no column could hold it.
    """
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, list) and _holds_prompt(None, chosen) and _holds_prompt(None, rejected):
        return _split_messages(chosen, rejected, where)
    if isinstance(chosen, str) and LAST_TURN in commonprefix([chosen, rejected]):  # noqa: RUF071
        return split_transcripts(chosen, rejected, where)
    if names := columns.asked_columns(row, where):
        prompt = columns.asked(row, names, where)
        if isinstance(prompt, str) and isinstance(chosen, str) and chosen.startswith(prompt):
            size = len(prompt) if rejected.startswith(prompt) else 0
            return prompt, chosen[size:], rejected[size:]
        return prompt, chosen, rejected
    if isinstance(chosen, list):
        raise _no_shared_prompt(where)
    if isinstance(chosen, str) and (others := columns.could_hold_prompt(row)):
        raise RowError(
            where,
            f"there is no prompt, and {' or '.join(others)} could hold it: name that column prompt, or take it out",
        )
    return split_transcripts(chosen, rejected, where)


def _holds_prompt(prompt: Any, conversation: list[Any]) -> bool:
    """Whether the conversation starts with the prompt: some files give it twice, as a string or as messages."""
    if isinstance(prompt, list):
        return bool(prompt) and conversation[: len(prompt)] == prompt
    first = conversation[0] if conversation else None
    return isinstance(first, dict) and first.get("role") in ("system", "user")


def _split_messages(chosen: list[Any], rejected: list[Any], where: str) -> tuple[list[Any], list[Any], list[Any]]:
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == 0:
        raise _no_shared_prompt(where)
    if _role(chosen[shared - 1]) == _role(chosen[shared]) == "assistant":
        raise RowError(where, "two messages of the assistant follow each other; join them, or put the user's between")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def split_transcripts(chosen: Any, rejected: Any, where: str) -> tuple[str, str, str]:
    """(prompt, chosen, rejected) of two strings that hold the whole conversation.

    The prompt ends with the last "\\n\\nAssistant:" that both share. Without one, it is the longest common prefix cut
    back to white space, which goes to the answers, so that prompt + answer is the text again.
    Raises UserError where the two share no prompt, and where an answer goes on with a turn of the user.
    """
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise RowError(where, "chosen and rejected must be strings or lists of messages, found ", show(chosen))
    shared = commonprefix([chosen, rejected])  # noqa: RUF071 - character by character is what is wanted
    turn = shared.rfind(LAST_TURN)
    if turn >= 0:
        end = turn + len(LAST_TURN)
        if NEXT_TURN in chosen[end:] or NEXT_TURN in rejected[end:]:
            raise _several_turns("chosen or rejected", where)
    elif chosen == rejected:
        raise RowError(where, "chosen and rejected are the same text, so the end of the prompt cannot be told")
    else:
        end = len(_up_to_whitespace(shared))
    if not shared[:end].strip():
        raise _no_shared_prompt(where)
    return shared[:end], chosen[end:], rejected[end:]


def _up_to_whitespace(text: str) -> str:
    """The text without its last, perhaps partial, word and the white space before it."""
    if text[-1:].isspace():
        return text.rstrip()
    words = text.rsplit(maxsplit=1)
    return words[0] if len(words) == 2 else ""


def _no_shared_prompt(where: str) -> RowError:
    return RowError(
        where,
        "there is no prompt, and chosen and rejected do not start alike; give a prompt key, or let both hold the whole "
        "conversation",
    )


def _several_turns(field: str, where: str) -> RowError:
    return RowError(
        where,
        f"{field} has several turns after the prompt: what the user says between them is no answer of a model's, so it "
        "can be neither trained on nor compared. End both where they first differ, at the assistant's first answer, or "
        "make a row of each turn with all that was said before it as the prompt",
    )


def _response(value: Any, where: str, field: str) -> str:
    """A response; a single assistant message is reduced to its content."""
    text = _text(value, where, field)
    if isinstance(text, str):
        return text
    if text[-1]["role"] != "assistant":
        raise RowError(where, f"{field} must end with an assistant message, found role ", show(text[-1]["role"]))
    if len(text) > 1:
        raise _several_turns(field, where)
    return text[0]["content"]


def _text(value: Any, where: str, field: str) -> Text:
    if not isinstance(value, str | list):
        raise RowError(where, f"{field} must be a string or a list of messages, found ", show(value))
    text = value if isinstance(value, str) else [_message(message, where, field) for message in value]
    contents = [text] if isinstance(text, str) else [message["content"] for message in text]
    if not any(content.strip() for content in contents):
        raise RowError(where, f"{field} is empty")
    return text


def _message(message: Any, where: str, field: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
        raise RowError(where, f"a message of {field} needs role and content as strings, found ", show(message))
    if message.get("role") not in ROLES:
        raise RowError(where, f"{field} has the role ", show(message.get("role")), f"; allowed: {', '.join(ROLES)}")
    columns.check_message(message, where, field)
    return {"role": message["role"], "content": message["content"]}


def _context(row: dict[str, Any], where: str) -> str:
    context = row.get("context")
    if context is not None and not isinstance(context, str):
        raise RowError(where, "context must be a string or null, found ", show(context))
    return context or ""


# Labels
def _pair_labels(
    row: dict[str, Any], objectives: Sequence[str], where: str, chosen_means: str | None
) -> tuple[Labels, ...]:
    if chosen_means is None and not any(name in row for name in objectives):
        raise undeclared_chosen(where)
    values = {chosen_means: 1.0} | {name: row[name] for name in objectives if row.get(name) is not None}
    return tuple({(0, 1): _probability(values[name], where, name)} if name in values else {} for name in objectives)


def _list_labels(
    row: dict[str, Any], count: int, objectives: Sequence[str], where: str, margins: Mapping[str, float]
) -> tuple[Labels, ...]:
    if row.get("scores") is None and row.get("labels") is None:
        raise _missing_key("scores and labels are both", row, where)
    scores, labels = _table(row, "scores", where), _table(row, "labels", where)
    return tuple(
        _from_scores(scores.get(name), count, margins.get(name, 0.0), where, f"scores.{name}")
        | _from_labels(labels.get(name), count, where, f"labels.{name}")
        for name in objectives
    )


def _from_scores(scores: Any, count: int, margin: float, where: str, field: str) -> Labels:
    if scores is None:
        return {}
    if not isinstance(scores, list) or len(scores) != count:
        raise RowError(where, f"{field} must be a list of {count}, one score a response, found ", show(scores))
    for score in scores:
        if score is not None and not (_is_number(score) and math.isfinite(score)):
            raise RowError(where, f"{field} holds ", show(score), "; a score is a finite number, or null where missing")
    judged = [i for i, score in enumerate(scores) if score is not None]
    return {(a, b): preference(scores[a], scores[b], margin) for a, b in combinations(judged, 2)}


def preference(first: float, second: float, margin: float = 0.0) -> float:
    """I of the first score over the second: 1, 0, or 0.5 where they are at most `margin` apart."""
    gap = abs(first - second)
    # isclose: 0.8 - 0.7 is a hair more than 0.1 in floating point, and is meant to be a tie at margin 0.1.
    if gap <= margin or math.isclose(gap, margin, rel_tol=1e-9):
        return 0.5
    return float(first > second)


def _from_labels(entries: Any, count: int, where: str, field: str) -> Labels:
    if entries is None:
        return {}
    if not isinstance(entries, list):
        raise RowError(where, f"{field} must be a list of [a, b, I], found ", show(entries))
    votes: dict[tuple[int, int], list[float]] = {}
    for entry in entries:
        if not isinstance(entry, list) or len(entry) != 3:
            raise RowError(where, f"{field} must be a list of [a, b, I], found ", show(entry), " in it")
        a, b = (_index(value, count, where, field) for value in entry[:2])
        if a == b:
            raise RowError(where, f"{field} compares response {a} with itself in ", show(entry))
        if entry[2] is not None:
            value = _probability(entry[2], where, field)
            votes.setdefault((min(a, b), max(a, b)), []).append(value if a < b else 1.0 - value)
    return {pair: sum(values) / len(values) for pair, values in votes.items()}


def _index(value: Any, count: int, where: str, field: str) -> int:
    # Parquet stores [a, b, I] as three floats, so 1.0 is the index 1.
    if not _is_number(value) or value != value // 1 or not 0 <= value < count:
        raise RowError(where, f"{field} has the index ", show(value), f"; allowed: 0 to {count - 1}, one a response")
    return int(value)


def _probability(value: Any, where: str, field: str) -> float:
    if not _is_probability(value):
        raise RowError(where, f"{field} holds ", show(value), "; I is a number from 0 to 1, or null where missing")
    return float(value)


def _is_probability(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_number(value: Any) -> bool:
    # true is no number here: "safe": true could mean that chosen is safe, or that it is the safer one.
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < HUGE
    return isinstance(value, float)


def _table(row: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    table = row.get(key)
    if table is not None and not isinstance(table, dict):
        raise RowError(where, f"{key} must map each objective to a list, found ", show(table))
    return table or {}


def _require(row: dict[str, Any], keys: Sequence[str], where: str) -> None:
    for key in keys:
        if row.get(key) is None:
            raise _missing_key(f"{key} is", row, where)


def _missing_key(what: str, row: dict[str, Any], where: str) -> RowError:
    found = ", ".join(str(key) for key in row) or "none"
    return RowError(where, f"{what} missing; found the keys: ", Shown(found), f"; {FORMATS}")


def prompt_in(row: Mapping[str, Any], where: str) -> Text:
    """The prompt of a row that need hold nothing else: text or messages. UserError where it holds none."""
    _require(dict(row), ("prompt",), where)
    return _text(row["prompt"], where, "prompt")
