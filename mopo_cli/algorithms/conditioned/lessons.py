"""What methods share that train one policy for all of a user's wishes: lessons, samples with values, rounds of both.

A lesson is a response to be learnt behind a condition (directions.py). Judge and reference never see conditions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from mopo_cli.base.console import say
from mopo_cli.base.console import stage as shown_stage
from mopo_cli.base.errors import UserError
from mopo_cli.base.files import read_json, write_json
from mopo_cli.data.prepare import as_text
from mopo_cli.data.table import TokenRow, row_length
from mopo_cli.judging.rows import response_values
from mopo_cli.judging.scorers import Scale, fit_scale
from mopo_cli.models.logprobs import sequence_logps
from mopo_cli.training.checkpoints import Setting, Work, reached
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


@dataclass(frozen=True, slots=True)
class Round:
    """What was learnt from samples of the policy: each item's lessons."""

    items: list[list[Lesson]]
    samples: int
    off_support: float  # share of the samples that did not end or that the data never show
    told: dict[str, float] = field(default_factory=dict)  # numbers worth reading


# --------------------------------------------------------------------------------------------- settings
def check_settings(first_share: float, **counts: tuple[int, int]) -> None:
    """UserError where a setting of the rounds is out of range; counts: what each is, and the least that it may be."""
    for key, (value, least) in counts.items():
        if type(value) is not int or value < least:
            raise UserError(f"algorithm.{key}={value}: must be a whole number, {least} or more")
    if not 0 < first_share <= 1:
        raise UserError(f"algorithm.first_share={first_share}: must be in (0, 1]")


def policy_settings(setting: Setting) -> list[object]:
    """What a policy that learns from valued samples depends on, besides the settings that every policy does."""
    config, inputs = setting.config, setting.inputs
    computed = {name: (node.computed, node.margin) for name, node in config.objectives.items()}
    contexts = hashlib.sha256()
    for split in ("train", "heldout"):
        for example in inputs.examples[split]:
            contexts.update(repr(example.context).encode("utf-8", "surrogatepass"))
    lengths = config.model.max_length, inputs.policy.encoder.longest_response, config.model.chat_template
    return [computed, asdict(config.sampling), asdict(config.onpolicy), lengths, contexts.hexdigest()]


# --------------------------------------------------------------------------------------------- values
def check_scored(unscored: Sequence[str], method: str) -> None:
    """UserError where a method that needs values would get comparisons alone."""
    if unscored:
        raise UserError(
            f"algorithm={method} needs a value of each response, and preference_model.form=general only compares two "
            f"({', '.join(unscored)}); set preference_model.form=bradley_terry, which has values, or compute "
            f"objectives.{unscored[0]} by a function (computed)"
        )


def data_values(setting: Setting) -> list[Tensor]:
    """(G, K) values of every training row's responses."""
    inputs = setting.inputs
    examples, rows = inputs.examples["train"], inputs.tokens["train"]
    texts = [[as_text(response) for response in example.responses] for example in examples]
    with shown_stage("values of the data", 1) as progress:
        values = response_values(setting.judge, inputs.data.objectives, examples, rows, texts, inputs.policy.collate)
        progress.advance(1)
    return values


def fit_scales(values: Sequence[Tensor]) -> list[Scale]:
    """One scale an objective, on which the values (G, K) of the training responses have mean 0 and deviation 1."""
    flat = torch.cat(list(values)).double().numpy()
    return [fit_scale(column, "the training responses") for column in flat.T]


def standardised(values: Tensor | np.ndarray, scales: Sequence[Scale]) -> np.ndarray:
    """(n, K) values on their scales."""
    return np.stack([scale(np.asarray(values)[:, k]) for k, scale in enumerate(scales)], 1)


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
    inputs = setting.inputs
    taken = step_rows(setting, lessons.size)
    now: dict[str, object] = {"step": None}
    rows: dict[int, list[TokenRow]] = {}

    def rows_of(step: int) -> list[int]:
        numbers = taken(step)
        if now["step"] != step:  # a step's prompts are encoded together
            now["step"] = step
            rows.clear()
            rows.update(_encoded(setting, {i: lessons.of(i) for i in numbers}))
        return numbers

    def loss_of(numbers: list[int]) -> Tensor:
        batch = inputs.policy.collate([row for i in numbers for row in rows[i]]).to(setting.accelerator.device)
        return -sequence_logps(inputs.policy.model, batch).sum()

    task = Task(
        rows_of=rows_of,
        loss_of=loss_of,
        weight_of=lambda numbers: sum(len(row.responses[0]) for i in numbers for row in rows[i]),
        length_of=lambda i: sum(map(row_length, rows[i])),
    )
    responses = lambda numbers: sum(len(rows[i]) for i in numbers)  # noqa: E731
    descend(setting, task, work, title=title, steps=steps, pairs_of=responses, first=first)


def _encoded(setting: Setting, items: dict[int, list[Lesson]]) -> dict[int, list[TokenRow]]:
    """The token rows of each item's lessons."""
    examples = setting.inputs.examples["train"]
    flat = [lesson for lessons in items.values() for lesson in lessons]
    prompts = setting.inputs.policy.encoder.conditioned_prompts([(examples[one.row], one.condition) for one in flat])
    rows = iter([TokenRow(prompt, [one.response]) for prompt, one in zip(prompts, flat, strict=True)])
    return {i: [next(rows) for _ in lessons] for i, lessons in items.items()}


def fit_rounds(
    setting: Setting,
    name: str,
    parts: Sequence[int],
    start: Lessons,
    draw: Callable[[int], Round],
    learnt: Callable[[list[Round]], Lessons],
    work: Work,
) -> list[Round]:
    """parts[0] updates on `start`, then parts[t] on what is `learnt` from the rounds so far, round t being drawn from
    the policy when it begins.

    A run that goes on does not train again what its checkpoint has behind it; each round is kept in the run until then.
    """
    done, first = reached(setting), 0
    rounds: list[Round] = []
    for t, steps in enumerate(parts):
        title = f"alignment ({name})" + (f", round {t} of {len(parts) - 1}" if t else "")
        if t:
            rounds.append(_round(setting, f"{name}-round-{t}", done > first, lambda t=t: draw(t)))
            work.samples += rounds[-1].samples
            told = "  ".join(f"{key} {_number(value)}" for key, value in rounds[-1].told.items())
            say(f"{title}: {told}")
        if done > first + steps:
            work.steps += steps
        else:
            fit_lessons(setting, learnt(rounds) if t else start, work, title=title, steps=steps, first=first)
        first += steps
    return rounds


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _round(setting: Setting, name: str, passed: bool, draw: Callable[[], Round]) -> Round:
    """A round as it was drawn before the run's checkpoint, else drawn now; the same for every process."""
    path = setting.run.path / "stages" / f"{name}.json"
    if passed and path.exists():
        record = read_json(path)
        items = [[Lesson(**one) for one in item] for item in record.pop("items")]
        return Round(items, **record)
    drawn = [draw()]
    if setting.accelerator.num_processes > 1:
        broadcast_object_list(drawn)
    found = drawn[0]
    if setting.accelerator.is_main_process:
        items = [[{"row": o.row, "condition": o.condition, "response": o.response} for o in i] for i in found.items]
        about = {"samples": found.samples, "off_support": found.off_support, "told": found.told}
        write_json(path, {"items": items, **about})
    return found
