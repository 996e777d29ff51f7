"""A gate's verdict as the reports that pytest would make of a test."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from pytest_llem.gates.gate import Gate
from pytest_llem.gates.text import verdict_line, verdict_text
from pytest_llem.results.verdicts import GateVerdict

Location = tuple[str, int, str]


@dataclass(frozen=True)
class Marks:
    """What pytest's marks, and the study's own rules, say of a gate.

    Attributes:
        skip: Why it does not count; None where it does.
        xfail: Why it is expected to fail; None where it is not.
        strict: One that is and passes fails.
    """

    skip: str | None = None
    xfail: str | None = None
    strict: bool = False

    @classmethod
    def of(cls, gate: Gate, marked: Mapping[str, Any], config: pytest.Config) -> Marks:
        """Return those of *gate*, whose item is *marked* so: ``skip`` and ``xfail`` with why, and ``strict``."""
        expected = marked.get("xfail", gate.xfail)
        said = (marked.get("strict"), *(_ini(config, name) for name in ("xfail_strict", "strict")))
        return cls(
            skip=marked.get("skip", gate.skip),
            xfail=None if config.getoption("runxfail", False) else expected,
            strict=next((bool(one) for one in said if one is not None), False),
        )


def gate_reports(
    node_id: str, location: Location, verdict: GateVerdict, marks: Marks, root: Path
) -> Iterator[pytest.TestReport]:
    """Yield the reports of a gate's set-up, call and tear-down; of its set-up alone where it is skipped.

    Args:
        node_id: Of its item.
        location: File, relative to *root*; line, from 0; name.
        verdict: What it says.
        marks: What is made of that.
        root: The root of the run.
    """
    setup = _report(node_id, location, "setup")
    if marks.skip is not None:
        _skip(setup, marks.skip)
        yield setup
        return
    yield setup
    call = _report(node_id, location, "call")
    _tell(call, verdict, root)
    if marks.xfail is not None and call.outcome != "skipped":
        _expect(call, marks.xfail, strict=marks.strict)
    yield call
    teardown = _report(node_id, location, "teardown")
    teardown.user_properties += _figures(verdict)  # JUnit XML takes them from there
    yield teardown


def _ini(config: pytest.Config, name: str) -> Any:
    """Return what the ini file says; None where it does not, or nothing knows of it."""
    try:
        return config.getini(name)
    except (KeyError, ValueError):  # the plugin of it is switched off, or it came with a later pytest
        return None


def _report(node_id: str, location: Location, when: Literal["setup", "call", "teardown"]) -> pytest.TestReport:
    now = time.time()
    return pytest.TestReport(node_id, location, {}, "passed", None, when, start=now, stop=now, duration=0.0)


def _tell(report: pytest.TestReport, verdict: GateVerdict, root: Path) -> None:
    """Put a verdict on its report."""
    report.outcome = verdict.outcome
    if verdict.outcome == "skipped":
        _skip(report, verdict_line(verdict))  # pytest shows no id there
    elif verdict.outcome == "failed":
        report.longrepr = _failure(verdict_text(verdict), root / report.location[0], report.location[1])
    else:
        report.sections.append(("llem", verdict_line(verdict)))


def _figures(verdict: GateVerdict) -> list[tuple[str, object]]:
    """Return a verdict's main figures as a report's user properties, which JUnit XML shows."""
    figures = {"verdict": verdict.verdict, "mean": verdict.mean, "ratio": verdict.ratio, "p": verdict.p}
    return [(f"llem_{name}", one) for name, one in figures.items() if one is not None]


def _skip(report: pytest.TestReport, reason: str) -> None:
    path, line, _ = report.location
    report.outcome = "skipped"
    report.longrepr = path, (line or 0) + 1, f"Skipped: {reason}"


def _expect(report: pytest.TestReport, reason: str, *, strict: bool) -> None:
    """Make of a report what pytest makes of that of a test that is expected to fail."""
    if report.outcome == "failed":
        report.outcome = "skipped"
        report.wasxfail = reason
    elif strict:
        report.outcome = "failed"
        report.longrepr = f"[XPASS(strict)] {reason}"
    else:
        report.wasxfail = reason


def _failure(line: str, path: Path, number: int | None) -> Any:
    """Return what pytest would make of ``pytest.fail`` there: its summary and JUnit XML then tell the line."""
    try:
        pytest.fail(line, pytrace=False)
    except pytest.fail.Exception:
        shown: Any = pytest.ExceptionInfo.from_current().getrepr(style="value")
        crash = shown.reprcrash
        crash.path, crash.lineno, crash.message = str(path), (number or 0) + 1, line
        return shown
