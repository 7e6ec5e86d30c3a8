"""A stage's state: what it is given, what it costs, and its checkpoints."""

from __future__ import annotations

import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator

from mopo_cli.base.console import warn
from mopo_cli.base.errors import UserError
from mopo_cli.base.files import CHECKSUMS, damage, read_record, seal, write_json
from mopo_cli.base.processes import agree
from mopo_cli.base.text import first_line
from mopo_cli.config.schema import TrainConfig
from mopo_cli.models.policy import Snapshot
from mopo_cli.models.preference import PreferenceModel
from mopo_cli.runs.directory import RunDirectory
from mopo_cli.runs.tracking import Tracker
from mopo_cli.training.inputs import Inputs
from mopo_cli.training.loop import Progressed, Task, Trainer


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


KEPT = 2  # checkpoints: where the newest is damaged, there is one before
COUNTED = ("steps", "samples", "reused_steps", "reused_samples")  # in all; the rest, since the run was last resumed


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


# --------------------------------------------------------------------------------------------- checkpoints
def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in a directory, from the first step to the last; what has another name is none."""
    named = [(re.fullmatch(r"step-(\d+)", path.name), path) for path in directory.glob("step-*") if path.is_dir()]
    return [path for _, path in sorted((int(match[1]), path) for match, path in named if match)]


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def discard_damaged(accelerator: Accelerator, directory: Path) -> None:
    """Throws away the newest checkpoints that are not what was written, with a warning: a run goes on from the one
    before, or from the start of its stage. Those without checksums are of version 0.1."""

    def discard() -> None:
        for checkpoint in reversed(checkpoints(directory)):
            if not (checkpoint / CHECKSUMS).exists() or (reason := damage(checkpoint)) is None:
                return
            warn(f"{checkpoint}: {reason}; it is thrown away, and the run goes on from before")
            shutil.rmtree(checkpoint)

    agree(accelerator, discard)


def _latest(setting: Setting) -> Path | None:
    """What the run goes on from; None where it does not, or has none."""
    found = checkpoints(setting.run.checkpoints) if setting.config.run.resume else []
    return found[-1] if found else None


def reached(setting: Setting) -> int:
    """The step of the checkpoint that the run goes on from; 0 where there is none."""
    found = _latest(setting)
    return _number(found) if found else 0


def restored(setting: Setting, stage: Stage, first: int) -> int:
    """The steps that this stage has done, going by the run's checkpoint; 0 where that is of another stage.

    UserError where the checkpoint cannot be read.
    """
    found = _latest(setting)
    if found is None or not first < _number(found) <= first + stage.trainer.steps:
        return 0
    try:
        setting.accelerator.load_state(str(found))
        stage.restore(found)
        counts = {name: int(count) for name, count in read_record(found / "work.json").items()}
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of torch, accelerate or json: whole by its checksums, or without any
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{found}: cannot be read ({reason}); remove it, to go on from before") from error
    stage.trainer.skipped.fill_(counts.pop("skipped", 0))
    for name, count in counts.items():
        setattr(stage.work, name, count)
    return _number(found) - first


def save_checkpoint(setting: Setting, stage: Stage, first: int, step: int) -> None:
    """Everything needed to go on exactly, written beside and renamed, so a checkpoint is whole or absent.

    Raises NotFiniteError where weights are not finite, RunLostError where the run's directory is gone. What was written
    of one that fails, on a full disk say, is removed.
    """
    stage.trainer.check_weights()
    agree(setting.accelerator, setting.run.check_there)
    temporary = setting.run.checkpoints / f".step-{first + step}.tmp"
    try:
        _write_checkpoint(setting, stage, first + step, temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_checkpoint(setting: Setting, stage: Stage, step: int, temporary: Path) -> None:
    accelerator, directory = setting.accelerator, setting.run.checkpoints
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary), safe_serialization=False)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        stage.save(temporary)
        counts = {name: getattr(stage.work, name) for name in COUNTED}
        write_json(temporary / "work.json", {**counts, "skipped": int(stage.trainer.skipped)})
        seal(temporary)
        final = directory / f"step-{step}"
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        for old in checkpoints(directory)[:-KEPT]:
            shutil.rmtree(old)
        setting.run.set_state("running", step=step)
