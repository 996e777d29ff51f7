"""The tables of what gates promise, on the page on verdicts, are those of ``tests/benchmarks/gates.py``."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest

from pytest_llem.gates.power_analysis import detectable
from tests.conftest import ROOT
from tests.support.pairs import ALPHA, FAMILY, grid

BENCHMARK = ROOT / "tests" / "benchmarks" / "gates.py"

PAGE = (ROOT / "docs" / "explanation" / "verdicts.md").read_text()


def tables(text: Any) -> Any:
    """Return the percentages in each table whose rows begin with a CV and a number of cycles, by CV and number."""
    found = []
    for block in re.findall(r"^\| CV.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.M):
        rows = [line.strip("| ").split("|") for line in block.splitlines()]
        found.append(
            {
                (float(cv.strip(" %")) / 100, int(n)): [
                    float(one) for one in re.findall(r"([\d.,]+) ?%", " ".join(cells))
                ]
                for cv, n, *cells in rows
            }
        )
    return found


@pytest.fixture(scope="module")
def page() -> tuple[dict[tuple[Any, ...], list[float]], ...]:
    alarms, changes = tables(PAGE)
    assert list(alarms) == list(changes) == list(grid())
    return alarms, changes


def test_detectable_changes_on_the_page(page: tuple[dict[tuple[Any, ...], list[float]], ...]) -> None:
    for (cv, n), shown in page[1].items():
        changes = [
            detectable(cv, n, n, delta=0.02, alpha=ALPHA, family=family, paired=paired)
            for paired in (False, True)
            for family in (1, FAMILY, 50)
        ]
        found = [100 * change for change in changes if change is not None]
        assert shown == pytest.approx(found, abs=0.051, rel=0.005), (cv, n)


@pytest.mark.slow
def test_false_alarm_rates_on_the_page(page: tuple[dict[tuple[Any, ...], list[float]], ...]) -> None:
    """What is simulated holds, and is what the page shows, up to four standard errors of fewer families."""
    families = 1000
    command = [sys.executable, str(BENCHMARK), "--families", str(families)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    same, sessions, _ = tables(done.stdout)
    for point, shown in page[0].items():
        unpaired, delta_of_aa, paired = sessions[point][:2], sessions[point][2:4], sessions[point][-2:]
        for rate, found in zip(shown, [*same[point], *unpaired, *delta_of_aa, *paired], strict=True):
            share = rate / 100
            error = 100 * (share * (1 - share) / families) ** 0.5
            assert found == pytest.approx(rate, abs=4 * error + 0.02), point
