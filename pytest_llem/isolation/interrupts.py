"""Signals that interrupt a session: once."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

#: Ctrl-C, what a batch system or a container sends first, and what a terminal sends that is closed.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """Makes each of :data:`SIGNALS` a KeyboardInterrupt, and the first one the last: those that follow would cut
    short what winds up the session.

    Signals that somebody else handles, or ignores, are left alone.
    """

    def __init__(self) -> None:
        self._before: dict[signal.Signals, Any] = {}

    def install(self, *, keyboard: bool = True) -> None:
        """Handle the signals from now on; nothing is done in any thread but the main one.

        Args:
            keyboard: Ctrl-C too.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS if keyboard else SIGNALS[1:]:
            before = signal.getsignal(number)
            if before in (signal.SIG_DFL, signal.default_int_handler):
                signal.signal(number, self._interrupt)
                self._before[number] = before

    def restore(self) -> None:
        """Handle them as before."""
        while self._before:
            number, before = self._before.popitem()
            signal.signal(number, before)

    def ignore(self) -> None:
        """Ignore those that it handles, until :meth:`restore`."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.ignore()
        raise KeyboardInterrupt(*([] if number == signal.SIGINT else [signal.Signals(number).name]))
