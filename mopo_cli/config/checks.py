"""What the values of a config may be. UserError names the key, what was found and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from mopo_cli.base.errors import UserError
from mopo_cli.config.schema import (
    EvalConfig,
    ObjectiveConfig,
    PlanConfig,
    ReportConfig,
    SamplingConfig,
    SweepConfig,
    SyntheticConfig,
    TrainConfig,
)


def _require(condition: bool, key: str, found: object, allowed: str) -> None:
    if not condition:
        raise UserError(f"{key}={found}: must be {allowed}")


def check_train(config: TrainConfig) -> None:
    """Raise UserError where a value is outside what the mathematics allows."""
    _require(0 < config.tau < math.inf, "tau", config.tau, "a number above 0 (KL strength)")
    _require(0 < config.beta <= 1, "beta", config.beta, "in (0, 1] (threshold decay)")
    auto = config.epsilon == "auto"
    number = isinstance(config.epsilon, int | float) and not isinstance(config.epsilon, bool)
    _require(auto or (number and 0 <= config.epsilon < math.inf), "epsilon", config.epsilon, "0 or more, or auto")
    whole = config.t0 == math.inf or float(config.t0).is_integer()
    _require(config.t0 >= 1 and whole, "t0", config.t0, "a whole number of steps, 1 or more, or inf")
    for key in ("steps", "batch_size", "gradient_accumulation", "log_every", "checkpoint_every"):
        _require(getattr(config, key) >= 1, key, getattr(config, key), "1 or more")
    _require(config.optimiser.learning_rate > 0, "optimiser.learning_rate", config.optimiser.learning_rate, "above 0")
    forms = ("bradley_terry", "general")
    _require(
        config.preference_model.form in forms, "preference_model.form", config.preference_model.form, " or ".join(forms)
    )
    _require(config.model.init in ("pretrained", "random"), "model.init", config.model.init, "pretrained or random")
    dtypes = ("float32", "bfloat16", "float16")
    _require(config.model.dtype in dtypes, "model.dtype", config.model.dtype, " or ".join(dtypes))
    precision = config.model.mixed_precision
    _require(precision in (None, "bf16"), "model.mixed_precision", precision, "bf16 or null")
    budget = config.token_budget
    _require(budget is None or budget >= 1, "token_budget", budget, "a number of tokens, 1 or more, or null")
    step = config.debug.fail_at_step
    _require(step is None or step >= 1, "debug.fail_at_step", step, "1 or more, or null")
    _require(0 <= config.onpolicy.support < 1, "onpolicy.support", config.onpolicy.support, "in [0, 1)")
    check_objectives(config.objectives)


def check_sweep(config: SweepConfig) -> None:
    """Raise UserError where a setting of `mopo sweep` is out of range."""
    _require(config.retry in ("failed", "none", "all"), "sweep.retry", config.retry, "failed, none or all")
    _require(bool(config.dir), "sweep.dir", config.dir or "''", "a directory")
    twice = [key for key in config.zip if config.zip.count(key) > 1]
    _require(not twice, "sweep.zip", config.zip, "different keys")


def check_plan(config: PlanConfig) -> None:
    """Raise UserError where a value of `mopo plan` is out of range."""
    for key, least in {"prompts": 1, "responses": 2, "thresholds": 2}.items():
        _require(getattr(config.plan, key) >= least, f"plan.{key}", getattr(config.plan, key), f"{least} or more")
    _require(len(config.objectives) >= 2, "objectives", list(config.objectives), "two or more: a front has two sides")


def check_eval(config: EvalConfig) -> None:
    """Raise UserError where a value of `mopo eval` is out of range."""
    for key, least in {"prompts": 1, "responses": 1, "bootstrap": 1}.items():
        found = getattr(config.evaluation, key)
        _require(found >= least, f"evaluation.{key}", found, f"{least} or more")
    _require(config.permutations >= 100, "permutations", config.permutations, "100 or more")
    check_sampling(config.sampling)


def check_sampling(config: SamplingConfig) -> None:
    """Raise UserError where a setting of sampling is out of range."""
    _require(config.temperature > 0, "sampling.temperature", config.temperature, "above 0")
    _require(0 < config.top_p <= 1, "sampling.top_p", config.top_p, "in (0, 1]")
    _require(config.batch_size >= 1, "sampling.batch_size", config.batch_size, "1 or more")
    longest = config.max_new_tokens
    _require(longest is None or longest >= 1, "sampling.max_new_tokens", longest, "1 or more, or null")


def check_report(config: ReportConfig) -> None:
    """Raise UserError where a value of `mopo report` is out of range, or more than one thing is asked for."""
    given = [key for key in ("run", "sweep", "runs") if getattr(config, key) is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)}: give one of run=, sweep= and runs=[...]")
    for key in ("samples", "bootstrap"):
        _require(getattr(config, key) >= 0, key, getattr(config, key), "0 or more")


def check_synthetic(config: SyntheticConfig) -> None:
    """Raise UserError where a value of `mopo synthetic` is out of range."""
    _require(bool(config.structures), "structures", config.structures, "at least one preference structure")
    _require(0 < config.tau < math.inf, "tau", config.tau, "a number above 0 (KL strength)")
    for beta in config.betas:
        _require(0 < beta <= 1, "betas", config.betas, "in (0, 1] each")
    for threshold in config.thresholds or ():
        _require(0 < threshold < 1, "thresholds", config.thresholds, "win rates in (0, 1), or null")
    known = bool(config.preferences) and set(config.preferences) <= {"exact", "sampled"}
    _require(known, "preferences", config.preferences, "a list of exact and sampled")
    _require(bool(config.recipes), "recipes", config.recipes, "at least one")
    _require(bool(config.sizes) and min(config.sizes) >= 2, "sizes", config.sizes, "2 objectives or more each")
    for key, least in {"t0": 1, "steps": 1, "every": 1, "pairs": 50}.items():
        _require(getattr(config, key) >= least, key, getattr(config, key), f"{least} or more")
    for key in ("sigma", "dual_rate", "learning_rate"):
        _require(getattr(config, key) > 0, key, getattr(config, key), "above 0")


def check_objectives(objectives: dict[str, ObjectiveConfig]) -> None:
    """Exactly one primary; roles, thresholds and margins in range."""
    for name, objective in objectives.items():
        key = f"objectives.{name}"
        _require(objective.role in ("primary", "secondary"), f"{key}.role", objective.role, "primary or secondary")
        if objective.threshold is not None:
            _require(
                0 < objective.threshold < 1, f"{key}.threshold", objective.threshold, "a win rate in (0, 1), or null"
            )
        _require(objective.margin >= 0, f"{key}.margin", objective.margin, "0 or more")
        _require(0 <= objective.worst < 1, f"{key}.worst", objective.worst, "a win rate in [0, 1)")
    primaries = [name for name, objective in objectives.items() if objective.role == "primary"]
    if len(primaries) != 1:
        found = f"{len(primaries)} ({', '.join(primaries)})" if primaries else "none"
        raise UserError(
            f"objectives: exactly one must have role: primary, found {found} among {', '.join(objectives) or 'nothing'}"
        )
    if objectives[primaries[0]].threshold is not None:
        raise UserError(
            f"objectives.{primaries[0]}.threshold: the primary objective is maximised and takes no threshold; "
            "set it to null, or make another objective primary"
        )


def normalised_weights(
    names: Sequence[str], weights: Mapping[str, float] | None, key: str = "algorithm.weights"
) -> tuple[float, ...]:
    """(K,) weights of the objectives that sum to one; all on the primary where none are given.

    Raises UserError where they name other objectives, are negative or not finite, or all zero.
    """
    if weights is None:
        return tuple(float(k == 0) for k in range(len(names)))
    if not isinstance(weights, Mapping):
        raise UserError(f"{key}={weights}: must be a weight for each objective, as {{{names[0]}: 0.7, ...}}, or null")
    given = "{" + ", ".join(f"{name}: {value}" for name, value in weights.items()) + "}"
    unknown = [name for name in weights if name not in names]
    if unknown:
        raise UserError(f"{key}={given}: {unknown[0]} is no objective; the set has {', '.join(names)}")
    for name, value in weights.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise UserError(f"{key}.{name}={value}: must be a number, 0 or more")
    total = sum(weights.values())
    if total <= 0:
        raise UserError(f"{key}={given}: all are zero; at least one must be above 0")
    return tuple(float(weights.get(name, 0.0)) / total for name in names)
