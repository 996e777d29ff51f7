"""Measure how well contention detection separates quiet windows from loaded ones: the data behind its thresholds.

    python tests/benchmarks/contention.py [--windows N] [--seconds S] [--json FILE]

In a process of its own, each kind of engine computes in windows of S seconds: one busy thread, one that alternates
between computing and sleeping for 1 ms, as many busy processes as CPUs, and twice as many. At the same time 0, 1,
2 and as many other processes as there are CPUs are busy. If control groups can be made (as root), the engine also
runs with a CPU quota of 0.5. Prints quantiles of each figure, and the share of windows that are called contended
and unknown.

Without load, that share is the rate of false alarms: run it on a machine where nothing else runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from pytest_llem.measurement.contention import THRESHOLDS, ContentionWatch, assess_contention

ENGINES = ("one thread", "bursts", "every CPU", "2x CPUs")

FIGURES = (
    "cpu_received_share",
    "others_cpu_share",
    "steal_share",
    "pressure_share",
    "throttled_share",
    "involuntary_switches",
)

QUANTILES = (0.05, 0.5, 0.95)

BUSY = "while True: pass"

QUOTA = 0.5


def main(windows: int, seconds: float, file: Path | None) -> None:
    cpus = len(os.sched_getaffinity(0))
    load = ", ".join(f"{one:.2f}" for one in os.getloadavg())
    print(f"{cpus} CPUs, load {load} at the start; {windows} windows of {seconds:g} s each")
    print(f"{THRESHOLDS}\nfigures: quantiles {', '.join(f'{one:g}' for one in QUANTILES)}\n")
    heads = ("contended", "unknown", *FIGURES)
    print(f"| {'engine':10} |  load | {' | '.join(f'{one[:17]:>17}' for one in heads)} |")
    found: list[dict[str, Any]] = []
    for engine in ENGINES:
        for busy in sorted({0, 1, 2, cpus}):
            with loaded(busy):
                found.append({"engine": engine, "load": str(busy), "records": run(engine, windows, seconds)})
            show(found[-1])
    with quota_group() as group:
        if group is None:
            print("no quota: control groups cannot be made here")
        else:
            found.append(
                {"engine": ENGINES[0], "load": "quota", "records": run(ENGINES[0], windows, seconds, group)}
            )
            show(found[-1])
    if file is not None:
        file.write_text(json.dumps(found))


@contextmanager
def loaded(busy: int) -> Iterator[None]:
    """Keep *busy* processes computing."""
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(busy)]
    time.sleep(0.5)
    try:
        yield
    finally:
        for one in others:
            one.kill()
        for one in others:
            one.wait()


@contextmanager
def quota_group() -> Iterator[Path | None]:
    """Make a control group, version 1 or 2, with a quota; yield None if that is not permitted."""
    root, made = Path("/sys/fs/cgroup"), None
    for controller, limit in ((root, "cpu.max"), (root / "cpu", "cpu.cfs_quota_us")):
        group = controller / f"llem-{os.getpid()}"
        try:
            group.mkdir()
            (group / limit).write_text(f"{int(QUOTA * 100_000)}{' 100000' * (limit == 'cpu.max')}")
            made = group
            break
        except OSError:
            with suppress(OSError):
                group.rmdir()
    try:
        yield made
    finally:
        if made is not None:
            time.sleep(0.1)
            with suppress(OSError):
                made.rmdir()


def run(engine: str, windows: int, seconds: float, group: Path | None = None) -> list[dict[str, Any]]:
    """Return the record of each window of an engine in a process of its own."""
    command = [sys.executable, __file__, "--engine", engine, "--windows", str(windows), "--seconds", str(seconds)]
    if group is not None:
        command += ["--group", str(group)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [json.loads(line) for line in output.splitlines()]


def measure(engine: str, windows: int, seconds: float, group: Path | None) -> None:
    """Compute in windows, and print the record of each."""
    if group is not None:
        (group / "cgroup.procs").write_text(str(os.getpid()))
    cpus = len(os.sched_getaffinity(0))
    helpers = {"every CPU": cpus - 1, "2x CPUs": 2 * cpus - 1}.get(engine, 0)
    with loaded(helpers):  # children, so the engine's own
        for _ in range(windows):
            watch = ContentionWatch([os.getpid()])
            began = time.monotonic()
            while (now := time.monotonic()) - began < seconds:
                if engine == "bursts" and int(1000 * now) % 2:
                    time.sleep(0.001)
            print(assess_contention(*watch.activity([]), now - began).model_dump_json(), flush=True)


def show(found: dict[str, Any]) -> None:
    """Print a row with the quantiles of each figure."""
    records: Sequence[dict[str, Any]] = found["records"]
    states = Counter(record["state"] for record in records)
    cells = [f"{100 * states[one] / len(records):6.1f} %" for one in ("contended", "unknown")]
    for name in FIGURES:
        values = sorted(record[name] for record in records if record[name] is not None)
        places = [values[round(one * (len(values) - 1))] for one in QUANTILES] if values else []
        cells.append(" ".join(f"{one:5.3g}" for one in places) or "not seen")
    print(
        f"| {found['engine']:10} | {found['load']:>5} | {' | '.join(f'{one:>17}' for one in cells)} |", flush=True
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--windows", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--group", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.engine is None:
        main(given.windows, given.seconds, given.json)
    else:
        measure(given.engine, given.windows, given.seconds, given.group)
