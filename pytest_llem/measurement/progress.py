"""How far an experiment is: what its process says of that, and how it crosses to whoever looks on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

#: What is counted: runs of a batch, or seconds, which whoever looks on counts by himself.
Unit = Literal["runs", "s"]
UNITS: tuple[Unit, ...] = ("runs", "s")

#: Characters of a phase that are kept.
PHASE_CAP = 80


@dataclass(frozen=True)
class Progress:
    """An experiment's step to the next phase, or within one.

    Nothing is said while a window is open: how many of its seconds have passed, everybody's clock tells.

    Attributes:
        phase: What is being done: ``importing``, ``loading``, ``warming up``, ``measuring``, …
        done: How much of it, in ``unit``; None where nobody counts.
        total: Of how much; None where that is not known. It may turn out to be less, or a little more.
        unit: Of both.
    """

    phase: str
    done: int | None = None
    total: float | None = None
    unit: Unit | None = None

    def as_event(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class GpuStatus:
    """What the boards are like at the moment. What they do not tell is None.

    Attributes:
        power_w: Of all boards, in W.
        temperature_c: Of the hottest, in °C.
    """

    power_w: float | None = None
    temperature_c: float | None = None


class Watcher(Protocol):
    """Somebody who looks on while an experiment runs.

    Attributes:
        every_s: It wants to be called this often at least, in s.
    """

    every_s: float

    def see(self, seen: Progress | GpuStatus) -> None:
        """Take in what the experiment's process, or its sampler, has said."""

    def tick(self) -> None:
        """Do what is to be done now and then: called each time that the waiting process wakes up."""


def parse(event: Mapping[str, Any]) -> Progress | GpuStatus | None:
    """Return what an *event* says, None where it says nothing known; a field that makes no sense is left out."""
    phase = event.get("phase")
    if isinstance(phase, str):
        done, total, unit = _number(event.get("done")), _number(event.get("total")), event.get("unit")
        known = unit if unit in UNITS else None
        return Progress(phase[:PHASE_CAP], None if done is None else int(done), total, known)
    glance = GpuStatus(_number(event.get("power_w")), _number(event.get("temperature_c")))
    return None if glance == GpuStatus() else glance


def _number(value: object) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return float(value) if is_number and math.isfinite(value) else None  # type: ignore[arg-type]
    except OverflowError:
        return None
