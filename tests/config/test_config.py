"""From the command line to a typed config: every option composes, and every mistake gets a message to act on."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import get_method
from omegaconf import OmegaConf

from mopo_cli import cli
from mopo_cli.base.errors import UserError
from mopo_cli.config import compose, schema
from mopo_cli.data.prepare import COMMON_KEYS

CONF = Path(__file__).parents[2] / "conf"
GROUPS = [group for group in compose.command_groups("train") if group != "experiment"]
OPTIONS = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
PRESETS = sorted((CONF / "experiment").glob("*.yaml"))


def train(*overrides: str) -> schema.TrainConfig:
    return compose.typed(compose.compose("train", list(overrides)), schema.TrainConfig)


def data(*overrides: str) -> schema.DataConfig:
    return compose.typed(compose.compose("data", list(overrides)), schema.DataConfig)


def options(*groups: str) -> list[tuple[str, str]]:
    return [(group, option) for group, option in OPTIONS if group in groups]


def error(*overrides: str, command: str = "train") -> str:
    run = train if command == "train" else data
    with pytest.raises(UserError) as caught:
        run(*overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestOptions:
    @pytest.mark.parametrize(("group", "option"), OPTIONS)
    def test_composes_into_a_train_config(self, group: str, option: str):
        train(f"{group}={option}")
        composed = compose.compose("train", [f"{group}={option}"])
        assert set(composed) <= set(schema.TrainConfig.__dataclass_fields__)  # else it would be ignored

    @pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
    def test_a_preset_composes_with_its_own_command_only(self, preset: Path):
        command = OmegaConf.load(preset).experiment.command
        override = [f"experiment={preset.stem}"]
        compose.compose(command, override)
        compose.check_experiment(command, override)
        for other in {"train", "sweep", "synthetic", "plan"} - {command}:
            with pytest.raises(UserError, match=f"this preset is for `mopo {command}`, not for `mopo {other}`"):
                compose.check_experiment(other, override)

    @pytest.mark.parametrize(("group", "option"), options("dataset", "objectives"))
    def test_composes_into_a_data_config(self, group: str, option: str):
        data(f"{group}={option}")
        composed = compose.compose("data", [f"{group}={option}"])
        assert set(composed) == set(schema.DataConfig.__dataclass_fields__)

    @pytest.mark.parametrize("option", [option for _, option in options("algorithm")])
    def test_an_algorithm_takes_the_arguments_of_its_file(self, option: str):
        node = train(f"algorithm={option}").algorithm
        target = get_method(node.pop("_target_"))
        assert set(node) - {"name"} <= set(inspect.signature(target).parameters)

    @pytest.mark.parametrize("option", [option for _, option in options("dataset")])
    def test_a_data_set_takes_the_arguments_of_its_file(self, option: str):
        node = train(f"dataset={option}").dataset
        target = get_method(node.pop("_target_"))
        taken = set(inspect.signature(target).parameters)
        assert set(node) - set(COMMON_KEYS) == taken - {"max_rows"}  # which some bound their own reading by
        assert set(COMMON_KEYS) <= set(node)

    @pytest.mark.parametrize("option", [option for _, option in options("objectives")])
    def test_an_objective_set_has_every_key_and_scorers_that_exist(self, option: str):
        for node in train(f"objectives={option}").objectives.values():
            assert node.computed is None or callable(get_method(node.computed["_target_"]))
        composed = compose.compose("data", [f"objectives={option}"])
        for node in composed.objectives.values():  # else objectives.NAME.threshold=0.6 would be no such key
            assert set(node) == set(schema.ObjectiveConfig.__dataclass_fields__)

    def test_a_users_own_directory_adds_options(self, tmp_path: Path):
        (tmp_path / "objectives").mkdir()
        (tmp_path / "objectives" / "mine.yaml").write_text("witty: {role: primary}\nkind: {threshold: 0.6}\n")
        composed = compose.compose("data", ["objectives=mine"], str(tmp_path))
        typed = compose.typed(composed, schema.DataConfig)
        assert typed.objectives["witty"] == schema.ObjectiveConfig(role="primary")
        assert typed.objectives["kind"] == schema.ObjectiveConfig(role="secondary", threshold=0.6)

    def test_a_missing_directory(self, tmp_path: Path):
        with pytest.raises(UserError, match=r"--config-dir .*nowhere: no such directory"):
            compose.compose("data", [], str(tmp_path / "nowhere"))


class TestUnknownKeys:
    def test_names_what_is_allowed_at_that_place(self):
        text = error("foo=1")
        assert text.startswith("foo: no such key. Allowed: ")
        assert "tau" in text
        assert "batch_size" in text

    @pytest.mark.parametrize(
        ("override", "meant"),
        [
            ("batch_sise=3", "batch_size"),
            ("Tau=1", "tau"),
            ("objectives.harmles.threshold=0.6", "objectives.harmless.threshold"),
            ("objectives.harmless.treshold=0.6", "objectives.harmless.threshold"),
            ("model.lora.rr=3", "model.lora.r"),
            ("max_length=3", "model.max_length"),
            ("optimizer.learning_rate=3", "optimiser.learning_rate"),
            ("~objectives.conciss", "objectives.concise"),
        ],
    )
    def test_suggests_the_key_that_was_meant(self, override: str, meant: str):
        key = override.lstrip("~").partition("=")[0]
        assert error(override).startswith(f"{key}: no such key (did you mean {meant}?). Allowed")

    def test_lists_the_siblings_of_a_nested_key(self):
        assert error("objectives.harmles.threshold=0.6").endswith("Allowed in objectives: helpful, harmless, concise")
        assert error("tau.x=1").startswith("tau.x: no such key (did you mean tau?). Allowed: ")

    def test_suggests_from_the_groups_that_the_user_chose(self):
        text = error("dataset=pairs", "dataset.pth=x", "objectives=qa", command="data")
        assert text.startswith("dataset.pth: no such key (did you mean dataset.path?). Allowed in dataset: ")
        assert "chosen_means" in text
        assert "data_seed" not in text
        assert "objectives.human.threshold" in error("objectives=qa", "objectives.humann.threshold=0.6")

    def test_suggests_from_a_users_own_option(self, tmp_path: Path):
        (tmp_path / "objectives").mkdir()
        (tmp_path / "objectives" / "mine.yaml").write_text("witty: {role: primary, threshold: null}\n")
        with pytest.raises(UserError, match=r"did you mean objectives\.witty\.role\?"):
            compose.compose("data", ["objectives=mine", "objectives.wity.role=primary"], str(tmp_path))


class TestWrongValues:
    def test_an_unknown_option_lists_the_options(self):
        text = error("dataset=par")
        assert text.startswith("dataset=par: no such option (did you mean pairs?). Allowed: assistant, ")
        assert "qa_feedback" in text
        assert error("hparams=zzz").startswith("hparams=zzz: no such option. Allowed: default")

    def test_an_override_that_cannot_be_read(self):
        assert error("tau").startswith("cannot read the override 'tau': expected key=value")
        assert error("tau=[1").startswith("cannot read the override 'tau=[1'")
        assert error("dataset=null")

    @pytest.mark.parametrize(
        "override",
        ["tau=big", "seed=1.5", "steps=many", "model.lora.r=x", "objectives.harmless.threshold=high", "debug=maybe"],
    )
    def test_a_wrong_type_names_the_key(self, override: str):
        key, _, value = override.partition("=")
        text = error(override)
        assert text.startswith(f"{key}: ")
        assert value in text

    @pytest.mark.parametrize(
        ("override", "allowed"),
        [
            ("tau=0", "above 0"),
            ("tau=-0.1", "above 0"),
            ("tau=inf", "above 0"),
            ("tau=nan", "above 0"),
            ("beta=0", "(0, 1]"),
            ("beta=1.01", "(0, 1]"),
            ("epsilon=-0.1", "0 or more, or auto"),
            ("epsilon=inf", "0 or more, or auto"),
            ("epsilon=some", "0 or more, or auto"),
            ("epsilon=true", "0 or more, or auto"),
            ("t0=0.5", "whole number of steps, 1 or more, or inf"),
            ("t0=2.5", "whole number of steps, 1 or more, or inf"),
            ("t0=0", "whole number of steps, 1 or more, or inf"),
            ("t0=nan", "whole number of steps, 1 or more, or inf"),
            ("steps=0", "1 or more"),
            ("batch_size=0", "1 or more"),
            ("optimiser.learning_rate=0", "above 0"),
            ("model.init=scratch", "pretrained or random"),
            ("model.dtype=int8", "float32"),
            ("preference_model.form=linear", "bradley_terry or general"),
            ("objectives.harmless.threshold=0", "(0, 1)"),
            ("objectives.harmless.threshold=1", "(0, 1)"),
            ("objectives.harmless.threshold=60", "(0, 1)"),
            ("objectives.harmless.margin=-1", "0 or more"),
            ("objectives.harmless.role=tertiary", "primary or secondary"),
        ],
    )
    def test_a_value_out_of_range_names_key_value_and_range(self, override: str, allowed: str):
        key, _, value = override.partition("=")
        text = error(override)
        assert text.startswith(f"{key}={'True' if value == 'true' else value}")
        assert allowed in text

    @pytest.mark.parametrize(
        ("override", "expected"),
        [("epsilon=auto", "auto"), ("epsilon=0", 0), ("epsilon=0.15", 0.15), ("t0=inf", math.inf), ("t0=1", 1.0)],
    )
    def test_values_at_the_edge(self, override: str, expected: object):
        assert getattr(train(override), override.partition("=")[0]) == expected
        assert train("beta=1", "tau=1e-6").beta == 1

    def test_a_threshold_on_the_primary(self):
        text = error("objectives.helpful.threshold=0.6")
        assert text.startswith(
            "objectives.helpful.threshold: the primary objective is maximised and takes no threshold"
        )

    def test_exactly_one_primary(self):
        assert "found none among helpful, harmless, concise" in error("objectives.helpful.role=secondary")
        assert "found 2 (helpful, harmless)" in error(
            "objectives.harmless.role=primary", "objectives.harmless.threshold=null"
        )
        assert "found none among nothing" in error("~objectives")


class TestCommandLine:
    def test_a_mistake_is_one_line_and_status_2(self, capsys: pytest.CaptureFixture[str]):
        assert cli.main(["data", "dataset=par"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("mopo: dataset=par: no such option")
        assert err.count("\n") == 1

    def test_cfg_prints_the_composed_config(self, capsys: pytest.CaptureFixture[str]):
        assert cli.main(["data", "objectives=qa", "--cfg", "job"]) == 0
        shown: Any = OmegaConf.create(capsys.readouterr().out)
        assert list(shown.objectives) == ["human", "grounded", "concise"]
