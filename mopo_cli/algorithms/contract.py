"""What every algorithm must be, what it leaves, and how one is built from a run's config."""

from __future__ import annotations

import inspect
import time
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Protocol

from mopo_cli.base.errors import UserError
from mopo_cli.base.types import primary_first
from mopo_cli.config.compose import build, class_of
from mopo_cli.config.schema import TrainConfig
from mopo_cli.data.directions import Directions, Levels, weighed
from mopo_cli.training.checkpoints import Setting, Work


@dataclass
class Aligned:
    """What a method leaves besides the policy. What only a constrained method knows is empty for the others."""

    work: Work
    aim: str = ""  # what it was trained for, for a reader; "" where that is the primary objective under thresholds
    condition: str = ""  # what stands in front of each prompt when this policy is asked (data/tokens.py)
    directions: Directions | Levels | None = None  # what else it may be asked, where that is a direction
    thresholds: dict[str, float] = field(default_factory=dict)  # asked of the secondaries in the end
    duals: dict[str, float] = field(default_factory=dict)
    estimated: dict[str, float] = field(default_factory=dict)  # the run's own last word on R_k
    infeasible: tuple[str, ...] = ()
    estimator: str | None = None  # how R_j was known, of a method that follows it
    attainable: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)  # nats a response, at each measurement
    off_support: float = 0.0  # share of the last measurement's samples that the data never show


def aim_of(setting: Setting, alike: bool) -> str:
    """The aim where no threshold is held: the config's weights or direction; without them all objectives alike, or the
    primary alone."""
    default = "all objectives weighed alike" if alike else f"as {setting.inputs.data.names[0]} as possible"
    return weighed(setting.config.algorithm) or default


class Algorithm(Protocol):
    """What an algorithm's config names by _target_.

    It is built with its own keys of the config and with those of names, thresholds, tau, beta, epsilon, t0,
    unscored and preference_form that its constructor takes (build_algorithm); it raises UserError where a setting is
    wrong. It may have check(inputs), which raises UserError where data or model do not suit it, before anything is
    fitted.
    """

    longest_condition: str  # that its policy is ever asked with, "" where prompts stay as they are

    def align(self, setting: Setting) -> Aligned:
        """Train setting.inputs.policy."""
        ...


EVALUATED = {"trained_on": False}  # marks a setting that says where a policy is evaluated, and changes no training


def trained_on(algorithm: Any) -> dict[str, Any]:
    """All settings of an algorithm (a dataclass) that its training depends on: what a cache's key is made of."""
    values = asdict(algorithm)
    return {f.name: values[f.name] for f in fields(algorithm) if f.metadata.get("trained_on", True)}


def finished(work: Work) -> Work:
    """The work with its clock stopped."""
    work.timing.seconds = time.perf_counter() - work.timing.started
    return work


def build_algorithm(config: TrainConfig, names: tuple[str, ...], thresholds: tuple[float | None, ...]) -> Algorithm:
    """The algorithm that algorithm._target_ names, with those of the run's settings that it takes.

    unscored: the objectives whose judge compares responses without giving them values.
    """
    node = {key: value for key, value in config.algorithm.items() if key != "name"}
    target = class_of(node, "algorithm")
    general = config.preference_model.form == "general"
    unscored = tuple(name for name in names if general and config.objectives[name].computed is None)
    given = {"names": names, "thresholds": thresholds, "unscored": unscored}
    given |= {key: getattr(config, key) for key in ("tau", "beta", "epsilon", "t0")}
    given["preference_form"] = config.preference_model.form
    try:
        taken = inspect.signature(target).parameters
    except ValueError as error:  # of a type of Python's own
        raise UserError(f"algorithm._target_={node.get('_target_')}: is no algorithm") from error
    return build({**node, "_partial_": False}, "algorithm", **{k: v for k, v in given.items() if k in taken})


def algorithm_of(config: TrainConfig) -> Algorithm:
    """The algorithm that the config names, for its objectives: the primary first."""
    names = list(primary_first(config.objectives))
    return build_algorithm(config, tuple(names), tuple(config.objectives[name].threshold for name in names[1:]))
