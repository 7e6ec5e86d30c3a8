"""Runs of `mopo` for tests: the smallest training that goes through every stage, and ways to start and read one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHORT = (
    "hparams=smoke",
    "logger=none",
    "steps=40",
    "checkpoint_every=10",
    "sft.steps=12",
    "preference_model.steps=12",
    "preference_model.evaluate_every=6",
    "sampling.max_new_tokens=12",
    "evaluation.prompts=16",
    "evaluation.exact_prompts=8",
)
TINY = (
    *SHORT,
    "model.architecture.hidden_size=32",
    "model.architecture.intermediate_size=64",
    "model.architecture.num_hidden_layers=1",
)
SMALL = (  # the smallest that has a checkpoint or two: about a second
    "hparams=smoke", "logger=none", "steps=6", "log_every=1", "checkpoint_every=2", "sft.steps=2",
    "preference_model.steps=2", "preference_model.evaluate_every=2", "sampling.max_new_tokens=4", "dataset.rows=120",
    "onpolicy.prompts=4", "onpolicy.train_prompts=4", "evaluation.prompts=4", "evaluation.exact_prompts=1",
    "model.architecture.hidden_size=8", "model.architecture.intermediate_size=16",
    "model.architecture.num_hidden_layers=1", "model.tokenizer.vocab_size=300",
)  # fmt: skip
OF_BEFORE = (  # the settings of `runs_of_before`
    "hparams=smoke", "logger=none", "seed=3", "cache=null", "steps=10", "checkpoint_every=5", "sft.steps=4",
    "preference_model.steps=4", "preference_model.evaluate_every=4", "sampling.max_new_tokens=8",
    "evaluation.prompts=8", "evaluation.exact_prompts=4", "dataset.rows=300",
    "model.architecture.hidden_size=8", "model.architecture.intermediate_size=16",
    "model.architecture.num_hidden_layers=1", "model.tokenizer.vocab_size=300",
)  # fmt: skip
TIMEOUT = 300  # seconds; a net for a hang, not a measurement
SPEEDS = ("pairs_per_second", "tokens_per_second")


@dataclass(frozen=True)
class Finished:
    status: int
    out: str
    err: str


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without anybody's W&B account or launcher."""
    private = ("WANDB_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(private)}
    return {**kept, "NETRC": os.devnull, **changes}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "mopo_cli", *arguments]


def mopo(*arguments: str, cwd: Path, **changes: str) -> Finished:
    """`mopo ...` in a process of its own."""
    done = subprocess.run(
        command(*arguments), cwd=cwd, env=environment(**changes), capture_output=True, text=True, timeout=TIMEOUT
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def _heed_interrupts() -> None:
    """A shell's background job, which tests may be part of, is started deaf to SIGINT, and hands that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(*arguments: str, cwd: Path, **changes: str) -> subprocess.Popen[str]:
    """`mopo ...` going on in a process of its own."""
    return subprocess.Popen(
        command(*arguments),
        cwd=cwd,
        env=environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_heed_interrupts,
    )


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until `ready()`; the process must not end before."""
    while not ready():
        assert process.poll() is None, f"ended too early: {process.communicate()}"
        time.sleep(0.002)


def stop_when(
    ready: Callable[[], bool], with_signal: signal.Signals, *arguments: str, cwd: Path, **changes: str
) -> Finished:
    """`mopo ...`, sent a signal as soon as `ready()`; its status is the negative signal where that killed it."""
    process = start(*arguments, cwd=cwd, **changes)
    try:
        wait_for(ready, process)
        process.send_signal(with_signal)
        out, err = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    return Finished(process.returncode, out, err)


def runs_of_before(place: Path) -> Path:
    """Run directories that version 0.1 wrote: two that were cut off, one that has ended."""
    with tarfile.open(Path(__file__).parent / "fixtures" / "before_the_move.tar.xz") as archive:
        archive.extractall(place, filter="data")
    return place / "before_the_move"


def owner(lock: Path) -> int:
    """The id of the process that holds a lock file open."""
    wanted = str(lock.resolve())
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) == wanted:
                return int(link.parts[2])
        except OSError:  # it has closed it meanwhile
            continue
    raise AssertionError(f"nobody has {lock} open")


def read_json(path: Path) -> Any:
    """Strict JSON: NaN and Infinity are errors."""
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, strictly."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=_refuse) for line in lines]


def cache_of(smoke: Path) -> Path:
    """The cache of the session's tiny run: its reference and preference model serve every run with the same of both."""
    return smoke.parent / "outputs" / "cache"


def results(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What must be equal between two runs that are meant to be the same: summary and metrics without their times."""
    summary = read_json(run / "summary.json")
    for key in ("train", "command"):
        del summary[key]
    metrics = [{key: value for key, value in line.items() if key not in SPEEDS} for line in read_metrics(run)]
    return summary, metrics
