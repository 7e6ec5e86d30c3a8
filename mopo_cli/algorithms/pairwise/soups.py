"""Rewarded soups: one policy per objective, and their weights averaged for any weighting, without further training.

Source: Rame et al. 2023, arXiv 2306.04488: theta = sum_k w_k theta_k, for policies theta_k that were all trained from
one reference. There each comes from RL on a reward; here, offline, from DPO or IPO on the pairs of its objective.

Of LoRA policies the authors' code averages the factors: (sum_k w_k B_k)(sum_k w_k A_k), which for two policies differs
from the average of the merged weights by w_1 w_2 (B_1 - B_2)(A_1 - A_2) (`merge: factors`). `merge: products` is that
average, sum_k w_k B_k A_k, written as one adapter with the factors side by side: its rank is the sum of the ranks.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch

from mopo_cli.algorithms.contract import Aligned, aim_of, finished
from mopo_cli.algorithms.pairwise.dpo import Dpo
from mopo_cli.base.console import say, warn
from mopo_cli.base.errors import UserError
from mopo_cli.base.files import read_json
from mopo_cli.config.checks import checked, normalised_weights, one_of
from mopo_cli.models.parts import inner, lora_of
from mopo_cli.models.policy import Policy, Snapshot, rank_and_alpha, saved_weights
from mopo_cli.models.tokenizers import saved_tokenizer
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
    soup = interpolated(policies, weights)
    for name in soup:
        parts = name.split(".")
        if any(factor in parts for factor in FIRST_FACTORS):
            soup[name] = torch.cat([policy[name] for policy in policies], dim=0)
        elif any(factor in parts for factor in SECOND_FACTORS):
            soup[name] = torch.cat([w * policy[name] for policy, w in zip(policies, weights, strict=True)], dim=1)
    return soup


def cook(policy: Policy, policies: Iterable[Snapshot], weights: Sequence[float], merge: str) -> None:
    """Puts the soup of some policies, with weights that sum to one, into `policy`."""
    lora = lora_of(policy.model)
    if lora is None or merge == "factors":
        return policy.put(interpolated(policies, weights))
    soup = side_by_side(list(policies), weights)
    policy.set_rank(lora.r * len(weights), lora.lora_alpha * len(weights))  # alpha over rank, the scale, stays
    return policy.put(soup)


@dataclass(frozen=True)
class Soups:
    """The settings of algorithm=soups. Policies whose weight is 0 are neither trained nor loaded."""

    names: tuple[str, ...]
    tau: float
    weights: Mapping[str, float] | None = None  # None: equal
    loss: str = "sigmoid"
    smoothing: float = 0.0
    length_normalised: bool = False
    merge: Annotated[str, one_of(*MERGES)] = "factors"
    experts: Mapping[str, str] | None = None

    longest_condition = ""

    def __post_init__(self) -> None:
        checked(self, "algorithm.")
        _ = self.trainings, self.ready  # which raise where a setting is wrong

    @cached_property
    def shares(self) -> dict[str, float]:
        """The weights above 0, which sum to one."""
        shares = normalised_weights(
            self.names, dict.fromkeys(self.names, 1.0) if self.weights is None else self.weights
        )
        return {name: share for name, share in zip(self.names, shares, strict=True) if share > 0}

    @cached_property
    def ready(self) -> dict[str, Path]:
        """The model directory of each objective whose policy is there already."""
        return given_experts(self.names, self.experts)

    @cached_property
    def trainings(self) -> dict[str, Dpo]:
        return {
            name: Dpo(self.names, self.tau, self.loss, {name: 1.0}, self.smoothing, self.length_normalised)
            for name in self.shares
        }

    def check(self, inputs: Inputs) -> None:
        """UserError where a given policy cannot be mixed with this run's: told before anything is fitted."""
        for name, path in self.ready.items():
            if name in self.shares and (reason := differences(inputs.policy, path)):
                raise UserError(
                    f"algorithm.experts.{name}: {path} cannot be part of this soup, since it differs from the run's "
                    f"model: {reason}"
                )

    def align(self, setting: Setting) -> Aligned:
        work = Work()
        if setting.config.model.lora.r == 0 and self.merge == "products":
            say("algorithm.merge=products: the model has no LoRA; all its weights are averaged")
        cook(setting.inputs.policy, self.policies(setting, work), list(self.shares.values()), self.merge)
        return Aligned(finished(work), aim=aim_of(setting, alike=True))

    def policies(self, setting: Setting, work: Work) -> Iterable[Snapshot]:
        """Each objective's policy, loaded or trained, one after the other."""
        for name, path in self.ready.items():
            if name in self.shares:
                compare_start(setting, name, path)
        first = 0
        for name in self.shares:
            if name in self.ready:
                setting.inputs.policy.load_weights(self.ready[name])
            else:
                self.trainings[name].expert(setting, name, work, first)
                first += setting.config.steps
            yield setting.inputs.policy.snapshot()


# --------------------------------------------------------------------------------------------- given policies
def given_experts(names: Sequence[str], experts: Mapping[str, str] | None) -> dict[str, Path]:
    """The model directory of each objective's given policy; UserError where one is no finished run and no model."""
    if experts is None:
        return {}
    if not isinstance(experts, Mapping):
        raise UserError(f"algorithm.experts={experts}: must be a run or model directory for each objective, or null")
    paths = {}
    for name, directory in experts.items():
        key = f"algorithm.experts.{name}={directory}"
        if name not in names:
            raise UserError(f"{key}: {name} is no objective; the set has {', '.join(names)}")
        path = Path(str(directory)).expanduser()
        path = RunDirectory(path).model if RunDirectory(path).model.is_dir() else path
        if not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise UserError(f"{key}: must be a finished run or a model directory; {path} has no config.json")
        paths[name] = path
    return paths


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
        theirs = saved_tokenizer(directory).get_vocab()
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
        if _place(base) != _place(lora.base_model_name_or_path):
            return f"its adapter belongs to {base}, the run's to {lora.base_model_name_or_path}"
        ours = get_peft_model_state_dict(model)
    else:
        ours = model.state_dict()
    for name in sorted({*ours, *saved}):
        here, there = (tuple(state[name].shape) if name in state else None for state in (ours, saved))
        if here != there:
            return f"{name} is {there or 'missing'} there, {here or 'missing'} here"
    return ""


def _place(base: str | None) -> str | None:
    """A model's name, or its directory whichever way it is written."""
    path = os.path.expanduser(base or "")
    return os.path.realpath(path) if os.path.isdir(path) else base
