"""Rollouts: responses drawn from the policy, judged, scored, and kept where they lie on the data's support.

Every algorithm that learns from its own policy's responses gets them here. All draws are a function of the seed given.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mopo_cli.base.console import stage as shown_stage
from mopo_cli.base.errors import UserError
from mopo_cli.base.types import Example
from mopo_cli.data.table import TokenRow
from mopo_cli.judging.rows import SUPPORTING, JudgedRows, judge_samples, response_values, support_floor
from mopo_cli.models.policy import Snapshot
from mopo_cli.models.sampling import Drawn
from mopo_cli.training.cache import kept_logps
from mopo_cli.training.checkpoints import Setting, Work
from mopo_cli.training.stage import mix

BATCHES = 4  # of samples, between two signs of progress


class Request(NamedTuple):
    """A row's prompt, behind a condition where there is one."""

    row: int
    condition: str = ""


@dataclass(frozen=True, slots=True)
class Samples:
    """The policy's M responses to one request."""

    row: int
    condition: str
    told: TokenRow  # the responses behind the prompt as it was asked
    plain: TokenRow  # behind the row's own prompt: judge and reference never see conditions
    scores: Tensor  # (M, K) win rates against the data's responses, or the judge's values: as was asked for
    reference_logps: Tensor  # (M,) under the run's reference
    on_support: Tensor  # (M,) whether the reference finds a response as likely as nearly all of the data's
    ended: Tensor  # (M,) False where the longest length cut a response off

    @property
    def responses(self) -> list[list[int]]:
        return self.plain.responses

    @property
    def usable(self) -> Tensor:
        """(M,) those that a judge can have an opinion of."""
        return self.on_support & self.ended


def support(setting: Setting, rows: Sequence[TokenRow] = ()) -> tuple[float, list[Tensor]]:
    """The log pi_ref below which a response is off the data's support; (G,) log pi_ref of more rows' responses."""
    inputs, supporting = setting.inputs, setting.inputs.tokens["heldout"][:SUPPORTING]
    with inputs.policy.swapped(setting.initial):
        logps = kept_logps(setting.accelerator, setting.config.cache, inputs.policy, [*supporting, *rows])
    return support_floor(logps[: len(supporting)], setting.config.onpolicy.support), logps[len(supporting) :]


class Rollouts:
    """Draws from setting.inputs.policy as it is. What is drawn is counted in `work`.

    floor: the log pi_ref of `support`.
    """

    def __init__(self, setting: Setting, work: Work, floor: float):
        self.setting, self.work, self.floor = setting, work, floor

    # ------------------------------------------------------------------ draws

    def compared(self, rows: JudgedRows, requests: Sequence[Request], responses: int, seed: int) -> list[Samples]:
        """`responses` draws for each request for one of `rows`, scored by win rates against the data's responses."""
        prompts = self.prompts(rows.examples, rows.tokens, requests)
        drawn = self._draw(prompts, responses, seed)
        numbers = [request.row for request in requests]
        plain, rates = judge_samples(self.setting.judge, rows, numbers, drawn, self.setting.inputs.policy.collate)
        return self._samples(requests, prompts, plain, rates)

    def valued(self, requests: Sequence[Request], responses: int, seed: int, title: str) -> list[Samples]:
        """`responses` draws for each request for a training row, scored by the judge's values.

        UserError where none of them all is usable.
        """
        started = time.perf_counter()
        size = BATCHES * max(1, self.setting.config.sampling.batch_size // responses)
        samples: list[Samples] = []
        with shown_stage(title, len(requests)) as progress:
            for start in range(0, len(requests), size):
                samples += self._valued(requests[start : start + size], responses, mix(seed, start))
                progress.advance(len(samples))
        self.work.timing.fresh += time.perf_counter() - started
        if unusable(samples) == 1.0:
            raise UserError(
                f"{title}: none of {len(requests) * responses} responses ended and lay on the data's support, so there "
                "is nothing to learn from; train the first stage longer (steps, algorithm.first_share), or allow more "
                "by sampling.max_new_tokens or onpolicy.support (now "
                f"{self.setting.config.onpolicy.support:g})"
            )
        return samples

    def _valued(self, requests: Sequence[Request], responses: int, seed: int) -> list[Samples]:
        inputs = self.setting.inputs
        examples, tokens = inputs.examples["train"], inputs.tokens["train"]
        prompts = self.prompts(examples, tokens, requests)
        drawn = self._draw(prompts, responses, seed)
        plain = [
            TokenRow(tokens[request.row].prompt, [d.ids for d in draws])
            for request, draws in zip(requests, drawn, strict=True)
        ]
        texts = [[d.text for d in draws] for draws in drawn]
        values = response_values(
            self.setting.judge,
            inputs.data.objectives,
            [examples[request.row] for request in requests],
            plain,
            texts,
            inputs.policy.collate,
        )
        return self._samples(requests, prompts, plain, values)

    def _draw(self, prompts: Sequence[list[int]], responses: int, seed: int) -> list[list[Drawn]]:
        self.work.samples += len(prompts) * responses
        return self.setting.inputs.policy.sample(prompts, responses, self.setting.config.sampling, seed)

    def prompts(
        self, examples: Sequence[Example], tokens: Sequence[TokenRow], requests: Sequence[Request]
    ) -> list[list[int]]:
        """Token ids of each request's prompt."""
        if not any(request.condition for request in requests):
            return [tokens[request.row].prompt for request in requests]
        return self.setting.inputs.policy.encoder.conditioned_prompts(
            [(examples[request.row], request.condition) for request in requests]
        )

    def _samples(
        self,
        requests: Sequence[Request],
        prompts: Sequence[list[int]],
        plain: Sequence[TokenRow],
        scores: Sequence[Tensor],
    ) -> list[Samples]:
        before = self.reference(plain)
        ends = self.setting.inputs.policy.encoder.ends
        return [
            Samples(*request, TokenRow(prompt, row.responses), row, score, logps, logps >= self.floor,
                    torch.tensor([bool(response) and response[-1] in ends for response in row.responses]))
            for request, prompt, row, score, logps in zip(requests, prompts, plain, scores, before, strict=True)
        ]  # fmt: skip

    # ------------------------------------------------------------------ log-probs

    def logps(self, rows: Sequence[TokenRow]) -> list[Tensor]:
        """(G,) log-probs of each row's responses under the policy as it is."""
        return self.setting.inputs.policy.logps(rows)

    def reference(self, rows: Sequence[TokenRow], weights: Snapshot | None = None) -> list[Tensor]:
        """(G,) log-probs of each row's responses under `weights`, or the run's reference."""
        return self.setting.inputs.policy.logps_under(weights or self.setting.initial, rows)


def unusable(samples: Sequence[Samples]) -> float:
    """The share of responses that nobody can judge."""
    return 1.0 - float(torch.cat([s.usable for s in samples]).double().mean())


def rollout_settings(setting: Setting) -> list[object]:
    """What a policy that learns from its own samples depends on, besides what every policy does (keys.policy_key)."""
    config, inputs = setting.config, setting.inputs
    computed = {name: (node.computed, node.margin) for name, node in config.objectives.items()}
    contexts = hashlib.sha256()
    for split in ("train", "heldout"):
        for example in inputs.examples[split]:
            contexts.update(repr((example.context, example.group)).encode("utf-8", "surrogatepass"))
    lengths = config.model.max_length, inputs.policy.encoder.longest_response, config.model.chat_template
    ends = sorted(inputs.policy.encoder.ends)
    return [computed, asdict(config.sampling), asdict(config.onpolicy), lengths, ends, contexts.hexdigest()]
