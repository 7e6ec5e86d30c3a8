"""A fixed sample of rows: what it takes, that order does not matter, and that a large file is never in memory."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from running import environment
from scipy.stats import kstest

from mopo_cli.base import types
from mopo_cli.base.errors import UserError
from mopo_cli.base.types import Example
from mopo_cli.config.schema import ObjectiveConfig
from mopo_cli.data import prepare, readers
from mopo_cli.data.assistant import assistant
from mopo_cli.data.corpora import pairs
from mopo_cli.data.rows import prompt_of_row
from mopo_cli.data.subsample import Reservoir


def taken(prompts: list[str], limit: int) -> list[int]:
    sample: Reservoir[int] = Reservoir(limit)
    for number, prompt in enumerate(prompts):
        sample.add(prompt, number)
    return sample.taken()


class TestSample:
    def test_all_items_in_their_order_where_there_is_room(self):
        assert taken(["b", "a", "c", "a"], 4) == [0, 1, 2, 3]
        assert taken([], 4) == []

    def test_prompts_are_taken_whole_and_in_every_order_the_same(self):
        prompts = [f"p{i % 40}" for i in range(100)]  # 40 prompts, two or three rows each
        orders = [list(range(100)) for _ in range(5)]
        for seed, order in enumerate(orders[1:]):
            random.Random(seed).shuffle(order)
        found = [sorted(order[i] for i in taken([prompts[i] for i in order], 30)) for order in orders]
        assert found[1:] == found[:1] * 4
        assert 27 < len(found[0]) <= 30
        assert sorted(i for i in range(100) if prompts[i] in {prompts[j] for j in found[0]}) == found[0]

    def test_a_larger_sample_holds_the_smaller_one(self):
        prompts = [str(i) for i in range(500)]
        assert set(taken(prompts, 50)) < set(taken(prompts, 200))

    def test_every_prompt_is_as_likely_as_any(self):
        places = np.array(taken([f"prompt number {i}" for i in range(20_000)], 2000)) / 20_000
        assert len(places) == 2000
        assert kstest(places, "uniform").pvalue > 1e-3

    def test_what_is_not_wanted_would_not_have_been_taken(self):
        prompts = [f"q{i % 700}" for i in range(1000)]
        sample: Reservoir[int] = Reservoir(100)
        for start in range(0, 1000, 64):
            block = prompts[start : start + 64]
            for place in sample.wanted([prompt.encode() for prompt in block]):
                sample.add(block[place], start + place)
        assert sample.taken() == taken(prompts, 100)
        assert sample.seen == 1000
        assert sample.note == f"{len(sample.taken())} of 1,000 rows, a fixed sample (dataset.max_rows)"
        assert sample.wanted([None, b"q1"])[:1] == [0], "a prompt that is not known may be anything"

    def test_one_prompt_with_more_rows_than_the_sample(self):
        with pytest.raises(UserError, match=r"dataset\.max_rows=3: .*raise dataset\.max_rows"):
            taken(["same"] * 4, 3)


USER = {"role": "user", "content": "Hi"}
ANSWER = [{"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Q", "chosen": "a", "rejected": "b"}, "Q"),
        ({"prompt": "Q", "responses": ["a", "b"], "chosen": None}, "Q"),
        ({"prompt": [USER], "chosen": ANSWER, "rejected": ANSWER}, json.dumps([USER], sort_keys=True)),
        ({"prompt": "Hi", "chosen": [USER, *ANSWER], "rejected": [USER, *ANSWER]}, json.dumps([USER], sort_keys=True)),
        ({"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Hi\n\nAssistant: b"},
         "\n\nHuman: Hi\n\nAssistant:"),
        ({"prompt": 3, "responses": []}, None),
        ({"chosen": "a", "rejected": "b"}, None),
        ({"chosen": [1], "rejected": [2]}, None),
        ({"other": 1}, None),
        ("text", None),
    ],
)  # fmt: skip
def test_the_prompt_of_a_row(row: Any, prompt: str | None):
    assert prompt_of_row(row) == (prompt or repr(row))


ROWS = [{"prompt": f"Q{i % 900}", "chosen": f"yes {i}", "rejected": "no", "safe": float(i % 2)} for i in range(1200)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=250)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def texts(examples: Any) -> list[tuple[Any, ...]]:
    return [(example.prompt, example.responses) for example in examples]


class TestPairs:
    def test_json_lines_parquet_and_shards_have_one_sample(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(readers, "PARQUET_ROWS", 100)
        shards = tmp_path / "shards"
        shards.mkdir()
        write(shards / "train-0.parquet", ROWS[:500])
        write(shards / "train-1.parquet", ROWS[500:])
        paths = [write(tmp_path / "rows.jsonl", ROWS), write(tmp_path / "rows.parquet", ROWS), str(shards)]
        made = [pairs(path, "helpful", max_rows=150) for path in paths]
        assert {corpus.provenance["sample"] for corpus in made} == {made[0].provenance["sample"]}
        assert {corpus.objectives for corpus in made} == {("helpful", "safe")}
        found = [list(corpus.examples) for corpus in made]
        assert texts(found[0]) == texts(found[1]) == texts(found[2])
        assert 145 < len(found[0]) <= 150
        numbers = [int(example.responses[0].split()[1]) for example in found[0]]  # type: ignore[union-attr]
        assert numbers == sorted(numbers)
        for one in found[:2]:
            assert [int(example.source.rpartition(":")[2]) - 1 for example in one] == numbers, "the row is still known"

    @pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
    def test_a_file_with_room_is_read_as_without_a_bound(self, tmp_path: Path, suffix: str):
        path = write(tmp_path / f"rows.{suffix}", ROWS)
        assert list(pairs(path, "helpful", max_rows=1200).examples) == list(pairs(path, "helpful").examples)
        assert "sample" not in pairs(path, "helpful", max_rows=1200).provenance

    def test_conversations_in_parquet_are_sampled_by_their_real_prompts(self, tmp_path: Path):
        rows = [
            {"prompt": "given twice", "chosen": [{"role": "user", "content": f"Q{i % 90}"}, *ANSWER],
             "rejected": [{"role": "user", "content": f"Q{i % 90}"}, {"role": "assistant", "content": f"no {i}"}]}
            for i in range(200)
        ]  # fmt: skip
        paths = [write(tmp_path / f"rows.{suffix}", rows) for suffix in ("jsonl", "parquet")]
        first, second = (texts(pairs(path, "helpful", max_rows=30).examples) for path in paths)
        assert first == second
        assert 25 < len(first) <= 30

    def test_rows_without_a_prompt_among_others(self, tmp_path: Path):
        rows = [
            row
            if i % 3
            else {"prompt": None, "chosen": f"Human: {i}\n\nAssistant: a", "rejected": f"Human: {i}\n\nAssistant: b"}
            for i, row in enumerate(ROWS)
        ]
        paths = [write(tmp_path / f"rows.{suffix}", rows) for suffix in ("jsonl", "parquet")]
        first, second = (texts(pairs(path, "helpful", max_rows=150).examples) for path in paths)
        assert first == second
        assert 0 < sum(prompt.startswith("Human") for prompt, _ in first) < len(first)

    def test_the_test_set_is_bounded_as_well(self, tmp_path: Path):
        path, test = write(tmp_path / "rows.jsonl", ROWS), write(tmp_path / "test.parquet", ROWS[:400])
        corpus = pairs(path, "helpful", test_path=test, max_rows=150)
        assert corpus.test is not None
        assert 145 < len(list(corpus.test)) <= 150
        assert str(corpus.provenance["test_sample"]).endswith("of 400 rows, a fixed sample (dataset.max_rows)")

    def test_what_chosen_means_is_asked_before_the_file_is_read(self, tmp_path: Path):
        rows = [{"prompt": "Q", "chosen": "a", "rejected": "b"}]
        path = Path(write(tmp_path / "rows.jsonl", rows))
        path.write_text(path.read_text() + "not JSON\n")
        with pytest.raises(UserError, match=r"rows\.jsonl:1: nothing says under which objective"):
            pairs(str(path), max_rows=10)


def test_the_embedded_world_draws_no_more_rows_than_asked():
    few, many = assistant(rows=100, max_rows=30), assistant(rows=100)
    assert list(few.examples) == list(many.examples)[:30]
    assert few.test is not None and many.test is not None  # noqa: PT018
    assert list(few.test) == list(many.test)[:30]


def generated(rows: int) -> types.Corpus:
    """A corpus function of a user's own, that knows nothing of max_rows."""
    made = [Example(f"Q{i}", ("a", "b"), ((0, 1),), ((1.0,),), source=f"made:{i}") for i in range(rows)]
    return types.Corpus(("helpful",), iter(made))


def test_a_function_without_the_argument_is_bounded_as_well():
    node = {"_target_": f"{__name__}.generated", "rows": 500}
    data = prepare.load({**node, "max_rows": 100}, {"helpful": ObjectiveConfig("primary")})
    assert sum(map(len, (data.train, data.heldout, data.test))) == 100
    assert data.provenance["sample"] == "100 of 500 rows, a fixed sample (dataset.max_rows)"


# --------------------------------------------------------------------------------------------- memory

PEAK = """
import resource, sys, threading
from mopo_cli.config.schema import ObjectiveConfig
from mopo_cli.data import prepare
def used():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
def load(path, rows):
    node = {"_target_": "mopo_cli.data.corpora.pairs", "path": path, "chosen_means": "helpful"}
    data = prepare.load({**node, "max_rows": rows}, {"helpful": ObjectiveConfig("primary")})
    return sum(map(len, (data.train, data.heldout, data.test)))
load(sys.argv[1], 100)  # imports what it needs
before, peak, done = used(), [0], threading.Event()
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], used())
watcher = threading.Thread(target=watch)
watcher.start()
count = load(sys.argv[2], int(sys.argv[3]))
done.set()
watcher.join()
print(count, max(peak[0], used()) - before)
"""


def memory(small: str, path: str, rows: int) -> tuple[int, float]:
    """(rows taken, megabytes above what reading a small file took) of a process of its own."""
    command = [sys.executable, "-c", PEAK, small, path, str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    count, size = done.stdout.split()
    return int(count), int(size) / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident memory from /proc")
def test_memory_follows_max_rows_and_not_the_file(tmp_path: Path):
    # 120 000 rows of about 2 000 characters; texts that no dictionary or compression makes small in memory
    words, path = random.Random(0), tmp_path / "rows.parquet"
    schema = pa.schema([(name, pa.string()) for name in ("prompt", "chosen", "rejected")])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, 120_000, 20_000):
            numbers = range(start, start + 20_000)
            columns = {
                "prompt": [f"{i} {words.getrandbits(2400):x}" for i in numbers],
                "chosen": [f"{words.getrandbits(2800):x}" for _ in numbers],
                "rejected": [f"{words.getrandbits(2800):x}" for _ in numbers],
            }
            writer.write_table(pa.table(columns, schema=schema))
    small = write(tmp_path / "small.parquet", ROWS)
    few, half = memory(small, str(path), 1000), memory(small, str(path), 60_000)
    assert (few[0], half[0]) == (1000, 60_000)
    assert few[1] < 115, "megabytes, where all the texts take 230"
    assert half[1] > few[1] + 60, "half of them are there when it is asked for"
