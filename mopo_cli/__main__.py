"""`python -m mopo_cli` is `mopo`."""

from __future__ import annotations

import os
import sys

if sys.path[0] == os.getcwd() and not os.path.samefile(sys.path[0], os.path.dirname(os.path.dirname(__file__))):
    del sys.path[0]  # Python's -m puts the current folder there, whose modules would stand in for anybody's

from mopo_cli.cli import main

sys.exit(main())
