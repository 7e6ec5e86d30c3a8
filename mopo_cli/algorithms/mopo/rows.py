"""What MOPO's loss sees of training rows: judged responses, the policy's fresh ones, and log-probs of both under the
references."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mopo_cli.algorithms.mopo.core import LogpBatch
from mopo_cli.algorithms.rollouts import Request, Rollouts, Samples
from mopo_cli.data.table import TokenRow, row_length
from mopo_cli.judging.rows import JudgedRows
from mopo_cli.models.logprobs import response_logps
from mopo_cli.models.policy import Snapshot


@dataclass
class Fresh:
    """Responses that the policy gave for one training row, judged against the data's responses."""

    responses: list[list[int]]
    win_rates: Tensor  # (M, K)
    behaviour_logps: Tensor  # (M,)
    reference_logps: Tensor  # (M,)


class TrainRows:
    """Tables of numbers a row, of (G,) each; the only model in memory is the policy."""

    def __init__(self, rollouts: Rollouts, judged: JudgedRows):
        self.rollouts, self.judged = rollouts, judged
        self.lagged = rollouts.setting.initial
        self.behaviour: dict[int, Tensor] = {}
        self.reference: dict[int, Tensor] = {}
        self.fresh: dict[int, Fresh] = {}

    def __len__(self) -> int:
        return len(self.judged.tokens)

    def plain(self, rows: Sequence[int]) -> list[TokenRow]:
        """Their tokens without a condition."""
        return [self.judged.tokens[i] for i in rows]

    def begin(self, rows: Sequence[int], logps: Sequence[Tensor]) -> None:
        """The rows of all steps, with log pi_ref of their responses."""
        self.behaviour = dict(zip(rows, logps, strict=True))
        self.reference = dict(self.behaviour)

    def length_of(self, row: int) -> int:
        """Tokens of a row with its fresh responses."""
        fresh = self.fresh.get(row)
        return row_length(self.judged.tokens[row]) + (sum(map(len, fresh.responses)) if fresh else 0)

    def told(self, requests: Sequence[Request]) -> list[TokenRow]:
        """Each request's prompt with the data's responses, and fresh ones where there are any."""
        rows, judged = [], self.judged
        prompts = self.rollouts.prompts(judged.examples, judged.tokens, requests)
        for (i, _), prompt in zip(requests, prompts, strict=True):
            responses, fresh = judged.tokens[i].responses, self.fresh.get(i)
            rows.append(TokenRow(prompt, responses + fresh.responses if fresh else responses))
        return rows

    def batch(self, policy: nn.Module, requests: Sequence[Request], rows: Sequence[TokenRow]) -> LogpBatch:
        """The method's view of these rows, as `told` gives them."""
        setting = self.rollouts.setting
        device = setting.accelerator.device
        win_rates, behaviour, reference, counts = [], [], [], []
        for i, _ in requests:
            fresh = self.fresh.get(i)
            counts.append(len(self.judged.tokens[i].responses))
            win_rates.append(_joined(self.judged.win_rates[i], fresh and fresh.win_rates))
            behaviour.append(_joined(self.behaviour[i], fresh and fresh.behaviour_logps))
            reference.append(_joined(self.reference[i], fresh and fresh.reference_logps))
        tokens = setting.inputs.policy.collate(rows).to(device)
        slots = torch.arange(tokens.slot.shape[1], device=device)
        return LogpBatch(
            policy_logps=response_logps(policy, tokens),
            reference_logps=padded(reference, device),
            behaviour_logps=padded(behaviour, device),
            win_rates=padded(win_rates, device),
            mask=tokens.slot >= 0,
            from_data=slots[None, :] < torch.tensor(counts, device=device)[:, None],
        )

    def of_data(self, rows: Sequence[int]) -> LogpBatch:
        """The data's responses to these rows with all that is known without asking the policy, in float64."""
        cpu = torch.device("cpu")
        reference, behaviour = ([table[i].double() for i in rows] for table in (self.reference, self.behaviour))
        mask = padded([torch.ones(len(values), dtype=torch.bool) for values in behaviour], cpu)
        logps, win_rates = padded(behaviour, cpu), padded([self.judged.win_rates[i].double() for i in rows], cpu)
        return LogpBatch(torch.full_like(logps, math.nan), padded(reference, cpu), logps, win_rates, mask, mask)

    # ------------------------------------------------------------------ what changes on the way

    def lag(self, weights: Snapshot, rows: Sequence[int]) -> None:
        """pi_ref <- these weights, for these rows and for the fresh responses."""
        self.lagged = weights
        self.reference |= dict(zip(rows, self.rollouts.reference(self.plain(rows), weights), strict=True))
        for i, fresh in self.fresh.items():
            row = TokenRow(self.judged.tokens[i].prompt, fresh.responses)
            fresh.reference_logps = self.rollouts.reference([row], weights)[0]

    def renew(self, requests: Sequence[Request], responses: int, seed: int) -> None:
        """Fresh responses to these requests, in place of those before."""
        samples = self.rollouts.compared(self.judged, requests, responses, seed)
        lagged = [s.reference_logps for s in samples]
        if self.lagged is not self.rollouts.setting.initial:
            lagged = self.rollouts.reference([s.plain for s in samples], self.lagged)
        self.fresh = {
            s.row: Fresh(s.responses, self._least_off_support(s), s.reference_logps, reference)
            for s, reference in zip(samples, lagged, strict=True)
        }

    def _least_off_support(self, samples: Samples) -> Tensor:
        """(M, K) win rates of samples, those off the data's support counting as the worst of the row's responses."""
        worst = self.judged.win_rates[samples.row].min(0).values
        return torch.where(samples.on_support[:, None], samples.scores, worst)

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        tables: dict[str, Any] = {
            "fresh": {i: asdict(fresh) for i, fresh in self.fresh.items()},
            "behaviour": _packed_table(self.behaviour),
            "reference": _packed_table(self.reference),
        }
        return tables if self.lagged is self.rollouts.setting.initial else {**tables, "lagged": self.lagged}

    def load_state_dict(self, tables: dict[str, Any]) -> None:
        self.fresh = {i: Fresh(**fresh) for i, fresh in tables["fresh"].items()}
        self.lagged = tables.get("lagged", self.rollouts.setting.initial)
        self.behaviour, self.reference = (_unpacked_table(tables[name]) for name in ("behaviour", "reference"))


def read_checkpoint(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A stage's record and tables; also what version 0.1 wrote of a grid, with one reference and tables not packed."""
    name = "alignment" if (directory / "alignment.json").exists() else "grid"
    record = json.loads((directory / f"{name}.json").read_text(encoding="utf-8"))
    tables = torch.load(directory / f"{name}.pt", weights_only=True)
    if name == "grid":
        record |= {"refreshes": 0, "entropy": []}
        tables["behaviour"] = tables["reference"] = _packed_table(tables["reference"])
        tables["fresh"] = {
            i: {**fresh, "behaviour_logps": fresh["reference_logps"]} for i, fresh in tables["fresh"].items()
        }
    return record, tables


def _packed_table(table: dict[int, Tensor]) -> dict[str, object]:
    """A table of (G,) tensors as one tensor: thousands of small ones would be slow to write."""
    values = torch.cat(list(table.values())) if table else torch.empty(0)
    return {"rows": list(table), "counts": [len(row) for row in table.values()], "values": values}


def _unpacked_table(packed: dict[str, Any]) -> dict[int, Tensor]:
    return dict(zip(packed["rows"], packed["values"].split(packed["counts"]), strict=True))


def _joined(data: Tensor, fresh: Tensor | None) -> Tensor:
    return data if fresh is None else torch.cat([data, fresh])


def padded(rows: Sequence[Tensor], device: torch.device) -> Tensor:
    """(B, G, ...) of (G, ...) rows, zeros where a row has fewer."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True).to(device)
