"""The last item of an xdist worker's session: in it, the worker waits for its next experiment."""

from __future__ import annotations

import pytest

from pytest_llem.collection.gates import tear_down

#: Key of ``workerinput``: whether the controller hands out experiments one at a time.
ONE_AT_A_TIME = "llem_one_at_a_time"


class Pause(pytest.Item):
    """An item that never runs. xdist runs an item only when it knows the next one: this is the next one of each.

    It takes the place of the item before it, so that the module of that item keeps its fixtures for the next item
    of the same file.
    """

    def runtest(self) -> None:
        raise AssertionError("a pause does not run")

    def follow(self, item: pytest.Item) -> None:
        """Take the place of *item*, which is about to run."""
        self.parent, self._nodeid = item.parent, item.nodeid


class Pausing:
    """A plugin of a worker that gets experiments one at a time.

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
        tear_down(item, nextitem)
        return True
