"""Computed objectives: scorers (prompt, response, context) -> float, higher is better, that need no judge."""

from __future__ import annotations

import re

from mopo_cli.base.errors import UserError

_FUNCTION_WORDS = """
a about after all also an and any are as at be because been before being between both but by can could did do does doing
during each for from further had has have having he her here hers him his how i if in into is it its itself just me more
most my no nor not of off on once only or other our out over own same she should so some such than that the their them
then there these they this those through to too under until up very was we were what when where which while who whom why
will with would you your
"""
STOP_WORDS = frozenset(_FUNCTION_WORDS.split())
_WORD = re.compile(r"[^\W_]+")


def concise(prompt: str, response: str, context: str) -> float:
    """Minus the number of white-space separated words of the response."""
    return -float(len(response.split()))


def grounded(prompt: str, response: str, context: str) -> float:
    """The share, in [0, 1], of the response's content words that occur in the context.

    Content words are lower-cased and are no stop words; each occurrence counts. A response without any content word
    scores 0: it says nothing that the context could support.
    Raises UserError where the context is empty.
    """
    if not context.strip():
        raise UserError(
            f"the computed objective `grounded` compares a response with its row's context, and the row with prompt "
            f"{prompt[:60]!r} has none; give each row a context, or use an objective set without `grounded`"
        )
    words = _content_words(response)
    known = set(_content_words(context))
    return sum(word in known for word in words) / len(words) if words else 0.0


def _content_words(text: str) -> list[str]:
    return [word for word in _WORD.findall(text.lower()) if word not in STOP_WORDS]


def length(prompt: str, response: str, context: str) -> float:
    """The number of white-space separated words of the response."""
    return float(len(response.split()))


def overlap(prompt: str, response: str, context: str) -> float:
    """The share, in [0, 1], of the response's content words that occur in the prompt; 0 where it has none."""
    words = _content_words(response)
    known = set(_content_words(prompt))
    return sum(word in known for word in words) / len(words) if words else 0.0


def matches(prompt: str, response: str, context: str, pattern: str, wanted: bool = True) -> float:
    """1 where the regular expression is found in the response, else 0; the other way round where it is not wanted.

    Raises UserError where the pattern is none.
    """
    try:
        found = re.search(pattern, response) is not None
    except re.error as error:
        raise UserError(f"pattern={pattern!r}: not a regular expression ({error})") from error
    return float(found == wanted)
