"""Token rows in flat arrays: the same rows as encoded one by one, hashed by content, kept and mapped."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_logprobs import CONVERSATION, TEMPLATE, encoder

from mopo_cli.base.processes import ONE_THREAD, TOKENIZERS
from mopo_cli.base.types import Example
from mopo_cli.data import batches
from mopo_cli.data.batches import batch_rows, length_order
from mopo_cli.data.encoder import Encoder, _tokenizer_threads
from mopo_cli.data.table import TableBuilder, TokenRow, TokenTable, row_length
from mopo_cli.training import cache

ROWS = [TokenRow([5, 6, 7], [[8, 9], [10, 11, 1]]), TokenRow([12], [[1], [16, 1], [3, 4, 5, 1]]), TokenRow([2, 3], [])]


def table(rows: Sequence[TokenRow]) -> TokenTable:
    built = TableBuilder()
    for row in rows:
        pieces = [row.prompt, *row.responses]
        sizes = np.array([len(piece) for piece in pieces])
        built.add(np.concatenate([np.array(piece) for piece in pieces]), sizes, np.array([len(pieces)]))
    return built.table()


class TestTable:
    def test_holds_the_rows(self):
        made = table(ROWS)
        assert list(made) == ROWS
        assert made == ROWS
        assert made != ROWS[:2]
        assert [made[0], made[-1]] == [ROWS[0], ROWS[-1]]
        assert made[1:] == ROWS[1:]
        assert made.ids.dtype == np.int32
        with pytest.raises(IndexError):
            made[3]
        assert table([]) == []

    def test_lengths(self):
        made = table(ROWS)
        assert made.lengths.tolist() == [row_length(row) for row in ROWS]
        assert made.prompt_lengths.tolist() == [3, 1, 2]
        assert made.longest_responses.tolist() == [3, 4, 0]
        some = made.select(np.array([2, 0]))
        assert some == [ROWS[2], ROWS[0]]
        assert some.longest_responses.tolist() == [0, 3]
        assert table([]).longest_responses.tolist() == []
        assert length_order(made) == length_order(ROWS)

    def test_the_digest_is_of_the_content(self, monkeypatch: pytest.MonkeyPatch):
        made = table(ROWS)
        assert made.select(np.array([1, 2])).digest() == table(ROWS[1:]).digest()
        others = [
            ROWS[:2],
            ROWS[::-1],
            [TokenRow([5, 6], [[7, 8, 9], [10, 11, 1]]), *ROWS[1:]],
            [TokenRow([5, 6, 7], [[8, 9, 10, 11, 1]]), *ROWS[1:]],
            [TokenRow([5, 6, 8], [[8, 9], [10, 11, 1]]), *ROWS[1:]],
            [],
        ]
        assert len({made.digest(), *(table(other).digest() for other in others)}) == 7

    def test_comes_back_from_a_file_without_being_read(self, tmp_path: Path):
        made = table(ROWS)
        made.save(tmp_path / "kept")
        found = TokenTable.load(tmp_path / "kept")
        assert isinstance(found.ids, np.memmap)
        assert found == made
        assert found.digest() == made.digest()
        assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def example(prompt: Any, *responses: Any) -> Example:
    return Example(prompt, responses, ((0, 1),), ((1.0,),), source="rows.jsonl:4")


EXAMPLES = [
    example("w1 w2", "w3", "w4 w5"),
    example("w1 w2", " w3", "w3"),
    example("", "w3", "w1"),
    example("", " ", "w1 w2 w3"),
    example(CONVERSATION, "w1", [{"role": "assistant", "content": "w9"}]),
    example(CONVERSATION[1:2], [{"role": "assistant", "content": " w9"}], "w1"),
    example("w1 w2", "w3", "w4 w5"),
]


@pytest.mark.parametrize(
    "settings",
    [{}, {"bos": True}, {"bos": True, "closes": True}, {"bos": True, "template": TEMPLATE},
     {"bos": True, "template": TEMPLATE, "chat_template": "always"}, {"chat_template": "always"}],
)  # fmt: skip
@pytest.mark.parametrize("block", [2, 8192])
def test_encoding_many_rows_is_encoding_each(settings: dict[str, Any], block: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(batches, "BLOCK_ROWS", block)
    made = encoder(**settings)
    assert made.table(EXAMPLES) == [made.row(e.prompt, e.responses) for e in EXAMPLES]
    monkeypatch.setattr(type(made.tokenizer), "is_fast", property(lambda self: False))
    assert made.table(EXAMPLES) == [made.row(e.prompt, e.responses) for e in EXAMPLES], "a slow tokenizer"


@pytest.mark.parametrize(
    ("before", "inside", "after"),
    [("false",) * 3, ("true",) * 3, (None, "true", ONE_THREAD), (ONE_THREAD, "true", ONE_THREAD)],
)
def test_threads_of_the_tokenizer_end_with_the_encoding_and_are_the_users_to_choose(
    monkeypatch: pytest.MonkeyPatch, before: str | None, inside: str, after: str
):
    monkeypatch.setenv(TOKENIZERS, before or "")
    if before is None:
        monkeypatch.delenv(TOKENIZERS)
    with _tokenizer_threads():
        assert os.environ[TOKENIZERS] == inside
    assert os.environ[TOKENIZERS] == after


class TestKept:
    @pytest.fixture
    def encodings(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """How many examples each call of Encoder.table took."""
        calls: list[int] = []
        original = Encoder.table

        def counted(self: Encoder, examples: Sequence[Example]) -> TokenTable:
            calls.append(len(examples))
            return original(self, examples)

        monkeypatch.setattr(Encoder, "table", counted)
        monkeypatch.setattr(cache, "WORTH_KEEPING", 10)
        return calls

    def test_the_same_texts_are_encoded_once(self, tmp_path: Path, encodings: list[int]):
        first, second = (cache.encoded(str(tmp_path), encoder(), EXAMPLES) for _ in range(2))
        assert encodings == [len(EXAMPLES)]
        assert isinstance(second.ids, np.memmap)
        assert first == second == encoder().table(EXAMPLES)
        assert cache.encoded(str(tmp_path), encoder(max_length=7), EXAMPLES) == first, "whatever fits the context"
        assert len(encodings) == 2

    def test_other_texts_tokenizers_and_templates_are_encoded_anew(self, tmp_path: Path, encodings: list[int]):
        cache.encoded(str(tmp_path), encoder(), EXAMPLES)
        cache.encoded(str(tmp_path), encoder(), EXAMPLES[1:])
        cache.encoded(str(tmp_path), encoder(bos=True), EXAMPLES)
        cache.encoded(str(tmp_path), encoder(template=TEMPLATE), EXAMPLES)
        cache.encoded(str(tmp_path), encoder(chat_template="always"), EXAMPLES)
        assert len(encodings) == 5
        assert len(list(tmp_path.glob("tokens-*"))) == 5

    def test_small_data_and_no_cache_write_nothing(
        self, tmp_path: Path, encodings: list[int], monkeypatch: pytest.MonkeyPatch
    ):
        cache.encoded(None, encoder(), EXAMPLES)
        monkeypatch.setattr(cache, "WORTH_KEEPING", 10_000)
        cache.encoded(str(tmp_path), encoder(), EXAMPLES)
        assert len(encodings) == 2
        assert list(tmp_path.iterdir()) == []

    def test_a_cache_that_cannot_be_written_is_no_error(
        self, tmp_path: Path, encodings: list[int], capsys: pytest.CaptureFixture[str]
    ):
        (tmp_path / "file").write_text("x")
        assert cache.encoded(str(tmp_path / "file"), encoder(), EXAMPLES) == encoder().table(EXAMPLES)
        assert "encoded rows cannot be kept there" in capsys.readouterr().err


def test_the_rows_of_steps_are_those_of_a_permutation_an_epoch():
    steps = list(range(40))
    expected = [batch_rows(23, 5, 7, step) for step in steps]
    random.Random(0).shuffle(steps)
    assert all(batch_rows(23, 5, 7, step) == expected[step] for step in steps)
    epochs = [np.random.default_rng([7, epoch]).permutation(23).tolist() for epoch in range(9)]
    assert list(chain.from_iterable(expected))[: 8 * 23] == list(chain.from_iterable(epochs[:8]))
