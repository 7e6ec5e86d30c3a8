"""What every method's training shares: what it is given, what it leaves, the loop with its log and its checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mopo_cli.base.console import say, warn
from mopo_cli.base.console import stage as shown_stage
from mopo_cli.base.files import read_json, whole, write_json
from mopo_cli.base.processes import deferred_interrupts, gathered
from mopo_cli.config.schema import OptimiserConfig
from mopo_cli.data.batches import batch_rows
from mopo_cli.training import keys
from mopo_cli.training.cache import kept
from mopo_cli.training.checkpoints import Setting, Stage, Work, restored, save_checkpoint
from mopo_cli.training.loop import Progressed, Task, Trainer, anyone


def run_stage(setting: Setting, stage: Stage, title: str, first: int = 0) -> None:
    """All steps of a stage, from its last checkpoint where the run goes on; its first step is the run's step `first`.

    Each checkpoint is written whole. SIGINT or SIGTERM ends the run after the step that is going on, with a checkpoint;
    the second one at once.
    """
    config, tracker = setting.config, setting.tracker
    steps = stage.trainer.steps
    start = restored(setting, stage, first)
    tracker.rewind(first + start)
    stage.prepare(start)
    with shown_stage(title, steps, start) as progress, deferred_interrupts() as interrupted:

        def after_step(progressed: Progressed) -> bool:
            stage.after_step(progressed)
            step, last = progressed.step, progressed.step == steps or stage.ended
            if step % config.log_every == 0 or last:
                tracker.log(first + step, **stage.metrics(progressed), skipped=int(stage.trainer.skipped))
                progress.advance(step, loss=float(progressed.loss), **stage.shown())
            stop = anyone(setting.accelerator, interrupted())
            if (step % config.checkpoint_every == 0 or stop) and not last and stage.trainer.sound:
                save_checkpoint(setting, stage, first, step)
            if stop:
                raise KeyboardInterrupt
            if first + step == config.debug.fail_at_step:
                raise RuntimeError(f"debug.fail_at_step={first + step}: this run was asked to fail here")
            return last

        stage.trainer.fit(stage.task(), stage.before_step, after_step, start)
    if skipped := int(stage.trainer.skipped):
        warn(f"{title}: {skipped} of {steps} steps changed nothing, since their loss or gradient was not finite")


# --------------------------------------------------------------------------------------------- a stage without state
class Notes:
    """What the loss of a step notes on the way, of all its micro-batches and processes; read at logging steps only."""

    def __init__(self) -> None:
        self._parts: list[Callable[[], dict[str, Tensor]]] = []

    def begin(self) -> None:
        """Of a new step."""
        self._parts.clear()

    def add(self, part: Callable[[], dict[str, Tensor]]) -> None:
        """Of a micro-batch: what gives (n,) values of each name, where somebody reads them."""
        self._parts.append(part)

    def means(self) -> dict[str, float]:
        """The mean of all values of each name; every process must ask."""
        own = [{name: values.cpu() for name, values in part().items()} for part in self._parts]
        values: dict[str, list[Tensor]] = {}
        for part in chain.from_iterable(gathered(own)):
            for name, some in part.items():
                values.setdefault(name, []).append(some)
        return {name: float(torch.cat(some).mean()) for name, some in values.items()}


class Descent:
    """Steps whose rows and losses depend on (seed, step) alone, so that model and optimiser are all there is to keep.

    `pairs_of` counts the comparisons of a step's rows, for the record. `notes` is where the loss notes what is worth a
    line of metrics.jsonl.
    """

    ended = False

    def __init__(
        self,
        trainer: Trainer,
        task: Task,
        work: Work,
        pairs_of: Callable[[list[int]], int],
        notes: Notes,
    ):
        self.trainer, self.work, self.pairs_of, self.notes = trainer, work, pairs_of, notes
        self._task = task
        self._started, self._pairs, self._tokens = time.perf_counter(), work.pairs, work.tokens

    def prepare(self, start: int) -> None:
        pass

    def task(self) -> Task:
        return self._task

    def before_step(self, step: int) -> None:
        self.notes.begin()

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
            **self.notes.means(),
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
    notes: Notes | None = None,
    first: int = 0,
) -> nn.Module:
    """`steps` updates of setting.inputs.policy on a task; what they cost is added to `work`. Returns the policy.

    The run's count of steps goes on from `first`. See `Descent` for pairs_of and notes.
    """
    config = setting.config
    trainer = Trainer(
        setting.accelerator,
        setting.inputs.policy.model,
        optimiser or config.optimiser,
        steps,
        config.gradient_accumulation,
        config.token_budget,
    )
    run_stage(setting, Descent(trainer, task, work, pairs_of, notes or Notes()), title, first)
    setting.accelerator.free_memory()
    return trainer.model


def kept_policy(
    setting: Setting, name: str, about: Sequence[object], work: Work, fit: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Leaves in setting.inputs.policy what `fit` makes of the policy as it is; returns what `fit` learnt on the way.

    The result is kept in the run's stages/NAME, and in the cache for every run with the same policy, preference model,
    data and settings: `about` names all settings that `fit` depends on besides. `fit` adds what it costs to `work`.
    What it returns must be JSON.
    """
    config, policy, accelerator = setting.config, setting.inputs.policy, setting.accelerator
    own = setting.run.path / "stages" / name
    before = Work(work.steps, samples=work.samples)
    reused = False

    def key() -> str:
        return keys.policy_key(config, setting.inputs, setting.judge, name, about)

    def fitted() -> dict[str, Any]:
        result = fit()
        policy.check_finite(setting.inputs.tokens["heldout"], name, "optimiser.learning_rate")
        return result

    def save(result: dict[str, Any], path: Path) -> None:
        with whole(path) as place:
            policy.save(place / "model")
            cost = {"steps": work.steps - before.steps, "samples": work.samples - before.samples}
            write_json(place / "stage.json", {**cost, "found": result})

    def load(path: Path) -> dict[str, Any]:
        nonlocal reused
        policy.load_weights(path / "model")
        record = read_json(path / "stage.json")
        work.steps, work.samples = work.steps + record["steps"], work.samples + record["samples"]
        reused = path != own or (own / "reused").exists()
        if reused:
            work.reused_steps += record["steps"]
            work.reused_samples += record["samples"]
            say(f"{name}: from {path}")
        return record["found"]

    own.parent.mkdir(parents=True, exist_ok=True)
    result = kept(accelerator, config.cache, key, fitted, save, load, own)
    if reused and accelerator.is_main_process:
        (own / "reused").touch()  # a run that goes on from here has not paid for it either
    return result


def rows_a_step(setting: Setting) -> int:
    """config.batch_size rows a process and accumulation."""
    config = setting.config
    return config.batch_size * config.gradient_accumulation * setting.accelerator.num_processes


def step_rows(setting: Setting, size: int, batch: int | None = None) -> Callable[[int], list[int]]:
    """Which of `size` rows each step trains on, by the seed: `batch` of them, or as many as a step has."""
    batch = rows_a_step(setting) if batch is None else batch
    return lambda step: batch_rows(size, batch, setting.config.seed, step)


def mix(*numbers: int) -> int:
    """One seed from several numbers, the same everywhere."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
