"""The report: which runs it reads in which state, its numbers, its size, and the page in a real browser."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from browser import Tab, chromium, tab
from run_directories import FRONT, summary, write_run, write_sweep
from running import Finished

from mopo_cli.base.errors import UserError
from mopo_cli.config.checks import checked
from mopo_cli.config.schema import ObjectiveConfig
from mopo_cli.maths.pareto import hypervolume, igd_plus, measured, nondominated, resample, upper_edge
from mopo_cli.report import build, groups, page
from mopo_cli.report.quality import quality
from mopo_cli.runs.directory import RunDirectory
from mopo_cli.runs.record import read_run, sampled_rates, varying_settings

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>\u2028'\"&"
PAIR = {"helpful": 0.56, "harmless": 0.57}
Report = Callable[..., Finished]


def built(*paths: Path, **how: int) -> page.Report:
    return build.build([read_run(path) for path in paths], "comparison", Path("place"), **how)


class TestFiniteFronts:
    def test_a_staircase_by_hand(self):
        points = np.array([[0.6, 0.5], [0.5, 0.6], [0.5, 0.5], [0.6, 0.5]])
        assert nondominated(points).tolist() == [True, True, False, True]  # the same point twice: neither is worse
        assert hypervolume(points, np.zeros(2)) == pytest.approx(0.6 * 0.5 + 0.1 * 0.5)
        assert hypervolume(points, np.array([0.5, 0.4])) == pytest.approx(0.1 * 0.1)  # only what lies above it
        assert hypervolume(np.array([[0.4, 0.9]]), np.array([0.5, 0.0])) == 0.0

    def test_igd_plus_counts_only_what_is_missing(self):
        front = np.array([[0.6, 0.4], [0.4, 0.6]])
        assert igd_plus(front, front) == 0.0
        assert igd_plus(front + 0.1, front) == 0.0
        assert igd_plus(np.array([[0.5, 0.6]]), front) == pytest.approx(0.05)  # 0.1 short of the first, 0 of the second

    def test_the_edge_of_mixtures_leaves_out_corners_below_it(self):
        points = np.array([[0.0, 1.0], [0.4, 0.5], [0.7, 0.7], [1.0, 0.0], [0.2, 0.2]])
        assert upper_edge(points).tolist() == [[0.0, 1.0], [0.7, 0.7], [1.0, 0.0]]
        assert upper_edge(np.array([[0.5, 0.5]])).tolist() == [[0.5, 0.5]]

    def test_runs_on_the_same_prompts_share_the_draw(self):
        values = np.random.default_rng(0).normal(size=(30, 2))
        prompts = tuple(map(str, range(30)))
        drawn = resample([(prompts, values), (prompts, values + 1)], 50, seed=0)
        assert drawn.shape == (50, 2, 2)
        assert np.allclose(drawn[:, 1] - drawn[:, 0], 1)
        assert drawn[:, 0].std() > 0.05

    def test_the_interval_holds_the_truth_where_percentiles_do_not(self):
        rng = np.random.default_rng(0)
        hits = {"basic": 0, "percentile": 0}
        for _ in range(40):
            truth = rng.uniform(0.45, 0.6, (30, 3))
            values = truth[:, None] + rng.normal(0, 0.25, (30, 200, 3))
            runs = [(tuple(f"{i} {j}" for j in range(200)), v) for i, v in enumerate(values)]
            redrawn = resample(runs, 80, seed=1)
            volume = hypervolume(truth, np.zeros(3))
            found = measured(lambda p: hypervolume(p, np.zeros(3)), values.mean(axis=1), redrawn)
            assert found.ci95 is not None
            hits["basic"] += found.ci95[0] <= volume <= found.ci95[1]
            low, high = np.quantile([hypervolume(p, np.zeros(3)) for p in redrawn], [0.025, 0.975])
            hits["percentile"] += low <= volume <= high
        assert hits["basic"] >= 32
        assert hits["percentile"] < hits["basic"] - 12


class TestRuns:
    def test_a_run_that_goes_on_is_listed_as_unfinished(self, tmp_path: Path):
        write_run(tmp_path / "a", PAIR)
        write_run(tmp_path / "b", PAIR, finished=False)
        found = built(tmp_path / "a", tmp_path / "b")
        assert [run.finished for run in found.runs] == [True, False]
        assert found.runs[1].state == "running"
        assert found.runs[1].names == ("helpful", "harmless")  # as its config has them
        assert found.notices == ["1 of 2 runs have no results yet (1 running): b."]
        assert len(groups.datasets(found.sections[0].group)["history"]) == 80  # both are drawn over the steps

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"objectives": {}, "kl', '{"objectives": {"x": {"role": 1}}}'])
    def test_a_summary_that_is_no_summary_is_told(self, tmp_path: Path, text: str):
        run = write_run(tmp_path / "a", PAIR)
        (run / "summary.json").write_text(text)
        found = read_run(run)
        assert not found.finished
        assert found.problem is not None
        assert "summary.json" in found.problem
        assert "unfinished" in page.render(built(run, write_run(tmp_path / "b", PAIR)))

    @pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "samples.jsonl", "status.json"])
    @pytest.mark.parametrize("text", [None, "", "{[", '{"a": 1}\n{"step": 5, "kl'])
    def test_any_other_file_may_be_missing_or_torn(self, tmp_path: Path, name: str, text: str | None):
        run = write_run(tmp_path / "a", PAIR)
        (run / name).unlink() if text is None else (run / name).write_text(text)
        assert "helpful" in page.render(built(run, write_run(tmp_path / "b", PAIR, seed=1)))

    def test_objective_sets_are_shown_apart(self, tmp_path: Path):
        paths = [write_run(tmp_path / "a", PAIR), write_run(tmp_path / "b", {"human": 0.6, "concise": 0.5})]
        paths.append(write_run(tmp_path / "c", PAIR, seed=1))
        found = built(*paths)
        assert [[run.id for run in section.group.runs] for section in found.sections] == [["a", "c"], ["b"]]
        assert found.notices[0] == (
            "These runs have 2 objective sets, which are shown apart: helpful, harmless (a, c); human, concise (b)."
        )

    def test_other_data_is_told(self, tmp_path: Path):
        a = write_run(tmp_path / "a", PAIR, settings={"dataset.path": "one.jsonl"})
        b = write_run(tmp_path / "b", PAIR, settings={"dataset.path": "two.jsonl"})
        found = built(a, b)
        assert "measured on different data" in found.notices[0]
        assert found.sections[0].quality is None, "no hypervolume of what is no one scale"
        assert "is at least as good" not in found.sections[0].figures[0].caption
        assert all(row["front"] for row in found.sections[0].data["runs"])
        assert "hypervolume</dt>" not in page.render(found)

    def test_thresholds_out_of_reach_have_no_optimum(self, tmp_path: Path):
        rates, asked = {"helpful": 0.6, "harmless": 0.5}, {"harmless": 0.9}
        run = write_run(tmp_path / "a", rates, asked, exact=True, attainable={"harmless": 0.8}, front=FRONT)
        found = built(run)
        columns = {column.title: [cell.text for cell in cells] for column, cells in page.objective_table(found.runs[0])}
        assert "optimum" not in columns
        assert columns["attainable"] == ["", "0.800"]
        facts = dict(page.facts(found.runs[0]))
        assert facts["optimum"] == "none: harmless at least 0.900 is out of reach: at most 0.800 is attainable"
        assert "below the optimum" not in facts
        assert not any(key.startswith("o") for row in found.sections[0].data["runs"] for key in row)
        assert "Crosses" not in " ".join(figure.caption for figure in found.sections[0].figures)
        assert "optimum/helpful,," not in page.csv_text(found)
        line = next(csv.DictReader(io.StringIO(page.csv_text(found))))
        assert (line["optimum/helpful"], line["gap"], line["attainable/harmless"]) == ("", "", "0.8")

    def test_one_run_s_fronts_show_the_exact_one(self, tmp_path: Path):
        run = write_run(tmp_path / "a", {"helpful": 0.5, "harmless": 0.5}, {"harmless": 0.5}, exact=True, front=FRONT)
        section = built(run).sections[0]
        (panel,) = section.figures[0].panels
        lines = [layer for layer in panel.chart["layer"] if layer["mark"].get("type") == "line"]
        places = lines[0]["data"]["values"]
        assert len(places) > 10
        edge = {place["x"]: place["y"] for place in places}
        assert max(edge) == pytest.approx(0.715, abs=0.003)  # all of it that lies above and right of the run
        assert all(y >= 0.45 for y in edge.values())
        spans = [layer["encoding"] for layer in panel.chart["layer"] if "scale" in layer["encoding"].get("x", {})]
        assert spans[0]["x"]["scale"]["domain"][1] > max(edge)
        assert spans[0]["y"]["scale"]["domain"][1] > max(edge.values())

    def test_every_objective_has_its_exact_diamond(self, tmp_path: Path):
        run = write_run(tmp_path / "a", {"helpful": 0.6, "harmless": 0.5}, {"harmless": 0.5}, exact=True, front=FRONT)
        section = built(run).sections[0]
        assert [row["exact"] for row in section.data["reached"]] == [0.6, 0.5]
        figure = next(figure for figure in section.figures if figure.id == "training")
        for k in (0, 1):
            marks_ = [layer["mark"] for layer in figure.panels[k].chart["layer"]]
            assert any(isinstance(mark, dict) and mark.get("shape") == "diamond" for mark in marks_)

    @pytest.mark.parametrize(("verdict", "told"), [("yes", "kept"), ("no", "missed"), ("undecided", "undecided")])
    def test_a_verdict_has_the_same_word_everywhere(self, tmp_path: Path, verdict: str, told: str):
        run = write_run(tmp_path / "a", {"helpful": 0.6, "harmless": 0.5}, {"harmless": 0.5})
        summary_ = json.loads((run / "summary.json").read_text())
        summary_["objectives"]["harmless"]["satisfied_with_confidence"] = verdict
        (run / "summary.json").write_text(json.dumps(summary_))
        found = built(run)
        columns = {column.title: [cell.text for cell in cells] for column, cells in page.objective_table(found.runs[0])}
        assert columns["threshold kept"] == ["", told]
        titles, rows = page.table(found)
        place = [column.title for column in titles].index("thresholds")
        assert rows[0][1][place].text == told

    def test_a_threshold_that_nobody_asked_for_is_marked(self, tmp_path: Path):
        run = write_run(tmp_path / "a", {"helpful": 0.6, "harmless": 0.5}, {"harmless": 0.45})
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["objectives"]["harmless"]["threshold"] = None
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        record = read_run(run)
        columns = {column.title: [cell.text for cell in cells] for column, cells in page.objective_table(record)}
        assert columns["threshold"] == ["", "0.450*"]
        assert dict(page.facts(record))["thresholds"].startswith("*: no threshold of yours")

    def test_settings_that_differ_are_found_without_a_sweep(self, tmp_path: Path):
        runs = [read_run(write_run(tmp_path / f"{t}", PAIR, settings={"tau": t})) for t in (0.2, 0.04, 0.1)]
        assert varying_settings(runs) == {"tau": ["0.04", "0.1", "0.2"]}

    def test_the_command_of_a_point_is_its_own(self, tmp_path: Path):
        directory = write_sweep(tmp_path / "s", 4)
        for path in directory.glob("runs/*/summary.json"):
            said = "mopo sweep -m steps=5 tau=0.02,0.04 'objectives.harmless.threshold=0.45,0.5' seed=0 sweep.dir=x"
            path.write_text(json.dumps({**json.loads(path.read_text()), "command": said}))
        first = build.read_sweep(directory)[0]
        assert page.command_of(first) == "mopo sweep steps=5 tau=0.02 objectives.harmless.threshold=0.45 seed=0"

    def test_a_sweep_in_any_state(self, tmp_path: Path):
        directory = write_sweep(tmp_path / "s", 3)
        records = json.loads((directory / "sweep.json").read_text())["runs"]
        waiting = {"id": "waits", "overrides": {"tau": "1"}, "state": "pending", "error": None}
        (directory / "sweep.json").write_text(json.dumps({"runs": [*records[:2], waiting]}))
        found = build.read_sweep(directory)
        assert [run.finished for run in found] == [True, True, False, True]  # the last is in runs/ only
        assert found[2].state == "pending"
        (directory / "sweep.json").write_text('{"runs": [')
        assert len(build.read_sweep(directory)) == 3


class TestQuality:
    def group(self, *paths: Path) -> groups.Group:
        runs = [read_run(path) for path in paths]
        return groups.group_of(runs, varying_settings(runs))

    def test_against_the_exact_front_where_it_is_known(self, tmp_path: Path):
        front = [{"helpful": 0.7, "harmless": 0.5}, {"helpful": 0.5, "harmless": 0.7}]
        a = write_run(tmp_path / "a", {"helpful": 0.6, "harmless": 0.5}, exact=True, front=front)
        b = write_run(tmp_path / "b", {"helpful": 0.5, "harmless": 0.6}, exact=True, front=front, seed=1)
        found = quality(self.group(a, b), draws=200, seed=0)
        assert found is not None
        assert found.front == {"a": True, "b": True}
        assert found.against == "the exact front"
        assert found.exact_igd_plus == pytest.approx(0.1)
        assert found.exact_hypervolume == pytest.approx(0.6 * 0.5 + 0.1 * 0.5)
        assert found.hypervolume.ci95 is not None
        assert found.hypervolume.ci95[0] < found.hypervolume.value < found.hypervolume.ci95[1]

    def test_the_reference_point_is_the_objective_sets(self, tmp_path: Path):
        worst = {"objectives.helpful.worst": 0.5, "objectives.harmless.worst": 0.4}
        paths = [write_run(tmp_path / name, PAIR, settings=worst, seed=i) for i, name in enumerate("ab")]
        found = quality(self.group(*paths), draws=0, seed=0)
        assert found is not None
        assert found.reference == {"helpful": 0.5, "harmless": 0.4}
        assert found.hypervolume.value == pytest.approx(0.06 * 0.17)
        assert found.hypervolume.ci95 is None
        assert found.against == "the non-dominated set of the runs shown"

    def test_worst_is_checked(self):
        with pytest.raises(UserError, match=r"objectives\.a\.worst=1\.0: must be a win rate in \[0, 1\)"):
            checked(ObjectiveConfig("primary", worst=1.0), "objectives.a.")

    def test_one_run_has_no_front(self, tmp_path: Path):
        assert quality(self.group(write_run(tmp_path / "a", PAIR)), 10, 0) is None

    def test_samples_are_grouped_by_prompt(self, tmp_path: Path):
        rates = sampled_rates(read_run(write_run(tmp_path / "a", PAIR, responses=3)))
        assert rates is not None
        prompts, values = rates
        assert values.shape == (40, 2)
        assert len(prompts) == 40
        assert values.mean(axis=0) == pytest.approx(list(PAIR.values()), abs=1e-4)

    def test_prompts_of_a_group_are_drawn_together(self):
        values = np.repeat(np.random.default_rng(0).random((40, 1)), 5, axis=0)
        apart = resample([(tuple(map(str, range(200))), values)], 400, seed=0)
        together = resample([(tuple(str(i // 5) for i in range(200)), values)], 400, seed=0)
        assert together.std() == pytest.approx(5**0.5 * apart.std(), rel=0.2)

    def test_of_few_prompts_there_is_no_interval(self, tmp_path: Path):
        run = write_run(tmp_path / "a", PAIR, responses=3)
        lines = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
        grouped = [json.dumps({**line, "group": f"g{i % 29}"}) + "\n" for i, line in enumerate(lines)]
        (run / "samples.jsonl").write_text("".join(grouped))
        assert sampled_rates(read_run(run)) is None
        summary = json.loads((run / "summary.json").read_text())
        for result in summary["objectives"].values():
            result |= {"win_rate_ci95": [None, None], "satisfied_with_confidence": "undecided"}
        summary["evaluation"] = {"prompts": 40, "independent_prompts": 29, "responses": 120}
        (run / "summary.json").write_text(json.dumps(summary))
        record = read_run(run)
        assert (record.objectives["helpful"].ci95, record.verdict) == (None, "undecided")
        html = page.render(built(run))
        assert "40 test prompts, 29 of them independent" in html
        assert "undecided" in html


class TestPage:
    def test_200_runs_stay_small(self, tmp_path: Path):
        path = write_sweep(tmp_path / "s", 200, length=1200, steps=400)
        page_ = build.write(build.build(build.read_sweep(path), "sweep", path, bootstrap=20), path)
        assert page_.stat().st_size < 5_000_000

    def test_long_texts_stay_within_the_budget(self, tmp_path: Path):
        path = write_sweep(tmp_path / "s", 10, length=20_000)
        found = page.samples(build.build(build.read_sweep(path), "sweep", path, bootstrap=0))
        assert len(json.dumps(found)) < 1.2 * page.SAMPLE_BUDGET
        assert "characters more in the file" in found["runs"][next(iter(found["runs"]))]["answers"][0][0][0]

    def test_embedded_json_cannot_leave_its_element(self):
        text = page.embedded({HOSTILE: [HOSTILE]})
        assert not set("<>&\u2028") & set(text)
        assert json.loads(text) == {HOSTILE: [HOSTILE]}

    def test_the_csv_has_every_number(self, tmp_path: Path):
        found = built(write_run(tmp_path / "a,1", PAIR, {"harmless": 0.55}), write_run(tmp_path / "b", PAIR, seed=1))
        rows = list(csv.DictReader(io.StringIO(page.csv_text(found))))
        assert [row["run"] for row in rows] == ["a,1", "b"]
        assert (rows[0]["win_rate/helpful"], rows[0]["threshold/harmless"], rows[1]["seed"]) == ("0.56", "0.55", "1")
        assert rows[0]["nondominated"] == "True"

    def test_every_figure_is_drawn_from_odd_names(self, tmp_path: Path):
        rates = {'it\'s "good"': 0.56, "a.b[0]": 0.55, "x/y\\z": 0.5}
        for number in range(4):
            settings = {"tau": 0.1 * (1 + number % 2), "steps": number // 2}
            write_run(tmp_path / f"r{number}", rates, {"a.b[0]": 0.5}, settings, exact=True, seed=number)
        found = built(*sorted(tmp_path.glob("r*")))
        drawn = build.draw(found, tmp_path / "figures")
        names = ("pareto", "parallel", "win_rates", "trajectories", "reward_kl", "stability")
        assert [path.name for path in drawn] == [f"{name}.{kind}" for name in names for kind in ("svg", "png")]
        text = (tmp_path / "figures" / "pareto.svg").read_text()
        assert "var(--" not in text
        assert "a.b[0]" in text

    @pytest.mark.parametrize("rates", [{"only": 0.6}, PAIR, {f"o{i}": 0.5 for i in range(6)}])
    @pytest.mark.parametrize("count", [1, 2, 10])
    def test_any_number_of_runs_and_objectives(self, tmp_path: Path, rates: dict[str, float], count: int):
        for number in range(count):
            write_run(tmp_path / f"r{number}", rates, exact=number % 2 == 0, seed=number)
        found = built(*sorted(tmp_path.glob("r*")), bootstrap=10)
        assert "<html" in page.render(found)
        assert [f.id for f in found.sections[0].figures][-2:] == [
            "training" if count == 1 else "trajectories", "reward_kl",
        ]  # fmt: skip


class TestCommand:
    def test_the_newest_run(self, run_here: Report, here: Path):
        write_run(here / "outputs/train/a", PAIR)
        done = run_here("report")
        assert done.status == 0, done.err
        assert "report         outputs/train/a/report.html" in done.out
        assert (here / "outputs/train/a/figures/training.png").exists()

    def test_runs_by_pattern(self, run_here: Report, here: Path):
        write_sweep(here / "s", 4)
        write_run(here / "one", PAIR)
        done = run_here("report", "runs=[one,'s/runs/*']", "out=both", "figures=false", "bootstrap=10")
        assert done.status == 0, done.err
        assert "runs           5" in done.out
        assert "2 objective sets" in done.err + done.out
        assert [p.name for p in (here / "both").iterdir()] == ["report.html"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["run=nowhere"], "run=nowhere: no such directory"),
            (["sweep=empty"], "sweep=empty: no sweep there (it has no sweep.json and no runs/)"),
            (["run=empty"], "empty: no run there (it has no config.yaml, status.json or summary.json)"),
            (["runs=['x/*']"], "runs: x/* matches no run directory"),
            (["runs=[]"], "runs=[]: must name a run directory at least"),
            (["run=a", "runs=[b]"], "run and runs: give one of run=, sweep= and runs=[...]"),
            (["bootstrap=-1"], "bootstrap=-1: must be 0 or more"),
            ([], "no run or sweep under outputs/"),
        ],
    )
    def test_mistakes_are_one_message(self, run_here: Report, here: Path, arguments: list[str], message: str):
        (here / "empty").mkdir()
        done = run_here("report", *arguments)
        assert done.status == 2
        assert message in done.err
        assert "Traceback" not in done.err

    def test_a_page_that_cannot_be_made_leaves_the_run_done(self, here: Path, capsys: pytest.CaptureFixture[str]):
        from mopo_cli.pipeline.finish import write_report

        run = RunDirectory(write_run(here / "a", PAIR))
        run.report.mkdir()
        write_report(run)
        assert "no report.html" in capsys.readouterr().err

    @pytest.mark.slow
    def test_a_training_ends_with_its_page(self, smoke: Path):
        text = (smoke / "report.html").read_text()
        assert "mopo report" in text
        oracle = json.loads((smoke / "summary.json").read_text())["oracle"]
        front = np.array([list(point.values()) for point in oracle["front"]])
        assert nondominated(front).all()
        assert (front.max(axis=0) >= np.array(list(oracle["optimum"].values())) - 1e-6).all()

    @pytest.mark.slow
    def test_the_curve_ends_where_the_summary_says(self, smoke: Path):
        told = json.loads((smoke / "summary.json").read_text())
        last = json.loads((smoke / "metrics.jsonl").read_text().splitlines()[-1])
        for name, objective in told["objectives"].items():
            assert last[f"win_rate/{name}"] == objective["estimated_win_rate"] == told["heldout_win_rate"][name]


class TestInABrowser:
    @pytest.fixture(scope="class")
    def pages(self, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
        chromium()
        root = tmp_path_factory.mktemp("pages")
        sweep = write_sweep(root / "sweep", 20)
        hostile = write_run(root / "hostile", {HOSTILE: 0.55, "b": 0.5}, settings={"tau": HOSTILE})
        lines = [json.loads(line) for line in (hostile / "samples.jsonl").read_text().splitlines()]
        for line in lines:
            line |= {"prompt": HOSTILE + line["prompt"], "response": HOSTILE}
        (hostile / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        told = summary({HOSTILE: 0.55, "b": 0.5}, {}, False, [], 0) | {"warnings": [HOSTILE], "command": HOSTILE}
        (hostile / "summary.json").write_text(json.dumps(told))
        build.write_run_report(RunDirectory(hostile))
        return {
            "sweep": build.write(build.build(build.read_sweep(sweep), "sweep", sweep, bootstrap=10), sweep),
            "hostile": hostile / "report.html",
            "both": build.write(built(hostile, *sorted(sweep.glob("runs/*"))[:2], bootstrap=0), root),
        }

    @pytest.fixture(scope="class")
    def browser(self):
        with tab() as opened:
            opened.size(1280)
            yield opened

    def names(self, browser: Tab) -> list[str]:
        return browser.run("[...document.querySelectorAll('#table tbody tr:not([hidden])')].map(r => r.dataset.run)")

    def test_opens_from_disk_without_a_network(self, browser: Tab, pages: dict[str, Path]):
        for path in pages.values():
            browser.open(path)
            assert browser.errors() == []
            assert browser.requests() == []
            charts_ = browser.run("document.querySelectorAll('.chart').length")
            assert browser.run("document.querySelectorAll('.chart svg').length") == charts_ > 3

    def test_sorted_by_a_button_both_ways(self, browser: Tab, pages: dict[str, Path]):
        browser.open(pages["sweep"])
        press = "[...document.querySelectorAll('#table th button')].find(b => b.textContent === 'helpful').click()"
        cells = "[...document.querySelectorAll('#table tbody tr')].map(r => parseFloat(r.cells[6].textContent))"
        before = browser.run(cells)
        browser.run(press)
        assert browser.run(cells) == sorted(before)
        assert browser.run("document.querySelectorAll('#table th[aria-sort=ascending]').length") == 1
        browser.run(press)
        assert browser.run(cells) == sorted(before, reverse=True)

    def test_filtered_by_text_and_by_number(self, browser: Tab, pages: dict[str, Path]):
        browser.open(pages["sweep"])
        enter = "document.getElementById('filter').value = {}; document.getElementById('filter').oninput()"
        browser.run(enter.format("'threshold=0.5'"))
        assert len(self.names(browser)) == 10  # 0.5 and 0.55
        assert browser.run("document.getElementById('count').textContent") == "10 of 20"
        browser.run(enter.format("'threshold=0.5 tau<0.05'"))
        assert len(self.names(browser)) == 4
        browser.run(enter.format("'HELPFUL>2'"))
        assert self.names(browser) == []
        browser.run(enter.format("''"))
        assert len(self.names(browser)) == 20

    def test_chosen_runs_stand_out_and_stand_side_by_side(self, browser: Tab, pages: dict[str, Path]):
        browser.open(pages["sweep"])
        chosen = self.names(browser)[3:5]
        for name in chosen:
            browser.run(f"document.querySelector('tr[data-run=\"{name}\"] input').click()")
        browser.run("new Promise(done => setTimeout(done, 300))")
        faint = "[...document.querySelectorAll('.chart')[0].querySelectorAll('.mark-symbol path')]"
        opacities = browser.run(f"{faint}.map(p => p.getAttribute('opacity'))")
        assert opacities.count("0.08") >= 18
        side = browser.run("[...document.querySelectorAll('#side article select')].map(s => s.value)")
        assert side == chosen
        assert browser.run("document.querySelectorAll('#side .response').length") >= 2

    def test_hovering_a_point_tells_its_run(self, browser: Tab, pages: dict[str, Path]):
        browser.open(pages["sweep"])
        x, y = browser.run("""(() => {
            const chart = document.querySelector('.chart'); chart.scrollIntoView();
            const marks = [...chart.querySelectorAll('.mark-symbol.role-mark path')];
            const box = marks.filter(mark => mark.getAttribute('fill')).at(-1).getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2]; })()""")
        browser.mouse("mouseMoved", x, y)
        browser.run("new Promise(done => setTimeout(done, 300))")
        shown = browser.run("document.getElementById('vg-tooltip-element').textContent")
        assert re.search(r"run\s*tau=0\.\d+,objectives\.harmless\.threshold", shown)
        browser.click(x, y)
        assert browser.run("document.querySelectorAll('tr.chosen').length") == 1

    def test_text_of_models_and_files_stays_text(self, browser: Tab, pages: dict[str, Path]):
        for name in ("hostile", "both"):
            browser.open(pages[name])
            assert browser.run("window.hacked") is None
            assert browser.run("document.querySelectorAll('main img, main script').length") == 0
            enter = "document.getElementById('search').value = 'hacked'; document.getElementById('search').oninput()"
            browser.run(enter)
            assert HOSTILE in browser.run("document.querySelector('#prompt').textContent")
            assert HOSTILE in browser.run("document.querySelector('#side').textContent")
            assert browser.errors() == []

    def test_prompts_are_found(self, browser: Tab, pages: dict[str, Path]):
        browser.open(pages["sweep"])
        browser.run("document.getElementById('search').value = 'THING 7?'; document.getElementById('search').oninput()")
        assert browser.run("document.getElementById('prompt').textContent") == "How do I do thing 7?"

    def test_dark_light_and_paper(self, browser: Tab, pages: dict[str, Path], tmp_path: Path):
        colour = "getComputedStyle(document.body).backgroundColor"
        browser.media("dark")
        browser.open(pages["sweep"])
        assert browser.run(colour) == "rgb(21, 24, 28)"
        browser.run("document.getElementById('theme').click()")
        assert browser.run(colour) == "rgb(255, 255, 255)"
        browser.media("light")
        browser.run("document.getElementById('theme').click()")
        assert browser.run(colour) == "rgb(21, 24, 28)"
        browser.call("Emulation.setEmulatedMedia", media="print")
        assert browser.run(colour) == "rgb(255, 255, 255)"
        assert browser.run("getComputedStyle(document.querySelector('nav')).display") == "none"
        browser.call("Emulation.setEmulatedMedia", media="")
        browser.pdf(tmp_path / "page.pdf")
        assert (tmp_path / "page.pdf").stat().st_size > 20_000

    def test_narrow_screens_scroll_only_tables(self, browser: Tab, pages: dict[str, Path]):
        browser.open(pages["sweep"])
        browser.resize(420)
        assert browser.run("document.documentElement.scrollWidth") <= 420
        browser.resize(1280)

    def test_another_plane_of_settings(self, browser: Tab, pages: dict[str, Path]):
        browser.open(pages["sweep"])
        browser.run("(() => { const s = document.querySelector('[data-way=down]'); s.value = 0; s.onchange(); })()")
        browser.run("new Promise(done => setTimeout(done, 500))")
        text = browser.run("document.querySelector('section[id^=stability] .chart').textContent")
        assert "objectives.harmless.threshold" not in text
        assert browser.errors() == []

    def test_figures_take_the_width_there_is(self, browser: Tab, pages: dict[str, Path]):
        browser.open(pages["sweep"])
        width = "document.querySelector('.chart svg').getBoundingClientRect().width"
        wide = browser.run(width)
        browser.resize(420)
        assert browser.run(width) < 420
        browser.resize(1280)
        assert browser.run(width) == wide > 900
