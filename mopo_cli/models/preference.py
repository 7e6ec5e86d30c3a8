"""The K-head preference model: P_k(y over y' | x) from one pass over each response.

Bradley-Terry: logit = r_k(y) - r_k(y'). General: plus v_k(y)^T J v_k(y') with J skew-symmetric, which can express
cycles (Zhang et al. 2024, arXiv 2410.02197, eq. 6) while P(y over y') + P(y' over y) = 1 holds by construction.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mopo_cli.base.files import whole
from mopo_cli.data.batches import Collator, TokenBatch
from mopo_cli.data.table import TokenRow
from mopo_cli.models.logprobs import budget_batches, hidden_states
from mopo_cli.models.parts import backbone_of, check_weights_finite, unwrap


class PreferenceModel(nn.Module):
    """A transformer and a linear head; `forward` gives (N, K, 1 + 2 rank) features of each response."""

    def __init__(self, backbone: nn.Module, hidden_size: int, objectives: int, form: str, rank: int):
        super().__init__()
        self.backbone, self.objectives, self.form = backbone, objectives, form
        self.rank = rank if form == "general" else 0
        self.head = nn.Linear(hidden_size, objectives * (1 + 2 * self.rank), bias=False)
        nn.init.normal_(self.head.weight, std=hidden_size**-0.5 * 0.1 if self.rank == 0 else hidden_size**-0.5)

    def forward(self, batch: TokenBatch) -> Tensor:
        final = hidden_states(self.backbone, batch, batch.last)  # the response's end-of-sequence token
        return self.head(final.to(self.head.weight.dtype)).float().view(len(final), self.objectives, -1)

    def logits(self, first: Tensor, second: Tensor) -> Tensor:
        """(..., K) logits of first over second, from features (..., K, 1 + 2 rank); antisymmetric."""
        value = first[..., 0] - second[..., 0]
        if self.rank:
            v, w = first[..., 1:].unflatten(-1, (2, self.rank)), second[..., 1:].unflatten(-1, (2, self.rank))
            value = value + (v[..., 0, :] * w[..., 1, :] - v[..., 1, :] * w[..., 0, :]).sum(-1)
        return value


def build_preference_model(policy: nn.Module, objectives: int, form: str, rank: int, seed: int) -> PreferenceModel:
    """A preference model that starts from a copy of the policy's transformer; with LoRA it trains adapters and head."""
    causal = unwrap(policy)
    backbone = copy.deepcopy(backbone_of(causal))
    if backbone is None:
        raise TypeError(f"{type(causal).__name__} exposes no transformer without its head")
    hidden = getattr(causal.config, "word_embed_proj_dim", None) or causal.config.hidden_size  # type: ignore[union-attr]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        device = next(causal.parameters()).device
        return PreferenceModel(backbone, int(hidden), objectives, form, rank).to(device)  # type: ignore[arg-type]


@torch.no_grad()
def features_of(model: PreferenceModel, rows: Sequence[TokenRow], collate: Collator) -> list[Tensor]:
    """One (G, K, 1 + 2 rank) tensor a row, batched by length."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    out: list[Tensor | None] = [None] * len(rows)
    for numbers in budget_batches(rows, collate, device):
        values = model(collate([rows[i] for i in numbers]).to(device)).cpu()
        start = 0
        for i in numbers:
            out[i] = values[start : start + len(rows[i].responses)]
            start += len(rows[i].responses)
    model.train(training)
    return out  # type: ignore[return-value]


@torch.no_grad()
def win_probabilities(model: PreferenceModel, first: Tensor, second: Tensor) -> Tensor:
    """(n, m, K) P_k(first over second) for features (n, K, D) and (m, K, D)."""
    return torch.sigmoid(model.logits(first[:, None], second[None, :]))


def save_preference_model(
    model: PreferenceModel, directory: Path, names: Sequence[str], heldout_accuracy: Sequence[float]
) -> None:
    """Weights and a record of what they are, whole or absent; NotFiniteError where weights are NaN or infinite."""
    check_weights_finite(model, directory)
    weights = {k: v.contiguous().cpu() for k, v in model.state_dict().items()}
    record = {
        "objectives": list(names),
        "form": model.form,
        "rank": model.rank,
        "heldout_accuracy": list(heldout_accuracy),
    }
    with whole(directory) as place:
        save_file(weights, place / "preference_model.safetensors")
        (place / "preference_model.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def load_preference_model(directory: Path, policy: nn.Module) -> tuple[PreferenceModel, list[float]]:
    """The model saved in `directory`, on the architecture of `policy`, with its held-out accuracies."""
    record = json.loads((directory / "preference_model.json").read_text(encoding="utf-8"))
    model = build_preference_model(policy, len(record["objectives"]), record["form"], max(record["rank"], 1), seed=0)
    model.load_state_dict(load_file(directory / "preference_model.safetensors"))
    return model.eval(), record["heldout_accuracy"]
