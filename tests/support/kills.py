"""SIGKILL of the pytest process at some moment of a study, and what has to be true of what it leaves."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from pytest_llem import ExperimentResult, StudyResult
from pytest_llem.results.manifest import read_manifest, stored_result
from pytest_llem.results.models import Manifest
from tests.conftest import NOOP_ENGINE, NOOP_STUDY, OTHER_PLUGINS
from tests.support import instant

#: Notes, independently of the manifest, when the first experiment may begin and which ones are saved.
CONFTEST = """
import math, os
from pytest_llem.results import manifest

if os.environ["KILLS_JOURNAL"]:  # a study as small as this one would do without
    manifest.REFRESH_SHARE, manifest.REFRESH_PAUSE = 0.1, math.inf

started = []

def note(text):
    file = os.open(os.environ["KILLS_NOTES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, (text + "\\n").encode())
    os.close(file)

def pytest_collection_finish(session):
    note("= collected")

def pytest_runtest_logstart(nodeid):
    if not started:
        started.append(nodeid)
        note("= started")

def pytest_llem_experiment_finished(result):
    note(result.identity.experiment_id)
"""

STARTUP_SECONDS = 60.0


def write_study(folder: Path, points: int, *, at_once: bool = False) -> None:
    """Write a study of the engine ``noop`` and its conftest.

    Args:
        folder: Where they go.
        points: Number of experiments.
        at_once: The experiments take no time, so that the pytest process does nothing but write.
    """
    sweep = {"noop.seconds": [round(n * 1e-9, 9) for n in range(points)]}
    study = {**NOOP_STUDY, "sweep": sweep, "execution": {"n_cycles": 1, "cycle_order": "sequential"}}
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    (folder / "conftest.py").write_text((instant.conftest(1000) if at_once else "") + CONFTEST)


def kills(folder: Path, number: int, saved: int, longest: float, seed: int) -> Iterator[Counter[str]]:
    """Run the study of *folder* so often, two at a time, and kill each at a random moment.

    Args:
        folder: Made by :func:`write_study`.
        number: Of kills.
        saved: Kills come after up to so many experiments were saved, evenly spread; a fifth come after collection.
        longest: The latest moment after that, in seconds.
        seed: Of the moments.

    Yields:
        How many experiments were in each status, for each kill: at least as many as it came after are completed.

    Raises:
        AssertionError: What was left is not as it has to be.
    """
    rng = random.Random(seed)
    moments = [rng.uniform(0.0, longest) for _ in range(number)]
    after = [0 if at % 5 == 0 else saved * (at + 1) // number for at in range(number)]
    with ThreadPoolExecutor(2) as pool:
        yield from pool.map(lambda at: _kill(folder, at, after[at], moments[at]), range(number))


def _kill(folder: Path, number: int, after: int, moment: float) -> Counter[str]:
    own = folder / f"run-{number}"
    own.mkdir()
    notes = own / "notes"
    inherited = os.environ.get("PYTHONPATH")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(NOOP_ENGINE), inherited])),
        "PYTEST_ADDOPTS": " ".join(f"-p no:{name}" for name in ("cacheprovider", *OTHER_PLUGINS)),
        "TMPDIR": str(own),
        "KILLS_NOTES": str(notes),
        "KILLS_JOURNAL": "yes" if number % 2 else "",
    }
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "pytest",
            "study.yaml",
            "-p",
            "llem",
            "--llem-yes",
            "--llem-results-dir",
            str(own / "results"),
        ],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + STARTUP_SECONDS
        mark = "= collected" if number % 5 == 0 else "= started"
        while not _has_come_to(notes, mark, after):
            assert process.poll() is None, process.communicate()[0].decode()
            assert time.monotonic() < deadline, f"pytest did not come to {mark!r}, and {after} saved experiments"
            time.sleep(0.005)
        time.sleep(moment)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    assert process.returncode == -signal.SIGKILL, "it was done before"
    finished = _finished(notes)
    assert len(finished) >= after
    return _check(own / "results", finished)


def _has_come_to(notes: Path, mark: str, after: int) -> bool:
    return notes.exists() and mark in notes.read_text() and len(_finished(notes)) >= after


def _finished(notes: Path) -> list[str]:
    return [line for line in notes.read_text().splitlines() if not line.startswith("= ")]


def _check(results: Path, finished: list[str]) -> Counter[str]:
    """Assert that what is there is true, and return how many experiments are in each status."""
    made = list(results.glob("noop_*/manifest.json"))
    if not made:
        assert not finished, "an experiment was run before there was a manifest"
        return Counter()
    (file,) = made
    Manifest.read(file)
    manifest = read_manifest(file.parent)
    assert manifest.status == "running"
    for entry in manifest.experiments:
        if entry.status == "completed":
            text = stored_result(file.parent, entry)
            assert text is not None, f"{entry.experiment_id} is called completed and has no whole result"
            result = ExperimentResult.model_validate_json(text)
            assert result.identity.experiment_id == entry.experiment_id
        elif entry.status == "running":
            assert entry.started_at is not None
            assert entry.completed_at is None
    statuses = {entry.experiment_id: entry.status for entry in manifest.experiments}
    lost = [one for one in finished if statuses[one] != "completed"]
    assert not lost, f"finished before the kill, and lost: {lost}"
    assert sum(entry.status == "running" for entry in manifest.experiments) <= 1
    loaded = StudyResult.load(file.parent)
    assert loaded.status == "running"
    assert {entry.experiment_id: entry.status for entry in loaded.experiments} == statuses
    assert sum(point.metrics["seconds"].n for point in loaded.points) == loaded.summary.completed
    return Counter(statuses.values())
