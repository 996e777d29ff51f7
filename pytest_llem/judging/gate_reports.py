"""Conversion of a gate's verdict to pytest's test reports."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from pytest_llem.gates.gate import Gate
from pytest_llem.gates.verdict_text import verdict_line, verdict_text
from pytest_llem.results.verdicts import GateVerdict

Location = tuple[str, int, str]


@dataclass(frozen=True)
class Marks:
    """How a gate is skipped or expected to fail, by pytest's marks and the study's rules.

    Attributes:
        skip: Why the gate is skipped; None if it is not.
        xfail: Why the gate is expected to fail; None if it is not.
        strict: Whether a gate that is expected to fail and passes is reported as failed.
    """

    skip: str | None = None
    xfail: str | None = None
    strict: bool = False

    @classmethod
    def of(cls, gate: Gate, marked: Mapping[str, Any], config: pytest.Config) -> Marks:
        """Return the marks of *gate*, given its item's: ``skip`` and ``xfail`` with reasons, and ``strict``."""
        expected = marked.get("xfail", gate.xfail)
        strict = (marked.get("strict"), *(_ini(config, name) for name in ("xfail_strict", "strict")))
        return cls(
            skip=marked.get("skip", gate.skip),
            xfail=None if config.getoption("runxfail", False) else expected,
            strict=next((bool(one) for one in strict if one is not None), False),
        )


def gate_reports(
    node_id: str, location: Location, verdict: GateVerdict, marks: Marks, root: Path
) -> Iterator[pytest.TestReport]:
    """Yield the reports of a gate's set-up, call and tear-down; only of its set-up if it is skipped.

    Args:
        node_id: Node id of the gate's item.
        location: File, relative to *root*; line, from 0; name.
        verdict: The gate's verdict.
        marks: The gate's marks.
        root: Root of the run.
    """
    setup = _report(node_id, location, "setup")
    if marks.skip is not None:
        _skip(setup, marks.skip)
        yield setup
        return
    yield setup
    call = _report(node_id, location, "call")
    _set_outcome(call, verdict, root)
    if marks.xfail is not None and call.outcome != "skipped":
        _apply_xfail(call, marks.xfail, strict=marks.strict)
    yield call
    teardown = _report(node_id, location, "teardown")
    teardown.user_properties += _properties(verdict)  # JUnit XML reads them from the tear-down
    yield teardown


def _ini(config: pytest.Config, name: str) -> Any:
    """Return the value of an ini option; None if it is not set or not known."""
    try:
        return config.getini(name)
    except (KeyError, ValueError):  # its plugin is disabled, or this version of pytest does not have it
        return None


def _report(node_id: str, location: Location, when: Literal["setup", "call", "teardown"]) -> pytest.TestReport:
    now = time.time()
    return pytest.TestReport(node_id, location, {}, "passed", None, when, start=now, stop=now, duration=0.0)


def _set_outcome(report: pytest.TestReport, verdict: GateVerdict, root: Path) -> None:
    """Set outcome and text of a report from the verdict."""
    report.outcome = verdict.outcome
    if verdict.outcome == "skipped":
        _skip(report, verdict_line(verdict))  # with metric and point: pytest shows no id for a skipped item
    elif verdict.outcome == "failed":
        report.longrepr = _failure(verdict, root / report.location[0], report.location[1])
    else:
        report.sections.append(("llem", verdict_line(verdict)))


def _properties(verdict: GateVerdict) -> list[tuple[str, object]]:
    """Return a verdict's main values as a report's user properties, which JUnit XML includes."""
    values = {"verdict": verdict.verdict, "mean": verdict.mean, "ratio": verdict.ratio, "p": verdict.p}
    return [(f"llem_{name}", value) for name, value in values.items() if value is not None]


def _skip(report: pytest.TestReport, reason: str) -> None:
    path, line, _ = report.location
    report.outcome = "skipped"
    report.longrepr = path, (line or 0) + 1, f"Skipped: {reason}"


def _apply_xfail(report: pytest.TestReport, reason: str, *, strict: bool) -> None:
    """Change a report as pytest does for a test that is expected to fail."""
    if report.outcome == "failed":
        report.outcome = "skipped"
        report.wasxfail = reason
    elif strict:
        report.outcome = "failed"
        report.longrepr = f"[XPASS(strict)] {reason}"
    else:
        report.wasxfail = reason


def _failure(verdict: GateVerdict, path: Path, line: int | None) -> Any:
    """Return what pytest makes of ``pytest.fail`` at that *line*, from 0, to show in its summary and JUnit XML.

    The summary shows the crash's message after the gate's id, truncated to the terminal's width. The message
    starts with the value, because the id has point and metric.
    """
    try:
        pytest.fail(verdict_line(verdict), pytrace=False)
    except pytest.fail.Exception:
        shown: Any = pytest.ExceptionInfo.from_current().getrepr(style="value")
        crash = shown.reprcrash
        crash.path, crash.lineno, crash.message = str(path), (line or 0) + 1, verdict_text(verdict)
        return shown
