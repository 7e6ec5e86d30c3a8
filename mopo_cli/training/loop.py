"""The only training loop. SFT, the preference model and every method run through `fit`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mopo_cli.base.console import stage_name
from mopo_cli.base.errors import AcceleratorMemoryError, NotFiniteError
from mopo_cli.config.schema import OptimiserConfig
from mopo_cli.data.batches import under_budget
from mopo_cli.models.parts import not_finite

Rows = list[int]  # row numbers
LIMIT = 10  # steps left out in a row, or half of few, after which a stage fails: a bad row comes once, bad weights stay
NAMED = 8  # rows that a message names


@dataclass(frozen=True, slots=True)
class Progressed:
    """What `fit` tells after a step. `loss` stays on the device until somebody reads it."""

    step: int  # steps done
    loss: Tensor  # of all its rows, whichever process had them
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
    source_of: Callable[[int], str] = str  # a row as a message names it


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

    def source_of(row: int) -> str:
        return first.source_of(row) if row < size else second.source_of(row - size)

    return Task(
        rows_of=lambda step: [*first.rows_of(step), *(size + i for i in second.rows_of(step))],
        loss_of=loss_of,
        weight_of=weight_of,
        length_of=length_of if first.length_of else None,
        source_of=source_of,
    )


class Trainer:
    """A model with its optimiser under Accelerate, stepping through the rows of a task.

    A process's rows of a step go through the model in `accumulation` parts, none above `budget` tokens unless it is a
    single row. A step whose loss or gradient is not finite changes nothing and is counted in `skipped`. `key` is where
    the config has the optimiser.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        config: OptimiserConfig,
        steps: int,
        accumulation: int = 1,
        budget: int | None = None,
        key: str = "optimiser.",
    ):
        self.accelerator, self.config, self.steps = accelerator, config, steps
        self.accumulation, self.budget, self.key = accumulation, budget, key
        optimiser, schedule = build_optimiser(model, config, steps)
        self._adamw = optimiser
        self.model = accelerator.prepare_model(model, evaluation_mode=True)  # no wrapper: see average_gradients
        self.optimiser, self.schedule = accelerator.prepare(optimiser, schedule)
        self.skipped = torch.zeros((), dtype=torch.int64, device=accelerator.device)  # steps that were left out
        self._in_a_row = torch.zeros_like(self.skipped)
        self._limit = min(LIMIT, max(1, steps // 2))

    def fit(
        self,
        task: Task,
        before_step: Callable[[int], None] | None = None,
        after_step: Callable[[Progressed], bool | None] | None = None,
        start: int = 0,
    ) -> None:
        """Run steps start .. steps - 1, or until `after_step` returns True.

        Raises AcceleratorMemoryError where a step does not fit the accelerator, with the setting that does, and
        NotFiniteError where too many steps in a row were left out, or weights are not finite in the end.
        """
        for step in range(start, self.steps):
            if before_step is not None:
                before_step(step)
            self.model.train()
            loss = averaged(self.accelerator, self._descend(task, step))
            average_gradients(self.accelerator, self.model)
            rate = self.optimiser.param_groups[0]["lr"]
            self._update(torch.isfinite(loss) & torch.isfinite(self._clip()))
            self.schedule.step()
            self.optimiser.zero_grad()
            if self.skipped.device.type == "cpu" or (step + 1) % self._limit == 0 or step + 1 == self.steps:
                self._check_going_on(task, step)  # not at each step, which would wait for the device
            if after_step is not None and after_step(Progressed(step + 1, loss, rate)):
                break
        self.check_weights()

    def _clip(self) -> Tensor:
        """The norm of the gradients, which are scaled down to the limit where there is one."""
        if self.config.max_grad_norm:
            return self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)  # type: ignore
        return nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])

    def _update(self, finite: Tensor) -> None:
        """The optimiser's step where loss and gradient are finite, which all processes see alike: both are averages.

        AdamW's one kernel for all parameters looks at found_inf by itself, so that nobody waits for the device.
        """
        bad = ~finite
        self.skipped += bad
        self._in_a_row.add_(1).mul_(bad)
        if self.config.fused:
            self._adamw.found_inf = bad.float()  # type: ignore[attr-defined]
            self.optimiser.step()
        elif not bad:
            self.optimiser.step()

    @property
    def sound(self) -> bool:
        """Whether the last step had a finite loss and gradient: else nobody should go on from its weights."""
        return int(self._in_a_row) == 0

    def _check_going_on(self, task: Task, step: int) -> None:
        if int(self._in_a_row) < self._limit:
            return
        rows = task.rows_of(step)
        more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
        raise NotFiniteError(
            f"{stage_name()}: step {step + 1}: loss or gradient was not finite in {int(self._in_a_row)} steps in a "
            f"row, the last on rows {', '.join(map(task.source_of, rows[:NAMED]))}{more}; {self._advice()}"
        )

    def check_weights(self) -> None:
        """NotFiniteError where a weight is NaN or infinite: nothing would mend it."""
        if (name := not_finite(self.model)) is not None:
            raise NotFiniteError(f"{stage_name()}: the weights are not finite any more ({name}); {self._advice()}")

    def _advice(self) -> str:
        config = self.config
        return (
            f"lower {self.key}learning_rate (now {config.learning_rate:g}), or raise {self.key}warmup (now "
            f"{config.warmup})"
        )

    def _descend(self, task: Task, step: int) -> Tensor:
        """This process's share of the step's loss and gradients, which are the mean of all processes' shares."""
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


def averaged(accelerator: Accelerator, value: Tensor) -> Tensor:
    """The mean of all processes' values."""
    if accelerator.num_processes > 1:
        from torch import distributed

        distributed.all_reduce(value)
        value /= accelerator.num_processes
    return value


def anyone(accelerator: Accelerator, answer: bool) -> bool:
    """Whether a process says yes; all must ask."""
    if accelerator.num_processes == 1:
        return answer
    return bool(averaged(accelerator, torch.tensor(float(answer), device=accelerator.device)))


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
