"""Fitted stages and checkpoints on disk: what is torn or flipped is noticed, named, thrown away and made anew."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from policies import asking
from test_logprobs import ARCHITECTURES, build, some_rows

from mopo_cli.base.errors import NotFiniteError
from mopo_cli.base.files import damage, seal, whole, write_json
from mopo_cli.training.cache import kept, kept_logps
from mopo_cli.training.checkpoints import checkpoints, discard_damaged


def cut(path: Path) -> None:
    """In place, as a full disk or a careless hand leaves a file."""
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


def flip(path: Path) -> None:
    with open(path, "r+b") as file:
        first = file.read(1)
        file.seek(0)
        file.write(bytes([first[0] ^ 1]))


DAMAGES = [cut, flip, Path.unlink]


class Stage:
    """A stage whose result is a text; each fit gives another."""

    def __init__(self, root: Path | None):
        self.root, self.fits = root, 0

    def result(self, own: Path | None = None) -> str:
        return kept(None, self.root and str(self.root), lambda: "stage-1", self._fit, self._save, self._load, own)

    def _fit(self) -> str:
        self.fits += 1
        return f"fit {self.fits}"

    def _save(self, result: str, path: Path) -> None:
        with whole(path) as place:
            (place / "weights").write_text(result)

    def _load(self, path: Path) -> str:
        return (path / "weights").read_text()


class TestKept:
    def test_a_second_run_gets_links_of_the_same_files(self, tmp_path: Path):
        stage = Stage(tmp_path / "cache")
        assert stage.result(tmp_path / "a") == stage.result(tmp_path / "b") == "fit 1"
        assert (tmp_path / "a" / "weights").samefile(tmp_path / "b" / "weights")
        assert damage(tmp_path / "a") is None

    @pytest.mark.parametrize("harm", DAMAGES)
    def test_a_damaged_entry_is_fitted_anew(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: Callable[[Path], None]
    ):
        stage = Stage(tmp_path / "cache")
        stage.result()
        harm(tmp_path / "cache" / "stage-1" / "weights")
        assert stage.result(tmp_path / "run") == stage.result() == "fit 2"
        assert f"warning: {tmp_path / 'cache' / 'stage-1'}: weights " in capsys.readouterr().err
        assert (tmp_path / "run" / "weights").read_text() == "fit 2"

    def test_the_files_of_runs_before_are_not_written_into(self, tmp_path: Path):
        stage = Stage(tmp_path / "cache")
        stage.result(tmp_path / "ended")
        (tmp_path / "cache" / "stage-1" / "checksums.json").unlink()
        (tmp_path / "cache" / "stage-1" / "checksums.json").write_text("{")  # another file than the run's
        assert stage.result(tmp_path / "next") == "fit 2"
        assert (tmp_path / "ended" / "weights").read_text() == "fit 1"
        assert damage(tmp_path / "ended") is None

    @pytest.mark.parametrize("root", [None, "cache"])
    def test_a_damaged_stage_of_the_run_itself(self, tmp_path: Path, root: str | None):
        stage = Stage(tmp_path / root if root else None)
        stage.result(tmp_path / "run")
        flip(tmp_path / "run" / "weights")  # and of the cache, whose file it is
        assert stage.result(tmp_path / "run") == "fit 2"
        assert stage.result(tmp_path / "run") == "fit 2"

    def test_a_run_of_old_has_no_checksums(self, tmp_path: Path):
        stage = Stage(None)
        stage.result(tmp_path / "run")
        (tmp_path / "run" / "checksums.json").unlink()
        assert stage.result(tmp_path / "run") == "fit 1"

    def test_log_probs_that_are_not_finite_are_not_kept(self, tmp_path: Path):
        model = build(ARCHITECTURES["llama"])
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))
        with pytest.raises(NotFiniteError, match="log-probs of the data's responses are not finite"):
            kept_logps(None, str(tmp_path), asking(model), some_rows())
        assert not [path for path in tmp_path.iterdir() if path.is_dir()]


class TestCheckpoints:
    def written(self, directory: Path, *steps: int) -> Path:
        for step in steps:
            place = directory / f"step-{step}"
            place.mkdir(parents=True)
            (place / "weights").write_text(f"of step {step}")
            write_json(place / "work.json", {})
            seal(place)
        return directory

    def test_other_names_are_none(self, tmp_path: Path):
        directory = self.written(tmp_path, 5, 10, 100)
        for name in ("step-abc", "step-", "step-7.tmp", ".step-9.tmp"):
            (directory / name).mkdir()
        (directory / "step-11").touch()
        assert [path.name for path in checkpoints(directory)] == ["step-5", "step-10", "step-100"]
        assert checkpoints(tmp_path / "none") == []

    @pytest.mark.parametrize("harm", DAMAGES)
    def test_the_one_before_a_damaged_one_is_used(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: Callable[[Path], None]
    ):
        directory = self.written(tmp_path, 5, 10)
        harm(directory / "step-10" / "weights")
        discard_damaged(Accelerator(cpu=True), directory)
        assert os.listdir(directory) == ["step-5"]
        assert f"{directory / 'step-10'}: weights " in capsys.readouterr().err
        harm(directory / "step-5" / "weights")
        discard_damaged(Accelerator(cpu=True), directory)
        assert os.listdir(directory) == []
