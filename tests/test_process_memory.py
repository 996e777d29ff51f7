"""The most memory that this process has held, on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pytest_llem import run_experiment
from pytest_llem.backends import process_memory
from pytest_llem.backends.process_memory import peak_rss_bytes, reset_peak_rss
from tests.support.tiny import TINY

MUCH = 100_000_000


def _take(size: Any) -> None:
    """Hold so much for a moment; the kernel has it back at once."""
    memory = bytearray(size)
    memory[::4096] = b"x" * len(memory[::4096])


def test_the_peak_is_that_since_it_was_reset() -> None:
    assert reset_peak_rss()
    before = peak_rss_bytes()
    _take(MUCH)
    assert before + 0.9 * MUCH < peak_rss_bytes() < before + 1.5 * MUCH
    assert reset_peak_rss()
    assert peak_rss_bytes() < before + 0.5 * MUCH, "what was there before is none of it"


@pytest.mark.parametrize("missing", ["_CLEAR_REFS", "_STATUS"])
def test_where_the_kernel_does_not_tell_there_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str
) -> None:
    """The whole process's, with loading and all, is not the window's."""
    monkeypatch.setattr(process_memory, missing, tmp_path / "nowhere" / "file")
    found = run_experiment(TINY).metrics["peak_memory_mb"]
    assert (found.value, found.reason) == (None, "the engine cannot tell")
