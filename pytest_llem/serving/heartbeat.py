"""Measure how late an event loop is: a client that is late sees the ends of answers late."""

from __future__ import annotations

import asyncio
from time import monotonic

#: Interval at which the lateness of the event loop is seen, in s.
_HEARTBEAT_SECONDS = 0.01

#: Iterations of the event loop from the arrival of data until the task that waits for it has run.
_ITERATIONS = 3


class Heartbeat:
    """Knows how late the event loop is: a timer that is overdue has not been run, or was run just now."""

    def start(self) -> None:
        # The loop's clock is that of time.monotonic.
        self._due, self._late = monotonic() + _HEARTBEAT_SECONDS, 0.0
        self._timer = asyncio.get_running_loop().call_at(self._due, self._beat)

    def stop(self) -> None:
        self._timer.cancel()

    def lateness(self) -> float:
        """Return how late the event loop is now, in s."""
        return max(self._late, monotonic() - self._due, 0.0)

    def _beat(self) -> None:
        late = monotonic() - self._due
        self.start()
        self._keep(late, _ITERATIONS)

    def _keep(self, late: float, iterations: int) -> None:
        """Stay late for the tasks that only now, with the timer or after it, see what arrived meanwhile."""
        self._late = late if iterations else 0.0
        if iterations:
            asyncio.get_running_loop().call_soon(self._keep, late, iterations - 1)
