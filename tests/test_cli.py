"""`mopo` as people call it: help, composed configs, exit statuses, and mistakes that write nothing."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from running import SHORT, TINY, Finished, command, environment, mopo

from mopo_cli import __version__, cli
from mopo_cli.config import compose, schema

Run = Callable[..., Finished]


def imported_by(*arguments: str) -> set[str]:
    """Top-level modules that `mopo ...` imports, in a process of its own."""
    code = (
        "import sys; from mopo_cli.cli import main; status = main(sys.argv[1:]); "
        "print(*{m.partition('.')[0] for m in sys.modules}, file=sys.stderr); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


class TestHelp:
    def test_lists_every_command_with_an_example(self, run_here: Run):
        shown = run_here("--help")
        assert shown.status == 0
        for name, about in cli.COMMANDS.items():
            assert f"  {name:<10} {about.summary}\n" in shown.out
            assert f"$ {about.example}\n" in shown.out
            assert about.example.startswith(f"mopo {name} ")

    def test_nothing_at_all_is_a_call_for_help(self, run_here: Run):
        assert run_here().out == run_here("--help").out == run_here("-h").out

    @pytest.mark.parametrize("name", list(cli.COMMANDS))
    def test_every_example_composes(self, run_here: Run, name: str):
        arguments = shlex.split(cli.COMMANDS[name].example)[1:]
        assert run_here(*arguments, "--cfg", "job").status == 0

    @pytest.mark.parametrize("name", list(cli.COMMANDS))
    def test_of_a_command_shows_its_example_groups_and_keys(self, run_here: Run, name: str):
        shown = run_here(name, "--help")
        assert shown.status == 0
        assert cli.COMMANDS[name].example in shown.out
        assert "keys and defaults (key=value):" in shown.out
        if name in ("train", "sweep"):
            assert all(f"  {group}" in shown.out for group in compose.command_groups(name))
            assert "opt1.3b" in shown.out
            assert "\n  tau: 0.08\n" in shown.out

    def test_imports_nothing_heavy(self):
        assert not {"torch", "transformers", "hydra", "omegaconf", "rich"} & imported_by("--help")
        assert not {"torch", "transformers", "datasets", "wandb"} & imported_by("train", "--help")

    @pytest.mark.parametrize("arguments", [("--version",), ("version",), ("train", "--version")])
    def test_version(self, run_here: Run, arguments: tuple[str, ...]):
        assert run_here(*arguments).out == f"mopo {__version__}\n"

    def test_the_installed_command(self):
        script = Path(sys.executable).with_name("mopo")
        done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (0, f"mopo {__version__}\n")

    def test_a_reader_that_has_gone_is_no_error(self, tmp_path: Path):
        line = f"{shlex.join(command('train', '--help'))} | head -n 1"
        done = subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], capture_output=True, text=True, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")


class TestComposing:
    def composed(self, run: Run, *arguments: str) -> Any:
        shown = run(*arguments, "--cfg", "job")
        assert shown.status == 0, shown.err
        return OmegaConf.create(shown.out)

    def test_cfg_job_imports_no_torch(self):
        assert not {"torch", "transformers", "datasets", "wandb"} & imported_by("train", "--cfg", "job")
        assert not {"torch", "transformers"} & imported_by("sweep", "-m", "tau=0.1,0.2", "--cfg=job")

    def test_what_cfg_job_prints_is_the_config_itself(self, run_here: Run):
        overrides = ["tau=0.3", "objectives.harmless.threshold=0.6", "run.name=x"]
        again = compose.typed(self.composed(run_here, "train", *overrides), schema.TrainConfig)
        assert again == compose.typed(compose.compose("train", overrides), schema.TrainConfig)

    def test_a_large_model_composes_without_being_loaded(self, run_here: Run):
        assert self.composed(run_here, "train", "model=opt1.3b").model.path == "facebook/opt-1.3b"

    def test_symbols_are_top_level_keys(self, run_here: Run):
        shown = self.composed(run_here, "train", "tau=0.1", "beta=0.9", "epsilon=0.15", "t0=50")
        assert (shown.tau, shown.beta, shown.epsilon, shown.t0) == (0.1, 0.9, 0.15, 50)
        assert self.composed(run_here, "train", "t0=inf").t0 == float("inf")

    def test_thresholds_and_places(self, run_here: Run):
        shown = self.composed(run_here, "train", "objectives.harmless.threshold=0.6", "run.name=first")
        assert shown.objectives.harmless.threshold == 0.6
        assert shown.run.dir == "outputs/train/first"
        assert self.composed(run_here, "train", "run.dir=/tmp/elsewhere").run.dir == "/tmp/elsewhere"

    def test_a_users_own_objectives(self, run_here: Run, here: Path):
        group = here / "mine" / "objectives"
        group.mkdir(parents=True)
        (group / "witty.yaml").write_text("witty: {role: primary}\nkind: {role: secondary, threshold: 0.6}\n")
        for option in ("--config-dir=mine", "-cd=mine"):
            shown = self.composed(run_here, "train", option, "objectives=witty")
            assert list(shown.objectives) == ["witty", "kind"]
        assert run_here("train", "--config-dir", "mine", "objectives=witty", "--cfg", "job").status == 0

    def test_hparams_set_what_train_yaml_sets(self, run_here: Run):
        assert self.composed(run_here, "train", "hparams=smoke").checkpoint_every == 10
        assert self.composed(run_here, "train", "hparams=smoke", "checkpoint_every=7").checkpoint_every == 7

    def test_train_with_m_is_a_sweep(self, run_here: Run, here: Path):
        shown = self.composed(run_here, "train", "-m", "tau=0.1,0.5", "sweep.name=s")
        assert shown.run.dir == "outputs/sweep/s/runs/tau=0.1"


class TestRefusedArguments:
    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            (["trian"], "trian: no such command; allowed: train, eval, sweep, report, data"),
            (["train", "--tau", "0.1"], "--tau: no such option; see mopo --help"),
            (["train", "--cfg", "hydra"], "--cfg hydra: allowed is --cfg job"),
            (["train", "--cfg"], "--cfg : allowed is --cfg job"),
            (["train", "--config-dir"], "--config-dir needs a directory"),
            (["train", "--config-dir=nowhere"], "--config-dir nowhere: no such directory"),
            (["eval", "-m", "run=a,b"], "-m: `mopo eval` runs once; use `mopo sweep`"),
            (["train", "tau"], "cannot read the override 'tau': expected key=value"),
        ],
    )
    def test_exit_2_and_one_line(self, run_here: Run, arguments: list[str], told: str):
        done = run_here(*arguments)
        assert (done.status, done.out) == (2, "")
        assert done.err.startswith(f"mopo: {told}")
        assert done.err.count("\n") == 1


# --------------------------------------------------------------------------------------------- bad input

SETTINGS = {
    "an unknown key": (["learning_rate=1"], "learning_rate: no such key (did you mean optimiser.learning_rate?)"),
    "a misspelt key": (["objectives.harmles.threshold=0.6"], "(did you mean objectives.harmless.threshold?)"),
    "an unknown option": (["model=opt13b"], "model=opt13b: no such option (did you mean opt1.3b?)"),
    "a wrong type": (["batch_size=many"], "batch_size"),
    "tau of zero": (["tau=0"], "tau=0.0: must be a number above 0"),
    "tau below zero": (["tau=-1"], "tau=-1.0: must be a number above 0"),
    "beta above one": (["beta=1.5"], "beta=1.5: must be in (0, 1]"),
    "beta of zero": (["beta=0"], "beta=0.0: must be in (0, 1]"),
    "epsilon below zero": (["epsilon=-0.1"], "epsilon=-0.1: must be 0 or more, or auto"),
    "epsilon of a word": (["epsilon=often"], "epsilon=often: must be 0 or more, or auto"),
    "t0 below one": (["t0=0"], "t0=0.0: must be a whole number of steps, 1 or more, or inf"),
    "two primaries": (
        ["objectives.harmless.role=primary", "objectives.harmless.threshold=null"],
        "objectives: exactly one must have role: primary, found 2 (helpful, harmless)",
    ),
    "no primary": (["objectives.helpful.role=secondary"], "exactly one must have role: primary, found none"),
    "a threshold above one": (["objectives.harmless.threshold=1.5"], "objectives.harmless.threshold=1.5: must be"),
    "a role of its own": (["objectives.concise.role=tertiary"], "objectives.concise.role=tertiary: must be primary"),
    "an objective without labels": (
        ["objectives=qa"],
        "the data set has no labels 'human'; it has: helpful, harmless, concise",
    ),
    "a wrong algorithm option": (["algorithm.extraction=foo"], "algorithm.extraction=foo: must be regression or bc"),
    "a wrong algorithm number": (["algorithm.dual_rate=0"], "algorithm.dual_rate=0: must be above 0"),
    "a wrong logger mode": (["logger=wandb", "logger.mode=foo"], "logger.mode=foo: must be auto, online, offline"),
    "online without a key": (["logger=wandb", "logger.mode=online"], "logger.mode=online: there is no W&B key"),
    "too few rows": (["dataset.max_rows=1"], "rows are left of 1"),
    "rows below one": (["dataset.max_rows=0"], "dataset.max_rows=0: must be a whole number, 1 or more, or null"),
    "a context too short": (["model.max_length=20"], "does not fit the context of 20 (model.max_length)"),
    "overlong of a word": (["dataset.overlong=cut"], "dataset.overlong=cut: must be error or drop"),
    "no room for any row": (["model.max_length=5", "dataset.overlong=drop"], "row fits the context of 5 tokens"),
    "an unknown architecture": (["model.architecture.model_type=lama"], "transformers knows no such model type"),
    "an empty run.dir": (["run.dir="], "run.dir: must not be empty"),
    "nothing to resume": (["run.resume=true"], "run.resume=true, but run.dir=outputs/train/r holds no run to go on"),
    "pairs without a path": (["dataset=pairs", "objectives=helpful_harmless"], "dataset.path"),
    "a missing file": (
        ["dataset=pairs", "dataset.path=gone.jsonl", "objectives=helpful_harmless"],
        "gone.jsonl: no such file or directory",
    ),
}


class TestBadSettings:
    @pytest.mark.parametrize("name", list(SETTINGS))
    def test_one_message_and_nothing_written(self, run_here: Run, here: Path, name: str):
        overrides, told = SETTINGS[name]
        done = run_here("train", *TINY, "run.name=r", *overrides)
        assert done.status == 2, done.out + done.err
        assert told in done.err
        assert done.err.startswith("mopo: ")
        assert done.err.count("\n") == 1
        assert "Traceback" not in done.out + done.err
        assert list(here.iterdir()) == []

    def test_the_same_from_a_process_of_its_own(self, tmp_path: Path):
        done = mopo("train", "tau=-1", cwd=tmp_path)
        assert (done.status, done.out) == (2, "")
        assert done.err == "mopo: tau=-1.0: must be a number above 0 (KL strength)\n"
        assert list(tmp_path.iterdir()) == []

    def test_debug_shows_where_it_comes_from(self, run_here: Run, here: Path):
        done = run_here("train", "tau=-1", "debug=true")
        assert done.status == 2
        assert "Traceback (most recent call last)" in done.err
        assert "tau=-1.0: must be a number above 0" in done.err
        assert list(here.iterdir()) == []

    def test_a_model_that_cannot_be_downloaded_says_how_to_work_offline(self, tmp_path: Path):
        changes = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache")}
        done = mopo("train", *SHORT, "model=opt1.3b", "run.name=r", cwd=tmp_path, **changes)
        assert done.status == 2, done.err
        assert "model.path=facebook/opt-1.3b" in done.err
        assert "hf download facebook/opt-1.3b --local-dir DIR" in done.err
        assert not (tmp_path / "outputs").exists()

    def test_a_data_set_that_cannot_be_downloaded_says_how_to_work_offline(self, tmp_path: Path):
        changes = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache")}
        choice = ("dataset=hh_rlhf", "objectives=helpful_harmless")
        done = mopo("train", *TINY, *choice, "run.name=r", cwd=tmp_path, **changes)
        assert done.status == 2, done.err
        assert "hf download Anthropic/hh-rlhf --repo-type dataset" in done.err
        assert not (tmp_path / "outputs").exists()

    @pytest.mark.parametrize(
        ("overrides", "told"),
        [
            ([], "model.path: not set. Set model.path=DIR"),
            (["model.path=./nowhere"], "model.path=./nowhere: no such directory"),
            (["model.path=./empty"], "model.path=./empty: not a model directory (it has no config.json)"),
        ],
    )
    def test_a_directory_that_is_no_model(self, run_here: Run, here: Path, overrides: list[str], told: str):
        (here / "empty").mkdir()
        done = run_here("train", *SHORT, "model=local", *overrides, "run.name=r")
        assert done.status == 2
        assert told in done.err
        assert not (here / "outputs").exists()


def rows(count: int = 40) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"Question {i}?",
            "responses": ["Yes.", "No, never."],
            "scores": {"helpful": [i % 2, 0.5], "harmless": [1, i % 3]},
        }
        for i in range(count)
    ]


def changed(number: int, **values: Any) -> str:
    """A file of good rows but for one."""
    made = rows()
    made[number] |= values
    return "".join(json.dumps(row) + "\n" for row in made)


DATA = {
    "not JSON": (changed(0) + "{oops\n", "rows.jsonl:41: not JSON at column 2"),
    "not an object": (changed(0) + "[1, 2]\n", "rows.jsonl:41: expected a JSON object, found [1, 2]"),
    "an empty prompt": (changed(6, prompt=""), "rows.jsonl:7: prompt is empty"),
    "a blank prompt": (changed(6, prompt=" \n"), "rows.jsonl:7: prompt is empty"),
    "an empty response": (changed(6, responses=["Yes.", ""]), "rows.jsonl:7: responses[1] is empty"),
    "one response": (changed(6, responses=["Yes."]), "rows.jsonl:7: responses must be a list of two or more"),
    "no prompt": (changed(6, prompt=None), "rows.jsonl:7: prompt is missing"),
    "a label above one": (
        changed(6, scores=None, labels={"helpful": [[0, 1, 2]]}),
        "rows.jsonl:7: labels.helpful holds 2; I is a number from 0 to 1",
    ),
    "an index too large": (
        changed(6, labels={"helpful": [[0, 5, 1]]}),
        "rows.jsonl:7: labels.helpful has the index 5; allowed: 0 to 1",
    ),
    "a score that is not a number": (
        changed(6, scores={"helpful": [float("nan"), 1]}),
        "rows.jsonl:7: scores.helpful holds nan; a score is a finite number",
    ),
    "a score too few": (changed(6, scores={"helpful": [1]}), "rows.jsonl:7: scores.helpful must be a list of 2"),
    "no labels of an objective": (
        "".join(json.dumps({**row, "scores": {"helpful": row["scores"]["helpful"]}}) + "\n" for row in rows()),
        "objectives.harmless: ",
    ),
    "labels that are all missing": (
        "".join(
            json.dumps({**row, "scores": {**row["scores"], "harmless": [None, 1]}}) + "\n" for row in rows()
        ),
        "objectives.harmless: every label is missing in the data (40 rows)",
    ),
    "a prompt too long": (
        changed(6, prompt=" ".join(map(str, range(900)))),
        "rows.jsonl:7: prompt of ",
    ),
    "no rows": ("", "rows"),
}  # fmt: skip


class TestBadData:
    @pytest.mark.parametrize("name", list(DATA))
    def test_one_message_with_the_file_and_the_line(self, run_here: Run, here: Path, name: str):
        text, told = DATA[name]
        (here / "rows.jsonl").write_text(text)
        data = ("dataset=pairs", "dataset.path=rows.jsonl", "dataset.max_rows=null", "objectives=helpful_harmless")
        done = run_here("train", *TINY, *data, "run.name=r")
        assert done.status == 2, done.out + done.err
        assert told in done.err
        assert done.err.count("\n") == 1
        assert [path.name for path in here.iterdir()] == ["rows.jsonl"]

    def test_good_rows_would_have_been_taken(self, run_here: Run, here: Path):
        (here / "rows.jsonl").write_text(changed(0))
        data = ("dataset=pairs", "dataset.path=rows.jsonl", "dataset.max_rows=null", "objectives=helpful_harmless")
        assert run_here("data", *data[:2], *data[3:]).status == 0


class TestTakenDirectories:
    def test_one_that_holds_something_else(self, run_here: Run, here: Path):
        (here / "mine").mkdir()
        (here / "mine" / "thesis.tex").write_text("years of work")
        done = run_here("train", *TINY, "run.dir=mine")
        assert done.status == 2
        assert "run.dir=mine: already in use (state: unknown). Choose another run.dir or run.name" in done.err
        assert os.listdir(here / "mine") == ["thesis.tex"]

    @pytest.mark.slow
    def test_one_of_a_finished_run(self, run_here: Run, smoke: Path):
        done = run_here("train", *TINY, f"run.dir={smoke}")
        assert done.status == 2
        assert f"run.dir={smoke}: already in use (state: done)" in done.err
        again = run_here("train", *TINY, f"run.dir={smoke}", "run.resume=true")
        assert again.status == 2
        assert "has ended (state: done)" in again.err

    def test_a_file(self, run_here: Run, here: Path):
        (here / "file").write_text("x")
        for place in ("file", "file/below"):
            done = run_here("train", *TINY, f"run.dir={place}")
            assert done.status == 2
            assert f"run.dir={place}: " in done.err
            assert "is a file, not a directory" in done.err
        assert (here / "file").read_text() == "x"

    def test_a_place_that_takes_no_directory(self, run_here: Run, here: Path):
        place = here / "closed"
        place.mkdir(mode=0o500)
        root = os.access(place, os.W_OK)  # may write anywhere, but not here:
        target = f"/proc/mopo/{here.name}" if root else str(place / "run")
        done = run_here("train", *TINY, f"run.dir={target}")
        assert done.status == 2
        assert f"run.dir={target}: " in done.err
        assert list(place.iterdir()) == []
