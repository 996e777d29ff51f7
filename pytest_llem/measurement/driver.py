"""The protocol of a driver, which makes a loaded engine work and accounts for it, and the measured window."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from pytest_llem.energy.account import Account, Meters, Total
from pytest_llem.measurement.observers import WindowObservers
from pytest_llem.measurement.requests import Requests
from pytest_llem.measurement.turns import Turn, Turns, progress
from pytest_llem.results.document import to_csv
from pytest_llem.results.experiment import TokenRecord, WarmupRecord
from pytest_llem.results.metrics import Metric
from pytest_llem.results.quality_warnings import QualityWarning

#: Fields of ``PowerSample`` that are columns of ``power.csv``, and all columns.
POWER_FIELDS = ("power_w", "temperature_c", "sm_clock_mhz", "memory_clock_mhz")
POWER_COLUMNS = ("seconds", "device", *POWER_FIELDS)


@dataclass(frozen=True)
class Window:
    """The measured time span of an experiment, from ``began`` to ``ended``.

    Attributes:
        seconds: Length in s; of several turns, the sum of theirs.
        account: The meters' readings.
        began: Start on the monotonic clock, in s.
        began_at: Start as Unix time, in s.
        compiled: Message about what was compiled in the window, which is then not in the steady state; None if
            no compilation was detected.
        restarts: Number of earlier windows that were discarded because something was compiled in them.
        turns: Windows of the experiment's turns, which this window joins, if candidate and reference are
            interleaved; else empty.
    """

    seconds: float
    account: Account
    began: float = 0.0
    began_at: float = 0.0
    compiled: str | None = None
    restarts: int = 0
    turns: Sequence[Window] = ()

    @property
    def ended(self) -> float:
        """End on the monotonic clock, in s."""
        return self.turns[-1].ended if self.turns else self.began + self.seconds

    @property
    def count(self) -> float:
        """Number of passes; for a server, the number of answered requests ÷ ``n``."""
        raise NotImplementedError

    @property
    def pass_fields(self) -> dict[str, Any]:
        """Fields about passes in the window's record; ``passes`` is None if the window has no passes."""
        return {"passes": None}

    def power_csv(self) -> str | None:
        """Return the meters' power samples as CSV, one line for each; None if there are no samples.

        Times are in s from ``began``. A missing value is an empty cell.
        """
        if not self.account.samples:
            return None
        rows: list[Sequence[object]] = [POWER_COLUMNS]
        for sample in self.account.samples:
            values = (getattr(sample, name) for name in POWER_FIELDS)
            cells = ("" if value is None else f"{value:g}" for value in values)
            rows.append([f"{sample.at - self.began:.4f}", sample.device, *cells])
        return to_csv(rows)


#: The first run of a batch has compiled something if it takes this many times as long as later runs, and this many
#: seconds longer. Compilers take tenths of a second and more; delays by the operating system are shorter.
STALL_FACTOR, STALL_SECONDS = 3.0, 0.1


def compilations() -> int:
    """Return how many graphs ``torch.compile`` has compiled in this process.

    transformers calls ``torch.compile`` for static caches on GPUs, and so do some models and attention kernels.
    If the engine has not imported torch, nothing was compiled, and torch is not imported here.
    """
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])


def first_run_stands_out(first: float, later: Sequence[float]) -> bool:
    """Return whether the *first* run of a batch was so much slower than *later* runs that it compiled something.

    Args:
        first: Duration of the first run, in s.
        later: Durations of later runs of the same batch, in s; if empty, the result is False.
    """
    if not later:
        return False
    typical = statistics.median(later)
    return first > STALL_FACTOR * typical and first - typical > STALL_SECONDS


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
