"""Determine whether an experiment's energy covers the devices that its engine ran on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pytest_llem.results.experiment import EngineRecord
from pytest_llem.results.metrics import Metric

CPU = "cpu_package"

#: Boundaries that cover exactly known devices. The coverage of others, such as a wall socket's, is not known.
_KNOWN = {CPU, "dram", "gpu_board", "module"}


def with_coverage(metrics: Mapping[str, Metric], engine: EngineRecord, gpus: Sequence[str]) -> dict[str, Metric]:
    """Return *metrics* with ``covers_engine`` set on every energy metric.

    A counter that is invalid in the measured window is invalid for its other readings too: each energy over the
    same boundary gets the ``invalid`` code of ``energy_j``.

    Args:
        metrics: Metrics by name; ``energy_j`` is among them.
        engine: The engine's record, with the kind of its device.
        gpus: UUIDs of the GPUs that the engine may have run on.
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
