"""What a meter is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pytest_llem.results.metrics import METHODS, Method


class MeterUnavailableError(Exception):
    """A meter that cannot read anything here; the message says why, and what would help."""


@dataclass(frozen=True)
class DeviceReading:
    """Energy of one device between ``begin`` and ``end``.

    Attributes:
        device: Its identity: a GPU's UUID, ``package-0``, …
        boundary: What the figure covers: ``gpu_board``, ``cpu_package``, ``dram``, …
        energy_j: In joules; null where it could not be read, never 0 in its place.
        method: How it was obtained.
        source: What it was read from.
        reason: Why ``energy_j`` is null.
    """

    device: str
    boundary: str
    energy_j: float | None
    method: Method
    source: str
    reason: str | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)} (got {self.method!r})")


@dataclass(frozen=True)
class Reading:
    """What a meter saw between ``begin`` and ``end``.

    Attributes:
        devices: One entry a device.
        seconds: What it covers, on the monotonic clock, in seconds.
        tick_seconds: Of the counter, where it moves in ticks.
    """

    devices: tuple[DeviceReading, ...]
    seconds: float
    tick_seconds: float | None = None


class Meter(Protocol):
    """Reads energy over windows that do not overlap: ``open``, then ``begin`` … ``end`` any number of times,
    then ``close``. Found by name under the entry-point group ``pytest_llem.energy``; made without arguments.
    """

    def open(self, gpus: Sequence[str]) -> None:
        """Get ready to read.

        Args:
            gpus: UUIDs of the GPUs the engine runs on, empty on a CPU.

        Raises:
            MeterUnavailableError: Nothing can be read here.
        """

    def begin(self) -> None:
        """Start a window. A meter that ticks waits for a tick first. A counter that fails here gives its null
        at ``end``.
        """

    def end(self) -> Reading:
        """End the window. A counter that fails meanwhile gives a null with its reason and raises nothing."""

    def close(self) -> None:
        """Let go of what ``open`` took. Not called where ``open`` raised: it has let go by then."""
