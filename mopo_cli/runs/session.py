"""A run from the claim of its directory to the record of how it ended, whichever way that was."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from omegaconf import DictConfig, OmegaConf

from mopo_cli.base import invocation
from mopo_cli.base.console import say
from mopo_cli.base.errors import AcceleratorMemoryError, UserError
from mopo_cli.base.files import read_json, write_atomic, write_json
from mopo_cli.base.processes import ONE_THREAD, TOKENIZERS, agree, interrupt
from mopo_cli.base.secrets import masked, masked_command
from mopo_cli.base.types import PreferenceData
from mopo_cli.config import compose
from mopo_cli.config.overrides import in_grammar
from mopo_cli.config.schema import TrainConfig
from mopo_cli.runs.directory import RunDirectory, check_same_settings, claim, open_run
from mopo_cli.runs.tracking import Tracker

os.environ.setdefault(TOKENIZERS, ONE_THREAD)  # before transformers is imported


def quiet_libraries() -> None:
    """Their progress bars and notices would bury ours; errors still come through."""
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("datasets", "accelerate", "huggingface_hub", "wandb"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:  # nobody has asked for them
        warnings.filterwarnings("ignore", category=UserWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
    if hasattr(signal, "SIGTERM"):
        signal.signal(signal.SIGTERM, interrupt)


def settings_of(composed: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(composed, resolve=True)  # type: ignore[return-value]


def claim_run(accelerator: Accelerator, composed: DictConfig) -> RunDirectory:
    """The run directory that `composed` asks for; UserError where the run may not have it. Writes nothing.

    A run that goes on keeps the name that it was started with.
    """

    def decide() -> tuple[RunDirectory, str]:
        run = claim(composed.run.dir, composed.run.resume)
        if not composed.run.resume:
            return run, composed.run.name
        check_same_settings(run, settings_of(composed))
        return run, run.settings()["run"]["name"]

    run, composed.run.name = agree(accelerator, decide)
    return run


@contextmanager
def recorded(
    accelerator: Accelerator, config: TrainConfig, composed: DictConfig, run: RunDirectory, data: PreferenceData
) -> Iterator[Tracker]:
    """Holds the run directory, yields its tracker, and writes to status.json how the run ended where it broke off."""
    main = accelerator.is_main_process
    lock = _open(run, composed, data) if main else None
    accelerator.wait_for_everyone()
    tracker = None
    try:
        tracker = Tracker(run, config.logger, settings_of(composed), composed.run.name, config.run.resume, main)
        yield tracker
    except (KeyboardInterrupt, SystemExit):  # a cluster's time limit ends a job by SystemExit
        if main:
            run.set_state("interrupted")
            if invocation.arguments()[:1] == ("train",):
                say(f"interrupted; go on with: {resume_command(run, invocation.arguments()[1:])}")
        raise
    except torch.OutOfMemoryError as error:  # outside of a training step, which has a message of its own
        text = (
            "the accelerator's memory ran out on a pass without gradient: lower sampling.batch_size "
            f"(now {config.sampling.batch_size}) or token_budget (now {config.token_budget or 8192})"
        )
        if main:
            run.set_state("failed", error=text)
        raise AcceleratorMemoryError(text) from error
    except BaseException as error:
        if main:
            run.set_state("failed", error=f"{type(error).__name__}: {error}")
        raise
    finally:
        if tracker is not None:
            tracker.finish(failed=True)
        if lock is not None:
            lock.close()


def _open(run: RunDirectory, composed: DictConfig, data: PreferenceData) -> ExitStack:
    lock = open_run(run)
    current = fingerprint(data)
    if composed.run.resume and run.provenance.exists() and read_json(run.provenance).get("fingerprint") != current:
        lock.close()
        raise UserError(f"run.resume=true: the data have changed since the run in run.dir={run.path} was started")
    write_atomic(run.config, compose.to_yaml(composed))
    write_json(run.provenance, {**masked(data.provenance), "fingerprint": current})
    run.set_state("running", step=None if composed.run.resume else 0)
    return lock


def fingerprint(data: PreferenceData) -> str:
    """A hash of every prompt, response and label, in order."""
    digest = hashlib.sha256()
    for part in (data.train, data.heldout, data.test):
        digest.update(f"{len(part)}\n".encode())
        for example in part:
            digest.update(repr((example.prompt, example.responses, example.pairs, example.labels)).encode())
    return digest.hexdigest()[:16]


def resume_command(run: RunDirectory, overrides: Sequence[str]) -> str:
    """The command that goes on with an interrupted run: the same settings, this directory."""
    settings = [o for o in overrides if not o.startswith(("run.dir=", "run.name=", "run.resume="))]
    place = f"run.dir={in_grammar(str(run.path))}"
    return masked_command(["mopo", "train", *settings, place, "run.resume=true"])
