"""From the command line to a typed config: Hydra composes conf/, the schema below checks it.

Every mistake that a user can make here becomes one UserError that names the key, what was found and what is allowed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass
class RunConfig:
    dir: str = ""
    name: str = ""
    resume: bool = False


@dataclass
class ObjectiveConfig:
    role: str = "secondary"
    source: str | None = None  # the label's name in the data set; the objective's own name where null
    threshold: float | None = None
    computed: Any = None  # {_target_: a scorer (prompt, response, context) -> float}
    margin: float = 0.0
    worst: float = 0.0  # the win rate from which `mopo report` counts hypervolume


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
    init: str = "pretrained"  # or "random"
    architecture: dict[str, Any] = field(default_factory=dict)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    dtype: str = "float32"
    mixed_precision: str | None = None  # "bf16": products in bfloat16, weights and sums in dtype
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
    learning_rate: float = 1e-3
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
    form: str = "bradley_terry"  # or "general": can express cycles
    steps: int = 300
    max_epochs: float = 8.0
    batch_size: int = 32
    evaluate_every: int = 50
    skew_rank: int = 2
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)


@dataclass
class SamplingConfig:
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int | None = None  # None: as long as the longest response of the data
    batch_size: int = 256


@dataclass
class OnPolicyConfig:
    every: int = 25  # steps between two measurements on samples of the policy
    prompts: int = 128  # held-out prompts for the estimate of R_j
    responses: int = 4
    train_prompts: int = 400  # training prompts that get fresh responses at each measurement
    train_responses: int = 2
    support: float = 0.005  # samples less likely under pi_ref than all but this share of the data are not judged


@dataclass
class EvaluationConfig:
    prompts: int = 512
    responses: int = 4
    bootstrap: int = 1000
    exact_prompts: int | None = None


@dataclass
class LoggerConfig:
    name: str = "none"
    project: str = "mopo"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    mode: str = "auto"  # online with a key, else offline


@dataclass
class DebugConfig:
    """For tests, and for whoever wants to see what happens. `debug=true` is short for `debug.traceback=true`."""

    traceback: bool = False
    fail_at_step: int | None = None  # the run raises after this step of the alignment


@dataclass
class TrainConfig:
    """What `mopo train` runs on. `dataset` and `algorithm` stay mappings: they name the function that takes them."""

    tau: float = 0.08
    beta: float = 0.9995
    epsilon: Any = "auto"
    t0: float = math.inf
    steps: int = 400
    batch_size: int = 32
    gradient_accumulation: int = 1
    token_budget: int | None = None  # tokens that go through the model at once; None: a step's rows as they come
    seed: int = 0
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    preference_model: PreferenceModelConfig = field(default_factory=PreferenceModelConfig)
    onpolicy: OnPolicyConfig = field(default_factory=OnPolicyConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    log_every: int = 5
    checkpoint_every: int = 100
    cache: str | None = None
    run: RunConfig = field(default_factory=RunConfig)
    dataset: dict[str, Any] = field(default_factory=dict)
    model: ModelConfig = field(default_factory=ModelConfig)
    objectives: dict[str, ObjectiveConfig] = field(default_factory=dict)
    algorithm: dict[str, Any] = field(default_factory=dict)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)


@dataclass
class PlanSettings:
    """What `mopo plan` predicts from."""

    prompts: int = 300
    responses: int = 64
    thresholds: int = 15


@dataclass
class PlanConfig(TrainConfig):
    """What `mopo plan` runs on: everything of `mopo train`, and how much to sample."""

    plan: PlanSettings = field(default_factory=PlanSettings)


@dataclass
class DataConfig:
    """What `mopo data` runs on."""

    dataset: dict[str, Any] = field(default_factory=dict)
    objectives: dict[str, ObjectiveConfig] = field(default_factory=dict)
    json: str | None = None  # a file for the numbers
    seed: int = 0
    debug: bool = False


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
    permutations: int = 10000
    dataset: dict[str, Any] = field(default_factory=dict)
    objectives: dict[str, ObjectiveConfig] = field(default_factory=dict)
    model: ModelConfig = field(default_factory=ModelConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    seed: int = 0
    debug: bool = False


@dataclass
class ExportConfig:
    """What `mopo export` runs on."""

    run: str | None = None
    to: str | None = None
    merge: bool = False
    overwrite: bool = False
    debug: bool = False


@dataclass
class SampleConfig:
    """What `mopo sample` runs on."""

    run: str | None = None
    prompt: str | None = None
    prompts: str | None = None
    direction: str | None = None
    n: int = 1
    chat: bool | None = None
    compare: int = 8
    model: ModelConfig = field(default_factory=ModelConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    seed: int = 0
    debug: bool = False


@dataclass
class ReportConfig:
    """What `mopo report` runs on: a run, a sweep, or any runs; the newest where all are null."""

    run: str | None = None
    sweep: str | None = None
    runs: list[str] | None = None  # directories, or patterns of them
    out: str | None = None  # where a comparison of runs goes
    samples: int = 20  # prompts shown side by side
    bootstrap: int = 500
    figures: bool = True  # PNG and SVG of each figure, too
    seed: int = 0
    debug: bool = False


@dataclass
class RecipeConfig:
    """One way to run the method."""

    extraction: str = "regression"
    multipliers: str = "lagrangian"
    estimator: str = "onpolicy"


@dataclass
class SyntheticConfig:
    """What `mopo synthetic` runs on: every structure and K by every combination of the lists."""

    structures: dict[str, Any] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=lambda: [2, 3])
    tau: float = 0.08
    betas: list[float] = field(default_factory=list)
    t0: int = 25
    thresholds: list[float] | None = None
    preferences: list[str] = field(default_factory=list)
    pairs: int = 20000
    recipes: list[RecipeConfig] = field(default_factory=list)
    sigma: float = 0.002
    dual_rate: float = 0.5
    steps: int = 200
    every: int = 20
    learning_rate: float = 0.1
    seed: int = 0
    processes: int | None = None
    run: RunConfig = field(default_factory=RunConfig)
    debug: bool = False


@dataclass
class SweepConfig:
    """What `mopo sweep` adds to a train config."""

    name: str = ""
    dir: str = ""
    retry: str = "failed"  # or "none": what failed stays; or "all": every point again, from its beginning
    zip: list[str] = field(default_factory=list)  # keys whose values go together instead of being multiplied
    dry_run: bool = False
    grid: Any = None  # of an experiment: key -> values, or a list of such mappings
