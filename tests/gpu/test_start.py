"""A forkserver does not open the GPU, and its processes can use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pytest_llem.engines.tiny_llama import tiny_llama
from pytest_llem.isolation.forkserver_client import ForkServers
from pytest_llem.isolation.launcher import Job, run_isolated
from pytest_llem.results.experiment import ExperimentResult
from pytest_llem.study.config import ExperimentConfig
from tests.support.narrow import not_none
from tests.support.processes import children_called

FIELDS = {
    "model": "builtin:tiny-llama",
    "n": 2,
    "max_output_tokens": 8,
    "warmup": {"enabled": False},
    "baseline": {"enabled": False},
    "measurement": {"min_window_seconds": 1},
}


def _links(pid: int) -> list[str]:
    return [str(Path(file).readlink()) for file in Path(f"/proc/{pid}/fd").iterdir()]


def test_the_server_opens_no_device_and_its_processes_do(
    monkeypatch: pytest.MonkeyPatch, found: Any, gpu: Any
) -> None:
    """Check threads, open files and mappings of the process. A CUDA context also shows as GPU memory."""
    tiny_llama()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    config = ExperimentConfig.model_validate(FIELDS).model_dump(mode="json")
    job = Job({"experiment_id": "one", "config_hash": "0" * 16}, config, directory=".")
    forkservers, digests = ForkServers(), set()
    try:
        for _ in range(3):
            outcome = run_isolated(job, forkservers=forkservers, timeout=300)
            assert outcome.error is None, outcome.error
            result = ExperimentResult.model_validate_json(not_none(outcome.result))
            assert result.engine.device == "cuda"
            digests.add(result.tokens.output_digest)
            (supervisor,) = children_called("forkserver")
            (server,) = supervisor.children()
            assert server.num_threads() == 1
            assert not [link for link in _links(server.pid) if link.startswith("/dev/nvidia")]
        started = result.start
        assert started is not None
        found("began", started.began_at)
        found("ready", started.ready_at)
    finally:
        forkservers.end()
    spawned = run_isolated(job, timeout=300)
    assert spawned.error is None, spawned.error
    digests.add(ExperimentResult.model_validate_json(not_none(spawned.result)).tokens.output_digest)
    assert len(digests) == 1, "the same tokens, however it was started"
