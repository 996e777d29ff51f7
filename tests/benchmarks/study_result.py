"""Measure the cost of ending a large study: time and memory of its StudyResult.

    python tests/benchmarks/study_result.py [--points 10000] [--cycles 2]

Every experiment is completed, with the stored result of ``tests/golden``. Prints the seconds that
``build_study_result`` and writing take, and the increase of peak memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import tempfile
import time
from pathlib import Path

from pytest_llem.results.manifest_records import Manifest, ManifestEntry
from pytest_llem.results.points import PointResult
from pytest_llem.results.study_result import StudyResult, StudySummary, build_study_result
from pytest_llem.times import now

GOLDEN = Path(__file__).parent.parent / "golden" / "1.0"


def study(directory: Path, points: int, cycles: int) -> tuple[StudyResult, Manifest]:
    """Write the results of a finished study, and return its design and its manifest."""
    given = json.loads(min(GOLDEN.glob("experiments/*.json")).read_text())
    (directory / "experiments").mkdir()
    entries = []
    for cycle in range(1, cycles + 1):
        for n in range(points):
            config_hash = f"{n:016x}"
            identity = {"experiment_id": f"n={n}-cycle={cycle}", "config_hash": config_hash, "cycle": cycle}
            text = json.dumps({**given, "identity": identity}).encode()
            file = f"experiments/{config_hash}-c{cycle}.json"
            (directory / file).write_bytes(text)
            entries.append(
                ManifestEntry(
                    experiment_id=identity["experiment_id"],
                    config_hash=config_hash,
                    config_summary=f"n={n}",
                    cycle=cycle,
                    status="completed",
                    result_file=file,
                    result_sha256=hashlib.sha256(text).hexdigest(),
                    completed_at=now(),
                )
            )
    about = {"pytest_llem_version": "0", "study_design_hash": "0" * 16}
    config = given["effective_config"]
    design = StudyResult(
        **about,
        name="benchmark",
        status="running",
        summary=StudySummary(total=len(entries), completed=0, failed=0, wall_seconds=0.0),
        points=[
            PointResult(id=f"n={n}", axes={"n": n}, config=dict(config), config_hash=f"{n:016x}", metrics={})
            for n in range(points)
        ],
        experiments=[],
    )
    manifest = Manifest(
        **about,
        study_name="benchmark",
        status="completed",
        started_at=now(),
        total_experiments=len(entries),
        experiments=entries,
    )
    return design, manifest


def peak() -> float:
    """Return the peak memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=10_000)
    parser.add_argument("--cycles", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        design, manifest = study(Path(folder), options.points, options.cycles)
        before = peak()
        begun = time.perf_counter()
        result = build_study_result(design, manifest, Path(folder))
        built = time.perf_counter()
        text = result.model_dump_json(indent=1)
        (Path(folder) / "study_result.json").write_text(text)
        written = time.perf_counter()
        assert result.summary.completed == options.points * options.cycles
        print(f"{options.points} points x {options.cycles} cycles, {len(text) / 1e6:.0f} MB of JSON:")
        print(f"  built in {built - begun:.1f} s, written in {written - built:.1f} s")
        print(f"  peak memory {before:.0f} MB before, {peak():.0f} MB after")


if __name__ == "__main__":
    main()
