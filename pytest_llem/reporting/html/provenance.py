"""Collect how the figures of a study's experiments were measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from pytest_llem.reporting.text import counted, number
from pytest_llem.results.experiment import DeviceEnergy, ExperimentResult


@dataclass(frozen=True, order=True)
class Meter:
    """One way in which energy was obtained."""

    boundary: str
    """What the energy covers."""
    method: str
    """Measured, sampled, attributed, estimated or unavailable."""
    source: str
    """What the energy was read from, or why it is unavailable."""
    gain: str
    """Gain error as text, such as ``±5 %``; empty if unknown."""
    device: str
    """The device whose energy it is."""

    @classmethod
    def of(cls, device: DeviceEnergy) -> Meter:
        """Return how the energy of *device* was obtained."""
        gain = "" if device.gain_error is None else f"±{100 * device.gain_error:.2g} %"
        return cls(device.boundary, device.method, device.source or device.reason or "", gain, device.device)


@dataclass
class Provenance:
    """How the experiments added so far were measured.

    Attributes:
        count: Number of results.
        meters: Number of results by the way in which energy was obtained.
    """

    count: int = 0
    meters: Counter[Meter] = field(default_factory=Counter)
    _values: dict[str, list[float]] = field(default_factory=dict)
    _counted: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, result: ExperimentResult) -> None:
        """Add an experiment's result."""
        self.count += 1
        self.meters.update({Meter.of(device) for device in result.devices})
        window, warmup, gap, idle = result.window, result.warmup, result.gap, result.idle_power
        self._add_value("window", window.window_seconds)
        self._add_value("passes", window.passes)
        self._add_value("tick", window.tick_seconds)
        self._add_value("quantisation", window.quantisation_error)
        self._add_value("drift", window.drift)
        self._add_value("harness", result.harness_cpu_seconds)
        if warmup is not None:
            self._add_value("warmup", warmup.runs)
            self._count("warmup", {True: "settled", False: "not settled", None: "not checked"}[warmup.converged])
        if gap is not None:
            self._add_value("gap", gap.seconds)
            self._count("gap", f"{gap.reason} ({gap.note})" if gap.note else gap.reason)
        if idle is not None:
            self._add_value("idle", idle.idle_power_w)
            self._count("idle", idle.reason or idle.method)
        if (contention := result.contention) is not None:
            self._count("contention", contention.state)
            self._add_value("received", contention.cpu_received_share)
            self._add_value("others", contention.others_cpu_share)
            for gpu in contention.gpus:
                self._add_value("busy", gpu.busy_share)
        if result.concurrent is not None:
            self._count("concurrent", counted(len(result.concurrent), "other") if result.concurrent else "none")
        if result.start is not None:
            self._count("start", result.start.method)
        for device in result.devices:
            if device.energy_j and device.integral_j is not None:
                self._add_value("integral", device.integral_j / device.energy_j)
        if result.engine.model_source is not None:
            self._count("load", result.engine.model_source)

    def rows(self) -> list[tuple[str, str]]:
        """Return the name and the text of each item over all experiments; items without data are left out."""
        quantisation = self._values.get("quantisation")
        rows = [
            ("Measured window", self._span("window", "s")),
            ("Complete passes in the window", self._span("passes")),
            ("Drift: time of a pass, second half of the window against the first", self._percent("drift")),
            ("Warm-up runs", self._span_and_counts("warmup")),
            ("Idle before an experiment", self._span_and_counts("gap", "s")),
            ("Idle power with the model loaded", self._span_and_counts("idle", "W")),
            ("Time between ticks or power samples", self._span("tick", "s")),
            ("Largest share of a tick in the window", f"{100 * max(quantisation):.2g} %" if quantisation else ""),
            ("Integrated sampled power ÷ energy counter", self._span("integral")),
            ("CPU time of the harness in the window", self._span("harness", "s")),
            ("Contention by other processes", self._counts("contention")),
            ("CPU time received ÷ wanted", self._span("received")),
            ("Share of the CPUs used by other processes", self._span("others")),
            ("Share of the window in which a GPU was busy", self._span("busy")),
            ("Experiments at the same time", self._counts("concurrent")),
            ("Start method of experiment processes", self._counts("start")),
            ("Source of models", self._counts("load")),
        ]
        return [(what, text) for what, text in rows if text]

    def _add_value(self, what: str, value: float | None) -> None:
        if value is not None:
            self._values.setdefault(what, []).append(value)

    def _count(self, what: str, word: str) -> None:
        self._counted.setdefault(what, Counter())[word] += 1

    def _span_and_counts(self, what: str, unit: str = "") -> str:
        return "; ".join(filter(None, (self._span(what, unit), self._counts(what))))

    def _span(self, what: str, unit: str = "") -> str:
        values = self._values.get(what)
        if not values:
            return ""
        low, high = (number(value) if value % 1 else f"{value:,.0f}" for value in (min(values), max(values)))
        return f"{low if low == high else f'{low} to {high}'} {unit}".strip()

    def _percent(self, what: str) -> str:
        values = self._values.get(what)
        return f"{100 * min(values):+.1f} % to {100 * max(values):+.1f} %" if values else ""

    def _counts(self, what: str) -> str:
        return _counted(self._counted.get(what, Counter()).most_common(), self.count)


def _counted(words: Iterable[tuple[str, int]], count: int) -> str:
    """Return ``settled in 5, not settled in 3``, or only the word if it holds for all experiments."""
    known = list(words)
    if len(known) == 1 and known[0][1] == count:
        return known[0][0]
    return ", ".join(f"{word} in {n}" for word, n in known)
