"""Attention for rows that follow each other without padding: block by block, only where a token may look.

For a CPU, whose attention kernels are made for long sequences of equal length. Rows of some hundred tokens are faster
by plain matrix products, their probabilities kept for the backward pass; longer ones go through PyTorch's kernel,
which keeps none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mopo_cli.data.batches import Block, Collator
from mopo_cli.models.logprobs import agree
from mopo_cli.models.parts import unwrap

ROW_ATTENTION = "mopo_rows"  # its name among transformers' attention implementations
KEPT = 2**18  # pairs of tokens of a block, at most, whose probabilities are kept for the backward pass


def attend_by_rows(model: nn.Module) -> bool:
    """Give a model with "sdpa" attention the one that takes rows apart; whether it has it now.

    Left as it was where the log-probs of a few made-up tokens come out different.
    """
    causal = unwrap(model)
    if getattr(causal.config, "_attn_implementation", None) != "sdpa":
        return False
    causal.set_attn_implementation(ROW_ATTENTION)  # type: ignore[operator]
    if agree(model, Collator(0, True, True), Collator(0, False)):
        return True
    causal.set_attn_implementation("sdpa")  # type: ignore[operator]
    return False


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask, blocks=None, **settings: Any):
    """transformers' "sdpa", but block by block where the batch has blocks: (1, H, T, D) to (1, T, H, D)."""
    if blocks is None:
        return sdpa_attention_forward(module, query, key, value, mask, **settings)
    if settings.get("softcap") is not None or settings.get("position_bias") is not None or settings.get("dropout"):
        raise ValueError("attention by rows knows no soft cap, no position bias and no dropout")
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scale = settings.get("scaling") or query.shape[-1] ** -0.5
    small = all(b.mask.numel() <= KEPT for b in blocks)
    if small and query.dtype == torch.float32:
        return _Blocks.apply(query, key, value, blocks, scale), None
    parts = [_by_kernel(query, key, value, block, scale) for block in blocks]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _by_kernel(query: Tensor, key: Tensor, value: Tensor, block: Block, scale: float) -> Tensor:
    q, k, v = query[:, :, block.queries], key[:, :, block.keys], value[:, :, block.keys]
    mask = block.mask.to(query.dtype)
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


class _Blocks(torch.autograd.Function):
    """softmax(scale q k^T + mask) v of each block, for q, k, v (1, H, T, D); gives (1, T, H, D)."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, blocks: tuple[Block, ...], scale: float) -> Tensor:
        q, k, v = query[0], key[0], value[0]
        out = torch.empty_like(v.transpose(0, 1), memory_format=torch.contiguous_format)
        kept = []
        for queries, keys, mask in blocks:
            scores = torch.baddbmm(mask, q[:, queries], k[:, keys].transpose(1, 2), alpha=scale)
            shares = torch.softmax(scores, -1)
            out[queries] = torch.bmm(shares, v[:, keys]).transpose(0, 1)
            kept.append(shares)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(query, key, value, *kept)
        ctx.blocks, ctx.scale = blocks, scale
        return out[None]

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        query, key, value, *kept = ctx.saved_tensors
        gradient = gradient[0].transpose(0, 1)  # (H, T, D)
        of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for (queries, keys, _), shares in zip(ctx.blocks, kept, strict=True):
            above, q, k, v = gradient[:, queries], query[0, :, queries], key[0, :, keys], value[0, :, keys]
            slope = torch.ops.aten._softmax_backward_data(torch.bmm(above, v.transpose(1, 2)), shares, -1, shares.dtype)
            of_query[0, :, queries] = torch.bmm(slope, k)
            of_key[0, :, keys].add_(torch.bmm(slope.transpose(1, 2), q))
            of_value[0, :, keys].add_(torch.bmm(shares.transpose(1, 2), above))
        return of_query.mul_(ctx.scale), of_key.mul_(ctx.scale), of_value, None, None


AttentionInterface.register(ROW_ATTENTION, _attend)
AttentionMaskInterface.register(ROW_ATTENTION, sdpa_mask)
