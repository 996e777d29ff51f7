"""The note that says who has a device, or had it last."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path

from pydantic import AwareDatetime, Field

from pytest_llem.results.document import Record

#: A note that another process has left tells of the memory before its experiment for so many seconds after its
#: end. One that says nothing of an end, as the process was killed, does so from the start of the experiment.
FRESH_S = 60.0
FRESH_UNENDED_S = 86_400.0

#: Characters of a name, bytes of a note that are read.
NAME_CAP = 200
NOTE_CAP = 1 << 16


class Owner(Record):
    """Who has a device, or had it last.

    Attributes:
        pid: The process.
        began: When that started, in s since 1970: another may bear its id by now.
        worker: Which worker of xdist it is.
        study: Its study.
        experiment: Id of the experiment.
        since: When it got the device.
        ended: When it was done; None where it is not, or was killed.
        used_bytes: The GPU's memory in use before the experiment was started; None where it is not known.
    """

    pid: int = Field(gt=0, lt=2**31)
    began: float
    worker: str | None = None
    study: str
    experiment: str
    since: AwareDatetime
    ended: AwareDatetime | None = None
    used_bytes: int | None = None

    @classmethod
    def of_this_process(cls, study: str, experiment: str, worker: str | None = None) -> Owner:
        """Return this process as the owner from now on."""
        import psutil

        began = psutil.Process().create_time()
        return cls(
            pid=os.getpid(),
            began=began,
            worker=worker,
            study=study,
            experiment=experiment,
            since=datetime.now(UTC),
        )

    def __str__(self) -> str:
        worker = f" ({shown(self.worker)})" if self.worker else ""
        since = self.since.astimezone().strftime("%H:%M:%S")
        return (
            f"pid {self.pid}{worker} runs study {shown(self.study)}, "
            f"experiment {shown(self.experiment)} since {since}"
        )

    def is_same_process(self, other: Owner) -> bool:
        return (
            self.pid == other.pid and abs(self.began - other.began) < 2.0
        )  # each counts from a boot time of its own

    def is_running(self) -> bool:
        """Whether its process is there and has not done with the device."""
        import psutil

        try:
            now = self.model_copy(update={"began": psutil.Process(self.pid).create_time()})
        except psutil.NoSuchProcess:
            return False
        except psutil.AccessDenied:
            return self.ended is None
        return self.ended is None and self.is_same_process(now)

    def used_before(self, successor: Owner) -> int | None:
        """Return what memory has to come back to for *successor*, in bytes; None where it says nothing of that."""
        if self.is_same_process(successor):
            return self.used_bytes
        left, fresh = (self.ended, FRESH_S) if self.ended else (self.since, FRESH_UNENDED_S)
        return self.used_bytes if 0 <= (successor.since - left).total_seconds() <= fresh else None


def read_note(note: Path) -> Owner | None:
    """Return the owner that a note names. Anybody may have put anything in its place: that is none."""
    try:
        with os.fdopen(os.open(note, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            return Owner.model_validate(json.loads(file.read(NOTE_CAP)))
    except (OSError, ValueError, RecursionError):
        return None


def shown(name: str) -> str:
    """Return a name from a note as a terminal may be sent it."""
    return "".join(one if one.isprintable() else "?" for one in name[:NAME_CAP])
