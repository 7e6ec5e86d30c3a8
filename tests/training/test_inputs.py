"""What a tokenizer is trained on, and what a user is told of data before hours are spent on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import TINY

from mopo_cli.base.types import Example
from mopo_cli.config.compose import compose, typed
from mopo_cli.config.schema import TokenizerConfig, TrainConfig
from mopo_cli.models.tokenizers import train_tokenizer
from mopo_cli.training.inputs import LONGEST, RUN, prepare_inputs, texts_of

ORDINARY = [Example(f"Is {i} even?", (f"Yes, {i} is. " * 200, "No!\n"), (), ()) for i in range(60)]


def test_ordinary_texts_are_learnt_from_as_they_are():
    prompts = [f"{example.prompt}\n" for example in ORDINARY]
    assert list(texts_of(ORDINARY)) == prompts + [r for example in ORDINARY for r in example.responses]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["a", "?", " ", "ab ", "A b. ", "\n"]), st.integers(1, 3 * RUN)), max_size=4))
def test_no_word_and_no_text_is_long(runs: list[tuple[str, int]]):
    text = "".join(part * count for part, count in runs) or "x"
    pieces = list(texts_of([Example("x", (text,), (), ())]))[1:]
    assert "".join(pieces) == text[:LONGEST]
    assert all(len(piece) <= RUN or not any(part * RUN in piece for part in "a? \n") for piece in pieces)


@pytest.mark.parametrize("across_words", [False, True])
@pytest.mark.parametrize("part", ["a", "?", "xyz w"])
def test_one_response_of_a_megabyte_costs_little(part: str, across_words: bool):
    huge = Example("x", (part * (1_000_000 // len(part)), "b"), (), ())
    texts = list(texts_of([*ORDINARY, huge]))
    assert sum(map(len, texts)) < sum(map(len, texts_of(ORDINARY))) + LONGEST + 10
    assert len(train_tokenizer(texts, TokenizerConfig(vocab_size=2000, across_words=across_words))) > 260


def write(path: Path, *rows: tuple[str, str, str], **more: object) -> Path:
    lines = (
        json.dumps({"prompt": p, "chosen": c, "rejected": r, "helpful": 1, "harmless": 0, **more}) for p, c, r in rows
    )
    path.write_text("\n".join(lines))
    return path


def test_what_is_told_of_the_data(here: Path, capfd: pytest.CaptureFixture[str]):
    asked = [(f"Is {i} even?", "yes", "no") for i in range(40)]
    rendered = [(f"</s>Is {i} odd?</s>", "yes</s>", "no</s>") for i in range(10)]
    train = write(here / "train.jsonl", *asked, *rendered, note="x")
    test = write(here / "test.jsonl", *asked[:7], ("New?", "yes", "no"))
    overrides = [f"dataset.path={train}", f"dataset.test_path={test}", "objectives=helpful_harmless", "run.dir=run"]
    config: TrainConfig = typed(compose("train", [*TINY, "dataset=pairs", *overrides]), TrainConfig)
    inputs = prepare_inputs(config)
    out, err = capfd.readouterr()
    assert "7 of 8 test prompts are in the training or held-out rows as well" in err
    assert inputs.data.provenance["test_prompts_in_training"] == "7 of 8"
    assert "columns that nothing reads: note" in out
    of = [e.prompt for e in inputs.examples["train"]]
    assert f"{sum(str(p).startswith('</s>') for p in of)} of {len(of)} training prompts are rendered already" in out
