"""The protocol of a driver, which makes a loaded engine work and accounts for its work."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

from pytest_llem.energy.account import Meters, Total
from pytest_llem.measurement.observers import WindowObservers
from pytest_llem.measurement.requests import Requests
from pytest_llem.measurement.turns import Turn, Turns, progress
from pytest_llem.measurement.window import Window
from pytest_llem.results.experiment import TokenRecord, WarmupRecord
from pytest_llem.results.metrics import Metric
from pytest_llem.results.quality_warnings import QualityWarning

W = TypeVar("W", bound=Window)


class Driver(Protocol[W]):
    """Makes a loaded engine work: in whole passes over its prompts, or under a load."""

    def run_once(self) -> None:
        """Make the engine work once, so that it allocates all that it needs."""

    def warm_up(self, on_run: Callable[[int, int | None], None]) -> WarmupRecord | None:
        """Warm up, and return a record of it; None if the study switches that off.

        Args:
            on_run: Called before each warm-up batch with its number, from 1, and the largest number, which is None
                if there is none. For a server, called once, with 0.
        """

    def measure(self, meters: Meters, observers: WindowObservers, turns: Turns | None = None) -> W:
        """Measure for at least ``measurement.min_window_seconds``.

        Args:
            meters: Open meters that have no window in progress.
            observers: Observe each window, or turn.
            turns: Turns with another experiment; None to measure without interruption.
        """

    def requests(self, window: W) -> Requests:
        """Return the requests from which latencies are computed."""

    def sent(self, window: W, requests: Requests) -> Requests:
        """Return the requests that are saved: *requests*, and others that were sent with them."""
        return requests

    def check(self, window: W, requests: Requests) -> str | None:
        """Check the requests, and return why no gate may judge them; None if gates may.

        Raises:
            ValueError: The records contradict each other or the clock.
        """
        return None

    def metrics(self, window: W, requests: Requests) -> dict[str, Metric]:
        """Return the metrics that follow from the window and its requests, per pass."""

    def loading_metrics(self, seconds: float, total: Total) -> dict[str, Metric]:
        """Return time and energy of loading the model, given what :meth:`Engine.load` took."""

    def token_record(self, window: W, requests: Requests) -> TokenRecord:
        """Return the token counts of a pass."""

    def measure_drift(self, meters: Meters, observers: WindowObservers) -> None:
        """Measure the first load on a server again, if the experiment is the last of several on it."""
        return

    def records(self, window: W) -> dict[str, Any]:
        """Return further fields of the result, by name."""
        return {}

    def warnings(self, window: W, requests: Requests) -> Iterator[QualityWarning]:
        """Yield quality warnings about the work."""


def measure_turns(
    turns: Turns, observers: WindowObservers, min_window_seconds: float, measure: Callable[[float, Turn], W]
) -> list[W]:
    """Measure alternately with another experiment, and return the window of each turn.

    Args:
        turns: The turns.
        observers: Observe each turn.
        min_window_seconds: Minimum length of all turns together, in s.
        measure: Measures one turn, given its minimum length in s.
    """
    taken: list[W] = []
    while True:
        measured = math.fsum(one.seconds for one in taken)
        done = progress(len(taken), measured, min_window_seconds, observers.waiting_cpus)
        if (turn := turns.next_turn(done)) is None:
            return taken
        taken.append(measure(turns.min_seconds, turn))
