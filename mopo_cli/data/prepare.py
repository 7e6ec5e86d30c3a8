"""From a corpus and an objective set to PreferenceData: labels in the set's order, split by prompt."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from mopo_cli.base.errors import UserError
from mopo_cli.base.secrets import holds_masked
from mopo_cli.base.types import Corpus, Example, Message, Objective, PreferenceData, Scorer, Text, primary_first
from mopo_cli.config.compose import build
from mopo_cli.config.schema import ObjectiveConfig, check_primary
from mopo_cli.data.columns import UNREAD
from mopo_cli.data.rows import preference, text_key
from mopo_cli.data.subsample import Reservoir, sampled

COMMON_KEYS = ("heldout_fraction", "test_fraction", "max_rows", "overlong", "labels")
SEEN = "test_prompts_in_training"  # in the provenance, where there are any
Split = tuple[list[Example], list[Example], list[Example]]  # training, held out, test


def load(dataset: dict[str, Any], objectives: dict[str, ObjectiveConfig]) -> PreferenceData:
    """Load a data set for an objective set.

    Provenance says how the labels were made, and counts the rows that were left out for having none.
    Raises UserError where the objective set and the data do not fit, or where a split is left empty.
    """
    check_primary(objectives)
    heldout, test = _fractions(dataset)
    corpus = _corpus(dataset)
    chosen = resolve_objectives(objectives, corpus)
    examples, unlabelled = _select(corpus.examples, chosen, corpus)
    _check_labels(examples, chosen, "the data", unlabelled)
    if corpus.test is None:
        train, heldout_rows, tested = _split(examples, heldout, test, unit_key)
    else:
        key = unit_key if corpus.world is None else prompt_key  # the world's topics are in every part
        train, heldout_rows, _ = _split(examples, heldout, 0.0, key)
        tested, more = _select(corpus.test, chosen, corpus)
        unlabelled += more
    _check_sizes({"training": train, "held-out": heldout_rows, "test": tested}, len(examples))
    _check_labels(train, chosen, "the training rows")
    found = {key: value for key, value in corpus.provenance.items() if key != UNREAD or value}
    shared = _shared_prompts(tested, (*train, *heldout_rows)) if corpus.test is not None else {}
    provenance = {"labels": dataset.get("labels"), **found, **_own_labels(chosen, unlabelled), **shared}
    return PreferenceData(chosen, train, heldout_rows, tested, provenance, corpus.world)


def _shared_prompts(tested: Sequence[Example], trained: Sequence[Example]) -> dict[str, object]:
    """How many prompts of a test set of its own the training or held-out rows have as well; {} where none."""
    prompts = {prompt_key(example) for example in tested}
    seen = prompts & {prompt_key(example) for example in trained}
    return {SEEN: f"{len(seen)} of {len(prompts)}"} if seen else {}


def _corpus(dataset: dict[str, Any]) -> Corpus:
    """The corpus with at most dataset.max_rows rows, and as many test rows.

    A function that has the argument max_rows bounds them itself, before it makes examples of them.
    """
    node = {key: value for key, value in dataset.items() if key not in COMMON_KEYS}
    limit = dataset.get("max_rows")
    if _takes_max_rows(str(node["_target_"])):
        return build(node, "dataset", max_rows=limit)
    corpus: Corpus = build(node, "dataset")
    if limit is None:
        return corpus
    notes: dict[str, object] = {}
    examples = sampled(_by_prompt(corpus.examples), Reservoir(limit), notes, "sample")
    test = corpus.test and sampled(_by_prompt(corpus.test), Reservoir(limit), notes, "test_sample")
    return replace(corpus, examples=examples, test=test, provenance={**corpus.provenance, **notes})


def _by_prompt(examples: Iterable[Example]) -> Iterator[tuple[str, Example]]:
    return ((prompt_key(example), example) for example in examples)


def _takes_max_rows(target: str) -> bool:
    module, _, name = target.rpartition(".")
    try:
        return "max_rows" in inspect.signature(getattr(importlib.import_module(module), name)).parameters
    except Exception:  # `build` says what is wrong with it
        return False


def _fractions(dataset: dict[str, Any]) -> tuple[float, float]:
    """The held-out and test fractions, with the other keys that `load` reads checked as well."""
    if "_target_" not in dataset:
        raise UserError("dataset: has no _target_, the function that loads it")
    for key, value in dataset.items():
        if holds_masked(value):
            raise UserError(
                f"dataset.{key}={value}: its secret was masked when it was written; give the value itself on this "
                "command line (dataset=NAME dataset.KEY=...)"
            )
    rows = dataset.get("max_rows")
    if rows is not None and not (type(rows) is int and rows >= 1):
        raise UserError(f"dataset.max_rows={rows}: must be a whole number, 1 or more, or null")
    heldout, test = dataset.get("heldout_fraction", 0.1), dataset.get("test_fraction", 0.1)
    for key, value in (("heldout_fraction", heldout), ("test_fraction", test)):
        if type(value) not in (int, float) or not 0 < value < 1:
            raise UserError(f"dataset.{key}={value}: must be a number between 0 and 1")
    if heldout + test >= 1:
        raise UserError(f"dataset: heldout_fraction + test_fraction = {heldout + test:g} leaves nothing to train on")
    return heldout, test


def resolve_objectives(objectives: dict[str, ObjectiveConfig], corpus: Corpus) -> tuple[Objective, ...]:
    """The objective set's records, primary first; UserError where the corpus has no such labels."""
    chosen = []
    for name, node in primary_first(objectives).items():
        source = node.source or name
        if node.computed is None and source not in corpus.objectives:
            raise UserError(
                f"objectives.{name}: the data set has no labels {source!r}; it has: "
                f"{', '.join(corpus.objectives) or 'none'}. "
                f"Set objectives.{name}.source to one of them, or give objectives.{name}.computed"
            )
        if node.computed is None and node.margin != 0:
            raise UserError(
                f"objectives.{name}.margin={node.margin}: only a computed objective takes a margin; the ties of "
                "labels in the data are made there (dataset.margins, where the data set has scores)"
            )
        scorer = _scorer(node.computed, f"objectives.{name}.computed") if node.computed else None
        chosen.append(Objective(name, node.role, source, node.threshold, scorer, node.margin))
    return tuple(chosen)


def _scorer(node: Any, what: str) -> Scorer:
    if not isinstance(node, dict) or "_target_" not in node:
        raise UserError(f"{what}={node}: must be null, or a mapping whose _target_ names a scorer")
    built = build({**node, "_partial_": True}, what)
    # Hydra's own partial checks its target again at each call, which takes longer than most scorers.
    return partial(built.func, *built.args, **built.keywords)


def as_text(text: Text) -> str:
    """A plain view of a text, for scorers and reports; a conversation becomes a Human / Assistant transcript."""
    if isinstance(text, str):
        return text
    if len(text) == 1 and text[0]["role"] == "assistant":
        return text[0]["content"]
    return transcript(text)


def transcript(messages: list[Message]) -> str:
    """The field's plain transcript, for tokenizers without a chat template."""
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    turns = "".join(f"\n\n{names.get(m['role'], m['role'])}: {m['content']}" for m in messages)
    return turns.lstrip("\n") + ("\n\nAssistant:" if messages[-1]["role"] != "assistant" else "")


def _select(
    examples: Iterable[Example], objectives: tuple[Objective, ...], corpus: Corpus
) -> tuple[list[Example], int]:
    """The examples with the set's objectives only, and how many had no label under any of them and were left out."""
    columns = [corpus.objectives.index(o.source) if o.scorer is None else -1 for o in objectives]
    selected = [_select_one(example, objectives, columns) for example in examples]
    labelled = [example for example in selected if example.pairs]
    return labelled, len(selected) - len(labelled)


def _select_one(example: Example, objectives: tuple[Objective, ...], columns: list[int]) -> Example:
    """Keep the set's labels; a computed objective judges every pair of responses, whether people did or not."""
    judged = {
        pair: [row[c] if c >= 0 else math.nan for c in columns]
        for pair, row in zip(example.pairs, example.labels, strict=True)
    }
    for k, objective in enumerate(objectives):
        if objective.scorer is None:
            continue
        values = _score(objective, objective.scorer, example)
        for a, b in itertools.combinations(range(len(values)), 2):
            pair = (b, a) if (b, a) in judged else (a, b)
            row = judged.setdefault(pair, [math.nan] * len(objectives))
            row[k] = preference(values[pair[0]], values[pair[1]], objective.margin)
    labelled = {pair: tuple(row) for pair, row in judged.items() if not all(math.isnan(v) for v in row)}
    return replace(example, pairs=tuple(labelled), labels=tuple(labelled.values()))


def _score(objective: Objective, scorer: Scorer, example: Example) -> list[float]:
    prompt = as_text(example.prompt)
    try:
        values = [float(scorer(prompt, as_text(response), example.context)) for response in example.responses]
    except UserError as error:
        raise UserError(f"{example.source}: {error}") from error
    except Exception as error:
        raise UserError(
            f"{example.source}: objectives.{objective.name}.computed failed ({type(error).__name__}: {error}); "
            "a scorer takes (prompt, response, context) and returns a number"
        ) from error
    for value in values:
        if not math.isfinite(value):
            raise UserError(f"{example.source}: objective {objective.name} scored {value}; a score must be finite")
    return values


def _own_labels(objectives: tuple[Objective, ...], unlabelled: int) -> dict[str, object]:
    """What the objective set adds to the provenance."""
    made: dict[str, object] = {
        objective.name: {"scorer": f"{function.__module__}.{function.__qualname__}", "margin": objective.margin}
        for objective in objectives
        if isinstance(objective.scorer, partial) and (function := objective.scorer.func)
    }
    added = {"computed": made, "rows_without_labels": unlabelled}
    return {key: value for key, value in added.items() if value}


def _check_labels(examples: list[Example], objectives: tuple[Objective, ...], where: str, unlabelled: int = 0) -> None:
    if not examples:
        found = f"{unlabelled} rows, none with a label for any objective of the set" if unlabelled else "no rows at all"
        raise UserError(f"dataset: found {found}")
    for k, objective in enumerate(objectives):
        if all(math.isnan(row[k]) for example in examples for row in example.labels):
            raise UserError(
                f"objectives.{objective.name}: every label is missing in {where} ({len(examples)} rows); "
                "leave the objective out, or choose another source for it"
            )


def _check_sizes(parts: dict[str, list[Example]], total: int) -> None:
    for name, part in parts.items():
        if not part:
            raise UserError(
                f"dataset: no {name} rows are left of {total}; give more rows, or change "
                "dataset.heldout_fraction / dataset.test_fraction / dataset.max_rows"
            )


def prompt_key(example: Example) -> str:
    """The prompt as one string: rows with the same key belong to the same split."""
    return text_key(example.prompt)


def unit_key(example: Example) -> str:
    """What is independent of others: the group where there is one, else the prompt."""
    return example.group or prompt_key(example)


def unit_numbers(examples: Sequence[Example]) -> np.ndarray:
    """(N,) whole numbers, the same for rows that are not independent of each other."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(unit_key(example), len(numbers)) for example in examples], dtype=np.int64)


def _split(examples: Sequence[Example], heldout: float, test: float, key: Callable[[Example], str]) -> Split:
    """By a hash of the key, so that rows with the same one stay together and the split survives reordering."""
    parts: Split = ([], [], [])
    for example in examples:
        digest = hashlib.sha256(key(example).encode()).digest()
        position = int.from_bytes(digest[:8], "big") / 2**64
        parts[1 if position < heldout else 2 if position < heldout + test else 0].append(example)
    return parts
