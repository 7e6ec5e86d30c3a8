"""`mopo eval` on a finished run: its exact numbers are the run's own, and other settings give other samples."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running import Finished, mopo, read_json

from mopo_cli.entrants import newest_run
from mopo_cli.errors import UserError

Run = Callable[..., Finished]
QUICK = ("evaluation.exact_prompts=8", "evaluation.prompts=16", "evaluation.bootstrap=50", "sampling.max_new_tokens=12")


class TestChoosingARun:
    def test_nothing_finished(self, run_here: Run, here: Path):
        (here / "outputs" / "train" / "broken").mkdir(parents=True)
        done = run_here("eval")
        assert done.status == 2
        assert (
            done.err
            == "mopo: run: no finished run under outputs/train/; give one by run=DIR, or train one with `mopo train`\n"
        )

    @pytest.mark.parametrize("place", ["nowhere", "outputs"])
    def test_a_directory_without_a_finished_run(self, run_here: Run, here: Path, place: str):
        (here / "outputs").mkdir()
        done = run_here("eval", f"run={place}")
        assert done.status == 2
        assert done.err == f"mopo: run={place}: no finished run there (it has no summary.json and model/)\n"

    def test_the_newest_one_is_taken(self, tmp_path: Path):
        for number, name in enumerate(("b", "a", "c")):
            (tmp_path / name).mkdir()
            (tmp_path / name / "summary.json").write_text("{}")
            os.utime(tmp_path / name / "summary.json", (number, -number % 3))
        (tmp_path / "unfinished").mkdir()
        assert newest_run(tmp_path) == tmp_path / "a"
        with pytest.raises(UserError, match="no finished run under"):
            newest_run(tmp_path / "a")

    @pytest.mark.parametrize(
        ("name", "content", "told"),
        [
            (
                "summary.json",
                '{"objectives": {',
                "summary.json: not whole JSON (line 1); the run may have been cut off",
            ),
            ("summary.json", "[]", "summary.json: not the summary of a run"),
            ("config.yaml", "tau: [", "config.yaml: cannot be read"),
            ("config.yaml", None, "config.yaml: no such file"),
        ],
    )
    def test_torn_files(self, run_here: Run, here: Path, name: str, content: str | None, told: str):
        run = here / "run"
        (run / "model").mkdir(parents=True)
        (run / "summary.json").write_text('{"objectives": {}}')
        (run / "config.yaml").write_text("tau: 0.1\n")
        (run / name).unlink() if content is None else (run / name).write_text(content)
        done = run_here("eval", "run=run")
        assert done.status == 2
        assert told in done.err
        assert done.err.count("\n") == 1


@pytest.mark.slow
class TestEvaluating:
    @pytest.fixture
    def run(self, smoke: Path, here: Path) -> Path:
        return Path(shutil.copytree(smoke, here / "outputs" / "train" / "run"))

    def evaluated(self, run: Path) -> dict[str, Any]:
        return read_json(run / "evaluation.json")

    def test_agrees_with_the_summary(self, run: Path, here: Path):
        done = mopo("eval", *QUICK, "seed=0", cwd=here)
        assert done.status == 0, done.err
        summary, found = read_json(run / "summary.json"), self.evaluated(run)
        assert found["oracle"] == summary["oracle"]
        assert found["objectives"] == summary["objectives"]  # the same seed samples the same responses
        assert found["kl"] == summary["kl"]
        assert f"evaluation     {Path('outputs/train/run/evaluation.json')}\n" in done.out
        assert "harmless" in done.out

    def test_with_another_seed_and_size(self, run: Path, run_here: Run):
        samples = (run / "samples.jsonl").read_text()
        assert run_here("eval", f"run={run}", *QUICK, "evaluation.prompts=8", "evaluation.responses=2").status == 0
        found = self.evaluated(run)
        assert (found["prompts"], found["responses"], found["seed"]) == (8, 2, 1)
        assert found["oracle"] == read_json(run / "summary.json")["oracle"]
        assert found["objectives"] != read_json(run / "summary.json")["objectives"]
        assert len((run / "samples.jsonl").read_text().splitlines()) == 16 != len(samples.splitlines())
