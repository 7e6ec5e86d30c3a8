"""`mopo train`: one run, from its config to its exit status."""

from __future__ import annotations

from omegaconf import DictConfig

from mopo_cli.base.errors import UserError
from mopo_cli.base.processes import build_accelerator, part_ways
from mopo_cli.config import compose
from mopo_cli.config.schema import TrainConfig
from mopo_cli.pipeline.train import check, train
from mopo_cli.runs.session import claim_run


def command(composed: DictConfig) -> int:
    """Train one run; its exit status."""
    config: TrainConfig = compose.typed(composed, TrainConfig)
    check(config)
    accelerator = build_accelerator()
    try:
        run = claim_run(accelerator, composed)
        config.run.name = composed.run.name
        train(config, composed, run, accelerator)
    except UserError:
        part_ways()
        raise
    return 0
