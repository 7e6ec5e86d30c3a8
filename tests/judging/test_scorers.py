"""Gold scorers: each published one's template on a small model of its class, label maps, functions and mistakes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classifiers import saved
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from mopo_cli.base.errors import UserError
from mopo_cli.base.types import Example
from mopo_cli.config import compose, schema
from mopo_cli.config.schema import ScorerConfig
from mopo_cli.data.computed import length, matches, overlap
from mopo_cli.judging.scorers import Classifier, check_scorers, dialogue, document, fit_scale, load_scorer
from mopo_cli.models import hub

CONF = Path(__file__).parents[2] / "conf" / "scorers"
NAMES = sorted(path.stem for path in CONF.glob("*.yaml"))
KINDS: dict[str, tuple[str, list[str] | None]] = {
    "helpful_gpt2": ("gpt2", None),
    "harmless_gpt2": ("gpt2", None),
    "summary_gpt2": ("gpt2", None),
    "humor": ("distilbert", ["NO_HUMOR", "HUMOR"]),
    "deberta": ("deberta", None),
    "faithful_bart": ("bart", ["LABEL_0", "LABEL_1"]),
    "classifier": ("bert", None),
}
POST = "SUBREDDIT: r/cats\n\nTITLE: My cat\n\nPOST: It sleeps.\n\nIt eats.\n\nTL;DR:"
ASKED = "How do I boil an egg?"


def example(prompt: Any = ASKED, context: str = "") -> Example:
    return Example(prompt, (), (), (), context)


def composed(*overrides: str) -> dict[str, ScorerConfig]:
    return compose.typed(compose.compose("eval", list(overrides)), schema.EvalConfig).scorers


def message(function: Any, *arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestPublished:
    @pytest.mark.parametrize("name", NAMES)
    def test_composes_under_its_own_name(self, name: str):
        scorers = composed(f"scorers=[{name}]")
        assert list(scorers) == [name]
        if name != "classifier":  # which is yours to fill in
            check_scorers(scorers, ["mopo_cli.data.computed"])

    def test_several_are_chosen_at_once(self):
        assert list(composed("scorers=[helpful_gpt2,harmless_gpt2]", "scorers.helpful_gpt2.path=x")) == [
            "helpful_gpt2",
            "harmless_gpt2",
        ]

    @pytest.mark.parametrize(
        ("name", "prompt", "texts"),
        [
            ("helpful_gpt2", ASKED, (f"\n\nHuman: {ASKED} \n\nAssistant:", "Seven.")),
            ("harmless_gpt2", "\n\nHuman: Hi\n\nAssistant:", ("\n\nHuman: Hi\n\nAssistant:", "Seven.")),
            ("helpful_gpt2", [{"role": "user", "content": "Hi"}], ("\n\nHuman: Hi\n\nAssistant:", "Seven.")),
            ("humor", ASKED, ("Seven.",)),
            ("summary_gpt2", POST, ("Seven. <|endoftext|> It sleeps.\n\nIt eats.",)),
            ("summary_gpt2", ASKED, (f"Seven. <|endoftext|> {ASKED}",)),
            ("faithful_bart", "Article:\nIt rained.\n\nTL;DR:", ("Seven.", "It rained.")),
            ("deberta", ASKED, (ASKED, "Seven.")),
        ],
    )
    def test_reads_what_its_model_card_says(self, tmp_path: Path, name: str, prompt: Any, texts: tuple[str, ...]):
        config = replace(composed(f"scorers=[{name}]")[name], path=str(saved(tmp_path, *KINDS[name])))
        scorer = load_scorer(name, config)
        assert isinstance(scorer, Classifier)
        assert scorer.texts(example(prompt), "Seven.") == texts

    @pytest.mark.parametrize("name", list(KINDS))
    def test_scores_as_the_model_does_one_by_one(self, tmp_path: Path, name: str):
        """Batches are padded, and GPT-2 has no padding token: neither may change a score."""
        path = str(saved(tmp_path, *KINDS[name]))
        config = replace(composed(f"scorers=[{name}]")[name], path=path, batch_size=3)
        scorer = load_scorer(name, config)
        assert isinstance(scorer, Classifier)
        rows = [(example(), text) for text in ("Sorry.", "Seven minutes, and no more of it.", "a", "It depends.")]
        outputs = len(KINDS[name][1] or "1")
        model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=outputs).eval()
        tokenizer = AutoTokenizer.from_pretrained(path)
        expected = []
        for row in rows:
            with torch.no_grad():
                logits = model(**tokenizer(*scorer.texts(*row), return_tensors="pt")).logits[0].double()
            expected.append(float(logits[0] if len(logits) == 1 else logits.softmax(0)[1]))
        assert scorer(rows) == pytest.approx(expected, abs=1e-5)
        assert len(set(expected)) == len(expected)


class TestTexts:
    def test_braces_in_a_response_are_text(self, tmp_path: Path):
        config = ScorerConfig(path=str(saved(tmp_path, "bert")), text="{prompt}", text_pair="{response}")
        scorer = load_scorer("x", config)
        assert isinstance(scorer, Classifier)
        assert scorer.texts(example("{response}"), r"{prompt} \1 <script>") == ("{response}", r"{prompt} \1 <script>")

    def test_what_is_too_long_is_cut_and_counted(self, tmp_path: Path):
        scorer = load_scorer("x", ScorerConfig(path=str(saved(tmp_path, "bert")), text="{response}", max_length=8))
        assert isinstance(scorer, Classifier)
        assert np.isfinite(scorer([(example(), "word " * 50), (example(), "a"), (example(), "word " * 60)])).all()
        assert scorer.cut == 2

    def test_no_limit_means_that_of_the_model(self, tmp_path: Path):
        scorer = load_scorer("x", ScorerConfig(path=str(saved(tmp_path, "bert")), text="{response}"))
        assert isinstance(scorer, Classifier)
        assert scorer.longest() == 64
        assert np.isfinite(scorer([(example(), "word " * 500)])).all()

    def test_a_transcript_is_not_framed_twice(self):
        told = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant:"
        assert dialogue(told) == told
        assert document("no post") == "no post"


class TestLabels:
    def test_found_by_name_whatever_its_place(self, tmp_path: Path):
        path = str(saved(tmp_path, "distilbert", ["HUMOR", "NO_HUMOR"]))
        scorer = load_scorer("humor", ScorerConfig(path=path, text="{response}", label="humor"))
        assert isinstance(scorer, Classifier)
        assert scorer.label == 0

    @pytest.mark.parametrize(
        ("own", "change", "told"),
        [
            (["NO", "YES"], {"label": "HUMOR"}, "the model has no such class; allowed: NO, YES"),
            (["NO", "YES"], {}, "scorers.x.label: not set, and the model has 2 classes; choose one of NO, YES"),
            (["LABEL_0", "LABEL_1"], {"label": "FAITHFUL"}, "it names none, so give scorers.x.labels in their order"),
            (
                ["FAITHFUL", "MADE_UP"],
                {"label": "FAITHFUL", "labels": ["MADE_UP", "FAITHFUL"]},
                "the model's config has ['FAITHFUL', 'MADE_UP']",
            ),
        ],
    )
    def test_that_do_not_agree(self, tmp_path: Path, own: list[str], change: dict[str, Any], told: str):
        config = ScorerConfig(path=str(saved(tmp_path, "distilbert", own)), text="{response}", **change)
        assert told in message(load_scorer, "x", config)


class TestMistakes:
    @pytest.mark.parametrize(
        ("config", "told"),
        [
            (ScorerConfig(), "scorers.x.path: not set; give a hub id or a model directory"),
            (
                ScorerConfig(path="p", text="{reponse}"),
                "scorers.x.text: has {reponse}; a template is made from {prompt}",
            ),
            (ScorerConfig(path="p", margin=-1.0), "scorers.x.margin=-1.0: must be 0 or more"),
            (ScorerConfig(path="p", batch_size=0), "scorers.x.batch_size=0: must be 1 or more"),
            (ScorerConfig(path="p", dtype="int8"), "scorers.x.dtype=int8: must be float32 or bfloat16 or float16"),
            (ScorerConfig(path="p", computed={"_target_": "a.b"}), "a scorer is one of the two"),
            (ScorerConfig(computed={"_target_": "os.system"}), "not in a module whose functions a scorer may call"),
            (ScorerConfig(computed="length"), "must be a mapping whose _target_ names a function"),
        ],
    )
    def test_in_the_config(self, config: ScorerConfig, told: str):
        assert told in message(check_scorers, {"x": config}, ["mopo_cli.data.computed"])

    def test_two_for_one_objective(self):
        both = {name: ScorerConfig(objective="helpful", path="p") for name in ("first", "second")}
        assert message(check_scorers, both, []) == (
            "scorers.second.objective=helpful: scorers.first judges that objective already"
        )

    def test_a_directory_that_is_not_there(self):
        told = message(load_scorer, "x", ScorerConfig(path="./nowhere"))
        assert told == "scorers.x.path=./nowhere: no such directory"

    def test_a_hub_id_without_a_network(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(hub, "hub_answers", lambda: False)
        told = message(load_scorer, "humor", ScorerConfig(path="nobody/no-such-humor-model"))
        assert told.startswith("scorers.humor.path=nobody/no-such-humor-model: cannot load the classifier from the hub")
        assert told.endswith("then scorers.humor.path=DIR")

    def test_a_language_model_is_no_classifier(self, tmp_path: Path):
        from classifiers import gpt2_tokenizer
        from transformers import GPT2Config, GPT2LMHeadModel

        tokenizer = gpt2_tokenizer()
        config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64)
        GPT2LMHeadModel(config).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        assert "no sequence-classification model (its files lack score.weight)" in message(
            load_scorer, "x", ScorerConfig(path=str(tmp_path))
        )

    def test_a_function_that_fails(self):
        config = ScorerConfig(computed={"_target_": "mopo_cli.data.computed.matches", "pattern": "("})
        assert "pattern='(': not a regular expression" in message(load_scorer("x", config), [(example(), "a")])


def test_functions():
    assert length("", "two words", "") == 2.0
    assert overlap("boil eggs", "Boil them, quickly", "") == 0.5
    assert overlap("x", "and then", "") == 0.0
    assert matches("", "I am Sorry.", "", "[Ss]orry") == 1.0
    assert matches("", "Fine.", "", "sorry", wanted=False) == 1.0


def test_a_scale_is_fitted_once():
    scale = fit_scale(np.array([1.0, 3.0]), "the data's responses")
    assert scale(np.array([1.0, 2.0, 5.0])).tolist() == [-1.0, 0.0, 3.0]
    assert fit_scale(np.array([2.0, 2.0]), "x")(np.array([2.0, 3.0])).tolist() == [0.0, 1.0]
