"""Runs that break off: numbers that are not finite, a full disk, a directory that is gone, signals."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from running import SMALL, Finished, read_json, read_metrics
from safetensors.torch import load_file

from mopo_cli.algorithms.mopo.alignment import Alignment
from mopo_cli.base import files
from mopo_cli.pipeline import train as training
from mopo_cli.runs.directory import RunDirectory

Run = Callable[..., Finished]
pytestmark = pytest.mark.slow


@pytest.fixture
def train(run_here: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`mopo train` of the smallest run there is, in run/; all tests of this file share a cache."""
    cache = tmp_path_factory.getbasetemp() / "broken_off_cache"
    return lambda *overrides: run_here("train", *SMALL, f"cache={cache}", "run.dir=run", *overrides)


@pytest.fixture(autouse=True)
def unevaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end with their models: the evaluation takes longest, and has nothing to do with what breaks off."""
    for name in ("evaluate_run", "finish"):
        monkeypatch.setattr(training, name, lambda *_: None)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], Any]) -> None:
    """`act` before that step of the alignment, once."""
    whole, steps = Alignment.before_step, [step]

    def before_step(self: Alignment, number: int) -> None:
        whole(self, number)
        if steps and number == steps[0]:
            steps.clear()
            act()

    monkeypatch.setattr(Alignment, "before_step", before_step)


def finite_files(run: Path) -> bool:
    """Whether all weights in a run are finite."""
    places = [run / "reference", run / "preference_model", run / "stages", run / "checkpoints"]
    tensors = [load_file(path) for place in places for path in place.rglob("*.safetensors")]
    tensors += [torch.load(path, weights_only=True) for place in places for path in place.rglob("pytorch_model.bin")]
    return all(bool(torch.isfinite(value).all()) for some in tensors for value in some.values())


class TestNotFinite:
    OUT_OF_BOUNDS = ("optimiser.learning_rate=1e6", "optimiser.warmup=0")

    @pytest.mark.parametrize(
        ("algorithm", "stage"),
        [
            ("mopo", "alignment (mopo)"),
            ("soups", "alignment (dpo on helpful)"),
            ("dpa", "alignment (dpa)"),
            ("mapl", "alignment (mapl)"),
        ],
    )
    def test_a_learning_rate_out_of_bounds_ends_failed(self, train: Run, here: Path, algorithm: str, stage: str):
        done = train(f"algorithm={algorithm}", *self.OUT_OF_BOUNDS)
        assert done.status == 1, done.out
        assert f"failed: NotFiniteError: {stage}: " in done.err
        assert "lower optimiser.learning_rate (now 1e+06), or raise optimiser.warmup (now 0)" in done.err
        status = read_json(here / "run" / "status.json")
        assert status["state"] == "failed"
        assert status["error"].startswith(f"NotFiniteError: {stage}: ")
        assert not (here / "run" / "model").exists()
        assert not (here / "run" / "summary.json").exists()
        assert not list((here / "run").glob("stages/*"))
        assert finite_files(here / "run")

    @pytest.mark.parametrize(("stage", "title"), [("sft", "reference (SFT)"), ("preference_model", "preference model")])
    def test_nothing_of_the_stages_before_is_left_for_others(self, run_here: Run, here: Path, stage: str, title: str):
        wild = (f"{stage}.optimiser.learning_rate=1e6", f"{stage}.optimiser.warmup=0")
        done = run_here("train", *SMALL, "cache=cache", "run.dir=run", *wild)
        assert done.status == 1
        assert f"NotFiniteError: {title}: " in done.err
        assert f"lower {stage}.optimiser.learning_rate (now 1e+06)" in done.err
        assert not list((here / "cache").glob("reference-*" if stage == "sft" else "preference_model-*"))
        assert not (here / "run" / ("reference" if stage == "sft" else "preference_model")).exists()

    def test_a_bad_step_is_counted_and_survives_a_resume(self, train: Run, here: Path, monkeypatch: pytest.MonkeyPatch):
        whole = Alignment.loss

        def loss(self: Alignment, numbers: list[int]) -> Any:
            return whole(self, numbers) * (torch.nan if self.work.steps == 2 else 1.0)

        monkeypatch.setattr(Alignment, "loss", loss)
        assert train("debug.fail_at_step=5").status == 1
        done = train("run.resume=true")
        assert done.status == 0, done.err
        assert [line["skipped"] for line in read_metrics(here / "run")] == [0, 0, 1, 1, 1, 1]
        assert "1 of 6 steps changed nothing, since their loss or gradient was not finite" in done.err

    def test_float16_is_refused_before_anything_is_written(self, train: Run, here: Path):
        done = train("model.dtype=float16")
        assert done.status == 2
        assert "model.dtype=float16" in done.err
        assert "model.mixed_precision=bf16" in done.err
        assert not (here / "run").exists()

    def test_bfloat16_is_warned_of(self, train: Run):
        done = train("model.dtype=bfloat16", "steps=2")
        assert done.status == 0, done.err
        assert "warning: model.dtype=bfloat16" in done.err
        assert "model.mixed_precision=bf16" in done.err


class TestFullDisk:
    def test_the_state_is_told_the_partial_checkpoint_goes_and_the_good_one_stays(
        self, train: Run, here: Path, monkeypatch: pytest.MonkeyPatch
    ):
        save = Accelerator.save_state
        checkpoint = here / "run" / "checkpoints"

        def save_state(self: Accelerator, place: str, **how: Any) -> Any:
            result = save(self, place, **how)
            if place.endswith(".step-4.tmp"):
                monkeypatch.setattr(files.os, "fsync", full)  # not a block for a new file either
                full(0)
            return result

        def full(number: int) -> None:
            if any(checkpoint.glob(".step-*")) or number:
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Accelerator, "save_state", save_state)
        done = train()
        assert done.status == 1
        assert "No space left on device" in done.err
        status = read_json(here / "run" / "status.json")
        assert (status["state"], status["step"]) == ("failed", 2)
        assert "No space left on device" in status["error"]
        assert os.listdir(checkpoint) == ["step-2"]
        assert not list((here / "run").glob(".status.json*"))


class TestGone:
    @pytest.mark.parametrize("moved", [True, False])
    def test_it_is_noticed_at_the_next_write(
        self, train: Run, here: Path, monkeypatch: pytest.MonkeyPatch, moved: bool
    ):
        act = (lambda: (here / "run").rename(here / "moved")) if moved else (lambda: shutil.rmtree(here / "run"))
        at_step(monkeypatch, 2, act)
        done = train()
        assert done.status == 1
        assert "run.dir=run: was removed or moved while its run went on" in done.err
        assert not (here / "run").exists()
        if moved:
            assert [line["step"] for line in read_metrics(here / "moved")] == [1, 2]

    def test_before_a_checkpoint(self, train: Run, here: Path, monkeypatch: pytest.MonkeyPatch):
        at_step(monkeypatch, 1, lambda: shutil.rmtree(here / "run"))
        assert train("log_every=100").status == 1
        assert not (here / "run").exists()


class TestSignals:
    def test_a_checkpoint_is_written_from_which_the_run_ends_as_it_would_have(
        self, train: Run, here: Path, monkeypatch: pytest.MonkeyPatch
    ):
        at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        done = train("checkpoint_every=100")
        assert done.status == 130
        assert read_json(here / "run" / "status.json") == {"state": "interrupted", "step": 3, "error": None}
        assert os.listdir(here / "run" / "checkpoints") == ["step-3"]
        assert "interrupted; go on with: " in done.out or "mopo: interrupted" in done.err
        assert train("run.resume=true").status == 0
        resumed = load_file(here / "run" / "model" / "model.safetensors")
        shutil.rmtree(here / "run")
        assert train().status == 0
        for name, value in load_file(here / "run" / "model" / "model.safetensors").items():
            assert torch.equal(value, resumed[name])


class TestResume:
    def test_a_line_without_a_step_and_a_directory_that_is_no_checkpoint(self, train: Run, here: Path):
        assert train("debug.fail_at_step=5").status == 1
        run = RunDirectory(here / "run")
        (run.checkpoints / "step-abc").mkdir()
        lines = run.metrics.read_text().splitlines()
        run.metrics.write_text("\n".join([lines[0], json.dumps({"loss": 1.0}), "[]", *lines[1:]]) + "\n")
        done = train("run.resume=true")
        assert done.status == 0, done.err
        assert "warning: run/metrics.jsonl:2: a line without a step; left out, with 1 more" in done.err
        assert [line["step"] for line in read_metrics(run.path)] == list(range(1, 7))
