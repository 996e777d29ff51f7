"""Define every metric once: its name, unit, better direction and meaning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Better = Literal["lower", "higher", None]

#: Percentiles of a window's latencies.
PERCENTILES = (50, 90, 95, 99)

#: Metrics of prefill and of decoding alone.
PREFILL_METRICS = (
    *("prefill_energy_j", "decode_energy_j", "energy_per_input_token_j"),
    *("prefill_seconds", "decode_seconds"),
)


@dataclass(frozen=True)
class Definition:
    """Definition of one metric.

    Attributes:
        unit: Unit of its values.
        better: Better direction, or None if neither direction is better.
        meaning: One-sentence description.
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


#: Metrics of an ExperimentResult by name. Totals are per pass, that is, over all ``n`` prompts once.
CATALOGUE: dict[str, Definition] = {
    "energy_j": Definition("J", "lower", "Energy of a pass over the named boundary"),
    "energy_per_output_token_j": Definition("J", "lower", "energy_j / output tokens, prefill included"),
    "energy_per_input_token_j": Definition("J", "lower", "prefill_energy_j / input tokens"),
    "energy_per_request_j": Definition("J", "lower", "energy_j / answered prompts"),
    "wh_per_1000_requests": Definition("Wh", "lower", "energy_per_request_j × 1000, in watt-hours"),
    "energy_per_total_token_j": Definition("J", "lower", "energy_j / input and output tokens"),
    "energy_per_good_token_j": Definition(
        "J", "lower", "energy_j / output tokens of requests within load.slo, of a server"
    ),
    "tokens_per_joule": Definition("1/J", "higher", "Output tokens / energy_j"),
    "edp_js": Definition("J·s", "lower", "Energy-delay product: energy_j · seconds"),
    "mean_power_w": Definition("W", None, "Mean power over the metered time"),
    "idle_power_w": Definition("W", None, "Power while the model is loaded and nothing runs"),
    "active_energy_j": Definition(
        "J", "lower", "energy_j minus idle_power_w over the metered time; negative if idle energy is larger"
    ),
    "gpu_energy_j": Definition("J", "lower", "Energy of a pass, GPUs"),
    "cpu_energy_j": Definition("J", "lower", "Energy of a pass, CPU packages"),
    "dram_energy_j": Definition("J", "lower", "Energy of a pass, memory"),
    "prefill_energy_j": Definition(
        "J", "lower", "Energy of a pass with one new token per prompt; null unless measurement.prefill_split"
    ),
    "decode_energy_j": Definition(
        "J", "lower", "energy_j minus prefill_energy_j; negative if the two windows differ by chance"
    ),
    "seconds": Definition("s", "lower", "Time of a pass, synchronised at both ends"),
    "prefill_seconds": Definition(
        "s", "lower", "Time of a pass with one new token per prompt; null unless measurement.prefill_split"
    ),
    "decode_seconds": Definition("s", "lower", "seconds minus prefill_seconds"),
    "output_tokens_per_second": Definition("1/s", "higher", "Output tokens / seconds"),
    "input_tokens": Definition("tokens", None, "Tokens of a pass's prompts, without padding"),
    "output_tokens": Definition("tokens", None, "Tokens of a pass's answers, up to and including each one's end"),
    "requests_per_second": Definition("1/s", "higher", "Answered prompts / seconds"),
    "goodput_rps": Definition("1/s", "higher", "Requests within load.slo / seconds, of a server"),
    "slo_attainment": Definition("ratio", "higher", "Share of requests within load.slo; failed ones are not"),
    "offered_rate": Definition("1/s", None, "Requests that are due per second, of a server"),
    "error_rate": Definition("ratio", "lower", "Share of failed requests, of a server"),
    "concurrency_mean": Definition("requests", None, "Mean number of requests in flight, of a server"),
    "batch_mean": Definition("requests", None, "Mean number of requests that a server runs at a time"),
    "queue_mean_ms": Definition(
        "ms", "lower", "Mean time in a server's queue, by its own counters over the window"
    ),
    "prefix_hit_rate": Definition("ratio", None, "Share of input tokens in a server's prefix cache"),
    "send_lag_p50_ms": Definition("ms", None, "Delay of the client in sending a request, percentile 50"),
    "send_lag_p99_ms": Definition("ms", None, "Delay of the client in sending a request, percentile 99"),
    "client_cpu_seconds": Definition("s", None, "CPU time of the client during the window"),
    **_latency("ttft:Time to first token, from a request's submission"),
    **_latency("itl:Inter-token latency"),
    **_latency("tpot:Mean time of a request's output tokens after the first"),
    **_latency("e2e:Time to a request's last token, from its submission"),
    **_latency("queue:Time from a request's submission until the engine begins to process it"),
    "model_memory_mb": Definition("MB", "lower", "Weights and buffers (10^6 bytes)"),
    "peak_memory_mb": Definition("MB", "lower", "Maximum memory in use during the window (10^6 bytes)"),
    "cache_memory_mb": Definition(
        "MB", None, "KV cache that the engine allocated in advance, part of peak_memory_mb (10^6 bytes)"
    ),
    "used_cache_memory_mb": Definition(
        "MB", "lower", "Largest part of cache_memory_mb in use during the window (10^6 bytes)"
    ),
    "peak_temperature_c": Definition("°C", None, "Highest temperature of any device in the window"),
    "throttled_seconds": Definition(
        "s", None, "Time in the window with throttled clocks: the maximum over reasons and devices"
    ),
    "flops": Definition(
        "FLOP", None, "Operations of a pass: 2 per weight and token, plus attention, without padding"
    ),
    "mfu": Definition("ratio", None, "Model FLOPs utilisation: flops / seconds / the device's dense peak"),
    "mbu": Definition(
        "ratio",
        None,
        "Model bandwidth utilisation: bytes of weights and context / seconds / bandwidth",
    ),
    "roofline_slowdown": Definition(
        "ratio", None, "seconds / roofline time, the minimum that the device's peaks allow; never below 1"
    ),
    "load_seconds": Definition("s", "lower", "Time to load the model"),
    "load_energy_j": Definition("J", "lower", "Energy of loading the model"),
    "gco2e_g": Definition("g", "lower", "energy_j · PUE · carbon intensity, both as given"),
}
