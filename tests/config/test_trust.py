"""What a config that lies in a run may name, and what it may not."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import get_object

from mopo_cli.base.errors import UserError
from mopo_cli.config import compose, trust

PATH = Path("run/config.yaml")
OWN = "mopo_cli.data.computed.concise"


def refused(values: Any) -> str:
    with pytest.raises(UserError) as told:
        trust.check_trusted(compose.with_current_names(values), PATH, allow_code=False)
    return str(told.value)


class TestTargets:
    def test_all_that_mopo_ships_and_nothing_that_lies_elsewhere(self):
        own = trust.own_targets()
        assert {OWN, "mopo_cli.data.computed.matches", "mopo_cli.data.corpora.pairs"} <= own
        assert {"mopo_cli.algorithms.mopo.Mopo", "mopo_cli.data.assistant.assistant"} <= own
        for target in own:
            assert get_object(target).__module__.startswith("mopo_cli."), target

    def test_every_shipped_config_is_trusted(self):
        for algorithm in compose.group_options("algorithm"):
            composed = compose.plain(compose.compose("train", [f"algorithm={algorithm}"]))
            trust.check_trusted(composed, PATH, allow_code=False)
        for dataset in compose.group_options("dataset"):
            trust.check_trusted(compose.plain(compose.compose("data", [f"dataset={dataset}"])), PATH, False)

    @pytest.mark.parametrize(
        "target",
        [
            "pandas.read_pickle",
            "shutil.copy",
            "os.system",
            "setuptools._distutils.spawn.spawn",
            "hydra.utils.get_method",
            "hydra.utils.instantiate",
            "builtins.exec",
            "mopo_cli.base.files.shutil.copy",
            "mopo_cli.base.files.os.system",
            "mopo_cli.data.corpora.Path",
            "mopo_cli.data.corpora.read_rows",
            "mopo_cli.data.computed.re.compile",
            "mopo_cli.config.compose.build",
            "mopo_cli.algorithms.dpo.copy.deepcopy",
            "mopo_cli.data.computed.concise.__globals__",
            " mopo_cli.data.computed.concise",
            "",
            None,
            ["os.system"],
        ],
    )
    def test_any_other_is_refused_wherever_it_stands(self, target: Any):
        node = {"_target_": target, "_partial_": True, "_args_": ["x"]}
        places = {
            "dataset._target_": {"dataset": node},
            "objectives.a.computed.x._target_": {"objectives": {"a": {"computed": {"_target_": OWN, "x": node}}}},
            "dataset.parts[1][0].y._target_": {"dataset": {"parts": [1, [{"y": node}]]}},
            "dataset._args_[0]._target_": {"dataset": {"_target_": OWN, "_args_": [node]}},
        }
        for key, values in places.items():
            told = refused(values)
            assert told.startswith(f"run/config.yaml: {key}="), told
            assert "names code that is no part of mopo" in told
            assert told.endswith("give allow_code=true")

    def test_names_of_old_are_those_of_today(self):
        values = compose.with_current_names({"algorithm": {"_target_": "mopo_cli.algorithms.dpo.Dpo"}})
        trust.check_trusted(values, PATH, allow_code=False)

    @pytest.mark.parametrize("value", [True, "true", "yes", 1, "no"])
    def test_a_models_own_code_is_refused(self, value: Any):
        assert "model.trust_remote_code=" in refused({"model": {"trust_remote_code": value}})

    def test_and_so_is_a_kernel_of_the_hub(self):
        assert "model.attention=someone/kernel runs a kernel" in refused({"model": {"attention": "someone/kernel"}})
        trust.check_trusted({"model": {"attention": "sdpa", "trust_remote_code": False}}, PATH, allow_code=False)


class TestOwnModules:
    @pytest.fixture(autouse=True)
    def _path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", list(sys.path))

    def test_are_found_where_they_are_named_only(self):
        trust.find_own_modules({"dataset": {"_target_": OWN}, "model": {"trust_remote_code": True}})
        trust.check_trusted({"dataset": {"_target_": OWN}}, PATH, allow_code=True)
        assert os.getcwd() not in sys.path
        trust.find_own_modules({"computed": {"_target_": "mine.f"}})
        assert sys.path[-1] == os.getcwd()

    def test_are_found_where_this_command_line_allows_it(self):
        refused({"computed": {"_target_": "mine.f"}})
        assert os.getcwd() not in sys.path
        trust.check_trusted({"computed": {"_target_": "mine.f"}}, PATH, allow_code=True)
        assert sys.path[-1] == os.getcwd()


class TestInterpolations:
    @pytest.mark.parametrize(
        "values",
        [
            {"run": {"name": "${oc.env:SECRET}"}},
            {"run": {"name": "a${oc.env:SECRET,none}b"}},
            {"a": ["${oc.decode:'1'}"]},
            {"a": "${now:%Y}"},
            {"a": "${${b}}", "b": "oc.env:SECRET"},
            {"a": "\\${oc.env:SECRET}"},
            {"a": "$", "b": "{oc.env:SECRET}", "c": "${a}${b}"},
            {"a": "${a}"},
            {"a": "${nowhere}"},
        ],
    )
    def test_of_anything_but_own_keys_are_refused(self, values: Any, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("SECRET", "hunter2")
        with pytest.raises(UserError, match=r"^run/config.yaml: ") as told:
            trust.resolved(values, PATH)
        assert "hunter2" not in str(told.value)

    def test_of_own_keys_are_resolved(self):
        values = {"tau": 0.1, "run": {"name": "tau-${tau}", "dir": "out/${.name}"}, "t0": "${tau}"}
        assert trust.resolved(values, PATH) == {"tau": 0.1, "run": {"name": "tau-0.1", "dir": "out/tau-0.1"}, "t0": 0.1}
