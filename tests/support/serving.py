"""Start the mock server of ``mock_server.py`` in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from pytest_llem.serving.client import LoadRequest

ROOT = Path(__file__).parents[2]


@contextmanager
def mock_server(*options: str) -> Iterator[str]:
    """Run a mock server with *options* as long as the context lasts, and yield its base URL."""
    command = [sys.executable, "-m", "tests.support.mock_server", *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        port = process.stdout.readline().split()[-1]
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def requests(prompt_tokens: int = 8, max_tokens: int = 8) -> Iterator[LoadRequest]:
    """Yield requests of distinct prompts without end."""
    for index in count():
        yield LoadRequest(index, [[index % 1000, *range(prompt_tokens - 1)]], max_tokens)


def all_in_flight(spans: Sequence[tuple[float, float]], slots: int) -> float:
    """Return when all *slots* first had a request in flight, of the begin and end of each request."""
    return min(began for began, _ in spans if sum(since <= began < until for since, until in spans) == slots)


def entries(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a JSON-lines file of the mock server."""
    return [json.loads(line) for line in path.read_text().splitlines()]
