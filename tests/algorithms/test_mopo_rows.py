"""What MOPO keeps of its training rows: fresh responses, and log-probs under the reference of the moment."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mopo_cli.algorithms.mopo.rows import Fresh, TrainRows
from mopo_cli.algorithms.rollouts import Request
from mopo_cli.data.table import TokenRow
from mopo_cli.judging.rows import JudgedRows

INITIAL = {"shift": torch.tensor(0.0)}


class Weighted:
    """Rollouts of a model whose log-probs are a response's length, less the shift of its weights."""

    setting = SimpleNamespace(initial=INITIAL)

    def reference(self, rows: list[TokenRow], weights: Any = None) -> list[Tensor]:
        shift = (weights or INITIAL)["shift"]
        return [torch.tensor([-float(len(r)) for r in row.responses]) - shift for row in rows]

    def prompts(self, examples: Any, tokens: list[TokenRow], requests: list[Request]) -> list[list[int]]:
        return [tokens[request.row].prompt for request in requests]


def train_rows() -> TrainRows:
    """Rows 0 and 1 with two responses each; row 1 has two fresh ones."""
    tokens = [TokenRow([1], [[2], [2, 2]]), TokenRow([1], [[3], [3, 3]])]
    judged = JudgedRows((), [], tokens, [], [torch.full((2, 2), 0.5)] * 2, torch.arange(2))
    rows = TrainRows(Weighted(), judged)  # type: ignore[arg-type]
    rows.begin([0, 1], rows.rollouts.reference(tokens))
    rows.fresh = {
        1: Fresh([[4] * 3, [4] * 4], torch.full((2, 2), 0.7), torch.tensor([-3.0, -4.0]), torch.tensor([-3.0, -4.0]))
    }
    return rows


def test_a_refresh_renews_the_log_probs_of_fresh_responses_too():
    rows = train_rows()
    rows.lag({"shift": torch.tensor(10.0)}, [0, 1])
    assert rows.reference[0].tolist() == [-11.0, -12.0]
    assert rows.reference[1].tolist() == [-11.0, -12.0]
    assert rows.fresh[1].reference_logps.tolist() == [-13.0, -14.0]
    assert rows.fresh[1].behaviour_logps.tolist() == [-3.0, -4.0]  # of mu, which does not move
    assert rows.behaviour[1].tolist() == [-1.0, -2.0]


def test_a_checkpoint_brings_fresh_responses_and_the_lagged_reference_back():
    rows, file = train_rows(), io.BytesIO()
    rows.lag({"shift": torch.tensor(10.0)}, [0, 1])
    torch.save(rows.state_dict(), file)
    file.seek(0)
    again = TrainRows(rows.rollouts, rows.judged)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert again.told([Request(0), Request(1)])[1].responses == [[3], [3, 3], [4] * 3, [4] * 4]
    assert again.length_of(1) == rows.length_of(1) == 1 + 3 + 7
    assert again.lagged == {"shift": torch.tensor(10.0)}
    for name in ("win_rates", "behaviour_logps", "reference_logps"):
        assert torch.equal(getattr(again.fresh[1], name), getattr(rows.fresh[1], name))
    for table in ("behaviour", "reference"):
        found, expected = getattr(again, table), getattr(rows, table)
        assert {i: row.tolist() for i, row in found.items()} == {i: row.tolist() for i, row in expected.items()}
