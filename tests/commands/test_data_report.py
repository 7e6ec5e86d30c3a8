"""`mopo data`: the statistics by hand and against the exact world, what it warns about, and what it prints."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import kendalltau, spearmanr

from mopo_cli import cli
from mopo_cli.base import files
from mopo_cli.base.types import Example, Objective, PreferenceData
from mopo_cli.commands import data
from mopo_cli.data import description, statistics
from mopo_cli.data.assistant import World, assistant
from mopo_cli.data.description import Description, describe, notes_of, warnings_of
from mopo_cli.data.statistics import PairArrays, WithError, tabulate, within_rows

NAN = math.nan
PAIRS3 = ((0, 1), (0, 2), (1, 2))
CIRCLE, ORDER = ((1.0,), (0.0,), (1.0,)), ((1.0,), (1.0,), (1.0,))  # a > b > c, and c > a or a > c


def row(
    labels: tuple[tuple[float, ...], ...], prompt: str = "Q", responses: tuple[str, ...] = ("a", "b", "c")
) -> Example:
    return Example(prompt, responses, PAIRS3[: len(labels)], labels)


def pairs(*labels: tuple[float, ...], responses: tuple[str, ...] = ("one", "one two")) -> list[Example]:
    """A two-response row for each label, each with a prompt of its own."""
    return [Example(f"Q{i}", responses, ((0, 1),), (label,)) for i, label in enumerate(labels)]


def ranked(scores: np.ndarray) -> list[Example]:
    """Rows of noiseless labels from scores (N, G, K)."""
    size = scores.shape[1]
    every = tuple(combinations(range(size), 2))
    texts = tuple(f"text {i}" for i in range(size))
    return [
        Example(f"Q{n}", texts, every, tuple(tuple((s[a] > s[b]) + 0.5 * (s[a] == s[b])) for a, b in every))
        for n, s in enumerate(scores)
    ]


def described(
    train: list[Example], test: list[Example] | None = None, heldout: list[Example] | None = None, names: str = "a b"
) -> Description:
    roles = ["primary", *["secondary"] * 9]
    objectives = tuple(Objective(name, role, name) for name, role in zip(names.split(), roles, strict=False))
    return describe(PreferenceData(objectives, train, heldout or [], test or [], {"corpus": "a test"}))


class TestEstimates:
    def test_errors_count_clusters(self):
        found = statistics.mean(np.array([1.0, 0.0, 1.0, 1.0, NAN]), np.array([5, 5, 9, 9, 9]))
        # deviations from 0.75 add up to -0.5 and 0.5 in the clusters; sqrt((1/8)^2 * 2 * 2/(2-1)) = 0.25
        assert found == WithError(0.75, pytest.approx(0.25), 4)  # type: ignore[arg-type]
        one_each = statistics.mean(np.array([1.0, 0.0, 1.0, 1.0]), np.arange(4))
        assert one_each.se == pytest.approx(math.sqrt(0.75 / 3 / 4))  # the usual s / sqrt(n)

    def test_a_ratio_of_sums(self):
        found = statistics.ratio(np.array([1.0, 2.0]), np.array([2.0, 2.0]), np.array([0, 1]))
        assert found == WithError(0.75, pytest.approx(0.25), 4)  # type: ignore[arg-type]
        assert math.isnan(statistics.ratio(np.zeros(3), np.zeros(3), np.arange(3)).value)
        assert math.isnan(statistics.ratio(np.ones(3), np.ones(3), np.zeros(3, int)).se)

    def test_wilson_by_hand(self):
        low, high = statistics.wilson(WithError(1.0, 0.0, 10), 10)
        assert low == pytest.approx(10 / (10 + statistics.Z95**2))
        assert high == pytest.approx(1.0)
        low, high = statistics.wilson(WithError(0.5, 0.05, 100), 100)
        assert low == pytest.approx(0.4038, abs=1e-4)
        assert high == pytest.approx(0.5962, abs=1e-4)
        wider = statistics.wilson(WithError(0.5, 0.1, 100), 25)  # the error says: worth 25 observations
        assert wider[0] == pytest.approx(0.3170, abs=1e-3)


class TestPairStatistics:
    def test_tabulate(self):
        prompt = [{"role": "user", "content": "Why is it so?"}]
        examples = [row(ORDER, responses=("x", "x", "x y z")), Example(prompt, ("a b", "c"), ((1, 0),), ((NAN,),))]
        table = tabulate([*examples, examples[0]])
        assert table.row.tolist() == [0, 0, 0, 1, 2, 2, 2]
        assert table.longer.tolist() == [0, -2, -2, -1, 0, -2, -2]
        assert table.identical.tolist() == [True, False, False, False, True, False, False]
        assert table.prompt.tolist() == [0, 1, 0]
        assert table.cluster.tolist() == [0, 0, 0, 1, 0, 0, 0]
        assert table.prompt_words.tolist() == [1, 6, 1]  # with the names of a transcript
        assert table.response_words.tolist() == [1, 1, 3, 2, 1, 1, 1, 3]

    def test_agreement_is_among_the_pairs_that_both_decided(self):
        table = tabulate(pairs((1, 1), (0, 0), (1, 0), (0.7, 1), (0.5, 1), (1, 0.5), (NAN, 1)))
        share, (low, high) = statistics.sign_agreement(table, 0, 1)
        assert (share.value, share.n) == (0.75, 4)
        assert 0 < low < 0.75 < high < 1
        share, interval = statistics.sign_agreement(tabulate(pairs((1, NAN), (NAN, 1))), 0, 1)
        assert share.n == 0
        assert all(map(math.isnan, (share.value, *interval)))

    def test_longer_by_hand(self):
        rows = pairs((1,), (0,), (0.5,), (NAN,), responses=("one two three", "one"))  # 2 words longer
        rows += pairs((0,), responses=("one", "one two")) + pairs((1,), responses=("as long", "as this"))
        share, correlation = statistics.longer_preferred(tabulate(rows), 0)
        assert (share.value, share.n) == (pytest.approx(2 / 3), 3)
        # s d: 2, -2, 0, 1, 0; s^2: 1 1 0 1 1; d^2: 4 4 4 1 0
        assert correlation == pytest.approx(1 / math.sqrt(4 * 13))

    def test_longer_does_not_depend_on_which_response_is_first(self):
        rows = pairs((1,), (0,), (1,), responses=("one two three", "one"))
        turned = [Example(e.prompt, e.responses[::-1], e.pairs, ((1 - e.labels[0][0],),)) for e in rows]
        assert statistics.longer_preferred(tabulate(rows), 0) == statistics.longer_preferred(tabulate(turned), 0)


class TestWithinRows:
    def test_an_order_and_a_circle(self):
        found = within_rows(tabulate([row(ORDER), row(CIRCLE)]))
        np.testing.assert_allclose(found.cross[:, 0, 0], [1 / 3, -1])
        assert found.cyclic[:, 0].tolist() == [0, 1]
        assert found.triples[:, 0].tolist() == [1, 1]
        assert found.ranks[0, 0, 0] == pytest.approx(1)
        assert math.isnan(found.ranks[1, 0, 0])  # everyone won once: no ranks

    def test_ties_and_missing_labels(self):
        found = within_rows(tabulate([row(((1.0,), (0.5,), (1.0,))), row(((1.0,), (NAN,), (1.0,)))]))
        assert found.triples[:, 0].tolist() == [0, 0]
        # s: a>b 1, a=c 0, b>c 1; a: 1*0, b: -1*1, c: 0*-1
        assert found.cross[0, 0, 0] == pytest.approx(-1 / 3)
        assert found.cross[1, 0, 0] == pytest.approx(-1)  # only b has two opponents
        assert found.ranks[1, 0, 0] == pytest.approx(1)

    def test_rows_of_two_say_nothing(self):
        found = within_rows(tabulate(pairs((1, 1), (0, 1))))
        assert np.isnan(found.cross).all()
        assert np.isnan(found.ranks).all()
        assert found.triples.sum() == 0

    @pytest.mark.parametrize("ties", [False, True])
    def test_ranks_are_spearmans(self, ties: bool):
        rng = np.random.default_rng(0)
        scores = rng.normal(size=(5, 6, 2))
        scores = np.round(scores) if ties else scores
        found = within_rows(tabulate(ranked(scores)))
        for n in range(5):
            expected: Any = spearmanr(scores[n, :, 0], scores[n, :, 1])[0]
            assert found.ranks[n, 0, 1] == pytest.approx(expected)
        np.testing.assert_allclose(found.ranks, found.ranks.swapaxes(1, 2))

    def test_triples_make_spearman_out_of_kendall(self):
        """(n + 1) r_s = 3 tau + (n - 2) rho, where rho = 3 mean(s s') over triples estimates r_s for n = infinity."""
        scores = np.random.default_rng(1).normal(size=(4, 7, 2))
        found = within_rows(tabulate(ranked(scores)))
        for n in range(4):
            tau: Any = kendalltau(scores[n, :, 0], scores[n, :, 1])[0]
            assert 8 * found.ranks[n, 0, 1] == pytest.approx(3 * tau + 5 * 3 * found.cross[n, 0, 1])
        np.testing.assert_allclose(3 * found.cross[:, 0, 0], 1)

    def test_blocks_do_not_change_the_answer(self, monkeypatch: pytest.MonkeyPatch):
        rng = np.random.default_rng(2)
        table = tabulate(ranked(rng.normal(size=(9, 5, 2))) + ranked(rng.normal(size=(9, 3, 2))) + pairs((1, 0)))
        whole = within_rows(table)
        monkeypatch.setattr(statistics, "BLOCK", 100)
        parts = within_rows(table)
        for name in ("cross", "ranks", "cyclic", "triples"):
            np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))


class TestTrueCorrelation:
    @pytest.fixture(scope="class")
    def world_table(self) -> tuple[World, PairArrays]:
        corpus = assistant(rows=3000)
        assert isinstance(corpus.world, World)
        return corpus.world, tabulate(list(corpus.examples))

    def test_matches_the_exact_correlation_of_the_embedded_world(self, world_table: tuple[World, PairArrays]):
        world, table = world_table
        moments = np.zeros((3, 3))
        one_each = {topic: prompt for prompt, topic in world.prompts.items()}.values()  # phrasing does not matter
        for prompt in one_each:
            centred = world.win_rates(prompt) - 0.5
            moments += centred.T @ (centred * world.mu(prompt)[:, None]) / len(one_each)
        within = within_rows(table)
        for j, k in combinations(range(3), 2):
            exact = moments[j, k] / math.sqrt(moments[j, j] * moments[k, k])
            found = statistics.true_correlation(within.cross, table.prompt, j, k)
            counted = statistics.mean(within.ranks[:, j, k], table.prompt)
            assert abs(found.value - exact) < 3 * found.se
            assert found.se < 0.05  # of 72 topics, whose phrasings count once
            assert abs(counted.value) < 0.6 * abs(exact)  # what correcting is for
        signal = statistics.mean(3 * within.cross[:, 0, 0], table.prompt)
        assert abs(signal.value - 12 * moments[0, 0]) < 3 * signal.se

    def test_without_noise_it_is_the_rank_correlation_of_the_population(self):
        rng = np.random.default_rng(3)
        scores = rng.multivariate_normal([0, 0], [[1, 0.9], [0.9, 1]], size=(2000, 4))
        table = tabulate(ranked(scores))
        found = statistics.true_correlation(within_rows(table).cross, table.prompt, 0, 1)
        exact = 6 / math.pi * math.asin(0.9 / 2)  # Spearman's correlation of a bivariate normal
        assert abs(found.value - exact) < 3 * found.se < 0.05

    def test_the_same_noise_in_both_labels_of_a_pair_does_not_count_as_agreement(self):
        """One judge who answers at random, but the same for both questions: agreement 1, and nothing to correct."""
        rng = np.random.default_rng(4)
        flips = rng.integers(0, 2, size=(600, 3)).astype(float)
        table = tabulate([row(tuple((x, x) for x in flip), prompt=f"Q{n}") for n, flip in enumerate(flips)])
        assert statistics.sign_agreement(table, 0, 1)[0].value == 1
        assert math.isnan(statistics.true_correlation(within_rows(table).cross, table.prompt, 0, 1).value)

    def test_coin_flips_give_no_correlation(self):
        rng = np.random.default_rng(5)
        order = ranked(rng.normal(size=(300, 3, 1)))
        flips = rng.integers(0, 2, size=(300, 3)).astype(float)
        rows = [
            replace(e, labels=tuple((a[0], b) for a, b in zip(e.labels, f, strict=True)))
            for e, f in zip(order, flips, strict=True)
        ]
        found = described(rows)
        assert math.isnan(found.relations[0].correlation.value)
        assert found.relations[0].verdict == description.UNCLEAR


class TestVerdicts:
    @pytest.mark.parametrize(
        ("interval", "prompts", "verdict"),
        [
            ((0.8, 0.9), 100, "same order"),
            ((0.79, 0.95), 100, "pull together"),
            ((0.01, 0.2), 100, "pull together"),
            ((-0.2, -0.01), 100, "conflict"),
            ((-0.1, 0.2), 100, "unrelated"),
            ((-0.1, 0.3), 100, "too noisy"),
            ((NAN, NAN), 100, "too noisy"),
            ((1.0, 1.0), 29, "too few"),
            ((NAN, NAN), 0, "not compared"),
        ],
    )
    def test_claims_no_more_than_the_interval(self, interval: tuple[float, float], prompts: int, verdict: str):
        assert description._verdict(interval, prompts) == verdict

    def test_two_responses_use_the_sign_agreement(self):
        found = described(pairs(*[(1, 1)] * 60, *[(0, 1)] * 20))
        relation = found.relations[0]
        assert relation.method == "signs"
        assert relation.agreement.value == 0.75
        assert relation.correlation.value == 0.5
        assert relation.ci95[0] < 0.5 < relation.ci95[1]
        assert relation.verdict == "pull together"

    def test_few_pairs_that_all_agree_do_not_warn(self):
        assert (
            described(pairs(*[(1, 1), (0, 0)] * 15)).relations[0].verdict == "pull together"
        )  # 30: not yet sure of 0.8
        assert described(pairs(*[(1, 1), (0, 0)] * 50)).relations[0].verdict == "same order"


class TestWarnings:
    def test_constraints_that_cannot_bind(self):
        rng = np.random.default_rng(6)
        scores = rng.normal(size=(200, 4, 1)) + 0.1 * rng.normal(size=(200, 4, 3))
        found = described(ranked(scores), names="helpful honest kind")
        texts = warnings_of(found)
        assert [text.split()[:3] for text in texts] == [["helpful", "and", "honest"], ["helpful", "and", "kind"]]
        assert "its multiplier stays 0, and the method reduces to maximising helpful alone" in texts[0]
        assert notes_of(found) == ["honest and kind rank responses alike: one constraint would do for both"]

    def test_two_responses_that_agree(self):
        (text,) = warnings_of(described(pairs(*[(1, 1), (0, 0)] * 100)))
        assert "a and b prefer the same response in 100 % of the pairs (correlation 1.00, at least 0.96)" in text

    def test_noise_does_not_hide_that_objectives_agree(self):
        """Bradley-Terry labels of nearly one score: counted win rates correlate by 0.3, the true ones by 0.99."""
        rng = np.random.default_rng(7)
        scores = 1.5 * (rng.normal(size=(1500, 4, 1)) + 0.05 * rng.normal(size=(1500, 4, 2)))
        every = tuple(combinations(range(4), 2))
        texts = ("a", "b", "c", "d")
        draws = [
            tuple(tuple((rng.random(2) < 1 / (1 + np.exp(s[b] - s[a]))).astype(float)) for a, b in every)
            for s in scores
        ]
        found = described([Example(f"Q{n}", texts, every, labels) for n, labels in enumerate(draws)])
        assert found.relations[0].observed.value < 0.6
        assert found.relations[0].verdict == "same order"
        assert len(warnings_of(found)) == 1

    def test_few_labelled_pairs(self):
        rng = np.random.default_rng(8)
        flips = rng.integers(0, 2, size=(300, 2)).astype(float)
        labels = [(a, b if i < 99 else NAN) for i, (a, b) in enumerate(flips)]
        (text,) = warnings_of(described(pairs(*labels)))
        assert text.startswith("b: only 99 labelled pairs to train on")
        held = [replace(e, prompt=f"H{i}") for i, e in enumerate(pairs(*labels[:50]))]
        assert warnings_of(described(pairs(*labels), heldout=held)) == [text]  # held-out pairs do not train

    @pytest.mark.parametrize(
        ("label", "said"),
        [(0.5, "every label is a tie"), (0.0, "every label prefers the second response of its pair")],
    )
    def test_constant_labels(self, label: float, said: str):
        rows = pairs(*[(float(i % 2), label) for i in range(200)])
        (text,) = warnings_of(described(rows))
        assert text.startswith(f"b: {said}")

    def test_chosen_first_is_a_note_for_pairs_and_a_warning_for_lists(self):
        rows = pairs(*[(1.0, float(i % 2)) for i in range(200)])
        found = described(rows)
        assert warnings_of(found) == []
        assert notes_of(found) == [
            "every label of a prefers the first response, as it should where rows are chosen / rejected"
        ]
        found = described([replace(row(ORDER), prompt=f"Q{n}") for n in range(200)], names="a")
        assert warnings_of(found) == [
            "a: every label prefers the first response of its pair; check how the labels are made"
        ]

    def test_a_position_that_wins(self):
        rows = pairs(*[(float(i % 10 < 7),) for i in range(500)])
        (text,) = notes_of(described(rows, names="a"))
        assert text.startswith("a prefers the first of two responses in 70 % of the decided pairs")
        assert notes_of(described(pairs(*[(float(i % 2),) for i in range(500)]), names="a")) == []

    def test_labels_without_an_order(self):
        flips = np.random.default_rng(9).integers(0, 2, size=(300, 3, 1)).astype(float)
        rows = [row(tuple(map(tuple, flip)), prompt=f"Q{n}") for n, flip in enumerate(flips)]
        (text,) = warnings_of(described(rows, names="a"))
        assert text.startswith("a: no response wins more often than others beyond chance")

    def test_labels_that_go_in_circles(self):
        rows = [row(CIRCLE if n % 2 else ORDER, prompt=f"Q{n}") for n in range(200)]
        found = described(
            [replace(e, labels=tuple((1 - x[0],) for x in e.labels)) if n % 4 < 2 else e for n, e in enumerate(rows)],
            names="a",
        )
        assert found.objectives["a"].cyclic.value == 0.5
        assert any(text.startswith("a goes in circles: 50 % of triples") for text in notes_of(found))
        assert warnings_of(found) == []

    def test_test_prompts_that_were_trained_on(self):
        rows = pairs(*[(float(i % 2),) for i in range(200)])
        found = described(
            rows[:150], heldout=rows[150:], test=[rows[0], rows[160], replace(rows[0], prompt="new")], names="a"
        )
        assert found.test_prompts_seen == 2
        assert warnings_of(found)[0].startswith("2 of 3 test prompts are in the training or held-out rows as well")

    def test_objectives_that_were_never_compared(self):
        rows = pairs(*[(float(i % 2), NAN) if i < 200 else (NAN, float(i % 2)) for i in range(400)])
        found = described(rows, names="helpful harmless")
        assert found.relations[0].verdict == "not compared"
        assert notes_of(found) == [
            "helpful and harmless were never judged on the same pair: whether they conflict shows only once a "
            "preference model is trained"
        ]

    def test_a_conflict(self):
        scores = np.random.default_rng(10).normal(size=(200, 4, 1)) * [1, -1]
        assert notes_of(described(ranked(scores))) == ["a conflicts with b: maximising a alone would cost them"]


class TestDescription:
    def test_numbers_by_hand(self):
        train = [*pairs((1, NAN), (0, 0.5), (0.5, 1)), row(((1, 1), (1, 0), (0, NAN)), prompt="Q1")]
        test = pairs((1, 1), responses=("same", "same"))
        found = described(train, test=[replace(test[0], prompt="T")])
        assert found.parts["train"] == description.Part(rows=4, prompts=3, labelled_pairs=6)
        assert found.parts["heldout"] == description.Part(0, 0, 0)
        assert found.parts["test"] == description.Part(1, 1, 1)
        assert (found.responses.min, found.responses.median, found.responses.max) == (2, 2, 3)
        assert found.identical_pairs == pytest.approx(1 / 7)
        b = found.objectives["b"]
        assert (b.role, b.source, b.computed, b.labelled_pairs, b.training_pairs) == ("secondary", "b", False, 5, 4)
        assert (b.judged, b.first, b.ties, b.second) == (pytest.approx(5 / 7), 0.6, 0.2, 0.2)
        assert (b.first_wins.value, b.first_wins.n) == (0.75, 4)
        assert (b.cyclic.n, found.objectives["a"].cyclic.n) == (0, 1)


class TestCommand:
    def run(self, *arguments: str) -> int:
        return cli.main(["data", "dataset.rows=300", *arguments])

    def test_plain_output(self, capsys: pytest.CaptureFixture[str]):
        assert self.run() == 0
        out, err = capsys.readouterr()
        lines = out.splitlines()
        assert lines[0] == "the embedded world (mopo_cli/data/assistant.py)"
        assert any(line.split()[:3] == ["helpful", "primary", "100.0"] for line in lines)
        assert any(line.startswith("helpful – harmless") and line.endswith("conflict") for line in lines)
        assert all(line == line.rstrip() and len(line) <= 100 for line in lines)
        assert "\x1b" not in out
        assert "●" not in out
        assert err == ""

    def test_json_holds_the_same_numbers(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        target = tmp_path / "new" / "data.json"
        assert self.run(f"json={target}", "+objectives.tone.source=concise", "dataset.responses=2") == 0
        assert f"numbers: {target}" in capsys.readouterr().out
        assert [path.name for path in target.parent.iterdir()] == ["data.json"]

        def refuse(word: str) -> None:
            raise AssertionError(f"{word} is not JSON")

        found: dict[str, Any] = json.loads(target.read_text(), parse_constant=refuse)
        assert found["provenance"]["corpus"].startswith("the embedded world")
        assert found["objectives"]["harmless"]["threshold"] == 0.55
        assert found["objectives"]["helpful"]["cyclic"] == {"value": None, "se": None, "n": 0}
        same = next(r for r in found["relations"] if r["objectives"] == ["concise", "tone"])
        assert same["agreement"]["value"] == 1
        assert same["verdict"] == "same order"
        assert found["notes"]
        assert found["warnings"] == []

    def test_json_that_cannot_be_written(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        assert self.run(f"json={tmp_path}") == 2
        assert f"json={tmp_path}: is a directory" in capsys.readouterr().err
        (tmp_path / "file").write_text("")
        assert self.run(f"json={tmp_path}/file/data.json") == 2
        assert "cannot be written" in capsys.readouterr().err

    def test_a_mistake_in_the_data_is_status_2(self, capsys: pytest.CaptureFixture[str]):
        assert self.run("dataset.heldout_fraction=2") == 2
        assert "dataset.heldout_fraction=2: must be a number between 0 and 1" in capsys.readouterr().err

    def test_warnings_go_to_stderr(self, capsys: pytest.CaptureFixture[str]):
        assert self.run("dataset.max_rows=12", "dataset.heldout_fraction=0.3") == 0
        assert "warning: helpful: only " in capsys.readouterr().err

    def test_one_objective(self, capsys: pytest.CaptureFixture[str]):
        assert self.run("~objectives.harmless", "~objectives.concise") == 0
        assert "verdict" not in capsys.readouterr().out

    @pytest.mark.parametrize(("width", "drawn"), [(100, True), (80, False)])
    def test_in_a_terminal(self, monkeypatch: pytest.MonkeyPatch, width: int, drawn: bool):
        screen = io.StringIO()
        console = Console(file=screen, force_terminal=True, width=width, color_system=None)
        monkeypatch.setattr(data.console, "console", console)
        assert self.run() == 0
        lines = screen.getvalue().splitlines()
        lines = [line for line in lines if not ("\x1b" in line or line.startswith("note: "))]  # the bar; what may wrap
        assert max(map(len, lines)) <= width
        conflict = next(line for line in lines if line.startswith("helpful – harmless"))
        assert ("●" in conflict) == drawn
        assert "…" not in screen.getvalue()

    def test_starts_without_the_heavy_libraries(self):
        code = (
            "import sys; from mopo_cli import cli; status = cli.main(['data', 'dataset.rows=60']);"
            "heavy = {'torch', 'transformers', 'scipy', 'datasets', 'wandb', 'altair'} & set(sys.modules);"
            "sys.exit(f'imported {heavy}' if heavy else status)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


class TestGauge:
    def relation(self, low: float, value: float, high: float) -> description.Relation:
        e = WithError(value, 0.1, 9)
        return description.Relation(("a", "b"), e, "ranks", e, e, (low, high), "")

    @pytest.mark.parametrize(
        ("interval", "drawn"),
        [
            ((-1.0, -1.0, -0.8), "●──·······┊··········"),
            ((-0.1, 0.0, 0.1), "·········─●─·········"),
            ((0.5, 0.9, 1.0), "··········┊····────●─"),
            ((NAN, NAN, NAN), "··········┊··········"),
        ],
    )
    def test_a_dot_in_its_interval(self, interval: tuple[float, float, float], drawn: str):
        assert data.gauge(self.relation(*interval)) == drawn

    def test_a_file_of_numbers_replaces_what_json_cannot_hold(self, tmp_path: Path):
        files.write_json(tmp_path / "a.json", {"a": (NAN, 1, math.inf), "b": asdict(WithError(0.5, NAN, 2))})
        assert files.read_json(tmp_path / "a.json") == {
            "a": [None, 1, None],
            "b": {"value": 0.5, "se": None, "n": 2},
        }
