"""Run directories that version 0.1 wrote (872915d), whose configs name modules that have moved since."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from running import OF_BEFORE, Finished, runs_of_before
from safetensors.torch import load_file

Run = Callable[..., Finished]


@pytest.fixture
def runs(here: Path) -> Path:
    return runs_of_before(here)


@pytest.mark.parametrize("algorithm", ["mopo", "dpo"])
def test_a_run_that_was_cut_off_goes_on_and_ends_where_it_would_have(runs: Path, run_here: Run, algorithm: str):
    done = run_here("train", *OF_BEFORE, f"algorithm={algorithm}", f"run.dir={runs / algorithm}", "run.resume=true")
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


def test_names_and_prompts_of_any_letters_come_through_sample_eval_report_and_export(runs: Path, run_here: Run):
    run, shared = runs / "é 日本 👩\u200d👧 [1]", runs / "out ü=1"
    (runs / "finished").rename(run)
    prompt = "Wie geht\u2019s\u2028dir, 日本? {{ x }} </script>"
    said = run_here("sample", f"run={run}", f"prompt={prompt}", "sampling.max_new_tokens=4")
    assert said.status == 0, said.err
    (runs / "asked.jsonl").write_text(json.dumps({"prompt": prompt}) + "\n", encoding="utf-8")
    for command in (
        ("sample", f"run={run}", f"prompts={runs / 'asked.jsonl'}", "sampling.max_new_tokens=4"),
        ("report", f"run={run}"),
        ("export", f"run={run}", f"to={shared}"),
    ):
        done = run_here(*command)
        assert done.status == 0, (command, done.err)
    assert (run / "report.html").read_text(encoding="utf-8").count("日本")
    for name in ("config.json", "tokenizer.json"):
        assert (shared / name).read_bytes() == (run / "model" / name).read_bytes()
