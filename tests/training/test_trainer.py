"""The training loop: the same update however a step is cut up, memory that runs out, no reading from the device."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from policies import asking
from running import TINY, read_json
from test_logprobs import ARCHITECTURES, PACKED, build, some_rows
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mopo_cli.algorithms.mopo.alignment import Alignment
from mopo_cli.base.console import stage as shown_stage
from mopo_cli.base.errors import AcceleratorMemoryError, NotFiniteError, UserError
from mopo_cli.cli import main
from mopo_cli.config import compose, schema
from mopo_cli.config.schema import OptimiserConfig
from mopo_cli.data.batches import Collator
from mopo_cli.data.table import row_length
from mopo_cli.models.load import load_policy
from mopo_cli.models.logprobs import all_logps, response_logps, sequence_logps
from mopo_cli.models.policy import Policy
from mopo_cli.models.preference import build_preference_model, features_of, save_preference_model
from mopo_cli.models.tokenizers import load_tokenizer
from mopo_cli.training import stage
from mopo_cli.training.cache import kept_logps
from mopo_cli.training.checkpoints import Work
from mopo_cli.training.inputs import prepare_inputs
from mopo_cli.training.loop import Task, Trainer
from mopo_cli.training.stage import Descent, Notes

ROWS = some_rows() * 3
LENGTHS = [row_length(row) for row in ROWS]


def task_of(model: nn.Module, collate: Collator = PACKED, seen: list[list[int]] | None = None) -> Task:
    """SFT on all rows at each step, a mean over response tokens."""

    def loss_of(numbers: list[int]) -> Tensor:
        if seen is not None:
            seen.append(numbers)
        return -sequence_logps(model, collate([ROWS[i] for i in numbers])).sum()

    def weight_of(numbers: list[int]) -> float:
        return sum(len(response) for i in numbers for response in ROWS[i].responses)

    return Task(lambda step: list(range(len(ROWS))), loss_of, weight_of, LENGTHS.__getitem__)


def trained(steps: int = 2, **settings: Any) -> tuple[list[Tensor], list[list[int]], list[float]]:
    """Weights after some steps of plain SGD-like AdamW, the micro-batches, and the losses."""
    model = build(ARCHITECTURES["llama"])
    seen: list[list[int]] = []
    losses: list[float] = []
    trainer = Trainer(Accelerator(cpu=True), model, OptimiserConfig(1e-3, warmup=1), steps, **settings)
    trainer.fit(task_of(model, seen=seen), after_step=lambda progressed: losses.append(float(progressed.loss)))
    return [p.detach().clone() for p in model.parameters()], seen, losses


class TestParts:
    @pytest.mark.parametrize("settings", [{"accumulation": 3}, {"budget": 60}, {"accumulation": 2, "budget": 45}])
    def test_the_update_does_not_depend_on_how_a_step_is_cut_up(self, settings):
        whole, batches, losses = trained()
        assert [sorted(batch) for batch in batches] == [list(range(len(ROWS)))] * 2
        cut, parts, summed = trained(**settings)
        assert len(parts) > 2 * len(batches)
        assert sorted(i for part in parts for i in part) == sorted(2 * list(range(len(ROWS))))
        torch.testing.assert_close(summed, losses, atol=1e-5, rtol=1e-5)
        for a, b in zip(whole, cut, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)

    def test_a_part_keeps_the_budget(self):
        _, parts, _ = trained(budget=60)
        assert all(len(part) == 1 or sum(LENGTHS[i] for i in part) <= 60 for part in parts)

    def test_no_row_is_lost_where_the_budget_is_below_one(self):
        _, parts, _ = trained(steps=1, budget=1)
        assert sorted(parts) == [[i] for i in range(len(ROWS))]


def short_of(task: Task, tokens: int) -> Task:
    """The task on a device that holds so many tokens at once."""

    def loss_of(numbers: list[int]) -> Tensor:
        if sum(LENGTHS[i] for i in numbers) > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return task.loss_of(numbers)

    return replace(task, loss_of=loss_of)


class TestMemory:
    def fit(self, tokens: int, budget: int | None = None) -> None:
        model = build(ARCHITECTURES["llama"])
        trainer = Trainer(Accelerator(cpu=True), model, OptimiserConfig(1e-3), 3, budget=budget)
        trainer.fit(short_of(task_of(model), tokens))

    def test_the_message_names_a_budget_that_does(self):
        with pytest.raises(AcceleratorMemoryError) as caught:
            self.fit(max(LENGTHS) * 2)
        text = str(caught.value)
        assert f"step 1: the accelerator's memory cannot hold {len(ROWS)} rows of {sum(LENGTHS)} tokens" in text
        budget = int(text.partition("token_budget=")[2].split()[0])
        assert max(LENGTHS) <= budget <= 2 * max(LENGTHS)
        self.fit(max(LENGTHS) * 2, budget)

    def test_where_one_row_is_too_much_it_says_what_else_would_do(self):
        with pytest.raises(AcceleratorMemoryError, match=r"nor one of \d+: set model.gradient_checkpointing=true"):
            self.fit(3)

    @pytest.mark.slow
    def test_a_run_ends_failed_and_goes_on_under_the_budget(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ):
        limit, whole = 300, Alignment.loss

        def loss(self: Alignment, numbers: list[int]) -> Tensor:
            if sum(map(self.length_of, numbers)) > limit and self.work.steps >= 10:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return whole(self, numbers)

        monkeypatch.setattr(Alignment, "loss", loss)
        run = tmp_path / "run"
        arguments = ["train", *TINY, "steps=20", f"run.dir={run}", f"cache={tmp_path / 'cache'}"]
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert "step 11: the accelerator's memory cannot hold 8 rows" in error
        budget = int(error.partition("token_budget=")[2].split()[0])
        assert read_json(run / "status.json")["state"] == "failed"
        assert (run / "checkpoints" / "step-10").is_dir()
        assert main([*arguments, f"token_budget={budget}", "run.resume=true"]) == 0
        assert read_json(run / "status.json")["state"] == "done"

    def test_a_budget_below_one_example_names_it(self, tmp_path: Path):
        path = tmp_path / "rows.jsonl"
        rows = [
            {"prompt": " ".join(map(str, range(i, i + (90 if i == 7 else 3)))), "chosen": "Yes.", "rejected": "No."}
            for i in range(0, 600, 7)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = ["dataset=pairs", f"dataset.path={path}", "dataset.chosen_means=human", "objectives=human_concise"]
        asked = [*data, "model.tokenizer.min_frequency=2", "token_budget=40"]
        composed = compose.typed(compose.compose("train", asked), schema.TrainConfig)
        with pytest.raises(UserError, match=r"token_budget=40: .*rows.jsonl:2 alone has (\d+) tokens .*; give \1"):
            prepare_inputs(composed)


def scaled(model: nn.Module, factors: list[float]) -> Task:
    """The task with each step's loss times a factor; that of infinity has an infinite gradient."""
    task, step = task_of(model), -1

    def rows_of(number: int) -> list[int]:
        nonlocal step
        step = number
        return task.rows_of(number)

    return replace(task, rows_of=rows_of, loss_of=lambda rows: task.loss_of(rows) * factors[step])


class TestNotFinite:
    def fit(self, factors: list[float], **settings: Any) -> tuple[Trainer, list[list[Tensor]]]:
        model = build(ARCHITECTURES["llama"])
        trainer = Trainer(Accelerator(cpu=True), model, OptimiserConfig(1e-2, warmup=1, **settings), len(factors))
        weights = [[p.detach().clone() for p in model.parameters()]]
        trainer.fit(
            scaled(model, factors),
            after_step=lambda _: weights.append([p.detach().clone() for p in model.parameters()]),
        )
        return trainer, weights

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    @pytest.mark.parametrize("settings", [{}, {"fused": False}, {"max_grad_norm": 0.0}])
    def test_such_a_step_changes_nothing_and_is_counted(self, bad: float, settings: dict[str, Any]):
        trainer, weights = self.fit([1.0, bad, 1.0, 1.0], **settings)
        assert int(trainer.skipped) == 1
        same = [all(torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in pairwise(weights)]
        assert same == [False, True, False, False]
        states = trainer._adamw.state.values()
        assert {float(state["step"]) for state in states} == {3.0}

    def test_a_gradient_alone(self):
        model = nn.Linear(1, 1)
        task = Task(lambda step: [0], lambda rows: (model(torch.ones(1, 1)) * 0.0).sqrt().sum())  # d sqrt(0) = inf
        with pytest.raises(NotFiniteError, match="step 1: loss or gradient was not finite in 1 steps"):
            Trainer(Accelerator(cpu=True), model, OptimiserConfig(), 3).fit(task)

    def test_ten_in_a_row_end_the_stage_with_the_step_the_rows_and_what_to_lower(self):
        model = build(ARCHITECTURES["llama"])
        factors = [1.0] * 5 + [math.nan] * 9 + [1.0] + [math.nan] * 15
        trainer = Trainer(
            Accelerator(cpu=True), model, OptimiserConfig(0.5, warmup=3), len(factors), key="sft.optimiser."
        )
        named = replace(scaled(model, factors), source_of=lambda row: f"rows.jsonl:{row + 1}")
        with pytest.raises(NotFiniteError) as caught, shown_stage("reference (SFT)", 30):
            trainer.fit(named)
        assert str(caught.value) == (
            "reference (SFT): step 25: loss or gradient was not finite in 10 steps in a row, the last on rows "
            + ", ".join(f"rows.jsonl:{n}" for n in range(1, 9))
            + f" and {len(ROWS) - 8} more; lower sft.optimiser.learning_rate (now 0.5), or raise sft.optimiser.warmup "
            "(now 3)"
        )
        assert int(trainer.skipped) == 19
        assert not trainer.sound

    def test_weights_that_overflow_at_the_last_step(self):
        model = build(ARCHITECTURES["llama"])
        trainer = Trainer(Accelerator(cpu=True), model, OptimiserConfig(1e38, weight_decay=1e38, warmup=0), 1)
        with pytest.raises(NotFiniteError, match=r"the weights are not finite any more \(model\..*lower optimiser"):
            trainer.fit(task_of(model))

    def test_no_model_is_saved(self, tmp_path: Path):
        model = build(ARCHITECTURES["llama"])
        with torch.no_grad():
            next(model.parameters())[0, 0] = math.inf
        with pytest.raises(NotFiniteError, match="model: not written"):
            asking(model).save(tmp_path / "model")
        judge = build_preference_model(model, 2, "bradley_terry", 0, 0)
        with pytest.raises(NotFiniteError, match="judge: not written"):
            save_preference_model(judge, tmp_path / "judge", ("a", "b"), [0.5, 0.5])
        assert list(tmp_path.iterdir()) == []


def test_what_is_logged_of_a_step_is_of_all_its_micro_batches(monkeypatch: pytest.MonkeyPatch):
    """And of all processes: the other one's parts come in by `gathered`."""
    model = build(ARCHITECTURES["llama"])
    notes = Notes()
    task = task_of(model)

    def loss_of(numbers: list[int]) -> Tensor:
        notes.add(lambda: {"accuracy": torch.tensor([float(i % 2) for i in numbers])})
        return task.loss_of(numbers)

    trainer = Trainer(Accelerator(cpu=True), model, OptimiserConfig(1e-3), 2, accumulation=4)
    descent = Descent(trainer, replace(task, loss_of=loss_of), Work(), len, notes)
    lines: list[dict[str, Any]] = []
    trainer.fit(descent.task(), descent.before_step, lambda progressed: lines.append(descent.metrics(progressed)))
    share = sum(i % 2 for i in range(len(ROWS))) / len(ROWS)
    assert [line["accuracy"] for line in lines] == pytest.approx([share, share])
    there = [{"accuracy": torch.ones(len(ROWS)), "only there": torch.tensor([2.0, 4.0])}]
    monkeypatch.setattr(stage, "gathered", lambda own: [own, there])
    assert notes.means() == pytest.approx({"accuracy": (share + 1) / 2, "only there": 3.0})


class Reads(TorchDispatchMode):
    """Counts what the host reads from the device: on a GPU each read waits until all that was asked for is done."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "local_scalar_dense" in str(function)
        return function(*args, **(kwargs or {}))


def test_a_step_reads_nothing_from_the_device():
    model = build(ARCHITECTURES["llama"])
    trainer = Trainer(Accelerator(cpu=True), model, OptimiserConfig(1e-3, fused=False), 4, budget=60)
    task = task_of(model)
    trainer.fit(replace(task, rows_of=lambda step: [0]))  # what is found out once, is
    trainer.steps = 2
    with Reads() as reads:
        loss = trainer._descend(task, 0)
    assert reads.count == 0
    assert float(loss) > 0


class TestKeptLogps:
    def kept(self, root: Path | None, model: nn.Module, rows: Sequence = ROWS) -> list[Tensor]:
        return kept_logps(Accelerator(cpu=True), root and str(root), asking(model), rows)

    def test_a_second_run_reads_them(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        model = build(ARCHITECTURES["llama"])
        first = self.kept(tmp_path, model)
        monkeypatch.setattr(Policy, "logps", lambda *_: pytest.fail("computed again"))
        again = self.kept(tmp_path, model)
        assert [values.tolist() for values in again] == [values.tolist() for values in first]

    def test_other_weights_or_rows_are_computed(self, tmp_path: Path):
        model = build(ARCHITECTURES["llama"])
        self.kept(tmp_path, model)
        self.kept(tmp_path, model, ROWS[:5])
        with torch.no_grad():
            next(model.parameters()).add_(0.01)
        other = self.kept(tmp_path, model)
        assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 3
        torch.testing.assert_close(other, all_logps(model, ROWS, PACKED))

    def test_nothing_is_written_without_a_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(tmp_path)
        assert len(self.kept(None, build(ARCHITECTURES["llama"]))) == len(ROWS)
        assert not list(tmp_path.iterdir())


def tiny(**changes: object) -> tuple[nn.Module, nn.Module]:
    """The embedded model with other settings, and as it is."""
    settings = compose.typed(compose.compose("train", []), schema.TrainConfig).model
    tokenizer = load_tokenizer(settings, ["Some words to make tokens of."] * 40)
    return load_policy(replace(settings, **changes), tokenizer, 0), load_policy(settings, tokenizer, 0)


class TestMixedPrecision:
    def test_products_are_in_bfloat16_and_weights_are_not(self):
        mixed, plain = tiny(mixed_precision="bf16")
        rows = [replace(row, prompt=[5, 6]) for row in some_rows()]
        batch = PACKED(rows)
        ours, theirs = response_logps(mixed, batch), response_logps(plain, batch)
        assert ours.dtype == torch.float32
        assert not torch.equal(ours, theirs)  # rounded
        torch.testing.assert_close(ours, theirs, atol=0.3, rtol=2e-2)
        ours.sum().backward()
        theirs.sum().backward()
        for a, b in zip(mixed.parameters(), plain.parameters(), strict=True):
            assert a.grad is not None
            assert b.grad is not None
            assert a.dtype == a.grad.dtype == torch.float32
            assert float((a.grad - b.grad).norm()) <= 0.05 * float(b.grad.norm()) + 1e-3

    def test_adapters_on_a_base_in_float16_are_trained_in_float32(self):
        lora = schema.LoraConfig(r=4)
        half, plain = tiny(dtype="float16", lora=lora)[0], tiny(lora=lora)[0]
        assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}
        batch = PACKED([replace(row, prompt=[5, 6]) for row in some_rows()])
        ours, theirs = (
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            for model in (half, plain)
            if sequence_logps(model, batch).sum().backward() is None
        )
        assert float((ours - theirs).norm() / theirs.norm()) < 0.02

    def test_the_preference_model_takes_it_over(self):
        mixed, plain = tiny(mixed_precision="bf16")
        rows = some_rows()
        ours, theirs = (
            torch.cat(features_of(build_preference_model(model, 2, "bradley_terry", 0, 0), rows, PACKED))
            for model in (mixed, plain)
        )
        assert not torch.equal(ours, theirs)
        torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=5e-2)


@pytest.mark.thorough
def test_a_compiled_model_gives_the_same_log_probs():
    try:
        compiled, plain = tiny(compile=True)
        batch = PACKED(some_rows())
        ours = response_logps(compiled, batch)
    except UserError as error:
        pytest.skip(str(error))
    theirs = response_logps(plain, batch)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    ours.sum().backward()
    theirs.sum().backward()
    for a, b in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-3)
