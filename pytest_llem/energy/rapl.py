"""CPU and memory energy from RAPL, through Linux' powercap files."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pytest_llem.energy.protocol import DeviceReading, MeterUnavailableError, Reading

POWERCAP = Path("/sys/class/powercap")

#: No package, nor its memory, draws more, in W; a window in which it could have gone round its counter twice is
#: not trusted.
MOST_WATTS = {"cpu_package": 1000.0, "dram": 300.0}


@dataclass(frozen=True)
class _Zone:
    """One counter: its folder, name and range in µJ."""

    folder: Path
    device: str
    boundary: str
    source: str
    range_uj: int

    def read(self) -> int:
        return int((self.folder / "energy_uj").read_text())


class RaplMeter:
    """Reads ``energy_uj`` of every package and of its memory at both edges.

    The psys and core zones hold the same energy again and are left out. The figures are package-wide: what
    else runs on the machine is in them.

    Args:
        root: The powercap folder; the environment variable ``LLEM_POWERCAP_ROOT`` serves the tests.
    """

    def __init__(self, root: Path | None = None) -> None:
        self._root = root or Path(os.environ.get("LLEM_POWERCAP_ROOT") or POWERCAP)
        self._zones: list[_Zone] = []
        self._start: list[int | str] = []
        self._began = 0.0

    def open(self, gpus: Sequence[str]) -> None:
        self._zones = []
        packages: dict[str, str] = {}
        folders = sorted(self._root.glob("intel-rapl:*")) if self._root.is_dir() else []
        try:
            for folder in folders:  # a package comes before the zones within it
                name = (folder / "name").read_text().strip()
                index = folder.name.split(":")[1]
                if name.startswith("package"):
                    # The kernel's name: the index counts psys too, and a package of several dies is several zones.
                    packages[index] = name.removeprefix("package-")
                    boundary, source, device = "cpu_package", "rapl_package", name
                elif name == "dram":
                    boundary, source, device = "dram", "rapl_dram", f"dram-{packages.get(index, index)}"
                else:
                    continue
                span = int((folder / "max_energy_range_uj").read_text())
                zone = _Zone(folder, device, boundary, source, span)
                zone.read()
                self._zones.append(zone)
        except PermissionError as error:
            raise MeterUnavailableError(
                f"RAPL: permission denied for {error.filename} (only root may read it since CVE-2020-8694)"
            ) from error
        except (OSError, ValueError) as error:
            raise MeterUnavailableError(f"RAPL: {error}") from error
        if not any(zone.boundary == "cpu_package" for zone in self._zones):
            raise MeterUnavailableError(f"RAPL: no package counter under {self._root}")

    def begin(self) -> None:
        self._start = [_read(zone) for zone in self._zones]
        self._began = time.monotonic()

    def end(self) -> Reading:
        stop = [_read(zone) for zone in self._zones]
        seconds = time.monotonic() - self._began
        edges = zip(self._zones, self._start, stop, strict=True)
        return Reading(tuple(_reading(zone, a, b, seconds) for zone, a, b in edges), seconds)

    def close(self) -> None:
        self._zones = []


def _read(zone: _Zone) -> int | str:
    try:
        return zone.read()
    except (OSError, ValueError) as error:
        return str(error)


def _reading(zone: _Zone, start: int | str, stop: int | str, seconds: float) -> DeviceReading:
    energy_j: float | None = None
    reason = next((edge for edge in (start, stop) if isinstance(edge, str)), None)
    if isinstance(start, int) and isinstance(stop, int):
        most_j, range_j = seconds * MOST_WATTS[zone.boundary], zone.range_uj / 1e6
        # Below where it began: it has gone round once, or was reset.
        found_j = (stop - start) / 1e6 + (range_j if stop < start else 0)
        if most_j > range_j:
            reason = f"{seconds:.0f} s may hold more than one round of a counter of {range_j:.0f} J"
        elif stop < start and found_j > most_j:
            reason = f"the counter was reset (it fell from {start} to {stop} µJ in {seconds:.1f} s)"
        elif stop == start:  # what is on draws power; some virtual machines show a counter that is always 0
            reason = f"the counter did not rise (from {start} µJ)"
        else:
            energy_j = found_j
    return DeviceReading(
        device=zone.device,
        boundary=zone.boundary,
        energy_j=energy_j,
        method="unavailable" if energy_j is None else "measured",
        source=zone.source,
        reason=f"RAPL: {reason}" if reason else None,
    )
