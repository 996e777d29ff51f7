"""Conversion of documents of schema 1.x to schema 2.0."""

from __future__ import annotations

from typing import Any

#: Names in 2.0 by names in 1.x, of fields and metrics at any depth.
_RENAMED = {
    "bench": "testbed",
    "subject": "sut",
    "compared_anyway": "compared_despite_mismatch",
    "idle_context_w": "idle_power_w",
    "times_floor": "roofline_slowdown",
    "idle_bare_w": "idle_power_no_context_w",
    "idle_bare_method": "no_context_method",
    "idle_bare_source": "no_context_source",
    "idle_bare_age_seconds": "no_context_age_seconds",
    "idle_bare_reason": "no_context_reason",
}

#: Fields whose keys users, engines and libraries choose: these are kept.
_VERBATIM = {"axes", "config", "effective_config", "environment", "excluded", "inputs", "settings", "versions"}


def upgrade(document: dict[str, Any]) -> dict[str, Any]:
    """Return a document of schema 1.x with the names of 2.0.

    Args:
        document: A manifest, a result of an experiment or of a study, or a baseline, as parsed from JSON.

    Example:
        >>> upgrade({"schema_version": "1.4", "baseline": {"idle_context_w": 61.5}})
        {'schema_version': '2.0', 'idle_power': {'idle_power_w': 61.5}}
    """
    upgraded: dict[str, Any] = _renamed(document) | {"schema_version": "2.0"}
    if "baseline" in upgraded:
        upgraded["idle_power"] = upgraded.pop("baseline")
    if isinstance(warnings := upgraded.get("warnings"), list):
        upgraded["warnings"] = [_coded(warning) for warning in warnings]
    for point in upgraded.get("points") or ():
        _add_coverage(point)
    return upgraded


def _renamed(value: Any) -> Any:
    if isinstance(value, list):
        return [_renamed(item) for item in value]
    if not isinstance(value, dict):
        return value
    found = {_RENAMED.get(key, key): item if key in _VERBATIM else _renamed(item) for key, item in value.items()}
    if found.get("metric") in _RENAMED:  # of a verdict
        found["metric"] = _RENAMED[found["metric"]]
    return found


def _coded(warning: Any) -> Any:
    """Return a warning with a code; before 1.4 a warning was only a text."""
    if not isinstance(warning, str):
        return warning
    return {"code": "unclassified", "severity": "warning", "text": warning}


def _add_coverage(point: dict[str, Any]) -> None:
    """Set ``covers_engine`` of a point's energies, which in 1.3 and older follows from the point's facts."""
    testbed = point.get("testbed")
    if not testbed:
        return
    covered = "cpu_package" if {"cpu", "cpus"} & testbed.keys() else "gpu_board"
    for summary in point.get("metrics", {}).values():
        if summary.get("boundary") is not None and summary.get("covers_engine") is None:
            summary["covers_engine"] = covered in summary["boundary"].split("+")
