"""One function a corpus: where it is, what its objectives are, and how I is made from its annotations.

Each returns a Corpus whose examples are streamed, and can be iterated once. Responses without any text are left out,
and rows without a prompt or with fewer than two responses left are skipped; Corpus.provenance["skipped"] counts those
while the examples are read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from mopo_cli.base.errors import RowError, UserError
from mopo_cli.base.types import Corpus, Example, Message, Text
from mopo_cli.data.columns import UNREAD, Unread, count_reason
from mopo_cli.data.readers import (
    DROPPABLE,
    Rows,
    RowsOrErrors,
    is_local,
    read_rows,
    read_rows_or_errors,
    read_whole_rows,
    split_names,
)
from mopo_cli.data.rows import (
    example_from_row,
    is_pair_row,
    objectives_of_row,
    prompt_of_row,
    split_transcripts,
    undeclared_chosen,
)
from mopo_cli.data.subsample import Reservoir, sampled

Row = dict[str, Any]
LocatedRow = tuple[str, Row | RowError]  # where, and what
ULTRAFEEDBACK_ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
HELPSTEER2_ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
QA_FEEDBACK_PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))  # of its six comparisons, in order
QA_FEEDBACK_I = {0: 0.5, 1: 1.0, 2: 0.0}  # no preference, the first is preferred, the second is
WINNER_I = {0: 1.0, 1: 0.0}  # the index of the preferred one of two responses
TLDR_PROMPT = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
ARTICLE_PROMPT = "Article:\n{article}\n\nTL;DR:"


class _UnusableRowError(Exception):
    """A row of a published corpus that cannot be used; the message is the reason that gets counted."""


def pairs(
    path: str | None,
    chosen_means: str | None = None,
    test_path: str | None = None,
    margins: Mapping[str, float] | None = None,
    objectives: Sequence[str] | None = None,
    invalid: str = "error",
    max_rows: int | None = None,
    group: str | None = None,
) -> Corpus:
    """The user's own rows in the contract's formats (mopo_cli.data.rows): list rows or pair rows, JSON or Parquet.

    I comes from labels, from per-objective columns, from scores (a difference of at most margins[objective] is a tie),
    and for the objective `chosen_means` from `chosen`. objectives: which ones to read, in which order; null finds all
    that the rows carry. test_path: a test set in the same formats; null takes the test (or validation) split, where
    `path` is a directory or hub id that has one. max_rows: take a fixed sample of so many rows, and of as many test
    rows, where there are more (mopo_cli.data.subsample); null streams all of them, reading the file once more to find
    its objectives. group: the column that says which rows are about the same thing; they stay in one split, and count
    as one independent prompt.

    Raises UserError where `path` is missing, where nothing says what `chosen` means, and during iteration for a row
    that breaks the contract; invalid="drop" leaves such rows out and counts them in Corpus.provenance["skipped"].
    """
    path = _checked_path(path, invalid)
    samples = None if max_rows is None else (Reservoir[LocatedRow](max_rows), Reservoir[LocatedRow](max_rows))
    read = read_rows_or_errors if invalid == "drop" else read_whole_rows
    train, test = _train_and_test(path, "test", "validation", samples=samples, read=read)
    notes: Row = {}
    if not objectives and chosen_means is None:
        train = _declared(train)
    taken = sampled(_by_its_prompt(train), samples[0], notes, "sample") if samples else None
    carried = tuple(objectives) if objectives else _carried_objectives(path, chosen_means, taken, read)
    names = tuple(name for name in carried if name != group)
    ties = _checked_margins(margins or {}, names)
    _check_chosen(chosen_means, names)
    if test_path is not None:
        test = read(test_path, sample=samples and samples[1])
    if samples is not None and test is not None:
        test = _drained(sampled(_by_its_prompt(test), samples[1], notes, "test_sample"))

    skipped: dict[str, int] = {}
    unread = Unread(names, group)

    def examples(rows: RowsOrErrors) -> Iterator[Example]:
        for where, row in rows:
            try:
                example = example_from_row(row, names, where, ties, chosen_means, group)
            except RowError as error:
                if invalid == "error":
                    raise UserError(f"{error}. {DROPPABLE}") from None
                count_reason(skipped, error.kind)
                continue
            unread.see(row)  # type: ignore[arg-type]  # an error would have been raised
            yield example

    about = {"corpus": "pairs", "path": path, "test_path": test_path, "chosen_means": chosen_means, "margins": ties}
    about |= {"group": group} if group else {}
    train = train if taken is None else _drained(taken)
    tested = examples(test) if test is not None else None
    return Corpus(names, examples(train), tested, {**about, **notes, "skipped": skipped, UNREAD: unread.names})


def _checked_path(path: str | None, invalid: str) -> str:
    if invalid not in ("error", "drop"):
        raise UserError(f"dataset.invalid={invalid}: must be error or drop")
    if path is None:
        raise UserError(
            "dataset.path is missing: set dataset.path=<file> to a .jsonl or .parquet file (or a directory, or a hub "
            "id) with your preference rows"
        )
    return path


def _check_chosen(chosen_means: str | None, names: Sequence[str]) -> None:
    if chosen_means is not None and chosen_means not in names:
        allowed = ", ".join(names)
        raise UserError(f"dataset.chosen_means={chosen_means}: is not among dataset.objectives; allowed: {allowed}")


def _declared(rows: RowsOrErrors) -> RowsOrErrors:
    """The rows; UserError where the first of them leaves open what `chosen` means, before the others are read."""
    for where, row in rows:
        if is_pair_row(row) and not objectives_of_row(row):
            raise undeclared_chosen(where)
        yield where, row
        yield from rows


def _by_its_prompt(rows: RowsOrErrors) -> Iterator[tuple[str, LocatedRow]]:
    return ((prompt_of_row(row), (where, row)) for where, row in rows)


def _drained(rows: list[LocatedRow]) -> RowsOrErrors:
    """The rows in order; each leaves the list, so that it need not stay beside what is made of it."""
    rows.reverse()
    while rows:
        yield rows.pop()


def qa_feedback(path: str | None, test_path: str | None = None, passages: bool = False) -> Corpus:
    """QA-Feedback: questions with four answers of a model each, compared by people.

    Source: Wu et al., Fine-Grained Human Feedback, arXiv 2306.01693; {train,dev}_feedback.json in
    github.com/allenai/FineGrainedRLHF, tasks/qa_feedback/data. Objective `human`: the six comparisons of four answers,
    1v2 1v3 1v4 2v3 2v4 3v4; 1 is I = 1, 2 is I = 0, and 0 (no preference) is a tie. Two identical answers are a tie
    whatever was marked: dropping the pair instead would hide that the model often says the same, and so bias the win
    rate against it away from 1/2. Spans of `feedback` cover one answer in four and are not used.

    The context is the passages' text; `passages` puts it in front of the question in the prompt, too. A question
    without passages (2 of the 500 in the dev file) is skipped, as there is nothing to ground its answers in.
    """
    if path is None:
        raise UserError(
            "dataset.path is missing: set dataset.path=<file> to train_feedback.json or dev_feedback.json of "
            "github.com/allenai/FineGrainedRLHF, tasks/qa_feedback/data (may be gzipped)"
        )
    train, test = _train_and_test(path, "test", "validation")
    test = read_rows(test_path) if test_path is not None else test

    def convert(row: Row) -> Row:
        context = _passages_text(row["passages"])
        if not context:
            raise _UnusableRowError("no passages")
        prompt = f"{context}\n\n{row['question']}" if passages else row["question"]
        answers = [row[f"prediction {i}"] for i in (1, 2, 3, 4)]
        marks = zip(QA_FEEDBACK_PAIRS, row["preference"], strict=True)
        labels = [[a, b, _known(QA_FEEDBACK_I, mark, "preference")] for (a, b), mark in marks]
        return {"prompt": prompt, "responses": answers, "labels": {"human": labels}, "context": context}

    about = {"corpus": "QA-Feedback", "path": path, "test_path": test_path, "paper": "arXiv 2306.01693"}
    return _published(("human",), train, test, convert, about)


def _passages_text(passages: Sequence[Sequence[str]]) -> str:
    texts = []
    for title, *sentences in passages:
        text = " ".join(sentences)
        texts.append(text if text.startswith(title) else f"{title}\n\n{text}")
    return "\n\n".join(texts)


def hh_rlhf(path: str, parts: Mapping[str, Sequence[str]]) -> Corpus:
    """Anthropic's helpful and harmless comparisons, as transcripts with an implicit prompt.

    Source: hub id Anthropic/hh-rlhf; Bai et al., arXiv 2204.05862. `parts` maps an objective to the directories (or
    single files) inside `path` whose comparisons judge it: I = 1 for `chosen` under that objective, and every other
    objective is missing, for people were asked one question only. The parts are read in turn, a row of each, so that
    the first rows cover every objective. The test splits are the test set, where every objective has one.
    """
    if not parts:
        raise UserError("dataset.parts is empty: map each objective to directories, as in helpful: [helpful-base]")
    trains, tests = [], []
    for objective, directories in parts.items():
        listed = [directories] if isinstance(directories, str) else directories
        opened = [_train_and_test(path, "test", data_dir=directory) for directory in listed]
        trains.append(_tagged(chain.from_iterable(train for train, _ in opened), objective))
        own = [test for _, test in opened if test is not None]
        tests.append(_tagged(chain.from_iterable(own), objective) if own else None)
    test = _round_robin([rows for rows in tests if rows is not None]) if None not in tests else None
    about = {"corpus": "Anthropic/hh-rlhf", "path": path, "parts": dict(parts)}
    return _published(tuple(parts), _round_robin(trains), test, _hh_row, about | {"paper": "arXiv 2204.05862"})


def _hh_row(row: Row) -> Row:
    try:
        prompt, chosen, rejected = split_transcripts(row["chosen"], row["rejected"], row["where"])
    except RowError as error:
        if isinstance(row["chosen"], str) and isinstance(row["rejected"], str):
            several = error.kind.startswith("chosen or rejected has several turns")
            raise _UnusableRowError("several turns in an answer" if several else "no shared prompt") from None
        raise
    return {"prompt": prompt, "responses": [chosen, rejected], "labels": {row["objective"]: [[0, 1, 1.0]]}}


def _tagged(rows: Iterable[tuple[str, Row]], objective: str) -> Rows:
    return ((where, {**row, "objective": objective, "where": where}) for where, row in rows)


def _round_robin(streams: Sequence[Rows]) -> Rows:
    """A row of each stream in turn, until all have ended."""
    running = list(streams)
    while running:
        for stream in tuple(running):
            row = next(stream, None)
            if row is None:
                running.remove(stream)
            else:
                yield row


def reddit_tldr(path: str) -> Corpus:
    """Comparisons of two summaries of a Reddit post, in the validation split of CNN/DM articles as well.

    Source: hub id openai/summarize_from_feedback, config comparisons; Stiennon et al., arXiv 2009.01325. The hub keeps
    it behind a loading script that `datasets` no longer runs, so its Parquet conversion is read (refs/convert/parquet,
    directory comparisons); a .jsonl or .parquet file in the same schema does as well. Objective `human`: I = 1 for the
    summary `choice`; the workers' confidence is not used. The validation split is the test set; a single file has
    none, and rows that it marks as validation are skipped. The context is the post.
    """
    folder = Path(path).expanduser()
    nested = not is_local(path) or (folder / "comparisons").is_dir()
    source = {"data_dir": "comparisons" if nested else None, "revision": "refs/convert/parquet"}
    train, test = _train_and_test(path, "validation", **source)
    about = {"corpus": "openai/summarize_from_feedback", "path": path, "paper": "arXiv 2009.01325"}
    return _published(("human",), _marked_as_train(train), test, _tldr_row, about)


def _marked_as_train(rows: Rows) -> Rows:
    # The original files mix the splits and mark each row; the hub's conversion has them apart.
    skip = {"skip": "validation row in a training file"}
    return ((where, row if row.get("split") in (None, "train") else row | skip) for where, row in rows)


def _tldr_row(row: Row) -> Row:
    if "skip" in row:
        raise _UnusableRowError(row["skip"])
    info = row["info"]
    post = info.get("post")
    prompt = TLDR_PROMPT.format(**info) if post is not None else ARTICLE_PROMPT.format(**info)
    summaries = [summary["text"] for summary in row["summaries"]]
    label = [0, 1, _known(WINNER_I, row["choice"], "choice")]
    context = post if post is not None else info["article"]
    return {"prompt": prompt, "responses": summaries, "labels": {"human": [label]}, "context": context}


def ultrafeedback(path: str) -> Corpus:
    """Four completions a prompt, rated by GPT-4 under four aspects.

    Source: hub id openbmb/UltraFeedback; Cui et al., arXiv 2310.01377. Objectives instruction_following, honesty,
    truthfulness and helpfulness: I = 1 for the higher rating (1 to 5), equal ratings are a tie, and a rating that is no
    number ("N/A") is missing. `overall_score` is not used. There is no test split.
    """
    train, test = _train_and_test(path, "test")
    about = {"corpus": "openbmb/UltraFeedback", "path": path, "paper": "arXiv 2310.01377"}
    return _published(ULTRAFEEDBACK_ASPECTS, train, test, _ultrafeedback_row, about)


def _ultrafeedback_row(row: Row) -> Row:
    completions = row["completions"]
    notes = [completion["annotations"] for completion in completions]
    scores = {aspect: [_rating((note or {}).get(aspect)) for note in notes] for aspect in ULTRAFEEDBACK_ASPECTS}
    responses = [completion["response"] for completion in completions]
    return {"prompt": row["instruction"], "responses": responses, "scores": scores}


def _rating(annotation: Row | None) -> float | None:
    try:
        rating = float((annotation or {}).get("Rating") or "N/A")
    except ValueError:
        return None
    return rating if math.isfinite(rating) else None


def helpsteer2(path: str) -> Corpus:
    """Two responses a prompt, each rated by people under five attributes.

    Source: hub id nvidia/HelpSteer2; Wang et al., arXiv 2406.08673. Consecutive rows with one prompt become one
    example. I = 1 for the higher rating (0 to 4) under helpfulness, correctness, coherence, complexity and verbosity;
    equal ratings are a tie. More of complexity or verbosity is a fact, not a merit: choose with the objective set. A
    prompt of several turns (marked by <extra_id_1>) becomes messages. The validation split is the test set.
    """
    train, test = _train_and_test(path, "validation")
    about = {"corpus": "nvidia/HelpSteer2", "path": path, "paper": "arXiv 2406.08673"}
    grouped_test = _by_prompt(test) if test is not None else None
    return _published(HELPSTEER2_ATTRIBUTES, _by_prompt(train), grouped_test, _helpsteer2_row, about)


def _by_prompt(rows: Rows) -> Rows:
    for _, group in groupby(rows, key=lambda item: item[1].get("prompt")):
        items = list(group)
        yield items[0][0], {"rows": [row for _, row in items]}


def _helpsteer2_row(group: Row) -> Row:
    rows = group["rows"]
    scores = {attribute: [row[attribute] for row in rows] for attribute in HELPSTEER2_ATTRIBUTES}
    return {"prompt": _turns(rows[0]["prompt"]), "responses": [row["response"] for row in rows], "scores": scores}


def _turns(prompt: str) -> Text:
    """Messages of a HelpSteer2 prompt with several turns; a single turn stays a string."""
    first, *rest = re.split(r"\n?<extra_id_1>(User|Assistant)\n", prompt)
    if not rest:
        return prompt
    turns = zip(["User", *rest[::2]], [first, *rest[1::2]], strict=True)
    return [Message(role=role.lower(), content=content) for role, content in turns]


def pku_saferlhf(path: str) -> Corpus:
    """Two responses a prompt, compared for helpfulness and for safety apart.

    Source: hub id PKU-Alignment/PKU-SafeRLHF; Ji et al., arXiv 2406.15513. Objective `better`: I = 1 for the response
    `better_response_id`; objective `safer`: I = 1 for `safer_response_id`. Both are always judged, without ties.
    """
    train, test = _train_and_test(path, "test")
    about = {"corpus": "PKU-Alignment/PKU-SafeRLHF", "path": path, "paper": "arXiv 2406.15513"}
    return _published(("better", "safer"), train, test, _pku_row, about)


def _pku_row(row: Row) -> Row:
    columns = {"better": "better_response_id", "safer": "safer_response_id"}
    labels = {name: [[0, 1, _known(WINNER_I, row[column], column)]] for name, column in columns.items()}
    return {"prompt": row["prompt"], "responses": [row["response_0"], row["response_1"]], "labels": labels}


# What the corpora share
def _train_and_test(
    path: str,
    *test_splits: str,
    data_dir: str | None = None,
    revision: str | None = None,
    samples: tuple[Reservoir[Any], Reservoir[Any]] | None = None,
    read: Callable[..., Any] = read_rows,
) -> tuple[Any, Any]:
    """The rows of the train split, and of the first of `test_splits` that exists; a single file is all train."""
    splits = split_names(path, data_dir=data_dir, revision=revision)
    test = next((split for split in test_splits if split in splits), None)
    source = {"data_dir": data_dir, "revision": revision}
    train = read(path, "train", **source, sample=samples and samples[0])
    return train, read(path, test, **source, sample=samples and samples[1]) if test else None


def _published(
    objectives: tuple[str, ...], train: Rows, test: Rows | None, convert: Callable[[Row], Row], about: Row
) -> Corpus:
    """A Corpus whose published rows `convert` turns into list rows of the contract."""
    skipped: dict[str, int] = {}

    def examples(rows: Rows) -> Iterator[Example]:
        for where, row in rows:
            try:
                ready = _converted(row, convert, where)
            except _UnusableRowError as reason:
                skipped[str(reason)] = skipped.get(str(reason), 0) + 1
            else:
                yield example_from_row(ready, objectives, where, {})

    tested = examples(test) if test is not None else None
    return Corpus(objectives, examples(train), tested, {**about, "skipped": skipped})


def _converted(row: Row, convert: Callable[[Row], Row], where: str) -> Row:
    try:
        return _without_blanks(convert(row))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{where}: not a row of this corpus ({type(error).__name__}: {error}); found the keys: {', '.join(row)}"
        ) from error


def _known(table: Mapping[int, float], value: Any, field: str) -> float:
    if value not in table:
        raise ValueError(f"{field} holds {value!r}; allowed: {', '.join(str(key) for key in table)}")
    return table[value]


def _without_blanks(row: Row) -> Row:
    """The row without the responses that hold no text, and without their judgements."""
    if isinstance(row["prompt"], str | None) and not (row["prompt"] or "").strip():
        raise _UnusableRowError("empty prompt")
    kept = [i for i, response in enumerate(row["responses"]) if (response or "").strip()]
    if len(kept) < 2:
        raise _UnusableRowError("fewer than two responses with text")
    new = {old: i for i, old in enumerate(kept)}
    scores = {name: [values[i] for i in kept] for name, values in row.get("scores", {}).items()}
    labels = {
        name: [[new[a], new[b], value] for a, b, value in entries if a in new and b in new]
        for name, entries in row.get("labels", {}).items()
    }
    return {**row, "responses": [row["responses"][i] for i in kept], "scores": scores, "labels": labels}


def _carried_objectives(
    path: str, chosen_means: str | None, rows: Iterable[LocatedRow] | None, read: Callable[..., Any]
) -> tuple[str, ...]:
    """Every objective that some training row carries labels for, in order of appearance; None reads the path anew."""
    names: dict[str, None] = {} if chosen_means is None else {chosen_means: None}
    where = path
    for where, row in rows if rows is not None else _train_and_test(path, read=read)[0]:
        found = objectives_of_row(row)
        if not found and not names and is_pair_row(row):
            raise undeclared_chosen(where)
        names.update(dict.fromkeys(found))
    if not names:
        raise UserError(f"{path}: no row carries labels or scores of any objective (last looked at: {where})")
    return tuple(names)


def _checked_margins(margins: Mapping[str, float], objectives: Sequence[str]) -> dict[str, float]:
    for name, margin in margins.items():
        if name not in objectives:
            raise UserError(f"dataset.margins.{name}: no such objective in the data; allowed: {', '.join(objectives)}")
        if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin < float("inf"):
            raise UserError(f"dataset.margins.{name}={margin}: must be a number, 0 or more")
    return dict(margins)
