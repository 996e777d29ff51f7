"""A process that is asked something and may never answer: a driver can hang, a library can crash."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from types import TracebackType

#: How long one is waited for that was killed, in s. Stuck in a driver it does not go, and is left.
_REAP_S = 1.0


class ProbeProcess:
    """Runs a command from being made until it is left; whatever becomes of it, nothing waits for it for ever.

    Args:
        command: What to run. What it prints is short.
        without: Variables of the environment that it does not get.
    """

    def __init__(self, command: Sequence[str], without: Collection[str] = ()) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._began = time.monotonic()
        self._refused: str | None = None
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: value for name, value in os.environ.items() if name not in without},
                start_new_session=True,  # to be killed whole, and not by the Ctrl-C that ends us
            )
        except (OSError, ValueError) as error:
            self._refused = str(error)

    def __enter__(self) -> ProbeProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_REAP_S)
        if process.stdout is not None:
            process.stdout.close()

    def answer(self, seconds: float) -> tuple[str, str | None]:
        """Return what it printed, and why that is not all of it; None where it ended by itself, and well.

        Args:
            seconds: How long it may take, from its start.
        """
        if self._process is None:
            return "", self._refused or "it has been asked already"
        left = max(0.0, self._began + seconds - time.monotonic())
        try:
            said, _ = self._process.communicate(timeout=left)
        except subprocess.TimeoutExpired as late:
            return (late.stdout or b"").decode("utf-8", "replace"), f"no answer within {seconds:g} s"
        status = self._process.returncode
        if status < 0:
            with suppress(ValueError):
                return said.decode("utf-8", "replace"), f"it crashed ({signal.Signals(-status).name})"
        return said.decode("utf-8", "replace"), f"it ended with status {status}" if status else None
