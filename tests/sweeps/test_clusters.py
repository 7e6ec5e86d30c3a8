"""Launchers beyond this process tree, and the search: a real one-node Slurm, a local Ray, Optuna."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIGINT, SIGKILL
from typing import Any

import pytest
from running import TIMEOUT, TINY, Finished, mopo, read_json, start, wait_for

from mopo_cli.base.errors import UserError
from mopo_cli.runs.record import RunFiles, RunRecord
from mopo_cli.sweeps import pools
from mopo_cli.sweeps.pools import Parallel, Processes, _exit_note
from mopo_cli.sweeps.worker import Job, work

Run = Callable[..., Finished]
FAST = (*TINY, "steps=4", "checkpoint_every=1", "onpolicy.every=2", "onpolicy.prompts=8", "onpolicy.train_prompts=8",
        "sft.steps=2", "preference_model.steps=2", "preference_model.evaluate_every=1", "dataset.max_rows=120",
        "evaluation.prompts=8", "evaluation.exact_prompts=4")  # fmt: skip


def states(directory: Path) -> list[str]:
    return [record["state"] for record in read_json(directory / "sweep.json")["runs"]]


class TestParallel:
    @pytest.fixture(autouse=True)
    def eight_cores(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(pools, "usable_cores", lambda: 8)
        monkeypatch.setattr(pools, "start_server", lambda: None)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def opened(self, runs: int = 100, **settings: Any) -> Processes:
        pool = Parallel(**settings).open(Path(), runs)
        assert isinstance(pool, Processes)
        return pool

    def test_cores_are_divided(self):
        assert (self.opened().slots, self.opened().threads) == (8, 1)
        assert (self.opened(jobs=3).slots, self.opened(jobs=3).threads) == (3, 2)
        assert (self.opened(threads=4).slots, self.opened(threads=4).threads) == (2, 4)
        assert (self.opened(runs=2).slots, self.opened(runs=2).threads) == (2, 4)  # no more jobs than runs

    def test_one_to_a_gpu(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,GPU-abc")
        pool = self.opened()
        assert (pool.slots, pool.threads, pool.gpus) == (3, 2, ["2", "5", "GPU-abc"])
        assert pool.description == "3 at a time (GPU 2, 5, GPU-abc, 2 threads each)"

    def test_what_ended_a_process(self):
        assert _exit_note(0) == ""
        assert _exit_note(-9) == "killed by signal 9 (out of memory?)"
        assert _exit_note(-11) == "killed by signal 11"
        assert _exit_note(1) == "its process ended with exit status 1"


class TestWorker:
    def test_a_run_that_has_ended_is_left_alone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "status.json").write_text('{"state": "done", "step": 3, "error": null}')
        work(Job("a", {}, str(tmp_path), str(tmp_path)))
        assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


# --------------------------------------------------------------------------------------------- Optuna


class TestSearch:
    @pytest.fixture(autouse=True)
    def needs_optuna(self):
        pytest.importorskip("optuna", reason="the extra `optuna` is not installed")

    def search(self, *overrides: str, earlier: tuple[dict[str, str], ...] = (), **settings: Any):
        from mopo_cli.sweeps.search import Optuna

        return Optuna(**settings).open([overrides], (), earlier)

    def result(self, name: str, tau: float, luck: float = 0.0) -> RunRecord:
        """Held-out win rates by tau; those on test prompts lie apart by luck."""
        rates = {"a": ("primary", 1 - tau + luck, None), "b": ("secondary", tau - luck, 0.3)}
        objectives = {
            key: {"role": role, "win_rate": rate, "win_rate_ci95": [rate, rate], "threshold": threshold}
            for key, (role, rate, threshold) in rates.items()
        }
        summary = {"objectives": objectives, "heldout_win_rate": {"a": 1 - tau, "b": tau}}
        return RunRecord(name, RunFiles(Path("nowhere") / name), "done", summary=summary)

    def proposed(
        self, count: int, earlier: tuple[dict[str, str], ...] = (), seed: int = 0, luck: float = 0.0
    ) -> list[dict[str, str]]:
        space = ("steps=9", "tau=interval(0.05,1.0)", "beta=0.9,0.99", "seed=range(0,10,3)")
        points = self.search(*space, earlier=earlier, trials=count, startup=3, seed=seed)
        found = []
        while (point := points.next()) is not None:
            assert point.overrides[0] == "steps=9"
            found.append(point.varying)
            points.tell(point, self.result(point.id, float(point.varying["tau"]), luck * (-1) ** len(found)))
        return found

    def test_it_never_learns_from_test_prompts(self):
        assert self.proposed(9, luck=0.4) == self.proposed(9)

    def test_a_run_of_before_without_held_out_numbers_teaches_nothing(self):
        from mopo_cli.sweeps.search import heldout_of

        record = self.result("r", 0.1)
        assert heldout_of(record) == {"a": 0.9, "b": 0.1}
        assert (
            heldout_of(RunRecord("r", record.files, "done", summary={"objectives": record.summary["objectives"]}))
            is None
        )

    def test_points_lie_in_the_space(self):
        for point in self.proposed(12):
            assert 0.05 <= float(point["tau"]) <= 1.0
            assert point["beta"] in ("0.9", "0.99")
            assert point["seed"] in ("0", "3", "6", "9")

    def test_the_same_seed_gives_the_same_search_also_when_it_was_broken_off(self):
        whole = self.proposed(9)
        assert self.proposed(9) == whole
        assert self.proposed(9, earlier=tuple(whole[:5])) == whole
        assert self.proposed(9, seed=1) != whole

    @pytest.mark.parametrize(
        ("overrides", "told"),
        [
            (("tau=0.1",), "nothing to search over"),
            (("tau=interval(1,0)",), "cannot search over 'tau=interval(1,0)'"),
            (("objectives=a,b",), "needs the same objectives in every trial"),
        ],
    )
    def test_what_is_no_space(self, overrides: tuple[str, ...], told: str):
        with pytest.raises(UserError) as caught:
            self.search(*overrides)
        assert told in str(caught.value)

    @pytest.mark.slow
    def test_trials_are_runs(self, run_here: Run, here: Path):
        space = ("sweeper=optuna", "sweeper.startup=2", "tau=tag(log,interval(0.05,1))", "sweep.dir=s")
        first = run_here("sweep", *FAST, *space, "sweeper.trials=2")
        assert first.status == 0, first.err
        more = run_here("sweep", *FAST, *space, "sweeper.trials=3")
        assert more.status == 0, more.err
        assert more.out.count("already") == 2
        told = read_json(here / "s" / "sweep.json")
        assert len(told["runs"]) == 3
        assert set(told["front"]) <= {record["id"] for record in told["runs"]}
        for record in told["runs"]:
            assert (here / "s" / "runs" / record["id"] / "summary.json").exists()
            assert record["id"] == f"tau={record['overrides']['tau']}"
            assert 0 <= record["heldout/helpful"] <= 1
        assert "on held-out prompts" in more.out
        assert told["best"] is None or told["best"]["chosen_by"] == "heldout_win_rate"


# --------------------------------------------------------------------------------------------- Ray


@pytest.mark.slow
class TestRay:
    def test_a_local_ray(self, here: Path):
        pytest.importorskip("ray", reason="the extra `ray` is not installed")
        points = ("seed=0,1", "debug.fail_at_step=null,2", "sweep.zip=[seed,debug.fail_at_step]")
        done = mopo("sweep", *FAST, *points, "launcher=ray", "sweep.dir=s", cwd=here, RAY_DISABLE_IMPORT_WARNING="1")
        assert done.status == 1, done.err
        assert states(here / "s")[1] == "failed"
        assert states(here / "s")[0] in ("done", "infeasible")
        assert "Ray tasks" in done.out


# --------------------------------------------------------------------------------------------- Slurm


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a Slurm of this machine's own."""
    pytest.importorskip("submitit", reason="the extra `slurm` is not installed")
    directory = tmp_path_factory.mktemp("slurm")
    script = Path(__file__).with_name("slurm.sh")
    begun = subprocess.run([script, "start", directory], stdout=subprocess.PIPE, text=True, timeout=120)
    if begun.returncode == 3:
        pytest.skip(f"no Slurm can be started here: {begun.stdout.strip()}")
    assert begun.returncode == 0
    yield {"SLURM_CONF": str(directory / "slurm.conf")}
    subprocess.run([script, "stop", directory], check=True, timeout=60)


@pytest.mark.slow
class TestSlurm:
    EASY = ("objectives.harmless.threshold=0.1", "objectives.concise.threshold=0.1")  # it ends by its steps
    SWEEP = ("sweep", *FAST, *EASY, "launcher=slurm", "launcher.cpus_per_task=1", "launcher.poll=0.5", "sweep.dir=s")

    def jobs(self, environment: dict[str, str], *options: str) -> list[str]:
        asked = ["squeue", "--noheader", "--format=%i", *options]
        return subprocess.run(
            asked, env={**os.environ, **environment}, capture_output=True, text=True, check=True
        ).stdout.split()

    def test_jobs_outlive_a_sweep_that_was_killed_and_are_taken_up(self, here: Path, slurm: dict[str, str]):
        runs = ("seed=0,1", "steps=60", "debug.fail_at_step=null,7", "sweep.zip=[seed,debug.fail_at_step]")
        before = set(self.jobs(slurm, "--states=all"))
        process = start(*self.SWEEP, *runs, cwd=here, **slurm)
        try:
            wait_for(lambda: len(list((here / "s" / "jobs").glob("*.json"))) == 2, process)
        finally:
            process.send_signal(SIGKILL)
            process.communicate()
        done = mopo(*self.SWEEP, *runs, "sweep.retry=none", cwd=here, **slurm)
        assert done.status == 1, done.err
        assert set(states(here / "s")) in ({"done", "failed"}, {"infeasible", "failed"})
        assert len(set(self.jobs(slurm, "--states=all")) - before) == 2  # nothing was submitted twice

    def test_interrupted_jobs_go_on(self, here: Path, slurm: dict[str, str]):
        process = start(*self.SWEEP, "seed=0", "steps=300", cwd=here, **slurm)
        run = here / "s" / "runs" / "default"
        try:
            wait_for(lambda: any((run / "checkpoints").glob("step-*")), process)
            process.send_signal(SIGINT)
            out, err = process.communicate(timeout=TIMEOUT)
        finally:
            process.kill()
        assert process.returncode == 130, err
        assert states(here / "s") == ["interrupted"]
        assert re.search(r"^interrupted; go on with: mopo sweep .*launcher=slurm", out, re.MULTILINE)
        assert self.jobs(slurm) == []
        reached = read_json(run / "status.json")["step"]
        assert reached >= 1

    def test_a_job_that_is_put_back_in_the_queue_ends_well(self, here: Path, slurm: dict[str, str]):
        process = start(*self.SWEEP, "seed=0", "steps=150", cwd=here, **slurm)
        run = here / "s" / "runs" / "default"
        try:
            wait_for(lambda: any((run / "checkpoints").glob("step-*")), process)
            (job,) = self.jobs(slurm)
            subprocess.run(["scancel", "--signal=USR2", job], env={**os.environ, **slurm}, check=True)  # time is up
            wait_for(lambda: bool(self.jobs(slurm, "--states=PENDING")), process)
            soon = ["scontrol", "update", f"JobId={job}", "StartTime=now"]  # Slurm lets it wait for two minutes
            subprocess.run(soon, env={**os.environ, **slurm}, check=True)
            out, err = process.communicate(timeout=TIMEOUT)
        finally:
            process.kill()
        assert process.returncode == 0, out + err
        assert states(here / "s")[0] in ("done", "infeasible")
        assert "interrupted" in (run / "log.txt").read_text()

    def test_what_slurm_refuses(self, here: Path, slurm: dict[str, str]):
        done = mopo(*self.SWEEP, "seed=0", "launcher.partition=nowhere", cwd=here, **slurm)
        assert done.status == 1
        assert "sbatch refused" in done.out
        with (here / "s" / "results.csv").open() as file:
            assert [row["state"] for row in csv.DictReader(file)] == ["failed"]


@pytest.mark.skipif(shutil.which("squeue") is not None, reason="there is a Slurm here")
def test_no_slurm_here(run_here: Run, here: Path):
    pytest.importorskip("submitit", reason="the extra `slurm` is not installed")
    done = run_here("sweep", *FAST, "seed=0,1", "launcher=slurm")
    assert done.status == 2
    assert "launcher=slurm: there is no sbatch here" in done.err
