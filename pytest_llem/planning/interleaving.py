"""Decide whether the two sides of a comparison can be measured alternately, both loaded at the same time."""

from __future__ import annotations

from pytest_llem.planning.preflight import Preflight, gib
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.engines import COMMAND

#: The option of an engine or a server that sets its share of a GPU's memory.
_SHARES = {
    "vllm": "vllm.engine.gpu_memory_utilization",
    "sglang": "server.args.mem_fraction_static",
}


def cycles_reason(config: ExperimentConfig, candidate: Preflight, reference: Preflight) -> str | None:
    """Return why whole cycles have to alternate, in one line; None if passes can.

    Args:
        config: The experiment, the same on both sides.
        candidate: Preflight of the candidate.
        reference: Preflight of the reference.
    """
    if config.backend == COMMAND:
        return "a command runs as a whole"
    sides, host = (candidate, reference), candidate.host_of(config)
    requests = [side.request(config) for side in sides]
    if requests[0].count != requests[1].count or set(requests[0].pool) != set(requests[1].pool):
        return "the two sides need different devices"
    shares = [share for side in sides if (share := side.needs(config).memory_share) is not None]
    if host.gpus and sum(shares) > 1:
        preset = config.server.preset if config.server is not None else config.backend
        advice = _SHARES.get(str(preset), "its share")
        advice = advice if config.server is None else advice.replace("vllm.engine", "server.args")
        return (
            f"each side reserves {max(shares):.0%} of the GPU's memory, so that two do not fit: "
            f"set {advice} to at most {1 / len(sides) - 0.05:.2f}"
        )
    sizes = [side.memory_bytes(config) for side in sides]
    memory = host.device_memory_bytes(candidate.needs(config).gpus or 1)
    needed = sum(size for size in sizes if size is not None)
    if needed > memory:
        return f"two of them need about {gib(needed)}, and there are {gib(memory)}"
    return None
