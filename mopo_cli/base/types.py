"""The records that flow between stages, and the legend of shapes.

Legend: B prompts in a batch, G responses a prompt, P labelled pairs, T tokens, K objectives, V vocabulary.
Objective 0 is always the primary one; the secondaries follow in the order of the objective set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

Message = dict[str, str]  # {"role": "user" | "assistant" | "system", "content": str}
Text = str | list[Message]  # a plain string, or a conversation
Scorer = Callable[[str, str, str], float]  # (prompt, response, context) -> score, higher is better


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt with its responses and the pairs that were judged.

    labels[p][k] is I_k of responses[pairs[p][0]] over responses[pairs[p][1]]: 1 preferred, 0 not, 0.5 a tie,
    NaN where nobody judged that pair under objective k.
    """

    prompt: Text
    responses: tuple[Text, ...]
    pairs: tuple[tuple[int, int], ...]
    labels: tuple[tuple[float, ...], ...]
    context: str = ""  # what a computed objective may look at besides the texts (passages, say)
    source: str = ""  # "file.jsonl:12", for messages
    group: str = ""  # rows of one group are about the same thing: together they count as one independent prompt


@dataclass(frozen=True, slots=True)
class Corpus:
    """What a corpus function returns: which objectives its labels cover, its examples, and how I was made."""

    objectives: tuple[str, ...]
    examples: Iterable[Example]
    test: Iterable[Example] | None = None  # a test split of its own, where the corpus has one
    provenance: dict[str, object] = field(default_factory=dict)
    world: object | None = None  # an enumerable world (data/assistant.py), where there is one


@dataclass(frozen=True, slots=True)
class Objective:
    """One objective of the set: where its labels come from and what is asked of it."""

    name: str
    role: str  # "primary" | "secondary"
    source: str  # the name of its labels in the data set
    threshold: float | None = None  # asked of the exact win rate; None follows the adaptive schedule
    scorer: Scorer | None = None  # a computed objective: its labels are made from this score
    margin: float = 0.0  # scores closer than this are a tie


@dataclass(frozen=True, slots=True)
class PreferenceData:
    """A data set ready for training: labels in the order of `objectives`, split by prompt."""

    objectives: tuple[Objective, ...]
    train: Sequence[Example]
    heldout: Sequence[Example]  # never trained on; for the preference model's accuracy and the multipliers
    test: Sequence[Example]  # touched by evaluation only
    provenance: dict[str, object]
    world: object | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(objective.name for objective in self.objectives)

    @property
    def thresholds(self) -> tuple[float | None, ...]:
        """(J,) what the user asks of each secondary; None follows the schedule."""
        return tuple(objective.threshold for objective in self.objectives[1:])


class HasRole(Protocol):
    @property
    def role(self) -> str: ...


R = TypeVar("R", bound=HasRole)


def primary_first(objectives: Mapping[str, R]) -> dict[str, R]:
    """The objectives in the order of the set, but for the primary one, which stands in front."""
    return dict(sorted(objectives.items(), key=lambda item: item[1].role != "primary"))
