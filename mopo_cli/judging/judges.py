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
from mopo_cli.judging.scorers import Rows, Scores
from mopo_cli.models.preference import PreferenceModel, features_of, win_probabilities


@dataclass(eq=False)
class JudgedResponses:
    """One source's responses to the prompts that are evaluated: any number to each."""

    texts: list[list[str]]
    tokens: list[TokenRow] | None = None  # as they were sampled or encoded by `encoder`
    encoder: Encoder | None = None


class Judge(Protocol):
    """Measures every response once, and compares what it measured."""

    title: str

    def measure(self, examples: Sequence[Example], responses: JudgedResponses) -> list[Any]:
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

    def measure(self, examples: Sequence[Example], responses: JudgedResponses) -> list[Any]:
        return [(str(e.prompt), texts) for e, texts in zip(examples, responses.texts, strict=True)]

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

    def measure(self, examples: Sequence[Example], responses: JudgedResponses) -> list[Any]:
        """(N,) scores of each prompt's responses; the same response to the same prompt is scored once."""
        rows = {(i, text): (e, text) for i, e in enumerate(examples) for text in responses.texts[i]}
        scored = dict(zip(rows, self.function(list(rows.values())), strict=True))
        return [np.array([scored[i, text] for text in texts]) for i, texts in enumerate(responses.texts)]

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
    names: Sequence[str]  # of its objectives, in the order of its outputs
    encoder: Encoder
    collate: Collator
    cache: dict[int, tuple[JudgedResponses, list[Tensor]]] = field(default_factory=dict)

    def __call__(self, examples: Sequence[Example], responses: JudgedResponses) -> list[Tensor]:
        """(G, K, D) features of each prompt's responses."""
        if id(responses) not in self.cache:
            rows = responses.tokens
            if rows is None or responses.encoder is not self.encoder:
                rows = [self._row(e, texts) for e, texts in zip(examples, responses.texts, strict=True)]
            self.cache[id(responses)] = responses, features_of(self.model, rows, self.collate)
        return self.cache[id(responses)][1]

    def _row(self, example: Example, texts: list[str]) -> TokenRow:
        """Texts of another tokenizer in this one's tokens, cut where they would not fit; they keep their end token."""
        prompt = encoded_prompt(self.encoder, example)
        room = max(1, self.encoder.max_length - len(prompt))
        return TokenRow(
            prompt,
            [
                [*ids[: room - 1], ids[-1]]
                for ids in (self.encoder.response_ids(text, example.prompt) for text in texts)
            ],
        )


@dataclass
class PreferenceJudge:
    """One objective of a preference model."""

    features: PreferenceFeatures
    column: int
    title: str = "preference model"

    def measure(self, examples: Sequence[Example], responses: JudgedResponses) -> list[Any]:
        return self.features(examples, responses)

    def wins(self, first: Any, second: Any) -> np.ndarray:
        return win_probabilities(self.features.model, first, second)[:, :, self.column].double().numpy()

    def scores(self, measured: Any) -> np.ndarray | None:
        """The Bradley-Terry value; a general preference model has none."""
        return None if self.features.model.rank else measured[:, self.column, 0].double().numpy()


def encoded_prompt(encoder: Encoder, example: Example) -> list[int]:
    """The prompt's tokens as in training: a plain one is ended by a newline where the data's responses need it."""
    return encoder.prompt_ids(example.prompt, *(example.responses or ("x",)))


def own_judge(objective: Objective, world: object | None, features: PreferenceFeatures | None) -> Judge:
    """The best judge of an objective without a gold scorer: its own function, the exact world, the preference model."""
    if objective.scorer is not None:
        return computed_judge(objective)
    if isinstance(world, World):
        return ExactJudge(world, objective.source)
    assert features is not None
    return PreferenceJudge(features, features.names.index(objective.name))


def computed_judge(objective: Objective) -> ScoreJudge:
    """The judge of an objective that has a function of its own."""
    scorer = objective.scorer
    assert scorer is not None

    def scores(rows: Rows) -> np.ndarray:
        return np.array([float(scorer(as_text(e.prompt), text, e.context)) for e, text in rows])

    return ScoreJudge(scores, "computed", objective.margin)


def computed_judges(objectives: Sequence[Objective]) -> list[tuple[int, ScoreJudge]]:
    """The judges of those objectives that have functions of their own, with their places."""
    return [(k, computed_judge(objective)) for k, objective in enumerate(objectives) if objective.scorer is not None]


def win_rates(judge: Judge, ours: Sequence[Any], theirs: Sequence[Any]) -> list[np.ndarray]:
    """(M,) mean win rates of each prompt's M responses against the others to the same prompt, from their measures; NaN
    where there are no others."""
    wins = [judge.wins(first, second) for first, second in zip(ours, theirs, strict=True)]
    return [w.mean(axis=1) if w.shape[1] else np.full(len(w), np.nan) for w in wins]
