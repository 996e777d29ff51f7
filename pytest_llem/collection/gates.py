"""Skip gate items in pytest's test loop; the controller judges them after all experiments have run."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from typing import Any

import pytest

from pytest_llem._plugin.shared_state import MARKED
from pytest_llem._plugin.stash import SHARED_STATE
from pytest_llem.collection.items import is_gate


class DeferGates:
    """A plugin for every process that runs a study's items: it defers the gates."""

    @pytest.hookimpl(tryfirst=True)  # before plugins that rerun or time items
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        if not is_gate(item):
            return None
        if marks := _marks(item):
            with suppress(OSError):
                item.config.stash[SHARED_STATE].put(item.nodeid, MARKED, marks)
        if nextitem is None or nextitem.parent is not item.parent:
            tear_down(item, nextitem)
        return True


def tear_down(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Tear down the fixtures that the item after one that never runs does not share, and report errors.

    The item before it keeps the fixtures that it shares with it. As it never runs, pytest would never tear them
    down: it could not set up items of another file, and a fixture that fails when the session ends would be an
    internal error.
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
