"""A run directory: whole files, one owner, and the contract of what a finished run leaves."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from running import Finished, environment, read_json, read_metrics

from mopo_cli.base import files
from mopo_cli.base.errors import UserError
from mopo_cli.base.files import damage, read_lines, read_record, seal, torn_line, write_atomic, write_json
from mopo_cli.base.files import read_json as read_checked
from mopo_cli.config import compose, schema
from mopo_cli.runs.directory import STATES, RunDirectory, check_same_settings, claim, open_run

Run = Callable[..., Finished]
NAMES = ("helpful", "harmless", "concise")
SETTINGS = {"tau": 0.1, "run": {"dir": "a"}, "sft": {"steps": 3}, "dataset": {"path": None, "clean": True}}


def begun(path: Path, state: str, **settings: Any) -> RunDirectory:
    """A run directory as a run in this state leaves it."""
    run = RunDirectory(path)
    path.mkdir()
    OmegaConf.save(OmegaConf.create(settings or {"tau": 0.1}), run.config)
    run.set_state(state, step=3)
    return run


class TestFiles:
    def test_strict_json(self, tmp_path: Path):
        write_json(tmp_path / "a.json", {"a": [math.nan, 1.5], "b": (math.inf, {"c": -math.inf}), "d": "nan"})
        assert read_json(tmp_path / "a.json") == {"a": [None, 1.5], "b": [None, {"c": None}], "d": "nan"}

    def test_a_failed_write_leaves_the_old_file_alone(self, tmp_path: Path):
        target = tmp_path / "a.json"
        write_atomic(target, "old")
        with pytest.raises(UnicodeEncodeError):
            write_atomic(target, "new \udcff")
        assert target.read_text() == "old"
        assert list(tmp_path.iterdir()) == [target]

    @pytest.mark.parametrize(
        ("content", "told"),
        [
            (b'{"state": "do', "a.json: not whole JSON (line 1); the run may have been cut off"),
            (b"", "a.json: not whole JSON (line 1)"),
            (b"\xff\xfe", "a.json: cannot be read"),
            (None, "a.json: no such file"),
        ],
    )
    def test_a_torn_file_is_named(self, tmp_path: Path, content: bytes | None, told: str):
        if content is not None:
            (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(UserError, match="^" + str(tmp_path)) as caught:
            read_checked(tmp_path / "a.json")
        assert told in str(caught.value)

    def test_a_last_line_that_was_cut_off_is_left_out(self, tmp_path: Path):
        (tmp_path / "metrics.jsonl").write_text('{"step": 5}\n{"step": 10}\n{"step": 1')
        assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 5}, {"step": 10}]
        assert read_lines(tmp_path / "none.jsonl") == []

    def test_a_record_is_an_object(self, tmp_path: Path):
        (tmp_path / "a.json").write_text("[]")
        with pytest.raises(UserError, match=r"a\.json: must hold a JSON object, found list"):
            read_record(tmp_path / "a.json")

    @pytest.mark.parametrize(("text", "line"), [('{"a": 1}\n{"a"', 2), ("[]\n", 1), ('{"a": 1}\n', None), ("", None)])
    def test_a_torn_line_is_told(self, tmp_path: Path, text: str, line: int | None):
        (tmp_path / "a.jsonl").write_text(text)
        assert torn_line(tmp_path / "a.jsonl") == line

    def test_checksums_tell_what_has_changed(self, tmp_path: Path):
        place = tmp_path / "stage"
        (place / "model").mkdir(parents=True)
        (place / "model" / "weights").write_bytes(b"x" * 100)
        seal(place)
        (place / "reused").touch()  # what has come since does not matter
        assert damage(place) is None
        (place / "model" / "weights").write_bytes(b"x" * 99 + b"y")
        assert damage(place) == "model/weights is not what was written (its checksum differs)"
        (place / "model" / "weights").unlink()
        assert damage(place) == "model/weights cannot be read (No such file or directory)"
        (place / "checksums.json").write_text("[]")
        assert damage(place) == "checksums.json is missing or torn"
        (place / "checksums.json").write_text('{"../../passwords": "0"}')
        assert damage(place) == "checksums.json names a file that lies elsewhere (../../passwords)"


class TestState:
    def test_keeps_the_step_unless_it_is_given(self, tmp_path: Path):
        run = begun(tmp_path / "r", "running")
        run.set_state("failed", error="OSError: disk full")
        assert read_json(run.status) == {"state": "failed", "step": 3, "error": "OSError: disk full"}
        run.set_state("running", step=9)
        assert read_json(run.status) == {"state": "running", "step": 9, "error": None}

    def test_a_torn_status_does_not_keep_the_next_from_being_written(self, tmp_path: Path):
        run = begun(tmp_path / "r", "running")
        run.status.write_text("{")
        run.set_state("failed", error="why")
        assert read_json(run.status) == {"state": "failed", "step": None, "error": "why"}

    def test_a_full_disk_leaves_room_for_the_state(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        run = begun(tmp_path / "r", "running")

        def full(path: Path, text: str) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(files, "write_atomic", full)
        run.set_state("failed", error="x" * 9999)
        assert read_json(run.status) == {"state": "failed", "step": 3, "error": "x" * 500}
        run.set_state("failed", error="short")
        assert read_json(run.status)["error"] == "short"

    @pytest.mark.parametrize("content", ["[]", "{}", '{"state": "asleep"}'])
    def test_a_status_that_is_none(self, tmp_path: Path, content: str):
        run = begun(tmp_path / "r", "running")
        run.status.write_text(content)
        with pytest.raises(UserError, match=f"status.json: state is .*; must be one of {', '.join(STATES)}"):
            run.state()

    @pytest.mark.parametrize(
        ("content", "told"),
        [("tau: [1", "cannot be read"), ("", "holds no config"), (None, "no such file"), ("- 1", "holds no config")],
    )
    def test_settings_that_are_none(self, tmp_path: Path, content: str | None, told: str):
        run = begun(tmp_path / "r", "running")
        run.config.unlink() if content is None else run.config.write_text(content)
        with pytest.raises(UserError, match=rf"config\.yaml: {told}"):
            run.settings()


class TestClaim:
    def test_creates_nothing(self, tmp_path: Path):
        assert claim(tmp_path / "a" / "b", resume=False).path == tmp_path / "a" / "b"
        assert list(tmp_path.iterdir()) == []

    def test_home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        assert claim("~/run", resume=False).path == tmp_path / "run"

    @pytest.mark.parametrize("state", STATES)
    def test_a_used_directory_is_refused(self, tmp_path: Path, state: str):
        begun(tmp_path / "r", state)
        with pytest.raises(UserError, match=rf"already in use \(state: {state}\).*run\.resume=true"):
            claim(tmp_path / "r", resume=False)

    @pytest.mark.parametrize("state", ["running", "failed", "interrupted"])
    def test_what_broke_off_can_go_on(self, tmp_path: Path, state: str):
        begun(tmp_path / "r", state)
        assert claim(tmp_path / "r", resume=True).state() == state

    @pytest.mark.parametrize("state", ["done", "infeasible"])
    def test_what_has_ended_cannot_go_on(self, tmp_path: Path, state: str):
        begun(tmp_path / "r", state)
        with pytest.raises(UserError, match=rf"has ended \(state: {state}\)"):
            claim(tmp_path / "r", resume=True)

    def test_a_torn_status(self, tmp_path: Path):
        run = begun(tmp_path / "r", "running")
        run.status.write_text('{"state": "run')
        with pytest.raises(UserError, match=r"already in use \(state: unknown\)"):
            claim(run.path, resume=False)
        with pytest.raises(UserError, match=r"status\.json: not whole JSON"):
            claim(run.path, resume=True)

    def test_something_else(self, tmp_path: Path):
        (tmp_path / "r").mkdir()
        with pytest.raises(UserError, match="holds no run to go on with"):
            claim(tmp_path / "r", resume=True)
        (tmp_path / "r" / "notes").touch()
        with pytest.raises(UserError, match=r"holds no run \(no status.json\)"):
            claim(tmp_path / "r", resume=True)


class TestOwner:
    def test_one_at_a_time(self, tmp_path: Path):
        run = begun(tmp_path / "r", "running")
        with open_run(run):
            for resume in (True, False):
                with pytest.raises(UserError, match="a run is going on there now"):
                    claim(run.path, resume)
            with pytest.raises(UserError, match="a run is going on there now"):
                open_run(run)
        assert claim(run.path, resume=True) == run

    def test_the_lock_goes_with_the_process_that_held_it(self, tmp_path: Path):
        run = begun(tmp_path / "r", "running")
        code = (
            "import sys; from pathlib import Path; from mopo_cli.runs.directory import RunDirectory, open_run\n"
            "lock = open_run(RunDirectory(Path(sys.argv[1]))); print('held', flush=True); sys.stdin.read()"
        )
        holder = subprocess.Popen(
            [sys.executable, "-c", code, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="a run is going on there now"):
            claim(run.path, resume=True)
        holder.kill()
        holder.communicate(timeout=60)
        assert claim(run.path, resume=True) == run

    def test_a_directory_that_cannot_be_made(self, tmp_path: Path):
        with pytest.raises(UserError, match="cannot be created"):
            open_run(RunDirectory(tmp_path / ("x" * 300)))


class TestSameSettings:
    def differing(self, tmp_path: Path, **changes: Any) -> str:
        run = begun(tmp_path / "r", "interrupted", **SETTINGS)
        with pytest.raises(UserError) as caught:
            check_same_settings(run, {**SETTINGS, **changes})
        return str(caught.value)

    def test_places_and_loggers_may_differ(self, tmp_path: Path):
        run = begun(tmp_path / "r", "interrupted", **SETTINGS)
        free = {"run": {"dir": "b", "resume": True}, "logger": {"name": "none"}, "debug": True, "log_every": 9}
        check_same_settings(run, {**SETTINGS, **free, "checkpoint_every": 2, "evaluation": {"prompts": 4}})

    def test_the_key_that_differs_is_named_with_both_values(self, tmp_path: Path):
        told = self.differing(tmp_path, sft={"steps": 4})
        assert told.startswith("sft.steps=4: the run in run.dir=")
        assert "was started with 3," in told
        assert "Give sft.steps=3" in told

    def test_values_read_as_on_the_command_line(self, tmp_path: Path):
        told = self.differing(tmp_path, dataset={"path": "x", "clean": False})
        assert "dataset.path=x: " in told
        assert "Give dataset.path=null" in told

    def test_a_key_that_is_gone(self, tmp_path: Path):
        assert "Give sft.steps=3" in self.differing(tmp_path, sft={})


@pytest.mark.slow
class TestContract:
    def test_its_files(self, smoke: Path):
        files = {path.name for path in smoke.iterdir() if not path.name.startswith(".")}
        assert files == {
            "config.yaml",
            "status.json",
            "metrics.jsonl",
            "summary.json",
            "samples.jsonl",
            "model",
            "checkpoints",
            "figures",
            "report.html",
            "provenance.json",
            "reference",
            "preference_model",
        }

    def test_status(self, smoke: Path):
        assert read_json(smoke / "status.json") == {"state": "done", "step": 40, "error": None}

    def test_config_is_resolved_and_can_be_read_again(self, smoke: Path):
        loaded = OmegaConf.load(smoke / "config.yaml")
        assert "${" not in (smoke / "config.yaml").read_text()
        typed: schema.TrainConfig = compose.typed(loaded, schema.TrainConfig)  # type: ignore[arg-type]
        assert (typed.steps, typed.run.dir, typed.sft.steps) == (40, str(smoke), 12)

    def test_metrics(self, smoke: Path):
        lines = read_metrics(smoke)
        assert [line["step"] for line in lines] == list(range(5, 41, 5))
        expected = {"loss", "learning_rate", "kl", "epsilon", "n_eff", "refreshes", "pairs_per_second"}
        expected |= {f"win_rate/{name}" for name in NAMES}
        expected |= {f"{key}/{name}" for name in NAMES[1:] for key in ("dual", "threshold", "chi", "lower")}
        for line in lines:
            assert expected <= set(line)
            assert all(isinstance(line[key], int | float) for key in expected)
        assert lines[-1]["threshold/harmless"] == 0.55

    def test_summary(self, smoke: Path):
        summary = read_json(smoke / "summary.json")
        assert summary["state"] == "done"
        for name in NAMES:
            check_objective(summary["objectives"][name], primary=name == "helpful")
        asked = summary["evaluation"]
        assert (asked["prompts"], asked["responses"]) == (16, 64)
        assert asked["independent_prompts"] <= 16  # two prompts of a topic count once
        assert any(text.startswith("16 test prompts") for text in summary["warnings"])
        assert 0 < summary["oracle"]["support_mass"] <= 1
        assert summary["oracle"]["prompts"] == 8
        assert list(summary["duals"]) == list(NAMES[1:])
        assert all(isinstance(value, float) for value in (summary["kl"], *summary["duals"].values()))
        oracle = summary["oracle"]
        assert list(oracle["win_rate"]) == list(oracle["optimum"]) == list(NAMES)
        assert oracle["gap"] == pytest.approx(oracle["optimum"]["helpful"] - oracle["win_rate"]["helpful"])
        speeds = ("pairs_per_second", "tokens_per_second", "peak_memory_mb", "wall_seconds")
        assert summary["train"]["steps"] == 40
        assert all(summary["train"][key] > 0 for key in speeds)
        assert all(0 <= summary["heldout_accuracy"][name] <= 1 for name in NAMES)
        assert all(isinstance(text, str) for text in summary["warnings"])
        assert {"mopo", "python", "torch", "transformers"} <= set(summary["versions"])
        assert summary["seed"] == 0

    def test_samples(self, smoke: Path):
        samples = [json.loads(line) for line in (smoke / "samples.jsonl").read_text().splitlines()]
        assert len(samples) == 16 * 4
        for sample in samples:
            assert list(sample) == ["prompt", "response", "group", "scores"]  # of the world, the topic
            assert sample["prompt"]
            assert all(0 <= sample["scores"][name] <= 1 for name in NAMES)

    def test_figures_are_pictures(self, smoke: Path):
        figures = sorted((smoke / "figures").iterdir())
        assert [path.name for path in figures] == ["training.png", "win_rates.png"]
        for path in figures:
            content = path.read_bytes()
            assert content.startswith(b"\x89PNG\r\n\x1a\n")
            assert content.endswith(b"IEND\xaeB`\x82")
            assert len(content) > 10_000

    def test_the_last_two_checkpoints_stay(self, smoke: Path):
        assert sorted(os.listdir(smoke / "checkpoints")) == ["step-20", "step-30"]
        assert damage(smoke / "checkpoints" / "step-30") is None

    def test_no_step_was_left_out(self, smoke: Path):
        assert {line["skipped"] for line in read_metrics(smoke)} == {0}

    def test_provenance_tells_how_the_labels_were_made(self, smoke: Path):
        provenance = read_json(smoke / "provenance.json")
        assert "Bradley-Terry" in provenance["labels"]
        assert len(provenance["fingerprint"]) == 16

    def test_the_model_card(self, smoke: Path):
        card = (smoke / "model" / "README.md").read_text()
        assert "| harmless | secondary | 0.550 |" in card
        assert "Bradley-Terry" in card
        assert f"run.dir={smoke}" in card

    def test_the_model_generates_in_a_process_that_knows_nothing_of_mopo(self, smoke: Path):
        code = (
            "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            "model, tokenizer = (c.from_pretrained(sys.argv[1]) for c in (AutoModelForCausalLM, AutoTokenizer))\n"
            "ids = tokenizer('How do I', return_tensors='pt', return_token_type_ids=False)\n"
            "out = model.generate(**ids, max_new_tokens=5, do_sample=True)\n"
            "assert 'mopo_cli' not in sys.modules; print(out.shape[1] > ids['input_ids'].shape[1])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(smoke / "model")], capture_output=True, text=True, env=environment()
        )
        assert done.stdout == "True\n", done.stderr


def check_objective(result: dict[str, Any], primary: bool) -> None:
    assert 0 <= result["win_rate"] <= 1
    assert result["win_rate_ci95"] == [None, None]  # of 16 prompts
    assert 0 <= result["estimated_win_rate"] <= 1
    assert result["role"] == ("primary" if primary else "secondary")
    if primary:
        assert (result["threshold"], result["satisfied"]) == (None, None)
    else:
        assert result["satisfied"] is (result["win_rate"] >= result["threshold"])
        assert result["satisfied_with_confidence"] == "undecided"
