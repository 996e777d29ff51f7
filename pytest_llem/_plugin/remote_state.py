"""The shared state in an xdist worker on another host, which shares no folder with the controller."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pytest_llem._plugin.shared_state import DECIDED, INTERLEAVED, MARKED, REPEATED, REPLAYED, STOPPED, SharedState

if TYPE_CHECKING:
    from execnet import Channel

#: Topics that all hosts share. Others, such as idle power, are facts of one host, and stay in the worker.
_OF_SESSION = (STOPPED, REPLAYED, MARKED, REPEATED, INTERLEAVED, DECIDED)

#: Longest time to wait for the controller's answer, in s.
ANSWER_S = 60.0


class RemoteSharedState(SharedState):
    """Asks the controller for values of the session, and keeps values of this host.

    Args:
        channel: A channel to the controller, which answers with :func:`answer`.
    """

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel

    def put(self, study: str, topic: str, content: Any) -> None:
        super().put(study, topic, content)
        if _is_of_session(topic):
            self._ask("put", study, topic, content)

    def claim(self, study: str, topic: str) -> bool:
        return bool(self._ask("claim", study, topic)) if _is_of_session(topic) else super().claim(study, topic)

    def read(self, study: str, topic: str) -> Any:
        known = super().read(study, topic)
        if known is None and _is_of_session(topic) and (known := self._ask("read", study, topic)) is not None:
            super().put(study, topic, known)
        return known

    def take(self, study: str, topic: str) -> Any:
        own = super().take(study, topic)
        return self._ask("take", study, topic) if _is_of_session(topic) else own

    def stored_result(self, directory: str, entry: dict[str, Any]) -> tuple[str, dict[str, str]] | None:
        found = self._ask("stored_result", directory, entry)
        return None if found is None else (found[0], found[1])

    def _ask(self, method: str, *arguments: Any) -> Any:
        """Return the controller's value.

        Raises:
            OSError: The controller could not read or write it, or does not answer.
        """
        try:
            self._channel.send(json.dumps([method, arguments]))
            value, error = json.loads(self._channel.receive(ANSWER_S))
        except EOFError as lost:
            raise OSError("the connection to the controller is lost") from lost
        if error is not None:
            raise OSError(error)
        return value


def _is_of_session(topic: str) -> bool:
    return topic.startswith(_OF_SESSION)


def answer(shared_state: SharedState, request: str) -> str:
    """Return the controller's answer to a worker's *request*, both as JSON."""
    method, arguments = json.loads(request)
    try:
        return json.dumps([getattr(shared_state, method)(*arguments), None])
    except OSError as error:
        return json.dumps([None, str(error)])
