"""What algorithms learn that train one policy for all of a user's wishes: lessons, from responses with values.

A lesson is a response to be learnt behind a condition (directions.py). Judge and reference never see conditions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mopo_cli.base.console import stage as shown_stage
from mopo_cli.base.errors import UserError
from mopo_cli.data.prepare import as_text
from mopo_cli.data.table import TokenRow, row_length
from mopo_cli.judging.rows import response_values
from mopo_cli.judging.scorers import Scale, fit_scale
from mopo_cli.models.logprobs import sequence_logps
from mopo_cli.training.checkpoints import Setting, Work
from mopo_cli.training.loop import Task
from mopo_cli.training.stage import descend, step_rows


@dataclass(frozen=True, slots=True)
class Lesson:
    """A response to a training row's prompt, to be learnt behind a condition."""

    row: int
    condition: str
    response: list[int]  # token ids


@dataclass(frozen=True, slots=True)
class Lessons:
    """What a stage learns: the lessons of each of `size` items, made as a step takes them."""

    size: int
    of: Callable[[int], list[Lesson]]


def listed(items: Sequence[list[Lesson]]) -> Lessons:
    return Lessons(len(items), items.__getitem__)


# --------------------------------------------------------------------------------------------- values
def check_scored(unscored: Sequence[str], algorithm: str) -> None:
    """UserError where an algorithm that needs values would get comparisons alone."""
    if unscored:
        raise UserError(
            f"algorithm={algorithm} needs a value of each response, and preference_model.form=general only compares "
            f"two ({', '.join(unscored)}); set preference_model.form=bradley_terry, which has values, or compute "
            f"objectives.{unscored[0]} by a function (computed)"
        )


def fit_scales(values: Sequence[Tensor]) -> list[Scale]:
    """One scale an objective, on which the values (G, K) of the training responses have mean 0 and deviation 1."""
    flat = torch.cat(list(values)).double().numpy()
    return [fit_scale(column, "the training responses") for column in flat.T]


def standardised(values: Tensor | np.ndarray, scales: Sequence[Scale]) -> np.ndarray:
    """(n, K) values on their scales."""
    return np.stack([scale(np.asarray(values)[:, k]) for k, scale in enumerate(scales)], 1)


@dataclass(frozen=True, slots=True)
class ScoredData:
    """The training rows with the judge's values of their responses, on scales of their own."""

    rows: Sequence[TokenRow]
    scores: list[np.ndarray]  # (G, K) of each row's responses
    scales: list[Scale]  # (K,)
    seed: int


def scored_data(setting: Setting) -> ScoredData:
    inputs = setting.inputs
    examples, rows = inputs.examples["train"], inputs.tokens["train"]
    texts = [[as_text(response) for response in example.responses] for example in examples]
    with shown_stage("values of the data", 1) as progress:
        values = response_values(setting.judge, inputs.data.objectives, examples, rows, texts, inputs.policy.collate)
        progress.advance(1)
    scales = fit_scales(values)
    return ScoredData(rows, [standardised(v, scales) for v in values], scales, setting.config.seed)


# --------------------------------------------------------------------------------------------- learning
def split_steps(steps: int, share: float, rounds: int) -> list[int]:
    """Updates of the first stage, which has `share` of them, and of each round; all of the first without rounds.

    Each has one at least, so that few steps may become more of them.
    """
    each = max(1, round(steps * (1.0 - share) / rounds)) if rounds else 0
    return [max(1, steps - rounds * each), *[each] * rounds]


def fit_lessons(setting: Setting, lessons: Lessons, work: Work, *, title: str, steps: int, first: int = 0) -> None:
    """SFT of setting.inputs.policy on lessons, those of config.batch_size items an update.

    The loss is a mean over the responses' tokens, as the reference's own (pretrain.py).
    """
    inputs, examples = setting.inputs, setting.inputs.examples["train"]
    taken = step_rows(setting, lessons.size)
    encoded_step = -1
    rows: dict[int, list[TokenRow]] = {}

    def rows_of(step: int) -> list[int]:
        nonlocal encoded_step, rows
        numbers = taken(step)
        if encoded_step != step:  # a step's prompts are encoded together
            encoded_step, rows = step, _encoded(setting, {i: lessons.of(i) for i in numbers})
        return numbers

    def loss_of(numbers: list[int]) -> Tensor:
        batch = inputs.policy.collate([row for i in numbers for row in rows[i]]).to(setting.accelerator.device)
        return -sequence_logps(inputs.policy.model, batch).sum()

    task = Task(
        rows_of=rows_of,
        loss_of=loss_of,
        weight_of=lambda numbers: sum(len(row.responses[0]) for i in numbers for row in rows[i]),
        length_of=lambda i: sum(map(row_length, rows[i])),
        source_of=lambda i: ", ".join(dict.fromkeys(examples[one.row].source or str(one.row) for one in lessons.of(i))),
    )
    responses = lambda numbers: sum(len(rows[i]) for i in numbers)  # noqa: E731
    descend(setting, task, work, title=title, steps=steps, pairs_of=responses, first=first)


def _encoded(setting: Setting, items: dict[int, list[Lesson]]) -> dict[int, list[TokenRow]]:
    """The token rows of each item's lessons."""
    examples = setting.inputs.examples["train"]
    flat = [lesson for lessons in items.values() for lesson in lessons]
    prompts = setting.inputs.policy.encoder.conditioned_prompts(
        [(examples[lesson.row], lesson.condition) for lesson in flat]
    )
    rows = iter([TokenRow(prompt, [lesson.response]) for prompt, lesson in zip(prompts, flat, strict=True)])
    return {i: [next(rows) for _ in lessons] for i, lessons in items.items()}
