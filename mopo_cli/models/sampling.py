"""Responses sampled from a policy: prompts batched by length, left-padded, one call of `generate` a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from mopo_cli.config.schema import SamplingConfig
from mopo_cli.data.encoder import Encoder
from mopo_cli.models.parts import computing, unwrap


class Drawn(NamedTuple):
    """One sampled response. `ids` ends with an end of turn (Encoder.ends), unless it was cut off at the longest length.

    Log-probs are those of `ids`: the text, encoded anew, may be other tokens, which the policy would hardly have taken.
    """

    text: str
    ids: list[int]


class InverseTransform(LogitsProcessor):
    """Turns greedy decoding into sampling: all mass to the token where the cumulative softmax passes a uniform draw.

    The same distribution as torch.multinomial, whose noise for every entry of the vocabulary takes most of the time on
    a CPU; here it is one draw a row.
    """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulative = torch.softmax(scores, -1, dtype=torch.float32).cumsum(-1)
        draw = torch.rand(len(scores), 1, device=scores.device) * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, draw, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def _warpers(config: SamplingConfig) -> list[LogitsProcessor]:
    warpers: list[LogitsProcessor] = []
    if config.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(config.temperature))
    if config.top_p < 1.0:
        warpers.append(TopPLogitsWarper(config.top_p))
    return warpers


@torch.no_grad()
def sample(
    model: nn.Module, encoder: Encoder, prompts: Sequence[list[int]], responses: int, config: SamplingConfig, seed: int
) -> list[list[Drawn]]:
    """`responses` draws for each prompt of token ids. The same seed, weights and prompts give the same draws."""
    causal: PreTrainedModel = unwrap(model)  # type: ignore[assignment]
    device = next(causal.parameters()).device
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    per_batch = max(1, config.batch_size // responses)
    drawn: list[list[Drawn]] = [[] for _ in prompts]
    training = causal.training
    causal.eval()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for start in range(0, len(order), per_batch):
            numbers = order[start : start + per_batch]
            generated = _generate(causal, encoder, [prompts[i] for i in numbers], responses, config, device)
            for position, one in enumerate(generated):
                drawn[numbers[position // responses]].append(one)
    causal.train(training)
    return drawn


def _generate(
    causal, encoder: Encoder, ids, responses: int, config: SamplingConfig, device: torch.device
) -> list[Drawn]:
    tokenizer, ends = encoder.tokenizer, sorted(encoder.ends)
    longest = max(map(len, ids))
    new_tokens = max(1, min(config.max_new_tokens or encoder.longest_response, encoder.max_length - longest))
    ids = [row for row in ids for _ in range(responses)]
    padded = torch.tensor([[tokenizer.pad_token_id] * (longest - len(row)) + row for row in ids], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=device)
    with computing(causal):
        output = causal.generate(
            input_ids=padded,
            attention_mask=mask,
            do_sample=False,
            logits_processor=LogitsProcessorList([*_warpers(config), InverseTransform()]),
            max_new_tokens=new_tokens,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=ends if len(ends) > 1 else ends[0],
        )
    rows = [_until_end(row, encoder.ends) for row in output[:, longest:].tolist()]
    words = [row[:-1] if row[-1] in encoder.ends else row for row in rows]  # an end may be no special token
    return [Drawn(*one) for one in zip(tokenizer.batch_decode(words, skip_special_tokens=True), rows, strict=True)]


def _until_end(ids: list[int], ends: frozenset[int]) -> list[int]:
    end = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return ids[: end + 1]
