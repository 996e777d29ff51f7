"""Share small values between the processes of a session: recorder, experiment runners, xdist workers."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_llem.results.manifest import stored_files, stored_result
from pytest_llem.results.manifest_records import ManifestEntry

if TYPE_CHECKING:
    from execnet import Channel


#: Topics: why a study's remaining experiments are skipped; which experiments have a result of an earlier run; the
#: marks of a gate; claims of repetitions of contended cycles; the outcome of an experiment that was interleaved
#: with its reference.
STOPPED, REPLAYED, MARKED, REPEATED, INTERLEAVED = "stopped", "replayed", "marked", "repeated", "interleaved"

#: Topic, by point or server: the devices that all its cycles use.
BOUND = "bound"

#: Topics, by experiment: the devices that the controller has chosen for it, and other devices that it got instead.
ASSIGNED, PLACED = "assigned", "placed"

#: Topics without a study: whether the session has used a device, by device; the state of the GPUs before its
#: first experiment.
USED, COOL = "used", "cool"

#: Topic, by point: after how many cycles its gates were decided, and the reason why later ones are skipped.
DECIDED = "decided"


class SharedState:
    """Values by study and topic, shared by the processes of a session.

    The recorder writes most of them for the processes that run experiments; those write others, such as idle
    power, for each other. In a session of one process the values stay in memory. Under xdist, controller and
    workers share a folder, which is created with the first value.

    Args:
        session: Unique name of the session; None for a session of one process.
    """

    def __init__(self, session: str | None = None) -> None:
        self._folder = Path(tempfile.gettempdir(), f"llem-shared-{session}") if session else None
        self._values: dict[str, Any] = {}
        #: Names of the values that other processes have put, within :meth:`listed`.
        self._names: set[str] | None = None

    @contextmanager
    def listed(self) -> Iterator[None]:
        """Within the context, list other processes' values once, so that many calls of :meth:`read` are fast."""
        if self._folder is not None:
            try:
                self._names = set(os.listdir(self._folder))  # noqa: PTH208 (names only)
            except FileNotFoundError:
                self._names = set()
        try:
            yield
        finally:
            self._names = None

    def put(self, study: str, topic: str, content: Any) -> None:
        """Set the value of *topic* to *content*, which is JSON-compatible.

        Raises:
            OSError: The value could not be written.
        """
        name = _name(study, topic)
        self._values[name] = content
        if self._folder is not None:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            temporary = self._folder / f".{name}"
            temporary.write_text(json.dumps(content), encoding="utf-8")
            temporary.replace(self._folder / name)

    def claim(self, study: str, topic: str) -> bool:
        """Claim *topic*, and return True in the one process of the session that claims it first.

        Raises:
            OSError: The claim could not be written.
        """
        name = _name(study, topic)
        if self._folder is None:
            free = name not in self._values
            self._values[name] = True
            return free
        self._folder.mkdir(mode=0o700, exist_ok=True)
        try:
            (self._folder / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def put_first(self, study: str, topic: str, content: Any) -> Any:
        """Set the value of *topic* to *content* unless it is set, and return its value.

        Raises:
            OSError: The value could not be written.
        """
        name = _name(study, topic)
        if self._folder is None:
            return self._values.setdefault(name, content)
        self._folder.mkdir(mode=0o700, exist_ok=True)
        temporary = self._folder / f".{os.getpid()}-{name}"
        temporary.write_text(json.dumps(content), encoding="utf-8")
        with suppress(FileExistsError):
            os.link(temporary, self._folder / name)
        temporary.unlink()
        return self.read(study, topic)

    def read(self, study: str, topic: str) -> Any:
        """Return the value of *topic*, or None if it is not set."""
        name = _name(study, topic)
        is_missing = self._names is not None and name not in self._names
        if name not in self._values and self._folder is not None and not is_missing:
            try:
                self._values[name] = json.loads((self._folder / name).read_text(encoding="utf-8"))
            except FileNotFoundError:
                return None
        return self._values.get(name)

    def take(self, study: str, topic: str) -> Any:
        """Return the value of *topic* and remove it; None if it is not set."""
        content, name = self.read(study, topic), _name(study, topic)
        self._values.pop(name, None)
        if content is not None and self._folder is not None:
            (self._folder / name).unlink(missing_ok=True)
        return content

    def stored_result(self, directory: str, entry: dict[str, Any]) -> tuple[str, dict[str, str]] | None:
        """Return the result and the further files of a manifest's *entry*; None if it is missing or changed.

        A worker on another host asks the controller for them.
        """
        found = ManifestEntry.model_validate(entry)
        result = stored_result(directory, found)
        return None if result is None else (result, stored_files(directory, found))

    def register_worker(self) -> None:
        """Add this process to ``worker_pids()``; errors are ignored."""
        if self._folder is not None:
            with suppress(OSError):
                self._folder.mkdir(mode=0o700, exist_ok=True)
                (self._folder / f"{os.getpid()}.pid").touch()

    def worker_pids(self) -> list[int]:
        """Return the process ids of the registered workers."""
        return [int(file.stem) for file in self._folder.glob("*.pid")] if self._folder is not None else []

    def close(self) -> None:
        """Remove all values."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def topic_of(topic: str, key: str) -> str:
    """Return the topic for a *key*, such as the id of an experiment, which may be too long for a file's name."""
    return f"{topic}-{_digest(key)}"


def _name(study: str, topic: str) -> str:
    return f"{_digest(study)}-{topic}.json"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
