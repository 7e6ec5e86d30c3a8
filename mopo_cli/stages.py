"""What every method's training shares: what it is given, what it leaves, the loop with its log and its checkpoints."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from accelerate import Accelerator
from torch import Tensor, nn

from mopo_cli import cache
from mopo_cli.config import OptimiserConfig, TrainConfig
from mopo_cli.console import say
from mopo_cli.console import stage as shown_stage
from mopo_cli.data.tokens import batch_rows
from mopo_cli.models.preference import PreferenceModel
from mopo_cli.models.reference import Snapshot
from mopo_cli.models.save import load_weights, save_model
from mopo_cli.runs import RunDirectory, read_json, whole, write_json
from mopo_cli.tracking import Tracker
from mopo_cli.trainer import Progressed, Task, Trainer

if TYPE_CHECKING:
    from mopo_cli.directions import Directions, Levels
    from mopo_cli.inputs import Inputs


@dataclass(frozen=True, slots=True)
class Setting:
    """What a method works on: inputs.policy is the reference when it begins, and the aligned policy when it ends."""

    config: TrainConfig
    accelerator: Accelerator
    inputs: Inputs
    judge: PreferenceModel
    initial: Snapshot
    run: RunDirectory
    tracker: Tracker


@dataclass
class Timing:
    """Seconds of a method's training, and those of them spent on estimates of R_j and on responses of the policy."""

    started: float = field(default_factory=time.perf_counter)
    estimate: float = 0.0
    fresh: float = 0.0
    seconds: float | None = None  # of all of it, once it has ended


@dataclass
class Work:
    """What training cost: updates, pairs and tokens that went through the model, responses drawn, and time.

    Steps and samples are all that the policy has cost; those of them that another run has paid for are `reused_...`.
    """

    steps: int = 0
    pairs: int = 0
    tokens: int = 0
    samples: int = 0
    reused_steps: int = 0
    reused_samples: int = 0
    timing: Timing = field(default_factory=Timing)


COUNTED = ("steps", "samples", "reused_steps", "reused_samples")  # in all; the rest, since the run was last resumed


@dataclass
class Aligned:
    """What a method leaves besides the policy. What only a constrained method knows is empty for the others."""

    work: Work
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


class Method(Protocol):
    """What an algorithm's config names by _target_.

    It is built with its own keys of the config and with those of names, thresholds, tau, beta, epsilon, t0,
    unscored and preference_form that its constructor takes (inputs.build_method); it raises UserError where a setting
    is wrong. It may have check(inputs), which raises UserError where data or model do not suit it, before anything is
    fitted.
    """

    longest_condition: str  # that its policy is ever asked with, "" where prompts stay as they are

    def align(self, setting: Setting) -> Aligned:
        """Train setting.inputs.policy."""
        ...


class Stage(Protocol):
    """One trainer's run through its steps."""

    @property
    def trainer(self) -> Trainer: ...

    @property
    def work(self) -> Work: ...

    @property
    def ended(self) -> bool:
        """Whether to stop before the last step."""
        ...

    def prepare(self, start: int) -> None:
        """Called once, before the first step that is run."""
        ...

    def task(self) -> Task: ...

    def before_step(self, step: int) -> None: ...

    def after_step(self, progressed: Progressed) -> None: ...

    def metrics(self, progressed: Progressed) -> dict[str, Any]:
        """One line of metrics.jsonl."""
        ...

    def shown(self) -> dict[str, float]:
        """What the console shows beside the loss."""
        ...

    def save(self, directory: Path) -> None:
        """What the stage needs to go on besides model and optimiser."""
        ...

    def restore(self, directory: Path) -> None: ...


def run_stage(setting: Setting, stage: Stage, title: str, first: int = 0) -> None:
    """All steps of a stage, from its last checkpoint where the run goes on; its first step is the run's step `first`.

    Each checkpoint is written whole and takes the place of the one before.
    """
    config, tracker = setting.config, setting.tracker
    steps = stage.trainer.steps
    start = _restored(setting, stage, first)
    tracker.rewind(first + start)
    stage.prepare(start)
    with shown_stage(title, steps, start) as progress:

        def after_step(progressed: Progressed) -> bool:
            stage.after_step(progressed)
            step, last = progressed.step, progressed.step == steps or stage.ended
            if step % config.log_every == 0 or last:
                tracker.log(first + step, **stage.metrics(progressed))
                progress.advance(step, loss=float(progressed.loss), **stage.shown())
            if step % config.checkpoint_every == 0 and not last:
                _save(setting, stage, first, step)
            if first + step == config.debug.fail_at_step:
                raise RuntimeError(f"debug.fail_at_step={first + step}: this run was asked to fail here")
            return last

        stage.trainer.fit(stage.task(), stage.before_step, after_step, start)


# --------------------------------------------------------------------------------------------- checkpoints


def latest_checkpoint(directory: Path) -> Path | None:
    found = sorted(directory.glob("step-*"), key=_number)
    return found[-1] if found else None


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def reached(setting: Setting) -> int:
    """The step of the checkpoint that the run goes on from; 0 where there is none."""
    found = latest_checkpoint(setting.run.checkpoints) if setting.config.run.resume else None
    return _number(found) if found else 0


def _restored(setting: Setting, stage: Stage, first: int) -> int:
    """The steps that this stage has done, going by the run's checkpoint; 0 where that is of another stage."""
    found = latest_checkpoint(setting.run.checkpoints) if setting.config.run.resume else None
    if found is None or not first < _number(found) <= first + stage.trainer.steps:
        return 0
    setting.accelerator.load_state(str(found))
    stage.restore(found)
    for name, count in read_json(found / "work.json").items():
        setattr(stage.work, name, count)
    return _number(found) - first


def _save(setting: Setting, stage: Stage, first: int, step: int) -> None:
    """Everything needed to go on exactly, written beside and renamed, so a checkpoint is whole or absent."""
    accelerator, directory = setting.accelerator, setting.run.checkpoints
    temporary = directory / f".step-{first + step}.tmp"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary), safe_serialization=False)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        stage.save(temporary)
        write_json(temporary / "work.json", {name: getattr(stage.work, name) for name in COUNTED})
        final = directory / f"step-{first + step}"
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        for old in directory.glob("step-*"):
            if old != final:
                shutil.rmtree(old)
        setting.run.set_state("running", step=first + step)


# --------------------------------------------------------------------------------------------- a stage without state


class Descent:
    """Steps whose rows and losses depend on (seed, step) alone, so that model and optimiser are all there is to keep.

    `pairs_of` counts the comparisons of a step's rows, for the record. `notes` gives what the loss has noted of the
    last batch: tensors, which are read at logging steps only.
    """

    ended = False

    def __init__(
        self,
        trainer: Trainer,
        task: Task,
        work: Work,
        pairs_of: Callable[[list[int]], int],
        notes: Callable[[], dict[str, Tensor]],
    ):
        self.trainer, self.work, self.pairs_of, self.notes = trainer, work, pairs_of, notes
        self._task = task
        self._started, self._pairs, self._tokens = time.perf_counter(), work.pairs, work.tokens

    def prepare(self, start: int) -> None:
        pass

    def task(self) -> Task:
        return self._task

    def before_step(self, step: int) -> None:
        pass

    def after_step(self, progressed: Progressed) -> None:
        rows = self._task.rows_of(progressed.step - 1)
        self.work.steps += 1
        self.work.pairs += self.pairs_of(rows)
        self.work.tokens += sum(map(self._task.length_of, rows)) if self._task.length_of else 0

    def metrics(self, progressed: Progressed) -> dict[str, Any]:
        seconds = time.perf_counter() - self._started
        return {
            "loss": float(progressed.loss),
            "learning_rate": progressed.learning_rate,
            "pairs_per_second": (self.work.pairs - self._pairs) / seconds,
            "tokens_per_second": (self.work.tokens - self._tokens) / seconds,
            **{name: float(value) for name, value in self.notes().items()},
        }

    def shown(self) -> dict[str, float]:
        return {}

    def save(self, directory: Path) -> None:
        pass

    def restore(self, directory: Path) -> None:
        pass


def descend(
    setting: Setting,
    task: Task,
    work: Work,
    *,
    title: str,
    steps: int,
    optimiser: OptimiserConfig | None = None,
    pairs_of: Callable[[list[int]], int] = len,
    notes: Callable[[], dict[str, Tensor]] = dict,
    first: int = 0,
) -> nn.Module:
    """`steps` updates of setting.inputs.policy on a task; what they cost is added to `work`. Returns the policy.

    The run's count of steps goes on from `first`. See `Descent` for pairs_of and notes.
    """
    config = setting.config
    trainer = Trainer(
        setting.accelerator,
        setting.inputs.policy,
        optimiser or config.optimiser,
        steps,
        config.gradient_accumulation,
        config.token_budget,
    )
    run_stage(setting, Descent(trainer, task, work, pairs_of, notes), title, first)
    setting.accelerator.free_memory()
    return trainer.model


def kept_policy(
    setting: Setting, name: str, about: Sequence[object], work: Work, fit: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Leaves in setting.inputs.policy what `fit` makes of the policy as it is; returns what `fit` found on the way.

    The result is kept in the run's stages/NAME, and in the cache for every run with the same policy, preference model,
    data and settings: `about` names all settings that `fit` depends on besides. `fit` adds what it costs to `work`.
    Its findings must be JSON.
    """
    config, inputs, accelerator = setting.config, setting.inputs, setting.accelerator
    own = setting.run.path / "stages" / name
    before = Work(work.steps, samples=work.samples)
    found: dict[str, Any] = {}

    def key() -> str:
        return cache.policy_key(config, inputs, setting.judge, name, about)

    def do() -> None:
        found.update(fit())

    def save(path: Path) -> None:
        with whole(path) as place:
            save_model(inputs.policy, inputs.tokenizer, place / "model")
            cost = {"steps": work.steps - before.steps, "samples": work.samples - before.samples}
            write_json(place / "stage.json", {**cost, "found": found})

    def load(path: Path) -> None:
        nonlocal reused
        load_weights(inputs.policy, path / "model")
        record = read_json(path / "stage.json")
        found.update(record["found"])
        work.steps, work.samples = work.steps + record["steps"], work.samples + record["samples"]
        reused = path != own or (own / "reused").exists()
        if reused:
            work.reused_steps += record["steps"]
            work.reused_samples += record["samples"]
            say(f"{name}: from {path}")

    reused = False
    own.parent.mkdir(parents=True, exist_ok=True)
    cache.fitted(accelerator, config.cache, key, own, do, save, load)
    if reused and accelerator.is_main_process:
        (own / "reused").touch()  # a run that goes on from here has not paid for it either
    return found


def rows_a_step(setting: Setting) -> int:
    """config.batch_size rows a process and accumulation."""
    config = setting.config
    return config.batch_size * config.gradient_accumulation * setting.accelerator.num_processes


def step_rows(setting: Setting, size: int, batch: int | None = None) -> Callable[[int], list[int]]:
    """Which of `size` rows each step trains on, by the seed: `batch` of them, or as many as a step has."""
    batch = rows_a_step(setting) if batch is None else batch
    return lambda step: batch_rows(size, batch, setting.config.seed, step)


def finished(work: Work) -> Work:
    """The work with its clock stopped."""
    work.timing.seconds = time.perf_counter() - work.timing.started
    return work


def mix(*numbers: int) -> int:
    """One seed from several numbers, the same everywhere."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
