"""`mopo sweep`: the grid, its ids, and what becomes of points that fail, are wrong, or break off."""

from __future__ import annotations

import csv
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from signal import SIGINT
from typing import Any

import pytest
from omegaconf import OmegaConf
from running import TINY, Finished, read_json, results, stop_when

from mopo_cli.config import compose
from mopo_cli.errors import UserError
from mopo_cli.sweep import compose_point, expand, point_id, preset_grid

Run = Callable[..., Finished]


def varying(*overrides: str) -> list[dict[str, str]]:
    return [point.varying for point in expand(overrides)]


def grid_of(*overrides: str) -> list[dict[str, str]]:
    composed = compose("sweep", list(overrides))
    return [point.varying for point in expand([*overrides, *preset_grid(composed, overrides)])]


class TestPresets:
    def test_the_grid_of_a_preset(self):
        points = grid_of("experiment=tau_beta")
        assert len(points) == 12
        assert points[0] == {"tau": "0.1", "beta": "0.95"}
        assert grid_of("experiment=lag_vs_static") == [{"t0": "100"}, {"t0": "inf"}]

    def test_the_command_line_has_the_last_word(self):
        assert grid_of("experiment=tau_beta", "tau=0.3") == [
            {"beta": beta} for beta in ("0.95", "0.99", "0.999", "0.9999")
        ]

    def test_its_points_train_under_its_settings(self, tmp_path: Path):
        point = expand(["experiment=lag_vs_static", "t0=100"])[0]
        composed = compose_point(point, tmp_path, None).composed
        assert composed.t0 == 100
        assert composed.objectives.harmless.threshold is None
        assert list(composed.objectives) == ["helpful", "harmless"]


class TestGrid:
    def test_the_product_in_order_with_what_is_fixed(self):
        points = expand(["steps=9", "tau=0.1,0.5", "beta=0.9,0.99"])
        assert [point.overrides[1:] for point in points] == [
            ("tau=0.1", "beta=0.9"),
            ("tau=0.1", "beta=0.99"),
            ("tau=0.5", "beta=0.9"),
            ("tau=0.5", "beta=0.99"),
        ]
        assert {point.overrides[0] for point in points} == {"steps=9"}
        assert [point.id for point in points][:2] == ["tau=0.1,beta=0.9", "tau=0.1,beta=0.99"]

    def test_no_grid_is_one_point(self):
        (point,) = expand(["tau=0.1"])
        assert (point.id, point.varying) == ("default", {})

    @pytest.mark.parametrize(
        ("override", "values"),
        [
            ("seed=range(1,4)", ["1", "2", "3"]),
            ("tau=choice(0.1,0.5)", ["0.1", "0.5"]),
            ("t0=1,100,inf", ["1", "100", "inf"]),
            ("epsilon=auto,0.15", ["auto", "0.15"]),
            ("objectives=assistant,assistant_pair", ["assistant", "assistant_pair"]),
        ],
    )
    def test_hydras_grammar(self, override: str, values: list[str]):
        key = override.partition("=")[0]
        assert varying(override) == [{key: value} for value in values]

    def test_a_list_is_one_value(self):
        (point,) = expand(["logger.tags=[a,b]"])
        assert point.overrides == ("logger.tags=[a,b]",)

    @pytest.mark.parametrize("value", ["a b", "it's", "a,b", "/data/x=1.jsonl", "dir/[x]", "$HOME", "back\\slash"])
    def test_values_that_need_quotes_arrive_as_they_are(self, value: str, tmp_path: Path):
        quoted = "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'" if value != "back\\slash" else f"'{value}'"
        points = expand([f"model.chat_template={quoted},other"])
        trial = compose_point(points[0], tmp_path / "it's a sweep", None)
        assert trial.composed.model.chat_template == value
        assert re.fullmatch(r"[\w.,=+-]+", points[0].id)
        assert trial.composed.run.dir == str(tmp_path / "it's a sweep" / "runs" / points[0].id)
        assert trial.composed.logger.group == "it's a sweep"

    def test_a_users_own_group_of_runs(self, tmp_path: Path):
        (point,) = expand(["logger.group=mine"])
        assert compose_point(point, tmp_path, None).composed.logger.group == "mine"

    def test_ids_tell_apart_what_a_file_name_cannot(self):
        first, second = point_id(["dataset.path=a/b"]), point_id(["dataset.path=a_b"])
        assert second == "dataset.path=a_b"
        assert re.fullmatch(r"dataset\.path=a_b-[0-9a-f]{12}", first)

    def test_long_ids_are_cut_and_stay_different(self):
        ids = {point_id([f"model.path={'x' * 200}{i}"]) for i in range(3)}
        assert len(ids) == 3
        assert all(len(name) <= 100 for name in ids)

    @pytest.mark.parametrize("override", ["tau=0.1,0.1", "tau=0.5,0.50", "seed=choice(1,1)"])
    def test_the_same_point_twice(self, override: str):
        with pytest.raises(UserError, match="the sweep has the same point twice: "):
            expand([override])

    @pytest.mark.parametrize(
        ("override", "told"),
        [
            ("tau", "cannot read the override 'tau'"),
            ("tau=[1", "cannot read the override 'tau=[1'"),
            ("model=glob(*)", "cannot sweep over 'model=glob(*)'"),
            ("seed=range(3,3)", "cannot sweep over 'seed=range(3,3)': it stands for no value"),
        ],
    )
    def test_what_is_no_grid(self, override: str, told: str):
        with pytest.raises(UserError) as caught:
            expand([override])
        assert str(caught.value).startswith(told)


class TestRefused:
    @pytest.mark.parametrize(
        ("overrides", "told"),
        [
            (["tau=0.1,-1"], "tau=-1.0: must be a number above 0"),
            (["tau=0.1,0.1"], "the sweep has the same point twice: tau=0.1"),
            (["tua=0.1,0.2"], "tua: no such key (did you mean tau?)"),
            (["algorithm.extraction=regression,foo"], "algorithm.extraction=foo: must be regression or bc"),
            (["objectives=assistant,assistant_par"], "objectives=assistant_par: no such option"),
            (["tau=0.1,0.2", "run.dir=here"], "run.dir=here: each point of a sweep has a directory of its own"),
            (["tau=0.1,0.2", "sweep.resume=true"], "sweep.resume=true, but sweep.dir=outputs/sweep/s holds no sweep"),
            (["tau=0.1,0.2", "sweep.resume=perhaps"], "resume"),
            (["logger=wandb", "logger.mode=auto,foo"], "logger.mode=foo: must be auto, online"),
        ],
    )
    def test_before_any_point_starts(self, run_here: Run, here: Path, overrides: list[str], told: str):
        done = run_here("sweep", "-m", *TINY, "sweep.name=s", *overrides)
        assert done.status == 2, done.out
        assert told in done.err
        assert done.err.count("\n") == 1
        assert list(here.iterdir()) == []

    def test_a_used_directory(self, run_here: Run, here: Path):
        (here / "s").mkdir()
        (here / "s" / "notes").touch()
        done = run_here("sweep", "-m", *TINY, "tau=0.1,0.2", "sweep.dir=s")
        assert (done.status, done.out) == (2, "")
        assert "sweep.dir=s: already in use; choose another sweep.dir or sweep.name" in done.err

    def test_several_processes(self, run_here: Run, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        done = run_here("sweep", "-m", *TINY, "tau=0.1,0.2")
        assert done.status == 2
        assert "runs its points in one process" in done.err


def row(number: int) -> dict[str, Any]:
    scores = {"helpful": [number % 2, 0.5], "harmless": [1, number % 3]}
    return {"prompt": f"Question {number}?", "responses": ["Yes.", "No."], "scores": scores}


def table(directory: Path) -> list[dict[str, Any]]:
    with (directory / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
class TestRunning:
    def test_two_points(self, run_here: Run, here: Path, smoke: Path):
        done = run_here("sweep", "-m", *TINY, "seed=0,1", "sweep.name=s")
        assert done.status == 0, done.err
        directory = here / "outputs" / "sweep" / "s"
        assert results(directory / "runs" / "seed=0") == results(smoke)  # a point is a run like any other
        rows, records = table(directory), read_json(directory / "sweep.json")["runs"]
        assert [row["id"] for row in rows] == [record["id"] for record in records] == ["seed=0", "seed=1"]
        for row, record in zip(rows, records, strict=True):
            summary = read_json(directory / "runs" / record["id"] / "summary.json")
            assert record["overrides"] == {"seed": row["seed"]}
            assert record["state"] == row["state"] == "done"
            for name in ("helpful", "harmless", "concise"):
                assert float(row[f"win_rate/{name}"]) == summary["objectives"][name]["win_rate"]
                assert record[f"exact/{name}"] == summary["oracle"]["win_rate"][name]
            assert float(row["dual/harmless"]) == summary["duals"]["harmless"]
            assert row["satisfied/harmless"] in ("True", "False")
        assert OmegaConf.load(directory / "runs" / "seed=1" / "config.yaml").logger.group == "s"

    def test_a_point_that_fails_leaves_the_others_and_can_be_repaired(self, run_here: Run, here: Path):
        rows = "".join(json.dumps(row(i)) + "\n" for i in range(40))
        (here / "there.jsonl").write_text(rows)
        data = ("dataset=pairs", "objectives=helpful_harmless", "dataset.max_rows=null")
        sweep = ("sweep", "-m", *TINY, *data, "dataset.path=gone.jsonl,there.jsonl", "sweep.dir=s")
        done = run_here(*sweep)
        assert done.status == 1, done.err
        failed, ended = read_json(here / "s" / "sweep.json")["runs"]
        assert (failed["state"], ended["state"]) == ("failed", "done")
        assert failed["error"].startswith("UserError: gone.jsonl: no such file or directory")
        assert read_json(here / "s" / "runs" / failed["id"] / "status.json")["error"] == failed["error"]
        assert [line["state"] for line in table(here / "s")] == ["failed", "done"]
        assert f"failed         {failed['id']}" in done.out
        assert "Traceback" not in done.out + done.err

        (here / "gone.jsonl").write_text(rows)
        assert run_here(*sweep, "sweep.resume=true").status == 0
        assert [line["state"] for line in table(here / "s")] == ["done", "done"]

    def test_one_that_broke_off_goes_on(self, run_here: Run, here: Path, smoke: Path):
        directory = here / "outputs" / "sweep" / "s"
        second = directory / "runs" / "seed=0"
        arguments = ("sweep", "-m", *TINY, "seed=1,0", "sweep.name=s")
        stopped = stop_when(lambda: any(second.glob("checkpoints/step-*")), SIGINT, *arguments, cwd=here)
        assert stopped.status == 130
        assert read_json(second / "status.json")["state"] == "interrupted"
        line = re.search(r"^interrupted; go on with: mopo (sweep .* sweep\.resume=true)$", stopped.out, re.MULTILINE)
        assert line, stopped.out
        first = (directory / "runs" / "seed=1" / "summary.json").read_bytes()
        done = run_here(*shlex.split(line.group(1)))
        assert done.status == 0, done.err
        assert "done already" in done.out
        assert (directory / "runs" / "seed=1" / "summary.json").read_bytes() == first
        assert results(second) == results(smoke)
        assert [row["state"] for row in table(directory)] == ["done", "done"]
