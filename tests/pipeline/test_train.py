"""`mopo train` end to end: the same seed gives the same run, also when it was killed, and in several processes."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM, Signals

import pytest
from omegaconf import OmegaConf
from running import TIMEOUT, TINY, Finished, command, environment, read_json, results, stop_when

Run = Callable[..., Finished]
LAGGED = ("t0=7", "steps=30", "onpolicy.every=8", "objectives.concise.threshold=null")  # checkpoints lie between draws

pytestmark = pytest.mark.slow


def last_step(run: Path) -> int | None:
    """Of the newest whole checkpoint."""
    steps = [int(path.name.split("-")[1]) for path in (run / "checkpoints").glob("step-*")]
    return max(steps, default=None)


class TestDeterminism:
    def test_the_same_seed_gives_the_same_run(self, smoke: Path, run_here: Run, here: Path):
        assert run_here("train", *TINY, "run.dir=again").status == 0
        assert results(here / "again") == results(smoke)
        assert (here / "again" / "samples.jsonl").read_bytes() == (smoke / "samples.jsonl").read_bytes()

    def test_another_seed_gives_another(self, smoke: Path, run_here: Run, here: Path):
        assert run_here("train", *TINY, "seed=1", "run.dir=other").status == 0
        assert results(here / "other")[1] != results(smoke)[1]


class TestSurviving:
    def resumed(self, run_here: Run, run: Path, *overrides: str) -> None:
        done = run_here("train", *TINY, *overrides, f"run.dir={run}", "run.resume=true")
        assert done.status == 0, done.err
        assert read_json(run / "status.json")["state"] == "done"

    def killed(self, ready: Callable[[Path], bool], run: Path, with_signal: Signals, *overrides: str) -> Finished:
        arguments = ("train", *TINY, *overrides, f"run.dir={run}")
        return stop_when(lambda: ready(run), with_signal, *arguments, cwd=run.parent)

    def test_a_kill_during_alignment(self, smoke: Path, run_here: Run, here: Path):
        run = here / "run"
        assert self.killed(lambda run: last_step(run) is not None, run, SIGKILL).status == -SIGKILL
        assert read_json(run / "status.json")["state"] == "running"
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 1')  # as a line that was cut off
        started = OmegaConf.load(run / "config.yaml").run.name
        self.resumed(run_here, run)
        assert results(run) == results(smoke)
        assert (run / "model" / "README.md").read_text().count(f"\n# {started}\n") == 1  # it keeps its name

    @pytest.mark.parametrize("with_signal", [SIGINT, SIGTERM])
    def test_an_interrupt_during_alignment(self, smoke: Path, run_here: Run, here: Path, with_signal: Signals):
        run = here / "run"
        stopped = self.killed(lambda run: last_step(run) is not None, run, with_signal)
        assert stopped.status == 130
        assert stopped.err.endswith("mopo: interrupted\n")
        assert "Traceback" not in stopped.err
        assert read_json(run / "status.json")["state"] == "interrupted"
        assert not (run / "summary.json").exists()
        line = re.search(r"^interrupted; go on with: mopo (train .* run\.resume=true)$", stopped.out, re.MULTILINE)
        assert line, stopped.out
        assert run_here(*shlex.split(line.group(1))).status == 0
        assert results(run) == results(smoke)

    @pytest.mark.parametrize(
        ("stage", "ready", "there"),
        [
            ("reference", lambda run: (run / "status.json").exists(), ()),
            ("preference model", lambda run: (run / "reference").is_dir(), ("reference",)),
        ],
    )
    def test_during_the_stages_before(
        self, smoke: Path, run_here: Run, here: Path, stage: str, ready: Callable[[Path], bool], there: tuple[str, ...]
    ):
        run = here / "run"
        assert self.killed(ready, run, SIGKILL).status == -SIGKILL
        assert [name for name in ("reference", "preference_model") if (run / name).exists()] == list(there), stage
        self.resumed(run_here, run)
        assert results(run) == results(smoke)

    def test_with_a_lagged_reference(self, run_here: Run, here: Path):
        assert run_here("train", *TINY, *LAGGED, "run.dir=whole").status == 0
        whole = results(here / "whole")
        assert [line["refreshes"] for line in whole[1]] == [0, 1, 2, 2, 3, 4]
        thresholds = {line["threshold/concise"] for line in whole[1]}
        assert len(thresholds) > 2  # the schedule moves them
        assert {line["threshold/harmless"] for line in whole[1]} == {0.55}  # the user's own stays
        self.killed(lambda run: last_step(run) is not None, here / "run", SIGKILL, *LAGGED)
        self.resumed(run_here, here / "run", *LAGGED)
        assert results(here / "run") == whole

    def test_only_under_the_same_settings_and_data(self, run_here: Run, here: Path):
        rows = here / "rows.jsonl"
        made = [
            {"prompt": f"Q {i}?", "responses": ["Yes.", "No."], "scores": {"helpful": [i % 2, 0.5], "harmless": [1, i]}}
            for i in range(40)
        ]
        rows.write_text("".join(json.dumps(row) + "\n" for row in made))
        data = ("dataset=pairs", f"dataset.path={rows}", "dataset.max_rows=null", "objectives=helpful_harmless")
        run = here / "run"
        self.killed(lambda run: last_step(run) is not None, run, SIGKILL, *data)
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

        other = run_here("train", *TINY, *data, "tau=0.3", f"run.dir={run}", "run.resume=true")
        assert other.status == 2
        assert f"tau=0.3: the run in run.dir={run} was started with 0.08" in other.err
        rows.write_text("".join(json.dumps(row) + "\n" for row in reversed(made)))
        other = run_here("train", *TINY, *data, f"run.dir={run}", "run.resume=true")
        assert other.status == 2
        assert "the data have changed since the run in" in other.err
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


class TestFailing:
    def test_a_full_disk_is_one_line_and_a_failed_run(self, here: Path):
        line = shlex.join(command("train", *TINY, "run.dir=run"))
        done = subprocess.run(
            ["bash", "-c", f"ulimit -f 64; {line}"],  # KiB a file may have: less than the model
            cwd=here,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        assert done.returncode == 1, done.stderr
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("mopo: failed: ")
        assert done.stderr.endswith("(debug=true shows the traceback)\n")
        status = read_json(here / "run" / "status.json")
        assert status["state"] == "failed"
        assert "File too large" in status["error"]

    def test_a_reader_that_has_gone_does_not_end_the_run(self, smoke: Path, here: Path):
        line = f"{shlex.join(command('train', *TINY, 'run.dir=run'))} | head -n 1"
        done = subprocess.run(
            ["bash", "-c", line], cwd=here, env=environment(), capture_output=True, text=True, timeout=TIMEOUT
        )
        assert done.stdout == "data and model: started\n"
        assert results(here / "run") == results(smoke)


class TestConsole:
    def test_plain_lines_in_a_pipe(self, here: Path, run_here: Run):
        done = run_here("train", *TINY, "run.dir='a [bracket]'")
        assert done.status == 0, done.err
        for stage in ("data and model", "reference (SFT)", "preference model", "alignment (mopo)", "evaluation"):
            assert re.search(rf"^{re.escape(stage)}: done in [\d.]+s$", done.out, re.MULTILINE)
        assert "\x1b" not in done.out + done.err
        assert re.search(r"^harmless +secondary +0\.550 +0\.\d+ +(yes|no)\? +0\.\d+ +0\.\d+$", done.out, re.M)
        assert "run directory  a [bracket]\n" in done.out
        assert re.search(r"^warning: the onpolicy estimate of R_j rests on 32 ", done.err, re.M)

    def test_bars_in_a_terminal(self, here: Path):
        primary, secondary = pty.openpty()
        process = subprocess.Popen(
            command("train", *TINY, "run.dir=run"),
            cwd=here,
            env=environment(COLUMNS="100", LINES="40", TERM="xterm-256color"),
            stdin=subprocess.DEVNULL,
            stdout=secondary,
            stderr=secondary,
        )
        os.close(secondary)
        shown = read_all(primary)
        assert process.wait(timeout=TIMEOUT) == 0
        plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown)
        assert re.search(r"alignment \(mopo\) ━+ +40/40 +\d:\d\d  loss [\d.e+]+  λ harmless", plain)
        assert "warning the onpolicy estimate of R_j rests on 32 effective samples" in plain
        assert "run directory  run" in plain


def read_all(terminal: int) -> str:
    """Everything that is written to a terminal until nobody holds it any more."""
    parts = []
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # how Linux says that the other end is closed
            part = b""
        if not part:
            os.close(terminal)
            return b"".join(parts).decode()
        parts.append(part)


class TestSeveralProcesses:
    EXACT = ("sft.steps=0", "objectives.harmless.threshold=0.5")

    def launched(self, here: Path, *overrides: str) -> Finished:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
        arguments = ["mopo_cli", "train", *TINY, *overrides]
        done = subprocess.run(
            launcher + arguments,
            cwd=here,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    def test_two_of_half_the_batch_are_one_of_the_whole(self, here: Path, run_here: Run):
        half = ("batch_size=4", "preference_model.batch_size=16")
        done = self.launched(here, *self.EXACT, *half)
        assert done.status == 0, done.err
        assert done.out.count("alignment (mopo): started") == done.out.count("run directory") == 1
        (run,) = (here / "outputs" / "train").iterdir()
        assert read_json(run / "status.json") == {"state": "done", "step": 40, "error": None}

        whole = ("batch_size=8", "preference_model.batch_size=32", "run.dir=one")
        assert run_here("train", *TINY, *self.EXACT, *whole).status == 0
        two, one = results(run), results(here / "one")
        assert [line["step"] for line in two[1]] == [line["step"] for line in one[1]]
        assert [line["learning_rate"] for line in two[1]] == [line["learning_rate"] for line in one[1]]
        losses = ([line["loss"] for line in some[1]] for some in (two, one))
        assert next(losses)[:2] == pytest.approx(next(losses)[:2], rel=1e-3)  # not of the first process's rows alone
        for name, value in one[0]["oracle"]["win_rate"].items():
            assert two[0]["oracle"]["win_rate"][name] == pytest.approx(value, abs=0.01)

    def test_a_mistake_is_told_once(self, here: Path):
        done = self.launched(here, "model.max_length=20")
        assert done.status != 0
        assert done.err.count("mopo: assistant:1: ") == 1
        assert not (here / "outputs").exists()


def test_a_second_run_finds_the_directory_taken(run_here: Run, here: Path):
    """While a run goes on, neither a new one nor a resumed one may join it."""
    endless = ("train", *TINY, "steps=1000000", "onpolicy.every=1000000", "run.dir=run")
    process = subprocess.Popen(command(*endless), cwd=here, env=environment(), stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        while b"alignment (mopo): started" not in process.stdout.readline():
            assert process.poll() is None
        for extra in ((), ("run.resume=true",)):
            done = run_here(*endless, *extra)
            assert done.status == 2
            assert "run.dir=run: a run is going on there now" in done.err
        assert read_json(here / "run" / "status.json")["state"] == "running"
    finally:
        process.kill()
        process.communicate()
