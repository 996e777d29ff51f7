"""Read what pytest's reports say about experiments, and make items fail."""

from __future__ import annotations

import pytest

from pytest_llem.results.manifest_records import ErrorRecord

#: What a user's hook may raise. pytest.fail and pytest.skip do not derive from Exception; pytest.exit does.
HOOK_ERRORS = (Exception, SystemExit, pytest.fail.Exception, pytest.skip.Exception)


def fail_item(report: pytest.TestReport, why: str) -> None:
    """Make an item fail, whatever its outcome was."""
    report.outcome = "failed"
    report.longrepr = why
    vars(report).pop("wasxfail", None)  # with it, pytest would not count the failure


def message_of(error: BaseException) -> str:
    """Return the message of an error, with the name of its type unless the user wrote it for pytest."""
    return (
        str(error)
        if isinstance(error, pytest.fail.Exception | pytest.exit.Exception)
        else f"{type(error).__name__}: {error}"
    )


def skip_reason(report: pytest.TestReport) -> str:
    """Return why an item was skipped or expected to fail."""
    if hasattr(report, "wasxfail"):
        return f"xfail: {report.wasxfail.removeprefix('reason: ')}"
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return reason.removeprefix("Skipped: ")


def outside_error(report: pytest.TestReport) -> ErrorRecord:
    """Return the record of an error outside the experiment's own process."""
    when: str = report.when  # xdist sets "???" for the item that a dead worker was running
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (crash.message if crash else report.longreprtext).strip().splitlines() or ["no reason was given"]
    message = lines[0] if crash else lines[-1]
    if "from pytest-timeout" in message:
        return ErrorRecord(kind="timeout", type="Timeout", message=message.removeprefix("Failed: "), phase=when)
    if when == "???":
        return ErrorRecord(kind="crash", type="WorkerCrash", message=message)
    return ErrorRecord(kind="exception", type="Error", message=message, phase=when)
