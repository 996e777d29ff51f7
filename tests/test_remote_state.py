"""The shared state of a worker on another host: what belongs to the session, and what to the host."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_llem._plugin.remote_state import RemoteSharedState, answer
from pytest_llem._plugin.shared_state import DECIDED, REPEATED, STOPPED, SharedState


class Connection:
    """A channel whose other end is the controller, in this process."""

    def __init__(self, controller: SharedState) -> None:
        self._controller = controller
        self._reply = ""
        self.asked = 0

    def send(self, request: str) -> None:
        self.asked += 1
        self._reply = answer(self._controller, request)

    def receive(self, timeout: float) -> str:
        return self._reply


def _workers(number: int) -> tuple[SharedState, list[Any]]:
    controller = SharedState()
    connections: list[Any] = [Connection(controller) for _ in range(number)]
    return controller, [RemoteSharedState(one) for one in connections]


def test_values_of_the_session_reach_every_host() -> None:
    controller, (one, other) = _workers(2)
    assert one.read("study", STOPPED) is None
    controller.put("study", STOPPED, "enough")
    assert one.read("study", STOPPED) == "enough"
    one.put("study", f"{DECIDED}-a", [5, "why"])
    assert other.read("study", f"{DECIDED}-a") == [5, "why"]
    assert [worker.claim("study", f"{REPEATED}-a-0") for worker in (one, other)] == [True, False]


@pytest.mark.parametrize("topic", ["idle-context", "used-cpu", "answer"])
def test_values_of_a_host_stay_there(topic: str) -> None:
    controller, (one, other) = _workers(2)
    one.put("key", topic, {"watts": 1})
    assert one.read("key", topic) == {"watts": 1}
    assert other.read("key", topic) is controller.read("key", topic) is None
    assert [worker.claim("", topic) for worker in (one, other)] == [True, True]
    assert one.take("key", topic) == {"watts": 1}
    assert one.read("key", topic) is None


def test_error_of_the_controller_is_an_error_of_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    controller, (one,) = _workers(1)

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(controller, "put", full)
    with pytest.raises(OSError, match="No space left"):
        one.put("study", STOPPED, "enough")
