"""The row contract: every accepted format, and every way to break it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mopo_cli.base.errors import RowError, UserError
from mopo_cli.base.types import Example
from mopo_cli.data.columns import Unread
from mopo_cli.data.rows import example_from_row, is_pair_row, objectives_of_row, preference, split_transcripts

WHERE = "pairs.jsonl:7"
NAN = math.nan
USER = {"role": "user", "content": "Hi"}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def example(row: Any, *objectives: str, margins: dict[str, float] | None = None, chosen: str | None = None) -> Example:
    return example_from_row(row, objectives or ("helpful",), WHERE, margins or {}, chosen)


def error(row: Any, *objectives: str, chosen: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        example(row, *objectives, chosen=chosen)
    assert str(caught.value).startswith(f"{WHERE}: ")
    return str(caught.value)


def scored(**scores: list[Any]) -> dict[str, Any]:
    return {"prompt": "Q", "responses": ["a", "b", "c"], "scores": scores}


def labelled(*entries: list[Any]) -> dict[str, Any]:
    return {"prompt": "Q", "responses": ["a", "b", "c"], "labels": {"helpful": list(entries)}}


class TestListRows:
    def test_scores_become_pairs_in_the_order_of_the_objectives(self):
        made = example(scored(helpful=[7, 3, None], safe=[1, 1, 2.5]), "safe", "helpful")
        assert made.prompt == "Q"
        assert made.responses == ("a", "b", "c")
        assert made.pairs == ((0, 1), (0, 2), (1, 2))
        assert made.labels[0] == (0.5, 1.0)
        assert made.labels[1][0] == made.labels[2][0] == 0.0
        assert math.isnan(made.labels[1][1])
        assert math.isnan(made.labels[2][1])
        assert made.source == WHERE
        assert made.context == ""

    def test_pairs_that_nobody_judged_are_dropped(self):
        assert example(scored(helpful=[7, 3, None])).pairs == ((0, 1),)
        assert example(scored(helpful=[None, 3, None])).pairs == ()
        assert example(scored(other=[1, 2, 3])).pairs == ()

    def test_margin_makes_ties_including_at_the_margin(self):
        made = example(scored(helpful=[0.8, 0.7, 0.5]), margins={"helpful": 0.1})
        assert made.labels == ((0.5,), (1.0,), (1.0,))  # 0.8 - 0.7 is a hair above 0.1 in floating point

    def test_labels_are_oriented_from_the_lower_index(self):
        made = example(labelled([0, 1, 1.0], [2, 0, 1], [1, 2, 0.25], [0, 1, None]))
        assert dict(zip(made.pairs, made.labels, strict=True)) == {(0, 1): (1.0,), (0, 2): (0.0,), (1, 2): (0.25,)}

    def test_several_labels_of_a_pair_are_averaged(self):
        assert example(labelled([0, 1, 1], [1, 0, 1], [0, 1, 1])).labels == ((pytest.approx(2 / 3),),)

    def test_labels_win_over_scores_pair_by_pair(self):
        row = {**scored(helpful=[3, 2, 1]), "labels": {"helpful": [[0, 1, 0.0]]}}
        assert example(row).labels == ((0.0,), (1.0,), (1.0,))

    def test_indices_may_be_floats_as_parquet_stores_them(self):
        assert example(labelled([0.0, 2.0, 1.0])).pairs == ((0, 2),)

    def test_identical_responses_tie_where_judged_and_stay_missing_elsewhere(self):
        row = {"prompt": "Q", "responses": ["a", "a", "b"], "labels": {"helpful": [[0, 1, 1.0]]}}
        row["scores"] = {"safe": [None, 1, 2]}
        made = example(row, "helpful", "safe")
        assert made.pairs == ((0, 1), (1, 2))
        assert made.labels[0][0] == 0.5
        assert math.isnan(made.labels[0][1])

    def test_messages_and_context(self):
        row = {"prompt": [USER], "responses": [[assistant("a")], "b"], "scores": {"helpful": [1, 0]}, "context": "C"}
        made = example(row)
        assert made.prompt == [USER]
        assert made.responses == ("a", "b")
        assert made.context == "C"

    def test_message_keys_that_say_nothing_of_the_meaning_are_left_out(self):
        prompt = [{"role": "system", "content": ""}, {**USER, "id": 3, "name": None, "tool_calls": [], "images": None}]
        assert example({**scored(helpful=[1, 2, 3]), "prompt": prompt}).prompt == [
            {"role": "system", "content": ""},
            USER,
        ]

    def test_null_counts_as_absent(self):
        row = {**scored(helpful=[1, 2, 3]), "labels": None, "context": None, "chosen": None}
        assert len(example(row).pairs) == 3
        assert not is_pair_row(row)

    def test_swapping_the_responses_mirrors_the_labels(self):
        scores = [4, 4, 1]
        forward, backward = example(scored(helpful=scores)), example(scored(helpful=scores[::-1]))
        mirrored = {(2 - b, 2 - a): 1 - label for (a, b), (label,) in zip(backward.pairs, backward.labels, strict=True)}
        assert {pair: label for pair, (label,) in zip(forward.pairs, forward.labels, strict=True)} == mirrored


class TestListRowErrors:
    @pytest.mark.parametrize("row", [[1, 2], "text", 3, None])
    def test_not_an_object(self, row: Any):
        assert "expected a JSON object" in error(row)

    @pytest.mark.parametrize(
        ("key", "message"),
        [
            ("prompt", "prompt is missing"),
            ("responses", "responses is missing"),
            ("scores", "scores and labels are both"),
        ],
    )
    def test_missing_key_names_what_was_found(self, key: str, message: str):
        row = {k: v for k, v in scored(helpful=[1, 2, 3]).items() if k != key}
        assert message in error(row)
        assert f"found the keys: {', '.join(row)}" in error(row)

    @pytest.mark.parametrize("prompt", ["", " \n", [], [{"role": "user", "content": " "}]])
    def test_empty_prompt(self, prompt: Any):
        assert "prompt is empty" in error({**scored(helpful=[1, 2, 3]), "prompt": prompt})

    @pytest.mark.parametrize("response", ["", "\t", [], [assistant(" ")]])
    def test_empty_response(self, response: Any):
        assert "responses[1] is empty" in error({**scored(helpful=[1, 2]), "responses": ["a", response]})

    @pytest.mark.parametrize("responses", [[], ["a"], "ab"])
    def test_fewer_than_two_responses(self, responses: Any):
        assert "two or more" in error({**scored(helpful=[1]), "responses": responses})

    @pytest.mark.parametrize("prompt", [3, {"role": "user"}, True])
    def test_a_text_of_the_wrong_type(self, prompt: Any):
        assert "prompt must be a string or a list of messages" in error({**scored(helpful=[1]), "prompt": prompt})

    def test_unknown_role(self):
        message = error({**scored(helpful=[1]), "prompt": [{"role": "human", "content": "Hi"}]})
        assert "prompt has the role 'human'; allowed: system, user, assistant" in message

    @pytest.mark.parametrize("message", ["Hi", {"role": "user"}, {"role": "user", "content": None}])
    def test_a_broken_message(self, message: Any):
        assert "needs role and content" in error({**scored(helpful=[1]), "prompt": [message]})

    def test_a_response_that_ends_with_the_user(self):
        assert "must end with an assistant message, found role 'user'" in error(
            {
                **scored(helpful=[1, 2]),
                "responses": ["a", [USER]],
            }
        )

    @pytest.mark.parametrize("value", [NAN, math.inf, -math.inf, "7", True, [1]])
    def test_a_score_that_is_no_finite_number(self, value: Any):
        assert "scores.helpful holds" in error(scored(helpful=[1, value, 2]))

    @pytest.mark.parametrize("scores", [[1, 2], [1, 2, 3, 4], 5, {"a": 1}])
    def test_scores_of_the_wrong_length(self, scores: Any):
        assert "must be a list of 3, one score a response" in error(scored(helpful=scores))

    @pytest.mark.parametrize("value", [-0.1, 1.1, NAN, "1", True])
    def test_a_label_outside_its_range(self, value: Any):
        assert "labels.helpful holds" in error(labelled([0, 1, value]))

    @pytest.mark.parametrize("index", [-1, 3, 0.5, "0", True, None, NAN])
    def test_an_index_out_of_range(self, index: Any):
        assert "allowed: 0 to 2" in error(labelled([1, index, 1.0]))

    def test_equal_indices(self):
        assert "compares response 1 with itself" in error(labelled([1, 1, 1.0]))

    @pytest.mark.parametrize("entries", [[[0, 1]], [0, 1, 1.0], "no", {"a": 1}])
    def test_labels_that_are_no_triples(self, entries: Any):
        assert "must be a list of [a, b, I]" in error({**labelled(), "labels": {"helpful": entries}})

    @pytest.mark.parametrize("key", ["scores", "labels"])
    def test_tables_that_are_no_mappings(self, key: str):
        assert f"{key} must map each objective to a list" in error({**labelled(), key: [1, 2, 3]})

    def test_context_that_is_no_string(self):
        assert "context must be a string" in error({**labelled(), "context": ["C"]})


class TestPairRows:
    def test_standard_format_with_explicit_prompt(self):
        made = example({"prompt": "Q", "chosen": "a", "rejected": "b"}, chosen="helpful")
        assert (made.prompt, made.responses, made.pairs, made.labels) == ("Q", ("a", "b"), ((0, 1),), ((1.0,),))

    def test_conversational_format_with_explicit_prompt(self):
        made = example({"prompt": [USER], "chosen": [assistant("a")], "rejected": [assistant("b")]}, chosen="helpful")
        assert (made.prompt, made.responses) == ([USER], ("a", "b"))

    def test_conversational_format_with_implicit_prompt(self):
        shared = [USER, assistant("Hello"), USER]
        row = {"chosen": [*shared, assistant("a")], "rejected": [*shared, assistant("b")]}
        made = example(row, chosen="helpful")
        assert (made.prompt, made.responses) == (shared, ("a", "b"))

    @pytest.mark.parametrize("prompt", ["Hi", [USER]])
    def test_a_prompt_that_is_given_twice_is_not_doubled(self, prompt: Any):
        row = {"prompt": prompt, "chosen": [USER, assistant("a")], "rejected": [USER, assistant("b")]}
        made = example(row, chosen="helpful")
        assert (made.prompt, made.responses) == ([USER], ("a", "b"))

    def test_identical_conversations_keep_their_last_message_as_the_response(self):
        row = {"chosen": [USER, assistant("a")], "rejected": [USER, assistant("a")]}
        made = example(row, chosen="helpful")
        assert (made.prompt, made.responses, made.labels) == ([USER], ("a", "a"), ((0.5,),))

    def test_transcripts_split_after_the_last_shared_assistant_marker(self):
        start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: And?\n\nAssistant:"
        made = example({"chosen": start + " So there", "rejected": start + " So what"}, chosen="helpful")
        assert (made.prompt, made.responses) == (start, (" So there", " So what"))

    def test_a_marker_inside_one_answer_does_not_move_the_split(self):
        start = "\n\nHuman: Hi\n\nAssistant:"
        answers = (" Yes\n\nAssistant: Sure", " No")
        assert split_transcripts(start + answers[0], start + answers[1], WHERE) == (start, *answers)

    @pytest.mark.parametrize(
        ("chosen", "rejected", "expected"),
        [
            ("The sky is blue", "The sky is black", ("The sky is", " blue", " black")),
            ("Q: hi\nA: yes", "Q: hi\nA: no", ("Q: hi\nA:", " yes", " no")),
            ("Say hi", "Say hi there", ("Say", " hi", " hi there")),
        ],
    )
    def test_without_a_marker_the_prefix_is_cut_at_white_space(
        self, chosen: str, rejected: str, expected: tuple[str, ...]
    ):
        assert split_transcripts(chosen, rejected, WHERE) == expected

    def test_columns_per_objective(self):
        row = {"prompt": "Q", "chosen": "a", "rejected": "b", "helpful": 1, "safe": 0.25, "short": None}
        made = example(row, "helpful", "safe", "short")
        assert made.labels[0][:2] == (1.0, 0.25)
        assert math.isnan(made.labels[0][2])

    def test_a_column_wins_over_what_chosen_means(self):
        row = {"prompt": "Q", "chosen": "a", "rejected": "b", "helpful": 0.75}
        assert example(row, chosen="helpful").labels == ((0.75,),)
        assert example({**row, "helpful": None}, chosen="helpful").labels == ((1.0,),)

    def test_columns_that_are_all_null_leave_no_pair(self):
        assert example({"prompt": "Q", "chosen": "a", "rejected": "b", "helpful": None}).pairs == ()

    def test_context_is_kept(self):
        assert example({"prompt": "Q", "chosen": "a", "rejected": "b", "context": "C"}, chosen="helpful").context == "C"


class TestPairRowErrors:
    def test_what_chosen_means_is_never_guessed(self):
        message = error({"prompt": "Q", "chosen": "a", "rejected": "b"})
        assert "dataset.chosen_means=<objective>" in message

    @pytest.mark.parametrize("key", ["chosen", "rejected"])
    def test_missing_side(self, key: str):
        row = {k: v for k, v in {"prompt": "Q", "chosen": "a", "rejected": "b"}.items() if k != key}
        assert f"{key} is missing; found the keys: prompt" in error(row, chosen="helpful")

    @pytest.mark.parametrize("value", [1.5, -1, "yes", True, NAN])
    def test_a_column_outside_its_range(self, value: Any):
        assert "helpful holds" in error({"prompt": "Q", "chosen": "a", "rejected": "b", "helpful": value})

    def test_mixed_types(self):
        assert "must both be" in error({"prompt": "Q", "chosen": "a", "rejected": [assistant("b")]}, chosen="helpful")

    def test_numbers_as_texts(self):
        assert "must be strings or lists of messages" in error({"chosen": 1, "rejected": 2}, chosen="helpful")
        assert "chosen must be a string" in error({"prompt": "Q", "chosen": 1, "rejected": 2}, chosen="helpful")

    @pytest.mark.parametrize(
        ("chosen", "rejected"),
        [("yes", "no"), ("Say", "Says"), ([assistant("a")], [assistant("b")]), ([USER], [assistant("b")])],
    )
    def test_no_shared_prompt(self, chosen: Any, rejected: Any):
        assert "there is no prompt" in error({"chosen": chosen, "rejected": rejected}, chosen="helpful")

    def test_identical_strings_without_a_marker(self):
        assert "are the same text" in error({"chosen": "A b", "rejected": "A b"}, chosen="helpful")

    def test_empty_answer_after_the_marker(self):
        start = "\n\nHuman: Hi\n\nAssistant:"
        assert "chosen is empty" in error({"chosen": start + " ", "rejected": start + " No"}, chosen="helpful")


class TestObjectivesOfRow:
    def test_list_rows_carry_the_union_of_scores_and_labels(self):
        row = {"responses": ["a", "b"], "scores": {"x": [1, 2], "y": None}, "labels": {"z": [[0, 1, 1]], "x": []}}
        assert objectives_of_row(row) == ("x", "z")

    def test_pair_rows_carry_their_columns_with_a_probability(self):
        row = {"prompt": "Q", "chosen": "a", "rejected": "b", "helpful": 1, "safe": 0.5, "short": None}
        bookkeeping = {"score_chosen": 1, "score_rejected": 0, "margin": 0.5, "id": 1, "flag": True, "big": 7}
        assert objectives_of_row({**row, **bookkeeping}) == ("helpful", "safe")

    @pytest.mark.parametrize("row", [None, [], {}, {"responses": ["a"], "scores": 3}])
    def test_broken_rows_carry_none(self, row: Any):
        assert objectives_of_row(row) == ()


@pytest.mark.parametrize(
    ("first", "second", "margin", "expected"),
    [(2, 1, 0, 1.0), (1, 2, 0, 0.0), (1, 1, 0, 0.5), (2, 1, 1, 0.5), (2, 1, 0.99, 1.0), (1e-12, 0, 0, 1.0)],
)
def test_preference(first: float, second: float, margin: float, expected: float):
    assert preference(first, second, margin) == expected


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


class TestSeveralTurns:
    """What the user says between two answers is no answer: neither trained on nor dropped."""

    @pytest.mark.parametrize("prompt", [{}, {"prompt": [USER]}])
    def test_conversations_that_part_before_the_last_answer(self, prompt: dict[str, Any]):
        answers = {
            "chosen": [USER, assistant("A1"), turn("user", "Q2"), assistant("A2")],
            "rejected": [USER, assistant("B1"), turn("user", "P2"), assistant("B2")],
        }
        assert "has several turns after the prompt" in error({**prompt, **answers}, chosen="helpful")

    def test_transcripts_that_part_before_the_last_answer(self):
        start = "\n\nHuman: Hi\n\nAssistant:"
        row = {"chosen": f"{start} A1\n\nHuman: Q2\n\nAssistant: A2", "rejected": f"{start} B1"}
        assert "has several turns after the prompt" in error(row, chosen="helpful")

    @pytest.mark.parametrize("last", [[turn("user", "Q2"), assistant("b")], [assistant("b")]])
    def test_a_response_of_several_messages(self, last: list[dict[str, str]]):
        row = {"prompt": [USER], "responses": [[assistant("a"), *last], "c"], "scores": {"helpful": [1, 0]}}
        assert "responses[0] has several turns" in error(row)

    def test_two_answers_in_a_row(self):
        shared = [USER, assistant("A1")]
        row = {"chosen": [*shared, assistant("a")], "rejected": [*shared, assistant("b")]}
        assert "two messages of the assistant follow each other" in error(row, chosen="helpful")

    def test_a_prompt_that_begins_the_answer_is_kept_as_it_is(self):
        prompt = [USER, assistant("The sky is")]
        made = example({"prompt": prompt, "chosen": " blue", "rejected": " red"}, chosen="helpful")
        assert (made.prompt, made.responses) == (prompt, (" blue", " red"))


ANSWERS = {"chosen": "Town 0 of France is big", "rejected": "Town 0 of France is small"}


class TestOtherColumns:
    @pytest.mark.parametrize("name", ["question", "query", "instruction", "input"])
    def test_a_question_is_the_prompt(self, name: str):
        row = {name: "How big is it?", **ANSWERS}
        made = example(row, chosen="helpful")
        assert (made.prompt, made.responses) == ("How big is it?", tuple(ANSWERS.values()))
        assert example({name: "Q", "responses": ["a", "b"], "scores": {"helpful": [1, 0]}}).prompt == "Q"

    def test_an_instruction_with_its_input(self):
        assert example({"instruction": "Sum up", "input": "A text", **ANSWERS}, chosen="helpful").prompt == (
            "Sum up\n\nA text"
        )
        assert example({"instruction": "Sum up", "input": "", **ANSWERS}, chosen="helpful").prompt == "Sum up"

    def test_a_question_that_the_answers_repeat_is_cut_off_them(self):
        row = {"question": "How big", "chosen": "How big is it", "rejected": "How big? Small"}
        assert example(row, chosen="helpful").responses == (" is it", "? Small")

    def test_a_question_beside_whole_conversations_is_not_asked_twice(self):
        row = {"question": "Hi", "chosen": [USER, assistant("a")], "rejected": [USER, assistant("b")]}
        assert example(row, chosen="helpful").prompt == [USER]

    def test_one_of_two_questions(self):
        assert "question and query could each be" in error({"question": "a", "query": "b", **ANSWERS})

    def test_no_guess_where_a_column_could_hold_the_prompt(self):
        message = error({"headline": "France", "source": "a b", "row_id": "7", **ANSWERS}, chosen="helpful")
        assert "there is no prompt, and headline could hold it" in message
        row = {"source": "wiki", "row_id": "7", "n": 3, "note": "", **ANSWERS}
        assert example(row, chosen="helpful").prompt == "Town 0 of France is"

    @pytest.mark.parametrize("name", ["system", "system_prompt"])
    def test_a_system_message(self, name: str):
        say = turn("system", "Be brief")
        answers = {"chosen": "a", "rejected": "b"}
        assert example({name: "Be brief", "prompt": "Hi", **answers}, chosen="helpful").prompt == [say, USER]
        assert example({name: "Be brief", "prompt": [USER], **answers}, chosen="helpful").prompt == [say, USER]
        assert example({name: "Be brief", "prompt": [say, USER], **answers}, chosen="helpful").prompt == [say, USER]
        assert example({name: "", "prompt": "Hi", **answers}, chosen="helpful").prompt == "Hi"
        talk = {"chosen": [USER, assistant("a")], "rejected": [USER, assistant("b")]}
        assert example({name: "Be brief", **talk}, chosen="helpful").prompt == [say, USER]
        assert "differ; keep one" in error({name: "Be long", "prompt": [say, USER], **answers}, chosen="helpful")
        told = {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Hi\n\nAssistant: b"}
        assert "beside a prompt that is a transcript" in error({name: "Be brief", **told}, chosen="helpful")

    @pytest.mark.parametrize("name", ["tools", "images", "history"])
    def test_what_no_prompt_can_hold(self, name: str):
        row = {"prompt": "Q", "chosen": "a", "rejected": "b"}
        assert f"the column {name} changes what a model is asked" in error({**row, name: ["x"]}, chosen="helpful")
        assert example({**row, name: []}, chosen="helpful").prompt == "Q"

    @pytest.mark.parametrize(
        ("key", "value"), [("name", "Bo"), ("tool_calls", [{}]), ("images", ["x"]), ("weight", 0), ("whatever", "x")]
    )
    def test_a_message_with_a_key_that_changes_it(self, key: str, value: Any):
        row = {**scored(helpful=[1, 2, 3]), "prompt": [{**USER, key: value}]}
        assert f"a message of prompt has the key {key}" in error(row)

    def test_columns_that_nothing_reads(self):
        row = {
            "prompt": "Q",
            "question": "Q?",
            "system": "S",
            "chosen": "a",
            "rejected": "b",
            "helpful": 1,
            "safe": 0.5,
        }
        unread = Unread(("helpful",))
        unread.see({**row, "id": None, "safe": None})
        assert unread.names == ["question"]
        unread.see({**row, "id": 3, "safe": 0})
        assert unread.names == ["question", "safe", "id"]
        unread = Unread(("chosen",))
        unread.see({"question": "Q", "responses": ["a"], "chosen": "a"})
        assert unread.names == ["chosen"]

    def test_a_weight_is_no_objective(self):
        assert objectives_of_row({"prompt": "Q", "chosen": "a", "rejected": "b", "weight": 0.5, "safe": 1}) == ("safe",)


@pytest.mark.parametrize("score", [10**400, -(10**400)])
def test_whole_numbers_that_no_float_holds(score: int):
    assert "scores.helpful holds" in error(scored(helpful=[1, score, 2]))
    assert "has the index" in error(labelled([1, score, 1.0]))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (scored(helpful=[1, "x", 2]), scored(helpful=[1, "y", 2])),
        ({"prompt": 1, "responses": ["a", "b"]}, {"prompt": 2, "responses": ["a", "b"]}),
        ({"a": 1}, {"b": 1}),
    ],
)
def test_rows_that_break_the_contract_alike_are_of_one_kind(first: Any, second: Any):
    kinds = []
    for row in (first, second):
        with pytest.raises(RowError) as caught:
            example(row)
        kinds.append(caught.value.kind)
    assert kinds[0] == kinds[1]
