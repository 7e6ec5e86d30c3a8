"""`make torture`: command lines and preference rows made at random; exit status 1 where one ends in no error of ours.

python tests/torture [--seed 0] [--overrides 10000] [--rows 10000]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from torture import overrides, rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="torture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overrides", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=10_000)
    asked = parser.parse_args()
    status = 0
    for name, fuzz, count in (("overrides", overrides.fuzz, asked.overrides), ("rows", rows.fuzz, asked.rows)):
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as place:
            os.chdir(place)
            found = fuzz(asked.seed, count)
            os.chdir("/")
        for text in found:
            print(text.encode("utf-8", "backslashreplace").decode())
        print(f"{name}: {count} tried in {time.perf_counter() - started:.0f} s, {len(found)} end in no error of ours")
        status |= bool(found)
    return status


if __name__ == "__main__":
    sys.exit(main())
