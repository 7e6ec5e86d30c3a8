"""From the command line to a config: Hydra composes conf/, and every mistake becomes one UserError."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mopo_cli.base.errors import UserError
from mopo_cli.base.secrets import masked
from mopo_cli.base.text import flat, shown
from mopo_cli.config.checks import checked
from mopo_cli.config.overrides import GROUPS, PATHS, unreadable
from mopo_cli.config.schema import TrainConfig

THEIRS = (ValueError, TypeError, AttributeError, KeyError, RecursionError)  # that Hydra lets out of a strange override
NAMES = ("run.name", "sweep.name", "name")  # of directories
NAME_BYTES, PATH_BYTES = 255, 4095  # that a file's name, and its path, may have
SPARE = 15  # bytes of a name for what is written beside it: .NAME.tmp


def config_dir() -> Path:
    """conf/: inside the package in a wheel, beside it in a checkout."""
    packaged = Path(__file__).parents[1] / "conf"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "conf"


def compose(command: str, overrides: list[str], user_config_dir: str | None = None) -> DictConfig:
    """The composed config of a command (conf/<command>.yaml), or a UserError about the override at fault."""
    if user_config_dir is not None:
        if not Path(user_config_dir).is_dir():
            raise UserError(f"--config-dir {user_config_dir}: no such directory")
        overrides = [*overrides, f"hydra.searchpath=[file://{Path(user_config_dir).resolve()}]"]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir().resolve()), version_base="1.3"):
        try:
            config = hydra_compose(command, overrides)
            OmegaConf.resolve(config)
        except OverrideParseException as error:
            raise unreadable(error.override, _one_line(error).partition(" See https://")[0]) from error
        except MissingConfigException as error:
            raise UserError(_missing_option(error)) from error
        except ConfigCompositionException as error:
            raise UserError(_unknown_key(command, overrides, error)) from error
        except (HydraException, OmegaConfBaseException, *THEIRS) as error:
            raise UserError(_one_line(error) or f"cannot compose {' '.join(overrides)}") from error
    _check_used(config, overrides)
    check_places(config)
    return config


def _check_used(config: DictConfig, overrides: Sequence[str]) -> None:
    """UserError where model.path was given, and the weights and the tokenizer of the chosen model are made anew."""
    given = next(
        (o for o in overrides if o.lstrip("+").startswith("model.path=") and o.partition("=")[2] != "null"), ""
    )
    model = config.get("model") if given else None
    if model and model.init == "random" and model.architecture and model.tokenizer.train:
        raise UserError(
            f"{given}: model={model.name} is made of random weights and would not read it; add model=local to take the "
            "weights there (or model.init=pretrained)"
        )


def check_places(config: DictConfig) -> None:
    """UserError where a name of the config is none that a directory can have, or a path none that a file can have."""
    for key, value in flat(OmegaConf.to_container(config)):  # type: ignore[arg-type]
        texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
        if any("\0" in text for text in texts):
            raise UserError(f"{key}: holds a null character, which no text here can have")
        if key in NAMES:
            _check_name(key, str(value))
        elif PATHS.fullmatch(key):
            for text in texts:
                _check_path(key, text)


def _check_name(key: str, name: str) -> None:
    be = None
    if not name.strip() or name in (".", ".."):
        be = "must be a name"
    elif "/" in name or os.sep in name:
        be = f"must be a name without {os.sep}; {key.replace('name', 'dir')}=DIR puts it anywhere"
    elif not name.isprintable():
        be = "must be a name of printable characters"
    elif (size := len(os.fsencode(name))) > NAME_BYTES - SPARE:
        be = f"must be {NAME_BYTES - SPARE} bytes or less; found {size}"
    if be:
        raise UserError(f"{key}={name!r}: {be}" if not name.isprintable() else f"{key}={shown(name)}: {be}")


def _check_path(key: str, path: str) -> None:
    if path.startswith("~") and os.path.expanduser(path) == path:
        raise UserError(f"{key}={path}: no such user; a name that starts with ~ is written ./{path}")
    try:
        sizes = [len(os.fsencode(part)) for part in path.split("/")]
    except UnicodeEncodeError:
        raise UserError(f"{key}={path!r}: no file can have this name (half a character)") from None
    if max(sizes) > NAME_BYTES or sum(sizes) + len(sizes) > PATH_BYTES:
        at_most = f"{NAME_BYTES} bytes or less between two /, and {PATH_BYTES} in all"
        raise UserError(f"{key}={path[:60]}…: must be {at_most}")


def check_experiment(command: str, overrides: Sequence[str], user_config_dir: str | None = None) -> None:
    """UserError where the preset that is asked for (experiment=NAME) belongs to another command."""
    for override in overrides:
        key, _, name = override.lstrip("+").partition("=")
        for directory in (Path(user_config_dir or config_dir()), config_dir()):
            path = directory / "experiment" / f"{name}.yaml"
            if key == "experiment" and path.is_file():
                wanted = OmegaConf.select(OmegaConf.load(path), "experiment.command", default=command)
                if wanted != command:
                    raise UserError(f"experiment={name}: this preset is for `mopo {wanted}`, not for `mopo {command}`")


def _one_line(error: BaseException) -> str:
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())


def group_options(group: str) -> list[str]:
    return sorted(path.stem if path.suffix == ".yaml" else path.name for path in (config_dir() / group).glob("*.yaml"))


def command_groups(command: str) -> list[str]:
    """The groups that a command's defaults choose from, in the order of GROUPS."""
    defaults = OmegaConf.to_container(OmegaConf.load(config_dir() / f"{command}.yaml"))
    assert isinstance(defaults, dict)
    chosen = [entry if isinstance(entry, str) else next(iter(entry)) for entry in defaults.get("defaults", [])]
    inherited = [
        group for name in chosen if (config_dir() / f"{name}.yaml").is_file() for group in command_groups(name)
    ]
    return [group for group in GROUPS if group in (*chosen, *inherited)]


def _missing_option(error: MissingConfigException) -> str:
    name = str(error.missing_cfg_file or "")
    group, _, option = name.partition("/")
    if group not in GROUPS:
        return _one_line(error)
    options = group_options(group)
    return f"{group}={option}: no such option{_did_you_mean(option, options)}. Allowed: {', '.join(options)}"


def _did_you_mean(word: str, words: list[str]) -> str:
    close = difflib.get_close_matches(word, words, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _unknown_key(command: str, overrides: list[str], error: ConfigCompositionException) -> str:
    text = _one_line(error) + (" " + _one_line(error.__cause__) if error.__cause__ else "")
    found = re.search(r"(?:Could not override|Could not delete from config\.) '([^']+)'", text)
    if not found:
        return text
    # The keys of the groups that the user chose: dataset=pairs has others than the default.
    groups, key = command_groups(command), found.group(1)
    try:
        keys = _keys(hydra_compose(command, [override for override in overrides if _chooses_group(override, groups)]))
    except (HydraException, *THEIRS):  # one of these was at fault
        keys = _keys(hydra_compose(command, []))
    if key in keys:
        return f"{key}: cannot be set so; give one of its keys a value"
    parent = _deepest_parent(key, keys)
    siblings = ", ".join(_children(parent, keys))
    close = _closest_key(key, parent, keys)
    hint = f" (did you mean {close}?)" if close else ""
    return f"{key}: no such key{hint}. Allowed{f' in {parent}' if parent else ''}: {siblings}"


def _chooses_group(override: str, groups: Sequence[str]) -> bool:
    name, equals, value = override.partition("=")
    return bool(equals and value) and name.lstrip("+") in ("hydra.searchpath", *groups)


def _deepest_parent(key: str, keys: list[str]) -> str:
    """The longest part of `key` that is a mapping of the config; "" for the top level."""
    parent = key.rpartition(".")[0]
    while parent and not _children(parent, keys):
        parent = parent.rpartition(".")[0]
    return parent


def _children(parent: str, keys: list[str]) -> list[str]:
    return [name for above, _, name in (key.rpartition(".") for key in keys) if above == parent]


def _closest_key(key: str, parent: str, keys: list[str]) -> str | None:
    """The key that was meant: one letter off in the part that is unknown, in another place, or alike as a whole."""
    unknown, *rest = key[len(parent) + bool(parent) :].split(".")
    near = difflib.get_close_matches(unknown, _children(parent, keys), n=1)
    repaired = ".".join([*([parent] if parent else []), *near, *rest])
    if near and repaired in keys:
        return repaired
    elsewhere = [other for other in keys if other.rpartition(".")[2] == key.rpartition(".")[2]]
    close = difflib.get_close_matches(key, elsewhere, n=1, cutoff=0.0) or difflib.get_close_matches(key, keys, n=1)
    return close[0] if close else None


def _keys(config: DictConfig, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in config.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, DictConfig):
            keys += _keys(value, f"{prefix}{key}.")
    return keys


def typed(config: DictConfig, schema: type, prefix: str = "") -> Any:
    """The config as a record of `schema`, checked: a UserError names the key that is unknown or has a wrong value.

    prefix: what stands in front of its keys on the command line, with the dot.
    """
    fields = schema.__dataclass_fields__
    unknown = [str(key) for key in config if key not in fields and key not in ("sweep", "experiment")]
    if unknown:
        hint = _did_you_mean(unknown[0], list(fields))
        raise UserError(f"{prefix}{unknown[0]}: no such key{hint}. Allowed: {', '.join(fields)}")
    missing = [str(key) for key in config if OmegaConf.is_missing(config, key)]
    if missing:
        raise UserError(f"{prefix}{missing[0]}=???: must have a value")
    values = {key: config[key] for key in config if key in fields}
    if isinstance(values.get("debug"), bool) and fields["debug"].type != "bool":
        values["debug"] = {"traceback": values["debug"]}
    empty = OmegaConf.structured(schema)
    for key, value in values.items():
        if OmegaConf.is_dict(empty[key]) and not isinstance(value, dict | DictConfig):
            inside = f" ({', '.join(map(str, empty[key]))})" if empty[key] else ""
            raise UserError(f"{prefix}{key}: {value} is no group of keys{inside}")
    try:
        merged = OmegaConf.merge(empty, values)
        _check_truths(values, merged, prefix)
        return checked(OmegaConf.to_object(merged), prefix)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "config"
        raise UserError(f"{prefix}{key}: {str(error).splitlines()[0]}") from error


def _check_truths(given: Mapping[Any, Any], merged: Any, prefix: str) -> None:
    """UserError where a number but 0 and 1 stands for true or false: OmegaConf takes any."""
    for key, value in given.items():
        inside = merged.get(key)
        if isinstance(value, Mapping) and OmegaConf.is_dict(inside):
            _check_truths(value, inside, f"{prefix}{key}.")
        elif isinstance(inside, bool) and type(value) is int and value not in (0, 1):
            raise UserError(f"{prefix}{key}={value}: must be true or false")


def algorithm_name(config: TrainConfig) -> str:
    """What reports call the method."""
    return option_name(config.algorithm)


def option_name(group: Mapping[str, Any]) -> str:
    """The option that a group's config is: its name, else what _target_ names, as configs of old have none."""
    return str(group.get("name") or str(group.get("_target_") or "").rpartition(".")[2].lower())


def plain(config: DictConfig) -> Any:
    """A composed config as dictionaries, lists and values."""
    return OmegaConf.to_container(config, resolve=True)


def to_yaml(config: Any) -> str:
    """YAML of a composed or typed config, without the secrets in it."""
    if not isinstance(config, DictConfig | ListConfig):
        config = OmegaConf.structured(config)
    return OmegaConf.to_yaml(OmegaConf.create(masked(OmegaConf.to_container(config))))


MOVED = {  # modules that runs of version 0.1 name, and where what they hold stands now
    "mopo_cli.algorithms.dpa": "mopo_cli.algorithms.conditioned.dpa",
    "mopo_cli.algorithms.dpo": "mopo_cli.algorithms.pairwise.dpo",
    "mopo_cli.algorithms.mapl": "mopo_cli.algorithms.pairwise.mapl",
    "mopo_cli.algorithms.modpo": "mopo_cli.algorithms.pairwise.modpo",
    "mopo_cli.algorithms.mopo_conditioned": "mopo_cli.algorithms.mopo.conditioned",
    "mopo_cli.algorithms.ric": "mopo_cli.algorithms.conditioned.ric",
    "mopo_cli.algorithms.sft": "mopo_cli.algorithms.pairwise.sft",
    "mopo_cli.algorithms.soups": "mopo_cli.algorithms.pairwise.soups",
}


def with_current_names(settings: Any) -> Any:
    """Settings of a run of any version, with every _target_ by its present name and without what is no more."""
    if isinstance(settings, list):
        return [with_current_names(value) for value in settings]
    if not isinstance(settings, dict):
        return settings
    renamed = {key: with_current_names(value) for key, value in settings.items()}
    if isinstance(renamed.get("evaluation"), dict):
        renamed["evaluation"].pop("bootstrap", None)  # of version 0.1: intervals are computed now, not drawn
    module, _, name = str(renamed.get("_target_", "")).rpartition(".")
    return {**renamed, "_target_": f"{MOVED[module]}.{name}"} if module in MOVED else renamed


def class_of(node: Mapping[str, Any], group: str) -> type:
    """The class that a group's _target_ names."""
    try:
        return get_class(str(node.get("_target_")))
    except (HydraException, ImportError, ValueError) as error:
        raise UserError(f"{group}._target_: {' '.join(str(error).split())}") from None


def build(node: dict[str, Any], what: str, **arguments: Any) -> Any:
    """Instantiate a config node; a wrong argument is a UserError, a UserError inside passes through."""
    try:
        return instantiate(node, _convert_="all", **arguments)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        reason = f"{type(cause).__name__}: {cause}" if cause else str(error).splitlines()[0]
        raise UserError(f"{what} ({node.get('_target_')}): {' '.join(reason.split())[:300]}") from error
