"""`mopo eval`: a run's numbers are its own, many entrants are judged alike, and mistakes are told."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from classifiers import saved
from evaluations import evaluation
from running import TINY, Finished, mopo, read_json

from mopo_cli.base.errors import UserError
from mopo_cli.base.types import Example, Objective
from mopo_cli.config.schema import EvalConfig
from mopo_cli.evaluation.entrants import check_alike, find_entrants, read_answers
from mopo_cli.evaluation.exact import _rates
from mopo_cli.evaluation.measure import Criterion, Judged, measured_by
from mopo_cli.evaluation.records import ExactRates, Measured
from mopo_cli.evaluation.responses import Responded, Subject, evaluated_prompts
from mopo_cli.judging.judges import JudgedResponses, ScoreJudge
from mopo_cli.maths.significance import verdict
from mopo_cli.runs.find import newest_run

Run = Callable[..., Finished]
QUICK = ("evaluation.exact_prompts=8", "evaluation.prompts=16", "sampling.max_new_tokens=12")


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


class TestEntrants:
    """Which runs, models and files are meant; nothing is loaded."""

    def finished(self, path: Path, objectives: str = "[helpful, harmless]") -> Path:
        (path / "model").mkdir(parents=True)
        (path / "summary.json").write_text('{"objectives": {}}')
        names = objectives.strip("[]").split(", ")
        roles = ["primary", *["secondary"] * (len(names) - 1)]
        lines = (f"  {name}: {{role: {role}}}\n" for name, role in zip(names, roles, strict=True))
        (path / "config.yaml").write_text("objectives:\n" + "".join(lines))
        return path

    def found(self, **settings: Any) -> tuple[list[str], list[tuple[str, str]]]:
        entrants, unfinished = find_entrants(EvalConfig(**settings))
        return [e.name for e in entrants], [(Path(u.path).name, u.reason) for u in unfinished]

    def test_a_pattern_a_list_and_a_sweep_stand_for_the_same_runs(self, tmp_path: Path):
        runs = [str(self.finished(tmp_path / "runs" / name)) for name in ("tau=0.1,seed=0", "tau=0.5,seed=0")]
        for asked in (str(tmp_path / "runs" / "*"), runs, str(tmp_path)):
            assert self.found(run=asked) == (["tau=0.1,seed=0", "tau=0.5,seed=0"], [])

    def test_unfinished_ones_are_listed_with_their_state(self, tmp_path: Path):
        self.finished(tmp_path / "a")
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "status.json").write_text('{"state": "interrupted", "step": 7, "error": null}')
        (tmp_path / "c").mkdir()
        (self.finished(tmp_path / "d") / "summary.json").write_text('{"obj')
        (tmp_path / "e.txt").write_text("no directory")
        names, unfinished = self.found(run=str(tmp_path / "*"))
        assert names == ["a"]
        assert unfinished[:2] == [("b", "interrupted, step 7"), ("c", "no run and no model")]
        assert "not whole JSON" in unfinished[2][1]

    def test_none_of_many_is_finished(self, tmp_path: Path):
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
        with pytest.raises(UserError, match=r"no finished run among 2: .*a \(no run and no model\)"):
            self.found(run=str(tmp_path / "*"))

    def test_a_pattern_that_finds_nothing(self, tmp_path: Path):
        with pytest.raises(UserError, match=r"run=.*nope\*: nothing there"):
            self.found(run=str(tmp_path / "nope*"))

    def test_the_same_name_twice_is_told_apart_by_path(self, tmp_path: Path):
        paths = [str(self.finished(tmp_path / sweep / "r")) for sweep in ("x", "y")]
        assert self.found(run=paths)[0] == paths

    def test_mixed_objective_sets_are_named(self, tmp_path: Path):
        for name, objectives in (("a", "[helpful, harmless]"), ("b", "[human, concise]"), ("c", "[human, concise]")):
            self.finished(tmp_path / name, objectives)
        entrants, _ = find_entrants(EvalConfig(run=str(tmp_path / "*")))
        with pytest.raises(UserError) as caught:
            check_alike(entrants)
        assert str(caught.value) == (
            "run: runs with different objectives cannot be compared: harmless, helpful in a; concise, human in b, c. "
            "Evaluate them apart"
        )


class TestFilesOfResponses:
    def read(self, tmp_path: Path, *lines: str) -> Any:
        path = tmp_path / "answers.jsonl"
        path.write_text("".join(line + "\n" for line in lines))
        return read_answers(str(path))

    def test_responses_to_one_prompt_are_put_together(self, tmp_path: Path):
        found = self.read(
            tmp_path,
            '{"prompt": "a", "response": "1"}',
            '{"prompt": "b", "responses": ["2", "3"], "reference": "4"}',
            '{"prompt": "a", "response": "<script>alert(1)</script>"}',
        )
        assert {key: one.responses for key, one in found.items()} == {
            "a": ("1", "<script>alert(1)</script>"),
            "b": ("2", "3"),
        }
        assert found["b"].reference == ("4",)

    def test_a_conversation_is_a_prompt(self, tmp_path: Path):
        found = self.read(tmp_path, '{"prompt": [{"role": "user", "content": "Hi"}], "response": "1"}')
        assert list(found) == ["Human: Hi\n\nAssistant:"]

    @pytest.mark.parametrize(
        ("line", "told"),
        [
            (
                '{"response": "1"}',
                "answers.jsonl:1: prompt must be a string or a list of messages; the row has",
            ),
            ('{"prompt": "a"}', "answers.jsonl:1: response (or responses) is missing; the row has prompt"),
            (
                '{"prompt": "a", "responses": [1]}',
                "answers.jsonl:1: response (or responses) must be a string or",
            ),
            ('{"prompt": "a", ', "answers.jsonl:1: not JSON"),
            ("", "holds no rows"),
        ],
    )
    def test_bad_rows(self, tmp_path: Path, line: str, told: str):
        with pytest.raises(UserError) as caught:
            self.read(tmp_path, line)
        assert told in str(caught.value)

    def test_judged_by_scorers_alone(self, run_here: Run, here: Path):
        """No data, no run, no model: mean scores, and who is better than the file's own reference."""
        rows = [
            {"prompt": f"p{i}", "responses": [f"<script>{i}</script> and so on $x_{i}$", "short"], "reference": "a b c"}
            for i in range(6)
        ]
        (here / "$mine$.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        done = run_here("eval", "responses='$mine$.jsonl'", "scorers=[length,matches]", "dir=out")
        assert done.status == 0, done.err
        found = read_json(here / "out" / "evaluation.json")["evaluations"][0]
        assert found["scorers"]["length"]["score"] == 3.0  # of 5 and 1 words
        assert found["scorers"]["length"]["reference_win_rate"] == 0.5  # 5 words beat 3, 1 does not
        assert found["scorers"]["length"]["win_rate"] is None  # no data to compare with
        assert found["kl"] is None
        lines = [json.loads(line) for line in (here / "out" / "scores.jsonl").read_text().splitlines()]
        assert lines[0]["response"] in [row["responses"][0] for row in rows]
        assert lines[0]["score"] == {"length": 5.0, "matches": 0.0}
        assert lines[0]["normalised_score"]["length"] == 2.0  # 3 words on average and no spread
        assert (here / "out" / "figures" / "evaluation.png").stat().st_size > 10_000

    def test_against_data_by_functions(self, run_here: Run, here: Path):
        """Prompts are matched with the data's, and an objective's own function judges."""
        rows = [{"prompt": f"p{i}", "chosen": "one two three", "rejected": "one"} for i in range(60)]
        (here / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        asked = [{"prompt": f"p{i}", "response": "one two"} for i in range(60)] + [{"prompt": "new", "response": "x"}]
        (here / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
        done = run_here(
            "eval", "responses=mine.jsonl", "dataset=pairs", "dataset.path=data.jsonl", "dataset.chosen_means=human",
            "objectives=human_concise", "objectives.concise.threshold=0.4", "scorers=[overlap]",
            "scorers.overlap.objective=human", "dir=out",
        )  # fmt: skip
        assert done.status == 0, done.err
        concise = read_json(here / "out" / "evaluation.json")["evaluations"][0]["objectives"]["concise"]
        assert concise["win_rate"] == 0.5  # shorter than one response, longer than the other
        assert (concise["judge"], concise["satisfied_with_confidence"]) == ("computed", "yes")
        assert "prompts in responses=mine.jsonl are no test prompts of the data" in done.err

    @pytest.mark.parametrize(
        ("prompts", "topics", "told"),
        [
            (20, 0, "20 test prompts: too few for an interval"),
            (60, 20, "60 test prompts, 20 of them independent: too few for an interval"),
            (60, 40, None),
        ],
    )
    def test_few_independent_prompts(self, run_here: Run, here: Path, prompts: int, topics: int, told: str | None):
        """Answers that all win are no proof where there are few: no interval, no verdict, a warning with the number."""
        rows = [
            {"prompt": f"p{i}", "chosen": "one two three", "rejected": "one two", "topic": i % topics if topics else i}
            for i in range(prompts)
        ]
        (here / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        asked = [{"prompt": f"p{i}", "response": "one"} for i in range(prompts)]
        (here / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
        done = run_here(
            "eval", "responses=mine.jsonl", "dataset=pairs", "dataset.path=data.jsonl", "dataset.chosen_means=human",
            "dataset.group=topic", "objectives=human_concise", "objectives.concise.threshold=0.6", "scorers=[overlap]",
            "scorers.overlap.objective=human", "dir=out",
        )  # fmt: skip
        assert done.status == 0, done.err
        found = read_json(here / "out" / "evaluation.json")["evaluations"][0]
        concise = found["objectives"]["concise"]
        assert (found["prompts"], found["independent_prompts"]) == (prompts, topics or prompts)
        assert concise["win_rate"] == 1.0
        verdict, low = concise["satisfied_with_confidence"], concise["win_rate_ci95"][0]
        assert (verdict, low is None) == (("yes", False) if told is None else ("undecided", True))
        assert (found["scorers"] or found["objectives"])["human"]["score_ci95"][0] is None or told is None
        assert (told is None) or (told in done.err)
        assert "± 0.000" not in done.out
        assert f"{prompts} test prompts" in done.out

    @pytest.mark.parametrize(
        ("overrides", "told"),
        [
            ((), "objectives: none, and no scorers; give scorers=[NAME]"),
            (("scorers=[humor]",), "scorers.humor.objective=humor: no such objective; the set has none"),
            (("objectives=human_concise",), "objectives.human: nothing judges it: no gold scorer (scorers=[NAME])"),
            (("scorers=[lenght]",), "scorers=lenght: no such option (did you mean length?)"),
            (("scorers=[length]", "functions=[my.scorers]"), "not in a module whose functions a scorer may call"),
            (
                ("scorers=[length]", "normalisation=answers.jsonl"),
                "normalisation=answers.jsonl: not an evaluation.json",
            ),
            (("scorers=[classifier]",), "scorers.classifier.path: not set; give a hub id or a model directory"),
            (("sampling.temperature=0",), "sampling.temperature=0.0: must be above 0"),
            (("evaluation.prompts=0",), "evaluation.prompts=0: must be 1 or more"),
            (("judge=nowhere",), "judge=nowhere: no finished run there"),
        ],
    )
    def test_mistakes(self, run_here: Run, here: Path, overrides: tuple[str, ...], told: str):
        (here / "answers.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
        done = run_here("eval", "responses=answers.jsonl", *overrides)
        assert done.status == 2, done.out
        assert told in done.err
        assert done.err.count("\n") == 1


class TestExactNumbers:
    """Conditional on the world's responses: they settle a threshold as far as the policy gives those."""

    def measured(self, threshold: float) -> Measured:
        told = verdict((0.469, 0.546), threshold)
        return Measured("secondary", threshold, 0.507, (0.469, 0.546), None, False, "exact", told)

    @pytest.mark.parametrize(
        ("exact", "mass", "threshold", "settled"),
        [
            (0.60, 0.001, 0.55, (False, "no")),  # the case that said yes: the samples decide, not the exact number
            (0.60, 0.001, 0.52, (False, "undecided")),
            (0.60, 1.0, 0.55, (True, "yes")),
            (0.54, 1.0, 0.55, (False, "no")),
            (0.60, 0.95, 0.55, (True, "yes")),  # at least 0.57
            (0.57, 0.95, 0.52, (True, "yes")),  # at least 0.5415
            (0.53, 0.98, 0.52, (False, "undecided")),  # between 0.519 and 0.539
            (0.40, 0.95, 0.50, (False, "no")),  # at most 0.43
        ],
    )
    def test_settle_by_their_mass(self, exact: float, mass: float, threshold: float, settled: tuple[bool, str]):
        found = self.measured(threshold).settled(exact, (mass * exact, mass * exact + 1 - mass))
        assert (found.satisfied, found.satisfied_with_confidence) == settled
        assert found.exact_win_rate == exact

    def test_of_few_prompts_settle_nothing(self):
        rates = ExactRates({"a": 0.6}, {"a": (0.6, 0.6)}, 1.0, 24, 24)
        assert self.measured(0.55).settled(0.6, rates.bounds_of("a")).satisfied_with_confidence == "no"
        assert replace(rates, independent_prompts=30).bounds_of("a") == (0.6, 0.6)

    def test_bounds_hold_whatever_else_the_policy_says(self):
        """Two prompts that differ in mass and in what they win: E m w, not E m times E w."""
        win_rates = np.array([[[0.2], [0.4]], [[0.8], [1.0]]])
        conditional = np.log([[0.5, 0.5], [0.25, 0.75]])
        asked = [Example(f"p{i}", (), (), (), group="g") for i in range(2)]
        found = _rates(["a"], conditional, win_rates, np.array([0.9, 0.1]), asked)
        assert found.win_rate["a"] == pytest.approx((0.3 + 0.95) / 2)
        assert found.bounds["a"] == pytest.approx(((0.27 + 0.095) / 2, (0.27 + 0.095) / 2 + 0.5))
        assert (found.support_mass, found.prompts, found.independent_prompts) == (pytest.approx(0.5), 2, 1)

    def test_low_mass_and_few_prompts_are_warnings(self):
        found = evaluation({"a": self.measured(0.55)}, 0.3)
        assert found.doubts == []
        assert replace(found, support_mass=0.95).doubts == []
        (doubt,) = replace(found, support_mass=0.001).doubts
        assert doubt.startswith("exact win rates are of the world's responses, which are 0.1% of what the policy says")
        (doubt,) = replace(found, prompts=2, independent_prompts=1).doubts
        assert doubt.startswith("2 test prompts, 1 of them independent: too few for an interval")


class TestThresholds:
    def measured(self, threshold: float | None, *rates: float) -> Measured:
        """One objective of an entrant whose samples win so often."""
        column = Criterion(
            "kind", ScoreJudge(lambda rows: np.zeros(len(rows)), "gold"), Objective("kind", "secondary", "kind")
        )
        subject = Subject("a", "a", "model", {} if threshold is None else {"kind": threshold})
        judged = Judged(column, [np.array([rate]) for rate in rates], [], None, None)
        return measured_by(Responded(subject, JudgedResponses([])), judged, np.arange(len(rates)))

    @pytest.mark.parametrize(
        ("threshold", "satisfied"),
        [(0.5, True), (0.51, False), (0.55, False), (0.6, False), (0.45, True), (None, None)],
    )
    def test_are_kept_at_the_win_rate_and_above_no_higher(self, threshold: float | None, satisfied: bool | None):
        found = self.measured(threshold, *[0.25, 0.75] * 20)
        assert found.win_rate == 0.5
        assert found.satisfied is satisfied


class TestPrompts:
    def test_are_asked_once_with_all_responses_of_the_data(self):
        rows = [Example("a", ("1", "2"), ((0, 1),), ((1.0,),)), Example("b", ("3", "4"), (), ())]
        rows.append(Example("a", ("2", "5"), ((0, 1),), ((0.0,),)))
        rows.append(Example("a", ("6", "7"), (), (), context="another one"))
        found = evaluated_prompts(rows, 10, seed=0)
        assert sorted((e.prompt, e.context, e.responses) for e in found) == [
            ("a", "", ("1", "2", "2", "5")),
            ("a", "another one", ("6", "7")),
            ("b", "", ("3", "4")),
        ]
        assert len(evaluated_prompts(rows, 2, seed=0)) == 2
        assert evaluated_prompts(rows, 3, seed=0) == found


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
        for name, told in summary["objectives"].items():  # the same seed samples the same responses
            assert told.items() <= found["objectives"][name].items()
            assert found["objectives"][name]["exact_win_rate"] == summary["oracle"]["win_rate"][name]
            assert 0 < found["objectives"][name]["reference_win_rate"] < 1
        assert found["kl"] == summary["kl"]
        assert found["normalisation"]["helpful"]["fitted_on"] == "the reference of run"
        assert f"evaluation     {Path('outputs/train/run/evaluation.json')}\n" in done.out
        assert "harmless" in done.out

    def test_with_another_seed_and_size(self, run: Path, run_here: Run):
        samples = (run / "samples.jsonl").read_text()
        assert run_here("eval", f"run={run}", *QUICK, "evaluation.prompts=8", "evaluation.responses=2").status == 0
        found = self.evaluated(run)
        assert (found["prompts"], found["responses"], found["seed"]) == (8, 16, 1)
        assert found["oracle"] == read_json(run / "summary.json")["oracle"]
        assert found["objectives"] != read_json(run / "summary.json")["objectives"]
        assert len((run / "samples.jsonl").read_text().splitlines()) == 16 != len(samples.splitlines())

    def test_many_at_once_with_a_gold_scorer(self, run: Path, smoke: Path, here: Path, run_here: Run):
        """Two equal runs, their model without its run, a file of the run's own samples, and an unfinished run."""
        shutil.copytree(smoke, run.parent / "twin")
        shutil.copytree(smoke / "model", run.parent / "plain")
        torn = shutil.copytree(smoke, run.parent / "torn")
        (torn / "model" / "model.safetensors").write_bytes(b"torn")
        (run.parent / "stopped").mkdir()
        (run.parent / "stopped" / "status.json").write_text('{"state": "running", "step": 3, "error": null}')
        judge = saved(here / "judge", "gpt2")
        done = run_here(
            "eval", "run=outputs/train/*", *QUICK, "scorers=[helpful_gpt2,length]",
            f"scorers.helpful_gpt2.path={judge}", f"judge={run}", "model.max_length=512", "dir=out",
        )  # fmt: skip
        assert done.status == 0, done.err
        assert "left out: outputs/train/stopped (running, step 3)" in done.err
        record = read_json(here / "out" / "evaluation.json")
        assert [Path(one["path"]).name for one in record["unfinished"]] == ["stopped", "torn"]
        plain, first, twin = record["evaluations"]
        assert [one["name"] for one in record["evaluations"]] == ["plain", "run", "twin"]
        assert (plain["kind"], first["kind"]) == ("model", "run")
        assert first["objectives"] == twin["objectives"]
        assert first["kl"] == twin["kl"]
        assert first["objectives"]["helpful"]["judge"] == "scorer helpful_gpt2"
        assert first["objectives"]["harmless"]["judge"] == "exact"
        assert plain["objectives"]["harmless"]["threshold"] == first["objectives"]["harmless"]["threshold"]
        exact = [one["objectives"]["harmless"]["exact_win_rate"] for one in (plain, first)]
        assert exact[0] == pytest.approx(exact[1], abs=1e-6)  # the same weights
        assert plain["kl"] is None
        assert first["scorers"]["length"]["score"] == pytest.approx(first["wording"]["words"])
        assert [c["dominates"] for c in record["comparisons"]] == [None] * 3  # the twins, and the same samples again
        names = {json.loads(line)["run"] for line in (here / "out" / "scores.jsonl").read_text().splitlines()}
        assert names == {"plain", "run", "twin"}

        # Later, on the same scale: what was fitted then is taken, whatever is evaluated now.
        scale = record["normalisation"]
        done = run_here(
            "eval", f"responses={run}/samples.jsonl", f"judge={run}", *QUICK, "scorers=[length]", "dir=later",
            "normalisation=out/evaluation.json",
        )  # fmt: skip
        assert done.status == 0, done.err
        later = read_json(here / "later" / "evaluation.json")
        assert later["normalisation"]["length"] == scale["length"]
        own = read_json(run / "summary.json")["objectives"]["harmless"]["win_rate"]
        assert later["evaluations"][0]["objectives"]["harmless"]["win_rate"] == pytest.approx(own, abs=1e-3)

    def test_a_plain_model_against_another_one(self, run: Path, here: Path, run_here: Run):
        """Compared with itself, a model is at parity, at no distance."""
        plain = shutil.copytree(run / "model", here / "plain")
        shutil.copytree(run / "reference", here / "before")
        data = ("dataset=assistant", "dataset.max_rows=400", "objectives=assistant", "model.max_length=512")
        assert "a plain model, with no data of its own" in run_here("eval", f"run={plain}", *QUICK).err
        done = run_here("eval", f"run={plain}", "reference=plain", *data, *QUICK, "dir=itself")
        assert done.status == 0, done.err
        found = read_json(here / "itself" / "evaluation.json")["evaluations"][0]
        assert found["kl"] == pytest.approx(0.0, abs=1e-6)
        assert found["objectives"]["helpful"]["reference_win_rate"] == pytest.approx(0.5, abs=0.15)
        done = run_here("eval", f"run={plain}", "reference=before", *data, *QUICK, "dir=before_it", "seed=0")
        assert done.status == 0, done.err
        kl = read_json(here / "before_it" / "evaluation.json")["evaluations"][0]["kl"]
        assert kl != 0.0

    def test_a_preference_model_judges_what_is_not_exact(self, here: Path, run_here: Run):
        """On data of one's own, the judging run's preference model; through another tokenizer as well."""
        rows = [
            {"prompt": f"say {i % 7}", "chosen": f"yes {i % 5} of course", "rejected": f"no {i % 3}"}
            for i in range(200)
        ]
        (here / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        own = ("dataset=pairs", "dataset.path=data.jsonl", "dataset.chosen_means=human", "objectives=human_concise")
        trained = run_here("train", *TINY, *own, "dataset.max_rows=null", "run.dir=a", "dataset.test_fraction=0.3")
        assert trained.status == 0, trained.err
        done = run_here("eval", "run=a", *QUICK, "seed=0")
        assert done.status == 0, done.err
        found, summary = read_json(here / "a" / "evaluation.json"), read_json(here / "a" / "summary.json")
        assert found["objectives"]["human"]["judge"] == "preference model"
        assert found["objectives"]["concise"]["judge"] == "computed"
        assert found["objectives"]["human"]["win_rate"] == pytest.approx(summary["objectives"]["human"]["win_rate"])
        assert found["oracle"] is None
        answers = here / "mine.jsonl"
        answers.write_text("".join(json.dumps({"prompt": f"say {i}", "response": "no"}) + "\n" for i in range(7)))
        done = run_here(
            "eval",
            "responses=mine.jsonl",
            "judge=a",
            "dir=out",
        )
        assert done.status == 0, done.err
        human = read_json(here / "out" / "evaluation.json")["evaluations"][0]["objectives"]["human"]
        assert human["judge"] == "preference model"
        assert 0 < human["win_rate"] < 1
        (here / "a" / "preference_model" / "preference_model.safetensors").write_bytes(b"torn")
        done = run_here("eval", "run=a")
        assert done.status == 2
        assert "a/preference_model: preference_model.safetensors is not what was written" in done.err
