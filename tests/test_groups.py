"""Every pair of options that the groups offer composes, and every algorithm and objective set runs a few steps."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from running import TINY, Finished, read_json

from mopo_cli.config import compose, schema

GROUPS = ("algorithm", "objectives", "dataset", "model", "hparams", "logger")  # the largest first
OPTIONS = {group: compose.group_options(group) for group in GROUPS}
SETS, ALGORITHMS = OPTIONS["objectives"], OPTIONS["algorithm"]
ONE_STEP = (
    "onpolicy.train_prompts=8",
    "evaluation.prompts=4",
    "evaluation.responses=2",
    "evaluation.exact_prompts=2",
)


def covering() -> list[dict[str, str]]:
    """Choices of one option a group, in which every two options of two groups meet."""
    missing = {
        frozenset({(a, x), (b, y)})
        for a, b in itertools.combinations(GROUPS, 2)
        for x, y in itertools.product(OPTIONS[a], OPTIONS[b])
    }
    lines = []
    while missing:
        chosen = dict(min(missing, key=lambda pair: sorted(pair)))
        for group in GROUPS:
            if group not in chosen:
                met = {
                    x: sum(frozenset({(group, x), other}) in missing for other in chosen.items())
                    for x in OPTIONS[group]
                }
                chosen[group] = max(met, key=lambda x: met[x])
        missing -= {frozenset(pair) for pair in itertools.combinations(chosen.items(), 2)}
        lines.append(chosen)
    return lines


@pytest.mark.thorough
def test_every_two_options_compose():
    lines = covering()
    assert len(lines) < 1.5 * len(ALGORITHMS) * len(SETS)
    for line in lines:
        composed = compose.compose("train", [f"{group}={option}" for group, option in line.items()])
        assert set(composed) <= set(schema.TrainConfig.__dataclass_fields__)


# --------------------------------------------------------------------------------------------- runs
def write_rows(path: Path, count: int = 90) -> None:
    """Rows that every objective set finds its labels in."""
    sets = [
        compose.typed(compose.compose("data", [f"objectives={name}"]), schema.DataConfig).objectives for name in SETS
    ]
    sources = sorted({node.source or name for objectives in sets for name, node in objectives.items()})
    words = ("yes", "no", "a lamp", "the river")
    rows = [
        {
            "prompt": f"Question {i}?",
            "responses": [words[i % 4], f"{words[(i + 1) % 4]} and {words[(i // 4) % 4]}"],
            "scores": {source: [(i + k) % 3, (i // 3 + k) % 2] for k, source in enumerate(sources)},
            "context": "the river and a lamp",
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs find the rows and one another's references."""
    directory = tmp_path_factory.mktemp("groups")
    write_rows(directory / "rows.jsonl")
    return directory


RUNS = [
    *((algorithm, SETS[i % len(SETS)], "pairs") for i, algorithm in enumerate(ALGORITHMS)),
    *((algorithm, "assistant", "assistant") for algorithm in ("mopo", "mopo_conditioned")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "objectives", "dataset"), RUNS, ids=[" ".join(run) for run in RUNS])
def test_a_smoke_run_of_every_algorithm_and_objective_set(
    run_here: Callable[..., Finished], here: Path, place: Path, algorithm: str, objectives: str, dataset: str
):
    rows = (f"dataset.path={place}/rows.jsonl", "dataset.heldout_fraction=0.3", "dataset.test_fraction=0.2")
    groups = (f"algorithm={algorithm}", f"objectives={objectives}", f"dataset={dataset}", f"cache={place}/cache")
    steps = "steps=4" if algorithm in ("dpa", "ric") else "steps=1"  # one of each of their rounds
    done = run_here("train", *TINY, *ONE_STEP, *groups, *(rows if dataset == "pairs" else ()), steps, "run.dir=run")
    assert done.status == 0, done.err
    assert read_json(here / "run" / "status.json")["state"] in ("done", "infeasible")
