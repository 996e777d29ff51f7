"""Define an experiment's progress reports, and how they are sent from its process to pytest's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

#: Units of progress: runs of a batch, seconds, or turns of an interleaved measurement. pytest's process counts
#: the seconds itself.
Unit = Literal["runs", "s", "turns"]
UNITS: tuple[Unit, ...] = ("runs", "s", "turns")

#: Maximum number of characters of a phase.
MAX_PHASE_LENGTH = 80


@dataclass(frozen=True)
class Progress:
    """An experiment's step to the next phase, or within a phase.

    Nothing is reported while a window is open: pytest's process counts how much of it has passed. Only the client
    of a server, which runs during the window anyway, reports about once a second.

    Attributes:
        phase: Current phase: ``importing``, ``loading``, ``warming up``, ``measuring``, …
        done: Amount done so far, in ``unit``; None if it is not counted.
        total: Expected total, in ``unit``; None if unknown. The actual total may be smaller or a little larger.
        unit: Unit of ``done`` and ``total``.
        waiting_cpus: Mean number of CPUs that the experiment used while it waited for its last turn; None if
            unknown.
        in_flight: Number of requests in flight at a server; None if not reported.
        tokens_per_second: Output tokens/s of the server since the last report; None if not reported.
    """

    phase: str
    done: int | None = None
    total: float | None = None
    unit: Unit | None = None
    waiting_cpus: float | None = None
    in_flight: int | None = None
    tokens_per_second: float | None = None

    def as_event(self) -> dict[str, Any]:
        """Return the fields that are set, for JSON."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class GpuStatus:
    """The current state of the GPUs. Values that they do not report are None.

    Attributes:
        power_w: Power of all GPUs together, in W.
        temperature_c: Temperature of the hottest GPU, in °C.
    """

    power_w: float | None = None
    temperature_c: float | None = None


class Watcher(Protocol):
    """Follows the progress of a running experiment.

    Attributes:
        refresh_every_s: Longest time between two calls of :meth:`refresh`, in s.
    """

    refresh_every_s: float

    def see(self, seen: Progress | GpuStatus) -> None:
        """Process a report of the experiment, or of the process that samples its GPUs."""

    def refresh(self) -> None:
        """Do periodic work. Called each time that the waiting process wakes up."""


def parse(event: Mapping[str, Any]) -> Progress | GpuStatus | None:
    """Return the report in an *event*, without malformed fields; None if it has neither phase nor GPU state."""
    phase = event.get("phase")
    if isinstance(phase, str):
        done, total, unit = _number(event.get("done")), _number(event.get("total")), event.get("unit")
        known = unit if unit in UNITS else None
        count, in_flight = (None if one is None else int(one) for one in (done, _number(event.get("in_flight"))))
        waiting, rate = _number(event.get("waiting_cpus")), _number(event.get("tokens_per_second"))
        return Progress(phase[:MAX_PHASE_LENGTH], count, total, known, waiting, in_flight, rate)
    status = GpuStatus(_number(event.get("power_w")), _number(event.get("temperature_c")))
    return None if status == GpuStatus() else status


def _number(value: object) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return float(value) if is_number and math.isfinite(value) else None  # type: ignore[arg-type]
    except OverflowError:
        return None
