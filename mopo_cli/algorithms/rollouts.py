"""Rollouts: responses drawn from the policy, judged, scored, and kept where they lie on the data's support."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mopo_cli.base.console import stage as shown_stage
from mopo_cli.base.errors import UserError
from mopo_cli.data.table import TokenRow
from mopo_cli.judging.rows import SUPPORTING, response_values, support_floor
from mopo_cli.training.cache import kept_logps
from mopo_cli.training.checkpoints import Setting, Work
from mopo_cli.training.stage import mix

BATCHES = 4  # of samples, between two signs of progress


@dataclass(frozen=True, slots=True)
class Samples:
    """The policy's responses to one prompt behind one condition."""

    row: int
    condition: str
    responses: list[list[int]]  # (n) token ids
    values: np.ndarray  # (n, K) as the judge and computed objectives have them
    usable: np.ndarray  # (n,) whether a response ended, and lies on the data's support


# --------------------------------------------------------------------------------------------- samples
class Sampler:
    """Draws from the policy as it is, behind conditions, and values what it draws."""

    def __init__(self, setting: Setting, work: Work):
        self.setting, self.work = setting, work
        inputs = setting.inputs
        with inputs.policy.swapped(setting.initial):
            rows = inputs.tokens["heldout"][:SUPPORTING]
            logps = kept_logps(setting.accelerator, setting.config.cache, inputs.policy, rows)
        self.floor = support_floor(logps, setting.config.onpolicy.support)

    def __call__(self, asked: Sequence[tuple[int, str]], responses: int, seed: int, title: str) -> list[Samples]:
        """`responses` draws for each (training row, condition)."""
        started = time.perf_counter()
        size = BATCHES * max(1, self.setting.config.sampling.batch_size // responses)
        found: list[Samples] = []
        with shown_stage(title, len(asked)) as progress:
            for start in range(0, len(asked), size):
                found += self._drawn(asked[start : start + size], responses, mix(seed, start))
                progress.advance(len(found))
        self.work.timing.fresh += time.perf_counter() - started
        if unusable(found) == 1.0:
            raise UserError(
                f"{title}: none of {len(asked) * responses} responses ended and lay on the data's support, so there is "
                "nothing to learn from; train the first stage longer (steps, algorithm.first_share), or allow more by "
                f"sampling.max_new_tokens or onpolicy.support (now {self.setting.config.onpolicy.support:g})"
            )
        return found

    def _drawn(self, asked: Sequence[tuple[int, str]], responses: int, seed: int) -> list[Samples]:
        setting, inputs = self.setting, self.setting.inputs
        encoder = inputs.policy.encoder
        examples = [inputs.examples["train"][i] for i, _ in asked]
        prompts = encoder.conditioned_prompts([(e, told) for e, (_, told) in zip(examples, asked, strict=True)])
        drawn = inputs.policy.sample(prompts, responses, setting.config.sampling, seed)
        rows = [
            TokenRow(inputs.tokens["train"][i].prompt, [d.ids for d in draws])
            for (i, _), draws in zip(asked, drawn, strict=True)
        ]
        texts = [[d.text for d in draws] for draws in drawn]
        values = response_values(setting.judge, inputs.data.objectives, examples, rows, texts, inputs.policy.collate)
        before = inputs.policy.logps_under(setting.initial, rows)
        end = inputs.policy.tokenizer.eos_token_id
        return [
            Samples(
                i, told, row.responses, v.numpy(), (b >= self.floor).numpy() & [r[-1] == end for r in row.responses]
            )
            for (i, told), row, v, b in zip(asked, rows, values, before, strict=True)
        ]


def unusable(samples: Sequence[Samples]) -> float:
    """The share of responses that nobody can judge."""
    return 1.0 - float(np.concatenate([s.usable for s in samples]).mean())
