"""`mopo sweep`: the grid, its ids, and what becomes of points that fail, are killed, are wrong, or break off."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import threading
import time
from collections.abc import Callable
from pathlib import Path
from signal import SIGINT, SIGKILL
from typing import Any

import pytest
from omegaconf import OmegaConf
from run_directories import write_run
from running import TIMEOUT, TINY, Finished, owner, read_json, results, start, stop_when, wait_for

from mopo_cli.base.errors import UserError
from mopo_cli.config.compose import compose, typed
from mopo_cli.config.schema import TrainConfig
from mopo_cli.runs.directory import RunDirectory, open_run
from mopo_cli.runs.record import RunFiles, RunRecord, read_run
from mopo_cli.sweeps.board import Board, Line, short_names, show_results
from mopo_cli.sweeps.eta import expected
from mopo_cli.sweeps.points import (
    check_different,
    compose_point,
    expand,
    first_choice,
    identity,
    parse,
    point_id,
    preset_grids,
    settings_of,
    union,
)
from mopo_cli.sweeps.results import as_json, best, ended_runs, front, numbers, with_every_key
from mopo_cli.sweeps.search import Optuna

Run = Callable[..., Finished]


def varying(*overrides: str) -> list[dict[str, str]]:
    return [point.varying for point in expand(overrides)]


def grid_of(*overrides: str) -> list[dict[str, str]]:
    composed = compose("sweep", [first_choice(o) for o in parse(overrides) if o.get_key_element() == "experiment"])
    return [point.varying for point in union(preset_grids(composed, overrides))]


def grids_of(grid: Any, *asked: str) -> list[list[str]]:
    return preset_grids(OmegaConf.create({"sweep": {"grid": grid}}), asked)


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

    def test_baselines_have_as_many_trade_offs_and_seeds_of_every_method(self):
        for name, runs in (("baselines", 5 * 3), ("baselines_qa", 3 * 3)):
            points = grid_of(f"experiment={name}")
            methods = [point["algorithm"] for point in points]
            everything = {"sft", "dpo", "ipo", "modpo", "soups", "mapl", "dpa", "ric", "mopo", "mopo_conditioned"}
            assert set(methods) == everything
            assert {methods.count(method) for method in methods} == {runs}
            assert {point["seed"] for point in points} == {"0", "1", "2"}

    @pytest.mark.parametrize("name", ["baselines", "baselines_qa"])
    def test_every_method_of_the_baselines_starts(self, name: str, tmp_path: Path):
        from mopo_cli.pipeline import train

        data = ["dataset.path=x.json"] if name == "baselines_qa" else []
        composed = compose("sweep", [f"experiment={name}"])
        budgets = set()
        for point in union(preset_grids(composed, [f"experiment={name}", "seed=0", *data])):
            config = typed(compose_point(point, tmp_path, None).composed, TrainConfig)
            train.check(config)
            budgets.add((config.steps, config.batch_size, config.gradient_accumulation))
        assert len(budgets) == 1

    def test_its_points_train_under_its_settings(self, tmp_path: Path):
        point = expand(["experiment=lag_vs_static", "t0=100"])[0]
        composed = compose_point(point, tmp_path, None).composed
        assert composed.t0 == 100
        assert composed.objectives.harmless.threshold is None
        assert list(composed.objectives) == ["helpful", "harmless"]


WEIGHTS = [{"helpful": 0.7, "harmless": 0.3}, {"helpful": 0.5, "harmless": 0.5}]
METHODS = [
    {"algorithm": ["dpo", "ipo"], "algorithm.weights": WEIGHTS, "seed": [0, 1]},
    {"algorithm": ["mopo"], "objectives.harmless.threshold": [0.5, None], "seed": [0, 1]},
]


class TestListOfGrids:
    def test_each_is_a_product_and_together_they_are_a_union(self):
        points = union(grids_of(METHODS, "steps=9"))
        assert len(points) == 8 + 4
        assert points[0].id == "algorithm=dpo,algorithm.weights=helpful=0.7+harmless=0.3,seed=0"
        assert points[0].overrides == (
            "steps=9", "algorithm=dpo", "algorithm.weights={helpful:0.7,harmless:0.3}", "seed=0",
        )  # fmt: skip
        assert points[-1].varying == {"algorithm": "mopo", "objectives.harmless.threshold": "null", "seed": "1"}

    def test_a_mapping_arrives_as_one(self, tmp_path: Path):
        point = union(grids_of(METHODS, "objectives=assistant_pair"))[0]
        composed = compose_point(point, tmp_path, None).composed
        assert composed.algorithm.weights == {"helpful": 0.7, "harmless": 0.3}
        assert composed.run.dir == str(tmp_path / "runs" / point.id)

    @pytest.mark.parametrize("value", ["{a:1,b:[1,2]}", "{a:{b:1}}", "{a: 'x y'}", "{}"])
    def test_a_mapping_that_no_file_name_can_hold_gets_a_hash(self, value: str):
        assert re.fullmatch(r"k=[\w.,=+-]+-[0-9a-f]{12}", point_id([f"k={value}"]))

    @pytest.mark.parametrize(
        ("asked", "found"),
        [
            (["algorithm=mopo"], {"mopo": 4}),
            (["algorithm=dpo,mopo", "seed=1"], {"dpo": 2, "mopo": 2}),
            (["seed=5"], {"dpo": 2, "ipo": 2, "mopo": 2}),
            (["seed=0,5"], {"dpo": 4, "ipo": 4, "mopo": 4}),
            (["objectives.harmless.threshold=0.6,0.7,0.8"], {"dpo": 4, "ipo": 4, "mopo": 6}),
            (["algorithm.weights={helpful:1,harmless:0}"], {"dpo": 2, "ipo": 2, "mopo": 4}),
            (["objectives.harmless.threshold=0.50"], {"dpo": 4, "ipo": 4, "mopo": 2}),
            (["tau=0.1,0.2"], {"dpo": 8, "ipo": 8, "mopo": 8}),
        ],
    )
    def test_the_command_line_has_the_last_word_in_each(self, asked: list[str], found: dict[str, int]):
        points = union(grids_of(METHODS, *asked))
        methods = [next(o.partition("=")[2] for o in p.overrides if o.startswith("algorithm=")) for p in points]
        assert {name: methods.count(name) for name in methods} == found

    def test_what_is_the_same_everywhere_is_in_no_id(self):
        assert union(grids_of(METHODS, "seed=1", "algorithm=mopo"))[0].id == "objectives.harmless.threshold=0.5"
        assert union(grids_of(METHODS, "seed=1"))[-1].id == "algorithm=mopo,objectives.harmless.threshold=null"

    @pytest.mark.parametrize(
        ("grid", "told"),
        [
            ({"tau": 0.1}, "sweep.grid.tau=0.1: must be a list of values"),
            ([{"tau": [0.1]}, {"tau": []}], "sweep.grid[1].tau=[]: must be a list of values"),
            ([{"tau": [0.1]}, [0.2]], "sweep.grid[1]=[0.2]: must be a mapping of keys to lists of values"),
            ("tau", "sweep.grid=tau: must be a mapping of keys to lists of values, or a list of such mappings"),
        ],
    )
    def test_what_is_no_grid(self, grid: Any, told: str):
        with pytest.raises(UserError) as caught:
            grids_of(grid)
        assert str(caught.value).startswith(told)

    def test_the_same_point_twice(self, tmp_path: Path):
        with pytest.raises(UserError, match=r"the sweep has the same point twice: tau=0\.1"):
            union(grids_of([METHODS[1] | {"tau": [0.2]}, {"algorithm": ["mopo"], "tau": [0.1]}, {"algorithm": ["mopo"],
                           "tau": [0.1, 0.3]}]))  # fmt: skip
        points = union(grids_of([{"tau": [0.08]}, {"beta": [0.9995, 0.9]}]))  # the defaults, twice
        trials = [compose_point(point, tmp_path, None) for point in points]
        with pytest.raises(UserError, match=r"the same point twice: tau=0\.08 and beta=0\.9995"):
            check_different(trials)

    def test_optuna_searches_one_space(self):
        with pytest.raises(UserError, match=r"sweeper=optuna searches one space, and this preset has 2 grids"):
            Optuna().open(grids_of(METHODS), [], [])

    def test_records_show_the_keys_of_others_as_their_configs_have_them(self, tmp_path: Path):
        files = [RunFiles(tmp_path / "runs" / name) for name in ("d", "m")]
        records = [
            RunRecord("d", files[0], "done", {"algorithm": "dpo", "algorithm.weights": "{a:1}"}),
            RunRecord("m", files[1], "done", {"seed": "0"}),
        ]
        (tmp_path / "runs" / "m").mkdir(parents=True)
        config = {"algorithm": {"_target_": "mopo_cli.algorithms.mopo.Mopo", "sigma": 0.1}, "seed": 0}
        OmegaConf.save(OmegaConf.create(config), tmp_path / "runs" / "m" / "config.yaml")
        first, second = with_every_key(records)
        assert first.varying == {"algorithm": "dpo", "algorithm.weights": "{a:1}", "seed": ""}
        assert second.varying == {"algorithm": "mopo", "algorithm.weights": "", "seed": "0"}


class TestEta:
    def test_methods_take_each_its_own_time(self, tmp_path: Path):
        settings = {}
        for number, (name, seconds) in enumerate({"dpo": 10.0, "mopo": 40.0, "sft": 0.0}.items()):
            settings[name] = {"algorithm": {"name": name}, "batch_size": 8, "steps": 20}
            if seconds:
                run = tmp_path / "runs" / str(number)
                run.mkdir(parents=True)
                took = {"alignment_seconds": seconds, "wall_seconds": seconds + 1, "steps": 10}
                (run / "summary.json").write_text(json.dumps({"objectives": {}, "algorithm": name, "train": took}))
        seconds = expected(settings, ended_runs(tmp_path))
        assert (seconds["dpo"], seconds["mopo"]) == (21.0, 81.0)
        assert seconds["sft"] == 51.0  # none has run yet: it goes by the others
        assert expected(settings, []) == {}


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


class TestZip:
    def test_values_go_together_and_multiply_the_rest(self):
        points = expand(["tau=0.1,0.5", "seed=0,1,2", "beta=0.9,0.99"], ["tau", "beta"])
        assert [tuple(point.varying.values()) for point in points] == [
            ("0.1", "0", "0.9"),
            ("0.1", "1", "0.9"),
            ("0.1", "2", "0.9"),
            ("0.5", "0", "0.99"),
            ("0.5", "1", "0.99"),
            ("0.5", "2", "0.99"),
        ]

    def test_a_value_may_come_again(self):
        points = expand(["tau=0.1,0.1,0.5", "beta=0.9,0.99,0.9"], ["tau", "beta"])
        assert [point.id for point in points] == ["tau=0.1,beta=0.9", "tau=0.1,beta=0.99", "tau=0.5,beta=0.9"]

    @pytest.mark.parametrize(
        ("overrides", "told"),
        [
            (["tau=0.1,0.5", "beta=0.9"], "sweep.zip=[tau,beta]: beta is not swept; give it several values"),
            (["tau=0.1,0.5"], "sweep.zip=[tau,beta]: beta is not swept"),
            (["tau=0.1,0.5", "beta=0.9,0.95,0.99"], "as many values as the others; found tau 2, beta 3"),
        ],
    )
    def test_what_does_not_fit(self, overrides: list[str], told: str):
        with pytest.raises(UserError) as caught:
            expand(overrides, ["tau", "beta"])
        assert told in str(caught.value)


class TestSamePoint:
    def of(self, tmp_path: Path, *overrides: str) -> str:
        return identity(settings_of(compose_point(expand(overrides)[0], tmp_path, None)))

    def test_however_it_is_written(self, tmp_path: Path):
        assert self.of(tmp_path, "tau=0.5,1") == self.of(tmp_path, "tau=0.50", "logger=none", "beta=0.9995,0.9")
        assert self.of(tmp_path, "tau=1,2") == self.of(tmp_path, "tau=1.0,3")

    @pytest.mark.parametrize(
        "other", ["tau=0.6", "evaluation.prompts=9", "seed=1", "objectives.harmless.threshold=null"]
    )
    def test_other_points(self, tmp_path: Path, other: str):
        assert self.of(tmp_path, "tau=0.5") != self.of(tmp_path, "tau=0.5", other)

    def test_a_point_tells_wandb_and_its_config_where_it_belongs(self, tmp_path: Path):
        point = expand(["tau=0.1,0.5", "logger.tags=[mine]", f"model.chat_template={'x' * 80},y"])[0]
        composed = compose_point(point, tmp_path / "s", None).composed
        assert composed.sweep.overrides.tau == "0.1"
        assert (composed.sweep.name, composed.logger.group) == ("s", "s")
        assert list(composed.logger.tags) == [
            "mine",
            "tau=0.1",
            f"model.chat_template={'x' * 44}",
        ]  # W&B takes 64 characters


def unended(name: str, state: str) -> RunRecord:
    return RunRecord(name, RunFiles(Path("nowhere") / name), state)


def ended(
    name: str,
    helpful: float,
    harmless: float,
    satisfied: bool = True,
    exact: float | None = None,
    heldout: tuple[float, float] | None = None,
) -> RunRecord:
    rates = {"helpful": (helpful, "primary", None), "harmless": (harmless, "secondary", satisfied)}
    objectives = {
        key: {"role": role, "win_rate": rate, "win_rate_ci95": [rate, rate], "satisfied": verdict,
              "threshold": 0.5 if role == "secondary" else None}
        for key, (rate, role, verdict) in rates.items()
    }  # fmt: skip
    oracle = None if exact is None else {"win_rate": {"helpful": exact}}
    summary = {"objectives": objectives, "oracle": oracle, "train": {"wall_seconds": 1.0}, "duals": {}, "kl": 0.3}
    if heldout:
        summary["heldout_win_rate"] = dict(zip(rates, heldout, strict=True))
    return RunRecord(name, RunFiles(Path("nowhere") / name), "done", summary=summary)


class TestBest:
    def test_the_highest_primary_among_those_that_keep_every_threshold(self):
        runs = [
            ended("a", 0.5, 0.6),
            ended("b", 0.6, 0.6),
            ended("c", 0.9, 0.4, satisfied=False),
            unended("d", "failed"),
        ]
        found = best(runs)
        assert found.run is not None
        assert (found.run.id, found.reason, found.heldout) == ("b", None, False)

    def test_held_out_prompts_decide_and_test_prompts_only_tell(self, capsys: pytest.CaptureFixture[str]):
        runs = [
            ended("lucky", 0.9, 0.6, exact=0.9, heldout=(0.55, 0.6)),
            ended("chosen", 0.6, 0.6, exact=0.58, heldout=(0.62, 0.6)),
            ended("unsafe", 0.7, 0.6, exact=0.7, heldout=(0.8, 0.4)),
        ]
        found = best(runs)
        assert found.run is not None
        assert (found.run.id, found.heldout, found.chosen_by()) == ("chosen", True, 0.62)
        show_results(runs)
        told = " ".join(capsys.readouterr().out.split())
        assert "best chosen: helpful 0.620 on held-out prompts, by which it was chosen; 0.580 (exact) on test" in told
        written = as_json("s", runs, "done")["best"]
        assert (written["chosen_by"], written["heldout_win_rate"], written["win_rate"]) == (
            "heldout_win_rate", 0.62, 0.58,
        )  # fmt: skip

    def test_a_best_that_misses_its_threshold_on_test_prompts_says_so(self, capsys: pytest.CaptureFixture[str]):
        show_results([ended("a", 0.6, 0.4, satisfied=False, heldout=(0.6, 0.6))])
        assert "on test prompts, a threshold missed" in " ".join(capsys.readouterr().out.split())

    def test_none_and_why(self):
        assert best([]).reason == "no run has ended"
        missed = ended("a", 0.9, 0.4, satisfied=False)
        assert best([missed]).reason == "none of the 1 runs that ended keeps every threshold"
        missed = ended("a", 0.9, 0.6, heldout=(0.9, 0.4))
        assert best([missed]).reason == "none of the 1 runs that ended keeps every threshold on held-out prompts"

    def test_none_of_different_data(self, tmp_path: Path):
        paths = [write_run(tmp_path / f"{seed}", {"helpful": 0.6, "harmless": 0.5 + seed / 10},
                           settings={"dataset.data_seed": seed}) for seed in (0, 1)]  # fmt: skip
        runs = [read_run(path) for path in paths]
        assert best(runs).reason == "the runs were measured on different data (dataset.data_seed)"
        assert front(runs) == []

    def test_thresholds_out_of_reach_have_no_optimum_in_the_table(self, tmp_path: Path):
        run = read_run(write_run(tmp_path / "r", {"helpful": 0.6, "harmless": 0.5}, {"harmless": 0.9}, exact=True,
                                 attainable={"harmless": 0.8}))  # fmt: skip
        row = numbers(run)
        assert (row["optimum/helpful"], row["gap"], row["attainable/harmless"]) == (None, None, 0.8)
        assert row["exact/helpful"] == 0.6

    def test_the_front(self):
        runs = [ended("a", 0.5, 0.6), ended("b", 0.6, 0.5), ended("c", 0.5, 0.5), unended("d", "failed")]
        assert [record.id for record in front(runs)] == ["a", "b"]


class TestBoard:
    def board(self, tmp_path: Path, states: list[str]) -> Board:
        board = Board("s", len(states), slots=2)
        for number, state in enumerate(states):
            board.lines[str(number)] = Line(unended(str(number), state))
        return board

    def test_eta_shares_what_is_left_among_the_slots(self, tmp_path: Path):
        board = self.board(tmp_path, ["done", "waiting", "waiting", "waiting", "waiting"])
        assert board.eta() is None
        board.took = [10.0, 20.0]
        assert board.eta() == 30.0
        assert self.board(tmp_path, ["done"]).each() is None

    def test_what_runs_or_failed_is_shown_when_there_is_no_room_for_all(self, tmp_path: Path):
        board = self.board(tmp_path, ["done"] * 10 + ["failed", "running"] + ["waiting"] * 30)
        shown = [line.record.state for line in board._fitting(6)]
        assert len(shown) == 5
        assert shown.count("running") == shown.count("failed") == 1

    def test_short_names(self):
        assert short_names(["tau", "objectives.harmless.threshold"]) == ["tau", "threshold"]
        assert short_names(["a.steps", "b.steps", "tau"]) == ["a.steps", "b.steps", "tau"]


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
            (["tau=0.1,0.2", "sweep.retry=perhaps"], "sweep.retry=perhaps: must be failed, none or all"),
            (["tau=0.1,0.2", "sweep.resume=true"], "sweep.resume: no such key"),
            (["tau=interval(0.1,1)"], "cannot sweep over 'tau=interval(0.1,1)': an interval needs sweeper=optuna"),
            (["tau=0.1,0.2", "debug.fail_at_step=0"], "debug.fail_at_step=0: must be 1 or more, or null"),
            (["tau=0.1,0.2", "launcher=parallel", "launcher.jobs=0"], "launcher.jobs=0: must be 1 or more"),
            (["tau=0.1,0.2", "launcher=parallel", "launcher.jobs=few"], "launcher.jobs: "),
            (["tau=0.1,0.2", "launcher=paralel"], "launcher=paralel: no such option (did you mean parallel?)"),
            (["tau=0.1,0.2", "launcher.jobs=2"], "launcher.jobs: no such key"),
            (["logger=wandb", "logger.mode=auto,foo"], "logger.mode=foo: must be auto, online"),
        ],
    )
    def test_before_any_point_starts(self, run_here: Run, here: Path, overrides: list[str], told: str):
        done = run_here("sweep", "-m", *TINY, "sweep.name=s", *overrides)
        assert done.status == 2, done.out
        assert told in done.err
        assert done.err.count("\n") == 1
        assert list(here.iterdir()) == []

    def test_a_directory_with_other_things(self, run_here: Run, here: Path):
        (here / "s").mkdir()
        (here / "s" / "notes").touch()
        done = run_here("sweep", *TINY, "tau=0.1,0.2", "sweep.dir=s")
        assert (done.status, done.out) == (2, "")
        assert "sweep.dir=s: already in use, and not by a sweep; choose another" in done.err
        assert run_here("sweep", *TINY, "tau=0.1,0.2", "sweep.dir=s/notes").status == 2

    def test_a_list_of_runs_that_is_none(self, run_here: Run, here: Path):
        (here / "s").mkdir()
        (here / "s" / "sweep.json").write_text("[]")
        assert "is not the list of a sweep's runs" in run_here("sweep", *TINY, "tau=0.1,0.2", "sweep.dir=s").err

    def test_several_processes(self, run_here: Run, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        done = run_here("sweep", "-m", *TINY, "tau=0.1,0.2")
        assert done.status == 2
        assert "launch `mopo train` for several on one run" in done.err


def row(number: int) -> dict[str, Any]:
    scores = {"helpful": [number % 2, 0.5], "harmless": [1, number % 3]}
    return {"prompt": f"Question {number}?", "responses": ["Yes.", "No."], "scores": scores}


def table(directory: Path) -> list[dict[str, Any]]:
    with (directory / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def deterministic(directory: Path) -> str:
    return (directory / "results.csv").read_text()


FAST = (*TINY, "steps=4", "checkpoint_every=1", "onpolicy.every=2", "onpolicy.prompts=8", "onpolicy.train_prompts=8",
        "sft.steps=2", "preference_model.steps=2", "preference_model.evaluate_every=1", "dataset.max_rows=120",
        "evaluation.prompts=8", "evaluation.exact_prompts=4")  # fmt: skip


@pytest.mark.slow
class TestRunning:
    def test_two_points(self, run_here: Run, here: Path, smoke: Path):
        done = run_here("sweep", "-m", *TINY, "seed=0,1", "sweep.name=s")
        assert done.status == 0, done.err
        directory = here / "outputs" / "sweep" / "s"
        assert results(directory / "runs" / "seed=0") == results(smoke)  # a point is a run like any other
        rows, told = table(directory), read_json(directory / "sweep.json")
        assert [row["id"] for row in rows] == [record["id"] for record in told["runs"]] == ["seed=0", "seed=1"]
        for row, record in zip(rows, told["runs"], strict=True):
            summary = read_json(directory / "runs" / record["id"] / "summary.json")
            assert record["overrides"] == {"seed": row["seed"]}
            assert record["state"] == row["state"] == "done"
            assert record["seconds"] == summary["train"]["wall_seconds"]
            assert "seconds" not in row
            for name in ("helpful", "harmless", "concise"):
                assert float(row[f"win_rate/{name}"]) == summary["objectives"][name]["win_rate"]
                assert record[f"exact/{name}"] == summary["oracle"]["win_rate"][name]
            assert float(row["dual/harmless"]) == summary["duals"]["harmless"]
            assert row["satisfied/harmless"] in ("True", "False")
        assert told["state"] == "done"
        assert (told["best"] is None) == isinstance(told["no_best"], str)
        assert OmegaConf.load(directory / "runs" / "seed=1" / "config.yaml").logger.group == "s"

        csv_before, first = deterministic(directory), (directory / "runs" / "seed=0" / "summary.json").read_bytes()
        again = run_here(
            "sweep", *TINY, "beta=0.9995", "seed=0,1", "tau=0.08,0.09", "sweep.name=s", "sweep.dry_run=true"
        )
        assert re.findall(r"^(seed=\S+) +(\S+) +(\S+)", again.out, re.MULTILINE) == [
            ("seed=0", "done", "stays"),  # with the default tau it is the point of before
            ("seed=0,tau=0.09", "–", "starts"),
            ("seed=1", "done", "stays"),
            ("seed=1,tau=0.09", "–", "starts"),
        ]
        assert "going by" in again.out
        assert run_here("sweep", *TINY, "seed=0,1", "sweep.name=s").out.count("done already") == 2
        assert (directory / "runs" / "seed=0" / "summary.json").read_bytes() == first
        assert deterministic(directory) == csv_before
        other = run_here("sweep", *TINY, "seed=0,1", "sweep.name=s", "batch_size=4")
        assert other.status == 2
        assert "was started with 8" in other.err

    def test_a_point_that_fails_leaves_the_others(self, run_here: Run, here: Path):
        fails = ",".join(["null", "3", "null", "null"])
        points = ("seed=range(0,4)", f"debug.fail_at_step={fails}", "sweep.zip=[seed,debug.fail_at_step]")
        done = run_here("sweep", *FAST, *points, "sweep.name=s", "launcher=parallel", "launcher.jobs=2")
        assert done.status == 1, done.err
        directory = here / "outputs" / "sweep" / "s"
        told = read_json(directory / "sweep.json")
        states = [record["state"] for record in told["runs"]]
        assert (states.count("failed"), len([s for s in states if s in ("done", "infeasible")])) == (1, 3)
        failed = told["runs"][1]
        assert failed["error"] == "RuntimeError: debug.fail_at_step=3: this run was asked to fail here"
        assert read_json(directory / "runs" / failed["id"] / "status.json")["error"] == failed["error"]
        assert "Traceback" in (directory / "runs" / failed["id"] / "log.txt").read_text()
        assert "Traceback" not in done.out + done.err
        assert len(table(directory)) == 4
        assert f"failed         {failed['id']}: RuntimeError" in done.out

        kept = run_here("sweep", *FAST, *points, "sweep.name=s", "sweep.retry=none")
        assert kept.status == 1
        assert "started" not in kept.out
        again = run_here("sweep", *FAST, "seed=1", "sweep.name=s")  # it is the same run without what made it fail
        assert again.status == 0, again.err
        assert [record["state"] for record in read_json(directory / "sweep.json")["runs"]].count("failed") == 0

    def test_data_that_are_missing_can_be_given_later(self, run_here: Run, here: Path):
        rows = "".join(json.dumps(row(i)) + "\n" for i in range(40))
        (here / "there.jsonl").write_text(rows)
        data = ("dataset=pairs", "objectives=helpful_harmless", "dataset.max_rows=null")
        sweep = ("sweep", *FAST, *data, "dataset.path=gone.jsonl,there.jsonl", "sweep.dir=s")
        done = run_here(*sweep)
        assert done.status == 1, done.err
        failed = read_json(here / "s" / "sweep.json")["runs"][0]
        assert failed["state"] == "failed"
        assert failed["error"].startswith("UserError: gone.jsonl: no such file or directory")
        (here / "gone.jsonl").write_text(rows)
        assert run_here(*sweep).status == 0
        assert {line["state"] for line in table(here / "s")} <= {"done", "infeasible"}

    @pytest.mark.thorough
    def test_killed_at_three_moments_it_ends_as_if_undisturbed(self, run_here: Run, here: Path):
        points = ("seed=0,1,2", "steps=8")
        assert run_here("sweep", *FAST, *points, "sweep.name=whole").status == 0
        whole = here / "outputs" / "sweep" / "whole"
        arguments = ("sweep", *FAST, *points, "sweep.dir=s")
        moments = [
            lambda: (here / "s" / "runs" / "seed=0" / "log.txt").exists(),
            lambda: any((here / "s" / "runs" / "seed=1" / "checkpoints").glob("step-*")),
            lambda: (here / "s" / "runs" / "seed=2" / "samples.jsonl").exists(),
        ]
        for ready in moments:
            assert stop_when(ready, SIGKILL, *arguments, cwd=here).status == -SIGKILL
        done = run_here(*arguments)
        assert done.status == 0, done.err
        assert deterministic(here / "s") == deterministic(whole)
        for seed in (0, 1, 2):
            assert results(here / "s" / "runs" / f"seed={seed}") == results(whole / "runs" / f"seed={seed}")

    def test_a_run_that_is_killed_leaves_the_sweep(self, here: Path):
        """As the kernel does where memory runs out."""
        directory = here / "s"
        easy = ("objectives.harmless.threshold=0.1", "objectives.concise.threshold=0.1", "steps=500")
        process = start("sweep", *FAST, *easy, "seed=0,1", "sweep.dir=s", cwd=here)
        try:
            wait_for(lambda: any((directory / "runs" / "seed=0" / "checkpoints").glob("step-*")), process)
            os.kill(owner(directory / "runs" / "seed=0" / ".lock"), SIGKILL)
            wait_for(lambda: (directory / "runs" / "seed=1" / "status.json").exists(), process)
            process.send_signal(SIGINT)
            out, _ = process.communicate(timeout=TIMEOUT)
        finally:
            process.kill()
        assert process.returncode == 130
        first, second = read_json(directory / "sweep.json")["runs"]
        assert (first["state"], first["error"]) == ("failed", "killed by signal 9 (out of memory?)")
        assert second["state"] == "interrupted"
        assert read_json(directory / "runs" / "seed=1" / "status.json")["state"] == "interrupted"
        line = re.search(r"^interrupted; go on with: mopo (sweep .* sweep\.dir=s)$", out, re.MULTILINE)
        assert line, out
        assert shlex.split(line.group(1))[1:-1] == [*FAST, *easy, "seed=0,1"]

    def test_a_run_that_another_process_has_is_not_started_twice(self, run_here: Run, here: Path):
        run = RunDirectory(here / "s" / "runs" / "seed=0")
        lock = open_run(run)
        run.set_state("running")

        def let_go() -> None:
            while not (here / "s" / "runs" / "seed=1" / "summary.json").exists():
                time.sleep(0.01)
            lock.close()

        holder = threading.Thread(target=let_go)
        holder.start()
        done = run_here("sweep", *FAST, "seed=0,1", "sweep.dir=s")
        holder.join()
        assert done.status == 0, done.err
        assert re.findall(r"seed=\d: (?:running in another|started|done|infeasible)", done.out) == [
            "seed=0: running in another",
            "seed=1: started",
            "seed=1: done",
            "seed=0: started",
            "seed=0: done",
        ]
