"""A little of `make torture`: command lines and rows made at random end in success or in an error of ours."""

from __future__ import annotations

from pathlib import Path

import pytest
from torture import overrides, rows

SEED = 7


@pytest.mark.usefixtures("here")
def test_overrides():
    assert overrides.fuzz(SEED, 200) == []


def test_rows(here: Path):
    assert rows.fuzz(SEED, 200) == []


def test_a_fault_would_be_found(here: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(*_: object) -> None:
        raise KeyError("a fault")

    monkeypatch.setattr(rows.prepare, "load", fails)
    assert len(rows.fuzz(SEED, 3)) == 3
    monkeypatch.setitem(overrides.CALLED, "data", fails)
    with overrides.stopped():
        assert isinstance(overrides.wrong(["data", "seed=1"]), KeyError)
        assert overrides.wrong(["data", "sead=1"]) is None
