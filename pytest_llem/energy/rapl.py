"""Measure CPU and memory energy with RAPL, through Linux's powercap files."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pytest_llem.energy.protocol import DeviceReading, MeterUnavailableError, Reading

POWERCAP = Path("/sys/class/powercap")

#: Highest power of any package and of its memory, in W. It limits how fast a counter can overflow.
MAX_WATTS = {"cpu_package": 1000.0, "dram": 300.0}

#: Update period of the counters, in s (Intel SDM, volume 3B, "Package RAPL Domain"). An update cannot be waited
#: for, so that an edge lies anywhere within a period.
UPDATE_S = 0.001

#: Tolerance for the delay of a read, in s, in the check that a counter did not rise faster than possible.
_SLACK_S = 0.05


@dataclass(frozen=True)
class Zone:
    """The counter of a package or of its memory.

    Attributes:
        folder: Its powercap folder.
        device: Name of the device.
        boundary: What its energy covers.
        source: Source in its readings.
    """

    folder: Path
    device: str
    boundary: str
    source: str

    @property
    def package(self) -> str | None:
        """Name of the package if it has several dies; None otherwise."""
        package, die, _ = self.device.rpartition("-die-")
        return package if die else None

    @cached_property
    def range_uj(self) -> int:
        """Value from which the counter starts again at 0, in µJ.

        Raises:
            OSError: The counter's file cannot be read.
            ValueError: It is not valid.
        """
        found = int((self.folder / "max_energy_range_uj").read_text())
        if found <= 0:
            raise ValueError(f"{self.folder}: a counter with a range of {found} µJ")
        return found

    @property
    def overflow_s(self) -> float:
        """Shortest time in which the counter can overflow, in s."""
        return self.range_uj / 1e6 / MAX_WATTS[self.boundary]

    def read(self) -> int:
        """Return the value of the counter, in µJ."""
        return int((self.folder / "energy_uj").read_text())


@dataclass
class _Track:
    """Accumulates one counter over a window, from read to read.

    Attributes:
        zone: The counter.
        began: Time of the first read on the monotonic clock, in s; None before it.
        at: Time of the last read, in s.
        problem: Why the energy is not available; None if it is.
        is_mirror: Whether the counter may be the same as that of another die of the package.
    """

    zone: Zone
    began: float | None = None
    at: float = 0.0
    problem: str | None = None
    is_mirror: bool = False
    _value: int = 0
    _rise_uj: int = 0

    def read(self) -> None:
        """Read the counter, and add its rise since the last read."""
        if self.problem is not None:
            return
        try:
            value, now = self.zone.read(), time.monotonic()
        except (OSError, ValueError) as error:
            self.problem = str(error)
            return
        if self.began is None:
            self.began = now
        elif now - self.at > self.zone.overflow_s:
            span = f"a counter of {self.zone.range_uj / 1e6:.0f} J"
            self.problem = (
                f"it was not read for {now - self.at:.0f} s, in which {span} may overflow more than once"
            )
        else:
            self._rise_uj += self._rise(value, now - self.at)
        self._value, self.at = value, now

    def equals(self, other: _Track, again: int) -> bool:
        """Return whether this and *other* show the same counter.

        They do if *other*'s value lies between two values of this counter that were read before and after it. With
        separate counters of two dies this is very unlikely.

        Args:
            other: Another counter, read after this one.
            again: Value of this counter, read after the other.
        """
        span = self.zone.range_uj
        return (other._value - self._value) % span <= (again - self._value) % span

    def _rise(self, value: int, seconds: float) -> int:
        rise = (value - self._value) % self.zone.range_uj  # the counter may have overflowed
        if rise / 1e6 > (seconds + _SLACK_S) * MAX_WATTS[self.zone.boundary]:
            change = f"from {self._value} to {value} µJ in {seconds:.1f} s"
            self.problem = f"the counter was reset, or a value was wrong (it went {change})"
        return rise

    def reading(self) -> DeviceReading:
        """Return the energy of the window."""
        reason = self.problem
        if reason is None and not self._rise_uj:  # some virtual machines have a counter that is always 0
            reason = f"the counter did not rise (from {self._value} µJ)"
        zone = self.zone
        if reason is not None or self.began is None:
            where = (zone.device, zone.boundary)
            return DeviceReading(*where, None, "unavailable", zone.source, reason=f"RAPL: {reason}")
        energy_j, seconds = self._rise_uj / 1e6, self.at - self.began
        return DeviceReading(
            zone.device,
            zone.boundary,
            energy_j,
            "measured",
            zone.source,
            seconds=seconds,
            # Each edge is uniformly distributed over an update period: a variance of period² / 12 (GUM, 4.3.7).
            uncertainty_j=energy_j / seconds * UPDATE_S * math.sqrt(2 / 12) if seconds else None,
        )


class RaplMeter:
    """Reads ``energy_uj`` of every package and of its memory, at both edges and often enough to detect overflows.

    The psys and core zones contain the same energy again and are left out. The energy is that of whole packages,
    with everything else that runs on the machine. A package of several dies has a zone for each die. Some
    processors show the same counter in all of these zones, which then counts once; others have one counter for
    each die. Only the values at both edges distinguish the two.

    A thread suffices for the reads in between, without a process of its own: they are a minute or more apart, each
    reads a small file, and one that is too late is detected and makes the energy unavailable.

    Args:
        root: The powercap folder; None for the system's.
    """

    def __init__(self, root: Path | None = None) -> None:
        self._root = root or powercap_root()
        self._zones: list[Zone] = []
        self._tracks: list[_Track] = []
        self._began = 0.0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def open(self, gpus: Sequence[str]) -> None:
        try:
            self._zones = list(find_zones(self._root))
            for zone in self._zones:
                _ = zone.range_uj, zone.read()  # raise now what would be raised in a window
        except PermissionError as error:
            raise MeterUnavailableError(
                f"permission denied for {error.filename} (only root may read it since CVE-2020-8694)"
            ) from error
        except (OSError, ValueError) as error:
            raise MeterUnavailableError(str(error)) from error
        if not any(zone.boundary == "cpu_package" for zone in self._zones):
            raise MeterUnavailableError(f"no package counter under {self._root}")
        self._closed.clear()
        self._thread = threading.Thread(target=self._keep_reading, name="llem-rapl", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        with self._lock:
            self._tracks = [_Track(zone, is_mirror=zone.package is not None) for zone in self._zones]
            self._read_edge()
            self._began = time.monotonic()

    def end(self) -> Reading:
        with self._lock:
            self._read_edge()
            tracks, self._tracks = [track for track in self._tracks if not track.is_mirror], []
        devices = tuple(track.reading() for track in tracks)
        spans = [(track.began, track.at) for track in tracks if track.problem is None and track.began is not None]
        skew = max((max(edge) - min(edge) for edge in zip(*spans, strict=True)), default=None)
        ended = time.monotonic()
        return Reading(devices, ended - self._began, UPDATE_S, skew, began=self._began, ended=ended)

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._zones, self._tracks = [], []

    def _read(self) -> None:
        for track in self._tracks:
            track.read()

    def _read_edge(self) -> None:
        """Read every counter, and clear ``is_mirror`` of those that differ from the first one of their package."""
        self._read()
        firsts: dict[tuple[str | None, str], _Track] = {}
        for track in self._tracks:
            first = firsts.setdefault((track.zone.package, track.zone.boundary), track)
            if not track.is_mirror:
                continue
            readable = first is not track and first.problem is None and track.problem is None
            with suppress(OSError, ValueError):
                track.is_mirror = readable and first.equals(track, first.zone.read())

    def _keep_reading(self) -> None:
        period = min(zone.overflow_s for zone in self._zones) / 2
        while not self._closed.wait(min(period, threading.TIMEOUT_MAX)):
            with self._lock:
                self._read()


def powercap_root() -> Path:
    """Return the powercap folder. Tests set the environment variable ``LLEM_POWERCAP_ROOT``."""
    return Path(os.environ.get("LLEM_POWERCAP_ROOT") or POWERCAP)


def find_zones(root: Path) -> Iterator[Zone]:
    """Yield the counters of the packages and of their memory, without reading them.

    Args:
        root: The powercap folder.

    Raises:
        OSError: A counter's name cannot be read.
    """
    packages: dict[str, str] = {}
    for folder in sorted(root.glob("intel-rapl:*")) if root.is_dir() else ():  # sorts a package before its zones
        name = (folder / "name").read_text().strip()
        index = folder.name.split(":")[1]
        if name.startswith("package"):
            # Use the kernel's name: the index also counts psys, and a package of several dies has several zones.
            packages[index] = name.removeprefix("package-")
            yield Zone(folder, name, "cpu_package", "rapl_package")
        elif name == "dram":
            yield Zone(folder, f"dram-{packages.get(index, index)}", "dram", "rapl_dram")
