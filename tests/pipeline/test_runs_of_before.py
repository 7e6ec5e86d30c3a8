"""Run directories that version 0.1 wrote (872915d), whose configs name modules that have moved since."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from running import Finished
from safetensors.torch import load_file

ARCHIVE = Path(__file__).parents[1] / "fixtures" / "before_the_move.tar.xz"
SETTINGS = (
    "hparams=smoke", "logger=none", "seed=3", "cache=null", "steps=10", "checkpoint_every=5", "sft.steps=4",
    "preference_model.steps=4", "preference_model.evaluate_every=4", "sampling.max_new_tokens=8",
    "evaluation.prompts=8", "evaluation.exact_prompts=4", "dataset.rows=300",
    "model.architecture.hidden_size=8", "model.architecture.intermediate_size=16",
    "model.architecture.num_hidden_layers=1", "model.tokenizer.vocab_size=300",
)  # fmt: skip
Run = Callable[..., Finished]


@pytest.fixture
def runs(here: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(here, filter="data")
    return here / "before_the_move"


@pytest.mark.parametrize("algorithm", ["mopo", "dpo"])
def test_a_run_that_was_cut_off_goes_on_and_ends_where_it_would_have(runs: Path, run_here: Run, algorithm: str):
    done = run_here("train", *SETTINGS, f"algorithm={algorithm}", f"run.dir={runs / algorithm}", "run.resume=true")
    assert done.status == 0, done.err
    ended, wanted = (
        load_file(path)
        for path in (runs / algorithm / "model" / "model.safetensors", runs / f"{algorithm}-ended.safetensors")
    )
    assert ended.keys() == wanted.keys()
    for name, weights in wanted.items():
        torch.testing.assert_close(ended[name], weights, rtol=1e-4, atol=1e-5)


def test_a_finished_run_is_reported_sampled_evaluated_and_exported(runs: Path, run_here: Run):
    run = runs / "finished"
    for command in (
        ("report", f"run={run}"),
        ("sample", f"run={run}", "prompt=How do I boil an egg?"),
        ("eval", f"run={run}", "evaluation.prompts=4", "evaluation.exact_prompts=4"),
        ("export", f"run={run}", f"to={runs / 'shared'}"),
    ):
        done = run_here(*command)
        assert done.status == 0, (command, done.err)
    assert (run / "report.html").is_file()
    assert (runs / "shared" / "README.md").is_file()
