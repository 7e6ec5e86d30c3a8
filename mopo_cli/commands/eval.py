"""`mopo eval`: runs, models and files of responses on the same prompts."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from mopo_cli.base.console import stage, warn
from mopo_cli.config import compose
from mopo_cli.config.schema import EvalConfig
from mopo_cli.evaluation import show
from mopo_cli.evaluation.compare import compare, prepare, respond_all
from mopo_cli.evaluation.entrants import check_alike, find_entrants
from mopo_cli.judging.scorers import Classifier, check_scorers, load_scorer
from mopo_cli.runs.session import quiet_libraries


def command(composed: DictConfig) -> int:
    """Evaluate, write the numbers, show them; exit status 0 though some runs may be unfinished."""
    settings: EvalConfig = compose.typed(composed, EvalConfig)
    check_scorers(settings.scorers, settings.functions)
    quiet_libraries()
    entrants, unfinished = find_entrants(settings)
    check_alike(entrants)
    with stage("data", 1):
        benchmark = prepare(settings, entrants)
        scorers = {name: load_scorer(name, config) for name, config in settings.scorers.items()}
    responded, features, failed = respond_all(settings, benchmark, entrants)
    compared = compare(settings, benchmark, responded, features, scorers, unfinished + failed)
    for name, scorer in scorers.items():
        if isinstance(scorer, Classifier) and scorer.cut:
            warn(f"scorers.{name}: {scorer.cut} texts were longer than its {scorer.longest()} tokens and were cut")
    alone = entrants[0].run if len(entrants) == 1 and not compared.unfinished and entrants[0].kind == "run" else None
    directory = alone.path if alone else Path(settings.dir).expanduser()
    show.write(directory, alone, compared)
    show.show_compared(compared, directory)
    return 0
