"""Turn the first signal that ends a session into a KeyboardInterrupt, and ignore later ones."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

#: Ctrl-C, the first signal from a batch system or a container runtime, and the signal of a closed terminal.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """Turns the first of :data:`SIGNALS` into a KeyboardInterrupt and ignores later ones.

    A later one would interrupt the cleanup at the session's end. Signals that other code handles or ignores stay
    as they are.
    """

    def __init__(self) -> None:
        self._before: dict[signal.Signals, Any] = {}

    def install(self, *, keyboard: bool = True) -> None:
        """Handle the signals from now on. Does nothing outside the main thread.

        Args:
            keyboard: Whether to handle Ctrl-C, too.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS if keyboard else SIGNALS[1:]:
            before = signal.getsignal(number)
            if before in (signal.SIG_DFL, signal.default_int_handler):
                signal.signal(number, self._interrupt)
                self._before[number] = before

    def restore(self) -> None:
        """Restore the previous handlers."""
        while self._before:
            number, before = self._before.popitem()
            signal.signal(number, before)

    def ignore(self) -> None:
        """Ignore the handled signals until :meth:`restore`."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.ignore()
        raise KeyboardInterrupt(*([] if number == signal.SIGINT else [signal.Signals(number).name]))
