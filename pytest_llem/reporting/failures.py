"""Group the errors of experiments, as reports show them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pytest_llem.results.manifest_records import ErrorRecord, ManifestEntry


@dataclass(frozen=True)
class Failure:
    """Experiments that failed with the same error.

    Attributes:
        ids: Ids of the experiments.
        error: The error of the first experiment.
        expected: Why the experiments were expected to fail; None if they were not.
    """

    ids: list[str]
    error: ErrorRecord
    expected: str | None


def failures(entries: Iterable[ManifestEntry]) -> list[Failure]:
    """Return the distinct errors, each with the experiments that it occurred in."""
    found: dict[tuple[Any, ...], Failure] = {}
    for entry in entries:
        if entry.error is None or entry.status not in ("failed", "skipped"):
            continue
        error, expected = entry.error, entry.reason if entry.status == "skipped" else None
        key = (error.kind, error.type, error.phase, error.message, expected)
        found.setdefault(key, Failure([], error, expected)).ids.append(entry.experiment_id)
    return list(found.values())
