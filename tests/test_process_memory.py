"""Peak memory of this process, on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_llem import run_experiment
from pytest_llem.engines import process_memory
from pytest_llem.engines.process_memory import peak_rss_bytes, reset_peak_rss
from tests.support.marks import slow
from tests.support.tiny import TINY

MUCH = 100_000_000


def _take(size: int) -> None:
    """Allocate the given bytes for a moment; they return to the kernel at once."""
    memory = bytearray(size)
    memory[::4096] = b"x" * len(memory[::4096])


def test_peak_memory_is_that_since_the_reset() -> None:
    assert reset_peak_rss()
    before = _peak()
    _take(MUCH)
    assert before + 0.9 * MUCH < _peak() < before + 1.5 * MUCH
    assert reset_peak_rss()
    assert _peak() < before + 0.5 * MUCH, "what there was before does not count"


def _peak() -> int:
    peak = peak_rss_bytes()
    assert peak is not None
    return peak


@pytest.mark.parametrize("missing", ["_CLEAR_REFS", slow("_STATUS")])
def test_peak_memory_is_unknown_without_the_kernels_counter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str
) -> None:
    """The peak of the whole process, including the load, is not that of the window."""
    monkeypatch.setattr(process_memory, missing, tmp_path / "nowhere" / "file")
    found = run_experiment(TINY).metrics["peak_memory_mb"]
    assert (found.value, found.reason) == (None, "the engine does not report it")
