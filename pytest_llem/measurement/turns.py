"""Measure alternately with another experiment: each runs some passes or a slice of load while the other waits.

A change of the machine over minutes then affects both alike. Both processes live at the same time, with their
models loaded, and pytest's process gives each its turns (``isolation/interleaved.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from pytest_llem.measurement.progress import Progress

#: The phase in which an experiment waits for its turn.
WAITING = "waiting for its turn"

#: Minimum number of turns of each experiment: among fewer, outliers cannot be found.
MIN_TURNS = 4


class Turn(NamedTuple):
    """Permission to measure.

    Attributes:
        partner: Pid of the other experiment, which waits meanwhile, or of its server.
        stopped: Whether this experiment was stopped by SIGSTOP while it waited.
    """

    partner: int
    stopped: bool = False

    def line(self) -> bytes:
        """Return the turn as the line that is sent to the experiment's process."""
        return f"turn {self.partner} {int(self.stopped)}\n".encode()


#: The line that ends the turns.
END_OF_TURNS = b"end\n"


def parse_turn(line: bytes) -> Turn | None:
    """Return the turn that a line gives to the experiment's process; None if it ends the turns."""
    words = line.split()
    return Turn(int(words[1]), words[2] == b"1") if words[:1] == [b"turn"] else None


@dataclass(frozen=True)
class Turns:
    """The turns of one experiment.

    Attributes:
        pair: Unique id of the two experiments.
        min_seconds: Minimum length of a turn, in s. A turn is at least one pass.
        next_turn: Reports how far the measurement is, and waits for the next turn; returns None at the end.
    """

    pair: str
    min_seconds: float
    next_turn: Callable[[Progress], Turn | None]


def progress(done: int, measured: float, min_window_seconds: float, waiting_cpus: float | None) -> Progress:
    """Return how many turns were taken and how many there will be, at least. They are enough if both are equal.

    Args:
        done: Number of turns so far.
        measured: Their length, in s.
        min_window_seconds: Minimum length of all turns together, in s.
        waiting_cpus: Mean number of CPUs that this experiment used while it waited for the last turn; None if
            unknown.
    """
    total = max(done, MIN_TURNS)
    if measured < min_window_seconds:
        total = max(total, done + 1, math.ceil(done * min_window_seconds / measured) if done else 0)
    return Progress(WAITING, done, total, "turns", waiting_cpus)
