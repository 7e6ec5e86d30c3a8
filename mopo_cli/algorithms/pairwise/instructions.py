"""Instructions that a response does or does not follow, checked by rule, and comparisons of responses behind them.

The data transformation of MAPL (arXiv 2505.12845; its parent is arXiv 2502.00814): an instruction is written from a
response, so that what follows it is known without any label or stronger model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mopo_cli.base.types import Example
from mopo_cli.data.encoder import Encoder, content
from mopo_cli.data.table import TokenRow, row_length

Place = tuple[int, int]  # which of two conditions, and which response
Over = tuple[Place, Place]  # the first is to be preferred to the second
Relation = tuple[Over, ...]  # the sum of their margins is to be positive
WORD = re.compile(r"\w+(?:['’-]\w+)*")
SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)")
ENDS = ".!?"


# --------------------------------------------------------------------------------------------- kinds of instructions
def words(text: str) -> list[str]:
    return WORD.findall(text)


def sentences(text: str) -> int:
    """Stretches of text that end with a full stop, an exclamation or a question mark, or with the text."""
    return sum(bool(part.strip()) for part in SENTENCE_END.split(text))


def quotable(text: str) -> list[str]:
    """Different words of 3 to 12 letters, in the order of their first use."""
    found: dict[str, str] = {}
    for word in words(text):
        if word.isalpha() and 3 <= len(word) <= 12:
            found.setdefault(word.lower(), word)
    return list(found.values())


def has_word(text: str, word: str) -> bool:
    return word.lower() in (other.lower() for other in words(text))


def starts_with(text: str, word: str) -> bool:
    return [first.lower() for first in words(text)[:1]] == [word.lower()]


def has_digits(text: str) -> bool:
    return any(character.isdigit() for character in text)


class Kind(NamedTuple):
    """A generator of instructions.

    `values` lists what may stand in the text so that a response meets the instruction, or does not: of a response,
    whether it is to be met, and the other responses to the same prompt. It is empty where the kind does not apply.
    """

    about: str  # a set of instructions has one about each thing at most
    text: str
    met: Callable[[str, str], bool]  # by a response, with this value
    values: Callable[[str, bool, Sequence[str]], Sequence[str]]


def _most_words(response: str, met: bool, others: Sequence[str]) -> Sequence[str]:
    n = len(words(response))
    return _numbers(n, n + n // 2) if met else _numbers(n // 2, n - 1)


def _least_words(response: str, met: bool, others: Sequence[str]) -> Sequence[str]:
    n = len(words(response))
    return _numbers((n + 1) // 2, n) if met else _numbers(n + 1, n + 1 + n // 2)


def _sentences(response: str, met: bool, others: Sequence[str]) -> Sequence[str]:
    n = sentences(response)
    return _numbers(n, n) if met else [str(m) for m in range(1, n + 3) if m != n]


def _numbers(first: int, last: int) -> list[str]:
    return [str(n) for n in range(max(first, 1), last + 1)]


def _used(response: str, met: bool, others: Sequence[str]) -> Sequence[str]:
    """Words of the response, or words of the other responses that it does not have."""
    return quotable(response) if met else [w for w in quotable(" ".join(others)) if not has_word(response, w)]


def _avoided(response: str, met: bool, others: Sequence[str]) -> Sequence[str]:
    return _used(response, not met, others)


def _first_word(response: str, met: bool, others: Sequence[str]) -> Sequence[str]:
    firsts = [word for text in ([response] if met else others) for word in words(text)[:1] if word in quotable(text)]
    return [word for word in dict.fromkeys(firsts) if starts_with(response, word) == met]


def _last_mark(response: str, met: bool, others: Sequence[str]) -> Sequence[str]:
    return [mark for mark in ENDS if response.rstrip().endswith(mark) == met]


def _digits(response: str, met: bool, others: Sequence[str]) -> Sequence[str]:
    return ["Use" if has_digits(response) == met else "Avoid"]


KINDS = {
    "at_most_words": Kind("length", "At most {} words.", lambda y, n: len(words(y)) <= int(n), _most_words),
    "at_least_words": Kind("length", "At least {} words.", lambda y, n: len(words(y)) >= int(n), _least_words),
    "sentences": Kind("sentences", "Sentences: {}.", lambda y, n: sentences(y) == int(n), _sentences),
    "uses": Kind("word", "Use the word {}.", has_word, _used),
    "avoids": Kind("word", "Avoid the word {}.", lambda y, word: not has_word(y, word), _avoided),
    "starts_with": Kind("start", "Start with {}.", starts_with, _first_word),
    "ends_with": Kind("end", "End with {}", lambda y, mark: y.rstrip().endswith(mark), _last_mark),
    "digits": Kind("digits", "{} digits.", lambda y, verb: has_digits(y) == (verb == "Use"), _digits),
}


@dataclass(frozen=True, slots=True)
class Instruction:
    kind: str
    value: str

    @property
    def text(self) -> str:
        return KINDS[self.kind].text.format(self.value)

    def met(self, response: str) -> bool:
        return KINDS[self.kind].met(response, self.value)


def write(kind: str, response: str, met: bool, others: Sequence[str], rng: np.random.Generator) -> Instruction | None:
    """g(y, met): an instruction that the response meets, or does not; None where there is none of this kind."""
    values = KINDS[kind].values(response, met, others)
    return Instruction(kind, values[int(rng.integers(len(values)))]) if values else None


def condition(instructions: Sequence[Instruction]) -> str:
    """What stands in front of the prompt."""
    return " ".join(instruction.text for instruction in instructions)


# --------------------------------------------------------------------------------------------- conditions and who wins
@dataclass(frozen=True, slots=True)
class Conditions:
    """Two sets of instructions of the same kinds; given the response they were written from, the first is preferred."""

    pair: tuple[tuple[Instruction, ...], tuple[Instruction, ...]]
    source: int  # that response

    def followed(self, responses: Sequence[str]) -> np.ndarray:
        """(2, G) how many of each set's instructions each response meets."""
        return np.array([[sum(one.met(text) for one in each) for text in responses] for each in self.pair])


def write_conditions(
    responses: Sequence[str], most: int, kinds: Sequence[str], rng: np.random.Generator
) -> Conditions | None:
    """Two sets of at most `most` instructions, written from one of the responses; None where no kind applies.

    Either the response meets all of the first set and not all of the second, or at least one of the first and none of
    the second. The response is drawn without a look at labels: preferred ones are to violate instructions, and the
    others to satisfy them, as often as the other way round (arXiv 2502.00814's ablation).
    """
    source = int(rng.integers(len(responses)))
    response = responses[source]
    others = [text for i, text in enumerate(responses) if i != source]
    order: list[int] = rng.permutation(len(kinds)).tolist()
    chosen = _one_about_each([kinds[i] for i in order])
    both = [(write(k, response, True, others, rng), write(k, response, False, others, rng)) for k in chosen]
    usable = [(yes, no) for yes, no in both if yes is not None and no is not None]
    usable = usable[: int(rng.integers(1, most + 1))]
    if not usable:
        return None
    sure = np.arange(len(usable)) == rng.integers(len(usable))  # the one that must differ
    free = rng.random(len(usable)) < 0.5
    first, second = (sure | True, ~sure & free) if rng.random() < 0.5 else (sure | free, sure & False)
    sets = [
        tuple(yes if met else no for (yes, no), met in zip(usable, flags, strict=True)) for flags in (first, second)
    ]
    return Conditions((sets[0], sets[1]), source)


def _one_about_each(kinds: Sequence[str]) -> list[str]:
    """The first kind about each thing: a set must not ask for at most 5 words and at least 9."""
    return list({KINDS[kind].about: kind for kind in reversed(kinds)}.values())[::-1]


def intra_sample(followed: np.ndarray, size: int) -> list[Relation]:
    """For each response, the condition to be preferred given it; (2, G) counts of `size` instructions.

    The one of which it meets all, where it does not of the other; else that of which it meets some, where it meets none
    of the other. A response that is alike under both gives nothing.
    """
    found: list[Relation] = []
    for g, (one, two) in enumerate(followed.T.tolist()):
        if one != two and (max(one, two) == size or min(one, two) == 0):
            better = 0 if one > two else 1
            found.append((((better, g), (1 - better, g)),))
    return found


def inter_margins(followed: np.ndarray, pairs: Sequence[tuple[int, int]]) -> list[Relation]:
    """For each pair of responses (y, y'): the margin of y over y' is to be larger behind the condition that favours y
    more, by the instructions that each meets; a pair that both favour alike gives nothing.

    [r(x_1, y) - r(x_1, y')] - [r(x_2, y) - r(x_2, y')] is written as the sum of (x_1, y) over (x_1, y') and
    (x_2, y') over (x_2, y).
    """
    found: list[Relation] = []
    for a, b in pairs:
        favour = followed[:, a] - followed[:, b]
        if favour[0] != favour[1]:
            one = int(favour.argmax())
            found.append((((one, a), (one, b)), ((1 - one, b), (1 - one, a))))
    return found


def inter_responses(followed: np.ndarray, pairs: Sequence[tuple[int, int]]) -> list[Relation]:
    """For each pair of responses, one behind each condition: the one that meets more of its instructions wins."""
    found: list[Relation] = []
    for a, b in pairs:
        for first, second in (((0, a), (1, b)), ((0, b), (1, a))):
            if followed[first] != followed[second]:
                found.append(((first, second),) if followed[first] > followed[second] else ((second, first),))
    return found


# --------------------------------------------------------------------------------------------- rows
@dataclass(frozen=True, slots=True)
class Told:
    """A row behind each of two conditions, and the comparisons within its responses and across them."""

    rows: tuple[TokenRow, TokenRow]
    intra: list[Relation]
    inter: list[Relation]

    @property
    def length(self) -> int:
        """Tokens of both rows."""
        return sum(map(row_length, self.rows))

    def fits(self, context: int) -> bool:
        return all(len(row.prompt) + max(map(len, row.responses)) <= context for row in self.rows)


@dataclass(frozen=True, slots=True)
class Telling:
    """How rows are told instructions."""

    most: int  # instructions in front of a prompt
    kinds: tuple[str, ...]
    inter: Callable[[np.ndarray, Sequence[tuple[int, int]]], list[Relation]]
    seed: int

    def conditions(self, example: Example, number: int) -> Conditions | None:
        """Those of row `number`, the same each time."""
        rng = np.random.default_rng([self.seed, number, 17])
        return write_conditions([content(response) for response in example.responses], self.most, self.kinds, rng)

    def told(self, encoder: Encoder, example: Example, row: TokenRow, number: int) -> Told | None:
        """None where no instruction can be written, or where no response does better behind either condition."""
        found = self.conditions(example, number)
        if found is None:
            return None
        followed = found.followed([content(response) for response in example.responses])
        asked = [
            encoder.conditioned(condition(each)).prompt_ids(example.prompt, *example.responses) for each in found.pair
        ]
        rows = TokenRow(asked[0], row.responses), TokenRow(asked[1], row.responses)
        return Told(rows, intra_sample(followed, len(found.pair[0])), self.inter(followed, example.pairs))
