"""Read the results of llama-bench as JSON, JSON lines or CSV. Each of its tests is imported as a run."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from pytest_llem.importers.reading import Fields, fail
from pytest_llem.importers.run import ToolRun, figures

FORMAT, TOOL = "llama-bench", "llama-bench"

#: Whole numbers, which CSV has as text.
_NUMBER = re.compile(r"-?\d{1,18}")

#: What is not a setting: what was measured, the build, and what names the machine or a path on it.
_RESULTS = {
    *("test_time", "avg_ns", "stddev_ns", "avg_ts", "stddev_ts", "samples_ns", "samples_ts"),
    *("build_commit", "build_number", "cpu_info", "gpu_info", "backends", "model_filename"),
}


def matches(document: Any) -> bool:
    """Return whether *document* is one test, or a list of them."""
    first = document[0] if isinstance(document, list) and document else document
    return isinstance(first, dict) and "avg_ns" in first and "n_gen" in first


def matches_csv(text: str) -> bool:
    """Return whether *text* is a table of tests."""
    header = text.partition("\n")[0]
    return "avg_ns" in header and "n_gen" in header and header.startswith("build_commit")


def rows(file: Any, text: str) -> list[Fields]:
    """Return the tests in a table.

    Raises:
        ImportFileError: A row has another number of cells than the header.
    """
    found = []
    try:
        for number, row in enumerate(csv.DictReader(io.StringIO(text)), start=2):
            if None in row or None in row.values():
                fail(file, f"line {number} does not have the cells of the header")
            cells = {name: int(cell) if _NUMBER.fullmatch(cell) else cell for name, cell in row.items()}
            found.append(Fields(file, cells, f"line {number}"))
    except csv.Error as error:
        fail(file, f"not valid CSV: {error}")
    return found


def read(test: Fields) -> Iterator[ToolRun]:
    """Yield the run of a test. A file is written by one process, which loads the model: its tests share a start.

    Raises:
        ImportFileError: A value has the wrong type.
    """
    prompt, generated = test.count("n_prompt") or 0, test.count("n_gen") or 0
    nanoseconds = test.number("avg_ns")
    seconds = None if not nanoseconds else nanoseconds / 1e9
    commit, number = test.text("build_commit"), test.count("build_number")
    known = commit not in (None, "unknown")
    yield ToolRun(
        files=[test.file],
        format=FORMAT,
        tool=TOOL,
        version=f"{'' if number is None else f'b{number} '}{commit}" if known else None,
        settings=dict(_settings(test)),
        document=test.data,
        model=test.text("model_type"),
        concurrency=1,
        times_unknown_reason="llama-bench writes no times of requests, only the means of its tests",
        figures=figures(
            {
                "seconds": seconds,
                "input_tokens": float(prompt),
                "output_tokens": float(generated),
                # A test of a prompt generates nothing, so that it has no rate.
                "output_tokens_per_second": generated / seconds if seconds and generated else None,
                "requests_per_second": 1 / seconds if seconds else None,
            }
        ),
        completed=1,
        seconds=seconds,
        ended_at=_time(test.text("test_time")),
        server_start=str(test.file),
    )


def _settings(test: Fields) -> Iterator[tuple[str, Any]]:
    for name, value in test.data.items():
        if name not in _RESULTS:
            yield name, int(value) if isinstance(value, bool) else value  # 0 and 1 in CSV


def _time(text: str | None) -> datetime | None:
    try:
        return None if text is None else datetime.fromisoformat(text).astimezone(UTC)
    except ValueError:
        return None
