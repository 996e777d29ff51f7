"""Measure a large page: the time to write it and to open it, and its size.

    python tests/benchmarks/report.py [--points 200] [--cycles 5]

The results are multiplied from those of a short run on a scripted GPU, which gcc builds. The browser is Chromium.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from pytest_llem.reporting.html import write_report
from tests.support import nvml, reports
from tests.support.browser import browser


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--cycles", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, browser() as chromium:
        folder = Path(name)
        real = reports.run(folder, nvml.build(folder))
        reports.grown(real, folder / "grown", options.points, options.cycles)
        file = folder / "page.html"
        begun, busy = time.perf_counter(), time.process_time()
        write_report(folder / "grown", file)
        written, busy = time.perf_counter(), time.process_time() - busy
        page = chromium.new_page()
        page.goto(file.as_uri())
        page.wait_for_selector("html[data-drawn]")
        drawn = time.perf_counter()
        print(f"{options.points} points x {options.cycles} cycles: {file.stat().st_size / 1e6:.1f} MB")
        print(f"  written in {written - begun:.1f} s ({busy:.1f} s of CPU time), drawn in {drawn - written:.1f} s")


if __name__ == "__main__":
    main()
