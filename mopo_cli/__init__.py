"""mopo: align a language model with several human objectives, straight from pairwise preferences."""

from __future__ import annotations

__version__ = "0.1.0"
