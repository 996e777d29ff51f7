"""Group the errors of experiments, and count those that did not complete, as reports show them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pytest_llem.results.manifest_records import ErrorRecord, ManifestEntry
from pytest_llem.results.study_result import StudyResult


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


def not_completed(result: StudyResult) -> dict[str, int]:
    """Return how many experiments failed, were skipped and did not run, by these words and without zeros."""
    statuses = Counter(entry.status for entry in result.experiments)
    left = statuses["pending"] + statuses["running"]
    numbers = {"failed": result.summary.failed, "skipped": statuses["skipped"], "not run": left}
    return {what: number for what, number in numbers.items() if number}
