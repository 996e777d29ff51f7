"""A powercap folder with RAPL counters as on Linux."""

from __future__ import annotations

from pathlib import Path

RANGE_UJ = 262_143_328_850


class Powercap:
    """Zones in a folder.

    Args:
        root: The folder; created if missing.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(exist_ok=True)

    def zone(self, folder: str, name: str, energy_uj: int = 1_000_000, range_uj: int = RANGE_UJ) -> Path:
        """Add a zone, and return the file of its counter."""
        zone = self.root / folder
        zone.mkdir()
        (zone / "name").write_text(f"{name}\n")
        (zone / "max_energy_range_uj").write_text(f"{range_uj}\n")
        counter = zone / "energy_uj"
        counter.write_text(f"{energy_uj}\n")
        return counter


def add(counter: Path, joules: float, range_uj: int = RANGE_UJ) -> None:
    """Increase a counter, which wraps to 0 at its range."""
    counter.write_text(f"{(int(counter.read_text()) + round(joules * 1e6)) % range_uj}\n")
