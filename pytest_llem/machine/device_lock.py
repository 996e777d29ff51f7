"""Lock one device, and write who owns it."""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from pytest_llem.machine.owner import Owner, last_owner, note_file, read_note
from pytest_llem.machine.shared_lock import SharedLock


class DeviceLock:
    """The lock of one device, and this user's note about its owner.

    Args:
        folder: Folder of the locks.
        name: Name of the device.
        owner: This process.

    Attributes:
        used_before: GPU memory in use before the previous experiment, in bytes; None if unknown, or not yet owned.
    """

    def __init__(self, folder: Path, name: str, owner: Owner) -> None:
        self._lock = SharedLock(folder / f"{name}.lock")
        self._name = name
        self._folder = folder
        self._note = note_file(folder, name)
        self._owner = owner
        self._is_owner = False
        self.used_before: int | None = None

    def acquire(self) -> bool:
        """Lock the device if it is free, and return whether this process holds the lock."""
        return self._lock.acquire()

    def begin(self) -> None:
        """Become the owner of the locked device."""
        with suppress(OSError):
            os.utime(self._lock.path)  # or a cleaner of temporary files would remove it as unused
        last = last_owner(self._folder, self._name)
        own = read_note(self._note)
        self._owner = self._owner.after(own)
        self.used_before = last.used_before(self._owner) if last else None
        self._is_owner = True
        self.note(used_bytes=self.used_before)

    def hand_over(self, owner: Owner) -> None:
        """Make another experiment of this process the owner."""
        previous = self._owner.model_copy(update={"ended": datetime.now(UTC)})
        self._owner = owner.after(previous).model_copy(update={"used_bytes": self._owner.used_bytes})
        self.note()

    def note(self, **changes: object) -> None:
        """Change fields of the owner, and write its note."""
        self._owner = self._owner.model_copy(update=changes)
        fresh = self._note.with_suffix(".new")
        with suppress(OSError):  # the lock works without the note
            fresh.unlink(missing_ok=True)
            # O_EXCL and O_NOFOLLOW: another user may have put a file or link there in the meantime.
            with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW), "w") as file:
                os.fchmod(file.fileno(), 0o644)
                file.write(self._owner.model_dump_json())
            fresh.replace(self._note)

    def release(self) -> None:
        """Release the device. May be called without owning it."""
        try:
            if self._lock.is_held and self._is_owner:
                self.note(ended=datetime.now(UTC))
        finally:
            self._lock.release()
