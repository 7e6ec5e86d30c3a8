"""`make quality`: its table where there is no optimum, and what it says its numbers were never used for."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import quality


def row(**changes: str) -> dict[str, str]:
    cells = {"exact/helpful": "0.55", "estimated/helpful": "0.56", "optimum/helpful": "0.56", "state": "done"}
    cells |= {f"{kind}/harmless": "0.55" for kind in ("exact", "optimum", "threshold")} | {"estimated/harmless": "0.56"}
    return {**cells, **changes}


def test_a_line_an_objective():
    assert quality.table([row(), row(**{"exact/helpful": "0.57"})], "K = 2", ["harmless"]) == [
        "| K = 2 | helpful |  | 0.560 (0.550 to 0.570) | 0.560 | 0.560 | yes | yes |",
        "| K = 2 | harmless | 0.550 | 0.550 (0.550 to 0.550) | 0.550 | 0.560 | yes | yes |",
    ]


def test_thresholds_out_of_reach_have_no_optimum_and_nothing_is_near_to_it():
    beyond = {"optimum/helpful": "", "optimum/harmless": "", "attainable/harmless": "0.8", "threshold/harmless": "0.9"}
    helpful, harmless = quality.table([row(**beyond)], "K = 2", ["harmless"])
    assert helpful == "| K = 2 | helpful |  | 0.550 (0.550 to 0.550) | none | 0.560 | – | yes |"
    assert "| none: 0.800 is attainable | 0.560 | **no** |" in harmless


def test_it_says_what_is_in_sample():
    assert "are in-sample: on the same prompts" in quality.origin(0, [0, 1, 2])
    assert "in-sample but for the seeds" in quality.origin(0, [3])
    assert "seeds 3, 4, 5, by which nothing was chosen" in quality.origin(1, [3, 4, 5])
    assert "144 test prompts of which" in quality.origin(1, [3])


def test_by_default_nothing_was_chosen_by_its_data_and_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    asked: list[list[str]] = []

    def pretend(command: list[str], check: bool) -> None:
        asked.append(command)
        directory = Path(next(word for word in command if word.startswith("sweep.dir=")).partition("=")[2])
        directory.mkdir(parents=True)
        thresholds = next((w.partition("=")[2] for w in command if w.startswith("objectives.harmless")), "0.55")
        concise = {f"{kind}/concise": "0.5" for kind in ("exact", "estimated", "optimum", "threshold")}
        rows = [row(**{"threshold/harmless": b}, **concise) for b in thresholds.split(",")]
        with open(directory / "results.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)

    monkeypatch.setattr(quality.subprocess, "run", pretend)
    assert quality.main(["--root", str(tmp_path), "hparams=smoke"]) == 0
    for command in asked:
        assert {"dataset.data_seed=1", "seed=3,4,5", "hparams=smoke"} <= set(command)
        assert "hparams=paper" not in command, "what is given takes the place of the benchmark's own"
    out = capsys.readouterr().out
    assert out.count("$ mopo sweep -m") == 3
    assert "by which nothing was chosen" in out
    assert out.count("\n| K = ") == 3 * 2 + 3 + 3
