"""CPU and memory energy from RAPL, through Linux' powercap files."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pytest_llem.energy.protocol import DeviceReading, MeterUnavailableError, Reading

POWERCAP = Path("/sys/class/powercap")

#: No package, nor its memory, draws more, in W. It tells how soon a counter could be round again.
MAX_WATTS = {"cpu_package": 1000.0, "dram": 300.0}

#: The counters are updated about this often, in s (Intel SDM, volume 3B, "Package RAPL Domain"), at no instant
#: that could be waited for: an edge lies somewhere within.
UPDATE_S = 0.001

#: What a read may be late by on the clock, in s, before a counter is said to have risen faster than it can.
_SLACK_S = 0.05


@dataclass(frozen=True)
class _Zone:
    """One counter: its folder, name and range in µJ."""

    folder: Path
    device: str
    boundary: str
    source: str
    range_uj: int

    @property
    def package(self) -> str | None:
        """The package of several dies that it is of; None where its package has no other counter."""
        package, die, _ = self.device.rpartition("-die-")
        return package if die else None

    @property
    def round_s(self) -> float:
        """The shortest time in which the counter can go round, in s."""
        return self.range_uj / 1e6 / MAX_WATTS[self.boundary]

    def read(self) -> int:
        return int((self.folder / "energy_uj").read_text())


@dataclass
class _Track:
    """One counter over a window, from look to look."""

    zone: _Zone
    began: float | None = None
    at: float = 0.0
    problem: str | None = None
    mirrors: bool = False
    _value: int = 0
    _rise_uj: int = 0

    def look(self) -> None:
        """Add what the counter has risen by since the look before."""
        if self.problem is not None:
            return
        try:
            value, now = self.zone.read(), time.monotonic()
        except (OSError, ValueError) as error:
            self.problem = str(error)
            return
        if self.began is None:
            self.began = now
        elif now - self.at > self.zone.round_s:
            most = f"more than one round of a counter of {self.zone.range_uj / 1e6:.0f} J"
            self.problem = f"it was not read for {now - self.at:.0f} s, which may hold {most}"
        else:
            self._rise_uj += self._rise(value, now - self.at)
        self._value, self.at = value, now

    def shows(self, other: _Track, again: int) -> bool:
        """Return whether this and *other* show one counter: *other*'s value lies between this one's and what this
        one shows *again*, being read before and after it. Counters of two dies hardly ever do.
        """
        turn = self.zone.range_uj
        return (other._value - self._value) % turn <= (again - self._value) % turn

    def _rise(self, value: int, seconds: float) -> int:
        rise = (value - self._value) % self.zone.range_uj  # it may have gone round
        if rise / 1e6 > (seconds + _SLACK_S) * MAX_WATTS[self.zone.boundary]:
            way = f"from {self._value} to {value} µJ in {seconds:.1f} s"
            self.problem = f"the counter was reset, or a value was wrong (it went {way})"
        return rise

    def reading(self) -> DeviceReading:
        """Return what it comes to."""
        reason = self.problem
        if reason is None and not self._rise_uj:  # some virtual machines show a counter that is always 0
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
            # Each edge lies anywhere in an update's time, evenly: a variance of its square / 12 (GUM, 4.3.7).
            uncertainty_j=energy_j / seconds * UPDATE_S * math.sqrt(2 / 12) if seconds else None,
        )


class RaplMeter:
    """Reads ``energy_uj`` of every package and of its memory at both edges, and in between as often as it takes to
    see each counter go round.

    The psys and core zones hold the same energy again and are left out. The figures are package-wide: what
    else runs on the machine is in them. A package of several dies has a zone for each. Some processors show one
    counter in all of them, which counts once; others have a counter for each die. Only the values of both edges
    tell.

    The looks in between are a thread's and not another process's: there are a minute and more between two of them,
    each is a small file, and one that comes too late is seen to, and gives a null.

    Args:
        root: The powercap folder.
    """

    def __init__(self, root: Path | None = None) -> None:
        self._root = root or powercap_root()
        self._zones: list[_Zone] = []
        self._tracks: list[_Track] = []
        self._began = 0.0
        self._looking = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def open(self, gpus: Sequence[str]) -> None:
        try:
            self._zones = _zones(self._root)
        except PermissionError as error:
            raise MeterUnavailableError(
                f"RAPL: permission denied for {error.filename} (only root may read it since CVE-2020-8694)"
            ) from error
        except (OSError, ValueError) as error:
            raise MeterUnavailableError(f"RAPL: {error}") from error
        if not any(zone.boundary == "cpu_package" for zone in self._zones):
            raise MeterUnavailableError(f"RAPL: no package counter under {self._root}")
        self._closed.clear()
        self._thread = threading.Thread(target=self._keep_looking, name="llem-rapl", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        with self._looking:
            self._tracks = [_Track(zone, mirrors=zone.package is not None) for zone in self._zones]
            self._edge()
            self._began = time.monotonic()

    def end(self) -> Reading:
        with self._looking:
            self._edge()
            tracks, self._tracks = [track for track in self._tracks if not track.mirrors], []
        devices = tuple(track.reading() for track in tracks)
        spans = [(track.began, track.at) for track in tracks if track.problem is None and track.began is not None]
        skew = max((max(edge) - min(edge) for edge in zip(*spans, strict=True)), default=None)
        return Reading(devices, time.monotonic() - self._began, UPDATE_S, skew)

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._zones, self._tracks = [], []

    def _look(self) -> None:
        for track in self._tracks:
            track.look()

    def _edge(self) -> None:
        """Look at every counter, and let go of the suspicion that one mirrors another where they differ."""
        self._look()
        firsts: dict[tuple[str | None, str], _Track] = {}
        for track in self._tracks:
            first = firsts.setdefault((track.zone.package, track.zone.boundary), track)
            if not track.mirrors:
                continue
            readable = first is not track and first.problem is None and track.problem is None
            with suppress(OSError, ValueError):
                track.mirrors = readable and first.shows(track, first.zone.read())

    def _keep_looking(self) -> None:
        period = min(zone.round_s for zone in self._zones) / 2
        while not self._closed.wait(min(period, threading.TIMEOUT_MAX)):
            with self._looking:
                self._look()


def powercap_root() -> Path:
    """Return the powercap folder; the environment variable ``LLEM_POWERCAP_ROOT`` serves the tests."""
    return Path(os.environ.get("LLEM_POWERCAP_ROOT") or POWERCAP)


class Domain(NamedTuple):
    """What one counter covers: its folder, the device's name, the boundary, and how a reading calls its source."""

    folder: Path
    device: str
    boundary: str
    source: str


def domains(root: Path) -> Iterator[Domain]:
    """Yield the packages and their memory; the counters themselves are not read.

    Raises:
        OSError: A name cannot be read.
    """
    packages: dict[str, str] = {}
    for folder in sorted(root.glob("intel-rapl:*")) if root.is_dir() else ():  # a package before its zones
        name = (folder / "name").read_text().strip()
        index = folder.name.split(":")[1]
        if name.startswith("package"):
            # The kernel's name: the index counts psys too, and a package of several dies is several zones.
            packages[index] = name.removeprefix("package-")
            yield Domain(folder, name, "cpu_package", "rapl_package")
        elif name == "dram":
            yield Domain(folder, f"dram-{packages.get(index, index)}", "dram", "rapl_dram")


def _zones(root: Path) -> list[_Zone]:
    """Return the counters of the packages and of their memory.

    Raises:
        OSError: One cannot be read.
        ValueError: What is there is no counter.
    """
    zones: list[_Zone] = []
    for domain in domains(root):
        span = int((domain.folder / "max_energy_range_uj").read_text())
        if span <= 0:
            raise ValueError(f"{domain.folder}: a counter with a range of {span} µJ")
        zone = _Zone(*domain, span)
        zone.read()
        zones.append(zone)
    return zones
