"""What the preference model and computed objectives say of responses: the data's, and those sampled from a policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mopo_cli.base.types import Example, Objective
from mopo_cli.data.batches import Collator
from mopo_cli.data.prepare import as_text, unit_numbers
from mopo_cli.data.table import TokenRow
from mopo_cli.judging.judges import JudgedResponses, computed_judges, win_rates
from mopo_cli.maths.estimates import leave_one_out
from mopo_cli.models.preference import PreferenceModel, features_of, win_probabilities
from mopo_cli.models.sampling import Drawn

SUPPORTING = 1000  # held-out rows that tell what the reference thinks of the data's responses


@dataclass
class JudgedRows:
    """Rows of one split with what the preference model says of them."""

    objectives: Sequence[Objective]
    examples: Sequence[Example]
    tokens: Sequence[TokenRow]
    features: list[Tensor]  # (G, K, D) preference features of the data's responses
    win_rates: list[Tensor]  # (G, K) leave-one-out p_bar of the data's responses
    units: Tensor  # (N,) numbers, the same of rows that are not independent of each other


def judge_rows(
    model: PreferenceModel,
    objectives: Sequence[Objective],
    examples: Sequence[Example],
    tokens: Sequence[TokenRow],
    collate: Collator,
    labels: str,
) -> JudgedRows:
    """Leave-one-out win rates from the preference model ("smoothed") or from the labels, the model filling gaps.

    A computed objective's labels are exact, so they are always taken.
    """
    features = features_of(model, tokens, collate)
    labelled = [k for k, objective in enumerate(objectives) if labels == "observed" or objective.scorer is not None]
    win_rates = []
    for example, feature in zip(examples, features, strict=True):
        p = win_probabilities(model, feature, feature)
        _write_labels(p, example, labelled)
        mask = torch.ones(1, len(feature), dtype=torch.bool)
        win_rates.append(leave_one_out(p[None], mask)[0])
    return JudgedRows(objectives, examples, tokens, features, win_rates, torch.from_numpy(unit_numbers(examples)))


def _write_labels(p: Tensor, example: Example, columns: Sequence[int]) -> None:
    for (a, b), row in zip(example.pairs, example.labels, strict=True):
        for k in columns:
            if not math.isnan(row[k]):
                p[a, b, k], p[b, a, k] = row[k], 1.0 - row[k]


def judge_samples(
    model: PreferenceModel,
    rows: JudgedRows,
    numbers: Sequence[int],
    drawn: Sequence[Sequence[Drawn]],
    collate: Collator,
) -> tuple[list[TokenRow], list[Tensor]]:
    """Token rows of samples, and their (M, K) win rates against the data's responses to the same prompt.

    The preference model judges; a computed objective is judged by its own scorer, which is exact.
    """
    tokens = [TokenRow(rows.tokens[i].prompt, [d.ids for d in draws]) for i, draws in zip(numbers, drawn, strict=True)]
    features = features_of(model, tokens, collate)
    rates = [win_probabilities(model, f, rows.features[i]).mean(1) for i, f in zip(numbers, features, strict=True)]
    examples = [rows.examples[i] for i in numbers]
    data = JudgedResponses([[as_text(response) for response in e.responses] for e in examples])
    samples = JudgedResponses([[d.text for d in draws] for draws in drawn])
    for k, judge in computed_judges(rows.objectives):
        exact = win_rates(judge, judge.measure(examples, samples), judge.measure(examples, data))
        for rate, values in zip(rates, exact, strict=True):
            rate[:, k] = torch.from_numpy(values)
    return tokens, rates


def response_values(
    model: PreferenceModel,
    objectives: Sequence[Objective],
    examples: Sequence[Example],
    rows: Sequence[TokenRow],
    texts: Sequence[Sequence[str]],
    collate: Collator,
) -> list[Tensor]:
    """(G, K) values of each row's responses: the preference model's, of Bradley-Terry, or a computed objective's score.

    Values of the preference model compare within a prompt only: a shift of all of a prompt's changes no probability.
    """
    if all(objective.scorer is not None for objective in objectives):
        values = [torch.zeros(len(row.responses), len(objectives)) for row in rows]
    else:
        values = [features[..., 0].clone() for features in features_of(model, rows, collate)]
    responses = JudgedResponses([list(said) for said in texts])
    for k, judge in computed_judges(objectives):
        for value, scores in zip(values, judge.measure(examples, responses), strict=True):
            value[:, k] = torch.from_numpy(scores)
    return values


def support_floor(logps: Sequence[Tensor], share: float) -> float:
    """The `share` quantile of log pi_ref over the data's responses, (G,) each; -inf for share 0.

    A preference model knows the responses of mu only. What the reference finds less likely than nearly all of them lies
    outside their support, and its judgement there is a guess: a policy that climbs it is over-optimised.
    """
    return float(torch.cat(list(logps)).double().quantile(share)) if share > 0 else -math.inf


def empirical(rates: Tensor, supported: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Win rates (N, M, K) and the log of the uniform distribution on the supported of M samples; all where none is."""
    supported = supported | ~supported.any(1, keepdim=True)
    uniform = torch.where(supported, -supported.sum(1, keepdim=True).double().log(), -math.inf)
    return rates.double().numpy(), uniform.numpy()
