"""Several processes on one run (`accelerate launch -m mopo_cli train ...`): all train, one speaks and writes."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from mopo_cli.base.errors import RunLostError, UserError

if TYPE_CHECKING:
    from accelerate import Accelerator


T = TypeVar("T")
SAME = 1.0  # seconds within which signals are one: of Ctrl-C a terminal and a launcher may both send word

TOKENIZERS = "TOKENIZERS_PARALLELISM"
ONE_THREAD = "n"  # our default for it; "false" and others are the user's own, which stays as it is


def is_main() -> bool:
    """Whether this process speaks and writes; known before anything heavy is imported."""
    return os.environ.get("RANK", "0") == "0"


def alone() -> bool:
    return os.environ.get("WORLD_SIZE", "1") == "1"


def interrupt(signum: int, frame: object) -> None:
    """A signal handler: what SIGTERM does is what Ctrl-C does."""
    raise KeyboardInterrupt


@contextmanager
def deferred_interrupts() -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM are noted, for whoever asks whether one came. A second one ends this process at once, as
    Ctrl-C does, and a third as the system does. One that nobody asked for acts in the end."""
    first: float | None = None  # when the first came

    def note(signum: int, frame: object) -> None:
        nonlocal first
        if first is None:
            first = time.monotonic()
            if is_main():
                os.write(2, b"stopping at the end of this step, with a checkpoint; once more: at once\n")
        elif time.monotonic() - first >= SAME:
            for number in before:
                signal.signal(number, signal.SIG_DFL)
            raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        before = {number: handler for number, handler in handlers.items() if handler not in (None, signal.SIG_IGN)}
    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: first is not None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if first is not None:
        raise KeyboardInterrupt


def build_accelerator() -> Accelerator:
    """Data parallelism or one device; UserError where the launcher asks for more. Numbers stay in model.dtype."""
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else Accelerate takes no notice of torchrun's other processes
        mixed_precision="no",
        gradient_accumulation_steps=1,
        step_scheduler_with_optimizer=False,
    )
    found = accelerator.distributed_type.value
    if found != "NO" and not found.startswith("MULTI_"):
        raise UserError(f"accelerate launch: {found} is not supported; plain data parallelism (--multi_gpu) is")
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise UserError(
            f"WORLD_SIZE={started}: the launcher started so many processes, and Accelerate sees "
            f"{accelerator.num_processes}, so each would train alone. Set ACCELERATE_USE_CPU=true to train on the CPUs "
            "together, or start one process"
        )
    return accelerator


def gathered(value: T) -> list[T]:
    """What each process has; all must ask. Values that can be pickled, of processes that this run started together."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    values: list[T | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def agree(accelerator: Accelerator, decide: Callable[[], T]) -> T:
    """What the main process decides; where that is a UserError or a RunLostError, it is one in every process."""
    from accelerate.utils import broadcast_object_list

    answer: list[T | UserError | RunLostError | None] = [None]
    if accelerator.is_main_process:
        try:
            answer[0] = decide()
        except (UserError, RunLostError) as error:
            answer[0] = error
    if accelerator.num_processes > 1:
        broadcast_object_list(answer)
    if isinstance(answer[0], UserError | RunLostError):
        raise answer[0]
    return answer[0]  # type: ignore[return-value]


def part_ways() -> None:
    """Called by every process after the last thing that they do together: a group that is left open aborts at exit."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
