"""Overrides as a person types them: text is taken as typed, and what would have no effect is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from running import Finished

from mopo_cli import cli
from mopo_cli.base.errors import UserError
from mopo_cli.config import compose, schema
from mopo_cli.config.overrides import in_grammar, readable

Run = Callable[..., Finished]
ODD = [
    "a=b",
    "a (1)",
    "a[1]",
    "a'b",
    'a"b',
    "a#b",
    "é",
    "日本",
    "a b",
    "a{b}",
    "a\\b",
    "12",
    "1e3",
    "true",
    "a=b,c=d",
    "x\\",
]


def config(command: str, *overrides: str) -> Any:
    """The typed config of a command line."""
    record = getattr(schema, cli.COMMANDS[command].config or "TrainConfig")
    read = readable(overrides, command, record, compose.command_groups(command))
    return compose.typed(compose.compose(command, read), record)


def told(command: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        config(command, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestText:
    @settings(max_examples=200, deadline=None)
    @given(st.text(st.characters(exclude_characters="\x00"), max_size=12))
    def test_what_is_written_is_read(self, text: str):
        read = OverridesParser.create().parse_override(f"key={in_grammar(text)}").value()
        assert read == text

    @pytest.mark.parametrize("text", ODD)
    def test_a_path_or_a_name_is_taken_as_typed(self, text: str):
        assert config("report", f"run={text}").run == text
        assert config("export", f"to={text}").to == text

    def test_of_every_command(self):
        odd = "runs/tau=0.1,beta=0.9"
        assert config("train", f"run.dir={odd}").run.dir == odd
        assert config("train", "dataset=pairs", f"dataset.path={odd}").dataset["path"] == odd
        assert config("train", "model=local", f"model.path={odd}").model.path == odd
        assert config("eval", f"run={odd}", f"judge={odd}").run == odd
        assert config("data", f"json={odd}").json == odd
        assert (
            config("sample", f"prompts={odd}", "direction=helpful=0.8,concise=0.6").direction
            == "helpful=0.8,concise=0.6"
        )
        assert config("train", "run.name=1e3").run.name == "1e3"  # 1000.0 for Hydra
        assert config("train", "cache=null").cache is None

    def test_a_quoted_value_and_a_list_stay_what_they_are(self):
        assert config("report", "run='a=b'").run == "a=b"
        assert config("report", "runs=[a,'b=c']").runs == ["a", "b=c"]
        assert config("eval", "run=[a,b]").run == ["a", "b"]

    def test_a_comma_is_part_of_what_is_there(self, here: Path):
        assert (
            told("train", "run.dir=a,b") == "run.dir=a,b: one text is \"run.dir='a,b'\"; only `mopo sweep` tries values"
        )
        assert told("eval", "run=a,b").startswith("run=a,b: several are run=[a,b], one text is")
        (here / "a,b").mkdir()
        assert config("train", "run.dir=a,b").run.dir == "a,b"

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("runs=[a,b=c]", "a name with = or spaces in it stands in quotes: ['a=b', c]"),
            ("run=[a]", "run=[a]: must be one text; as that it is \"run='[a]'\""),
            ("samples=a#b", "as text it is \"samples='a#b'\""),
            ("=1", "cannot read the override '=1': expected key=value"),
        ],
    )
    def test_what_cannot_be_read_is_said_with_the_quoted_form(self, override: str, message: str):
        assert message in told("report", override)

    def test_a_sweep_still_takes_several(self, run_here: Run, here: Path):
        assert readable(["run.dir=a=b", "dataset.path=a,b", "tau=1,2"], "sweep", None, []) == [
            "run.dir='a=b'",
            "dataset.path=a,b",
            "tau=1,2",
        ]
        shown = run_here("sweep", "cache=a,b", "sweep.dir=x=y", "--cfg", "job")
        assert OmegaConf.create(shown.out).run.dir == "x=y/runs/cache=a"  # type: ignore[union-attr]


class TestWithoutEffect:
    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("hydra.run.dir=x", "hydra.run.dir=x: Hydra's own settings have no effect here; use run.dir=DIR"),
            ("hydra.verbose=true", "use debug=true"),
            ("hydra/launcher=basic", "use launcher="),
            ("+hydra.job.name=x", "Hydra's own settings have no effect here"),
            ("~tau", "~tau: a setting always has a value; give it another one (tau=...)"),
            ("~model", "~model: a setting always has a value"),
            ("~dataset.max_rows", "~dataset.max_rows: a setting always has a value"),
            ("~algorithm.extraction", "~algorithm.extraction: a setting always has a value"),
            ("~objectives.harmless.threshold", "~objectives.harmless.threshold: a setting always has a value"),
            ("+sweep.name=x", "+sweep.name=x: only `mopo sweep` and presets have sweep.*"),
            (
                "model.path=x",
                "model.path=x: model=tiny is made of random weights and would not read it; add model=local",
            ),
            ("tau=0.1,0.2", "tau=0.1,0.2: stands for several values; `mopo sweep` tries them"),
            ("model=null", "model=null: must be the name of one of its options"),
            ("dataset=../objectives/qa", "must be the name of one of its options"),
            ("scorers=[length]", "`mopo train` has no group scorers; it takes dataset, model, objectives, algorithm"),
        ],
    )
    def test_is_refused(self, override: str, message: str):
        assert message in told("train", override)

    def test_groups_of_other_commands(self):
        message = "model=tiny: `mopo data` has no group model; it takes dataset, objectives"
        assert told("data", "model=tiny") == message
        assert told("report", "dataset=pairs") == "dataset=pairs: `mopo report` has no group dataset; it takes none"

    def test_entries_of_mappings_may_go(self):
        assert "concise" not in config("train", "~objectives.concise").objectives
        assert list(config("train", "dataset=hh_rlhf", "~dataset.parts.helpful").dataset["parts"]) == ["harmless"]

    @pytest.mark.parametrize("command", ["eval", "sample"])
    def test_a_random_model_is_not_asked(self, command: str):
        assert "model=tiny: model.init=random makes weights that nobody has trained" in told(command, "model=tiny")
        assert told(command, "run=a", "model.path=b").startswith("run and model.path: give one")


class TestAsGivenOrRefused:
    @pytest.mark.parametrize(
        ("override", "key"),
        [
            ("steps=1.5", "steps"),
            ("steps=2.0", "steps"),
            ("steps=1e3", "steps"),
            ("steps=99999999999999999999", "steps"),
            ("seed=true", "seed"),
            ("seed=-1", "seed"),
            ("seed=4294967296", "seed"),
            ("tau=true", "tau"),
            ("optimiser.fused=2", "optimiser.fused"),
            ("run.resume=3", "run.resume"),
            ("steps=???", "steps"),
        ],
    )
    def test_no_number_is_bent(self, override: str, key: str):
        assert told("train", override).startswith(key)


class TestNames:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("../x", "run.name=../x: must be a name without /; run.dir=DIR puts it anywhere"),
            ("/x", "must be a name without /"),
            ("a/b", "must be a name without /"),
            ("", "run.name=: must be a name"),
            ("..", "run.name=..: must be a name"),
            ("a\tb", "must be a name of printable characters"),
            ("é" * 121, "must be 240 bytes or less; found 242"),
        ],
    )
    def test_that_no_directory_can_have(self, name: str, message: str):
        assert message in told("train", f"run.name={name}")

    def test_of_sweeps_and_evaluations(self):
        assert "name=../x: must be a name without /; dir=DIR" in told("eval", "name=../x")
        with pytest.raises(UserError, match=r"sweep\.name=a/b: must be a name without /; sweep\.dir=DIR"):
            compose.compose("sweep", ["sweep.name=a/b"])

    def test_paths_that_no_file_can_have(self):
        assert "must be 255 bytes or less between two /" in told("train", f"run.dir={'x' * 256}")
        assert "4095 in all" in told("report", f"run={'y/' * 2100}")
        assert "run=~nobody-here/x: no such user" in told("export", "run=~nobody-here/x")
        assert config("train", f"run.dir={'x' * 255}/y").run.dir.endswith("/y")
