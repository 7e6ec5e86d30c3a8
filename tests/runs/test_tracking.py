"""metrics.jsonl and Weights & Biases: what is logged, where it goes without a key or a network; no questions asked."""

from __future__ import annotations

import json
import math
import os
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest
from running import TINY, Finished, mopo, read_json, read_metrics, results, stop_when

from mopo_cli.base.errors import UserError
from mopo_cli.base.text import flat
from mopo_cli.config.schema import LoggerConfig
from mopo_cli.runs.directory import RunDirectory
from mopo_cli.runs.tracking import Tracker, _start_wandb, check_logger, printable, wandb_mode

Run = Callable[..., Finished]
KEY = "0123456789" * 4
WANDB = (*(option for option in TINY if option != "logger=none"), "logger=wandb")


def mode(**settings: Any) -> str:
    return wandb_mode(LoggerConfig(name="wandb", **settings))


@pytest.mark.usefixtures("here")
class TestMode:
    @pytest.fixture(autouse=True)
    def set_environment(self, monkeypatch: pytest.MonkeyPatch):
        self.set = monkeypatch.setenv

    def netrc(self, text: str) -> None:
        path = Path("netrc").resolve()
        path.write_text(text)
        path.chmod(0o600)
        self.set("NETRC", str(path))

    def test_without_a_key_it_is_offline(self):
        assert mode() == "offline"

    @pytest.mark.parametrize("name", ["WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"])
    def test_with_a_key_it_is_online(self, name: str):
        self.set(name, KEY)
        assert mode() == "online"

    def test_a_key_in_netrc(self):
        self.netrc(f"machine api.wandb.ai login user password {KEY}\n")
        assert mode() == "online"
        self.set("WANDB_BASE_URL", "https://wandb.example:8443/")
        assert mode() == "offline"
        self.netrc(f"machine wandb.example:8443 login user password {KEY}\n")
        assert mode() == "online"

    @pytest.mark.parametrize("text", ["machine", "machine example.com login user password x\n", "\x00"])
    def test_a_netrc_of_no_use(self, text: str):
        self.netrc(text)
        assert mode() == "offline"

    @pytest.mark.parametrize(
        ("found", "meant"), [("offline", "offline"), ("dryrun", "offline"), ("disabled", "disabled")]
    )
    def test_the_environment_decides(self, found: str, meant: str):
        self.set("WANDB_API_KEY", KEY)
        self.set("WANDB_MODE", found)
        assert mode() == meant
        assert mode(mode="online") == "online"  # what the config says comes first

    def test_modes_that_do_not_exist(self):
        with pytest.raises(UserError, match=r"logger\.mode=on: must be auto, online, offline, disabled"):
            mode(mode="on")
        self.set("WANDB_MODE", "on")
        with pytest.raises(UserError, match="WANDB_MODE=on: must be online, offline, disabled"):
            mode()

    def test_online_without_a_key_is_refused_rather_than_asked_for(self):
        with pytest.raises(UserError, match=r"logger\.mode=online: there is no W&B key; set WANDB_API_KEY"):
            mode(mode="online")
        self.set("WANDB_MODE", "run")
        with pytest.raises(UserError, match="WANDB_MODE=run: there is no W&B key"):
            mode()


@pytest.mark.usefixtures("here")
class TestLimits:
    @pytest.mark.parametrize(
        ("settings", "name", "told"),
        [
            ({"project": "a/b"}, "r", "logger.project=a/b: must be without /, as W&B has it"),
            ({"project": "p" * 129}, "r", "must be 1 to 128 characters, as W&B has it; found 129"),
            ({"project": ""}, "r", "logger.project=: must be 1 to 128 characters"),
            ({"group": "g" * 129}, "r", "logger.group=ggg"),
            ({"tags": ["a", "t" * 65]}, "r", "must be 1 to 64 characters, as W&B has it; found 65"),
            ({"tags": [""]}, "r", "logger.tags: '' must be 1 to 64 characters"),
            ({}, "n" * 129, "run.name=nnn"),
        ],
    )
    def test_what_wandb_would_refuse_later_is_refused_at_once(self, settings: dict[str, Any], name: str, told: str):
        with pytest.raises(UserError) as caught:
            check_logger(LoggerConfig(name="wandb", **settings), name)
        assert told in str(caught.value)
        check_logger(LoggerConfig(name="wandb", mode="disabled", **settings), name)
        check_logger(LoggerConfig(**settings), name)

    def test_the_most_that_it_takes(self):
        check_logger(LoggerConfig(name="wandb", project="p" * 128, tags=["t" * 64]), "n" * 128)


class Asked:
    """In place of the module wandb: what it was asked for."""

    def __init__(self) -> None:
        self.arguments: dict[str, Any] = {}

    def Settings(self, **settings: Any) -> dict[str, Any]:  # noqa: N802
        return settings

    def init(self, **arguments: Any) -> None:
        self.arguments = arguments


@pytest.mark.usefixtures("here")
class TestVariablesOfWandb:
    def asked(self, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> dict[str, Any]:
        fake = Asked()
        monkeypatch.setitem(sys.modules, "wandb", fake)
        _start_wandb(RunDirectory(Path("r")), LoggerConfig(name="wandb", **settings), {}, "mine", False, "train")
        return fake.arguments

    def test_without_them_the_run_tells(self, monkeypatch: pytest.MonkeyPatch):
        asked = self.asked(monkeypatch)
        assert (asked["project"], asked["name"], asked["dir"], asked["tags"]) == ("mopo", "mine", "r", [])
        assert asked["settings"]["console"] == "off"

    def test_no_default_is_put_over_them(self, monkeypatch: pytest.MonkeyPatch):
        variables = {"PROJECT": "theirs", "NAME": "n", "DIR": "d", "TAGS": "a,b", "JOB_TYPE": "j", "CONSOLE": "wrap"}
        for key, value in variables.items():
            monkeypatch.setenv(f"WANDB_{key}", value)
        asked = self.asked(monkeypatch)
        found = [asked[key] for key in ("project", "name", "dir", "tags", "job_type")]
        assert found == ["theirs", "n", "d", ["a", "b"], "j"]
        assert "console" not in asked["settings"]
        assert self.asked(monkeypatch, project="ours")["project"] == "ours"  # what the config says comes first


class TestLines:
    def tracker(self, path: Path, active: bool = True) -> Tracker:
        return Tracker(RunDirectory(path), LoggerConfig(), {}, "name", active=active)

    def test_the_last_line_takes_what_was_measured_after_it(self, tmp_path: Path):
        tracker = self.tracker(tmp_path)
        tracker.amend(kl=0.1)  # before any line there is nothing to amend
        tracker.log(5, loss=1.0, **{"win_rate/a": 0.5})
        tracker.log(10, loss=0.9, **{"win_rate/a": 0.55})
        tracker.amend(kl=0.2, **{"win_rate/a": 0.538})
        tracker.finish()
        assert read_metrics(tmp_path) == [
            {"step": 5, "loss": 1.0, "win_rate/a": 0.5},
            {"step": 10, "loss": 0.9, "win_rate/a": 0.538, "kl": 0.2},
        ]

    def test_each_step_is_there_at_once_and_in_strict_json(self, tmp_path: Path):
        tracker = self.tracker(tmp_path)
        tracker.log(5, loss=math.nan, **{"dual/harmless": 0.5, "chi/harmless": math.inf})
        assert read_metrics(tmp_path) == [{"step": 5, "loss": None, "dual/harmless": 0.5, "chi/harmless": None}]
        tracker.finish()

    def test_going_back_forgets_what_came_after(self, tmp_path: Path):
        first = self.tracker(tmp_path)
        for step in (5, 10, 15):
            first.log(step, loss=float(step))
        first.finish()
        second = self.tracker(tmp_path)
        second.rewind(10)
        assert [line["step"] for line in second.history] == [5, 10]
        second.log(15, loss=0.5)
        assert second.finish() is None
        assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(5, 5.0), (10, 10.0), (15, 0.5)]

    def test_a_process_that_does_not_write(self, tmp_path: Path):
        tracker = self.tracker(tmp_path, active=False)
        tracker.rewind(0)
        tracker.log(5, loss=1.0)
        tracker.table("samples", ["prompt"], [["x"]])
        tracker.alert("careful")
        tracker.figures([])
        tracker.summarise({"kl": 1.0})
        assert tracker.history == [{"step": 5, "loss": 1.0}]
        assert tracker.finish() is None
        assert list(tmp_path.iterdir()) == []

    def test_names_and_values_for_wandb(self):
        assert dict(flat({"a": {"b": 1, "c": {"d": [2]}}, "e": None}, "/")) == {"a/b": 1, "a/c/d": [2], "e": None}
        assert printable({"t0": math.inf, "a": {"b": 0.5, "c": None}}) == {"t0": "inf", "a": {"b": 0.5, "c": None}}


# --------------------------------------------------------------------------------------------- reading W&B's files


def records(path: Path) -> Iterator[Any]:
    """The protobuf records of a .wandb file, which is a LevelDB log behind a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2 as proto

    content, position, parts = path.read_bytes(), 7, b""
    assert content.startswith(b":W&B")
    while position < len(content):
        left = 32768 - position % 32768
        if left < 7:  # the rest of a block that no header fits into
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last of several parts
            yield proto.Record.FromString(parts)  # type: ignore[attr-defined]
            parts = b""


class Offline:
    """What one offline run of W&B holds."""

    def __init__(self, directory: Path):
        self.directory = directory
        (path,) = directory.glob("*.wandb")
        found = list(records(path))
        by_kind = {
            kind: [r for r in found if r.WhichOneof("record_type") == kind] for kind in ("run", "history", "alert")
        }
        (record,) = by_kind["run"]
        self.run = record.run
        self.config = {item.key: json.loads(item.value_json) for item in self.run.config.update}
        self.history = [_values(r.history.item) for r in by_kind["history"]]
        self.alerts = [(r.alert.title, r.alert.text, r.alert.level) for r in by_kind["alert"]]
        self.summary: dict[str, Any] = {}
        for r in found:
            if r.WhichOneof("record_type") == "summary":
                self.summary |= _values(r.summary.update)

    def lines(self) -> list[dict[str, Any]]:
        """Its history as metrics.jsonl has it: without W&B's own numbers, tables and pictures."""
        own = ("_", "samples", "figures/")
        rows = [{key: value for key, value in row.items() if not key.startswith(own)} for row in self.history]
        return [row for row in rows if "step" in row]


def _values(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def newest_offline(run: Path) -> Offline:
    return Offline(max((run / "wandb").glob("offline-run-*")))  # their names begin with the time


def without_nulls(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if value is not None}


@pytest.mark.slow
class TestWandb:
    def test_offline_without_a_key_holds_everything(self, tmp_path: Path, smoke: Path):
        extra = ("logger.project=trial", "logger.group=first", "logger.tags=[a,b]", "run.name=named")
        done = mopo("train", *WANDB, *extra, "run.dir=run", cwd=tmp_path)
        assert done.status == 0, done.err
        run = tmp_path / "run"
        offline = newest_offline(run)
        assert results(run) == results(smoke)  # tracking changes nothing
        assert f"upload to Weights & Biases: wandb sync {Path('run') / 'wandb' / offline.directory.name}\n" in done.out
        assert "wandb:" not in done.out + done.err

        assert (offline.run.project, offline.run.run_group, offline.run.display_name) == ("trial", "first", "named")
        assert list(offline.run.tags) == ["a", "b"]
        assert (offline.config["tau"], offline.config["t0"]) == (0.08, "inf")
        assert offline.config["objectives"]["harmless"]["threshold"] == 0.55
        assert offline.config["dataset"]["labels"].startswith("one 0/1 label a pair and objective")

        logged = read_metrics(run)
        assert offline.lines() == [without_nulls(line) for line in logged]
        for key in ("win_rate/helpful", "threshold/concise", "dual/harmless", "chi/harmless", "epsilon", "n_eff", "kl"):
            assert key in offline.lines()[-1]
        assert [row["_step"] for row in offline.history if "loss" in row] == [line["step"] for line in logged]

        self.check_results(offline, run)

    def check_results(self, offline: Offline, run: Path) -> None:
        summary = read_json(run / "summary.json")
        assert offline.summary["objectives/harmless/win_rate"] == summary["objectives"]["harmless"]["win_rate"]
        assert offline.summary["oracle/win_rate/helpful"] == summary["oracle"]["win_rate"]["helpful"]
        assert offline.summary["duals/harmless"] == summary["duals"]["harmless"]
        assert offline.summary["state"] == "done"
        signs = [text for text in summary["warnings"] if not text.startswith("note")]
        assert [text for _, text, _ in offline.alerts][-len(signs) :] == signs
        assert len({title for title, _, _ in offline.alerts}) == len(offline.alerts)
        assert {level for _, _, level in offline.alerts} == {"WARN"}

        media = offline.directory / "files" / "media"
        (table,) = (media / "table").iterdir()
        content = read_json(table)
        assert content["columns"] == ["prompt", "response", "helpful", "harmless", "concise"]
        assert len(content["data"]) == 64
        pictures = {
            path.name.rpartition("_")[0].rpartition("_")[0] for path in (media / "images" / "figures").iterdir()
        }
        assert pictures == {"training", "win_rates"}

    @pytest.mark.thorough
    def test_a_host_that_does_not_answer_is_followed_by_offline_and_resumes(self, tmp_path: Path, smoke: Path):
        lost = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "2"}
        arguments = ("train", *WANDB, "run.dir=run", "run.name=named")
        run = tmp_path / "run"
        killed = stop_when(lambda: any(run.glob("checkpoints/step-*")), SIGKILL, *arguments, cwd=tmp_path, **lost)
        assert killed.status == -SIGKILL
        done = mopo(*arguments, "run.resume=true", cwd=tmp_path, **lost)
        assert done.status == 0, done.err
        assert "warning: W&B: " in done.err
        assert "; logging offline\n" in done.err
        assert "upload to Weights & Biases: wandb sync " in done.out
        assert results(run) == results(smoke)
        resumed = newest_offline(run)
        assert list(resumed.run.tags) == ["resumed"]
        assert resumed.run.display_name == "named"
        assert resumed.lines() == [without_nulls(line) for line in read_metrics(run)]  # the steps before as well

    def test_disabled(self, run_here: Run, here: Path):
        assert run_here("train", *WANDB, "logger.mode=disabled", "run.dir=run", "steps=5").status == 0
        assert not (here / "run" / "wandb").exists()
        assert "wandb" not in os.listdir(here)

    def test_a_sweep_is_a_group_with_a_summary(self, run_here: Run, here: Path):
        """Two runs at once, offline: each has a directory and an id of its own."""
        small = ("steps=4", "onpolicy.every=2", "sft.steps=2", "preference_model.steps=2", "evaluation.prompts=8")
        points = ("seed=0,1", "logger.tags=[mine]", "logger.project=trial")
        done = run_here("sweep", *WANDB, *small, *points, "sweep.dir=s", "launcher=parallel", "launcher.jobs=2")
        assert done.status == 0, done.err
        runs = [newest_offline(here / "s" / "runs" / f"seed={seed}") for seed in (0, 1)]
        for seed, offline in enumerate(runs):
            assert (offline.run.project, offline.run.run_group, offline.run.job_type) == ("trial", "s", "train")
            assert offline.run.display_name == f"seed={seed}"
            assert list(offline.run.tags) == ["mine", f"seed={seed}"]
            assert offline.config["seed"] == seed
            assert offline.config["sweep"] == {"name": "s", "point": f"seed={seed}", "overrides": {"seed": str(seed)}}
        summary = newest_offline(here / "s")
        assert (summary.run.project, summary.run.run_group, summary.run.job_type) == ("trial", "s", "sweep")
        assert summary.run.display_name == "s: summary"
        assert len({offline.run.run_id for offline in (*runs, summary)}) == 3
        told = read_json(here / "s" / "sweep.json")
        assert summary.summary["front"] == told["front"]
        assert sum(summary.summary[f"runs/{state}"] for state in ("done", "infeasible")) == 2
        tables = {path.name.split("_")[0]: read_json(path) for path in summary.directory.rglob("*.table.json")}
        assert set(tables) == {"results", "front"}
        assert [row[0] for row in tables["results"]["data"]] == ["seed=0", "seed=1"]
        assert tables["results"]["columns"][:3] == ["id", "seed", "state"]
        assert "upload to Weights & Biases: wandb sync s/runs/*/wandb/offline-run-* s/wandb/offline-run-*\n" in done.out
