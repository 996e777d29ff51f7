"""Whether the energy of an experiment is that of the devices its engine ran on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pytest_llem.results.experiment import EngineRecord
from pytest_llem.results.metrics import Metric

CPU = "cpu_package"

#: Boundaries that hold their own devices alone. What another meter's holds, such as a wall socket's, is not known.
_KNOWN = {CPU, "dram", "gpu_board", "module"}


def with_coverage(metrics: Mapping[str, Metric], engine: EngineRecord, gpus: Sequence[str]) -> dict[str, Metric]:
    """Return *metrics*, the energies among them with ``covers_engine``.

    A counter that was found invalid in the measured window is so for whatever else it has read: each energy of the
    experiment then bears the reason code of ``energy_j``.

    Args:
        metrics: By name; ``energy_j`` is among them.
        engine: What ran, and on which kind of device.
        gpus: UUIDs of the GPUs it may have run on.
    """
    window = metrics["energy_j"]
    return {
        name: one
        if one.method is None or one.value is None
        else one.model_copy(
            update={
                "covers_engine": _covers(one, engine, gpus),
                "invalid": one.invalid or (window.invalid if one.boundary == window.boundary else None),
            }
        )
        for name, one in metrics.items()
    }


def _covers(energy: Metric, engine: EngineRecord, gpus: Sequence[str]) -> bool | None:
    boundaries = {*(energy.boundary or "unknown").split("+")}
    if engine.device == "cpu":
        covered = CPU in boundaries
    elif gpus:
        covered = {*gpus} <= {*(energy.devices or ())}
    else:
        return None
    return True if covered else False if boundaries <= _KNOWN else None
