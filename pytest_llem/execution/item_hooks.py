"""Plugins around the items of studies. They are registered only if a study runs, to keep other sessions fast."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import nullcontext, suppress
from typing import Any

import pytest

from pytest_llem._plugin.shared_state import MARKED
from pytest_llem._plugin.stash import SHARED_STATE
from pytest_llem.collection.items import is_gate
from pytest_llem.execution.experiment import REPLAYED_PROPERTY, attach_payload, place_skip
from pytest_llem.execution.leasing import lease_devices


class RunExperiments:
    """Leases devices to experiments, and puts their outcomes on the reports of their items."""

    @pytest.hookimpl(wrapper=True, tryfirst=True)  # outside of plugins that time the item
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> Generator[None, object, object]:
        with lease_devices(item, nextitem):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if call.when == "call":
            attach_payload(item, report)
            place_skip(item, report)
        return report

    @pytest.hookimpl
    def pytest_report_teststatus(
        self, report: pytest.CollectReport | pytest.TestReport
    ) -> tuple[str, str, str] | None:
        is_passed = report.when == "call" and report.passed
        if is_passed and any(name == REPLAYED_PROPERTY for name, _ in report.user_properties):
            return "passed", ".", "REPLAYED"
        return None


class DeferGates:
    """Does not run gates, and keeps their marks: the controller judges gates after all experiments have run."""

    @pytest.hookimpl(tryfirst=True)  # before plugins that rerun or time items
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        if not is_gate(item):
            return None
        if marks := _marks(item):
            with suppress(OSError):
                item.config.stash[SHARED_STATE].put(item.nodeid, MARKED, marks)
        if nextitem is None or nextitem.parent is not item.parent:
            _tear_down(item, nextitem)
        return True


class Pause(pytest.Item):
    """The last item of an xdist worker. It never runs: xdist runs an item only when it knows the next one.

    It takes the place of the item before it, so that the module of that item keeps its fixtures for the next item
    of the same file.
    """

    def runtest(self) -> None:
        raise AssertionError("a pause does not run")

    def follow(self, item: pytest.Item) -> None:
        """Take the place of *item*, which is about to run."""
        self.parent, self._nodeid = item.parent, item.nodeid


class WaitInPause:
    """Has an xdist worker wait in a :class:`Pause` for its next experiment, if it gets them one at a time.

    Args:
        session: The worker's session, which has collected.
    """

    def __init__(self, session: pytest.Session) -> None:
        self._pause: Pause = Pause.from_parent(session, name="pause")
        session.items.append(self._pause)

    @pytest.hookimpl(tryfirst=True)  # before plugins that rerun or time items
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        if item is not self._pause:
            self._pause.follow(item)
            return None
        _tear_down(item, nextitem)
        return True


def _tear_down(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Tear down the fixtures that *nextitem* does not share with *item*, which never runs, and report errors.

    The item before *item* has not torn down the fixtures that both share, and pytest would never do so: it could
    not set up items of another file, and a fixture that fails when the session ends would be an internal error.
    """
    capture = item.config.pluginmanager.get_plugin("capturemanager")

    def finish() -> None:
        with capture.item_capture("teardown", item) if capture else nullcontext():
            item.session._setupstate.teardown_exact(nextitem)

    call = pytest.CallInfo.from_call(finish, "teardown", reraise=(pytest.exit.Exception, KeyboardInterrupt))
    if call.excinfo is not None:
        report = item.ihook.pytest_runtest_makereport(item=item, call=call)
        item.ihook.pytest_runtest_logreport(report=report)


def _marks(item: pytest.Item) -> dict[str, Any]:
    """Return the reasons of the skip and xfail marks on a gate, by name, and ``strict`` if an xfail sets it.

    Conditions given as text are ignored: pytest evaluates them in an item's setup, which a gate does not have.
    """
    marks: dict[str, Any] = {}
    for mark in item.iter_markers():
        if mark.name == "skip":
            marks.setdefault("skip", str(mark.kwargs.get("reason") or next(iter(mark.args), "")) or "skip")
        elif mark.name in ("skipif", "xfail"):
            conditions = mark.args or ([mark.kwargs["condition"]] if "condition" in mark.kwargs else [])
            # xfail without a condition always applies.
            if any(bool(one) and not isinstance(one, str) for one in conditions or [mark.name == "xfail"]):
                name = mark.name.removesuffix("if")
                if name == "xfail" and name not in marks and mark.kwargs.get("strict") is not None:
                    marks["strict"] = bool(mark.kwargs["strict"])
                marks.setdefault(name, str(mark.kwargs.get("reason") or name))
    return marks
