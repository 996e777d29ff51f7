"""A /proc and control groups whose counters a test sets."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


class Proc:
    """Folders with the layout of Linux.

    Args:
        root: Folder in which ``proc`` and ``cgroup`` are made.
    """

    def __init__(self, root: Path) -> None:
        self.proc, self.cgroups = root / "proc", root / "cgroup"
        for folder in (self.proc / "self", self.proc / "pressure", self.cgroups):
            folder.mkdir(parents=True)

    def cpus(self, *busy: float, stolen: float = 0.0, idle: float = 1000.0) -> None:
        """Set the busy time of each CPU, and the time stolen from each, in s."""
        rows = [
            f"cpu{number} {_ticks(one)} 0 0 {_ticks(idle)} 0 0 0 {_ticks(stolen)} 0 0"
            for number, one in enumerate(busy)
        ]
        (self.proc / "stat").write_text("\n".join(["cpu 1 2 3 4 5 6 7 8 9 10", *rows, "intr 1 2 3"]) + "\n")

    def process(
        self,
        pid: int,
        parent: int = 1,
        seconds: float = 0.0,
        *,
        reaped: float = 0.0,
        name: str = "python3",
        started: int = 100,
        threads: Mapping[int, tuple[float, float, int]] | None = None,
    ) -> None:
        """Write a process.

        Args:
            pid: Its id.
            parent: Its parent's id.
            seconds: Its CPU time in s.
            reaped: CPU time of its reaped children in s.
            name: Its name.
            started: Its start time in ticks.
            threads: For each thread: time run and waited in s, and involuntary context switches.
        """
        folder = self.proc / str(pid)
        folder.mkdir(exist_ok=True)
        zeros = "0 " * 9
        times = f"{_ticks(seconds)} 0 {_ticks(reaped)} 0"
        (folder / "stat").write_text(f"{pid} ({name}) R {parent} {zeros}{times} 20 0 1 0 {started} 0 0\n")
        for tid, (ran, waited, switches) in (threads or {}).items():
            task = folder / "task" / str(tid)
            task.mkdir(parents=True, exist_ok=True)
            (task / "schedstat").write_text(f"{int(ran * 1e9)} {int(waited * 1e9)} 7\n")
            (task / "status").write_text(
                f"Name:\t{name}\nvoluntary_ctxt_switches:\t5\nnonvoluntary_ctxt_switches:\t{switches}\n"
            )

    def pressure(self, seconds: float) -> None:
        """Set the time that any task has waited for a CPU, in s."""
        text = f"some avg10=0.00 avg60=0.00 avg300=0.00 total={int(seconds * 1e6)}\nfull avg10=0.00 total=0\n"
        (self.proc / "pressure" / "cpu").write_text(text)

    def group(self, line: str, path: str, files: Mapping[str, str]) -> None:
        """Set the control group of this process, and files of it or of one above it."""
        (self.proc / "self" / "cgroup").write_text(f"{line}\n")
        folder = self.cgroups / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text)


def _ticks(seconds: float) -> int:
    return round(seconds * TICKS)
