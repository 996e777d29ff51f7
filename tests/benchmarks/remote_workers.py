"""Measure what an experiment on another host costs the controller, and whether the controller's memory grows.

    python tests/benchmarks/remote_workers.py [--experiments N] [--workers N]

Runs a study of N points of the do-nothing engine with workers over a real sshd on this machine, each in a folder
and with device leases of its own. Prints the time of the run, its number of experiments in a second, the
controller's processor time for an experiment, and the controller's memory (resident, without shared memory) after
each fifth of the study. All workers share this machine's cores, so that the time is no measure of several hosts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import yaml
from scale import STUDY

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from pytest_llem.results.manifest import read_manifest  # noqa: E402
from tests.support.ssh_server import SshServer  # noqa: E402

PARTS = 5

#: Other plugins of the development environment are left out.
OPTIONS = ["-qq", "-p", "llem", "--dist=load", "--llem-yes", "--llem-start-method=forkserver"]
OPTIONS += [part for name in ("randomly", "random_order", "hypothesispytest") for part in ("-p", f"no:{name}")]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=4)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), options.experiments, options.workers)


def run(folder: Path, experiments: int, workers: int) -> None:
    """Run the study below *folder*, and print the figures."""
    names = ["controller", *(f"host{number}" for number in range(workers))]
    study = yaml.safe_dump({**STUDY, "sweep": {"noop.size": list(range(1, experiments + 1))}})
    for name in names:
        (folder / name / "leases").mkdir(parents=True)
        (folder / name / "scale.yaml").write_text(study)
        (folder / name / "pytest.ini").write_text("[pytest]\n")
    (folder / "keys").mkdir(mode=0o700)
    server = SshServer(folder / "keys", folder)
    try:
        tx = [f"{server.worker(one, folder / one)}//env:TMPDIR={folder / one / 'leases'}" for one in names[1:]]
        began = time.monotonic()
        controller = psutil.Popen(
            [sys.executable, "-m", "pytest", "scale.yaml", *OPTIONS, *tx],
            cwd=folder / "controller",
            env={
                **os.environ,
                "PYTHONPATH": f"{ROOT / 'tests' / 'support' / 'noop_engine'}:{ROOT}",
                "TMPDIR": str(folder / "controller" / "leases"),
            },
            stdout=sys.stderr,
        )
        report(controller, folder / "controller" / "results", experiments, began)
    finally:
        server.stop()


def report(controller: psutil.Popen, results: Path, experiments: int, began: float) -> None:
    """Read the controller's memory and processor time until it ends, and print them."""
    readings: list[tuple[int, float]] = []
    processor = 0.0
    while controller.poll() is None:
        try:
            memory, times = controller.memory_info(), controller.cpu_times()
        except psutil.Error:
            break
        processor = times.user + times.system
        done = [read_manifest(one.parent).completed for one in results.glob("*/manifest.json")]
        if done and done[0]:
            readings.append((done[0], (memory.rss - memory.shared) / 1e6))
        time.sleep(1)
    status, seconds = controller.wait(), time.monotonic() - began
    if status:
        sys.exit(f"pytest ended with {status}")
    (directory,) = (one.parent for one in results.glob("*/manifest.json"))
    print(f"{read_manifest(directory).completed} of {experiments} completed")
    print(f"{seconds:.0f} s, {experiments / seconds:.1f} experiments in a second")
    print(f"controller: {1000 * processor / experiments:.0f} ms of processor time for an experiment")
    for part in range(1, PARTS + 1):
        low, high = (experiments * one // PARTS for one in (part - 1, part))
        found = [memory for done, memory in readings if low < done <= high]
        if found:
            print(f"controller's memory, experiments {low + 1:,} to {high:,}: {statistics.median(found):.0f} MB")


if __name__ == "__main__":
    main()
