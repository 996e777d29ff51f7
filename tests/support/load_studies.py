"""Write studies of the mock server, and see what they leave behind."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.conftest import Results, RunPytest

#: Maximum number of runs.
_ATTEMPTS = 4

MOCK = Path(__file__).parent / "mock_server.py"

#: A load point takes a second: it has no warm-up, and no idle power.
LOAD_STUDY = {
    "name": "load",
    "backend": "server",
    "n": 4,
    "max_input_tokens": 8,
    "max_output_tokens": 16,
    "load": {"concurrency": 1},
    "warmup": {"enabled": False},
    "baseline": {"enabled": False},
    "measurement": {"min_window_seconds": 0.3},
    "energy": {"backend": "estimate"},
    "execution": {
        "n_cycles": 1,
        "cycle_order": "sequential",
        "experiment_gap_seconds": 0,
        "contended_retries": 0,
    },
}


def write_load_study(folder: Path, *mock: str, server: Any = None, **changes: Any) -> Path:
    """Write ``study.yaml`` with a mock server, and return its path.

    Args:
        folder: Folder to write to.
        mock: Options of the mock server.
        server: Further fields of the section ``server``.
        changes: Fields of the study; ``execution`` and ``measurement`` are merged, and None removes a field.
    """
    command = ["{python}", str(MOCK), "--port", "{port}", *mock]
    study: dict[str, Any] = {**LOAD_STUDY, "server": {"command": command, "vocab_size": 1000, **(server or {})}}
    for name, value in changes.items():
        merges = isinstance(value, dict) and name in ("execution", "measurement")
        study[name] = {**study[name], **value} if merges else value
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in study.items() if v is not None}, sort_keys=False))
    return path


def patient(run: RunPytest, folder: Path) -> RunPytest:
    """Return *run* so that it runs again if the machine is too busy for the load client, as beside other tests.

    Args:
        run: Runs pytest on a study.
        folder: Its folder, which is as it was before when pytest runs again.
    """

    def run_patiently(*arguments: Any, **named: Any) -> pytest.RunResult:
        before = {*folder.rglob("*")}
        for _ in range(_ATTEMPTS):
            done = run(*arguments, **named)
            if "the load client is too slow" not in done.stdout.str():
                break
            for path in sorted({*folder.rglob("*")} - before, reverse=True):
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        return done

    return run_patiently


def processes_in(folder: Path) -> list[str]:
    """Return the command lines of other processes that run in *folder*: all that a study there has started."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and Path(process.cwd()).is_relative_to(folder):
                found.append(" ".join(process.cmdline()))
    return found


def result_of(results: Results, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the result of an entry of the manifest."""
    return results.read(entry["result_file"])
