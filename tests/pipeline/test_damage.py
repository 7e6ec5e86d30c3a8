"""Run directories that were damaged: every command does without a file, or names it; nobody sees a traceback."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from running import OF_BEFORE, Finished, runs_of_before

from mopo_cli.base.files import seal
from mopo_cli.evaluation import responses
from mopo_cli.pipeline import train as training

Run = Callable[..., Finished]
DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "replaced": lambda path: path.write_bytes(b"[]"),
    "deleted": lambda path: path.unlink(),
}
COMMANDS: dict[str, tuple[str, ...]] = {
    "report": ("report", "run=RUN", "figures=false", "bootstrap=5"),
    "eval": ("eval", "run=RUN", "evaluation.prompts=2", "evaluation.exact_prompts=1"),
    "sample": ("sample", "run=RUN", "prompt=How do I boil an egg?", "compare=2", "sampling.max_new_tokens=4"),
    "export": ("export", "run=RUN", "to=shared"),
    "resume": ("train", *OF_BEFORE, "algorithm=mopo", "run.dir=RUN", "run.resume=true"),
}
MODEL = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
ANY, ENDED = ("config.yaml", "status.json", "metrics.jsonl"), ("config.yaml", "provenance.json", "summary.json")
READ: dict[str, tuple[str, ...]] = {
    "report": (*ANY, "summary.json", "samples.jsonl"),
    "eval": (*ENDED, *(f"model/{name}" for name in MODEL)),
    "sample": (
        "config.yaml", "summary.json", "samples.jsonl", *(f"model/{name}" for name in MODEL),
        "reference/model.safetensors", "reference/checksums.json", "preference_model/preference_model.json",
        "preference_model/preference_model.safetensors",
    ),
    "export": (*ENDED, "samples.jsonl", "evaluation.json", *(f"model/{name}" for name in MODEL)),
    "resume": (
        *ANY, "provenance.json", "reference/model.safetensors", "preference_model/checksums.json",
        "checkpoints/step-5/pytorch_model.bin", "checkpoints/step-5/alignment.json",
    ),
}  # fmt: skip
HARMS = tuple(DAMAGES)
CASES = [  # each file is damaged in each way by one command or another, and each command meets each way
    (command, file, HARMS[(n + m) % len(HARMS)])
    for n, (command, files) in enumerate(READ.items())
    for m, file in enumerate(files)
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was cut off, and one that has ended and was evaluated again, with checksums as they have them now."""
    place = runs_of_before(tmp_path_factory.mktemp("damaged"))
    shutil.copy(place / "finished" / "summary.json", place / "finished" / "evaluation.json")
    for directory in ("finished/reference", "finished/preference_model", "mopo/reference", "mopo/preference_model",
                      "mopo/checkpoints/step-5"):  # fmt: skip
        seal(place / directory)
    return place


@pytest.mark.slow
@pytest.mark.parametrize(("command", "file", "harm"), CASES)
def test_a_damaged_file_is_named_or_done_without(
    runs: Path, run_here: Run, here: Path, monkeypatch: pytest.MonkeyPatch, command: str, file: str, harm: str
):
    for module, name in ((training, "evaluate_run"), (training, "finish"), (responses, "exact_evaluation")):
        monkeypatch.setattr(module, name, lambda *_: None)  # slow, and by then all files have been read
    run = here / "run"
    shutil.copytree(runs / ("mopo" if command == "resume" else "finished"), run)
    DAMAGES[harm](run / file)
    done = run_here(*(argument.replace("RUN", str(run)) for argument in COMMANDS[command]))
    assert done.status in (0, 2), done.err
    assert "Traceback" not in done.err
    named = Path(file).name in done.err or str((run / file).parent) in done.err
    assert named if done.status == 2 else True, done.err
