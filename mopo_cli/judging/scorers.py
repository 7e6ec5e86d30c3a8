"""Gold scorers: what a classifier or a function says of responses, and the scale on which scores are shown."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mopo_cli.base.errors import UserError
from mopo_cli.base.types import Example, Scorer, Text
from mopo_cli.config.compose import build
from mopo_cli.config.schema import ModelConfig, ScorerConfig
from mopo_cli.data.prepare import as_text, transcript
from mopo_cli.models.load import load_classifier

FIELDS = ("prompt", "response", "context", "dialogue", "document", "bos")
GENERIC = re.compile(r"LABEL_\d+")  # what transformers calls a class that has no name
LAST_TURN = "\n\nAssistant:"
STAND_IN = {"_target_": "mopo_cli.judging.scorers.unlabelled"}
Rows = Sequence[tuple[Example, str]]  # a row of the data with a response to its prompt
Scores = Callable[[Rows], np.ndarray]  # (N,) scores, higher is better


def check_scorers(scorers: Mapping[str, ScorerConfig], functions: Sequence[str]) -> None:
    """UserError where the config of a gold scorer cannot be meant, or two judge the same objective."""
    judges: dict[str, str] = {}
    for name, config in scorers.items():
        key = f"scorers.{name}"
        if config.computed is None and not config.path:
            raise UserError(f"{key}.path: not set; give a hub id or a model directory")
        if config.computed is not None and config.path:
            raise UserError(f"{key}: has a path and a function (computed); a scorer is one of the two")
        if config.margin < 0:
            raise UserError(f"{key}.margin={config.margin}: must be 0 or more")
        if config.batch_size < 1:
            raise UserError(f"{key}.batch_size={config.batch_size}: must be 1 or more")
        if config.dtype not in ("float32", "bfloat16", "float16"):
            raise UserError(f"{key}.dtype={config.dtype}: must be float32 or bfloat16 or float16")
        for part in ("text", "text_pair"):
            _check_template(getattr(config, part), f"{key}.{part}")
        if config.computed is not None:
            _check_function(config.computed, f"{key}.computed", functions)
        if config.objective is not None:
            if config.objective in judges:
                first = judges[config.objective]
                raise UserError(f"{key}.objective={config.objective}: scorers.{first} judges that objective already")
            judges[config.objective] = name


def _check_template(template: str | None, key: str) -> None:
    for field in re.findall(r"\{(.*?)\}", template or ""):
        if field not in FIELDS:
            allowed = " ".join(f"{{{name}}}" for name in FIELDS)
            raise UserError(f"{key}: has {{{field}}}; a template is made from {allowed}")


def _check_function(node: object, key: str, functions: Sequence[str]) -> None:
    target = node.get("_target_") if isinstance(node, dict) else None
    if not isinstance(target, str):
        raise UserError(f"{key}={node}: must be a mapping whose _target_ names a function")
    if target.rpartition(".")[0] not in functions:
        raise UserError(
            f"{key}._target_={target}: not in a module whose functions a scorer may call; allowed: "
            f"{', '.join(functions) or 'none'}. Add its module to the list `functions`"
        )


def load_scorer(name: str, config: ScorerConfig) -> Scores:
    """What gives a gold scorer's scores; UserError where it cannot be loaded."""
    key = f"scorers.{name}"
    if config.computed is not None:
        return _Function(build({**config.computed, "_partial_": True}, f"{key}.computed"), key)
    settings = ModelConfig(
        path=config.path, dtype=config.dtype, revision=config.revision, trust_remote_code=config.trust_remote_code
    )
    model, tokenizer = load_classifier(settings, key, len(config.labels) if config.labels else None)
    return Classifier(model, tokenizer, config, label_index(model, config, key))


@dataclass(frozen=True)
class _Function:
    function: Scorer
    key: str

    def __call__(self, rows: Rows) -> np.ndarray:
        return np.array([self._score(*row) for row in rows])

    def _score(self, example: Example, response: str) -> float:
        try:
            value = float(self.function(as_text(example.prompt), response, example.context))
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{self.key}.computed failed ({type(error).__name__}: {error}); it takes (prompt, response, context) "
                "and returns a number"
            ) from error
        if not math.isfinite(value):
            raise UserError(f"{self.key}.computed scored {value}; a score must be finite")
        return value


def unlabelled(prompt: str, response: str, context: str) -> float:
    """Stands in for the labels of an objective that a gold scorer judges, in data that have none for it."""
    return 0.0


# --------------------------------------------------------------------------------------------- classifiers
@dataclass
class Classifier:
    """A sequence-classification model as a scorer: its only output, or the probability of one class."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: ScorerConfig
    label: int | None
    cut: int = 0  # texts that were longer than the model takes

    def __call__(self, rows: Rows) -> np.ndarray:
        """(N,) scores, in batches of texts of about one length. Counts in `cut` what had to be shortened."""
        texts = [self.texts(example, response) for example, response in rows]
        order = sorted(range(len(texts)), key=lambda i: -sum(map(len, texts[i])))
        scores = np.empty(len(texts))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model.to(device)  # type: ignore[arg-type]
        for start in range(0, len(order), self.config.batch_size):
            numbers = order[start : start + self.config.batch_size]
            scores[numbers] = self._batch([texts[i] for i in numbers])
        self.model.to("cpu")  # type: ignore[arg-type]  # one scorer at a time
        if not np.isfinite(scores).all():
            raise UserError(f"scorers: {self.config.path} gave a score that is no number; try dtype=float32")
        return scores

    def texts(self, example: Example, response: str) -> tuple[str, ...]:
        """The one or two texts that the model reads."""
        values = {
            "prompt": as_text(example.prompt),
            "response": response,
            "context": example.context,
            "dialogue": dialogue(example.prompt),
            "document": document(as_text(example.prompt)),
            "bos": self.tokenizer.bos_token or "",
        }
        templates = [self.config.text] + ([self.config.text_pair] if self.config.text_pair is not None else [])
        return tuple(re.sub(r"\{(\w+)\}", lambda match: str(values[match.group(1)]), t) for t in templates)

    @torch.no_grad()
    def _batch(self, texts: list[tuple[str, ...]]) -> np.ndarray:
        columns = [list(column) for column in zip(*texts, strict=True)]
        limit = self.longest()
        first, second = columns[0], columns[1] if len(columns) > 1 else None
        inputs = self.tokenizer(first, second, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        if limit is not None and inputs["input_ids"].shape[1] >= limit:  # type: ignore[union-attr]
            self.cut += self._longer(columns, limit)
        logits = self.model(**inputs.to(self.model.device)).logits.double().cpu()
        values = logits[:, 0] if self.label is None else logits.softmax(-1)[:, self.label]
        return values.numpy()

    def _longer(self, columns: list[list[str]], limit: int) -> int:
        first, second = columns[0], columns[1] if len(columns) > 1 else None
        whole: Any = self.tokenizer(first, second, verbose=False)
        return sum(len(ids) > limit for ids in whole["input_ids"])

    def longest(self) -> int | None:
        """Tokens that the model takes: as configured, no more than it has positions for; None where nothing limits."""
        positions = getattr(self.model.config, "max_position_embeddings", None)
        if self.model.config.model_type in ("roberta", "xlm-roberta", "camembert") and positions:
            positions -= 2  # they count from the padding token's number on
        longest = self.tokenizer.model_max_length
        limits = (self.config.max_length, positions, longest if longest < 10**6 else None)
        return min((limit for limit in limits if limit), default=None)


def label_index(model: PreTrainedModel, config: ScorerConfig, key: str) -> int | None:
    """Which output is the score; None for a model of one output. UserError where the label and the model disagree."""
    size = int(model.config.num_labels)  # type: ignore[arg-type]
    names: dict[int, str] = model.config.id2label or {}  # type: ignore[assignment]
    classes = [str(names.get(i, f"LABEL_{i}")) for i in range(size)]
    named = not all(GENERIC.fullmatch(label) for label in classes)
    if config.label is None:
        if size != 1:
            raise UserError(
                f"{key}.label: not set, and the model has {size} classes; choose one of {', '.join(classes)}"
            )
        return None
    if config.labels and named and [x.lower() for x in classes] != [x.lower() for x in config.labels]:
        raise UserError(f"{key}.labels={config.labels}: the model's config has {classes}")
    labels = classes if named or not config.labels else config.labels
    matching = [i for i, label in enumerate(labels) if label.lower() == config.label.lower()]
    if not matching:
        hint = "" if named or config.labels else f"; it names none, so give {key}.labels in their order"
        raise UserError(f"{key}.label={config.label}: the model has no such class; allowed: {', '.join(labels)}{hint}")
    return matching[0]


def dialogue(prompt: Text) -> str:
    """The prompt as a transcript of HH-RLHF that the assistant goes on with."""
    if not isinstance(prompt, str):
        return f"\n\n{transcript(prompt)}"
    whole = prompt.rstrip().endswith(LAST_TURN.strip()) and "Human:" in prompt
    return f"\n\n{prompt.strip()}" if whole else f"\n\nHuman: {prompt.strip()} {LAST_TURN}"


def document(prompt: str) -> str:
    """The post or article in a prompt that ends with TL;DR: (data/corpora.py); any other prompt as it is."""
    match = re.search(r"(?:^|\n\n)(?:POST: |Article:\n)(.*)\n\nTL;DR:\s*$", prompt, re.DOTALL)
    return match.group(1) if match else prompt


# --------------------------------------------------------------------------------------------- scale
@dataclass(frozen=True, slots=True)
class Scale:
    """Mean and spread of a scorer on reference responses; fitted once, so that all that is shown has one scale."""

    mean: float
    std: float
    fitted_on: str
    responses: int

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        return (scores - self.mean) / self.std


def fit_scale(scores: np.ndarray, fitted_on: str) -> Scale:
    """The scale on which `scores` have mean 0 and standard deviation 1 (only mean 0 where they are all the same)."""
    spread = float(scores.std())
    return Scale(float(scores.mean()), spread if spread > 1e-12 else 1.0, fitted_on, len(scores))
