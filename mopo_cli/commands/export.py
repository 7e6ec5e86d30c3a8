"""`mopo export`: a folder to share, with weights, tokenizer and a model card that says what was measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from safetensors import safe_open

from mopo_cli.base.console import say, stage, warn
from mopo_cli.base.errors import UserError
from mopo_cli.base.files import read_record, write_json
from mopo_cli.base.secrets import masked
from mopo_cli.config import compose
from mopo_cli.config.schema import ExportConfig
from mopo_cli.data.directions import directions_of
from mopo_cli.evaluation.card import model_card
from mopo_cli.evaluation.entrants import SHARED_SUMMARY, Entrant, finished_run
from mopo_cli.evaluation.loading import reading
from mopo_cli.evaluation.prompts import framed_text
from mopo_cli.models.hub import check_weights
from mopo_cli.models.tokenizers import saved_tokenizer
from mopo_cli.runs.find import newest_run
from mopo_cli.runs.session import quiet_libraries

PRIVATE = ("training_args.bin", "README.md")  # written anew, or of no use to others
KINDS = (".safetensors", ".json", ".txt", ".model", ".jinja", ".md", ".tiktoken")  # of a model's and tokenizer's files


def command(composed: DictConfig) -> int:
    """Write the folder, whole or not at all."""
    settings: ExportConfig = compose.typed(composed, ExportConfig)
    if not settings.to:
        raise UserError("to: not set; give the folder to write, as to=DIR")
    entrant = finished_run(settings.run or str(newest_run()), allow_code=settings.allow_code)
    target = Path(settings.to).expanduser()
    check_target(target, entrant.run.path, settings.overwrite)
    quiet_libraries()
    with stage("export", 1):
        adapter = (entrant.run.model / "adapter_config.json").is_file() and not settings.merge
        if adapter:
            check_base(entrant)
        temporary = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            write_folder(entrant, temporary, adapter, settings.merge)
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
        except OSError as error:
            raise UserError(f"to={target}: cannot be written ({error.strerror or error})") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    size = sum(path.stat().st_size for path in target.iterdir())
    say(f"\nfolder         {target} ({size / 2**20:.1f} MiB{', an adapter' if adapter else ''})")
    say(f"model card     {target / 'README.md'}")
    say(f"to share it    hf upload USER/NAME {target}")
    return 0


def check_target(target: Path, run: Path, overwrite: bool) -> None:
    """UserError where the folder must not be written, or holds something that is no model."""
    if target.exists() and not target.is_dir():
        raise UserError(f"to={target}: this is a file, not a directory")
    here, there = target.resolve(), run.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise UserError(f"to={target}: lies in the run's directory, or holds it; choose another folder")
    if not (target.is_dir() and any(target.iterdir())):
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        return
    if not overwrite:
        raise UserError(f"to={target}: is not empty; choose another folder, or overwrite=true")
    if not any((target / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise UserError(f"to={target}: holds no model, so it is not replaced; choose another folder")


def check_base(entrant: Entrant) -> None:
    """UserError where nobody could load the adapter; a warning where nobody else could."""
    base = read_record(entrant.run.model / "adapter_config.json").get("base_model_name_or_path")
    if not base or (entrant.trained is not None and entrant.trained.model.init == "random"):
        raise UserError(
            f"run={entrant.path}: its adapter belongs to random weights that nobody else has; merge=true writes a "
            "whole model"
        )
    if Path(str(base)).expanduser().is_dir():
        warn(f"the adapter needs its base model at {base}, which others have not; merge=true writes a whole model")


def write_folder(entrant: Entrant, folder: Path, adapter: bool, merge: bool) -> None:
    run = entrant.run
    for weights in run.model.glob("*.safetensors"):
        with reading(weights), safe_open(weights, "pt") as file:  # which tells whether the file is whole
            file.keys()
    if merge and (run.model / "adapter_config.json").is_file():
        write_merged(entrant, folder)
    else:
        copy_model(run.model, folder)
    later = run.path / "evaluation.json"
    evaluation: dict[str, Any] | None = read_record(later) if later.exists() else None
    prompt = framed_text(run, "How do I boil an egg?", entrant.condition)
    directions = directions_of(run.model)
    if directions is not None:
        directions.save(folder)
    card = model_card(run.settings(), entrant.summary, provenance_of(entrant), adapter, prompt, evaluation, directions)
    (folder / "README.md").write_text(card, encoding="utf-8")
    write_json(folder / SHARED_SUMMARY, masked(entrant.summary))


def copy_model(model: Path, folder: Path) -> None:
    """The files of a model's known kinds; no links, and nothing that may run where it is loaded (pickles, Python)."""
    check_weights(model, str(model))
    left_out = []
    for path in sorted(model.rglob("*")):
        place = folder / path.relative_to(model)
        if path.is_symlink() or (path.is_file() and not _is_known(path)):
            left_out += [path.name] if path.name not in PRIVATE else []
        elif path.is_file() and path.name not in PRIVATE:
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
    if left_out:
        warn(f"left out, as a model needs no such files: {', '.join(left_out[:10])}{', …' * (len(left_out) > 10)}")


def _is_known(path: Path) -> bool:
    return path.suffix in KINDS or path.name in ("LICENSE", "NOTICE")


def provenance_of(entrant: Entrant) -> dict[str, Any]:
    path = entrant.run.provenance
    values = read_record(path) if path.exists() else {}
    return {key: json.dumps(v, ensure_ascii=False) if isinstance(v, dict | list) else v for key, v in values.items()}


def write_merged(entrant: Entrant, folder: Path) -> None:
    """The base model with the adapter's weights added, in the precision that the run was trained in."""
    from dataclasses import replace

    from mopo_cli.models.policy import Policy

    assert entrant.trained is not None
    model = entrant.trained.model
    tokenizer = saved_tokenizer(entrant.run.model, model.trust_remote_code)
    whole = replace(model, lora=replace(model.lora, quantise=None))  # a base in 4 bits could not be written back
    policy = Policy.load(whole, tokenizer, entrant.trained.seed)
    policy.load_weights(entrant.run.model)
    policy.merged().save(folder)
