"""Gate items in pytest's loop: passed over in silence, for the controller judges them once all has run."""

from __future__ import annotations

from contextlib import suppress

import pytest

from pytest_llem.board import MARKED
from pytest_llem.collection.items import is_gate
from pytest_llem.options import BOARD


class Silence:
    """A plugin of every process that runs a study's items."""

    @pytest.hookimpl(tryfirst=True)  # before what runs items again, or times them
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        if not is_gate(item):
            return None
        if marks := _marks(item):
            with suppress(OSError):
                item.config.stash[BOARD].post(item.nodeid, MARKED, marks)
        return True


def _marks(item: pytest.Item) -> dict[str, str]:
    """Return the reason of each mark that keeps a gate from counting, beside those of its study's own rules."""
    marks = {}
    for name in ("skip", "xfail"):
        for mark in item.iter_markers(name):
            if name == "skip" or not mark.args:
                marks[name] = str(mark.kwargs.get("reason") or (mark.args[0] if mark.args else "")) or name
    return marks
