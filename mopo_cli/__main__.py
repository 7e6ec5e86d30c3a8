"""`python -m mopo_cli` is `mopo`."""

from __future__ import annotations

import sys

from mopo_cli.cli import main

sys.exit(main())
