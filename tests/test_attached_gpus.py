"""The GPUs of a server that runs already: found by its processes, and refused if others use them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Results
from tests.support import nvml
from tests.support.load_studies import patient, result_of, write_load_study
from tests.support.marks import slow
from tests.support.processes import wait_until
from tests.support.serving import mock_server


@contextmanager
def child_of_a_server(file: Path) -> Iterator[tuple[str, int]]:
    """Run a server whose child process uses the GPU, as vLLM's does; its URL, and the child's pid."""
    with mock_server("--grandchild", str(file)) as url:
        wait_until(lambda: file.exists() and file.read_text())
        child = int(file.read_text())
        try:
            yield url, child
        finally:
            subprocess.run(["kill", str(child)], check=True)


@pytest.fixture
def other() -> Iterator[int]:
    """Pid of a process that has nothing to do with the server."""
    process = subprocess.Popen(["sleep", "600"])
    yield process.pid
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    ("gpus", "is_shared"),
    [slow(None, False), (None, True), slow(["GPU-a"], True)],
    ids=["of its own", "shared", "named and shared"],
)
def test_gpus_of_a_running_server_are_its_own_or_refused(
    pytester: pytest.Pytester,
    results: Results,
    nvml_library: Path,
    monkeypatch: pytest.MonkeyPatch,
    other: int,
    gpus: Any,
    is_shared: bool,
) -> None:
    folder = pytester.path
    with child_of_a_server(folder / "child") as (url, child):
        on_a = [f"user {pid} 900 python" for pid in (child, *([other] if is_shared else []))]
        more = {"tick_ms": 20.0, "memory_mb": 80_000}
        devices = [
            nvml.ScriptedGpu("GPU-a", [(0, 100.0)], {**more}, rules=on_a),
            nvml.ScriptedGpu("GPU-b", [(0, 300.0)], {**more}, rules=[f"user {other} 900 python"]),
        ]
        script = nvml.Script(folder / "nvml.script", devices)
        script.write()
        for name, value in nvml.environment(nvml_library, script).items():
            monkeypatch.setenv(name, value)
        write_load_study(
            folder,
            server={"command": None, "url": url, "gpus": gpus},
            energy={"backend": "nvml"},
            measurement={"min_window_seconds": 1},
        )
        run = patient(pytester.runpytest_subprocess, folder)("study.yaml", "-p", "llem")
    if is_shared:
        run.assert_outcomes(failed=1)
        text = (
            f"GPU-a is also used by other processes than the server's ({other}): no energy is the server's alone"
        )
        run.stdout.fnmatch_lines([f"preflight: server.url: {text}"])
        return
    run.assert_outcomes(passed=1)
    result = result_of(results, results.manifest["experiments"][0])
    assert [one["device"] for one in result["devices"]] == ["GPU-a"]
    assert result["metrics"]["mean_power_w"]["value"] == pytest.approx(100, rel=0.01)
    assert result["engine"]["device"] == "cuda"
