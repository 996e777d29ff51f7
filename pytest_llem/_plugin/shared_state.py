"""What the recorder tells the processes that run experiments, and these each other."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

#: Topics: why no more of a study's experiments are run, in words; which have a result from an earlier run; how a
#: gate is marked; that a contended cycle was repeated.
STOPPED, REPLAYED, MARKED, REPEATED = "stopped", "replayed", "marked", "repeated"


class SharedState:
    """Notices by study and topic, put up by the one who records and read by those who run; what is known of the
    idle machine is put up by these, under names of its own.

    In a session of one process they stay in memory. Under xdist controller and workers share a folder, which is
    made with the first notice.

    Args:
        session: A name that the processes of a session share, and no other session has; None where there is but
            one process.
    """

    def __init__(self, session: str | None = None) -> None:
        self._folder = Path(tempfile.gettempdir(), f"llem-board-{session}") if session else None
        self._notices: dict[str, Any] = {}

    def put(self, study: str, topic: str, content: Any) -> None:
        """Put up *content*, plain data, in place of what was there.

        Raises:
            OSError: It could not be written.
        """
        name = _name(study, topic)
        self._notices[name] = content
        if self._folder is not None:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            temporary = self._folder / f".{name}"
            temporary.write_text(json.dumps(content), encoding="utf-8")
            temporary.replace(self._folder / name)

    def claim(self, study: str, topic: str) -> bool:
        """Return whether *topic* was free, and take it: of all processes of the session one gets it.

        Raises:
            OSError: It could not be written.
        """
        name = _name(study, topic)
        if self._folder is None:
            free = name not in self._notices
            self._notices[name] = True
            return free
        self._folder.mkdir(mode=0o700, exist_ok=True)
        try:
            (self._folder / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def read(self, study: str, topic: str) -> Any:
        """Return what was put up, None where nothing was."""
        name = _name(study, topic)
        if name not in self._notices and self._folder is not None:
            try:
                self._notices[name] = json.loads((self._folder / name).read_text(encoding="utf-8"))
            except FileNotFoundError:
                return None
        return self._notices.get(name)

    def register_worker(self) -> None:
        """Have the one who records know of this process, as far as that can be."""
        if self._folder is not None:
            with suppress(OSError):
                self._folder.mkdir(mode=0o700, exist_ok=True)
                (self._folder / f"{os.getpid()}.pid").touch()

    def worker_pids(self) -> list[int]:
        """Return the ids of the processes that have signed in."""
        return [int(file.stem) for file in self._folder.glob("*.pid")] if self._folder is not None else []

    def close(self) -> None:
        """Take everything down."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _name(study: str, topic: str) -> str:
    return f"{hashlib.sha256(study.encode()).hexdigest()[:16]}-{topic}.json"
