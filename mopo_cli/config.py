"""From the command line to a typed config: Hydra composes conf/, the schema below checks it.

Every mistake that a user can make here becomes one UserError that names the key, what was found and what is allowed.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mopo_cli.errors import UserError

GROUPS = ("dataset", "model", "objectives", "scorers", "algorithm", "hparams", "logger", "structures", "experiment")
GROUPS += ("sweeper", "launcher")


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


def config_dir() -> Path:
    """conf/: inside the package in a wheel, beside it in a checkout."""
    packaged = Path(__file__).parent / "conf"
    return packaged if packaged.is_dir() else Path(__file__).parents[1] / "conf"


def compose(command: str, overrides: list[str], user_config_dir: str | None = None) -> DictConfig:
    """The composed config of a command (conf/<command>.yaml), or a UserError about the override at fault."""
    if user_config_dir is not None:
        if not Path(user_config_dir).is_dir():
            raise UserError(f"--config-dir {user_config_dir}: no such directory")
        overrides = [*overrides, f"hydra.searchpath=[file://{Path(user_config_dir).resolve()}]"]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir().resolve()), version_base="1.3"):
        try:
            config = hydra_compose(command, overrides)
            OmegaConf.resolve(config)
            return config
        except OverrideParseException as error:
            reason = _one_line(error).partition(" See https://")[0]
            raise UserError(f"cannot read the override {error.override!r}: expected key=value ({reason})") from error
        except MissingConfigException as error:
            raise UserError(_missing_option(error)) from error
        except ConfigCompositionException as error:
            raise UserError(_unknown_key(command, overrides, error)) from error
        except (HydraException, OmegaConfBaseException, ValueError) as error:  # dataset=null is a ValueError
            raise UserError(_one_line(error)) from error


def in_grammar(text: str) -> str:
    """A string as the value of an override: as it is, or quoted where Hydra would read it otherwise."""
    if re.fullmatch(r"[\w./-]+", text):
        return text
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def check_experiment(command: str, overrides: Sequence[str], user_config_dir: str | None = None) -> None:
    """UserError where the preset that is asked for (experiment=NAME) belongs to another command."""
    for override in overrides:
        key, _, name = override.lstrip("+").partition("=")
        for directory in (Path(user_config_dir or config_dir()), config_dir()):
            path = directory / "experiment" / f"{name}.yaml"
            if key == "experiment" and path.is_file():
                wanted = OmegaConf.select(OmegaConf.load(path), "experiment.command", default=command)
                if wanted != command:
                    raise UserError(f"experiment={name}: this preset is for `mopo {wanted}`, not for `mopo {command}`")


def _one_line(error: BaseException) -> str:
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())


def group_options(group: str) -> list[str]:
    return sorted(path.stem if path.suffix == ".yaml" else path.name for path in (config_dir() / group).glob("*.yaml"))


def command_groups(command: str) -> list[str]:
    """The groups that a command's defaults choose from, in the order of GROUPS."""
    defaults = OmegaConf.to_container(OmegaConf.load(config_dir() / f"{command}.yaml"))
    assert isinstance(defaults, dict)
    chosen = [entry if isinstance(entry, str) else next(iter(entry)) for entry in defaults.get("defaults", [])]
    inherited = [
        group for name in chosen if (config_dir() / f"{name}.yaml").is_file() for group in command_groups(name)
    ]
    return [group for group in GROUPS if group in (*chosen, *inherited)]


def _missing_option(error: MissingConfigException) -> str:
    name = str(error.missing_cfg_file or "")
    group, _, option = name.rpartition("/")
    if group not in GROUPS:
        return _one_line(error)
    options = group_options(group)
    return f"{group}={option}: no such option{_did_you_mean(option, options)}. Allowed: {', '.join(options)}"


def _did_you_mean(word: str, words: list[str]) -> str:
    close = difflib.get_close_matches(word, words, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _unknown_key(command: str, overrides: list[str], error: ConfigCompositionException) -> str:
    text = _one_line(error) + (" " + _one_line(error.__cause__) if error.__cause__ else "")
    found = re.search(r"(?:Could not override|Could not delete from config\.) '([^']+)'", text)
    if not found:
        return text
    # The keys of the groups that the user chose: dataset=pairs has others than the default.
    keys = _keys(hydra_compose(command, [override for override in overrides if _chooses_group(override)]))
    key = found.group(1)
    parent = _deepest_parent(key, keys)
    siblings = ", ".join(_children(parent, keys))
    close = _closest_key(key, parent, keys)
    hint = f" (did you mean {close}?)" if close else ""
    return f"{key}: no such key{hint}. Allowed{f' in {parent}' if parent else ''}: {siblings}"


def _chooses_group(override: str) -> bool:
    name, equals, value = override.partition("=")
    group = name.lstrip("+").partition("@")[0]
    return bool(equals and value) and (group == "hydra.searchpath" or (group != "" and (config_dir() / group).is_dir()))


def _deepest_parent(key: str, keys: list[str]) -> str:
    """The longest part of `key` that is a mapping of the config; "" for the top level."""
    parent = key.rpartition(".")[0]
    while parent and not _children(parent, keys):
        parent = parent.rpartition(".")[0]
    return parent


def _children(parent: str, keys: list[str]) -> list[str]:
    return [name for above, _, name in (key.rpartition(".") for key in keys) if above == parent]


def _closest_key(key: str, parent: str, keys: list[str]) -> str | None:
    """The key that was meant: one letter off in the part that is unknown, in another place, or alike as a whole."""
    unknown, *rest = key[len(parent) + bool(parent) :].split(".")
    near = difflib.get_close_matches(unknown, _children(parent, keys), n=1)
    repaired = ".".join([*([parent] if parent else []), *near, *rest])
    if near and repaired in keys:
        return repaired
    elsewhere = [other for other in keys if other.rpartition(".")[2] == key.rpartition(".")[2]]
    close = difflib.get_close_matches(key, elsewhere, n=1, cutoff=0.0) or difflib.get_close_matches(key, keys, n=1)
    return close[0] if close else None


def _keys(config: DictConfig, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in config.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, DictConfig):
            keys += _keys(value, f"{prefix}{key}.")
    return keys


def typed(config: DictConfig, schema: type) -> Any:
    """The config as a record of `schema`; a wrong type or an unknown key is a UserError that names it."""
    try:
        fields = schema.__dataclass_fields__
        unknown = [str(key) for key in config if key not in fields and key not in ("sweep", "experiment")]
        if unknown:
            raise UserError(
                f"{unknown[0]}: no such key{_did_you_mean(unknown[0], list(fields))}. Allowed: {', '.join(fields)}"
            )
        known = {key: config[key] for key in config if key in fields}
        if isinstance(known.get("debug"), bool) and schema.__dataclass_fields__["debug"].type != "bool":
            known["debug"] = {"traceback": known["debug"]}
        empty = OmegaConf.structured(schema)
        for key, value in known.items():
            if OmegaConf.is_dict(empty[key]) and not isinstance(value, dict | DictConfig):
                inside = f" ({', '.join(map(str, empty[key]))})" if empty[key] else ""
                raise UserError(f"{key}: {value} is no group of keys{inside}")
        return OmegaConf.to_object(OmegaConf.merge(empty, known))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "config"
        raise UserError(f"{key}: {str(error).splitlines()[0]}") from error


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


def algorithm_name(config: TrainConfig) -> str:
    """What reports call the method."""
    return option_name(config.algorithm)


def option_name(group: Mapping[str, Any]) -> str:
    """The option that a group's config is: its name, else what _target_ names, as configs of old have none."""
    return str(group.get("name") or str(group.get("_target_") or "").rpartition(".")[2].lower())


def to_yaml(config: Any) -> str:
    """YAML of a composed or typed config."""
    if not isinstance(config, DictConfig | ListConfig):
        config = OmegaConf.structured(config)
    return OmegaConf.to_yaml(config)
