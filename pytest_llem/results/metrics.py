"""The catalogue of metrics: one name, one unit, one meaning, everywhere."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

Better = Literal["lower", "higher", None]

#: How an energy was obtained, from strongest to weakest.
Method = Literal["measured", "sampled", "attributed", "estimated", "unavailable"]
METHODS: tuple[Method, ...] = ("measured", "sampled", "attributed", "estimated", "unavailable")

PERCENTILES = (50, 90, 95, 99)


class Metric(BaseModel):
    """One figure of one experiment.

    Attributes:
        value: In ``unit``; null where it could not be had, never 0 in its place.
        unit: As in :data:`CATALOGUE`.
        method: For energies, how it was obtained.
        source: For energies, what it was read from (``nvml_total_energy``, ``rapl_package``, …).
        boundary: For energies, what it covers (``gpu_board``, ``cpu_package``, …).
        reason: Why ``value`` is null.
        uncertainty: Standard uncertainty (k = 1) of reading the meter, in ``unit``. Neither the spread from run to
            run is in it nor the meter's gain.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    value: float | None
    unit: str
    method: Method | None = None
    source: str | None = None
    boundary: str | None = None
    reason: str | None = None
    uncertainty: float | None = None

    @property
    def interval95(self) -> tuple[float, float] | None:
        """Where the value lies with 95 % by reading the meter alone; None where that is not known."""
        if self.value is None or self.uncertainty is None:
            return None
        return self.value - 1.96 * self.uncertainty, self.value + 1.96 * self.uncertainty


@dataclass(frozen=True)
class Definition:
    """What a metric means.

    Attributes:
        unit: Its unit.
        better: Which way is better; null where neither is.
        meaning: In a sentence.
    """

    unit: str
    better: Better
    meaning: str


def _latency(what: str) -> dict[str, Definition]:
    key, meaning = what.split(":")
    return {
        f"{key}_p{p}_ms": Definition("ms", "lower", f"{meaning}, percentile {p} over the window's requests")
        for p in PERCENTILES
    }


#: Every metric of an ExperimentResult, by name. Totals are per pass: all ``n`` prompts once.
CATALOGUE: dict[str, Definition] = {
    "energy_j": Definition("J", "lower", "Energy of a pass over the named boundary"),
    "energy_per_output_token_j": Definition("J", "lower", "energy_j / output tokens, prefill included"),
    "energy_per_input_token_j": Definition("J", "lower", "prefill_energy_j / input tokens"),
    "energy_per_request_j": Definition("J", "lower", "energy_j / prompts"),
    "wh_per_1000_requests": Definition("Wh", "lower", "energy_per_request_j in watt-hours, for a thousand"),
    "tokens_per_joule": Definition("1/J", "higher", "Output tokens / energy_j"),
    "edp_js": Definition("J·s", "lower", "Energy-delay product: energy_j · seconds"),
    "mean_power_w": Definition("W", None, "Mean power over the window"),
    "idle_context_w": Definition("W", None, "Power while the model is loaded and nothing runs"),
    "active_energy_j": Definition(
        "J", "lower", "energy_j less idle_context_w over the seconds metered; below 0 where idling took more"
    ),
    "gpu_energy_j": Definition("J", "lower", "Energy of a pass, GPU boards"),
    "cpu_energy_j": Definition("J", "lower", "Energy of a pass, CPU packages"),
    "dram_energy_j": Definition("J", "lower", "Energy of a pass, memory"),
    "prefill_energy_j": Definition(
        "J", "lower", "Energy of a pass with one new token a prompt; null unless measurement.prefill_split"
    ),
    "decode_energy_j": Definition(
        "J", "lower", "energy_j less prefill_energy_j; below 0 where the two windows differ by chance"
    ),
    "seconds": Definition("s", "lower", "Time of a pass, synchronised at both ends"),
    "prefill_seconds": Definition(
        "s", "lower", "Time of a pass with one new token a prompt; null unless measurement.prefill_split"
    ),
    "decode_seconds": Definition("s", "lower", "seconds less prefill_seconds"),
    "output_tokens_per_second": Definition("1/s", "higher", "Output tokens / seconds"),
    "requests_per_second": Definition("1/s", "higher", "Prompts / seconds"),
    **_latency("ttft:Time to first token, from the generate call"),
    **_latency("itl:Inter-token latency"),
    **_latency("e2e:Time to a request's last token, from the generate call"),
    "model_memory_mb": Definition("MB", "lower", "Weights and buffers (10^6 bytes)"),
    "peak_memory_mb": Definition("MB", "lower", "Most memory in use during the window (10^6 bytes)"),
    "peak_temperature_c": Definition("°C", None, "Highest temperature of any device in the window"),
    "throttled_seconds": Definition(
        "s", None, "How long of the window clocks were held down: by the worst reason, on the worst device"
    ),
    "flops": Definition("FLOP", None, "Operations of a pass: 2 a weight and token, and attention; no padding"),
    "mfu": Definition("ratio", None, "Model FLOPs utilisation: flops / seconds / the device's dense peak"),
    "mbu": Definition(
        "ratio",
        None,
        "Model bandwidth utilisation: bytes of weights and context / seconds / bandwidth",
    ),
    "times_floor": Definition("ratio", None, "seconds / the least that the device's peaks allow; never below 1"),
    "load_seconds": Definition("s", "lower", "Time to load the model"),
    "load_energy_j": Definition("J", "lower", "Energy of loading the model"),
    "gco2e_g": Definition("g", "lower", "energy_j · PUE · carbon intensity, as the ini file states them"),
}


def metric(name: str, value: float | None, **provenance: str | float | None) -> Metric:
    """Return a figure with its unit from the catalogue.

    Raises:
        KeyError: No such metric.
    """
    return Metric.model_validate({"value": value, "unit": CATALOGUE[name].unit, **provenance})


def weakest(methods: Iterable[Method | None]) -> Method | None:
    """Return the method a sum may claim: its weakest part's; null where no part has one."""
    known = [method for method in methods if method is not None]
    return max(known, key=METHODS.index) if known else None
