"""From a corpus and an objective set to labelled splits."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mopo_cli.base.errors import UserError
from mopo_cli.base.types import Corpus, Example, PreferenceData, Text
from mopo_cli.config.schema import ObjectiveConfig
from mopo_cli.data import prepare
from mopo_cli.data.assistant import assistant
from mopo_cli.data.corpora import pairs

NAN = math.nan
CONCISE = {"_target_": "mopo_cli.data.computed.concise"}
HELPFUL = {"helpful": ObjectiveConfig(role="primary")}


def corpus(
    examples: list[Example], names: tuple[str, ...] = ("helpful", "safe"), test: list[Example] | None = None
) -> Corpus:
    return Corpus(names, examples, test, {"corpus": "a test"})


def example(
    prompt: Text = "Q", *labels: tuple[float, ...], responses: tuple[str, ...] = ("a", "b c"), **more: Any
) -> Example:
    pairs = ((0, 1), (0, 2), (1, 2))[: len(labels or [0])]
    return Example(prompt, responses, pairs, labels or ((1.0, 0.0),), source="rows.jsonl:7", **more)


def many(count: int = 200) -> list[Example]:
    return [example(f"Q{i}") for i in range(count)]


def prompts(examples: Sequence[Example]) -> set[str]:
    return {prepare.prompt_key(example) for example in examples}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[..., PreferenceData]:
    """prepare.load on a corpus that is at hand."""

    def run(made: Corpus, objectives: dict[str, ObjectiveConfig] | None = None, **dataset: Any) -> PreferenceData:
        build = prepare.build
        monkeypatch.setattr(prepare, "build", lambda node, what, **k: made if what == "dataset" else build(node, what))
        return prepare.load({"_target_": "there", **dataset}, objectives or HELPFUL)

    return run


class TestObjectives:
    def test_labels_follow_the_set_with_the_primary_first(self, load: Callable[..., PreferenceData]):
        objectives = {"safe": ObjectiveConfig(threshold=0.6), "help": ObjectiveConfig("primary", source="helpful")}
        data = load(corpus(many()), objectives)
        assert data.names == ("help", "safe")
        assert [(o.role, o.source, o.threshold) for o in data.objectives] == [
            ("primary", "helpful", None),
            ("secondary", "safe", 0.6),
        ]
        assert data.train[0].labels == ((1.0, 0.0),)
        reverse = {"safe": ObjectiveConfig("primary"), "helpful": ObjectiveConfig()}
        assert load(corpus(many()), reverse).train[0].labels == ((0.0, 1.0),)

    def test_an_objective_that_the_data_lacks_lists_what_it_has(self, load: Callable[..., PreferenceData]):
        with pytest.raises(UserError) as caught:
            load(corpus(many()), {**HELPFUL, "funny": ObjectiveConfig()})
        assert "objectives.funny: the data set has no labels 'funny'; it has: helpful, safe" in str(caught.value)
        assert "objectives.funny.source" in str(caught.value)
        with pytest.raises(UserError, match="it has: none"):
            load(corpus(many(), names=()))

    @pytest.mark.parametrize(
        ("roles", "found"), [(("secondary", "secondary"), "none"), (("primary", "primary"), "2 (helpful, safe)")]
    )
    def test_exactly_one_primary(self, load: Callable[..., PreferenceData], roles: tuple[str, str], found: str):
        with pytest.raises(UserError) as caught:
            load(corpus(many()), {"helpful": ObjectiveConfig(roles[0]), "safe": ObjectiveConfig(roles[1])})
        assert f"exactly one must have role: primary, found {found} among helpful, safe" in str(caught.value)

    def test_all_labels_missing(self, load: Callable[..., PreferenceData]):
        rows = [example(f"Q{i}", (1.0, NAN)) for i in range(100)]
        with pytest.raises(UserError, match=r"objectives\.safe: every label is missing in the data \(100 rows\)"):
            load(corpus(rows), {**HELPFUL, "safe": ObjectiveConfig()})

    def test_all_training_labels_missing(self, load: Callable[..., PreferenceData]):
        rows = many()
        test = prompts(load(corpus(rows)).test)
        rows = [example(e.prompt, (1.0, 1.0 if prepare.prompt_key(e) in test else NAN)) for e in rows]
        with pytest.raises(UserError, match=r"objectives\.safe: every label is missing in the training rows"):
            load(corpus(rows), {**HELPFUL, "safe": ObjectiveConfig()})

    def test_rows_without_a_label_of_the_set_are_left_out_and_counted(self, load: Callable[..., PreferenceData]):
        rows = many(100) + [example(f"R{i}", (NAN, 1.0)) for i in range(7)]
        data = load(corpus(rows))
        assert sum(map(len, (data.train, data.heldout, data.test))) == 100
        assert data.provenance == {"labels": None, "corpus": "a test", "rows_without_labels": 7}
        with pytest.raises(UserError, match="found 7 rows, none with a label for any objective of the set"):
            load(corpus(rows[100:]))
        with pytest.raises(UserError, match="found no rows at all"):
            load(corpus([]))

    def test_some_pairs_without_a_label(self, load: Callable[..., PreferenceData]):
        labels = ((NAN, 1.0), (0.5, NAN), (NAN, NAN))
        rows = [example(f"Q{i}", *labels, responses=("a", "b", "c")) for i in range(100)]
        assert load(corpus(rows)).train[0].pairs == ((0, 2),)
        assert load(corpus(rows)).train[0].labels == ((0.5,),)


class TestComputed:
    def test_judges_every_pair_whether_people_did_or_not(self, load: Callable[..., PreferenceData]):
        three = ("one", "one two three", "two words")
        rows = [Example(f"Q{i}", three, ((2, 1),), ((1.0, 0.0),)) for i in range(100)]
        data = load(corpus(rows), {**HELPFUL, "short": ObjectiveConfig(computed=CONCISE)})
        found = dict(zip(data.train[0].pairs, data.train[0].labels, strict=True))
        assert set(found) == {(2, 1), (0, 1), (0, 2)}
        assert found[2, 1] == (1.0, 1.0)  # in the order that people judged: two words beat three
        assert [found[pair][1] for pair in ((0, 1), (0, 2))] == [1.0, 1.0]
        assert math.isnan(found[0, 1][0])

    @pytest.mark.parametrize(("margin", "label"), [(0.0, 0.0), (1.0, 0.0), (2.0, 0.5), (2.5, 0.5)])
    def test_scores_up_to_the_margin_apart_are_a_tie(
        self, load: Callable[..., PreferenceData], margin: float, label: float
    ):
        rows = [example(f"Q{i}", responses=("one two three", "one")) for i in range(100)]
        data = load(corpus(rows), {**HELPFUL, "short": ObjectiveConfig(computed=CONCISE, margin=margin)})
        assert data.train[0].labels == ((1.0, label),)

    def test_provenance_names_the_scorer(self, load: Callable[..., PreferenceData]):
        data = load(corpus(many()), {**HELPFUL, "short": ObjectiveConfig(computed=CONCISE, margin=3)})
        assert data.provenance["computed"] == {"short": {"scorer": "mopo_cli.data.computed.concise", "margin": 3}}

    def test_a_primary_can_be_computed(self, load: Callable[..., PreferenceData]):
        data = load(corpus(many(), names=()), {"short": ObjectiveConfig("primary", computed=CONCISE)})
        assert data.train[0].labels == ((1.0,),)

    def test_extra_arguments_reach_the_scorer(self, load: Callable[..., PreferenceData]):
        node = {"_target_": f"{__name__}.weighted", "weight": -1.0}
        data = load(corpus(many()), {**HELPFUL, "long": ObjectiveConfig(computed=node)})
        assert data.train[0].labels == ((1.0, 0.0),)
        assert isinstance(data.objectives[1].scorer, partial)

    def test_a_missing_context_names_the_row(self, load: Callable[..., PreferenceData]):
        node = {"_target_": "mopo_cli.data.computed.grounded"}
        with pytest.raises(UserError, match=r"^rows\.jsonl:7: .*`grounded` compares a response with its row's context"):
            load(corpus(many()), {**HELPFUL, "grounded": ObjectiveConfig(computed=node)})
        rows = [example(f"Q{i}", responses=("sea", "sky"), context="the sky") for i in range(100)]
        data = load(corpus(rows), {**HELPFUL, "grounded": ObjectiveConfig(computed=node)})
        assert data.train[0].labels == ((1.0, 0.0),)

    @pytest.mark.parametrize(
        ("node", "text"),
        [
            ({"_target_": "mopo_cli.data.computed.nope"}, "objectives.x.computed (mopo_cli.data.computed.nope): "),
            ({"_target_": "math.sqrt"}, "rows.jsonl:7: objectives.x.computed failed (TypeError"),
            ({"_target_": f"{__name__}.not_finite"}, "rows.jsonl:7: objective x scored nan; a score must be finite"),
            ({"_target_": f"{__name__}.nothing"}, "rows.jsonl:7: objectives.x.computed failed (TypeError"),
            ({"weight": 1}, "objectives.x.computed={'weight': 1}: must be null, or a mapping whose _target_"),
            ("concise", "objectives.x.computed=concise: must be null, or a mapping whose _target_"),
        ],
    )
    def test_a_scorer_that_does_not_work(self, load: Callable[..., PreferenceData], node: Any, text: str):
        with pytest.raises(UserError) as caught:
            load(corpus(many()), {**HELPFUL, "x": ObjectiveConfig(computed=node)})
        assert str(caught.value).startswith(text)

    def test_only_computed_objectives_take_a_margin(self, load: Callable[..., PreferenceData]):
        with pytest.raises(
            UserError, match=r"objectives\.helpful\.margin=0\.5: only a computed objective takes a margin"
        ):
            load(corpus(many()), {"helpful": ObjectiveConfig("primary", margin=0.5)})


def weighted(prompt: str, response: str, context: str, weight: float) -> float:
    return -weight * len(response)


def not_finite(prompt: str, response: str, context: str) -> float:
    return NAN


def nothing(prompt: str, response: str, context: str) -> None:
    return None


class TestSplit:
    def test_sizes_and_disjointness(self, load: Callable[..., PreferenceData]):
        data = load(corpus(many(2000)), heldout_fraction=0.2, test_fraction=0.1)
        sizes = [len(part) for part in (data.train, data.heldout, data.test)]
        assert sum(sizes) == 2000
        for size, expected, share in zip(sizes, (1400, 400, 200), (0.7, 0.2, 0.1), strict=True):
            assert abs(size - expected) < 4 * math.sqrt(2000 * share * (1 - share))
        assert len(prompts((*data.train, *data.heldout, *data.test))) == 2000

    def test_rows_with_one_prompt_stay_together(self, load: Callable[..., PreferenceData]):
        message: list[dict[str, str]] = [{"role": "user", "content": "Hi"}]
        other_order = [{"content": "Hi", "role": "user"}]
        rows = [*many(300), *many(300), example(message), example(other_order)]
        data = load(corpus(rows))
        parts = [prompts(part) for part in (data.train, data.heldout, data.test)]
        assert sum(map(len, parts)) == len(set().union(*parts)) == 301

    def test_does_not_depend_on_the_order_of_rows(self, load: Callable[..., PreferenceData]):
        rows = many(300)
        shuffled = rows.copy()
        random.Random(0).shuffle(shuffled)
        first, second = load(corpus(rows)), load(corpus(shuffled))
        for name in ("train", "heldout", "test"):
            assert prompts(getattr(first, name)) == prompts(getattr(second, name))

    def test_more_rows_leave_the_others_where_they_were(self, load: Callable[..., PreferenceData]):
        few, more = load(corpus(many(200))), load(corpus(many(400)))
        assert prompts(few.test) <= prompts(more.test)
        assert prompts(few.train) <= prompts(more.train)

    def test_a_test_set_of_its_own_leaves_the_rest_to_training(self, load: Callable[..., PreferenceData]):
        data = load(corpus(many(300), test=[example("T1"), example("T2", (NAN, 1.0))]), test_fraction=0.5)
        assert [e.prompt for e in data.test] == ["T1"]
        assert len(data.train) + len(data.heldout) == 300
        assert data.provenance["rows_without_labels"] == 1

    @pytest.mark.parametrize("test", [[], [example("T", (NAN, 1.0))]])
    def test_an_empty_test_set_of_its_own(self, load: Callable[..., PreferenceData], test: list[Example]):
        with pytest.raises(UserError, match="no test rows are left"):
            load(corpus(many(), test=test))

    def test_too_few_rows(self, load: Callable[..., PreferenceData]):
        with pytest.raises(UserError, match=r"no (training|held-out|test) rows are left of 1; give more rows"):
            load(corpus(many(1)))


class TestKeys:
    def test_max_rows_takes_a_sample_that_does_not_depend_on_the_order_of_rows(
        self, load: Callable[..., PreferenceData]
    ):
        rows = many(300)
        data = load(corpus(rows, test=many(80)), max_rows=60)
        taken = [*data.train, *data.heldout]
        assert len(taken) == len(data.test) == 60
        assert prompts(taken) != {f"Q{i}" for i in range(60)}
        assert data.provenance["sample"] == "60 of 300 rows, a fixed sample (dataset.max_rows)"
        assert data.provenance["test_sample"] == "60 of 80 rows, a fixed sample (dataset.max_rows)"
        random.Random(0).shuffle(rows)
        assert prompts([*(again := load(corpus(rows), max_rows=60)).train, *again.heldout, *again.test]) == prompts(
            taken
        )

    def test_fewer_rows_than_max_rows_are_all_taken_in_their_order(self, load: Callable[..., PreferenceData]):
        everything, bounded = load(corpus(many(300))), load(corpus(many(300)), max_rows=300)
        assert (bounded.train, bounded.heldout, bounded.test) == (everything.train, everything.heldout, everything.test)
        assert "sample" not in bounded.provenance

    def test_the_sample_leaves_the_shares_of_the_splits_alone(self, load: Callable[..., PreferenceData]):
        data = load(corpus(many(20_000)), max_rows=2000, heldout_fraction=0.2, test_fraction=0.1)
        for part, share in ((data.train, 0.7), (data.heldout, 0.2), (data.test, 0.1)):
            assert abs(len(part) - 2000 * share) < 4 * math.sqrt(2000 * share * (1 - share))

    @pytest.mark.parametrize("rows", [0, -1, 2.5, "many", True])
    def test_max_rows_is_a_positive_number(self, load: Callable[..., PreferenceData], rows: Any):
        with pytest.raises(UserError, match=rf"dataset\.max_rows={rows}: must be a whole number, 1 or more, or null"):
            load(corpus(many()), max_rows=rows)

    @pytest.mark.parametrize("key", ["heldout_fraction", "test_fraction"])
    @pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, "half", None, True])
    def test_fractions_lie_between_0_and_1(self, load: Callable[..., PreferenceData], key: str, value: Any):
        with pytest.raises(UserError, match=rf"dataset\.{key}={value}: must be a number between 0 and 1"):
            load(corpus(many()), **{key: value})

    def test_fractions_leave_something(self, load: Callable[..., PreferenceData]):
        with pytest.raises(UserError, match=r"heldout_fraction \+ test_fraction = 1 leaves nothing to train on"):
            load(corpus(many()), heldout_fraction=0.5, test_fraction=0.5)

    def test_a_data_set_without_a_function(self):
        with pytest.raises(UserError, match="dataset: has no _target_"):
            prepare.load({}, HELPFUL)

    def test_a_wrong_argument_of_the_function(self):
        node = {"_target_": "mopo_cli.data.assistant.assistant", "lines": 3}
        with pytest.raises(UserError, match=r"dataset \(mopo_cli\.data\.assistant\.assistant\): TypeError.*lines"):
            prepare.load(node, HELPFUL)

    def test_a_users_mistake_inside_the_function_keeps_its_message(self):
        with pytest.raises(UserError, match=r"^dataset\.path is missing"):
            prepare.load({"_target_": "mopo_cli.data.corpora.pairs", "path": None}, HELPFUL)

    def test_labels_says_how_i_was_made(self, load: Callable[..., PreferenceData]):
        assert load(corpus(many()), labels="by hand").provenance["labels"] == "by hand"
        made = Corpus(("helpful",), [example(f"Q{i}", (1.0,)) for i in range(99)], None, {"labels": "from the corpus"})
        assert load(made, labels="by hand").provenance["labels"] == "from the corpus"


class TestLoad:
    def test_a_file(self, tmp_path: Path):
        path = tmp_path / "rows.jsonl"
        rows = [{"prompt": f"Q{i}", "chosen": "yes", "rejected": "no"} for i in range(100)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        node = {"_target_": "mopo_cli.data.corpora.pairs", "path": str(path), "chosen_means": "helpful"}
        data = prepare.load(node, HELPFUL)
        assert data.train[0].labels == ((1.0,),)
        assert data.train[0].source.startswith(str(path))
        assert data.world is None

    def test_the_embedded_world(self):
        node = {"_target_": "mopo_cli.data.assistant.assistant", "rows": 100, "heldout_fraction": 0.2}
        data = prepare.load(node, {"concise": ObjectiveConfig("primary"), "helpful": ObjectiveConfig()})
        world: Any = data.world
        assert world.objectives == ("helpful", "harmless", "concise")
        original = next(iter(assistant(rows=1).examples))
        loaded = next(e for e in (*data.train, *data.heldout) if e.source == original.source)
        assert loaded.labels == tuple((row[2], row[0]) for row in original.labels)


class TestTexts:
    def test_as_text(self):
        user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
        assert prepare.as_text("plain") == "plain"
        assert prepare.as_text([answer]) == "Hello"
        assert prepare.as_text([user]) == "Human: Hi\n\nAssistant:"
        assert prepare.as_text([user, answer]) == "Human: Hi\n\nAssistant: Hello"
        assert (
            prepare.transcript([{"role": "system", "content": "Be"}, user]) == "System: Be\n\nHuman: Hi\n\nAssistant:"
        )


class TestGroups:
    def test_rows_of_a_group_stay_in_one_split_and_are_one_unit(self, load: Callable[..., PreferenceData]):
        rows = [example(f"Q{i}", group=f"topic {i % 40}") for i in range(200)]
        data = load(corpus(rows), heldout_fraction=0.3, test_fraction=0.3)
        parts = [{row.group for row in part} for part in (data.train, data.heldout, data.test)]
        assert sum(map(len, parts)) == len(set().union(*parts)) == 40
        assert len(set(prepare.unit_numbers(data.train).tolist())) == len(parts[0]) < len(data.train)

    def test_without_groups_a_prompt_is_a_unit(self):
        rows = [example("Q1"), example("Q2"), example("Q1", context="another")]
        assert prepare.unit_numbers(rows).tolist() == [0, 1, 0]

    def test_of_the_embedded_world_are_its_topics(self):
        rows = list(assistant(rows=10).test or ())
        assert (len(rows), len(set(prepare.unit_numbers(rows).tolist()))) == (144, 72)

    @pytest.mark.parametrize("value", [None, "", ["a"]])
    def test_a_row_without_its_group(self, tmp_path: Path, value: object):
        row = {"prompt": "Q", "chosen": "a", "rejected": "b", "topic": value}
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        made = pairs(str(tmp_path / "rows.jsonl"), chosen_means="helpful", group="topic")
        with pytest.raises(UserError, match=r"rows.jsonl:1: dataset.group=topic: the row has no text or number there"):
            list(made.examples)

    def test_a_column_of_groups_is_no_objective(self, tmp_path: Path):
        row = {"prompt": "Q", "chosen": "a", "rejected": "b", "helpful": 1, "topic": 0}
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        made = pairs(str(tmp_path / "rows.jsonl"), group="topic")
        assert made.objectives == ("helpful",)
        assert [row.group for row in made.examples] == ["0"]
