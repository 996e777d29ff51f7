"""Measure the cost of a transition of the manifest: in a study of 100 experiments, and in one of 20,000.

    python tests/benchmarks/manifest.py [--points 100 20000] [--transitions 4000] [--rounds 5] [--directory DIR]

A transition is the start or the failure of an experiment; neither writes a result. Each round times the same
number of them for each size, in alternating blocks of 100, on the same file system. The last line is the median of
the rounds' ratios. The mean includes the occasional rewrite of ``manifest.json``; the median transition does not.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from functools import partial
from itertools import cycle
from pathlib import Path

from pytest_llem.results.manifest import ManifestWriter
from pytest_llem.results.manifest_records import ErrorRecord, Manifest, ManifestEntry
from pytest_llem.times import now

BLOCK = 100


class Study:
    """A study whose experiments all fail.

    Args:
        directory: Folder of its manifest.
        points: Number of experiments.
    """

    def __init__(self, directory: Path, points: int) -> None:
        directory.mkdir()
        ids = [f"batch_size={n}-precision=bf16-cycle=1" for n in range(points)]
        entries = [
            ManifestEntry(experiment_id=one, config_hash=f"{n:016x}", config_summary=one, cycle=1)
            for n, one in enumerate(ids)
        ]
        manifest = Manifest(
            study_name="benchmark",
            study_design_hash="0" * 16,
            pytest_llem_version="0",
            started_at=now(),
            total_experiments=points,
            experiments=entries,
        )
        self._writer = ManifestWriter(directory, manifest)
        self._ids = cycle(ids)

    def block(self) -> list[float]:
        """Return the time of each of the next transitions, in s."""
        error = ErrorRecord(kind="exception", type="ValueError", message="no")
        took = []
        for _ in range(BLOCK // 2):
            one = next(self._ids)
            for transition in (partial(self._writer.running, one), partial(self._writer.failed, one, error)):
                begun = time.perf_counter()
                transition()
                took.append(time.perf_counter() - begun)
        return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, nargs=2, default=[100, 20_000])
    parser.add_argument("--transitions", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="on the file system to be measured")
    options = parser.parse_args()
    ratios: dict[str, list[float]] = {"median": [], "mean": []}
    for number in range(1, options.rounds + 1):
        with tempfile.TemporaryDirectory(dir=options.directory) as folder:
            studies = [Study(Path(folder, str(points)), points) for points in options.points]
            took: list[list[float]] = [[] for _ in studies]
            for _ in range(options.transitions // BLOCK):
                for study, times in zip(studies, took, strict=True):
                    times += study.block()
        print(f"round {number}:")
        for points, times in zip(options.points, took, strict=True):
            median, mean = statistics.median(times), statistics.fmean(times)
            print(f"  {points:>6} points: median {median * 1000:.3f} ms, mean {mean * 1000:.3f} ms a transition")
        for name, figure in (("median", statistics.median), ("mean", statistics.fmean)):
            ratios[name].append(figure(took[1]) / figure(took[0]))
    small, large = options.points
    for name, found in ratios.items():
        print(f"{name} transition, {large} points / {small}: {statistics.median(found):.2f}")


if __name__ == "__main__":
    main()
