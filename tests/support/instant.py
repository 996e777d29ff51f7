"""A conftest whose experiments take no time, to test what the pytest process does between them."""

from __future__ import annotations

from pathlib import Path

RESULTS = Path(__file__).parent.parent / "golden" / "1.0" / "experiments"

CONFTEST = """\
import json
from pathlib import Path

import pytest

from pytest_llem.execution import experiment
from pytest_llem.isolation.outcome import Outcome

RESULT = json.loads(min(Path({results!r}).glob("*.json")).read_text())
_count = 0


def _instant(job, **_):
    global _count
    _count += 1
    filling = f"{{_count:09}}," * ({payload} // 10)  # a string of its own every time
    text = json.dumps({{**RESULT, "identity": job.identity, "environment": {{"filling": filling}}}})
    return Outcome(text, {{"requests.csv": filling + "."}}, output=filling + "!")


def pytest_configure(config):
    patch = pytest.MonkeyPatch()
    patch.setattr(experiment, "run_isolated", _instant)
    config.add_cleanup(patch.undo)  # this process may run another pytest
"""


def conftest(payload: int) -> str:
    """Return the conftest's text.

    Args:
        payload: About the size in bytes of the file beside each result, of the output, and of what is added to the
            result.
    """
    return CONFTEST.format(results=str(RESULTS), payload=payload)
