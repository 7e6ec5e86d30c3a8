"""Each corpus against a small directory in the hub's layout, and the two real files where they are at hand."""

from __future__ import annotations

import gzip
import inspect
import json
import math
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra.utils import get_method
from omegaconf import OmegaConf

from mopo_cli.base.errors import UserError
from mopo_cli.base.types import Corpus, Example
from mopo_cli.data import corpora
from mopo_cli.data.columns import MOST_REASONS
from mopo_cli.data.computed import concise, grounded

CONF = Path(__file__).parents[2] / "conf"
REAL = Path(__file__).parents[3] / "shared" / "data"
QA_FILE = REAL / "qa_feedback_dev.json.gz"
HH_FILE = REAL / "hh_harmless_base_test.jsonl.gz"
MISSING = -1.0  # stands for NaN in the expected labels, since NaN equals nothing


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


def labels(example: Example) -> dict[tuple[int, int], tuple[float, ...]]:
    rows = [tuple(MISSING if math.isnan(value) else value for value in row) for row in example.labels]
    return dict(zip(example.pairs, rows, strict=True))


def own_test(corpus: Corpus) -> list[Example]:
    assert corpus.test is not None
    return list(corpus.test)


class TestPairs:
    LIST_ROW: ClassVar[dict[str, Any]] = {
        "prompt": "Q",
        "responses": ["a", "b"],
        "scores": {"helpful": [7, 3], "safe": [None, 1]},
    }
    PAIR_ROW: ClassVar[dict[str, Any]] = {"prompt": "Q", "chosen": "a", "rejected": "b"}

    def test_all_objectives_that_the_rows_carry(self, tmp_path: Path):
        more = {**self.LIST_ROW, "labels": {"short": [[0, 1, 0.0]]}}
        path = write(tmp_path / "rows.jsonl", self.LIST_ROW, more)
        corpus = corpora.pairs(path)
        assert corpus.objectives == ("helpful", "safe", "short")
        assert [labels(example) for example in corpus.examples] == [
            {(0, 1): (1.0, MISSING, MISSING)},
            {(0, 1): (1.0, MISSING, 0.0)},
        ]
        assert corpus.test is None
        assert corpus.provenance["path"] == path

    def test_chosen_means(self, tmp_path: Path):
        path = write(tmp_path / "rows.jsonl", self.PAIR_ROW, {**self.PAIR_ROW, "short": 0})
        corpus = corpora.pairs(path, chosen_means="helpful")
        assert corpus.objectives == ("helpful", "short")
        assert [labels(example)[0, 1] for example in corpus.examples] == [(1.0, MISSING), (1.0, 0.0)]

    def test_given_objectives_margins_and_test_path(self, tmp_path: Path):
        train, held = write(tmp_path / "rows.jsonl", self.LIST_ROW), write(tmp_path / "test.jsonl", self.LIST_ROW)
        corpus = corpora.pairs(train, test_path=held, margins={"helpful": 4}, objectives=["helpful"])
        assert [labels(example) for example in corpus.examples] == [{(0, 1): (0.5,)}]
        assert [example.source for example in own_test(corpus)] == [f"{held}:1"]

    def test_a_directory_brings_its_own_test_split(self, tmp_path: Path):
        write(tmp_path / "train.jsonl", self.LIST_ROW)
        write(tmp_path / "test.jsonl", self.LIST_ROW, self.LIST_ROW)
        corpus = corpora.pairs(str(tmp_path))
        assert (len(list(corpus.examples)), len(own_test(corpus))) == (1, 2)

    def test_parquet(self, tmp_path: Path):
        path = tmp_path / "rows.parquet"
        triples = {"helpful": [[0.0, 1.0, 1.0]]}  # Parquet has one type a list, so the indices are floats
        table = pa.Table.from_pylist(
            [
                {
                    "prompt": [{"role": "user", "content": "Q"}],
                    "responses": ["a", "b"],
                    "labels": triples,
                    "scores": None,
                },
                {
                    "prompt": [{"role": "user", "content": "Q"}],
                    "responses": ["a", "b"],
                    "scores": {"helpful": [1.0, 1.0]},
                },
            ]
        )
        pq.write_table(table, path)
        assert [labels(example) for example in corpora.pairs(str(path)).examples] == [
            {(0, 1): (1.0,)},
            {(0, 1): (0.5,)},
        ]

    def test_parquet_pairs_with_null_columns(self, tmp_path: Path):
        path = tmp_path / "rows.parquet"
        rows = [{**self.PAIR_ROW, "helpful": 1.0, "safe": None}, {**self.PAIR_ROW, "helpful": None, "safe": 0.0}]
        pq.write_table(pa.Table.from_pylist(rows), path)
        corpus = corpora.pairs(str(path))
        assert [labels(example)[0, 1] for example in corpus.examples] == [(1.0, MISSING), (MISSING, 0.0)]

    def test_bad_rows_are_found_when_they_are_reached(self, tmp_path: Path):
        path = write(tmp_path / "rows.jsonl", self.LIST_ROW, {**self.LIST_ROW, "prompt": ""})
        examples = iter(corpora.pairs(path).examples)
        next(examples)
        with pytest.raises(UserError, match="prompt is empty") as caught:
            next(examples)
        assert str(caught.value).startswith(f"{path}:2: ")

    def test_a_missing_path(self):
        with pytest.raises(UserError, match=r"dataset.path is missing"):
            corpora.pairs(None)

    def test_undeclared_chosen(self, tmp_path: Path):
        path = write(tmp_path / "rows.jsonl", self.PAIR_ROW)
        with pytest.raises(UserError, match=r"rows.jsonl:1: .*dataset.chosen_means=<objective>"):
            corpora.pairs(path)

    def test_undeclared_chosen_in_a_later_row(self, tmp_path: Path):
        path = write(tmp_path / "rows.jsonl", {**self.PAIR_ROW, "short": 0}, self.PAIR_ROW)
        with pytest.raises(UserError, match=r"rows.jsonl:2: .*dataset.chosen_means=<objective>"):
            list(corpora.pairs(path).examples)

    def test_chosen_means_outside_the_objectives(self, tmp_path: Path):
        path = write(tmp_path / "rows.jsonl", self.PAIR_ROW)
        with pytest.raises(UserError, match=r"dataset.chosen_means=helpfull: .* allowed: helpful, safe"):
            corpora.pairs(path, chosen_means="helpfull", objectives=["helpful", "safe"])

    @pytest.mark.parametrize("rows", [[], [{"prompt": "Q", "responses": ["a", "b"]}]])
    def test_no_labels_at_all(self, tmp_path: Path, rows: list[dict[str, Any]]):
        path = write(tmp_path / "rows.jsonl", *rows)
        with pytest.raises(UserError, match="no row carries labels or scores"):
            corpora.pairs(path)

    @pytest.mark.parametrize(("margins", "match"), [({"x": 1}, "margins.x"), ({"helpful": -1}, "0 or more")])
    def test_bad_margins(self, tmp_path: Path, margins: dict[str, float], match: str):
        path = write(tmp_path / "rows.jsonl", self.LIST_ROW)
        with pytest.raises(UserError, match=match):
            corpora.pairs(path, margins=margins)


class TestDroppedRows:
    GOOD: ClassVar[dict[str, Any]] = {"prompt": "Q", "chosen": "a", "rejected": "b", "helpful": 1}

    def test_lines_that_are_no_rows_are_dropped_too(self, tmp_path: Path):
        good = json.dumps(self.GOOD).encode()
        deep = b"[" * 100_000
        digits = b'{"prompt": ' + b"1" * 5000 + b"}"
        lines = [b"{", good, b'{"a": "\xff"}', b'{"b": "\xfe\xfe"}', b"[1]", b"3", deep, digits, good, b'{"c": nul}']
        (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
        corpus = corpora.pairs(str(tmp_path / "rows.jsonl"), invalid="drop")
        assert len(list(corpus.examples)) == 2
        assert corpus.provenance["skipped"] == {
            "not JSON…; expected one JSON object a line, or in a .json file one list of objects": 2,
            "not UTF-8 at byte …": 2,
            "expected a JSON object, found …": 2,
            "no JSON that can be read (…)": 2,
        }

    @pytest.mark.parametrize("line", ["{", '{"a": "\\ud800"}', "[" * 100_000, "1" * 5000])
    def test_an_error_tells_how_to_go_on(self, tmp_path: Path, line: str):
        path = tmp_path / "rows.jsonl"
        path.write_text(f"{json.dumps(self.GOOD)}\n{line}\n")
        with pytest.raises(UserError, match=r"rows\.jsonl:2: .*dataset\.invalid=drop leaves such rows out"):
            corpora.pairs(str(path))

    def test_reasons_are_counted_by_kind(self, tmp_path: Path):
        rows = [{**self.GOOD, "helpful": 2 + i} for i in range(500)] + [{f"key{i}": i} for i in range(500)]
        path = write(tmp_path / "rows.jsonl", self.GOOD, *rows)
        corpus = corpora.pairs(path, invalid="drop")
        assert len(list(corpus.examples)) == 1
        skipped: Any = corpus.provenance["skipped"]
        assert list(skipped.values()) == [500, 500]
        assert next(iter(skipped)).startswith("helpful holds …; I is a number")

    def test_of_many_kinds_the_last_are_counted_together(self, tmp_path: Path):
        names = [f"objective{i}" for i in range(40)]
        rows = [{**self.GOOD, name: 7} for name in names]
        path = write(tmp_path / "rows.jsonl", {**self.GOOD, **dict.fromkeys(names, 1)}, *rows)
        corpus = corpora.pairs(path, invalid="drop")
        assert len(list(corpus.examples)) == 1
        skipped: Any = corpus.provenance["skipped"]
        assert len(skipped) == MOST_REASONS + 1
        assert skipped["others"] == 40 - MOST_REASONS

    def test_columns_that_nothing_reads_are_listed(self, tmp_path: Path):
        path = write(tmp_path / "rows.jsonl", {**self.GOOD, "id": None, "note": "x"}, {**self.GOOD, "id": 7})
        corpus = corpora.pairs(path, objectives=["helpful"])
        assert len(list(corpus.examples)) == 2
        assert corpus.provenance["unread_columns"] == ["note", "id"]


class TestQaFeedback:
    ROW: ClassVar[dict[str, Any]] = {
        "question": "When?",
        "passages": [["Moon", "Moon\n\nIt rose.", "It set."], ["Sun", "It shone."]],
        **{f"prediction {i}": text for i, text in enumerate(("one", "two", "two", "four"), start=1)},
        "preference": [1, 2, 0, 1, 1, 2],
    }

    def test_comparisons_and_context(self, tmp_path: Path):
        corpus = corpora.qa_feedback(write(tmp_path / "dev.json", self.ROW))
        (made,) = corpus.examples
        assert made.prompt == "When?"
        assert made.responses == ("one", "two", "two", "four")
        assert made.context == "Moon\n\nIt rose. It set.\n\nSun\n\nIt shone."
        expected = {(0, 1): 1.0, (0, 2): 0.0, (0, 3): 0.5, (1, 2): 0.5, (1, 3): 1.0, (2, 3): 0.0}
        assert labels(made) == {pair: (value,) for pair, value in expected.items()}  # 2v3 is one text: a tie

    def test_passages_in_the_prompt(self, tmp_path: Path):
        (made,) = corpora.qa_feedback(write(tmp_path / "dev.json", self.ROW), passages=True).examples
        assert made.prompt == f"{made.context}\n\nWhen?"

    def test_test_path(self, tmp_path: Path):
        path = write(tmp_path / "dev.json", self.ROW)
        assert len(own_test(corpora.qa_feedback(path, test_path=path))) == 1

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"preference": [3, 0, 0, 0, 0, 0]}, "preference holds 3; allowed: 0, 1, 2"),
            ({"preference": [1]}, "not a row of this corpus"),
            ({"passages": None}, "found the keys: question, passages"),
        ],
    )
    def test_rows_of_another_shape(self, tmp_path: Path, change: dict[str, Any], match: str):
        path = write(tmp_path / "dev.json", {**self.ROW, **change})
        with pytest.raises(UserError, match=match) as caught:
            list(corpora.qa_feedback(path).examples)
        assert f"{path}:1: " in str(caught.value)

    def test_a_missing_path(self):
        with pytest.raises(UserError, match=r"dataset.path is missing"):
            corpora.qa_feedback(None)

    @pytest.mark.skipif(not QA_FILE.exists(), reason=f"{QA_FILE} is not at hand")
    def test_the_real_file(self):
        corpus = corpora.qa_feedback(str(QA_FILE))
        examples = list(corpus.examples)
        first = examples[0]
        assert first.prompt == "When does bloom by troye sivan come out?"
        assert first.responses[1].startswith("Bloom, the second studio album")  # type: ignore[union-attr]
        assert first.context.startswith("Bloom (Troye Sivan album)\n\nBloom is the second studio album")
        # preference [0, 1, 2, 1, 0, 2] for 1v2 1v3 1v4 2v3 2v4 3v4
        expected = {(0, 1): 0.5, (0, 2): 1.0, (0, 3): 0.0, (1, 2): 1.0, (1, 3): 0.5, (2, 3): 0.0}
        assert labels(first) == {pair: (value,) for pair, value in expected.items()}
        assert len(examples) == 498
        assert corpus.provenance["skipped"] == {"no passages": 2}
        # all 500: 384 ties, 1577 for the first, 1039 for the second; the two left out hold 8 ties and 4 for the first
        assert Counter(row[0] for made in examples for row in made.labels) == {0.5: 376, 1.0: 1573, 0.0: 1039}
        assert all(0 <= grounded("", str(made.responses[0]), made.context) <= 1 for made in examples)


def transcript(question: str, answer: str) -> str:
    return f"\n\nHuman: {question}\n\nAssistant: {answer}"


class TestHhRlhf:
    PARTS: ClassVar[dict[str, list[str]]] = {
        "helpful": ["helpful-base", "helpful-online"],
        "harmless": ["harmless-base"],
    }

    def hub(self, root: Path) -> str:
        def rows(name: str, count: int) -> list[dict[str, Any]]:
            return [
                {"chosen": transcript(name, f"good {i}"), "rejected": transcript(name, "bad")} for i in range(count)
            ]

        write(root / "helpful-base" / "train.jsonl.gz", *rows("base", 1))
        write(root / "helpful-base" / "test.jsonl.gz", *rows("base test", 2))
        write(root / "helpful-online" / "train.jsonl.gz", *rows("online", 2))
        write(root / "harmless-base" / "train.jsonl.gz", *rows("harmless", 5))
        write(root / "harmless-base" / "test.jsonl.gz", *rows("harmless test", 1))
        return str(root)

    def test_each_part_judges_its_own_objective_and_the_parts_alternate(self, tmp_path: Path):
        corpus = corpora.hh_rlhf(self.hub(tmp_path), self.PARTS)
        assert corpus.objectives == ("helpful", "harmless")
        examples = list(corpus.examples)
        assert [str(made.prompt).split("\n\n")[1] for made in examples] == [
            *("Human: base", "Human: harmless", "Human: online", "Human: harmless", "Human: online"),
            *("Human: harmless", "Human: harmless", "Human: harmless"),
        ]
        assert examples[0].prompt == "\n\nHuman: base\n\nAssistant:"
        assert examples[0].responses == (" good 0", " bad")
        assert [labels(made)[0, 1] for made in islice(examples, 2)] == [(1.0, MISSING), (MISSING, 1.0)]
        assert len(own_test(corpus)) == 3

    def test_no_test_set_unless_every_objective_has_one(self, tmp_path: Path):
        path = self.hub(tmp_path)
        (tmp_path / "harmless-base" / "test.jsonl.gz").unlink()
        assert corpora.hh_rlhf(path, self.PARTS).test is None

    def test_a_part_may_be_a_single_name(self, tmp_path: Path):
        corpus = corpora.hh_rlhf(self.hub(tmp_path), {"helpful": "helpful-online"})
        assert len(list(corpus.examples)) == 2

    def test_unusable_rows_are_counted(self, tmp_path: Path):
        good = {"chosen": transcript("Q", "a"), "rejected": transcript("Q", "b")}
        empty = {"chosen": transcript("Q", ""), "rejected": transcript("Q", "b")}
        apart = {"chosen": "yes", "rejected": "no"}
        write(tmp_path / "harmless-base" / "train.jsonl.gz", good, empty, apart, good)
        corpus = corpora.hh_rlhf(str(tmp_path), {"harmless": ["harmless-base"]})
        assert len(list(corpus.examples)) == 2
        assert corpus.provenance["skipped"] == {"fewer than two responses with text": 1, "no shared prompt": 1}

    def test_errors(self, tmp_path: Path):
        path = self.hub(tmp_path)
        with pytest.raises(UserError, match="holds no 'red-team'; found: harmless-base"):
            corpora.hh_rlhf(path, {"harmless": ["red-team"]})
        with pytest.raises(UserError, match=r"dataset.parts is empty"):
            corpora.hh_rlhf(path, {})

    @pytest.mark.skipif(not HH_FILE.exists(), reason=f"{HH_FILE} is not at hand")
    def test_the_real_file(self):
        corpus = corpora.hh_rlhf(str(REAL), {"harmless": [HH_FILE.name]})
        examples = list(corpus.examples)
        assert len(examples) == 2308
        assert corpus.provenance["skipped"] == {"fewer than two responses with text": 4}
        assert str(examples[0].prompt).endswith("do not have anything to do with pens\n\nAssistant:")
        assert str(examples[0].responses[0]).startswith(" No, sorry!  All of these involve a pen")
        assert str(examples[0].responses[1]).startswith(" There are lots of funny things")
        assert all(labels(made) == {(0, 1): (1.0,)} for made in examples)


class TestRedditTldr:
    @staticmethod
    def row(choice: int, **more: Any) -> dict[str, Any]:
        info = {"id": "x", "post": "I {fell}.", "title": "Oops", "subreddit": "tifu", "article": None}
        summaries = [{"text": " Fell.", "policy": "sup"}, {"text": " Stood.", "policy": "ref"}]
        return {"info": info, "summaries": summaries, "choice": choice, "extra": {"confidence": 8}, **more}

    def article(self) -> dict[str, Any]:
        info = {"id": "x", "post": None, "title": "T", "subreddit": None, "article": "News."}
        return {**self.row(0), "info": info}

    def test_the_parquet_conversion_of_the_hub(self, tmp_path: Path):
        for split, rows in (("train", [self.row(0), self.row(1)]), ("validation", [self.article()])):
            file = tmp_path / "comparisons" / split / "0000.parquet"
            file.parent.mkdir(parents=True)
            pq.write_table(pa.Table.from_pylist(rows), file)
        write(tmp_path / "axis" / "test.jsonl", {"other": 1})
        corpus = corpora.reddit_tldr(str(tmp_path))
        first, second = corpus.examples
        assert first.prompt == "SUBREDDIT: r/tifu\n\nTITLE: Oops\n\nPOST: I {fell}.\n\nTL;DR:"
        assert first.responses == (" Fell.", " Stood.")
        assert first.context == "I {fell}."
        assert [labels(made) for made in (first, second)] == [{(0, 1): (1.0,)}, {(0, 1): (0.0,)}]
        (news,) = own_test(corpus)
        assert news.prompt == "Article:\nNews.\n\nTL;DR:"
        assert news.context == "News."

    def test_a_file_that_mixes_the_splits(self, tmp_path: Path):
        path = write(tmp_path / "batch3.json", self.row(0, split="train"), self.row(1, split="valid1"))
        corpus = corpora.reddit_tldr(path)
        assert len(list(corpus.examples)) == 1
        assert corpus.provenance["skipped"] == {"validation row in a training file": 1}
        assert corpus.test is None

    def test_a_bad_choice(self, tmp_path: Path):
        path = write(tmp_path / "rows.jsonl", self.row(2))
        with pytest.raises(UserError, match=r"rows.jsonl:1: .*choice holds 2; allowed: 0, 1"):
            list(corpora.reddit_tldr(path).examples)


class TestUltraFeedback:
    @staticmethod
    def completion(response: str, *ratings: str | None) -> dict[str, Any]:
        notes = {
            aspect: {"Rating": rating, "Rationale": "..."}
            for aspect, rating in zip(corpora.ULTRAFEEDBACK_ASPECTS, ratings, strict=True)
        }
        return {"model": "m", "response": response, "annotations": notes, "overall_score": 10}

    def test_ratings(self, tmp_path: Path):
        rows = [
            self.completion("a", "5", "4", "3", "2"),
            self.completion("b", "4", "N/A", "3", None),
            self.completion(" ", "5", "5", "5", "5"),
            self.completion("d", "4", "5", "1", "3"),
        ]
        write(tmp_path / "flan.jsonl", {"instruction": "Do it", "source": "flan", "completions": rows})
        write(tmp_path / "sharegpt.jsonl", {"instruction": "Do it", "source": "sharegpt", "completions": rows[:1]})
        corpus = corpora.ultrafeedback(str(tmp_path))
        assert corpus.objectives == ("instruction_following", "honesty", "truthfulness", "helpfulness")
        (made,) = corpus.examples
        assert made.responses == ("a", "b", "d")  # the blank third one is left out, with its ratings
        assert labels(made) == {
            (0, 1): (1.0, MISSING, 0.5, MISSING),
            (0, 2): (1.0, 0.0, 1.0, 0.0),
            (1, 2): (0.5, MISSING, 1.0, MISSING),
        }
        assert corpus.provenance["skipped"] == {"fewer than two responses with text": 1}
        assert corpus.test is None

    def test_an_aspect_without_annotation_is_missing(self, tmp_path: Path):
        bare = {"response": "b", "annotations": {"honesty": {"Rating": "1"}}}
        row = {"instruction": "Do it", "completions": [self.completion("a", "5", "4", "3", "2"), bare]}
        (made,) = corpora.ultrafeedback(write(tmp_path / "rows.jsonl", row)).examples
        assert labels(made) == {(0, 1): (MISSING, 1.0, MISSING, MISSING)}


class TestHelpSteer2:
    @staticmethod
    def row(prompt: str, response: str, *ratings: int) -> dict[str, Any]:
        return {
            "prompt": prompt,
            "response": response,
            **dict(zip(corpora.HELPSTEER2_ATTRIBUTES, ratings, strict=True)),
        }

    def test_consecutive_rows_are_grouped(self, tmp_path: Path):
        write(
            tmp_path / "train.jsonl.gz",
            self.row("c#", "a", 3, 4, 4, 2, 1),
            self.row("c#", "b", 4, 4, 3, 2, 2),
            self.row("Q", "alone", 4, 4, 4, 4, 4),
            self.row("c#", "again", 1, 1, 1, 1, 1),
            self.row("c#", "once more", 0, 1, 2, 1, 1),
        )
        write(tmp_path / "validation.jsonl.gz", self.row("v", "a", 1, 1, 1, 1, 1), self.row("v", "b", 2, 1, 1, 1, 1))
        write(tmp_path / "preference" / "preference.jsonl.gz", {"other": 1})
        corpus = corpora.helpsteer2(str(tmp_path))
        first, second = corpus.examples
        assert first.prompt == "c#"
        assert labels(first) == {(0, 1): (0.0, 0.5, 1.0, 0.5, 0.0)}
        assert labels(second) == {(0, 1): (1.0, 0.5, 0.0, 0.5, 0.5)}
        assert second.source == f"{tmp_path}/train.jsonl.gz:4"
        assert corpus.provenance["skipped"] == {"fewer than two responses with text": 1}
        (held,) = own_test(corpus)
        assert held.prompt == "v"

    def test_several_turns_become_messages(self, tmp_path: Path):
        prompt = "one\ntwo\n<extra_id_1>Assistant\nthree\n\n<extra_id_1>User\nfour"
        rows = [self.row(prompt, response, 1, 1, 1, 1, 1) for response in ("a", "b")]
        (made,) = corpora.helpsteer2(write(tmp_path / "rows.jsonl", *rows)).examples
        assert made.prompt == [
            {"role": "user", "content": "one\ntwo"},
            {"role": "assistant", "content": "three\n"},
            {"role": "user", "content": "four"},
        ]

    def test_a_missing_attribute(self, tmp_path: Path):
        path = write(tmp_path / "rows.jsonl", {"prompt": "Q", "response": "a"}, {"prompt": "Q", "response": "b"})
        with pytest.raises(UserError, match=r"rows.jsonl:1: not a row of this corpus \(KeyError: 'helpfulness'\)"):
            list(corpora.helpsteer2(path).examples)


class TestPkuSafeRlhf:
    @staticmethod
    def row(better: int, safer: int, **more: Any) -> dict[str, Any]:
        texts = {"prompt": "Q", "response_0": "a", "response_1": "b"}
        return {**texts, "better_response_id": better, "safer_response_id": safer, **more}

    def test_both_objectives(self, tmp_path: Path):
        write(tmp_path / "data" / "Alpaca-7B" / "train.jsonl", self.row(0, 1), self.row(1, 1))
        write(tmp_path / "data" / "Alpaca-7B" / "test.jsonl", self.row(0, 0))
        write(tmp_path / "data" / "Alpaca3-8B" / "train.jsonl", self.row(1, 0, prompt="Other"))
        corpus = corpora.pku_saferlhf(str(tmp_path))
        assert corpus.objectives == ("better", "safer")
        assert Counter(labels(made)[0, 1] for made in corpus.examples) == {(1.0, 0.0): 1, (0.0, 0.0): 1, (0.0, 1.0): 1}
        assert [labels(made)[0, 1] for made in own_test(corpus)] == [(1.0, 1.0)]

    def test_blank_prompts_are_counted(self, tmp_path: Path):
        corpus = corpora.pku_saferlhf(write(tmp_path / "rows.jsonl", self.row(0, 0, prompt=" "), self.row(0, 0)))
        assert len(list(corpus.examples)) == 1
        assert corpus.provenance["skipped"] == {"empty prompt": 1}

    def test_a_bad_id(self, tmp_path: Path):
        path = write(tmp_path / "rows.jsonl", self.row(0, -1))
        with pytest.raises(UserError, match="safer_response_id holds -1; allowed: 0, 1"):
            list(corpora.pku_saferlhf(path).examples)


class TestComputed:
    def test_concise_is_minus_the_number_of_words(self):
        assert concise("", "one two\nthree", "") == -3.0
        assert concise("", "", "") == 0.0

    def test_grounded_is_the_share_of_content_words(self):
        # content words: album, came, out is a stop word, 2018, rocks -> album and 2018 are in the context
        assert grounded("", "The Album came out 2018, it rocks!", "An album of 2018.") == 0.5
        assert grounded("", "It was so.", "An album.") == 0.0

    def test_grounded_needs_a_context(self):
        with pytest.raises(UserError, match="'When does bloom'"):
            grounded("When does bloom", "In May", " ")


class TestConfigs:
    CORPORA = ("pairs", "qa_feedback", "hh_rlhf", "reddit_tldr", "ultrafeedback", "helpsteer2", "pku_saferlhf")
    COMMON = frozenset(("heldout_fraction", "test_fraction", "max_rows", "overlong", "labels"))
    OBJECTIVES: ClassVar[dict[str, int]] = {
        "helpful_harmless": 2,
        "humor_harmless": 2,
        "summary_faithful": 2,
        "deberta_faithful": 2,
        "ultrafeedback": 4,
        "helpsteer": 5,
        "better_safer": 2,
        "qa": 3,
    }

    @pytest.mark.parametrize("name", CORPORA)
    def test_a_data_set_names_its_function_and_all_of_its_arguments(self, name: str):
        config: Any = OmegaConf.load(CONF / "dataset" / f"{name}.yaml")
        keys = {str(key) for key in config}
        function = get_method(config["_target_"])
        assert keys >= self.COMMON
        assert keys - self.COMMON - {"_target_"} == set(inspect.signature(function).parameters) - {"max_rows"}

    @pytest.mark.parametrize("name", OBJECTIVES)
    def test_an_objective_set_has_one_primary_and_callable_scorers(self, name: str):
        config: Any = OmegaConf.load(CONF / "objectives" / f"{name}.yaml")
        assert len(config) == self.OBJECTIVES[name]
        assert sorted(node.role for node in config.values())[:2] == ["primary", "secondary"]
        for node in config.values():
            assert set(node) == {"role", "source", "threshold", "computed", "margin", "worst"}
            assert node.computed is None or callable(get_method(node.computed["_target_"]))

    @pytest.mark.parametrize(
        ("objectives", "labels_of"),
        [
            ("ultrafeedback", corpora.ULTRAFEEDBACK_ASPECTS),
            ("helpsteer", corpora.HELPSTEER2_ATTRIBUTES),
            ("better_safer", ("better", "safer")),
            ("helpful_harmless", ("helpful", "harmless")),
        ],
    )
    def test_sources_are_labels_that_the_corpus_has(self, objectives: str, labels_of: tuple[str, ...]):
        config: Any = OmegaConf.load(CONF / "objectives" / f"{objectives}.yaml")
        assert {node.source for node in config.values()} == set(labels_of)
