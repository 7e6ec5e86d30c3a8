"""Who says which of two responses is better: the exact world, a scorer, or a preference model; one judge a column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from mopo_cli.base.types import Example, Objective
from mopo_cli.data.assistant import SCORED, World
from mopo_cli.data.assistant import scores as world_scores
from mopo_cli.data.batches import Collator
from mopo_cli.data.encoder import Encoder
from mopo_cli.data.prepare import as_text
from mopo_cli.data.table import TokenRow
from mopo_cli.judging.scorers import Scores
from mopo_cli.models.preference import PreferenceModel, features_of, win_probabilities


@dataclass(eq=False)
class Answers:
    """One source's responses to the prompts that are evaluated: any number to each."""

    texts: list[list[str]]
    tokens: list[TokenRow] | None = None  # as they were sampled or encoded by `encoder`
    encoder: Encoder | None = None


class Judge(Protocol):
    """Measures every response once, and compares what it measured."""

    title: str

    def measure(self, examples: Sequence[Example], answers: Answers) -> list[Any]:
        """What it found of each prompt's responses."""
        ...

    def wins(self, first: Any, second: Any) -> np.ndarray:
        """(N, M) probability that each of the first responses to a prompt beats each of the second."""
        ...

    def scores(self, measured: Any) -> np.ndarray | None:
        """(N,) its score of each response to a prompt; None for a judge that only compares."""
        ...


@dataclass
class ExactJudge:
    """The embedded world's own preferences."""

    world: World
    objective: str  # the world's name for it
    title: str = "exact"

    def measure(self, examples: Sequence[Example], answers: Answers) -> list[Any]:
        return [(str(e.prompt), texts) for e, texts in zip(examples, answers.texts, strict=True)]

    def wins(self, first: Any, second: Any) -> np.ndarray:
        (prompt, ours), (_, theirs) = first, second
        return self.world.preferences(prompt, ours, theirs)[self.world.objectives.index(self.objective)]

    def scores(self, measured: Any) -> np.ndarray | None:
        prompt, texts = measured
        if self.objective not in SCORED:
            return None
        k = SCORED.index(self.objective)
        return np.array([world_scores(text, self.world.prompts[prompt])[k] for text in texts])


@dataclass
class ScoreJudge:
    """A scorer: the higher score wins, scores at most `margin` apart are a tie."""

    function: Scores
    title: str
    margin: float = 0.0

    def measure(self, examples: Sequence[Example], answers: Answers) -> list[Any]:
        """(N,) scores of each prompt's responses; the same response to the same prompt is scored once."""
        rows = {(i, text): (e, text) for i, e in enumerate(examples) for text in answers.texts[i]}
        known = dict(zip(rows, self.function(list(rows.values())), strict=True))
        return [np.array([known[i, text] for text in texts]) for i, texts in enumerate(answers.texts)]

    def wins(self, first: Any, second: Any) -> np.ndarray:
        gap = first[:, None] - second[None, :]
        size = np.abs(gap)
        tie = (size <= self.margin) | np.isclose(size, self.margin, rtol=1e-9, atol=0.0)
        return np.where(tie, 0.5, gap > 0)

    def scores(self, measured: Any) -> np.ndarray | None:
        return measured


@dataclass
class PreferenceFeatures:
    """A preference model with the tokenizer that it reads through; its features serve all its objectives."""

    model: PreferenceModel
    encoder: Encoder
    collate: Collator
    known: dict[int, tuple[Answers, list[Tensor]]] = field(default_factory=dict)

    def __call__(self, examples: Sequence[Example], answers: Answers) -> list[Tensor]:
        """(G, K, D) features of each prompt's responses."""
        if id(answers) not in self.known:
            own = answers.encoder is self.encoder and answers.tokens is not None
            rows = answers.tokens if own else [self._row(e, t) for e, t in zip(examples, answers.texts, strict=True)]
            self.known[id(answers)] = answers, features_of(self.model, rows or [], self.collate)
        return self.known[id(answers)][1]

    def _row(self, example: Example, texts: list[str]) -> TokenRow:
        """Texts of another tokenizer in this one's tokens, cut where they would not fit; they keep their end token."""
        prompt = encoded_prompt(self.encoder, example)
        room = max(1, self.encoder.max_length - len(prompt))
        return TokenRow(prompt, [[*ids[: room - 1], ids[-1]] for ids in map(self.encoder.response_ids, texts)])


@dataclass
class PreferenceJudge:
    """One objective of a preference model."""

    features: PreferenceFeatures
    column: int
    title: str = "preference model"

    def measure(self, examples: Sequence[Example], answers: Answers) -> list[Any]:
        return self.features(examples, answers)

    def wins(self, first: Any, second: Any) -> np.ndarray:
        return win_probabilities(self.features.model, first, second)[:, :, self.column].double().numpy()

    def scores(self, measured: Any) -> np.ndarray | None:
        """The Bradley-Terry value; a general preference model has none."""
        return None if self.features.model.rank else measured[:, self.column, 0].double().numpy()


def objective_scores(objective: Objective) -> Scores:
    """The scorer of a computed objective."""
    assert objective.scorer is not None
    scorer = objective.scorer
    return lambda rows: np.array([float(scorer(as_text(e.prompt), text, e.context)) for e, text in rows])


def encoded_prompt(encoder: Encoder, example: Example) -> list[int]:
    """The prompt's tokens as in training: a plain one is ended by a newline where the data's responses need it."""
    return encoder.prompt_ids(example.prompt, example.responses[0] if example.responses else "x")


def own_judge(objective: Objective, world: object | None, features: PreferenceFeatures | None, column: int) -> Judge:
    """The best judge of an objective without a gold scorer: its own function, the exact world, the preference model."""
    if objective.scorer is not None:
        return ScoreJudge(objective_scores(objective), "computed", objective.margin)
    if isinstance(world, World):
        return ExactJudge(world, objective.source)
    assert features is not None
    return PreferenceJudge(features, column)
