"""Gate items in pytest's loop: passed over in silence, for the controller judges them once all has run."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from typing import Any

import pytest

from pytest_llem._plugin.shared_state import MARKED
from pytest_llem._plugin.stash import SHARED_STATE
from pytest_llem.collection.items import is_gate


class DeferGates:
    """A plugin of every process that runs a study's items."""

    @pytest.hookimpl(tryfirst=True)  # before what runs items again, or times them
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        if not is_gate(item):
            return None
        if marks := _marks(item):
            with suppress(OSError):
                item.config.stash[SHARED_STATE].put(item.nodeid, MARKED, marks)
        if nextitem is None or nextitem.parent is not item.parent:
            _tear_down(item, nextitem)
        return True


def _tear_down(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End the fixtures that whatever follows a gate does not share, and report one that fails at that.

    The item before kept what it shares with the gate, which never runs and so would never end it: pytest then sets
    up no item of another file, and a fixture that fails as the session ends is an error of pytest's own.
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
    """Return the reason of each mark that keeps a gate from counting, beside those of its study's own rules.

    Whether an xfail is strict is among them, where it says so. A condition counts where it is a value: text is
    evaluated as an item is set up, which a gate never is.
    """
    marks: dict[str, Any] = {}
    for mark in item.iter_markers():
        if mark.name == "skip":
            marks.setdefault("skip", str(mark.kwargs.get("reason") or next(iter(mark.args), "")) or "skip")
        elif mark.name in ("skipif", "xfail"):
            conditions = mark.args or ([mark.kwargs["condition"]] if "condition" in mark.kwargs else [])
            if any(bool(one) and not isinstance(one, str) for one in conditions or [mark.name == "xfail"]):
                name = mark.name.removesuffix("if")
                if name == "xfail" and name not in marks and mark.kwargs.get("strict") is not None:
                    marks["strict"] = bool(mark.kwargs["strict"])
                marks.setdefault(name, str(mark.kwargs.get("reason") or name))
    return marks
