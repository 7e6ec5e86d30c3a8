"""Folders of a stranger: whatever lies in a run, a sweep or a model, reading it runs nothing and changes nothing."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.utils.other import load as accelerate_load
from run_directories import summary as told_summary
from run_directories import write_run
from running import Finished, mopo, read_json
from transformers import LlamaConfig, LlamaForCausalLM

from mopo_cli.algorithms.mopo.rows import read_checkpoint
from mopo_cli.base import invocation
from mopo_cli.base.errors import UserError
from mopo_cli.base.files import write_atomic
from mopo_cli.base.secrets import MASK
from mopo_cli.commands.export import copy_model
from mopo_cli.config import compose, schema
from mopo_cli.config.schema import LoggerConfig, ModelConfig
from mopo_cli.data.prepare import load
from mopo_cli.evaluation.entrants import finished_run
from mopo_cli.models.hub import check_adapter
from mopo_cli.models.load import load_classifier, load_policy
from mopo_cli.models.policy import saved_weights
from mopo_cli.models.tokenizers import saved_tokenizer, train_tokenizer
from mopo_cli.runs.directory import RunDirectory, check_same_settings, claim
from mopo_cli.runs.find import sweep_entries
from mopo_cli.runs.session import resume_command
from mopo_cli.runs.tracking import Tracker
from mopo_cli.sweeps.points import compose_point, expand, identity, settings_of
from mopo_cli.sweeps.results import write_results
from mopo_cli.sweeps.search import Optuna

Run = Callable[..., Finished]
OWN = "mopo_cli.data.computed.concise"
TOKEN = "hf_abcdefghijklmnopqrstuvwx"


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is there where anything of the stranger's was run; and things of theirs that would make it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "shared_scorer", raising=False)
    marker = here / "was_here"
    (here / "evil.pkl").write_bytes(pickle.dumps(Evil(marker)))
    torch.save({"a": Evil(marker)}, here / "evil.pt")
    (here / "shared_scorer.py").write_text(
        f"open({str(marker)!r}, 'w').close()\ndef f(prompt, response, context):\n    return 0.0\n"
    )
    return marker


def settings(*overrides: str) -> dict[str, Any]:
    """A run's config as `mopo train` writes it."""
    composed = compose.compose("train", ["logger=none", "run.name=x", *overrides])
    return yaml.safe_load(compose.to_yaml(composed))


def shared_run(path: Path, values: dict[str, Any]) -> Path:
    """A run directory that somebody gave us."""
    (path / "model").mkdir(parents=True)
    (path / "model" / "model.safetensors").write_bytes(b"")
    (path / "config.yaml").write_text(yaml.safe_dump(values))
    (path / "summary.json").write_text(json.dumps(told_summary({"helpful": 0.6, "harmless": 0.6}, {}, False, (), 0)))
    (path / "status.json").write_text(json.dumps({"state": "done", "step": 4, "error": None}))
    return path


def changed(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    *parents, last = key.split(".")
    node = values
    for parent in parents:
        node = node[parent]
    node[last] = value
    return values


READERS = {
    "eval": ("eval", "run=shared"),
    "eval as judge": ("eval", "judge=shared", "responses=r.jsonl"),
    "sample": ("sample", "run=shared", "prompt=Hi"),
    "export": ("export", "run=shared", "to=out"),
}
EVIL = {
    "pandas.read_pickle": ("dataset", {"_target_": "pandas.read_pickle", "filepath_or_buffer": "evil.pkl"}),
    "shutil.copy": ("dataset", {"_target_": "shutil.copy", "src": "evil.pkl", "dst": "was_here"}),
    "setuptools._distutils.spawn.spawn": (
        "dataset",
        {"_target_": "setuptools._distutils.spawn.spawn", "cmd": ["touch", "was_here"]},
    ),
    "torch.load": (
        "objectives.concise.computed",
        {"_target_": OWN, "x": {"_target_": "torch.load", "f": "evil.pt", "weights_only": False}},
    ),
    "shared_scorer.f": ("objectives.concise.computed", {"_target_": "shared_scorer.f"}),
    "mopo_cli.base.files.shutil.copy": (
        "dataset",
        {"_target_": "mopo_cli.base.files.shutil.copy", "src": "evil.pkl", "dst": "was_here"},
    ),
    "hydra.utils.get_method": (
        "dataset.parts",
        [{"a": [{"_target_": "hydra.utils.get_method", "path": "shared_scorer.f"}]}],
    ),
    "algorithm._target_=shared_scorer.f": ("algorithm._target_", "shared_scorer.f"),
    "model.trust_remote_code=True": ("model.trust_remote_code", True),
}


class TestConfigsOfRuns:
    @pytest.mark.parametrize(
        ("reader", "named"),
        [*(("sample", named) for named in EVIL), *((reader, "torch.load") for reader in READERS if reader != "sample")],
    )
    def test_run_no_code_of_others(self, run_here: Run, here: Path, marker: Path, reader: str, named: str):
        key, value = EVIL[named]
        shared_run(here / "shared", changed(settings(), key, value))
        (here / "r.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
        done = run_here(*READERS[reader])
        assert done.status == 2
        assert f"shared/config.yaml: {key.partition('.parts')[0]}" in done.err
        assert named in done.err
        assert "give allow_code=true" in done.err
        assert done.err.count("\n") == 1
        assert not marker.exists()
        assert os.getcwd() not in sys.path
        assert not (here / "out").exists()

    def test_run_it_where_this_command_line_allows_it(self, run_here: Run, here: Path, marker: Path):
        values = changed(
            settings(), "dataset", {"_target_": "shared_scorer.f", **dict.fromkeys(("prompt", "response"))}
        )
        shared_run(here / "shared", values)
        assert "shared_scorer.f" in run_here("eval", "run=shared").err
        assert not marker.exists()
        run_here("eval", "run=shared", "allow_code=true")
        assert marker.exists()

    @pytest.mark.parametrize("text", ["'${oc.env:SECRET}'", '"\\x24{oc.env:SECRET}"', "'\\${oc.env:SECRET}'"])
    def test_do_not_ask_the_environment(self, run_here: Run, here: Path, monkeypatch: pytest.MonkeyPatch, text: str):
        monkeypatch.setenv("SECRET", "hunter2")
        shared = shared_run(here / "shared", settings())
        config = (shared / "config.yaml").read_text()
        (shared / "config.yaml").write_text(config.replace("name: x\n", f"name: {text}\n"))
        for reader in ("eval", "sample", "export"):
            done = run_here(*READERS[reader])
            assert done.status == 2
            assert "shared/config.yaml: run.name=" in done.err
        assert run_here("report", "run=shared", "figures=false").status == 0
        assert not any("hunter2" in path.read_text(errors="replace") for path in here.rglob("*") if path.is_file())

    def test_are_shown_without_running_them(self, run_here: Run, here: Path, marker: Path):
        named = {"dataset._target_": "shared_scorer.f", "run.name": "<script>alert(1)</script>"}
        run = write_run(here / "sweep" / "runs" / "a", {"helpful": 0.6, "harmless": 0.5}, settings=named)
        for arguments in ((f"run={run}",), ("sweep=sweep",), ("runs=['sweep/runs/*']",)):
            assert run_here("report", *arguments, "figures=false").status == 0
        assert "<script>alert" not in (run / "report.html").read_text()
        assert not marker.exists()

    def test_a_run_goes_on_with_what_the_command_line_says(self, here: Path, marker: Path):
        evil = {"_target_": "pandas.read_pickle", "filepath_or_buffer": "evil.pkl"}
        run = RunDirectory(shared_run(here / "shared", changed(settings(), "dataset", evil)))
        with pytest.raises(UserError, match=r"shared/config.yaml: dataset._target_=pandas.read_pickle names code"):
            check_same_settings(run, settings())
        with pytest.raises(UserError, match=r"model.trust_remote_code=True runs Python code"):
            check_same_settings(
                RunDirectory(shared_run(here / "b", changed(settings(), "model.trust_remote_code", True))), settings()
            )
        own = changed(settings(), "objectives.concise.computed", {"_target_": "mine.f"})
        check_same_settings(RunDirectory(shared_run(here / "own", own)), own)
        assert not marker.exists()

    def test_a_function_that_the_command_line_names_is_found(self, run_here: Run, marker: Path):
        done = run_here("data", "dataset=pairs", "dataset.path=nowhere.jsonl")
        assert (done.status, os.getcwd() in sys.path) == (2, False)
        done = run_here("data", "dataset=pairs", "dataset.path=nowhere.jsonl", "dataset._target_=shared_scorer.f")
        assert (done.status, marker.exists()) == (2, True)


class TestLinks:
    @pytest.fixture
    def victim(self, here: Path) -> Path:
        victim = here / "victim"
        victim.mkdir()
        (victim / "key.json").write_text("private")
        return victim

    def linked(self, run: Path, place: str, victim: Path) -> Path:
        """A shared run of which one thing is a link to somebody else's."""
        path = shared_run(run, settings()) / place
        if path.is_dir():
            (path / "model.safetensors").unlink()
            path.rmdir()
        path.unlink(missing_ok=True)
        path.symlink_to(victim / "key.json" if "." in place else victim)
        return run

    @pytest.mark.parametrize("place", ["model", "summary.json", "metrics.jsonl"])
    def test_out_of_a_run_are_neither_read_nor_written_through(
        self, run_here: Run, here: Path, victim: Path, place: str
    ):
        self.linked(here / "shared", place, victim)
        readers = [READERS[name] for name in ("eval", "sample", "export")]
        for arguments in (*readers, ("report", "run=shared"), ("train", "run.dir=shared", "run.resume=true")):
            done = run_here(*arguments)
            assert done.status == 2, arguments
            assert f"shared/{place}: a link to {victim}" in done.err
        assert (victim / "key.json").read_text() == "private"
        assert [path.name for path in victim.iterdir()] == ["key.json"]
        assert not (here / "out").exists()

    @pytest.mark.parametrize("place", ["figures", "checkpoints", ".lock", "model/more.json", "model/more",
                                       "report.html", "config.yaml", "evaluation.json"])  # fmt: skip
    def test_wherever_they_lie(self, here: Path, victim: Path, place: str):
        run = self.linked(here / "shared", place, victim)
        for read in (lambda: claim(run, resume=True), lambda: finished_run(str(run))):
            with pytest.raises(UserError, match=f"shared/{place}: a link to {victim}"):
                read()
        assert (victim / "key.json").read_text() == "private"

    def test_out_of_a_sweep(self, run_here: Run, here: Path, victim: Path):
        shared_run(here / "sweep" / "runs" / "tau=0.1", settings())
        (here / "sweep" / "results.csv").symlink_to(victim / "key.json")
        for arguments in (("report", "sweep=sweep"), ("sweep", "tau=0.1", "sweep.dir=sweep", "sweep.dry_run=true")):
            done = run_here(*arguments)
            assert (done.status, "sweep/results.csv: a link to" in done.err) == (2, True)

    def test_inside_of_it_stay_and_so_do_those_of_wandb(self, here: Path, victim: Path):
        run = write_run(here / "a", {"helpful": 0.6}, finished=False)
        (run / "again.json").symlink_to("status.json")
        (run / "wandb").mkdir()
        (run / "wandb" / "core.log").symlink_to(victim / "key.json")
        (run / "status.json").write_text('{"state": "failed"}')
        assert claim(run, resume=True).path == run

    def test_that_wait_under_a_temporary_name_are_not_written_through(self, here: Path, victim: Path):
        (here / f".a.json.{os.getpid()}.tmp").symlink_to(victim / "key.json")
        write_atomic(here / "a.json", "mine")
        assert ((here / "a.json").read_text(), (victim / "key.json").read_text()) == ("mine", "private")

    def test_and_ids_of_a_sweep_lead_nowhere_else(self, here: Path):
        ids = ["a", "../a", "/etc", "a/b", "..", "", ".", 3]
        (here / "sweep.json").write_text(json.dumps({"runs": [{"id": name, "overrides": {}} for name in ids]}))
        assert [entry["id"] for entry in sweep_entries(here)] == ["a"]


class TestExportedFiles:
    def test_are_of_known_kinds_and_no_links(self, here: Path, marker: Path, capsys: pytest.CaptureFixture[str]):
        model = here / "model"
        (model / "additional_chat_templates").mkdir(parents=True)
        names = ("model.safetensors", "config.json", "merges.txt", "tokenizer.model", "chat_template.jinja",
                 "additional_chat_templates/tool.jinja", "LICENSE")  # fmt: skip
        for name in (*names, "pytorch_model.bin", "modeling_evil.py", "optimizer.pt", "run.sh", "training_args.bin"):
            (model / name).write_bytes((here / "evil.pkl").read_bytes())
        (model / "own.json").symlink_to("config.json")
        copy_model(model, here / "out")
        assert sorted(str(p.relative_to(here / "out")) for p in (here / "out").rglob("*") if p.is_file()) == sorted(
            names
        )
        assert "left out, as a model needs no such files: modeling_evil.py, optimizer.pt" in capsys.readouterr().err
        (model / "model.safetensors").unlink()
        with pytest.raises(UserError, match=r"its weights are in optimizer.pt|in pytorch_model.bin"):
            copy_model(model, here / "again")
        assert not (here / "again").exists()


class TestModels:
    @pytest.fixture
    def folder(self, here: Path) -> Path:
        """A tiny model with its tokenizer."""
        tokenizer = train_tokenizer(
            ["a b c"], compose.typed(compose.compose("train", []), schema.TrainConfig).model.tokenizer
        )
        config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                             num_attention_heads=1, eos_token_id=1)  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(here / "llama")
        tokenizer.save_pretrained(here / "llama")
        return here / "llama"

    def policy(self, folder: Path) -> Any:
        config = ModelConfig(path=str(folder), max_length=16)
        return load_policy(config, saved_tokenizer(folder), 0)

    def test_pickled_weights_are_refused(self, folder: Path, marker: Path):
        model = self.policy(folder)
        (folder / "model.safetensors").unlink()
        torch.save({"lm_head.weight": Evil(marker)}, folder / "pytorch_model.bin")
        told = r"its weights are in pytorch_model.bin; mopo reads safetensors only"
        with pytest.raises(UserError, match=f"model.path={folder}: {told}"):
            self.policy(folder)
        with pytest.raises(UserError, match=f"scorers.x.path={folder}: {told}"):
            load_classifier(ModelConfig(path=str(folder)), "scorers.x")
        with pytest.raises(UserError, match=f"^{folder}: {told}"):
            saved_weights(model, folder)
        assert not marker.exists()

    def test_of_both_forms_the_safe_one_is_read(self, folder: Path, marker: Path):
        torch.save({"lm_head.weight": Evil(marker)}, folder / "pytorch_model.bin")
        model = self.policy(folder)
        assert set(saved_weights(model, folder)) == set(model.state_dict())
        assert not marker.exists()

    def test_code_beside_a_model_is_not_run_and_nobody_is_asked(
        self, folder: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
    ):
        model = self.policy(folder)
        monkeypatch.setattr("builtins.input", lambda text: pytest.fail(text))
        tokenizer = saved_tokenizer(folder)
        for name in ("modeling_evil", "tokenization_evil"):
            (folder / f"{name}.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Evil: pass\n")
        maps = {
            "config.json": {"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"},
            "tokenizer_config.json": {"AutoTokenizer": ["tokenization_evil.Evil", None]},
        }
        for name, entry in maps.items():
            values = {**read_json(folder / name), "auto_map": entry, "model_type": "evil", "tokenizer_class": "Evil"}
            (folder / name).write_text(json.dumps(values))
        with pytest.raises(UserError, match="trust_remote_code=true runs it"):
            load_policy(ModelConfig(path=str(folder), max_length=16), tokenizer, 0)
        with pytest.raises(ValueError, match="custom code"):
            saved_tokenizer(folder)
        assert set(saved_weights(model, folder)) == set(model.state_dict())
        assert not marker.exists()

    def test_a_checkpoint_is_read_without_its_code(self, here: Path, marker: Path):
        (here / "alignment.json").write_text("{}")
        (here / "evil.pt").rename(here / "alignment.pt")
        for read in (lambda: read_checkpoint(here), lambda: accelerate_load(here / "alignment.pt")):
            with pytest.raises(Exception, match=r"weights_only|Weights only|alignment"):
                read()
        assert not marker.exists()

    def test_an_adapter_may_not_name_a_module(self, here: Path):
        (here / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x", "megatron_config": {"a": 1},
                        "megatron_core": "shared_scorer"}))  # fmt: skip
        with pytest.raises(UserError, match="megatron_config names a module"):
            check_adapter(here)

    def test_a_chat_template_runs_in_a_sandbox(self, folder: Path, marker: Path):
        tokenizer = saved_tokenizer(folder)
        reach = "''.__class__.__mro__[1].__subclasses__()"
        tokenizer.chat_template = f"{{% for c in {reach} %}}{{{{ c.__name__ }}}}{{% endfor %}}"
        with pytest.raises(Exception, match="unsafe"):
            tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)


class TestSecrets:
    def test_stand_in_no_config_and_no_command(self, here: Path):
        invocation.begin(["train", f"run.name={TOKEN}", "dataset.path=https://u:hunter2@h/x.jsonl"])
        try:
            line = invocation.line()
        finally:
            invocation.begin([])
        assert line == f"mopo train run.name={MASK} dataset.path=https://{MASK}@h/x.jsonl"
        told = resume_command(RunDirectory(here / "a"), ["dataset.path=https://u:hunter2@h/x"])
        assert "hunter2" not in told
        values = settings("dataset=pairs", "dataset.path=https://u:hunter2@h/x.jsonl")
        assert values["dataset"]["path"] == f"https://{MASK}@h/x.jsonl"

    def test_a_run_goes_on_with_the_secret_given_again(self, here: Path):
        own = "dataset.path=https://u:hunter2@h/x.jsonl"
        run = RunDirectory(shared_run(here / "a", settings("dataset=pairs", own)))
        now = compose.plain(compose.compose("train", ["logger=none", "run.name=x", "dataset=pairs", own]))
        check_same_settings(run, now)
        assert identity(run.settings()) == identity(now)
        with pytest.raises(UserError, match=r"with the secret, which was masked when it was written"):
            check_same_settings(run, settings("dataset=pairs"))

    def test_where_a_masked_value_is_needed_it_is_asked_for(self, here: Path):
        values = settings("dataset=pairs", "dataset.path=https://u:hunter2@h/x.jsonl")
        with pytest.raises(UserError, match=rf"dataset.path=https://{MASK}@h/x.jsonl: its secret was masked"):
            load(values["dataset"], {"a": schema.ObjectiveConfig(role="primary")})

    def test_nor_in_states_sweeps_and_reports(self, run_here: Run, here: Path):
        run = RunDirectory(write_run(here / "sweep" / "runs" / "a", {"helpful": 0.6, "harmless": 0.5},
                                     settings={"dataset.path": "https://u:hunter2@h/x"}))  # fmt: skip
        told = read_json(run.summary)
        run.summary.write_text(json.dumps({**told, "command": f"mopo train run.name={TOKEN}"}))
        (here / "sweep" / "sweep.json").write_text(
            json.dumps({"runs": [{"id": "a", "overrides": {"dataset.path": "https://u:hunter2@h/x"}}]})
        )
        assert run_here("report", f"run={run.path}", "figures=false").status == 0
        assert run_here("report", "sweep=sweep", "figures=false").status == 0
        write_results(here, [], "done")
        run.set_state("failed", error="401 for https://u:hunter2@h/x")
        for path in (run.report, here / "sweep" / "report.html", run.status):
            text = path.read_text()
            assert MASK in text
            assert TOKEN not in text
            assert "hunter2" not in text

    def test_nor_in_a_points_name_and_tags(self, here: Path):
        (point,) = expand(["+dataset.note=choice(hf_abcdefghijklmnopqrstuvwx)"])
        trial = compose_point(point, here, None)
        assert TOKEN not in trial.point.id
        assert TOKEN not in str(trial.composed.logger.tags)
        assert settings_of(trial)["dataset"]["note"] == TOKEN  # which the run needs

    def test_nor_in_an_error(self, run_here: Run):
        for more in ((), ("debug=true",)):
            done = run_here("data", "dataset=pairs", f"dataset.path=nowhere/{TOKEN}/x.jsonl", *more)
            assert (done.status, TOKEN in done.err, MASK in done.err) == (2, False, True)

    def test_nor_in_what_wandb_keeps(self, here: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(sys, "argv", ["mopo", "train", f"run.name={TOKEN}"])
        logger = LoggerConfig(name="wandb", mode="offline", tags=[f"run.name={TOKEN}"])
        values = {"run": {"name": TOKEN}, "dataset": {"path": "https://u:hunter2@h/x"}}
        (here / "run").mkdir()
        tracker = Tracker(RunDirectory(here / "run"), logger, values, TOKEN)
        tracker.log(1, loss=1.0)
        tracker.finish()
        kept = [path for path in (here / "run").rglob("*") if path.is_file() and not path.is_symlink()]
        assert any(path.suffix == ".wandb" for path in kept)
        for path in kept:
            assert TOKEN.encode() not in path.read_bytes(), path
            assert b"hunter2" not in path.read_bytes(), path


class TestSweeps:
    def test_a_search_takes_up_only_points_that_it_could_have_proposed(self):
        pytest.importorskip("optuna")
        search = Optuna(trials=3)
        grid = ["tau=interval(0.05,1)", "algorithm=choice(mopo,dpo)"]
        earlier = [
            {"tau": "0.1", "algorithm": "dpo"},
            {"tau": "${oc.env:SECRET}", "algorithm": "dpo"},
            {"tau": "0.1", "algorithm": "${oc.env:SECRET}"},
            {"tau": "5", "algorithm": "dpo"},
            {"tau": None, "algorithm": "dpo"},
        ]
        search.open([grid], (), earlier)
        assert search.earlier == earlier[:1]


def test_python_m_does_not_find_modules_of_the_folder(tmp_path: Path):
    (tmp_path / "hydra.py").write_text(f"open({str(tmp_path / 'was_here')!r}, 'w').close()")
    assert mopo("train", "--cfg", "job", cwd=tmp_path).status == 0
    assert not (tmp_path / "was_here").exists()
