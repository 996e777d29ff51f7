"""Kill the pytest process with SIGKILL five hundred times, at random moments of a study of 40 experiments.

    python tests/benchmarks/kills.py [--kills 500] [--saved 8] [--longest 0.5] [--seed 0] [--at-once]

After each kill the manifest must parse, every experiment marked completed must have a whole result with the
recorded hash, no finished experiment may be lost, and ``StudyResult.load`` must read the directory. Stops at the
first violation. With ``--at-once`` the experiments take no time, so most kills hit the pytest process while it
writes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.support.kills import kills, write_study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--saved", type=int, help="kills come after up to so many saved experiments")
    parser.add_argument("--longest", type=float, default=0.5, help="and then after up to so many seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", action="store_true")
    options = parser.parse_args()
    saved = options.saved or (200 if options.at_once else 8)
    total: Counter[str] = Counter()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        write_study(Path(folder), points=2000 if options.at_once else 40, at_once=options.at_once)
        seen = kills(Path(folder), options.kills, saved, options.longest, options.seed)
        for number, statuses in enumerate(seen, start=1):
            total += statuses
            if number % 50 == 0 or number == options.kills:
                said = f"{total['completed']} completed and whole, {total['running']} caught running"
                print(f"{number} kills in {time.monotonic() - begun:.0f} s: {said}, none lost", flush=True)


if __name__ == "__main__":
    main()
