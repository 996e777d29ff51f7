"""Kill the pytest process with SIGKILL during a study, and check what it leaves."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from pytest_llem import ExperimentResult, StudyResult
from pytest_llem.results.manifest import read_manifest, stored_result
from pytest_llem.results.manifest_records import Manifest
from tests.conftest import NOOP_ENGINE, NOOP_STUDY, OTHER_PLUGINS
from tests.support import instant

#: Records, independently of the manifest, which experiments are saved, and kills its own process at the time that
#: the environment sets. A thread does it, as another process may be late on a busy machine.
CONFTEST = """
import math, os, signal, threading
from pytest_llem.results import manifest

if os.environ["KILLS_JOURNAL"]:  # a study as small as this one would do without
    manifest.REFRESH_SHARE, manifest.REFRESH_PAUSE = 0.1, math.inf

finished = []

def kill_if_due(event):
    if os.environ["KILLS_AFTER"] == event:
        threading.Timer(float(os.environ["KILLS_SECONDS"]), os.kill, (os.getpid(), signal.SIGKILL)).start()

def pytest_collection_finish(session):
    kill_if_due("collection")

def pytest_llem_experiment_finished(result):
    finished.append(result.identity.experiment_id)
    file = os.open(os.environ["KILLS_NOTES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, (finished[-1] + "\\n").encode())
    os.close(file)
    kill_if_due(str(len(finished)))
"""

#: Only ends a hang, in s.
TIMEOUT_SECONDS = 300.0


def write_study(folder: Path, points: int, *, at_once: bool = False) -> None:
    """Write a study of the engine ``noop`` and its conftest.

    Args:
        folder: Folder to write to.
        points: Number of experiments.
        at_once: Whether the experiments take no time, so that the pytest process only writes.
    """
    sweep = {"noop.seconds": [round(n * 1e-9, 9) for n in range(points)]}
    study = {**NOOP_STUDY, "sweep": sweep, "execution": {"n_cycles": 1, "cycle_order": "sequential"}}
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    (folder / "conftest.py").write_text((instant.conftest(1000) if at_once else "") + CONFTEST)


def kills(folder: Path, number: int, saved: int, longest: float, seed: int) -> Iterator[Counter[str]]:
    """Run the study of *folder* repeatedly, two at a time, and kill each run at a random moment.

    Args:
        folder: Made by :func:`write_study`.
        number: Number of kills.
        saved: Kills happen after 1 to this many saved experiments, evenly spread; a fifth happen after collection.
        longest: Maximum time after that, in s.
        seed: Seed of the random moments.

    Yields:
        For each kill, the number of experiments in each status.

    Raises:
        AssertionError: A file that was left is wrong, or a finished experiment is lost.
    """
    rng = random.Random(seed)
    moments = [rng.uniform(0.0, longest) for _ in range(number)]
    after = [0 if at % 5 == 0 else max(1, saved * (at + 1) // number) for at in range(number)]
    with ThreadPoolExecutor(2) as pool:
        yield from pool.map(lambda at: _kill(folder, at, after[at], moments[at]), range(number))


def _kill(folder: Path, number: int, after: int, moment: float) -> Counter[str]:
    own = folder / f"run-{number}"
    own.mkdir()
    notes = own / "notes"
    notes.touch()
    inherited = os.environ.get("PYTHONPATH")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(NOOP_ENGINE), inherited])),
        "PYTEST_ADDOPTS": " ".join(f"-p no:{name}" for name in ("cacheprovider", *OTHER_PLUGINS)),
        "TMPDIR": str(own),
        "KILLS_NOTES": str(notes),
        "KILLS_JOURNAL": "yes" if number % 2 else "",
        "KILLS_AFTER": str(after or "collection"),
        "KILLS_SECONDS": str(moment),
    }
    command = [sys.executable, "-m", "pytest", "study.yaml", "-p", "llem", "--llem-yes"]
    command += ["--llem-results-dir", str(own / "results")]
    with (own / "output").open("w") as output:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            timeout=TIMEOUT_SECONDS,
        )
    assert done.returncode == -signal.SIGKILL, (own / "output").read_text()
    finished = notes.read_text().splitlines()
    assert len(finished) >= after
    return _check(own / "results", finished)


def _check(results: Path, finished: list[str]) -> Counter[str]:
    """Assert that the results are consistent, and return the number of experiments in each status."""
    made = list(results.glob("noop_*/manifest.json"))
    if not made:
        assert not finished, "an experiment was run before there was a manifest"
        return Counter()
    (file,) = made
    Manifest.read(file)
    manifest = read_manifest(file.parent)
    assert manifest.status == "interrupted"
    for entry in manifest.experiments:
        if entry.status == "completed":
            text = stored_result(file.parent, entry)
            assert text is not None, f"{entry.experiment_id} is called completed and has no whole result"
            result = ExperimentResult.model_validate_json(text)
            assert result.identity.experiment_id == entry.experiment_id
        elif entry.status == "failed":
            assert entry.error is not None
            assert entry.error.kind == "interrupted", entry.error
            assert entry.started_at is not None
            assert entry.completed_at is None
    statuses = {entry.experiment_id: entry.status for entry in manifest.experiments}
    lost = [one for one in finished if statuses[one] != "completed"]
    assert not lost, f"finished before the kill, and lost: {lost}"
    assert sum(entry.status == "failed" for entry in manifest.experiments) <= 1
    loaded = StudyResult.load(file.parent)
    assert loaded.status == "interrupted"
    assert {entry.experiment_id: entry.status for entry in loaded.experiments} == statuses
    assert sum(point.metrics["seconds"].n for point in loaded.points) == loaded.summary.completed
    return Counter(statuses.values())
