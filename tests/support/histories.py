"""Make the results of many commits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from pytest_llem import StudyResult
from tests.support.study_results import H100, point, study_result

#: The testbed of the results.
TESTBED = H100 | {"host_cpu": "AMD EPYC 9654"}

#: Sizes of batches, each of which is a point.
SIZES = (1, 2, 4, 8)

CYCLES = 5

Effect = Callable[[int, int], float]


def commit_id(at: int) -> str:
    """Return the id of a commit, by its position."""
    return hashlib.sha1(str(at).encode()).hexdigest()


def results(effect: Effect, commits: int = 200, *, seed: int = 1, **fields: Any) -> Iterator[StudyResult]:
    """Yield the result of each commit, with noise of 1 % from run to run and from cycle to cycle.

    Args:
        effect: Returns by how much energy and time are larger at a commit and a batch size, as a logarithm.
        commits: Number of commits.
        seed: Seed of the noise.
        fields: Fields of the results.
    """
    random = np.random.default_rng(seed)
    for at in range(commits):
        points = []
        for size in SIZES:
            session, logs = 0.01 * random.standard_normal(3), 0.01 * random.standard_normal((3, CYCLES))
            change = np.array([effect(at, size), -effect(at, size), effect(at, size)])
            energy, speed, ttft = np.exp((session + change)[:, None] + logs)
            figures: dict[str, Any] = {
                "energy_per_output_token_j": list(0.5 / size * energy),
                "output_tokens_per_second": list(100.0 * size * speed),
                "ttft_p50_ms": list(20.0 * ttft),
                "sut": {"torch": "2.12.0" if at < 110 else "2.13.0", "commit": commit_id(at)},
                "result_digests": [f"{seed}-{at}-{size}-{cycle}" for cycle in range(CYCLES)],
            }
            points.append(point({"batch_size": size}, config_hash=f"{size:016}", testbed=TESTBED, **figures))
        started = (datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=20 * at)).isoformat()
        known: dict[str, Any] = {
            "name": "llama",
            "started_at": started.replace("+00:00", "Z"),
            "environment": {"git": {"commit": commit_id(at), "dirty": False}},
            "measurement_protocol": {"n_cycles": CYCLES, "gates": {}},
        }
        yield study_result(*points, **(known | fields))


def three_changes(at: int, size: int) -> float:
    """Return 6 % more from commit 60 on, 5 % less again from 110 on, and at large sizes 10 % more from 160 on."""
    found = 0.06 * (at >= 60) - 0.05 * (at >= 110)
    return found + 0.1 * (at >= 160 and size >= 4)


def drift(at: int, size: int) -> float:
    """Return 10 % more over 200 commits, at the smallest size."""
    return 0.1 * at / 199 * (size == 1)


def unchanged(at: int, size: int) -> float:
    """Return no change."""
    return 0.0
