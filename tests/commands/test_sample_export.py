"""`mopo sample` and `mopo export`: prompts in every form, a folder that loads elsewhere, and mistakes."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from running import TINY, Finished, read_json
from transformers import AutoModelForCausalLM, AutoTokenizer

from mopo_cli.base import console
from mopo_cli.base.console import printable
from mopo_cli.base.errors import UserError
from mopo_cli.commands.export import check_target
from mopo_cli.commands.sample import prompts_of
from mopo_cli.evaluation.card import model_card
from mopo_cli.evaluation.prompts import in_form_of, known_example
from mopo_cli.runs.directory import RunDirectory

Run = Callable[..., Finished]
ASKED = "How can I plant a tree?"
SHORT = "sampling.max_new_tokens=8"


class TestPromptForm:
    @pytest.mark.parametrize(
        ("example", "form"),
        [
            ("What is up?", "Hi"),
            ("", "Hi"),
            ("\n\nHuman: What is up?\n\nAssistant:", "\n\nHuman: Hi\n\nAssistant:"),
            ("Human: What is up?\n\nAssistant:", [{"role": "user", "content": "Hi"}]),
            ("System: Be kind.\n\nHuman: a\n\nAssistant:", [{"role": "user", "content": "Hi"}]),
        ],
    )
    def test_is_that_of_the_data(self, example: str, form: Any):
        assert in_form_of("Hi", example) == form

    @pytest.mark.parametrize(
        ("responses", "stands_for"), [((), "x"), (("Seven", " Eight", "Nine"), "x"), ((" a", " b", "c"), " x")]
    )
    def test_how_it_ends_is_told_by_most_responses(self, tmp_path: Path, responses: tuple[str, ...], stands_for: str):
        rows = [json.dumps({"prompt": "p", "response": text}) + "\n" for text in responses]
        (tmp_path / "samples.jsonl").write_text("".join(rows))
        assert known_example(RunDirectory(tmp_path)) == ("p" if rows else "", stands_for)

    def test_a_transcript_is_taken_as_it_is(self):
        told = "\n\nHuman: Hi\n\nAssistant:"
        assert in_form_of(told, "\n\nHuman: What is up?\n\nAssistant:") == told


def test_control_characters_are_not_printed_on_a_terminal(monkeypatch: pytest.MonkeyPatch):
    text = "a\x1b[31mb\x07\n\tc é 日本\xa0\u3000👩\u200d👧\x85\r"
    assert printable(text) == text
    monkeypatch.setattr(type(console.console), "is_terminal", True)
    assert printable(text) == "a[31mb\n\tc é 日本\xa0\u3000👩\u200d👧"


class TestMistakesOfSample:
    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            ((), "neither prompt nor prompts is set"),
            (("prompt=a", "prompts=b.txt"), "both prompt and prompts are set"),
            (("prompt= ",), "prompt: is empty"),
            (("prompt=a", "n=0"), "n=0: must be 1 or more"),
            (("prompt=a", "compare=-1"), "compare=-1: must be 0 or more"),
            (("prompt=a", "sampling.top_p=0"), "sampling.top_p=0.0: must be in (0, 1]"),
            (("prompts=nowhere.txt",), "prompts=nowhere.txt: cannot be read"),
            (("prompts=empty.txt",), "prompts=empty.txt: holds no prompts"),
            (("prompts=bad.jsonl",), 'bad.jsonl:2: expected a JSON object, found ["a"]'),
            (("prompt=\udcff",), "prompt: is not UTF-8"),
            (("prompts=half.jsonl",), "half.jsonl:1: 'prompt' holds half a surrogate pair"),
            (("prompt=a", "run=nowhere"), "run=nowhere: no finished run there"),
            (("prompt=a",), "run: no finished run under outputs/train/"),
        ],
    )
    def test_one_line(self, run_here: Run, here: Path, arguments: tuple[str, ...], told: str):
        (here / "empty.txt").write_text("\n")
        (here / "half.jsonl").write_text(json.dumps({"prompt": "a\ud800"}))
        (here / "bad.jsonl").write_text('{"prompt": "a"}\n["a"]\n')
        done = run_here("sample", *arguments)
        assert done.status == 2
        assert told in done.err
        assert done.err.count("\n") == 1


class TestFilesOfPrompts:
    MESSAGES: list[dict[str, str]] = [{"role": "user", "content": "b"}]  # noqa: RUF012

    @pytest.mark.parametrize(
        ("name", "text", "prompts"),
        [
            ("a.txt", "\ufeffone\r\n\ntwo \u2028 three\n", ["one", "two \u2028 three"]),
            ("a.jsonl", '\ufeff{"prompt": "a"}\n\n{"prompt": [{"role": "user", "content": "b"}]}\n', ["a", MESSAGES]),
            ("a.json", '[{"prompt": "a", "chosen": "x"}, {"prompt": "é"}]', ["a", "é"]),
        ],
    )
    def test_are_read_as_data_are(self, tmp_path: Path, name: str, text: str, prompts: list[Any]):
        (tmp_path / name).write_bytes(text.encode())
        assert prompts_of(str(tmp_path / name)) == prompts

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ('{"prompt": ""}\n', ":1: prompt is empty"),
            ('{"prompt": 5}\n', ":1: prompt must be a string or a list of messages, found 5"),
            ('{"text": "a"}\n', ":1: prompt is missing"),
            ('{"prompt": [{"role": "me", "content": "a"}]}\n', ":1: prompt has the role 'me'"),
            ("{oops\n", ":1: not JSON at column 2"),
        ],
    )
    def test_a_line_that_holds_none(self, tmp_path: Path, text: str, told: str):
        (tmp_path / "a.jsonl").write_text(text)
        with pytest.raises(UserError) as caught:
            prompts_of(str(tmp_path / "a.jsonl"))
        assert told in str(caught.value)


class TestWhereToExport:
    def test_refuses_what_it_would_destroy(self, tmp_path: Path):
        run = tmp_path / "runs" / "a"
        run.mkdir(parents=True)
        (tmp_path / "file").write_text("")
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.tex").write_text("")
        (tmp_path / "older").mkdir()
        (tmp_path / "older" / "config.json").write_text("{}")
        for place, overwrite, told in (
            (run, True, "lies in the run's directory, or holds it"),
            (run / "model", True, "lies in the run's directory, or holds it"),
            (tmp_path / "runs", True, "lies in the run's directory, or holds it"),
            (tmp_path / "file", True, "this is a file"),
            (tmp_path / "mine", False, "is not empty; choose another folder, or overwrite=true"),
            (tmp_path / "mine", True, "holds no model, so it is not replaced"),
            (tmp_path / "older", False, "is not empty"),
        ):
            with pytest.raises(UserError, match=told):
                check_target(place, run, overwrite)
        check_target(tmp_path / "older", run, overwrite=True)
        check_target(tmp_path / "new" / "place", run, overwrite=False)

    def test_needs_a_place(self, run_here: Run, here: Path):
        done = run_here("export", "run=nowhere")
        assert (done.status, done.err) == (2, "mopo: to: not set; give the folder to write, as to=DIR\n")


class TestCard:
    settings = {"model": {"path": "facebook/opt-125m", "name": "opt"}, "run": {"name": "a <b>"}, "tau": 0.1}  # noqa: RUF012
    summary: dict[str, Any] = {  # noqa: RUF012
        "objectives": {
            "helpful": {"role": "primary", "threshold": None, "win_rate": 0.6, "win_rate_ci95": [0.5, 0.7],
                        "judge": "preference model"},
            "safe|r": {"role": "secondary", "threshold": 0.55, "win_rate": 0.57, "win_rate_ci95": [0.54, 0.6],
                       "judge": "computed", "satisfied_with_confidence": "undecided"},
        },
        "versions": {"mopo": "1"}, "train": {"steps": 3}, "seed": 0, "kl": 0.25, "warnings": ["λ grows"],
        "command": "mopo train x=1",
    }  # fmt: skip

    def test_says_what_was_asked_and_measured(self):
        text = model_card(self.settings, self.summary, {"labels": "people"}, prompt="Q?\n")
        front = yaml.safe_load(text.split("---")[1])
        assert front["base_model"] == "facebook/opt-125m"
        assert "as helpful as possible, with safe\\|r at least 0.550" in text
        assert "| safe\\|r | secondary | 0.550 | 0.570 | 0.540 to 0.600 | undecided" in text
        for told in ("KL to the reference: 0.250", "- labels: people", "- λ grows", "    mopo train x=1", "'Q?\\n'"):
            assert told in text

    def test_an_algorithm_says_what_it_was_trained_for(self):
        aim = "objectives weighed helpful 0.7, safe|r 0.3"
        text = model_card(self.settings, {**self.summary, "aim": aim}, {})
        assert "seed 0): objectives weighed helpful 0.7, safe\\|r 0.3.\n" in text
        text = model_card(self.settings, {**self.summary, "aim": ""}, {})
        assert "with safe\\|r at least 0.550 (undecided: win rate 0.570 ± 0.030).\n" in text

    @pytest.mark.parametrize(
        ("verdict", "threshold", "said"),
        [
            ("no", 0.65, "safe\\|r at least 0.650 (missed: win rate 0.570 ± 0.030)."),
            ("yes", 0.5, "safe\\|r at least 0.500."),
            ("no", 0.58, "safe\\|r at least 0.580 (missed: exact win rate 0.575)."),
        ],
    )
    def test_opens_with_what_became_of_a_threshold(self, verdict: str, threshold: float, said: str):
        changed = {"threshold": threshold, "satisfied_with_confidence": verdict}
        results = {**self.summary["objectives"], "safe|r": {**self.summary["objectives"]["safe|r"], **changed}}
        exact = {"win_rate": {"helpful": 0.6, "safe|r": 0.575}, "feasible": True}
        text = model_card(self.settings, {**self.summary, "objectives": results, "oracle": exact}, {})
        assert said in text

    def test_a_threshold_of_the_schedule_was_not_asked_for(self):
        objectives = {"helpful": {"role": "primary"}, "safe|r": {"role": "secondary", "threshold": None}}
        text = model_card({**self.settings, "objectives": objectives}, self.summary, {})
        assert "safe\\|r at least 0.550, which the run set itself (undecided" in text

    def test_thresholds_out_of_reach_are_told_with_what_is_attainable(self):
        exact = {"win_rate": {"helpful": 0.6}, "feasible": False, "attainable": {"safe|r": 0.54}}
        text = model_card(self.settings, {**self.summary, "oracle": exact}, {})
        said = "safe\\|r at least 0.550 is out of reach: at most 0.540 is attainable."
        assert f"No policy keeps these thresholds: {said}" in text

    def test_text_of_others_is_no_markup(self):
        told = model_card(self.settings, self.summary, {"source": "<script>alert(1)</script>\n# title"})
        assert "<script>" not in told
        assert "# a &lt;b>" in told
        assert "\n# title" not in told

    def test_a_local_path_is_no_hub_id(self):
        local = {**self.settings, "model": {"path": "/home/me/model"}}
        assert "base_model" not in yaml.safe_load(model_card(local, self.summary, {}).split("---")[1])


@pytest.mark.slow
class TestWithARun:
    def test_sampling(self, smoke: Path, run_here: Run, here: Path, monkeypatch: pytest.MonkeyPatch):
        first = run_here("sample", f"run={smoke}", f"prompt={ASKED}", "n=2", SHORT)
        assert first.status == 0, first.err
        lines = first.out.splitlines()
        assert lines[0] == "win rates against 8 samples of the reference, by the run's own judges"
        assert lines[1].startswith("[1]  helpful 0.")
        assert "harmless" in lines[1]
        assert run_here("sample", f"run={smoke}", f"prompt={ASKED}", "n=2", SHORT).out == first.out
        monkeypatch.setattr("sys.stdin", io.StringIO(ASKED + "\n"))
        assert run_here("sample", f"run={smoke}", "prompt=-", "n=2", SHORT).out == first.out
        assert run_here("sample", f"run={smoke}", f"prompt={ASKED}", "n=2", "seed=3", SHORT).out != first.out

    def test_free_text_is_no_config(self, smoke: Path, run_here: Run):
        """Commas, braces, quotes and interpolations mean something to Hydra, and nothing in a prompt."""
        done = run_here("sample", f"run={smoke}", 'prompt=it\'s, {a} [b] ${c} = "d" \\ 1,2', "compare=0", SHORT)
        assert done.status == 0, done.err
        assert "win rates" not in done.out

    def test_many_prompts(self, smoke: Path, run_here: Run, here: Path):
        (here / "asked.txt").write_text(f"{ASKED}\n\nWho are you, [red]friend[/]?\n")
        (here / "asked.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("a\nb", "c")))
        done = run_here("sample", f"run={smoke}", "prompts=asked.txt", "compare=0", SHORT)
        assert [line for line in done.out.splitlines() if line.startswith("> ")] == [
            f"> {ASKED}",
            "> Who are you, [red]friend[/]?",
        ]
        assert run_here("sample", f"run={smoke}", "prompts=asked.jsonl", "compare=0", SHORT).status == 0

    def test_a_prompt_that_does_not_fit(self, smoke: Path, run_here: Run):
        done = run_here("sample", f"run={smoke}", f"prompt={'word ' * 3000}")
        assert done.status == 2
        assert "fill the context of 512 (model.max_length)" in done.err

    def test_exporting_a_whole_model(self, smoke: Path, run_here: Run, here: Path):
        run = Path(shutil.copytree(smoke, here / "tau=0.1,seed=0"))  # as a sweep names its runs
        done = run_here("export", f"run={run.name}", "to=shared/folder")
        assert done.status == 0, done.err
        folder = here / "shared" / "folder"
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        own = AutoModelForCausalLM.from_pretrained(smoke / "model")
        ids = tokenizer(ASKED, return_tensors="pt").input_ids
        torch.testing.assert_close(model(ids).logits, own(ids).logits)
        card = (folder / "README.md").read_text()
        found = read_json(smoke / "summary.json")["objectives"]["harmless"]
        assert f"| harmless | secondary | 0.550 | {found['win_rate']:.3f} |" in card
        assert "tokenizer('How do I boil an egg?" in card
        assert read_json(folder / "mopo_summary.json")["objectives"]["harmless"] == found
        assert not list((here / "shared").glob(".*"))
        assert run_here("sample", "run=shared/folder", f"prompt={ASKED}", "model.max_length=512", SHORT).status == 0
        assert run_here("export", f"run={run.name}", "to=shared/folder").status == 2
        assert run_here("export", f"run={run.name}", "to=shared/folder", "overwrite=true").status == 0

    def test_exporting_an_adapter(self, smoke: Path, run_here: Run, here: Path):
        """Of a base model in a directory: as an adapter, and merged, which need not be told apart by what they say."""
        base = shutil.copytree(smoke / "model", here / "base")
        options = [o for o in TINY if not o.startswith("model.architecture")]
        trained = run_here(
            "train", *options, "model=local", f"model.path={base}", "model.max_length=512", "model.lora.r=4",
            "run.dir=lora", "optimiser.learning_rate=1e-2",
        )  # fmt: skip
        assert trained.status == 0, trained.err
        adapter = run_here("export", "run=lora", "to=adapter")
        assert adapter.status == 0, adapter.err
        assert "which others have not; merge=true" in adapter.err
        merged = run_here("export", "run=lora", "to=merged", "merge=true")
        assert merged.status == 0, merged.err
        assert not (here / "merged" / "adapter_config.json").exists()
        ids = AutoTokenizer.from_pretrained(here / "merged")(ASKED, return_tensors="pt").input_ids
        logits = [AutoModelForCausalLM.from_pretrained(here / n)(ids).logits for n in ("adapter", "merged", "base")]
        torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)
        assert (logits[1] - logits[2]).abs().max() > 1e-3
        assert "library_name: peft" in (here / "adapter" / "README.md").read_text()
        assert "library_name: transformers" in (here / "merged" / "README.md").read_text()
        assert run_here("sample", "run=lora", f"prompt={ASKED}", SHORT).status == 0
        assert (
            run_here(
                "eval",
                "run=lora",
                "evaluation.prompts=4",
            ).status
            == 0
        )
