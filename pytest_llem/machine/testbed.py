"""The kinds of testbeds that this machine can be, before anything has run."""

from __future__ import annotations

from pytest_llem.hardware.gpus import visible_gpus
from pytest_llem.results.environment import processor
from pytest_llem.results.testbeds import Testbed


def local_testbeds() -> list[Testbed]:
    """Return the kinds of testbeds that a run on this machine may turn out to be, the likeliest first.

    Which devices an engine uses is known only once it runs: all GPUs, those of one model, or none.
    """
    found = processor()
    cpu, cpus = found["cpu_model"], found["cpus_allowed"]
    limits: dict[str, set[str]] = {}
    for gpu in visible_gpus().all:
        if gpu.name is not None:
            limits.setdefault(gpu.name, set()).update(
                [] if gpu.power_limit_w is None else [f"{gpu.power_limit_w:g} W"]
            )
    groups: list[tuple[str, ...]] = [(name,) for name in sorted(limits)]
    if len(limits) > 1:
        groups.insert(0, tuple(sorted(limits)))
    with_gpus = [
        Testbed(names, tuple(sorted(set().union(*(limits[name] for name in names)))), cpu, cpus)
        for names in groups
    ]
    return [*with_gpus, Testbed((), (), cpu, cpus)]
