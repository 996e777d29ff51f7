"""How the figures of a study were obtained, over all its experiments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from pytest_llem.reporting.terminal.tables import number
from pytest_llem.results.experiment import DeviceEnergy, ExperimentResult


@dataclass(frozen=True, order=True)
class Meter:
    """One way in which energy was obtained.

    Attributes:
        boundary: What it covers.
        method: How it was obtained.
        source: What it was read from.
        gain: By what share it may be off throughout, in words.
        device: Of which device.
    """

    boundary: str
    method: str
    source: str
    gain: str
    device: str

    @classmethod
    def of(cls, device: DeviceEnergy) -> Meter:
        gain = "" if device.gain_error is None else f"±{100 * device.gain_error:.2g} %"
        return cls(device.boundary, device.method, device.source or device.reason or "", gain, device.device)


@dataclass
class Provenance:
    """What is kept of each result.

    Attributes:
        count: Of results.
        meters: How many results each way of obtaining energy is in.
    """

    count: int = 0
    meters: Counter[Meter] = field(default_factory=Counter)
    _seen: dict[str, list[float]] = field(default_factory=dict)
    _counted: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, result: ExperimentResult) -> None:
        self.count += 1
        self.meters.update({Meter.of(device) for device in result.devices})
        window, warmup, gap, idle = result.window, result.warmup, result.gap, result.idle_power
        self._see("window", window.window_seconds)
        self._see("passes", window.passes)
        self._see("tick", window.tick_seconds)
        self._see("quantisation", window.quantisation_error)
        self._see("drift", window.drift)
        self._see("harness", result.harness_cpu_seconds)
        if warmup is not None:
            self._see("warmup", warmup.runs)
            self._tell("warmup", {True: "settled", False: "not settled", None: "not watched"}[warmup.converged])
        if gap is not None:
            self._see("gap", gap.seconds)
            self._tell("gap", f"{gap.reason} ({gap.note})" if gap.note else gap.reason)
        if idle is not None:
            self._see("idle", idle.idle_power_w)
            self._tell("idle", idle.reason or idle.method)
        if (contention := result.contention) is not None:
            self._tell("contention", contention.state)
            self._see("received", contention.cpu_received_share)
            self._see("others", contention.others_cpu_share)
            for gpu in contention.gpus:
                self._see("busy", gpu.busy_share)
        if result.start is not None:
            self._tell("start", result.start.method)
        for device in result.devices:
            if device.energy_j and device.integral_j is not None:
                self._see("integral", device.integral_j / device.energy_j)
        if result.engine.model_source is not None:
            self._tell("load", result.engine.model_source)

    def rows(self) -> list[tuple[str, str]]:
        """Return what there is to say of how it was measured: what, and over all experiments."""
        quantisation = self._seen.get("quantisation")
        rows = [
            ("Measured window", self._span("window", "s")),
            ("Whole passes in it", self._span("passes")),
            ("Time of a pass, second half of a window against the first", self._percent("drift")),
            ("Warm-up runs", self._both("warmup")),
            ("Idle before an experiment", self._both("gap", "s")),
            ("Idle power with the model loaded", self._both("idle", "W")),
            ("The counter's tick", self._span("tick", "s")),
            ("A tick's share of the window, at most", f"{100 * max(quantisation):.2g} %" if quantisation else ""),
            ("Sampled power, integrated ÷ the counter", self._span("integral")),
            ("Processor time of measuring, during a window", self._span("harness", "s")),
            ("Use of its devices by others", self._counts("contention")),
            ("CPU time received ÷ wanted", self._span("received")),
            ("Share of the CPUs used by other processes", self._span("others")),
            ("Share of the window in which a GPU was busy", self._span("busy")),
            ("Processes are started by", self._counts("start")),
            ("Models are from", self._counts("load")),
        ]
        return [(what, text) for what, text in rows if text]

    def _see(self, what: str, value: float | None) -> None:
        if value is not None:
            self._seen.setdefault(what, []).append(value)

    def _tell(self, what: str, word: str) -> None:
        self._counted.setdefault(what, Counter())[word] += 1

    def _both(self, what: str, unit: str = "") -> str:
        return "; ".join(filter(None, (self._span(what, unit), self._counts(what))))

    def _span(self, what: str, unit: str = "") -> str:
        values = self._seen.get(what)
        if not values:
            return ""
        low, high = (number(value) if value % 1 else f"{value:,.0f}" for value in (min(values), max(values)))
        return f"{low if low == high else f'{low} to {high}'} {unit}".strip()

    def _percent(self, what: str) -> str:
        values = self._seen.get(what)
        return f"{100 * min(values):+.1f} % to {100 * max(values):+.1f} %" if values else ""

    def _counts(self, what: str) -> str:
        return _counted(self._counted.get(what, Counter()).most_common(), self.count)


def _counted(words: Iterable[tuple[str, int]], count: int) -> str:
    """Return ``settled in 5, not settled in 3``; a single word for all of them stands alone."""
    known = list(words)
    if len(known) == 1 and known[0][1] == count:
        return known[0][0]
    return ", ".join(f"{word} in {n}" for word, n in known)
