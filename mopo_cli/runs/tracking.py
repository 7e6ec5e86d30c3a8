"""Where numbers go: metrics.jsonl always, Weights & Biases where the config asks for it. No prompt, and no hang."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mopo_cli.base.console import warn
from mopo_cli.base.errors import UserError
from mopo_cli.base.files import read_lines, write_atomic
from mopo_cli.base.secrets import masked
from mopo_cli.base.text import finite, first_line, flat
from mopo_cli.config.schema import LoggerConfig
from mopo_cli.runs.directory import RunDirectory

MODES = ("auto", "online", "offline", "disabled")
OTHER_NAMES = {"run": "online", "dryrun": "offline"}  # of W&B's modes
NAME = 128  # characters of a project's, group's and run's name that W&B takes
TAG = 64  # of a tag
NOT_IN_PROJECTS = "/\\#?%:"
TITLE = 64  # characters that W&B shows of an alert's title
PROJECT = "mopo"  # where neither the config nor WANDB_PROJECT names one
QUIET: dict[str, Any] = {
    "silent": True,
    "console": "off",
    "disable_git": True,
}  # unless W&B's own variables say otherwise
DEFAULTS = {"WANDB_SILENT": "true", "WANDB_INIT_TIMEOUT": "30", "WANDB_FINISH_TIMEOUT": "300"}  # seconds


def wandb_mode(config: LoggerConfig) -> str:
    """online where a key is there, else offline; `logger.mode` or WANDB_MODE decide otherwise.

    Raises UserError for a mode that does not exist, and for online without a key: W&B would ask for one and wait.
    """
    if config.mode not in MODES:
        raise UserError(f"logger.mode={config.mode}: must be {', '.join(MODES)}")
    key, value = "logger.mode", config.mode
    if config.mode == "auto":
        key, value = "WANDB_MODE", os.environ.get("WANDB_MODE", "")
    if not value:
        return "online" if _has_key() else "offline"
    mode = OTHER_NAMES.get(value, value)
    if mode not in MODES[1:]:
        raise UserError(f"{key}={value}: must be {', '.join(MODES[1:])}")
    if mode == "online" and not _has_key():
        raise UserError(f"{key}={value}: there is no W&B key; set WANDB_API_KEY, run `wandb login`, or log offline")
    return mode


def check_logger(config: LoggerConfig, name: str) -> None:
    """UserError where W&B would refuse a name or a tag, which it says only after the reference has been fitted."""
    if wandb_mode(config) == "disabled" or config.name != "wandb":
        return
    for key, text in (("logger.project", config.project), ("logger.group", config.group), ("run.name", name)):
        if text is not None and not 0 < len(text) <= NAME:
            raise UserError(f"{key}={text[:60]}: must be 1 to {NAME} characters, as W&B has it; found {len(text)}")
    if found := sorted(set(NOT_IN_PROJECTS) & set(config.project or "")):
        raise UserError(f"logger.project={config.project}: must be without {found[0]}, as W&B has it")
    for tag in config.tags:
        if not 0 < len(tag) <= TAG:
            raise UserError(f"logger.tags: {tag[:60]!r} must be 1 to {TAG} characters, as W&B has it; found {len(tag)}")


def _has_key() -> bool:
    return any(os.environ.get(f"WANDB_{name}") for name in ("API_KEY", "IDENTITY_TOKEN_FILE")) or _key_in_netrc()


def _key_in_netrc() -> bool:
    import netrc

    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class Tracker:
    """Writes each logged step to metrics.jsonl and mirrors it to W&B; where not `active`, keeps it in memory only."""

    def __init__(
        self,
        run: RunDirectory,
        logger: LoggerConfig,
        config: dict[str, Any],
        name: str,
        resumed: bool = False,
        active: bool = True,
        kind: str = "train",  # or "sweep": the summary of one, which has no steps
    ):
        self.history: list[dict[str, Any]] = []
        self.path = run.metrics
        self.file = open(self.path, "a", encoding="utf-8") if active and kind == "train" else None  # noqa: SIM115 (closed in `finish`)
        wanted = active and logger.name == "wandb"
        self.wandb = _start_wandb(run, logger, config, name, resumed, kind) if wanted else None

    def rewind(self, step: int) -> None:
        """Forget lines after `step`, which a run that goes on from there writes again, and a line that was cut off.

        W&B's run is new after an interruption, so it gets the lines that stay: its curves are whole.
        """
        if self.file is None:
            return
        self.history = [record for record in read_lines(self.path) if record["step"] <= step]
        self._rewrite()
        for record in self.history:
            self._mirror(record)

    def _rewrite(self) -> None:
        if self.file is None:
            return
        self.file.close()
        write_atomic(self.path, "".join(json.dumps(record) + "\n" for record in self.history))
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115

    def log(self, step: int, **numbers: Any) -> None:
        """One line of metrics; nested names use a slash (`dual/harmless`)."""
        record = {"step": step, **finite(numbers)}
        self.history.append(record)
        if self.file is not None:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        self._mirror(record)

    def amend(self, **numbers: Any) -> None:
        """The last line with what was measured anew after it: where a curve ends is what the summary says."""
        if self.history:
            self.history[-1] = self.history[-1] | finite(numbers)
            self._rewrite()
            self._mirror(self.history[-1])

    def _mirror(self, record: dict[str, Any]) -> None:
        if self.wandb is not None:
            self.wandb.log({k: v for k, v in record.items() if v is not None}, step=record["step"])

    def table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        if self.wandb is not None:
            import wandb

            self.wandb.log({key: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

    def figures(self, paths: Sequence[Path]) -> None:
        if self.wandb is not None:
            import wandb

            self.wandb.log({f"figures/{path.stem}": wandb.Image(str(path)) for path in paths})

    def alert(self, text: str) -> None:
        """A warning to whoever follows the run. W&B holds back a second one of the same title, so each has its own."""
        if self.wandb is not None:
            title = text if len(text) <= TITLE else text[: TITLE - 1] + "…"
            self.wandb.alert(title=title, text=text, level="WARN")

    def summarise(self, summary: dict[str, Any]) -> None:
        if self.wandb is not None:
            self.wandb.summary.update(dict(flat(summary, "/")))

    def finish(self, failed: bool = False) -> str | None:
        """Close everything, once; returns the line that uploads what did not get through, if there is such."""
        if self.file is not None:
            self.file.close()
        if self.wandb is None:
            return None
        run, self.wandb = self.wandb, None
        directory, upload = Path(run.dir).parent, run.settings._offline
        try:
            run.finish(exit_code=int(failed))
        except Exception as error:
            warn(f"W&B: {first_line(error)}")
            upload = True
        return f"wandb sync {directory}" if upload else None


def _start_wandb(
    run: RunDirectory, logger: LoggerConfig, config: dict[str, Any], name: str, resumed: bool, kind: str
) -> Any:
    mode = wandb_mode(logger)
    if mode == "disabled":
        return None
    for key, value in DEFAULTS.items():
        os.environ.setdefault(key, value)
    import wandb

    quiet = {key: value for key, value in QUIET.items() if f"WANDB_{key.upper()}" not in os.environ}
    settings = wandb.Settings(
        finish_timeout_raises=True,
        x_disable_stats=True,
        x_disable_meta=True,  # it would hold the command line as it is, with its secrets
        **quiet,
    )
    tags = logger.tags or [tag for tag in os.environ.get("WANDB_TAGS", "").split(",") if tag]
    arguments: dict[str, Any] = {
        "project": logger.project or os.environ.get("WANDB_PROJECT") or PROJECT,
        "entity": logger.entity,
        "group": logger.group,
        "tags": [*tags, *(["resumed"] if resumed else [])],
        "name": os.environ.get("WANDB_NAME") or name,
        "job_type": os.environ.get("WANDB_JOB_TYPE") or kind,
        "dir": os.environ.get("WANDB_DIR") or str(run.path),
        "config": printable(masked(config)),
        "settings": settings,
        "reinit": "create_new",
    }
    arguments |= {key: masked(arguments[key]) for key in ("name", "group", "tags")}
    try:
        return wandb.init(mode=mode, **arguments)  # type: ignore[arg-type]
    except Exception as error:
        if mode != "online":
            raise
        warn(f"W&B: {first_line(error)}; logging offline")
        return wandb.init(mode="offline", **arguments)


def printable(values: dict[str, Any]) -> dict[str, Any]:
    """A config for W&B, which has no infinity: t0=inf is written as text."""
    return {key: printable(value) if isinstance(value, dict) else _printable(value) for key, value in values.items()}


def _printable(value: Any) -> Any:
    return str(value) if isinstance(value, float) and finite(value) is None else value
