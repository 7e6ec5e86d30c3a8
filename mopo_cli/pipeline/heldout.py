"""Win rates on held-out prompts, by which points of a sweep are chosen: test prompts tell what is reported of them."""

from __future__ import annotations

import math

import numpy as np
import torch

from mopo_cli.algorithms.contract import Aligned
from mopo_cli.algorithms.rollouts import Request, Rollouts
from mopo_cli.judging.rows import judge_rows
from mopo_cli.training.checkpoints import Setting, Work
from mopo_cli.training.stage import mix


def heldout_win_rates(setting: Setting, aligned: Aligned) -> dict[str, float]:
    """R_k of the trained policy by the preference model, by name; empty where no rows are held out.

    A method that follows R_k on held-out prompts has measured it at its end; of others, onpolicy.prompts of them are
    asked now.
    """
    if aligned.estimator in ("onpolicy", "heldout"):
        return dict(aligned.estimated)
    config, inputs = setting.config, setting.inputs
    count = len(inputs.examples["heldout"])
    if not count:
        return {}
    order = np.random.default_rng(mix(config.seed, config.steps, 2)).permutation(count)
    chosen = order[: config.onpolicy.prompts].tolist()
    examples, tokens = ([rows["heldout"][i] for i in chosen] for rows in (inputs.examples, inputs.tokens))
    rows = judge_rows(setting.judge, inputs.data.objectives, examples, tokens, inputs.policy.collate, "observed")
    requests = [Request(i, aligned.condition) for i in range(len(chosen))]
    rollouts = Rollouts(setting, Work(), -math.inf)
    samples = rollouts.compared(rows, requests, config.onpolicy.responses, mix(config.seed, config.steps, 1))
    rates = torch.stack([sample.scores for sample in samples]).double().mean(dim=(0, 1))
    return dict(zip(inputs.data.names, rates.tolist(), strict=True))
