"""The only training loop. SFT, the preference model and every method run through `fit`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mopo_cli.base.errors import AcceleratorMemoryError
from mopo_cli.config.schema import OptimiserConfig
from mopo_cli.data.batches import under_budget

Rows = list[int]  # row numbers


@dataclass(frozen=True, slots=True)
class Progressed:
    """What `fit` tells after a step. `loss` stays on the device until somebody reads it."""

    step: int  # steps done
    loss: Tensor
    learning_rate: float


def learning_rate_factor(step: int, steps: int, config: OptimiserConfig) -> float:
    """Linear warm-up, then linear decay to `final_fraction` of the learning rate at the last step."""
    warmup = min(config.warmup, steps)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 1.0 - (1.0 - config.final_fraction) * done


def build_optimiser(model: nn.Module, config: OptimiserConfig, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW over the trainable parameters (no decay on vectors), with its schedule."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=config.learning_rate, betas=(0.9, 0.98), fused=config.fused
    )
    return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, lambda s: learning_rate_factor(s, steps, config))


@dataclass(frozen=True, slots=True)
class Task:
    """What a stage trains on.

    A step's loss is the sum of `loss_of` over its rows, divided by `weight_of` of all of them: however the rows are
    spread over processes and micro-batches, the update is the same.
    """

    rows_of: Callable[[int], Rows]  # of a step, all processes together
    loss_of: Callable[[Rows], Tensor]  # summed, with gradient
    weight_of: Callable[[Rows], float] = len  # what the sum is divided by
    length_of: Callable[[int], int] | None = None  # tokens of a row


def joined(first: Task, second: Task, size: int) -> Task:
    """Steps on the rows of both tasks, in one mean; `first` has `size` rows, and the second's are numbered from there.

    `second` must have a length_of where `first` has one.
    """

    def apart(rows: Rows) -> tuple[Rows, Rows]:
        return [i for i in rows if i < size], [i - size for i in rows if i >= size]

    def loss_of(rows: Rows) -> Tensor:
        parts = [task.loss_of(own) for task, own in zip((first, second), apart(rows), strict=True) if own]
        return torch.stack(parts).sum()

    def weight_of(rows: Rows) -> float:
        return sum(task.weight_of(own) for task, own in zip((first, second), apart(rows), strict=True) if own)

    def length_of(row: int) -> int:
        return first.length_of(row) if row < size else second.length_of(row - size)  # type: ignore[misc]

    return Task(
        rows_of=lambda step: [*first.rows_of(step), *(size + i for i in second.rows_of(step))],
        loss_of=loss_of,
        weight_of=weight_of,
        length_of=length_of if first.length_of else None,
    )


class Trainer:
    """A model with its optimiser under Accelerate, stepping through the rows of a task.

    A process's rows of a step go through the model in `accumulation` parts, none above `budget` tokens unless it is a
    single row.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        config: OptimiserConfig,
        steps: int,
        accumulation: int = 1,
        budget: int | None = None,
    ):
        self.accelerator, self.config, self.steps = accelerator, config, steps
        self.accumulation, self.budget = accumulation, budget
        optimiser, schedule = build_optimiser(model, config, steps)
        self.model = accelerator.prepare_model(model, evaluation_mode=True)  # no wrapper: see average_gradients
        self.optimiser, self.schedule = accelerator.prepare(optimiser, schedule)

    def fit(
        self,
        task: Task,
        before_step: Callable[[int], None] | None = None,
        after_step: Callable[[Progressed], bool | None] | None = None,
        start: int = 0,
    ) -> None:
        """Run steps start .. steps - 1, or until `after_step` returns True.

        Raises AcceleratorMemoryError where a step does not fit the accelerator, with the setting that does.
        """
        for step in range(start, self.steps):
            if before_step is not None:
                before_step(step)
            self.model.train()
            loss = self._descend(task, step)
            average_gradients(self.accelerator, self.model)
            if self.config.max_grad_norm:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
            rate = self.optimiser.param_groups[0]["lr"]
            self.optimiser.step()
            self.schedule.step()
            self.optimiser.zero_grad()
            if after_step is not None and after_step(Progressed(step + 1, loss, rate)):
                return

    def _descend(self, task: Task, step: int) -> Tensor:
        """Gradients of the step's mean loss on this process's rows, which average to the step's over processes."""
        rows = task.rows_of(step)
        own = rows[self.accelerator.process_index :: self.accelerator.num_processes]
        weight = task.weight_of(rows) / self.accelerator.num_processes
        total = torch.zeros((), device=self.accelerator.device)
        for part in self.parts(own, task.length_of):
            try:
                loss = task.loss_of(part) / weight
                self.accelerator.backward(loss)
            except torch.OutOfMemoryError:
                loss = None
            if loss is None:  # outside the handler, whose traceback would keep the step's tensors
                raise self._short(task, part, step)
            total += loss.detach().float()
        return total

    def parts(self, rows: Rows, length_of: Callable[[int], int] | None) -> list[Rows]:
        """Micro-batches of this process's rows of a step; every row is in one."""
        parts = [rows[start :: self.accumulation] for start in range(self.accumulation)]
        if self.budget is not None and length_of is not None:
            parts = [piece for part in parts for piece in under_budget(part, [length_of(i) for i in part], self.budget)]
        return [part for part in parts if part]

    def _short(self, task: Task, rows: Rows, step: int) -> AcceleratorMemoryError:
        """The error of a micro-batch that did not fit, with how many tokens do: tried, the longest rows first."""
        length_of = task.length_of or (lambda _: 1)
        tried = rows = sorted(rows, key=length_of, reverse=True)
        where = f"step {step + 1}: the accelerator's memory cannot hold {len(rows)} rows of {sum(map(length_of, rows))}"
        while len(tried) > 1:
            tried = tried[: len(tried) // 2]
            self.optimiser.zero_grad()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            try:
                self.accelerator.backward(task.loss_of(tried) / len(tried))
            except torch.OutOfMemoryError:
                continue
            fits = sum(map(length_of, tried))
            return AcceleratorMemoryError(
                f"{where} tokens at once; token_budget={fits} fits, and gives the same updates"
            )
        return AcceleratorMemoryError(
            f"{where} tokens at once, nor one of {length_of(rows[0])}: set model.gradient_checkpointing=true, "
            "model.mixed_precision=bf16 or model.lora.r=16, or leave long rows out by a smaller model.max_length with "
            "dataset.overlong=drop"
        )


def average_gradients(accelerator: Accelerator, model: nn.Module) -> None:
    """Every process goes on with the mean of all processes' gradients.

    By hand rather than by DistributedDataParallel: log-probs run the transformer and its head apart, so the wrapper's
    own forward, which arms its synchronisation, is never called.
    """
    if accelerator.num_processes == 1:
        return
    from torch import distributed

    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    for work in [distributed.all_reduce(gradient, async_op=True) for gradient in gradients]:
        work.wait()  # type: ignore[union-attr]
    for gradient in gradients:
        gradient.div_(accelerator.num_processes)
