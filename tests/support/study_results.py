"""Make StudyResults from values by cycle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytest_llem import StudyResult
from pytest_llem.catalogue import CATALOGUE
from pytest_llem.results.points import PointResult
from pytest_llem.results.statistics import Summary, mean_interval
from pytest_llem.results.study_result import StudySummary

H100 = {
    "gpu": "NVIDIA H100 80GB HBM3",
    "power_limit": "700 W",
    "driver": "580.1",
    "gpu_uuids": "GPU-1",
    "energy_boundary": "gpu_board",
    "energy_method": "measured",
    "length_mode": "fixed",
    "dataset_hash": "d" * 64,
    "concurrent": False,
}


#: Folder of a baseline of :data:`H100` in that of its name.
H100_KEY = "nvidia-h100-80gb-hbm3_700-w_unknown-cpu"


def saved_file(root: Path, name: str, study: str) -> Path:
    """Return the only file of a study in the baseline *name* below *root*."""
    (file,) = (root / ".llem" / "baselines" / name).glob(f"*/{study}.json")
    return file


def summary(name: str, values: Sequence[float | None], **provenance: Any) -> Summary:
    """Return the statistics of a metric. By default, energies are measured, of the GPU's board."""
    known = [value for value in values if value is not None]
    unit = CATALOGUE[name].unit
    if not known:
        return Summary(mean=None, n=0, unit=unit, **provenance)
    if "energy" in name or name == "tokens_per_joule":
        provenance = {"method": "measured", "boundary": "gpu_board", "covers_engine": True, **provenance}
    mean, sd, ci95 = mean_interval(known)
    return Summary(mean=mean, sd=sd, ci95=ci95, n=len(known), unit=unit, values=list(values), **provenance)


def point(axes: Mapping[str, Any], /, **fields: Any) -> PointResult:
    """Return a point. *fields* are those of a PointResult, and metrics by name: values by cycle, or a Summary."""
    metrics = {
        name: given if isinstance(given := fields.pop(name), Summary) else summary(name, given)
        for name in [name for name in fields if name in CATALOGUE]
    }
    n_cycles = max((len(one.values) for one in metrics.values()), default=0)
    known = {
        "id": "-".join(f"{axis}={value}" for axis, value in axes.items()),
        "axes": dict(axes),
        "config": {"precision": "bf16", "energy": {"allow_estimated": False}},
        "config_hash": "0" * 16,
        "cycles": list(range(1, n_cycles + 1)),
        "metrics": metrics,
        "testbed": H100,
    }
    return PointResult.model_validate(known | fields)


def study_result(*points: PointResult, **fields: Any) -> StudyResult:
    """Return a study's result with these points. *fields* override those of a StudyResult."""
    known = {
        "pytest_llem_version": "0.1.0",
        "name": "made-up",
        "study_design_hash": "0" * 16,
        "status": "completed",
        "summary": StudySummary(total=0, completed=0, failed=0, wall_seconds=1.5),
        "points": list(points),
        "experiments": [],
        "measurement_protocol": {"n_cycles": max((len(one.cycles) for one in points), default=0)},
    }
    return StudyResult.model_validate(known | fields)
