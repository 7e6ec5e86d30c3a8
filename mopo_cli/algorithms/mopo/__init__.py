"""MOPO: the method of this project (arXiv 2505.10892)."""

from mopo_cli.algorithms.mopo.alignment import Mopo

__all__ = ["Mopo"]
