"""Facts of the testbed, which must match in a comparison, and of the system under test, which may differ."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pytest_llem.results.carbon import emission_factors
from pytest_llem.results.experiment import ExperimentResult

#: No gate judges the energy of a window with fewer ticks of the counter, or samples of power.
MIN_TICKS = 20

#: Keys of the number of ticks, or samples of power, in the shortest window: of whole passes, and of prefill alone.
TICKS, PREFILL_TICKS = "energy_ticks", "prefill_ticks"

#: Key of whether another experiment ran at the same time.
CONCURRENT = "concurrent"

#: Key of the digest of all imported code, which depends on the start method too.
CODE = "code"

Concerns = Literal["every metric", "energy", "peak_memory_mb", "gco2e_g", "nothing"]


@dataclass(frozen=True)
class TestbedFact:
    """A fact that must match between two compared results.

    Attributes:
        name: Name in messages.
        concerns: Metrics that cannot be compared if the fact differs: a group, or one metric's name. ``nothing``:
            a difference only causes a warning.
        optional: Whether some devices do not report it: if only one side has it, that is not a difference.
        note: Text that is added to a difference.
        binding: Whether a difference stops the comparison even with ``--llem-compare-mismatch``.
    """

    name: str
    concerns: Concerns = "every metric"
    optional: bool = False
    note: str = ""
    binding: bool = False


#: Testbed facts by their keys in :attr:`pytest_llem.results.points.PointResult.testbed`.
TESTBED: dict[str, TestbedFact] = {
    "gpu": TestbedFact("GPU model"),
    "cpu": TestbedFact("CPU model"),
    "cpus": TestbedFact("CPUs that it may use", optional=True),
    "cpu_layout": TestbedFact("cores of these CPUs", optional=True),
    "cpu_limit": TestbedFact("CPU time limit", optional=True),
    "priority": TestbedFact("scheduling priority", optional=True),
    "memory_limit": TestbedFact("memory limit", optional=True),
    "power_limit": TestbedFact("power limit", optional=True),
    "application_clocks": TestbedFact("application clocks", optional=True),
    "ecc": TestbedFact("ECC", optional=True),
    "mig": TestbedFact("MIG"),
    "energy_boundary": TestbedFact("energy boundary", "energy", binding=True),
    "energy_method": TestbedFact("energy method", "energy"),
    "energy_source": TestbedFact("energy source", "energy", optional=True),
    "length_mode": TestbedFact("length mode"),
    # On a CPU, peak memory includes the imported code, except what the process shares with the fork server.
    "start_method": TestbedFact("start method", "peak_memory_mb", optional=True),
    "emission_factors": TestbedFact("carbon intensity and PUE", "gco2e_g", optional=True),
    "dataset_hash": TestbedFact("dataset hash", optional=True),
    CONCURRENT: TestbedFact("other experiments at the same time"),
    "load_generator": TestbedFact("load generator"),
    "load_generator_version": TestbedFact("version of the load generator", "nothing"),
    "driver": TestbedFact("GPU driver", "nothing"),
    "gpu_uuids": TestbedFact("GPU", "nothing", note="boards of one model differ by about 8 %"),
    "host_cpu": TestbedFact("the GPU's host", "nothing"),
    "cpu_governor": TestbedFact("CPU governor", "nothing"),
}


#: Keys of a GPU's application clocks in the environment.
_CLOCKS = ("application_sm_clock_mhz", "application_memory_clock_mhz")


def testbed_facts(cycles: Sequence[ExperimentResult]) -> dict[str, Any]:
    """Return the testbed facts of a point's *cycles*, without :data:`CONCURRENT`.

    Unknown facts are left out; if cycles disagree, the value is the list of their values. If the meter has
    ticks or samples, :data:`TICKS` and :data:`PREFILL_TICKS` are added to the facts of :data:`TESTBED`.
    """
    facts = _merged([_testbed(result) for result in cycles])
    for key, windows in (
        (TICKS, [result.window for result in cycles]),
        (PREFILL_TICKS, [result.prefill_window for result in cycles]),
    ):
        errors = [window.quantisation_error for window in windows if window and window.quantisation_error]
        if errors:
            facts[key] = math.floor(10 / max(errors)) / 10  # rounded up, 19.96 would be enough for a gate
    return facts


def sut_facts(cycles: Sequence[ExperimentResult]) -> dict[str, Any]:
    """Return the system-under-test facts of a point's *cycles*.

    They are versions by package, precision, weights, commit and code, and, with dotted keys, the engine's
    effective settings and the environment variables that were set. Unknown facts are left out; if cycles disagree,
    the value is the list of their values.
    """
    return _merged([_sut(result) for result in cycles])


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a nested mapping by dotted key, without nulls and empty mappings."""
    if isinstance(value, Mapping):
        parts = (flat(part, f"{prefix}.{key}" if prefix else str(key)) for key, part in value.items())
        return {key: leaf for part in parts for key, leaf in part.items()}
    return {} if value is None else {prefix: value}


def overlapping(spans: Sequence[tuple[str, str]]) -> list[bool]:
    """Return for each span of time whether another one overlaps it, in O(n log n).

    Args:
        spans: Start and end of each span in UTC, as ISO 8601 in one format, so that they sort as text.
    """
    found = [False] * len(spans)
    longest: int | None = None  # index of the span that ends last among those that have begun
    for index in sorted(range(len(spans)), key=lambda one: spans[one]):
        if longest is not None and spans[index][0] < spans[longest][1]:
            found[index] = found[longest] = True
        if longest is None or spans[index][1] >= spans[longest][1]:
            longest = index
    return found


def _testbed(result: ExperimentResult) -> dict[str, Any]:
    environment, energy, imported = result.environment, result.metrics["energy_j"], result.imported
    known = energy.value is not None
    return {
        **(_cpu(result) if result.engine.device == "cpu" else _gpu(result)),
        **_limits(environment),
        "energy_boundary": energy.boundary if known else None,
        "energy_method": energy.method if known else None,
        "energy_source": energy.source if known else None,
        "emission_factors": emission_factors(result.metrics.get("gco2e_g")),
        "length_mode": result.effective_config.get("measurement", {}).get("length_mode"),
        "dataset_hash": result.tokens.dataset_hash,
        "cpu_governor": environment.get("cpu_governor"),
        "load_generator": None if imported is None else f"{imported.tool}, rates over the {imported.rates}",
        "load_generator_version": None if imported is None else imported.version,
    }


def _cpu(result: ExperimentResult) -> dict[str, Any]:
    environment = result.environment
    return {
        "cpu": environment.get("cpu_model"),
        "cpus": environment.get("cpus_allowed"),
        "cpu_layout": environment.get("cpu_layout"),
        "start_method": result.start.method if result.start else None,
    }


def _limits(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Return the limits of the experiment's process; empty if they were not recorded."""
    if "nice" not in environment:
        return {}
    cpus, memory_mb = environment["cpu_limit"], environment["memory_limit_mb"]
    policy = environment["scheduling_policy"]
    return {
        "cpu_limit": "none" if cpus is None else f"{cpus:g} CPUs",
        "priority": f"nice {environment['nice']}" + (f", {policy}" if policy not in (None, "other") else ""),
        "memory_limit": "none" if memory_mb is None else f"{memory_mb:,} MB",
    }


def _gpu(result: ExperimentResult) -> dict[str, Any]:
    gpus: Sequence[Mapping[str, Any]] = result.environment.get("gpus") or []
    limits = sorted({gpu["power_limit_w"] for gpu in gpus if gpu.get("power_limit_w") is not None})
    clocks = sorted({pair for gpu in gpus if None not in (pair := tuple(gpu.get(key) for key in _CLOCKS))})
    ecc = {mode for gpu in gpus if (mode := gpu.get("ecc_mode")) is not None}
    return {
        # The driver's names if known, else the engine's.
        "gpu": _counted(gpu.get("name") for gpu in gpus) or _counted(result.engine.device_names),
        "power_limit": ", ".join(f"{limit:g} W" for limit in limits) or None,
        "application_clocks": ", ".join(f"{sm} and {memory} MHz" for sm, memory in clocks) or None,
        "ecc": ", ".join("on" if mode else "off" for mode in sorted(ecc)) or None,
        "mig": "on" if any(gpu.get("mig_mode") for gpu in gpus) else None,
        "driver": _counted({gpu.get("driver") for gpu in gpus}),
        "gpu_uuids": ", ".join(sorted(gpu["uuid"] for gpu in gpus)) or None,
        "host_cpu": result.environment.get("cpu_model"),
    }


def _counted(names: Iterable[str | None]) -> str | None:
    count = Counter(name for name in names if name)
    return ", ".join(f"{n} × {name}" if n > 1 else name for name, n in sorted(count.items())) or None


def _sut(result: ExperimentResult) -> dict[str, Any]:
    environment, engine = result.environment, result.engine
    packages = {**environment.get("packages", {}), **engine.versions}
    git = environment.get("git") or {}
    return {
        "engine": engine.name,
        "python": environment.get("python"),
        **dict(sorted(packages.items())),
        "precision": result.effective_config.get("precision"),
        "model_revision": engine.model_revision,
        "model_fingerprint": engine.model_fingerprint,
        "random_weights": engine.random_weights or None,
        "commit": git.get("commit"),
        "uncommitted_changes": git.get("dirty") or None,
        CODE: _code(result),
        **flat({"settings": engine.settings, "variables": environment.get("variables")}),
    }


def _code(result: ExperimentResult) -> str | None:
    """Return a digest of all code that an experiment's process imported; None if a part of it is unknown."""
    if result.inputs is None or None in result.inputs.modules.values():
        return None
    found = (result.inputs.modules, result.inputs.distributions)
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def _merged(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    values: dict[str, list[Any]] = {}
    for one in facts:
        for key, value in one.items():
            known = values.setdefault(key, [])
            if value is not None and value not in known:
                known.append(value)
    return {key: known[0] if len(known) == 1 else known for key, known in values.items() if known}
