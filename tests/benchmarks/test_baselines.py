"""Sweeps over methods: table and figure of `make baselines` from run directories, and what each method shows."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import baselines
import numpy as np
import pytest
from browser import chromium, tab
from evaluations import evaluation
from run_directories import FRONT, write_methods, write_run, write_sweep
from running import TINY, Finished

from mopo_cli.evaluation.card import model_card
from mopo_cli.evaluation.records import Evaluation, Exact, Measured
from mopo_cli.evaluation.show import show_results
from mopo_cli.maths.pareto import dominated_volume, hypervolume
from mopo_cli.report import build, groups, page, theme
from mopo_cli.runs.directory import RunDirectory
from mopo_cli.runs.record import read_run, value_of, varying_settings

METHODS = ("sft", "dpo", "ipo", "modpo", "soups", "mapl", "dpa", "ric", "mopo", "mopo_conditioned")


def rows(directory: Path) -> dict[str, baselines.Row]:
    policies, world = baselines.policies_of(directory)
    return {row.method: row for row in baselines.rows_of(policies, world)}


class TestTable:
    def test_numbers_by_hand(self, tmp_path: Path):
        found = rows(write_methods(tmp_path))
        assert list(found) == ["dpo", "mopo"]
        front = np.array([list(point.values()) for point in FRONT])
        worst = np.full(2, 0.25)
        points = np.array([[1.05 - h, h] for h in (0.4, 0.5, 0.6)])
        volume = hypervolume(points, worst) / dominated_volume(front, worst)
        assert found["dpo"].hypervolume[1] == pytest.approx(volume)  # seed 0; seed 1 lies 0.001 further
        assert found["dpo"].hypervolume[2] > volume
        assert (found["dpo"].kept, found["mopo"].kept) == ("–", "6 of 6")
        assert (found["dpo"].met, found["mopo"].met) == ("6 of 6", "6 of 6")
        short = found["mopo"].short
        assert short is not None
        assert short == pytest.approx((0.0295, 0.029, 0.03))  # 0.01 below, 0.02 for its place, 0.001 for a seed
        assert (found["dpo"].steps, found["dpo"].samples, found["dpo"].seconds) == (600, 150, 180)

    def test_a_threshold_that_is_missed_is_not_met(self, tmp_path: Path):
        directory = write_methods(tmp_path, ("mopo",), seeds=1)
        policies, world = baselines.policies_of(directory)
        missed = [replace(p, point=p.point - [0, 0.02]) if p.asked == "0.6" else p for p in policies]
        (row,) = baselines.rows_of(missed, world)
        assert (row.kept, row.met) == ("2 of 3", "2 of 3")
        within = [replace(p, point=p.point - [0, 0.5 * baselines.SLACK]) for p in policies]
        assert baselines.rows_of(within, world)[0].kept == "3 of 3"

    def test_a_method_that_reaches_no_threshold_has_no_distance(self, tmp_path: Path):
        policies, world = baselines.policies_of(write_methods(tmp_path, seeds=1))
        poor = [replace(p, point=np.array([0.9, 0.1])) if p.method == "dpo" else p for p in policies]
        dpo, _ = baselines.rows_of(poor, world)
        assert (dpo.met, dpo.short) == ("0 of 3", None)
        assert "| 0 of 3 | – |" in baselines.table(poor, world)

    def test_work_that_other_runs_have_paid_for_is_not_counted_again(self, tmp_path: Path):
        directory = write_methods(tmp_path, ("soups", "mopo"), seeds=1)
        for place, path in enumerate(sorted(directory.glob("runs/algorithm=soups*/summary.json"))):
            told = json.loads(path.read_text())
            told["train"]["reused_steps"] = 200 if place else 0
            path.write_text(json.dumps(told))
        assert rows(directory)["soups"].steps == 200

    def test_the_exact_optimum_stands_first(self, tmp_path: Path):
        policies, world = baselines.policies_of(write_methods(tmp_path))
        lines = baselines.table(policies, world).splitlines()
        assert lines[2].startswith("| optimum of (P) |")
        assert "| 6 of 6 | 6 of 6 | 0.000 (0.000 to 0.000) |" in lines[2]
        assert lines[2].endswith("| – | – | – |")
        assert [line.split()[1] for line in lines[3:]] == ["dpo", "mopo"]

    def test_without_an_exact_front_methods_are_measured_by_all_together(self, tmp_path: Path):
        policies, world = baselines.policies_of(write_methods(tmp_path, exact=False))
        assert world.front is None
        dpo, mopo = baselines.rows_of(policies, world)
        assert dpo.hypervolume == (1.0, 1.0, 1.0)  # it dominates the other
        assert mopo.hypervolume[2] < 1.0
        assert mopo.short is None
        assert "optimum" not in baselines.table(policies, world)

    def test_the_section_between_its_markers(self):
        document = "a\n<!-- x: made by `make baselines` -->\nold\n<!-- end of x -->\nb\n"
        new = baselines.section("x", "| new \\1 |", document)
        assert new == "a\n<!-- x: made by `make baselines` -->\n\n| new \\1 |\n\n<!-- end of x -->\nb\n"
        assert baselines.section("x", "| new \\1 |", new) == new
        with pytest.raises(SystemExit, match=r"has no <!-- y: made by"):
            baselines.section("y", "", document)

    def test_docs_have_a_place_for_both_sections(self):
        document = (baselines.DOCS / "results.md").read_text(encoding="utf-8")
        for name in ("baselines", "baselines_qa"):
            assert baselines.section(name, "x", document) != document

    @pytest.mark.parametrize("exact", [True, False])
    @pytest.mark.parametrize("count", [1, 4, 10])
    def test_the_figure(self, tmp_path: Path, exact: bool, count: int):
        policies, world = baselines.policies_of(write_methods(tmp_path, METHODS[-count:], exact=exact))
        png, svg = baselines.draw(policies, world, tmp_path / "figures" / "x.png", "title")
        assert png.stat().st_size > 5_000
        text = svg.read_text()
        assert all(method in text for method in METHODS[-count:])
        assert ("exact front" in text) == exact


class TestReport:
    def test_runs_are_told_apart_by_method(self, tmp_path: Path):
        directory = write_methods(tmp_path, METHODS)
        built = build.build(build.read_sweep(directory), "sweep", directory, bootstrap=0)
        group = built.sections[0].group
        assert groups.colour_setting(group) == groups.shape_setting(group) == "algorithm"
        assert group.settings["algorithm"] == sorted(METHODS)
        data = built.sections[0].data
        assert {row["colour"] for row in data["runs"]} == set(METHODS)
        best = [row for row in data["runs"] if row["front"]]
        assert {row["colour"] for row in best} == set(METHODS)  # a front of each, not of all together
        assert groups.plane(group) is None
        columns, table = page.table(built)
        assert [column.title for column in columns][2] == "algorithm"
        assert {cells[2].text for _, cells in table} == set(METHODS)

    def test_a_comparison_names_methods_and_no_targets(self, tmp_path: Path):
        settings = {"algorithm.weights.helpful": 0.5}
        runs = [read_run(write_run(tmp_path / name, {"a": 0.6, "b": 0.5}, algorithm=name)) for name in ("dpo", "mopo")]
        runs += [read_run(write_run(tmp_path / "own", {"a": 0.6, "b": 0.5}, settings=settings, algorithm="dpo"))]
        assert varying_settings(runs) == {"algorithm": ["dpo", "mopo"], "algorithm.weights.helpful": ["0.5"]}
        assert [value_of(run, "algorithm") for run in runs] == ["dpo", "mopo", "dpo"]

    def test_a_run_of_old_is_named_by_its_target(self, tmp_path: Path):
        assert read_run(write_run(tmp_path / "a", {"a": 0.6, "b": 0.5}, algorithm=None)).method == "mopo"
        (tmp_path / "a" / "config.yaml").unlink()
        assert read_run(tmp_path / "a").method == ""

    def test_charts_of_a_method_without_multipliers(self, tmp_path: Path):
        path = write_run(tmp_path / "a", {"a": 0.6, "b": 0.5}, algorithm="dpo", exact=True, settings={"x": 1})
        built = build.build([read_run(path)], "run", path)
        figures = {figure.id: figure for figure in built.sections[0].figures}
        text = json.dumps([panel.chart for panel in figures["training"].panels])
        assert len(figures["training"].panels) == 4
        assert "loss" in text
        assert "multiplier" not in text
        assert not any(key.startswith("o") for row in built.sections[0].data["runs"] for key in row)  # no optimum
        html = page.render(built)
        assert "<th>λ</th>" not in html
        assert "<th>optimum</th>" not in html
        assert "threshold kept" not in html
        assert "<dd>dpo</dd>" in html

    def test_a_run_that_logged_nothing_has_no_chart_of_its_steps(self, tmp_path: Path):
        path = write_run(tmp_path / "a", {"a": 0.6, "b": 0.5})
        (path / "metrics.jsonl").write_text('{"step": 5}\n')
        assert "training" not in [f.id for f in build.build([read_run(path)], "run", path).sections[0].figures]

    def test_the_command_of_a_point_leaves_out_what_others_are_told(self, tmp_path: Path):
        directory = write_methods(tmp_path, seeds=1)
        run = build.read_sweep(directory)[-1]
        told = dict(run.summary) | {"command": "mopo sweep experiment=baselines seed=0"}
        command = page.command_of(replace(run, summary=told))
        assert command == ("mopo sweep experiment=baselines algorithm=mopo objectives.harmless.threshold=0.6 seed=0")

    def test_a_page_of_ten_methods_in_a_browser(self, tmp_path: Path):
        chromium()
        directory = write_methods(tmp_path, METHODS, seeds=1)
        path = build.write(build.build(build.read_sweep(directory), "sweep", directory, bootstrap=0), directory)
        with tab() as browser:
            browser.size(1280)
            browser.open(path)
            assert browser.errors() == []
            shown = "[...document.querySelectorAll('#table tbody tr:not([hidden])')].map(r => r.dataset.run)"
            choose = "document.getElementById('method').value = '{}'; document.getElementById('method').onchange()"
            browser.run(choose.format("dpo"))
            assert [name.split(",")[0] for name in browser.run(shown)] == ["algorithm=dpo"] * 3  # and no modpo
            browser.run(choose.format(""))
            assert len(browser.run(shown)) == 30
            legend = "document.querySelector('.chart').textContent"
            assert all(method in browser.run(legend) for method in METHODS)

    def test_other_sweeps_have_no_choice_of_method(self, tmp_path: Path):
        directory = write_sweep(tmp_path / "s", 4)
        html = page.render(build.build(build.read_sweep(directory), "sweep", directory, bootstrap=0))
        assert 'id="method"' not in html


class TestFigures:
    @pytest.mark.parametrize("algorithm", ["mopo", "dpo"])
    def test_training_shows_what_was_logged(self, tmp_path: Path, algorithm: str):
        run = RunDirectory(write_run(tmp_path / algorithm, {"a": 0.6, "b": 0.5}, algorithm=algorithm))
        drawn = build.write_run_report(run)
        assert [path.name for path in drawn] == ["training.png", "win_rates.png"]
        assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000 for path in drawn)
        (section,) = build.build([read_run(run.path)], "run", run.path).sections
        text = json.dumps([panel.chart for figure in section.figures if figure.id == "training"
                           for panel in figure.panels])  # fmt: skip
        assert ("multiplier" in text) == (algorithm == "mopo")
        assert ('"loss"' in text) == (algorithm == "dpo")
        run.metrics.write_text("")  # nothing was logged
        assert [path.name for path in build.write_run_report(run)] == ["win_rates.png"]

    def test_a_report_of_a_run_draws_its_figures_again_alike(self, tmp_path: Path):
        run = RunDirectory(write_run(tmp_path / "a", {"a": 0.6, "b": 0.5}, {"b": 0.4}, exact=True))
        before = {path: path.read_bytes() for path in build.write_run_report(run)}
        build.draw(build.build([read_run(run.path)], "run", run.path), run.figures)
        assert {path: path.read_bytes() for path in before} == before

    def test_a_sweep_over_methods(self, tmp_path: Path):
        drawn = {path.name for path in build.draw_sweep(write_methods(tmp_path, METHODS, seeds=1))}
        assert {"pareto.png", "trajectories.png", "win_rates.png"} <= drawn
        assert "stability.png" not in drawn  # no plane of settings that not all have

    def test_an_algorithm_looks_the_same_whichever_stand_beside_it(self, tmp_path: Path):
        looks: dict[str, set[str]] = {}
        for names in (METHODS, ("mopo", "dpo"), ("own_one", "sft", "mopo")):
            directory = write_methods(tmp_path / names[0], names, seeds=1)
            pair = build.build(build.read_sweep(directory), "sweep", directory, bootstrap=0).sections[0].figures[0]
            (points,) = [layer["encoding"] for layer in pair.panels[0].chart["layer"] if "fill" in layer["encoding"]]
            colours = points["stroke"]["scale"]
            assert points["fill"]["condition"]["scale"] == colours
            assert points["shape"]["scale"]["domain"] == colours["domain"] == sorted(names)
            assert len(set(colours["range"])) == len(set(points["shape"]["scale"]["range"])) == len(names)
            for name, *look in zip(colours["domain"], colours["range"], points["shape"]["scale"]["range"], strict=True):
                looks.setdefault(name, set()).add(str(look))
        assert all(len(look) == 1 for look in looks.values())
        assert not {theme.STAR, theme.OPTIMUM["shape"], theme.EXACT["shape"]} & set(theme.SHAPES)


class TestWithoutThresholds:
    def test_console(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        def asked(threshold: float | None, oracle: Exact) -> Evaluation:
            result = Measured("secondary", threshold, 0.5, (0.4, 0.6), None, None, "exact")
            return evaluation({"a": replace(result, role="primary", threshold=None), "b": result}, 0.3, oracle)

        rates = {"a": 0.5, "b": 0.5}
        exact = Exact(rates, {}, 1.0, 64, 64, rates, 0.0, 0.3, 0.7, {"b": 0.1}, 0.0, True, rates, rates)
        for threshold, there in ((None, False), (0.4, True)):
            show_results(asked(threshold, exact), RunDirectory(tmp_path))
            text = capsys.readouterr().out
            assert all((word in text) == there for word in ("threshold", "satisfied", "optimum"))
            assert "exact" in text

    def test_console_of_thresholds_out_of_reach(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        result = Measured("secondary", 0.9, 0.5, (0.4, 0.6), None, False, "exact", "no")
        rates = {"a": 0.5, "b": 0.5}
        exact = Exact(
            rates, {}, 1.0, 64, 64, None, None, 0.3, None, None, None, False, {"b": 0.8}, rates, shortfall=0.1
        )
        objectives = {"a": replace(result, role="primary", threshold=None, satisfied=None), "b": result}
        show_results(evaluation(objectives, 0.3, exact), RunDirectory(tmp_path))
        text = capsys.readouterr().out
        assert "no optimum: b at least 0.900 is out of reach: at most 0.800 is attainable" in text
        assert text.count("optimum") == 1
        assert "attainable\n" in text.replace(" ", "")

    def test_console_marks_a_threshold_that_nobody_asked_for(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        (tmp_path / "config.yaml").write_text("objectives: {a: {role: primary}, b: {threshold: null}}")
        result = Measured("secondary", 0.45, 0.5, (0.46, 0.54), None, True, "exact", "yes")
        objectives = {"a": replace(result, role="primary", threshold=None, satisfied=None), "b": result}
        told = replace(evaluation(objectives, 0.3), path=str(tmp_path))
        show_results(told, RunDirectory(tmp_path))
        text = capsys.readouterr().out
        assert "0.450*" in text
        assert "*: no threshold of yours" in text

    @pytest.mark.parametrize(
        ("algorithm", "aim"),
        [
            ({"name": "dpo", "weights": {"a": 0.7, "b": 0.3}}, "(dpo, tau 0.08, OF): objectives weighed a 0.7, b 0.3."),
            ({"name": "dpa", "direction": {"a": 0.8, "b": 0.6}}, "(dpa, tau 0.08, OF): objectives in the direction a"),
            ({"name": "dpo", "weights": None}, "(dpo, tau 0.08, OF): as a as possible."),
            ({"name": "soups", "weights": None}, "(soups, tau 0.08, OF): all objectives weighed alike."),
        ],
    )  # fmt: skip
    def test_model_card(self, tmp_path: Path, algorithm: dict, aim: str):
        run = read_run(write_run(tmp_path / "r", {"a": 0.6, "b": 0.5}, algorithm="dpo"))
        settings = {"model": {"name": "tiny"}, "run": {"name": "r"}, "tau": 0.08, "algorithm": algorithm}
        summary = dict(run.summary) | {"algorithm": algorithm["name"]}
        card = model_card(settings, summary, {})
        assert aim.replace("OF", "200 steps, seed 0") in card
        assert "| objective | role | win rate | 95 % CI | judged by |" in card
        objectives = {
            name: {**o, "threshold": 0.55 if name == "b" else None} for name, o in summary["objectives"].items()
        }
        assert "at least 0.550" not in model_card(settings, summary | {"objectives": objectives}, {}).split("|")[0]


@pytest.mark.slow
def test_a_sweep_over_methods_to_its_table_and_figure(run_here: Callable[..., Finished], here: Path):
    """Each method for a moment: its runs, results.csv, sweep page, table and figure."""
    short = ("steps=4", "checkpoint_every=2", "sft.steps=2", "preference_model.steps=2", "dataset.max_rows=120",
             "preference_model.evaluate_every=1", "onpolicy.every=2", "onpolicy.prompts=8", "onpolicy.train_prompts=8",
             "evaluation.prompts=8", "evaluation.exact_prompts=4")  # fmt: skip
    asked = ("experiment=baselines", "seed=0", "algorithm.weights={helpful:0.5,harmless:0.5}",
             "objectives.harmless.threshold=0.45", "algorithm=sft,dpo,mopo", "sweep.dir=s")  # fmt: skip
    done = run_here("sweep", *TINY, *short, *asked)
    assert done.status == 0, done.err
    with open(here / "s" / "results.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["algorithm"] for line in lines] == ["sft", "dpo", "mopo"]
    weights = "algorithm.weights=helpful=0.5+harmless=0.5"
    ids = [f"algorithm=sft,{weights}", f"algorithm=dpo,{weights}", "algorithm=mopo,objectives.harmless.threshold=0.45"]
    assert [line["id"] for line in lines] == ids
    for name in ids:  # a method that follows no win rate is measured on held-out prompts as well
        rates = read_run(here / "s" / "runs" / name).summary["heldout_win_rate"]
        assert set(rates) == {"helpful", "harmless"}
        assert all(0 <= rate <= 1 for rate in rates.values())
    command = read_run(here / "s" / "runs" / ids[1]).summary["command"]
    assert command.startswith("mopo sweep hparams=smoke")
    found = build.read_sweep(here / "s")
    assert [run.method for run in found] == ["sft", "dpo", "mopo"]
    assert (here / "s" / "report.html").exists()
    assert (here / "s" / "runs" / ids[0] / "figures" / "training.png").exists()
    policies, world = baselines.policies_of(here / "s")
    assert [row.steps for row in baselines.rows_of(policies, world)] == [4, 4, 4]
    assert len(baselines.draw(policies, world, here / "x.png", "title")) == 2
    again = run_here("sweep", *TINY, *short, *asked, "sweep.dry_run=true")
    assert again.out.count("stays") == 3
