"""Measure how experiments are distributed over eight scripted GPUs.

    python tests/benchmarks/many_gpus.py speed-up [--seconds 1] [--experiments 32] [--rounds 1]
    python tests/benchmarks/many_gpus.py overhead [--experiments 1000]
    python tests/benchmarks/many_gpus.py stress [--experiments 400] [--kills 10]

The experiments wait and compute nothing. ``speed-up`` prints the time of a study with 1, 2, 4 and 8 workers, and
the ratio to that of one worker, between the first start and the last end of an experiment. ``overhead`` prints
the time per experiment of a study whose experiments take no time, with 1, 2, 4 and 8 workers. ``stress`` runs two
studies side by side, with experiments of random lengths on 1, 2 and 4 GPUs, and kills workers: every experiment
has to end once, with a result or a reason, and no GPU may have two at a time.

The figures depend on the CPUs: each experiment starts some processes. The scripted NVML library is built with gcc.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.support import boards, nvml
from tests.support.boards import SECTION, STUDY, stays


def write(folder: Path, name: str, experiments: list[dict[str, Any]], **execution: Any) -> Path:
    """Write a study of *experiments*, each given by the options of its engine."""
    study = {
        **STUDY,
        "name": name,
        "experiments": [{SECTION: options} for options in experiments],
        "execution": {**STUDY["execution"], **execution},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


def start(folder: Path, env: Mapping[str, str], *options: str) -> subprocess.Popen[str]:
    """Start pytest in *folder*."""
    fixed = ["-p", "pytest_llem.plugin", "-p", "no:cacheprovider", "-q", f"--rootdir={folder}", "--llem-yes"]
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", *fixed, "--llem-start-method=forkserver", *options],
        cwd=folder,
        env={**env, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], *, failures: bool = False) -> str:
    """Wait for pytest, and return its output."""
    output, _ = process.communicate()
    if process.returncode not in ((0, 1) if failures else (0,)):
        sys.exit(f"pytest ended with {process.returncode}:\n{output}")
    return output


def span(notes: Path) -> float:
    """Return the time from the first start to the last end of an experiment's work, in s."""
    found = stays(notes)
    return max(one.ended for one in found) - min(one.began for one in found)


def run(env: Mapping[str, str], workers: int, experiments: int, seconds: float) -> tuple[float, float]:
    """Run experiments of so many *seconds*, and return the time between them and that of the whole run, in s."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        notes = folder / "notes"
        notes.mkdir()
        options = [{"folder": str(notes), "seconds": seconds, "number": at} for at in range(experiments)]
        write(folder, "study", options)
        began = time.monotonic()
        finish(start(folder, env, "study.yaml", "-p", "xdist.plugin", "-n", str(workers)))
        whole = time.monotonic() - began
        found = stays(notes)
        assert len(found) == experiments, f"{len(found)} experiments"
        assert not boards.shared(found), "a GPU had two experiments at a time"
        return span(notes), whole


def speed_up(env: Mapping[str, str], options: argparse.Namespace) -> None:
    print(f"{options.experiments} experiments of {options.seconds:g} s, {os.cpu_count()} CPUs")
    alone: float | None = None
    for workers in (1, 2, 4, 8):
        runs = [run(env, workers, options.experiments, options.seconds) for _ in range(options.rounds)]
        middle, whole = (statistics.median(column) for column in zip(*runs, strict=True))
        alone = alone or middle
        print(
            f"-n {workers}: {middle:.1f} s between the first start and the last end, {whole:.1f} s in all, "
            f"speed-up {alone / middle:.2f} = {alone / middle / workers:.2f} × {workers}",
            flush=True,
        )


def overhead(env: Mapping[str, str], options: argparse.Namespace) -> None:
    for workers in (1, 2, 4, 8):
        middle, _ = run(env, workers, options.experiments, 0.0)
        each = 1000 * middle / options.experiments
        print(f"-n {workers}: {each:.0f} ms an experiment, {workers * each:.0f} ms of a worker", flush=True)


def kill_workers(process: subprocess.Popen[str], count: int, rng: random.Random, notes: Path) -> None:
    """Kill some of pytest's workers, one after the other, at random times once experiments have started."""
    while process.poll() is None and len(stays(notes)) < len(boards.UUIDS):
        time.sleep(0.5)
    while count and process.poll() is None:
        time.sleep(rng.uniform(0.5, 3.0))
        with suppress(psutil.Error, IndexError):
            # One that has started an experiment: xdist does not survive the death of a worker that it starts.
            rng.choice([one for one in boards.workers_of(process.pid) if one.children()]).kill()
            count -= 1


def stress(env: Mapping[str, str], options: argparse.Namespace) -> None:
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        notes = folder / "notes"
        notes.mkdir()
        started, killers = [], []
        for number, study in enumerate("ab"):
            experiments = [
                {
                    "folder": str(notes),
                    "seconds": round(rng.uniform(0.0, 2 * options.seconds), 2),
                    "gpus": rng.choice([1, 1, 2, 4]),
                    "number": 10_000 * number + at,
                }
                for at in range(options.experiments // 2)
            ]
            write(folder, study, experiments)
            more = ("-p", "xdist.plugin", "-n", "8", "--llem-run-id=run", "--max-worker-restart=1000")
            started.append(start(folder, env, f"{study}.yaml", *more))
            killers.append(
                threading.Thread(
                    target=kill_workers, args=(started[-1], options.kills // 2, random.Random(number), notes)
                )
            )
            killers[-1].start()
        began = time.monotonic()
        for process in started:
            finish(process, failures=True)
        took = time.monotonic() - began
        for killer in killers:
            killer.join()
        check(folder, options.experiments, took)


def check(folder: Path, experiments: int, took: float) -> None:
    """Check and print what two runs side by side have done."""
    entries = []
    waits = []
    for study in "ab":
        directory = folder / "results" / f"{study}_run"
        manifest = json.loads((directory / "manifest.json").read_text())
        entries += manifest["experiments"]
        for entry in manifest["experiments"]:
            if entry["status"] == "completed":
                waits.append(json.loads((directory / entry["result_file"]).read_text())["gap"]["waited_seconds"])
    statuses = Counter(entry["status"] for entry in entries)
    reasons = Counter(entry["error"]["type"] for entry in entries if entry["error"])
    found = stays(folder / "notes")
    runs_of_each = Counter(one.number for one in found)
    both = boards.shared(found)
    lengths = [one.ended - one.began for one in found]
    print(f"{experiments} experiments in {took:.0f} s: {dict(statuses)}, failed with {dict(reasons)}")
    print(f"started more than once: {sum(count > 1 for count in runs_of_each.values())}")
    print(f"two experiments on a GPU at a time: {len(both)}")
    print(f"GPUs in use at a time: up to {boards.busiest(found)} of {len(boards.UUIDS)}")
    print(
        f"wait for a lease: median {statistics.median(waits):.2f} s, longest {max(waits):.2f} s; "
        f"an experiment has its GPUs for {statistics.fmean(lengths):.2f} s, at most {max(lengths):.2f} s"
    )
    if sum(statuses[one] for one in ("completed", "failed")) != experiments or both:
        sys.exit(1)
    if any(count > 1 for count in runs_of_each.values()) or len(runs_of_each) < statuses["completed"]:
        sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed-up", "overhead", "stress"))
    parser.add_argument("--experiments", type=int)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    what, default = {
        "speed-up": (speed_up, 32),
        "overhead": (overhead, 1000),
        "stress": (stress, 400),
    }[options.what]
    options.experiments = options.experiments or default
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        what(boards.give_boards(nvml.build(folder), folder), options)


if __name__ == "__main__":
    main()
