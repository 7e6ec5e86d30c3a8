"""Rewarded soups: one policy per objective, and their weights averaged for any weighting, without further training.

Source: Rame et al. 2023, arXiv 2306.04488: theta = sum_k w_k theta_k, for policies theta_k that were all trained from
one reference. There each comes from RL on a reward; here, offline, from DPO or IPO on the pairs of its objective.

Of LoRA policies the authors' code averages the factors: (sum_k w_k B_k)(sum_k w_k A_k), which for two policies differs
from the average of the merged weights by w_1 w_2 (B_1 - B_2)(A_1 - A_2) (`merge: factors`). `merge: products` is that
average, sum_k w_k B_k A_k, written as one adapter with the factors side by side: its rank is the sum of the ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoTokenizer

from mopo_cli.algorithms.contract import Aligned, aim_of, finished
from mopo_cli.algorithms.pairwise.dpo import Dpo
from mopo_cli.base.console import say, warn
from mopo_cli.base.errors import UserError
from mopo_cli.base.files import read_json
from mopo_cli.config.checks import normalised_weights
from mopo_cli.models.parts import inner, lora_of
from mopo_cli.models.policy import Policy, Snapshot, rank_and_alpha, saved_weights
from mopo_cli.runs.directory import RunDirectory
from mopo_cli.training.checkpoints import Setting, Work

if TYPE_CHECKING:
    from mopo_cli.training.inputs import Inputs


MERGES = ("factors", "products")
FIRST_FACTORS, SECOND_FACTORS = ("lora_A", "lora_embedding_A"), ("lora_B", "lora_embedding_B")


def interpolated(policies: Iterable[Snapshot], weights: Sequence[float]) -> Snapshot:
    """sum_k w_k theta_k, each parameter summed in float32 at least; one policy at a time is held."""
    total: Snapshot = {}
    kinds = {}
    for policy, weight in zip(policies, weights, strict=True):
        for name, value in policy.items():
            kinds[name] = value.dtype
            part = weight * value.to(torch.promote_types(value.dtype, torch.float32))
            total[name] = total[name] + part if name in total else part
    return {name: value.to(kinds[name]) for name, value in total.items()}


def side_by_side(policies: Sequence[Snapshot], weights: Sequence[float]) -> Snapshot:
    """LoRA factors whose products are sum_k w_k B_k A_k: A_k above each other, w_k B_k beside each other.

    What is no LoRA factor is interpolated.
    """
    found = interpolated(policies, weights)
    for name in found:
        parts = name.split(".")
        if any(factor in parts for factor in FIRST_FACTORS):
            found[name] = torch.cat([policy[name] for policy in policies], dim=0)
        elif any(factor in parts for factor in SECOND_FACTORS):
            found[name] = torch.cat([w * policy[name] for policy, w in zip(policies, weights, strict=True)], dim=1)
    return found


def cook(policy: Policy, policies: Iterable[Snapshot], weights: Sequence[float], merge: str) -> None:
    """Puts the soup of some policies, with weights that sum to one, into `policy`."""
    lora = lora_of(policy.model)
    if lora is None or merge == "factors":
        return policy.put(interpolated(policies, weights))
    soup = side_by_side(list(policies), weights)
    policy.set_rank(lora.r * len(weights), lora.lora_alpha * len(weights))  # alpha over rank, the scale, stays
    return policy.put(soup)


class Soups:
    """The settings of algorithm=soups. Policies whose weight is 0 are neither trained nor loaded."""

    longest_condition = ""

    def __init__(
        self,
        names: tuple[str, ...],
        tau: float,
        weights: Mapping[str, float] | None = None,
        loss: str = "sigmoid",
        smoothing: float = 0.0,
        length_normalised: bool = False,
        merge: str = "factors",
        experts: Mapping[str, str] | None = None,
    ):
        if merge not in MERGES:
            raise UserError(f"algorithm.merge={merge}: must be {' or '.join(MERGES)}")
        weighted = normalised_weights(names, dict.fromkeys(names, 1.0) if weights is None else weights)
        self.weights = {name: weight for name, weight in zip(names, weighted, strict=True) if weight > 0}
        self.merge = merge
        self.given = given_experts(names, experts)
        self.methods = {name: Dpo(names, tau, loss, {name: 1.0}, smoothing, length_normalised) for name in self.weights}

    def check(self, inputs: Inputs) -> None:
        """UserError where a given policy cannot be mixed with this run's: told before anything is fitted."""
        for name, path in self.given.items():
            if name in self.weights and (found := differences(inputs.policy, path)):
                raise UserError(
                    f"algorithm.experts.{name}: {path} cannot be part of this soup, since it differs from the run's "
                    f"model: {found}"
                )

    def align(self, setting: Setting) -> Aligned:
        work = Work()
        if setting.config.model.lora.r == 0 and self.merge == "products":
            say("algorithm.merge=products: the model has no LoRA; all its weights are averaged")
        cook(setting.inputs.policy, self.policies(setting, work), list(self.weights.values()), self.merge)
        return Aligned(finished(work), aim=aim_of(setting, alike=True))

    def policies(self, setting: Setting, work: Work) -> Iterable[Snapshot]:
        """Each objective's policy, loaded or trained, one after the other."""
        for name, path in self.given.items():
            if name in self.weights:
                compare_start(setting, name, path)
        first = 0
        for name in self.weights:
            if name in self.given:
                setting.inputs.policy.load_weights(self.given[name])
            else:
                self.methods[name].expert(setting, name, work, first)
                first += setting.config.steps
            yield setting.inputs.policy.snapshot()


# --------------------------------------------------------------------------------------------- given policies
def given_experts(names: Sequence[str], experts: Mapping[str, str] | None) -> dict[str, Path]:
    """The model directory of each objective's given policy; UserError where one is no finished run and no model."""
    if experts is None:
        return {}
    if not isinstance(experts, Mapping):
        raise UserError(f"algorithm.experts={experts}: must be a run or model directory for each objective, or null")
    found = {}
    for name, directory in experts.items():
        key = f"algorithm.experts.{name}={directory}"
        if name not in names:
            raise UserError(f"{key}: {name} is no objective; the set has {', '.join(names)}")
        path = Path(str(directory)).expanduser()
        path = RunDirectory(path).model if RunDirectory(path).model.is_dir() else path
        if not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise UserError(f"{key}: must be a finished run or a model directory; {path} has no config.json")
        found[name] = path
    return found


def compare_start(setting: Setting, name: str, path: Path) -> None:
    """A warning where a given policy had another start than this run's."""
    inputs = setting.inputs
    reference = RunDirectory(path.parent).reference
    if not reference.is_dir():
        return
    inputs.policy.load_weights(reference)
    now = inputs.policy.snapshot()
    inputs.policy.put(setting.initial)
    if any(not torch.equal(now[name], value) for name, value in setting.initial.items()):
        warn(
            f"algorithm.experts.{name}: {path} was trained from another reference than this run's; weights without a "
            "common start seldom mix"
        )


def differences(policy: Policy, directory: Path) -> str:
    """Why the weights in `directory` cannot be mixed with a policy's, "" where they can."""
    model, lora = inner(policy.model), lora_of(policy.model)
    adapter = (directory / "adapter_config.json").is_file()
    if adapter != (lora is not None):
        ours, theirs = ("all its weights", "a LoRA adapter") if adapter else ("a LoRA adapter", "all its weights")
        return f"it has {theirs}, the run trains {ours} (model.lora.r)"
    try:
        theirs = AutoTokenizer.from_pretrained(directory).get_vocab()
        saved = saved_weights(model, directory)
    except Exception as error:
        return f"it cannot be loaded ({' '.join(str(error).split())[:200]})"
    if theirs != (vocabulary := policy.tokenizer.get_vocab()):
        return f"its tokenizer has another vocabulary ({len(theirs)} tokens, the run's {len(vocabulary)})"
    if lora is not None:
        from peft import get_peft_model_state_dict

        rank, alpha = rank_and_alpha(directory)
        if (rank, alpha) != (lora.r, lora.lora_alpha):
            return f"its LoRA has r={rank} and alpha={alpha}, the run's r={lora.r} and alpha={lora.lora_alpha}"
        base = read_json(directory / "adapter_config.json").get("base_model_name_or_path")
        if base != lora.base_model_name_or_path:
            return f"its adapter belongs to {base}, the run's to {lora.base_model_name_or_path}"
        own = get_peft_model_state_dict(model)
    else:
        own = model.state_dict()
    for name in sorted({*own, *saved}):
        ours, theirs = (tuple(state[name].shape) if name in state else None for state in (own, saved))
        if ours != theirs:
            return f"{name} is {theirs or 'missing'} there, {ours or 'missing'} here"
    return ""
