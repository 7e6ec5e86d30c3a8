"""What the configs hold: each command's record, with what each value may be beside it (config/checks.py).

Every mistake that a user can make here becomes one UserError that names the key, what was found and what is allowed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any

from mopo_cli.base.errors import UserError
from mopo_cli.config.checks import Must, above, at_least, between, each, one_of

Count = Annotated[int, at_least(1)]
Positive = Annotated[float, above(0)]
Seed = Annotated[int, Must("a whole number from 0 to 4294967295", lambda value: 0 <= value < 2**32)]  # as NumPy's
Tau = Annotated[float, above(0, "a number above 0 (KL strength)")]
Dtype = Annotated[str, one_of("float32", "bfloat16", "float16")]


@dataclass
class RunConfig:
    dir: str = ""
    name: str = ""
    resume: bool = False


@dataclass
class ObjectiveConfig:
    role: Annotated[str, one_of("primary", "secondary")] = "secondary"
    source: str | None = None  # the label's name in the data set; the objective's own name where null
    threshold: Annotated[float | None, between(0, 1, be="a win rate in (0, 1)")] = None
    computed: Any = None  # {_target_: a scorer (prompt, response, context) -> float}
    margin: Annotated[float, at_least(0)] = 0.0
    # the win rate from which `mopo report` counts hypervolume
    worst: Annotated[float, between(0, 1, "[", be="a win rate in [0, 1)")] = 0.0


def check_primary(objectives: dict[str, ObjectiveConfig]) -> None:
    """UserError unless exactly one objective is primary, and it has no threshold."""
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


@dataclass
class LoraConfig:
    r: int = 0  # 0: full fine-tuning
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: Any = "all-linear"
    quantise: str | None = None  # "4bit": QLoRA


@dataclass
class TokenizerConfig:
    train: bool = False  # train one on the data instead of loading the model's
    vocab_size: int = 4096
    min_frequency: int = 2  # of a merge
    across_words: bool = False  # let merges span spaces


@dataclass
class ModelConfig:
    name: str = ""
    path: str | None = None
    init: Annotated[str, one_of("pretrained", "random")] = "pretrained"
    architecture: dict[str, Any] = field(default_factory=dict)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    dtype: Dtype = "float32"
    mixed_precision: Annotated[str | None, one_of("bf16", None)] = (
        None  # products in bfloat16, weights and sums in dtype
    )
    compile: bool = False
    max_length: int = 512
    attention: str = "sdpa"
    gradient_checkpointing: bool = False
    chat_template: str = "auto"
    lora: LoraConfig = field(default_factory=LoraConfig)
    trust_remote_code: bool = False
    revision: str | None = None


@dataclass
class OptimiserConfig:
    learning_rate: Positive = 1e-3
    weight_decay: float = 0.0
    warmup: int = 10
    max_grad_norm: float = 1.0
    final_fraction: float = 0.0  # of the learning rate, reached linearly at the last step
    fused: bool = True  # one kernel for all parameters


@dataclass
class SftConfig:
    steps: int = 300
    max_epochs: float = 10.0  # fewer steps on small data: beyond this it is learnt by heart
    batch_size: int = 32
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)


@dataclass
class PreferenceModelConfig:
    form: Annotated[str, one_of("bradley_terry", "general")] = "bradley_terry"  # "general" can express cycles
    steps: int = 300
    max_epochs: float = 8.0
    batch_size: int = 32
    evaluate_every: int = 50
    skew_rank: int = 2
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)


@dataclass
class SamplingConfig:
    temperature: Positive = 1.0
    top_p: Annotated[float, between(0, 1, "]")] = 1.0
    max_new_tokens: Annotated[int | None, at_least(1)] = None  # None: as long as the longest response of the data
    batch_size: Count = 256


@dataclass
class OnPolicyConfig:
    every: int = 25  # steps between two measurements on samples of the policy
    prompts: int = 128  # held-out prompts for the estimate of R_j
    responses: int = 4
    train_prompts: int = 400  # training prompts that get fresh responses at each measurement
    train_responses: int = 2
    # samples less likely under pi_ref than all but this share of the data are not judged
    support: Annotated[float, between(0, 1, "[")] = 0.005


@dataclass
class EvaluationConfig:
    prompts: Count = 512
    responses: Count = 4
    exact_prompts: int | None = None


@dataclass
class LoggerConfig:
    name: str = "none"
    project: str | None = None  # WANDB_PROJECT, else mopo
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    mode: str = "auto"  # online with a key, else offline


@dataclass
class DebugConfig:
    """For tests, and for whoever wants to see what happens. `debug=true` is short for `debug.traceback=true`."""

    traceback: bool = False
    fail_at_step: Annotated[int | None, at_least(1)] = None  # the run raises after this step of the alignment


def _is_epsilon(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value == "auto" or (number and 0 <= value < math.inf)


def _is_t0(value: float) -> bool:
    return value >= 1 and (value == math.inf or value.is_integer())


@dataclass
class TrainConfig:
    """What `mopo train` runs on. `dataset` and `algorithm` stay mappings: they name the function that takes them."""

    tau: Tau = 0.08
    beta: Annotated[float, between(0, 1, "]", be="in (0, 1] (threshold decay)")] = 0.9995
    epsilon: Annotated[Any, Must("0 or more, or auto", _is_epsilon)] = "auto"
    t0: Annotated[float, Must("a whole number of steps, 1 or more, or inf", _is_t0)] = math.inf
    steps: Count = 400
    batch_size: Count = 32
    gradient_accumulation: Count = 1
    # tokens that go through the model at once; None: a step's rows as they come
    token_budget: Annotated[int | None, at_least(1, "a number of tokens, 1 or more")] = None
    seed: Seed = 0
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    preference_model: PreferenceModelConfig = field(default_factory=PreferenceModelConfig)
    onpolicy: OnPolicyConfig = field(default_factory=OnPolicyConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    log_every: Count = 5
    checkpoint_every: Count = 100
    cache: str | None = None
    run: RunConfig = field(default_factory=RunConfig)
    dataset: dict[str, Any] = field(default_factory=dict)
    model: ModelConfig = field(default_factory=ModelConfig)
    objectives: dict[str, ObjectiveConfig] = field(default_factory=dict)
    algorithm: dict[str, Any] = field(default_factory=dict)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)

    def check_together(self, key: str) -> None:
        check_primary(self.objectives)


@dataclass
class PlanSettings:
    """What `mopo plan` predicts from."""

    prompts: Count = 300
    responses: Annotated[int, at_least(2)] = 64
    thresholds: Annotated[int, at_least(2)] = 15


@dataclass
class PlanConfig(TrainConfig):
    """What `mopo plan` runs on: everything of `mopo train`, and how much to sample."""

    plan: PlanSettings = field(default_factory=PlanSettings)

    def check_together(self, key: str) -> None:
        super().check_together(key)
        if len(self.objectives) < 2:
            raise UserError(f"objectives={list(self.objectives)}: must be two or more: a front has two sides")


@dataclass
class DataConfig:
    """What `mopo data` runs on."""

    dataset: dict[str, Any] = field(default_factory=dict)
    objectives: dict[str, ObjectiveConfig] = field(default_factory=dict)
    json: str | None = None  # a file for the numbers
    seed: Seed = 0
    debug: bool = False

    def check_together(self, key: str) -> None:
        check_primary(self.objectives)


@dataclass
class ScorerConfig:
    """A gold scorer of `mopo eval`: a sequence-classification model with its template, or a Python function."""

    objective: str | None = None  # the objective it judges; null: reported beside the objectives
    path: str | None = None  # a hub id or a model directory
    text: str = "{prompt}{response}"  # what the model reads (mopo_cli/scorers.py: FIELDS)
    text_pair: str | None = None  # the second text of a pair
    label: str | None = None  # the class whose probability is the score; null: the model's only output
    labels: list[str] | None = None  # the classes in order, for a model whose config names none
    max_length: int | None = None  # tokens; null: as many as the model takes
    batch_size: int = 32
    dtype: str = "float32"
    revision: str | None = None
    trust_remote_code: bool = False
    computed: Any = None  # {_target_: a function (prompt, response, context) -> float}, instead of a model
    margin: float = 0.0  # scores closer than this are a tie


@dataclass
class EvalConfig:
    """What `mopo eval` runs on."""

    run: Any = None  # run or model directories: one, a list or a pattern; the newest finished run where null
    responses: Any = None  # files of responses, in the same way
    judge: str | None = None  # a run: its data, objectives and preference model judge
    reference: str | None = None  # a model directory or hub id that plain models are compared with
    name: str = ""
    dir: str = ""
    scorers: dict[str, ScorerConfig] = field(default_factory=dict)
    functions: list[str] = field(default_factory=list)  # modules whose functions a scorer may call
    normalisation: str | None = None
    permutations: Annotated[int, at_least(100)] = 10000
    dataset: dict[str, Any] = field(default_factory=dict)
    objectives: dict[str, ObjectiveConfig] = field(default_factory=dict)
    model: ModelConfig = field(default_factory=ModelConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    seed: Seed = 0
    allow_code: bool = False  # what a run's config names besides mopo's own code is run
    debug: bool = False

    def check_together(self, key: str) -> None:
        check_trained(self.model)
        if self.run is not None and self.model.path is not None:
            raise UserError(f"run and model.path: give one; a plain model is run={self.model.path} beside the others")


def check_trained(model: ModelConfig) -> None:
    """UserError where a model that is to respond would be made of random weights, whatever model.path says."""
    if model.init == "random":
        raise UserError(
            f"model={model.name or 'random'}: model.init=random makes weights that nobody has trained; use model=local"
        )


@dataclass
class ExportConfig:
    """What `mopo export` runs on."""

    run: str | None = None
    to: str | None = None
    merge: bool = False
    overwrite: bool = False
    allow_code: bool = False  # what a run's config names besides mopo's own code is run
    debug: bool = False


@dataclass
class SampleConfig:
    """What `mopo sample` runs on."""

    run: str | None = None
    prompt: str | None = None
    prompts: str | None = None
    direction: str | None = None
    n: Count = 1
    chat: bool | None = None
    compare: Annotated[int, at_least(0)] = 8
    model: ModelConfig = field(default_factory=ModelConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    seed: Seed = 0
    allow_code: bool = False  # what a run's config names besides mopo's own code is run
    debug: bool = False

    def check_together(self, key: str) -> None:
        check_trained(self.model)
        if self.run is not None and self.model.path is not None:
            raise UserError("run and model.path: give one; a plain model may be either")


@dataclass
class ReportConfig:
    """What `mopo report` runs on: a run, a sweep, or any runs; the newest where all are null."""

    run: str | None = None
    sweep: str | None = None
    runs: list[str] | None = None  # directories, or patterns of them
    out: str | None = None  # where a comparison of runs goes
    samples: Annotated[int, at_least(0)] = 20  # prompts shown side by side
    bootstrap: Annotated[int, at_least(0)] = 500
    figures: bool = True  # PNG and SVG of each figure, too
    seed: Seed = 0
    debug: bool = False

    def check_together(self, key: str) -> None:
        several = [name for name in ("run", "sweep", "runs") if getattr(self, name) is not None]
        if len(several) > 1:
            raise UserError(f"{' and '.join(several)}: give one of run=, sweep= and runs=[...]")


@dataclass
class RecipeConfig:
    """One way to run the method."""

    extraction: str = "regression"
    multipliers: str = "lagrangian"
    estimator: str = "onpolicy"


def _are_sizes(sizes: list[int]) -> bool:
    return bool(sizes) and min(sizes) >= 2


def _are_preferences(kinds: list[str]) -> bool:
    return bool(kinds) and set(kinds) <= {"exact", "sampled"}


@dataclass
class SyntheticConfig:
    """What `mopo synthetic` runs on: every structure and K by every combination of the lists."""

    structures: Annotated[dict[str, Any], Must("at least one preference structure", bool)] = field(default_factory=dict)
    sizes: Annotated[list[int], Must("2 objectives or more each", _are_sizes)] = field(default_factory=lambda: [2, 3])
    tau: Tau = 0.08
    betas: Annotated[list[float], each(between(0, 1, "]"))] = field(default_factory=list)
    t0: Count = 25
    thresholds: Annotated[list[float] | None, each(between(0, 1), "win rates in (0, 1)")] = None
    preferences: Annotated[list[str], Must("a list of exact and sampled", _are_preferences)] = field(
        default_factory=list
    )
    pairs: Annotated[int, at_least(50)] = 20000
    recipes: Annotated[list[RecipeConfig], Must("at least one", bool)] = field(default_factory=list)
    sigma: Positive = 0.002
    dual_rate: Positive = 0.5
    steps: Count = 200
    every: Count = 20
    learning_rate: Positive = 0.1
    seed: Seed = 0
    processes: int | None = None
    run: RunConfig = field(default_factory=RunConfig)
    debug: bool = False


@dataclass
class SweepConfig:
    """What `mopo sweep` adds to a train config."""

    name: str = ""
    dir: Annotated[str, Must("a directory", bool)] = ""
    # failed: what failed, again; none: what failed stays; all: every point again, from its beginning
    retry: Annotated[str, one_of("failed", "none", "all", be="failed, none or all")] = "failed"
    # keys whose values go together instead of being multiplied
    zip: Annotated[list[str], Must("different keys", lambda keys: len(set(keys)) == len(keys))] = field(
        default_factory=list
    )
    dry_run: bool = False
    grid: Any = None  # of an experiment: key -> values, or a list of such mappings
