"""log pi(y|x): the one place where every method gets its log-probs.

The output head runs on response tokens only, some at a time, and the log-softmax is taken in float32 whatever the
model's dtype: of a large batch the logits are never held as a whole, neither forward nor for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mopo_cli.data.batches import Collator, TokenBatch, row_lengths, under_budget
from mopo_cli.data.encoder import Encoder
from mopo_cli.data.table import TokenRow, row_length
from mopo_cli.models.parts import attention_window, backbone_of, computing, in_own_dtype, unwrap

_CHUNK = (2**25, 2**26)  # logits held at once, on a CPU and on a GPU
ROW = 112  # response tokens that a prompt is written once for, at least, in a pass without gradient
_SPLITS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # what `splits` found, a model


def sequence_logps(model: nn.Module, batch: TokenBatch) -> Tensor:
    """(N,) float32 sum of log-probs of the response tokens of each response."""
    values = token_logps(model, batch)
    return torch.zeros(len(batch.last), dtype=torch.float32, device=values.device).index_add(0, batch.owner, values)


def token_logps(model: nn.Module, batch: TokenBatch) -> Tensor:
    """(R,) float32 log-prob of each response token."""
    causal = unwrap(model)
    if causal not in _SPLITS:
        _SPLITS[causal] = splits(causal)
    if not _SPLITS[causal]:
        with computing(causal):
            logits = causal(**_inputs(causal, batch)).logits.flatten(0, 1)[batch.source]
        return -nn.functional.cross_entropy(logits.float(), batch.target, reduction="none")
    hidden = hidden_states(backbone_of(causal), batch, batch.source)  # type: ignore[arg-type]
    hidden = hidden.to(getattr(causal, "compute_dtype", None) or hidden.dtype)
    return head_logps(causal.get_output_embeddings(), hidden, batch.target)  # type: ignore[operator]


def head_logps(head: nn.Module, hidden: Tensor, target: Tensor) -> Tensor:
    """(R,) float32 log softmax(head(hidden))[target], some tokens at a time; made again in the backward pass."""
    chunk = max(1, _CHUNK[hidden.device.type == "cuda"] // _vocabulary(head))
    if type(head) is nn.Linear:
        return _HeadLogps.apply(hidden, head.weight, head.bias, target, chunk)  # type: ignore[return-value]
    parts = zip(hidden.split(chunk), target.split(chunk), strict=True)
    return torch.cat([checkpoint(_plain_head_logps, head, h, t, use_reentrant=False) for h, t in parts])  # type: ignore[arg-type]


def _plain_head_logps(head: nn.Module, hidden: Tensor, target: Tensor) -> Tensor:
    return -nn.functional.cross_entropy(head(hidden).float(), target, reduction="none")


def _vocabulary(head: nn.Module) -> int:
    return int(getattr(head, "out_features", 0) or head.weight.shape[0])  # type: ignore[union-attr]


class _HeadLogps(torch.autograd.Function):
    """Log-probs under a linear head, multiplied in the dtype of `hidden`; gradients are summed in float32.

    Saves its inputs, one number a token, and the probabilities of the first chunk; the logits of the others are made
    again. The slope of a log-prob in the logits is onehot(target) - probabilities, whose two
    parts are taken apart: nothing of the logits' size is scaled or written to.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, chunk: int) -> Tensor:
        normaliser = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        values = torch.empty_like(normaliser)
        first = None
        low, low_bias = weight.to(hidden.dtype), _like(bias, hidden)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = nn.functional.linear(hidden[part], low, low_bias).float()
            values[part] = logits.gather(1, target[part, None])[:, 0]
            highest = logits.amax(-1, keepdim=True)
            total = logits.sub_(highest).exp_().sum(-1)
            normaliser[part] = total.log() + highest[:, 0]
            if not start and any(ctx.needs_input_grad):
                first = logits.div_(total[:, None]).to(hidden.dtype)
        ctx.save_for_backward(hidden, weight, bias, target, normaliser, first)
        ctx.chunk = chunk
        return values - normaliser

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        hidden, weight, bias, target, normaliser, first = ctx.saved_tensors
        for_hidden, for_weight, for_bias = (needed for needed in ctx.needs_input_grad[:3])
        scaled = hidden.float() * gradient[:, None]
        of_hidden = torch.empty_like(hidden) if for_hidden else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if for_weight else None
        of_bias = torch.zeros_like(bias, dtype=torch.float32) if for_bias else None
        low, low_bias = weight.to(hidden.dtype), _like(bias, hidden)
        for start in range(0, len(hidden), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            shares = first
            if start:
                logits = nn.functional.linear(hidden[part], low, low_bias).float()
                shares = logits.sub_(normaliser[part, None]).exp_().to(hidden.dtype)
            if of_hidden is not None:
                expected = (shares @ low).float()
                of_hidden[part] = (weight[target[part]].float() - expected) * gradient[part, None]
            if of_weight is not None:
                _subtract_product(of_weight, shares, scaled[part])
            if of_bias is not None:
                of_bias -= shares.T.float() @ gradient[part]
        if of_weight is not None:
            of_weight.index_add_(0, target, scaled)
        if of_bias is not None:
            of_bias.index_add_(0, target, gradient)
        return of_hidden, _like(of_weight, weight), _like(of_bias, bias), None, None


def _subtract_product(total: Tensor, shares: Tensor, scaled: Tensor) -> None:
    """total -= shares^T scaled, in the dtype of the shares, summed in float32."""
    if shares.dtype == torch.float32:
        total.addmm_(shares.T, scaled, alpha=-1.0)
    else:
        total -= shares.T @ scaled.to(shares.dtype)


def _like(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if gradient is None or parameter is None else gradient.to(parameter.dtype)


def _inputs(model: nn.Module, batch: TokenBatch) -> dict[str, Any]:
    mask = batch.attention_mask
    if mask.dim() == 4 and getattr(model.config, "_attn_implementation", None) == "eager":
        # eager attention adds the mask to its scores
        mask = torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)  # type: ignore[arg-type]
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": mask, "use_cache": False}
    if batch.blocks is not None:
        inputs["blocks"] = batch.blocks
    return inputs if batch.position_ids is None else {**inputs, "position_ids": batch.position_ids}


def hidden_states(backbone: nn.Module, batch: TokenBatch, places: Tensor) -> Tensor:
    """(n, H) outputs of the transformer at n flat positions of the batch."""
    with computing(backbone):
        return backbone(**_inputs(backbone, batch)).last_hidden_state.flatten(0, 1)[places]


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
        with in_own_dtype(causal):
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
    window = attention_window(causal)
    if window is not None and (longest is None or longest > window):
        return False
    return agree(model, Collator(0, True), Collator(0, False))


def collator_of(model: nn.Module, encoder: Encoder) -> Collator:
    """Batches as this model takes them, padded by its tokenizer."""
    return Collator(int(encoder.tokenizer.pad_token_id), can_pack(model, encoder.max_length))  # type: ignore[arg-type]


@torch.no_grad()
def agree(model: nn.Module, first: Collator, second: Collator) -> bool:
    """Whether two layouts of a few made-up tokens have the same log-probs."""
    parameter = next(model.parameters())
    rows = _made_up_rows(unwrap(model))
    training = model.training
    model.eval()
    try:
        with in_own_dtype(model):
            ours, theirs = (sequence_logps(model, collate(rows).to(parameter.device)) for collate in (first, second))
        relative, absolute = (1e-4, 2e-3) if parameter.dtype == torch.float32 else (5e-3, 5e-2)
        return bool(torch.allclose(ours, theirs, rtol=relative, atol=absolute))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    finally:
        model.train(training)


def _made_up_rows(causal: nn.Module) -> list[TokenRow]:
    vocabulary = causal.config.get_text_config().vocab_size  # type: ignore[union-attr]
    ids = torch.randint(5, vocabulary, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    return [TokenRow(ids[:4], [ids[4:9], ids[9:12]]), TokenRow(ids[12:15], [ids[15:21], ids[21:]])]


def gather_slots(values: Tensor, slot: Tensor, fill: float = 0.0) -> Tensor:
    """(S, ...) per-sequence values to (B, G, ...) by slot, `fill` where a row has no such response."""
    gathered = values[slot.clamp(min=0)]
    mask = (slot >= 0).reshape(slot.shape + (1,) * (gathered.dim() - slot.dim()))
    return torch.where(mask, gathered, torch.as_tensor(fill, dtype=values.dtype, device=values.device))


def response_logps(model: nn.Module, batch: TokenBatch) -> Tensor:
    """(B, G) log pi(y_g|x_b); 0 where a row has no such response."""
    return gather_slots(sequence_logps(model, batch), batch.slot)


@torch.no_grad()
def all_logps(model: nn.Module, rows: Sequence[TokenRow], collate: Collator) -> list[Tensor]:
    """One (G,) float32 tensor a row, without gradient, batched by length under a token budget."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    split = [_shorter(row) if collate.packed and not collate.apart else [row] for row in rows]
    pieces = [piece for row in split for piece in row]
    out: list[Tensor | None] = [None] * len(pieces)
    for numbers in budget_batches(pieces, collate, device):
        batch = collate([pieces[i] for i in numbers]).to(device)
        values = sequence_logps(model, batch).cpu()
        start = 0
        for i in numbers:
            size = len(pieces[i].responses)
            out[i], start = values[start : start + size], start + size
    model.train(training)
    found = iter(out)
    return [torch.cat([next(found) for _ in row]) for row in split]  # type: ignore[misc]


def all_finite(logps: Iterable[Tensor]) -> bool:
    """Whether no log-prob of some rows is NaN or infinite."""
    return all(bool(torch.isfinite(of_row).all()) for of_row in logps)


def _shorter(row: TokenRow) -> list[TokenRow]:
    """A row with many responses as several of some: attention's square costs more than a short prompt again."""
    most = max(ROW, 4 * len(row.prompt))
    if row_length(row) <= 2 * most:
        return [row]
    pieces, room = [TokenRow(row.prompt, [])], most
    for response in row.responses:
        if len(response) > room and pieces[-1].responses:
            pieces.append(TokenRow(row.prompt, []))
            room = most
        pieces[-1].responses.append(response)
        room -= len(response)
    return pieces


def budget_batches(rows: Sequence[TokenRow], collate: Collator, device: torch.device) -> list[list[int]]:
    """Row numbers in batches for a pass without gradient, longest first.

    Under the user's token budget where there is one; on a CPU as many tokens as its caches hold, which is faster than
    more.
    """
    budget = collate.budget or (2048 if device.type == "cpu" else 8192)
    return under_budget(range(len(rows)), row_lengths(rows), budget)
