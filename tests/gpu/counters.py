"""Log the energy counters of all GPUs, independently of pytest-llem's meters.

    python -m tests.gpu.counters FILE

Appends a line for each change of a counter: s since 1970, UUID, energy in mJ. Ends when standard input is closed.
"""

from __future__ import annotations

import bisect
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import pynvml

from pytest_llem import ExperimentResult
from pytest_llem.times import seconds_between

#: Time between two readings of a counter, in s.
PERIOD_S = 0.01

#: Ticks before and after a time in which a window that begins or ends then may have read the counter.
NEAR = 4


def main(path: str) -> None:
    pynvml.nvmlInit()
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    names = [pynvml.nvmlDeviceGetUUID(handle) for handle in handles]
    last: dict[str, int] = {}
    with open(path, "w", buffering=1) as file:  # noqa: PTH123
        while not select.select([sys.stdin], [], [], PERIOD_S)[0]:
            for name, handle in zip(names, handles, strict=True):
                value = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
                if value != last.get(name):
                    last[name] = value
                    file.write(f"{time.time():.6f} {name} {value}\n")


class Log:
    """What was logged."""

    def __init__(self, path: Path) -> None:
        self._rows: dict[str, list[tuple[float, int]]] = {}
        for line in path.read_text().splitlines():
            at, name, value = line.split()
            self._rows.setdefault(name, []).append((float(at), int(value)))

    def energy(self, uuid: str, began: str, ended: str) -> float:
        """Return the energy of a GPU between two times, in J, from the ticks next to them."""
        first, last = self._near(uuid, began), self._near(uuid, ended)
        rows = self._rows[uuid]
        return (rows[min(last, len(rows) - 1)][1] - rows[first][1]) / 1000

    def has(self, uuid: str, energy_j: float, began: str, ended: str) -> bool:
        """Return whether *energy_j* is the difference of two counter values that were seen near these times."""
        first, last = (
            [value for _, value in self._rows[uuid][max(0, at - NEAR) : at + NEAR]]
            for at in (self._near(uuid, began), self._near(uuid, ended))
        )
        return round(energy_j * 1000) in {high - low for low in first for high in last}

    def _near(self, uuid: str, at: str) -> int:
        return bisect.bisect(self._rows[uuid], (datetime.fromisoformat(at).timestamp(), 0))


def note_parts(found: Callable[[str, object], None], results: Sequence[ExperimentResult], log: Log) -> None:
    """Note how much time and energy the parts of a sweep's experiments took, each of which used one GPU."""
    uuids = [one.environment["gpus"][0]["uuid"] for one in results]
    whole = min(one.started_at for one in results), max(one.completed_at for one in results)
    spans = {
        "from the first start to the last end": [(uuid, *whole) for uuid in sorted({*uuids})],
        "in the experiments' processes": [
            (uuid, one.started_at, one.completed_at) for uuid, one in zip(uuids, results, strict=True)
        ],
        "in the imports of those processes": [
            (uuid, one.start.began_at, one.start.ready_at)
            for uuid, one in zip(uuids, results, strict=True)
            if one.start
        ],
        "in the windows": [
            (uuid, one.window.began_at or "", one.window.ended_at or "")
            for uuid, one in zip(uuids, results, strict=True)
        ],
    }
    for part, took in spans.items():
        seconds = sum(seconds_between(began, ended) for _, began, ended in took) / len(results)
        energy = sum(log.energy(*span) for span in took) / len(results)
        found(part, f"{seconds:.2f} s and {energy:.0f} J of GPUs for each experiment")


@contextmanager
def logging(path: Path) -> Iterator[None]:
    """Log in a process of its own within the context."""
    command = [sys.executable, "-m", "tests.gpu.counters", str(path)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, env=os.environ) as process:
        try:
            while not (path.exists() and path.stat().st_size):
                time.sleep(0.1)
            yield
        finally:
            assert process.stdin is not None
            process.stdin.close()


if __name__ == "__main__":
    main(sys.argv[1])
