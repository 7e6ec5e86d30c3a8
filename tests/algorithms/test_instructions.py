"""Instructions checked by rule: what is written from a response holds as asked, and who is to win by it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mopo_cli.algorithms.pairwise.instructions import (
    KINDS,
    Conditions,
    Instruction,
    condition,
    inter_margins,
    inter_responses,
    intra_sample,
    sentences,
    words,
    write,
    write_conditions,
)
from mopo_cli.data.assistant import assistant

TEXTS = (
    "Sure! Let the dough rise twice and bake it hot.",
    "Sorry, I would rather not help with that.",
    "Is it? It's 3.5 km (about 2 miles)!",
    "It depends",
    "Yes.",
    "Ähnlich: über den Fluss – naïve café, 12 Uhr.\n\nZweiter Absatz, ohne Punkt",
    "红色的房子。",
    "42",
    "?!",
    "",
)
PAIRS = ((0, 1), (0, 2), (1, 2))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


class TestKinds:
    @pytest.mark.parametrize(
        ("kind", "value", "text", "met"),
        [
            ("at_most_words", "2", "Yes, certainly.", True),
            ("at_most_words", "1", "Yes, certainly.", False),
            ("at_least_words", "3", "It's all right", True),
            ("at_least_words", "4", "It's all right", False),
            ("sentences", "2", "Is it 3.5? It is!", True),
            ("sentences", "2", "No stop here", False),
            ("sentences", "1", "No stop here", True),
            ("uses", "dough", "The Dough rises.", True),
            ("uses", "dough", "Doughnuts.", False),
            ("avoids", "dough", "The Dough rises.", False),
            ("avoids", "dough", "Doughnuts.", True),
            ("starts_with", "Sure", "sure, why not", True),
            ("starts_with", "Sure", "Surely.", False),
            ("ends_with", "?", "Is it? ", True),
            ("ends_with", "?", "Is it? No.", False),
            ("digits", "Avoid", "Two of them.", True),
            ("digits", "Avoid", "2 of them.", False),
            ("digits", "Use", "2 of them.", True),
        ],
    )
    def test_rule(self, kind: str, value: str, text: str, met: bool):
        assert Instruction(kind, value).met(text) is met

    def test_counts(self):
        assert words("It's a well-known fact, no?") == ["It's", "a", "well-known", "fact", "no"]
        assert [sentences(text) for text in ("", " ", "One", "One. Two", "What?! No...", "3.5 km.")] == [
            0,
            0,
            1,
            2,
            2,
            1,
        ]

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("met", [True, False])
    def test_what_is_written_holds_as_asked(self, kind: str, met: bool):
        written = 0
        for seed, (text, *others) in enumerate(itertools.permutations(TEXTS, 3)):
            one = write(kind, text, met, others, rng(seed))
            if one is not None:
                written += 1
                assert one.met(text) is met, (one, text)
                assert one.text == KINDS[kind].text.format(one.value)
        assert written > 100

    @settings(max_examples=200, deadline=None)
    @given(
        st.text(max_size=80), st.lists(st.text(max_size=40), max_size=2), st.sampled_from(sorted(KINDS)), st.booleans()
    )
    def test_of_any_text(self, text: str, others: list[str], kind: str, met: bool):
        one = write(kind, text, met, others, rng())
        assert one is None or one.met(text) is met

    def test_words_and_numbers_come_from_the_responses(self):
        one = write("uses", TEXTS[0], False, [TEXTS[1]], rng())
        assert one is not None
        assert one.value in words(TEXTS[1])
        lengths = {int(w.value) for s in range(50) if (w := write("at_most_words", TEXTS[0], True, [], rng(s)))}
        assert min(lengths) == len(words(TEXTS[0])) == 10
        assert max(lengths) == 15

    def test_condition(self):
        assert condition((Instruction("sentences", "2"), Instruction("ends_with", "?"))) == "Sentences: 2. End with ?"


class TestConditions:
    @pytest.fixture(scope="class")
    def rows(self):
        return list(assistant(rows=300).examples)

    def test_the_first_is_preferred_given_its_response(self, rows):
        forms = set()
        for i, example in enumerate(rows):
            found = write_conditions(example.responses, 3, tuple(KINDS), rng(i))
            assert found is not None
            first, second = found.pair
            assert 1 <= len(first) == len(second) <= 3
            assert [one.kind for one in first] == [one.kind for one in second]
            abouts = [KINDS[one.kind].about for one in first]
            assert len(set(abouts)) == len(abouts)
            followed = found.followed(example.responses)
            assert followed.shape == (2, len(example.responses))
            one, two = followed[:, found.source]
            full, none = one == len(first) and two < len(first), one >= 1 and two == 0
            assert full or none
            forms |= {"all, not all"} if full and two > 0 else {"some, none"} if none and one < len(first) else set()
        assert forms == {"all, not all", "some, none"}

    def test_the_same_seed_writes_the_same(self, rows):
        made = [[write_conditions(e.responses, 3, tuple(KINDS), rng(s)) for e in rows[:50]] for s in (1, 1, 2)]
        assert made[0] == made[1] != made[2]

    def test_preferred_and_other_responses_are_augmented_alike(self, rows):
        """A preferred response violates instructions as often as one that is not preferred."""
        met: dict[bool, list[float]] = {True: [], False: []}
        compared = {True: 0, False: 0}
        for i, example in enumerate(rows):
            found = write_conditions(example.responses, 3, tuple(KINDS), rng(i))
            assert found is not None
            followed, size = found.followed(example.responses), len(found.pair[0])
            wins = [g for (((_, g), _),) in intra_sample(followed, size)]
            for (a, b), (helpful, *_) in zip(example.pairs, example.labels, strict=True):
                for g, preferred in ((a, helpful == 1), (b, helpful == 0)):
                    met[preferred] += (followed[:, g] / size).tolist()
                    compared[preferred] += g in wins
        assert np.mean(met[True]) == pytest.approx(np.mean(met[False]), abs=0.03)
        assert compared[True] == pytest.approx(compared[False], rel=0.1)
        assert min(compared.values()) > 900  # of 1800 each

    def test_nothing_to_write(self):
        assert write_conditions(["", ""], 3, ("uses",), rng()) is None
        assert write_conditions(["Yes."], 3, ("starts_with",), rng()) is None  # no other first word


class TestWhoWins:
    def test_within_a_sample(self):
        followed = np.array([[2, 1, 0, 1, 2, 1], [1, 0, 1, 1, 2, 2]])
        assert intra_sample(followed, 2) == [
            (((0, 0), (1, 0)),),  # all of the first, not all of the second
            (((0, 1), (1, 1)),),  # one of the first, none of the second
            (((1, 2), (0, 2)),),  # none of the first, one of the second
            (((1, 5), (0, 5)),),
        ]
        assert intra_sample(np.array([[1], [2]]), 3) == []  # neither all nor none: the paper does not order these

    def test_margins_across_samples(self):
        followed = np.array([[2, 0, 1], [1, 0, 2]])
        assert inter_margins(followed, PAIRS) == [
            (((0, 0), (0, 1)), ((1, 1), (1, 0))),  # by 2 behind the first, by 1 behind the second
            (((0, 0), (0, 2)), ((1, 2), (1, 0))),  # by 1, and by -1
            (((0, 1), (0, 2)), ((1, 2), (1, 1))),  # by -1, and by -2
        ]
        assert inter_margins(np.array([[1, 1], [2, 2]]), ((0, 1),)) == []

    def test_responses_across_samples(self):
        followed = np.array([[2, 0], [1, 2]])
        assert inter_responses(followed, ((0, 1),)) == [(((1, 0), (0, 1)),)]  # 2 against 2 is a tie; 1 beats 0

    @given(st.lists(st.tuples(*[st.integers(0, 3)] * 2), min_size=2, max_size=4))
    def test_the_order_of_the_conditions_does_not_matter(self, counts):
        followed = np.array(counts).T
        pairs = list(itertools.combinations(range(len(counts)), 2))

        def swapped(comparisons):
            return {frozenset(((1 - c, g), (1 - d, h)) for (c, g), (d, h) in each) for each in comparisons}

        for rule in (inter_margins, inter_responses):
            mine = {frozenset(each) for each in rule(followed, pairs)}
            assert swapped(rule(followed[::-1], pairs)) == mine
        assert swapped(intra_sample(followed[::-1], 3)) == {frozenset(c) for c in intra_sample(followed, 3)}

    def test_counts_are_of_met_instructions(self):
        pair = (
            (Instruction("sentences", "1"), Instruction("ends_with", "?")),
            (Instruction("sentences", "2"), Instruction("ends_with", "!")),
        )
        found = Conditions(pair, 0).followed(["Is it?", "It is 2. Yes."])
        np.testing.assert_array_equal(found, [[2, 0], [0, 1]])
