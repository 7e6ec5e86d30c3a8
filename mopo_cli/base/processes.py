"""Several processes on one run (`accelerate launch -m mopo_cli train ...`): all train, one speaks and writes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from mopo_cli.base.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator


T = TypeVar("T")

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


def build_accelerator() -> Accelerator:
    """Data parallelism or one device; UserError where the launcher asks for more. Numbers stay in model.dtype."""
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="no", gradient_accumulation_steps=1, step_scheduler_with_optimizer=False)
    found = accelerator.distributed_type.value
    if found != "NO" and not found.startswith("MULTI_"):
        raise UserError(f"accelerate launch: {found} is not supported; plain data parallelism (--multi_gpu) is")
    return accelerator


def agree(accelerator: Accelerator, decide: Callable[[], T]) -> T:
    """What the main process decides; where that is a UserError, it is one in every process."""
    from accelerate.utils import broadcast_object_list

    answer: list[T | UserError | None] = [None]
    if accelerator.is_main_process:
        try:
            answer[0] = decide()
        except UserError as error:
            answer[0] = error
    if accelerator.num_processes > 1:
        broadcast_object_list(answer)
    if isinstance(answer[0], UserError):
        raise answer[0]
    return answer[0]  # type: ignore[return-value]


def part_ways() -> None:
    """Called by every process after the last thing that they do together: a group that is left open aborts at exit."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
