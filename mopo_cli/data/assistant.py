"""The embedded world: an assistant that must be helpful, harmless and concise, small enough to be enumerated.

Every response is composed from slots (opening, content, details, caution, joke), so for each prompt all 108 responses
and their probabilities under the behaviour policy mu are known. Objectives are scored from the text; labels are sampled
from the scores (Bradley-Terry). Because everything can be listed, evaluation computes exact win rates and the exact
optimum of problem (P).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations, product

import numpy as np

from mopo_cli.base.types import Corpus, Example
from mopo_cli.data.topics import ASKERS, PHRASINGS, TOPICS, Topic

OPENINGS = ("", "Sure!", "Great question, thanks for asking.")
CONTENTS = ("right", "vague", "refusing")
VAGUE = "There are many ways, and it depends."
REFUSING = "Sorry, I would rather not help with that."
DETAILS = (
    "Start small and see how it turns out.",
    "Get everything ready before you begin.",
    "Do it a second time, since it gets easier.",
)
CAUTION = "Please be careful and ask someone you trust."
JOKE = "And whatever you do, never ask a clown!"
SCORED = ("helpful", "harmless", "concise")
CYCLIC = "tone"  # openings beat each other in a circle: no score can express it


@dataclass(frozen=True, slots=True)
class Slots:
    """The features of one response, by construction or read back from its text."""

    opening: int
    content: str
    details: int
    caution: bool
    joke: bool


@dataclass(frozen=True, slots=True)
class Prompt:
    text: str
    topic: Topic


def all_slots() -> tuple[Slots, ...]:
    """Every response of the world, the same for each prompt; a refusal carries no details."""
    return tuple(
        Slots(opening, content, details, caution, joke)
        for opening, content, details, caution, joke in product(
            range(3), CONTENTS, range(4), (False, True), (False, True)
        )
        if content != "refusing" or details == 0
    )


SLOTS = all_slots()


def compose(slots: Slots, topic: Topic) -> str:
    content = {"right": topic.answer, "vague": VAGUE, "refusing": REFUSING}[slots.content]
    parts = [OPENINGS[slots.opening], content, *DETAILS[: slots.details]]
    parts += [CAUTION] * slots.caution + [JOKE] * slots.joke
    return " ".join(part for part in parts if part)


def read_slots(response: str, topic: Topic) -> Slots:
    """The features of any text; what is not recognised counts as vague content."""
    content = "right" if topic.answer in response else "refusing" if REFUSING in response else "vague"
    return Slots(
        opening=max(i for i, opening in enumerate(OPENINGS) if response.startswith(opening)),
        content=content,
        details=sum(detail in response for detail in DETAILS),
        caution=CAUTION in response,
        joke=JOKE in response,
    )


def helpful(slots: Slots, risky: bool) -> float:
    content = {"right": 1.0, "vague": -0.6, "refusing": -1.6}[slots.content]
    return content + 0.45 * slots.details + 0.3 * (slots.opening > 0) - 0.3 * slots.caution + 0.2 * slots.joke


def harmless(slots: Slots, risky: bool) -> float:
    content = {"right": -1.6, "vague": 0.2, "refusing": 1.4} if risky else {"right": 0.0, "vague": 0.1, "refusing": 0.2}
    weight = 0.4 if risky else 0.25
    return content[slots.content] - weight * slots.details + 0.9 * slots.caution - 0.5 * slots.joke


def concise(response: str) -> float:
    return -0.08 * len(response.split())


def scores(response: str, topic: Topic) -> np.ndarray:
    """(3,) helpful, harmless and concise scores of any text, in logits."""
    slots = read_slots(response, topic)
    return np.array([helpful(slots, topic.risky), harmless(slots, topic.risky), concise(response)])


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def tone_preference(a: np.ndarray, b: np.ndarray, strength: float = 0.4) -> np.ndarray:
    """P(a over b) for openings in a circle: each beats the one before it with probability 1/2 + strength."""
    step = (a - b) % 3
    return 0.5 + strength * ((step == 1).astype(float) - (step == 2).astype(float))


def behaviour_probabilities(topic: Topic) -> np.ndarray:
    """(A,) mu(y|x) over SLOTS: slots are independent but for the details, which a refusal does not have."""
    content = (
        {"right": 0.45, "vague": 0.30, "refusing": 0.25}
        if topic.risky
        else {"right": 0.55, "vague": 0.35, "refusing": 0.10}
    )
    opening, details = (0.4, 0.35, 0.25), (0.4, 0.3, 0.2, 0.1)
    weights = [
        opening[s.opening]
        * content[s.content]
        * (1.0 if s.content == "refusing" else details[s.details])
        * (0.35 if s.caution else 0.65)
        * (0.25 if s.joke else 0.75)
        for s in SLOTS
    ]
    return np.array(weights)


@dataclass(frozen=True)
class World:
    """The enumerable truth behind the data: texts, mu and the preference matrices of any prompt."""

    objectives: tuple[str, ...]
    prompts: dict[str, Topic] = field(repr=False)

    def responses(self, prompt: str) -> list[str]:
        return [compose(slots, self.prompts[prompt]) for slots in SLOTS]

    def mu(self, prompt: str) -> np.ndarray:
        return behaviour_probabilities(self.prompts[prompt])

    def preferences(self, prompt: str, first: list[str], second: list[str]) -> np.ndarray:
        """(K, len(first), len(second)) P_k(first over second | prompt), for any texts."""
        topic = self.prompts[prompt]
        r1 = np.array([scores(text, topic) for text in first])
        r2 = r1 if second is first else np.array([scores(text, topic) for text in second])
        matrices = list(sigmoid(r1.T[:, :, None] - r2.T[:, None, :]))
        if CYCLIC in self.objectives:
            o1, o2 = (np.array([read_slots(text, topic).opening for text in texts]) for texts in (first, second))
            matrices.append(tone_preference(o1[:, None], o2[None, :]))
        return np.stack([matrices[(*SCORED, CYCLIC).index(name)] for name in self.objectives])

    def win_rates(self, prompt: str, texts: list[str] | None = None) -> np.ndarray:
        """(A, K) p_bar: the mean win rate against mu of every response of the world, or of the given texts."""
        responses = self.responses(prompt)
        return (self.preferences(prompt, texts or responses, responses) @ self.mu(prompt)).T


def all_prompts() -> tuple[Prompt, ...]:
    return tuple(
        Prompt(asker + phrasing.format(task=topic.task), topic)
        for topic in TOPICS
        for phrasing in PHRASINGS
        for asker in ASKERS
    )


def split_prompts(rng: np.random.Generator) -> tuple[list[Prompt], list[Prompt]]:
    """Training and test prompts: of each topic, two of its 24 phrasings are kept for the test."""
    train, test = [], []
    prompts = all_prompts()
    size = len(PHRASINGS) * len(ASKERS)
    for start in range(0, len(prompts), size):
        order = rng.permutation(size) + start
        test += [prompts[i] for i in order[:2]]
        train += [prompts[i] for i in order[2:]]
    return train, test


def _examples(world: World, prompts: list[Prompt], rows: int, responses: int, seed: int) -> Iterator[Example]:
    rng = np.random.default_rng(seed)
    pairs = tuple(combinations(range(responses), 2))
    for row in range(rows):
        prompt = prompts[row % len(prompts)]
        mu = behaviour_probabilities(prompt.topic)
        chosen = rng.choice(len(SLOTS), size=responses, p=mu)
        texts = [compose(SLOTS[i], prompt.topic) for i in chosen]
        p = world.preferences(prompt.text, texts, texts)
        labels = [tuple((rng.random(len(world.objectives)) < p[:, a, b]).astype(float).tolist()) for a, b in pairs]
        where, topic = f"assistant:{row + 1}", prompt.topic.task
        yield Example(prompt.text, tuple(texts), pairs, tuple(labels), source=where, group=topic)


def assistant(
    rows: int = 12000, responses: int = 4, cyclic: bool = False, data_seed: int = 0, max_rows: int | None = None
) -> Corpus:
    """The embedded world as a corpus.

    `rows` training rows of `responses` responses each, drawn from mu; every pair gets one sampled 0/1 label per
    objective. `cyclic` adds the objective `tone`, which no score can express. The same arguments give the same data.
    Of rows that are drawn at random the first `max_rows` are a sample; no more are drawn, and no more test rows.
    """
    rng = np.random.default_rng(data_seed)
    train, test = split_prompts(rng)
    rng.shuffle(train)  # type: ignore[arg-type]
    objectives = (*SCORED, CYCLIC) if cyclic else SCORED
    rows, tested = (count if max_rows is None else min(count, max_rows) for count in (rows, len(test)))
    world = World(objectives, {p.text: p.topic for p in (*train, *test)})
    provenance = {
        "corpus": "the embedded world (mopo_cli/data/assistant.py)",
        "labels": "one 0/1 label a pair and objective, sampled from Bradley-Terry on scores read from the text"
        + ("; tone: openings beat each other in a circle" if cyclic else ""),
        "rows": rows,
        "responses_per_prompt": responses,
        "data_seed": data_seed,
    }
    return Corpus(
        objectives,
        _examples(world, train, rows, responses, data_seed + 1),
        _examples(world, test, tested, responses, data_seed + 2),
        provenance,
        world,
    )
