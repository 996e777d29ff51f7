"""Read the notes about the owners of devices: who has a device, and who had others at the same time."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from datetime import UTC, datetime
from pathlib import Path

from pytest_llem.local_folder import local_folder
from pytest_llem.machine.owner import Owner, read_note
from pytest_llem.results.experiment import Neighbour

#: Name of the locks' folder in the folder for temporary files, or in another one that has locks of this machine.
FOLDER = "pytest-llem-locks"


def locks_folder() -> Path:
    """Return the path of the locks' folder, which may not exist.

    Raises:
        OSError: There is no folder for temporary files.
    """
    return Path(local_folder(), FOLDER)


def holder(name: str) -> Owner | None:
    """Return the current owner of a device, by its note; None if there is none or it is unknown."""
    try:
        note = last_owner(locks_folder(), name)
    except OSError:  # no folder for temporary files
        return None
    return note if note and note.is_running() else None


def note_file(folder: Path, name: str) -> Path:
    """Return the path of this user's note about a device.

    Each user has its own, because in a sticky folder users cannot replace the files of others.
    """
    return folder / f"{name}.{os.geteuid()}.json"


def last_owner(folder: Path, name: str) -> Owner | None:
    """Return the current or last owner of a device, by its notes; None if there are none."""
    notes = [note for file in folder.glob(f"{name}.*.json") if (note := read_note(file)) is not None]
    return max(notes, key=lambda note: note.since, default=None)


def neighbours(devices: Collection[str], session: str | None, began: datetime, ended: datetime) -> list[Neighbour]:
    """Return the experiments that had leases of other devices of this machine at the same time, sorted by name.

    Args:
        devices: Devices of the experiment, which are left out.
        session: Unique name of its session of several processes; None for a session of one process.
        began: Its start.
        ended: Its end.
    """
    now = datetime.now(UTC)
    found: dict[tuple[str, str, str | None], tuple[list[str], float]] = {}
    for name, owner in _owners():
        if name in devices:
            continue
        for lease in owner.leases():
            seconds = (min(lease.ended or now, ended) - max(lease.since, began)).total_seconds()
            if seconds <= 0:
                continue
            key = lease.study, lease.experiment, lease.session
            names, longest = found.get(key, ([], 0.0))
            found[key] = [*dict.fromkeys([*names, name])], max(longest, seconds)
    return [
        Neighbour(
            study=study,
            experiment=experiment,
            devices=sorted(names),
            same_run=session is not None and of == session,
            seconds=round(seconds, 3),
        )
        for (study, experiment, of), (names, seconds) in sorted(found.items(), key=lambda one: str(one[0]))
    ]


def _owners() -> Iterable[tuple[str, Owner]]:
    """Yield the device and the owner of each note."""
    try:
        files = [*locks_folder().glob("*.*.json")]
    except OSError:
        return
    for file in files:
        if (owner := read_note(file)) is not None:
            yield file.name.rsplit(".", 2)[0], owner
