"""Whether the energy of an experiment is that of the devices its engine ran on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pytest_llem.results.experiment import EngineRecord
from pytest_llem.results.metrics import Metric

CPU = "cpu_package"


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
    if engine.device == "cpu":
        return CPU in (energy.boundary or "").split("+")
    return {*gpus} <= {*(energy.devices or ())} if gpus else None
