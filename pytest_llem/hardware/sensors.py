"""Read a GPU's power, temperature, clocks and throttled time, and the state of all GPUs, through NVML.

Values that NVML does not report are None, as are impossible powers and temperatures.
"""

from __future__ import annotations

import re
from statistics import fmean
from typing import Any, Literal, get_args

from pytest_llem.hardware.nvml import Nvml

#: Sources of a GPU's power, the best first.
PowerSource = Literal["nvml_power_instant", "nvml_power_average", "nvml_power_usage"]

#: Field ids, ``NVML_FI_DEV_POWER_…``, of values in mW.
_POWER_FIELDS: dict[PowerSource, int] = {"nvml_power_instant": 186, "nvml_power_average": 185}

#: CUDA compute capability of GA100. On later GPUs ``nvmlDeviceGetPowerUsage`` is documented to be an average.
_GA100 = (8, 0)

#: ``NVML_POWER_SCOPE_…``: the GPU with its board, or the module, which also contains a CPU and its memory.
GPU_SCOPE, MODULE_SCOPE = 0, 1

#: Names of GPUs that share a module with a CPU: Grace-Hopper, Grace-Blackwell.
_MODULES = re.compile(r"\bG[HB]\d+\b")

#: Field ids by reason, ``NVML_FI_DEV_PERF_POLICY_…`` and ``NVML_FI_DEV_CLOCKS_EVENT_REASON_…``, of cumulative
#: counters in ns (on an H100 at its power limit "power" rose by 8.00e9 in 8.0 s). Low utilisation, 78, is not
#: throttling.
_THROTTLE_FIELDS = {
    "power": 74,
    "thermal": 75,
    "sync_boost": 76,
    "board_limit": 77,
    "reliability": 79,
    "sw_thermal": 269,
    "hw_thermal": 270,
    "hw_power_brake": 271,
}

#: The same reasons by ``nvmlPerfPolicyType_t``, for drivers without those field ids.
_VIOLATIONS = {"power": 0, "thermal": 1, "sync_boost": 2, "board_limit": 3, "reliability": 5}

#: Reasons for the current clocks that are not throttling.
IDLE, SETTING = "idle", "setting"

#: Bits of ``nvmlClocksEventReason…`` by reason for the current clocks.
_REASONS = {
    IDLE: 0x1,
    SETTING: 0x2,  # application clocks or locked clocks
    "power": 0x4,
    "hw_slowdown": 0x8,
    "sync_boost": 0x10,
    "sw_thermal": 0x20,
    "hw_thermal": 0x40,
    "hw_power_brake": 0x80,
    "display": 0x100,
    "board_limit": 0x200,
    "reliability": 0x400,
}

#: Plausible values in °C and in W: others are ignored. A GPU that is on never draws 0 W.
_TEMPERATURES_C = (-40.0, 150.0)
_POWERS_W = (0.001, 10_000.0)


def power_source(nvml: Nvml, handle: Any) -> PowerSource | None:
    """Return the best source of a GPU's power; None if there is none."""
    return next(iter(power_sources(nvml, handle)), None)


def power_sources(nvml: Nvml, handle: Any) -> list[PowerSource]:
    """Return all sources of a GPU's power, the best first."""
    sources: tuple[PowerSource, ...] = get_args(PowerSource)
    return [source for source in sources if power_w(nvml, handle, source) is not None]


def averages_power(nvml: Nvml, handle: Any, source: PowerSource | None) -> bool:
    """Return whether *source* is the mean power of the last second, not the current power."""
    if source != "nvml_power_usage":
        return source == "nvml_power_average"
    capability = nvml.ask("nvmlDeviceGetCudaComputeCapability", handle)
    return capability is not None and tuple(capability) > _GA100


def reads_module_power(nvml: Nvml, handle: Any, source: PowerSource | None) -> bool:
    """Return whether *source* also reports the power of the module that a GPU is on."""
    return source in _POWER_FIELDS and power_w(nvml, handle, source, MODULE_SCOPE) is not None


def is_module(name: str | None) -> bool:
    """Return whether a GPU with that *name* shares a module with a CPU."""
    return _MODULES.search(name or "") is not None


def power_w(nvml: Nvml, handle: Any, source: PowerSource, scope: int = GPU_SCOPE) -> float | None:
    """Return the power of a GPU, in W.

    Args:
        nvml: An open NVML.
        handle: NVML's handle of the GPU.
        source: The current power, the average over a second, or ``nvmlDeviceGetPowerUsage``, which is the former
            up to GA100 and the latter on later GPUs.
        scope: ``GPU_SCOPE`` or ``MODULE_SCOPE``; ignored by ``nvmlDeviceGetPowerUsage``.
    """
    field = _POWER_FIELDS.get(source)
    if field is None:
        milliwatts = nvml.ask("nvmlDeviceGetPowerUsage", handle)
    else:
        milliwatts = nvml.fields(handle, (field, scope)).get(field)
    return _plausible(milliwatts / 1000, *_POWERS_W) if milliwatts is not None else None


def temperature_c(nvml: Nvml, handle: Any) -> float | None:
    """Return the temperature of a GPU, in °C."""
    sensor = nvml.constant("NVML_TEMPERATURE_GPU")
    for name in ("nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature"):  # old drivers have only the latter
        temperature = nvml.ask(name, handle, sensor)
        if temperature is not None:
            return _plausible(temperature, *_TEMPERATURES_C)
    return None


def clocks_mhz(nvml: Nvml, handle: Any) -> tuple[float | None, float | None]:
    """Return the clocks of a GPU's processors and of its memory, in MHz."""
    kinds = ("NVML_CLOCK_SM", "NVML_CLOCK_MEM")
    processors, memory = (nvml.ask("nvmlDeviceGetClockInfo", handle, nvml.constant(kind)) for kind in kinds)
    return processors, memory


def clock_reasons(nvml: Nvml, handle: Any) -> list[str] | None:
    """Return the reasons for a GPU's current clocks; None if unknown."""
    for name in ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"):
        bits = nvml.ask(name, handle)  # old drivers have only the latter
        if bits is not None:
            return [reason for reason, bit in _REASONS.items() if bits & bit]
    return None


def busy_share(nvml: Nvml, handle: Any, since: float, until: float) -> float | None:
    """Return the mean share of a time span in which kernels of any process ran on a GPU; None if unknown.

    Args:
        nvml: An open NVML.
        handle: NVML's handle of the GPU.
        since: Start on the system's clock, in s since 1970. The driver keeps about the last 14 s.
        until: End, likewise.
    """
    kind = nvml.constant("NVML_GPU_UTILIZATION_SAMPLES")
    found = nvml.ask("nvmlDeviceGetSamples", handle, kind, int(since * 1e6)) if kind is not None else None
    shares = [one.sampleValue.uiVal / 100 for one in found[1] if one.timeStamp <= until * 1e6] if found else []
    return fmean(shares) if shares else None


def sustained_clock_mhz(nvml: Nvml, handle: Any) -> int | None:
    """Return a clock that a GPU's processors can sustain under load, in MHz; None if unknown.

    This is the vendor's default application clock if that is below the maximum clock. Otherwise it is the highest
    supported clock of at most three quarters of the maximum: the power limit often prevents more.
    """
    sm = nvml.constant("NVML_CLOCK_SM")
    maximum = nvml.ask("nvmlDeviceGetMaxClockInfo", handle, sm)
    default = nvml.ask("nvmlDeviceGetDefaultApplicationsClock", handle, sm)
    if default and maximum and default < maximum:
        return int(default)
    memory_clocks = nvml.ask("nvmlDeviceGetSupportedMemoryClocks", handle)
    if not memory_clocks:
        return None
    clocks = nvml.ask("nvmlDeviceGetSupportedGraphicsClocks", handle, max(memory_clocks))
    if not clocks:
        return None
    return max((int(one) for one in clocks if one <= 0.75 * max(clocks)), default=int(min(clocks)))


def throttled_ns(nvml: Nvml, handle: Any) -> dict[str, int]:
    """Return the cumulative throttled time of a GPU in ns, by reason. Reasons without a counter are left out."""
    # Early drivers 575 and 580 have 32-bit settings under the last three ids, which are not counters.
    values = nvml.fields(handle, *_THROTTLE_FIELDS.values(), member="ullVal")
    counted = {reason: values[field] for reason, field in _THROTTLE_FIELDS.items() if field in values}
    if not counted:
        for reason, policy in _VIOLATIONS.items():
            violation = nvml.ask("nvmlDeviceGetViolationStatus", handle, policy)
            if violation is not None:
                counted[reason] = violation.violationTime
    return {reason: int(value) for reason, value in counted.items()}


def _plausible(value: float, minimum: float, maximum: float) -> float | None:
    return float(value) if minimum <= value <= maximum else None
