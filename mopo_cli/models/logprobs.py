"""log pi(y|x): the one place where every method gets its log-probs.

The output head runs on response tokens only, and the log-softmax is taken in float32 whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mopo_cli.data.tokens import Collator, TokenBatch, TokenRow, length_order, row_length

_SPLITS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # what `splits` found, a model


def sequence_logps(model: nn.Module, batch: TokenBatch) -> Tensor:
    """(N,) float32 sum of log-probs of the response tokens of each response."""
    logits = _response_logits(model, batch)  # (R, V)
    token_logps = -nn.functional.cross_entropy(logits.float(), batch.target, reduction="none")
    return torch.zeros(len(batch.last), dtype=torch.float32, device=logits.device).index_add(
        0, batch.owner, token_logps
    )


def _inputs(model: nn.Module, batch: TokenBatch) -> dict[str, Tensor | bool]:
    mask = batch.attention_mask
    if mask.dim() == 4 and getattr(model.config, "_attn_implementation", None) == "eager":
        # eager attention adds the mask to its scores
        mask = torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)  # type: ignore[arg-type]
    inputs: dict[str, Tensor | bool] = {"input_ids": batch.input_ids, "attention_mask": mask, "use_cache": False}
    return inputs if batch.position_ids is None else {**inputs, "position_ids": batch.position_ids}


def hidden_states(backbone: nn.Module, batch: TokenBatch, places: Tensor) -> Tensor:
    """(n, H) outputs of the transformer at n flat positions of the batch."""
    return backbone(**_inputs(backbone, batch)).last_hidden_state.flatten(0, 1)[places]


def _response_logits(model: nn.Module, batch: TokenBatch) -> Tensor:
    """(R, V) logits at the positions that predict a response token: by backbone and head where the model splits so."""
    causal = unwrap(model)
    if causal not in _SPLITS:
        _SPLITS[causal] = splits(causal)
    if not _SPLITS[causal]:
        return causal(**_inputs(causal, batch)).logits.flatten(0, 1)[batch.source]
    return causal.get_output_embeddings()(hidden_states(backbone_of(causal), batch, batch.source))  # type: ignore[operator]


@torch.no_grad()
def splits(causal: nn.Module) -> bool:
    """Whether the model's logits are its output embeddings applied to its transformer's outputs and nothing more.

    Some scale or cap their logits, which their config tells, or have further layers in the head: tried on a few tokens.
    """
    backbone, head = backbone_of(causal), causal.get_output_embeddings()  # type: ignore[operator]
    values = causal.config.get_text_config().to_dict()  # type: ignore[union-attr]
    scaled = any("logit" in key and value not in (None, 1.0) for key, value in values.items())
    if backbone is None or head is None or scaled:
        return False
    parameter = next(causal.parameters())
    tolerance = 1e-4 if parameter.dtype == torch.float32 else 2e-2
    batch = Collator(0, packed=False)(_made_up_rows(causal)).to(parameter.device)
    training = causal.training
    causal.eval()
    try:
        whole = causal(**_inputs(causal, batch)).logits.flatten(0, 1)[batch.source].float()
        split = head(hidden_states(backbone, batch, batch.source)).float()
        return whole.shape == split.shape and bool((whole - split).abs().max() <= tolerance * whole.abs().max())
    except (AttributeError, RuntimeError, TypeError):
        return False
    finally:
        causal.train(training)


@torch.no_grad()
def can_pack(model: nn.Module, longest: int | None = None) -> bool:
    """Whether this model takes a packed batch: compares packed and plain log-probs on a few made-up tokens.

    The packed mask takes the place of a model's sliding window, so the window must hold a prompt with its response,
    `longest` tokens (where that is not given, a model with a window is not packed).
    """
    causal = unwrap(model)
    parameter = next(model.parameters())
    window = _attention_window(causal)
    if window is not None and (longest is None or longest > window):
        return False
    rows = _made_up_rows(causal)
    training = model.training
    model.eval()
    try:
        packed, plain = (sequence_logps(model, Collator(0, p)(rows).to(parameter.device)) for p in (True, False))
        relative, absolute = (1e-4, 2e-3) if parameter.dtype == torch.float32 else (5e-3, 5e-2)
        return bool(torch.allclose(packed, plain, rtol=relative, atol=absolute))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    finally:
        model.train(training)


def _made_up_rows(causal: nn.Module) -> list[TokenRow]:
    vocabulary = causal.config.get_text_config().vocab_size  # type: ignore[union-attr]
    ids = torch.randint(5, vocabulary, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    return [TokenRow(ids[:4], [ids[4:9], ids[9:12]]), TokenRow(ids[12:15], [ids[15:21], ids[21:]])]


def _attention_window(causal: nn.Module) -> int | None:
    """The shortest window that some layer's attention is limited to, None where all layers see the whole context."""
    config = causal.config.get_text_config()  # type: ignore[union-attr]
    layers = getattr(config, "layer_types", None)
    if layers and all(kind == "full_attention" for kind in layers):
        return None
    sizes = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return min((size for size in sizes if size), default=None)


def unwrap(model: nn.Module) -> nn.Module:
    """The causal language model below PEFT and the wrappers of data parallelism; adapters stay active in its layers."""
    while hasattr(model, "module"):
        model = model.module  # type: ignore[assignment]
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def backbone_of(model: nn.Module) -> nn.Module | None:
    """The transformer without its output head, or None where the model does not expose one."""
    if isinstance(model, PreTrainedModel):
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
        if isinstance(decoder, PreTrainedModel) and decoder is not model:
            return decoder
        base = model.base_model
        return base if base is not model else None
    return None


def gather_slots(values: Tensor, slot: Tensor, fill: float = 0.0) -> Tensor:
    """(S, ...) per-sequence values to (B, G, ...) by slot, `fill` where a row has no such response."""
    gathered = values[slot.clamp(min=0)]
    mask = (slot >= 0).reshape(slot.shape + (1,) * (gathered.dim() - slot.dim()))
    return torch.where(mask, gathered, torch.as_tensor(fill, dtype=values.dtype, device=values.device))


def response_logps(model: nn.Module, batch: TokenBatch) -> Tensor:
    """(B, G) log pi(y_g|x_b); 0 where a row has no such response."""
    return gather_slots(sequence_logps(model, batch), batch.slot)


@torch.no_grad()
def all_logps(model: nn.Module, rows: Sequence[TokenRow], collate: Collator, budget: int | None = None) -> list[Tensor]:
    """One (G,) float32 tensor a row, without gradient, batched by length under a token budget."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    out: list[Tensor | None] = [None] * len(rows)
    for numbers in budget_batches(rows, budget or token_budget(device)):
        batch = collate([rows[i] for i in numbers]).to(device)
        values = sequence_logps(model, batch).cpu()
        start = 0
        for i in numbers:
            size = len(rows[i].responses)
            out[i], start = values[start : start + size], start + size
    model.train(training)
    return out  # type: ignore[return-value]


def token_budget(device: torch.device) -> int:
    """Tokens of a batch without gradient: on a CPU as many as its caches hold, which is faster than more."""
    return 2048 if device.type == "cpu" else 8192


def budget_batches(rows: Sequence[TokenRow], budget: int) -> list[list[int]]:
    """Row numbers in batches of at most `budget` tokens (one row at least), longest first."""
    batches: list[list[int]] = []
    room = -1
    for i in length_order(rows):
        if row_length(rows[i]) > room:
            batches.append([])
            room = budget
        batches[-1].append(i)
        room -= row_length(rows[i])
    return batches
