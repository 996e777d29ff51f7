"""Run a command that may hang or crash, such as one that calls a driver, with a time limit."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from types import TracebackType

#: How long to wait for a killed process, in s. One that is stuck in a driver call does not end, and is abandoned.
_REAP_S = 1.0


class ProbeProcess:
    """A context manager that starts a command when it is created, and kills it at exit if it still runs.

    Args:
        command: The command. Its output must be short, because it is read only at the end.
        without: Environment variables to remove for the command.
    """

    def __init__(self, command: Sequence[str], without: Collection[str] = ()) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._began = time.monotonic()
        self._start_error: str | None = None
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: value for name, value in os.environ.items() if name not in without},
                start_new_session=True,  # so that its whole group can be killed, and Ctrl-C does not reach it
            )
        except (OSError, ValueError) as error:
            self._start_error = str(error)

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
        """Return the command's output, and an error message, or None if it ended with status 0.

        Args:
            seconds: Time limit in s, from the start of the command.
        """
        if self._process is None:
            return "", self._start_error or "the process has ended already"
        left = max(0.0, self._began + seconds - time.monotonic())
        try:
            output, _ = self._process.communicate(timeout=left)
        except subprocess.TimeoutExpired as late:
            return (late.stdout or b"").decode("utf-8", "replace"), f"no answer within {seconds:g} s"
        status = self._process.returncode
        if status < 0:
            with suppress(ValueError):
                return output.decode("utf-8", "replace"), f"the process crashed ({signal.Signals(-status).name})"
        return output.decode("utf-8", "replace"), f"the process ended with status {status}" if status else None
