"""Any text comes out as it went in, or is refused with its place."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mopo_cli.base.console import printable
from mopo_cli.base.errors import UserError
from mopo_cli.base.files import read_lines
from mopo_cli.base.types import Example
from mopo_cli.commands.sample import prompts_of
from mopo_cli.config.schema import ObjectiveConfig, TokenizerConfig
from mopo_cli.data import corpora, prepare
from mopo_cli.data.encoder import Encoder
from mopo_cli.evaluation.card import model_card
from mopo_cli.evaluation.show import write_lines
from mopo_cli.models.tokenizers import train_tokenizer
from mopo_cli.report.page import embedded

NASTY = [
    "\r\n",
    "\u2028",
    "\x85",
    "\x00",
    "\ufeff",
    "e\u0301",
    "\u00e9",
    "\x0b\x0c\x1c",
    "\\ud800",
    "👩\u200d👧",
    "\U0010ffff",
]
TEXTS = st.one_of(st.text(), st.lists(st.sampled_from([*NASTY, "a", " ", "<", "|"])).map("".join))
SAID = TEXTS.filter(str.strip)
ENCODER = Encoder(train_tokenizer(["the cat sat on the mat."], TokenizerConfig(vocab_size=260)), 4096)


def pairs(path: Path) -> list[Example]:
    return list(corpora.pairs(str(path), chosen_means="helpful").examples)


@settings(max_examples=60, deadline=None)
@given(prompt=SAID, first=SAID, second=SAID, ascii_only=st.booleans(), listed=st.booleans())
def test_rows_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, prompt: str, first: str, second: str, ascii_only: bool, listed: bool
):
    path = tmp_path_factory.getbasetemp() / f"rows.{'json' if listed else 'jsonl'}"
    row = {"prompt": prompt, "chosen": first, "rejected": second}
    path.write_bytes(json.dumps([row] if listed else row, ensure_ascii=ascii_only).encode())
    (example,) = pairs(path)
    assert (example.prompt, example.responses) == (prompt, (first, second))
    talk = {"prompt": [{"role": "user", "content": prompt}], "chosen": first, "rejected": second}
    path.write_bytes(json.dumps([talk] if listed else talk, ensure_ascii=ascii_only).encode())
    assert pairs(path)[0].prompt == talk["prompt"]


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(SAID, min_size=1, max_size=4))
def test_samples_report_card_and_sample_give_texts_back(tmp_path_factory: pytest.TempPathFactory, texts: list[str]):
    path = tmp_path_factory.getbasetemp() / "samples.jsonl"
    samples: list[dict[str, Any]] = [{"prompt": text, "response": text, "scores": {}} for text in texts]
    write_lines(path, samples)
    assert read_lines(path) == samples
    assert prompts_of(str(path)) == texts
    page = embedded(samples)
    assert json.loads(page) == samples
    assert not re.search("[<>\x00\r]", page)
    assert [printable(text) for text in texts] == texts
    (path.parent / "card.md").write_text(card(texts[0]), encoding="utf-8")
    written = (path.parent / "card.md").read_text(encoding="utf-8")
    shown = re.search(r"inputs = tokenizer\((.*), return_tensors", written)
    assert shown is not None
    assert ast.literal_eval(shown[1]) == texts[0]


def card(prompt: str) -> str:
    summary = {"objectives": {}, "versions": {"mopo": "1"}, "train": {"steps": 1}, "seed": 0}
    return model_card({"run": {"name": "r"}, "model": {}, "tau": 0.1}, summary, {}, prompt=prompt)


@settings(max_examples=60, deadline=None)
@given(text=SAID.filter(lambda text: not re.search("</s>|<pad>", text)))
def test_tokens_of_a_text_are_the_text(text: str):
    ids = ENCODER.response_ids(text)
    assert ENCODER.tokenizer.batch_decode([ids], skip_special_tokens=True) == [text]


HALVES = ['"\\ud800"', '"a\\uDFFFb"', '"\\ud83d \\ude00"', '"\\\\ud83d\\ude00"', '["\\ud800"]', '{"\\ud800": 1}']


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("key", ["prompt", "chosen", "other"])
class TestHalvesOfSurrogatePairs:
    def rows(self, path: Path, key: str, half: str) -> str:
        good = {"prompt": "Is it? 😀", "chosen": "yes", "rejected": "no"}
        bad = json.dumps(good).removesuffix("}") + f', "{key}": {half}}}'
        lines = [json.dumps(good), bad, json.dumps(good)]
        path.write_text("\n".join(lines) if path.suffix == ".jsonl" else f"[{','.join(lines)}]")
        return str(path)

    @pytest.mark.parametrize(("name", "place"), [("rows.jsonl", ":2"), ("rows.json", "[1]")])
    def test_are_refused_with_their_place(self, tmp_path: Path, name: str, place: str, key: str, half: str):
        path = self.rows(tmp_path / name, key, half)
        with pytest.raises(UserError, match=f"'{key}' holds half a surrogate pair") as caught:
            pairs(Path(path))
        assert str(caught.value).startswith(f"{path}{place}: ")
        assert str(caught.value).endswith("dataset.invalid=drop leaves such rows out")

    def test_are_dropped(self, tmp_path: Path, key: str, half: str):
        corpus = corpora.pairs(self.rows(tmp_path / "r.jsonl", key, half), chosen_means="helpful", invalid="drop")
        assert len(list(corpus.examples)) == 2
        (reason,) = corpus.provenance["skipped"]  # type: ignore[misc]
        assert reason.startswith("… holds half a surrogate pair")


def test_a_whole_pair_is_a_character(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text(r'{"prompt": "\ud83d\ude00 \\ud83d", "chosen": "a", "rejected": "\\ud800"}')
    (example,) = pairs(tmp_path / "rows.jsonl")
    assert (example.prompt, example.responses) == ("😀 \\ud83d", ("a", "\\ud800"))


@settings(max_examples=30, deadline=None)
@given(prompts=st.lists(SAID, min_size=8, max_size=8, unique=True))
def test_data_sets_are_split_whatever_their_prompts(tmp_path_factory: pytest.TempPathFactory, prompts: list[str]):
    path = tmp_path_factory.getbasetemp() / "split.jsonl"
    rows = [
        {"prompt": f"{i} {text}", "chosen": "a", "rejected": "b", "helpful": 1} for i, text in enumerate(prompts * 9)
    ]
    write_lines(path, rows)
    node = {"_target_": "mopo_cli.data.corpora.pairs", "path": str(path), "test_fraction": 0.3, "heldout_fraction": 0.3}
    data = prepare.load(node, {"helpful": ObjectiveConfig(role="primary")})
    found = {str(example.prompt) for part in (data.train, data.heldout, data.test) for example in part}
    assert found == {row["prompt"] for row in rows}
