"""Save a result as a baseline, if it is complete and suitable as a reference."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from pytest_llem.gates.baselines import BaselineError, is_name
from pytest_llem.gates.eligibility import ineligible_reason
from pytest_llem.gates.matching import named
from pytest_llem.results.manifest import write_atomically
from pytest_llem.results.points import PointResult, Testbed, testbed_of
from pytest_llem.results.study_result import StudyResult

#: In a saved file, a value that fits in this number of columns is written on one line.
WIDTH = 110

#: Fields of a StudyResult that a baseline leaves out: they do not affect metrics, and differ between runs.
_LEFT_OUT = {"comparison", "excluded", "experiments", "result_files"}


def save(result: StudyResult, name: str, folder: Path, *, partial: bool = False, force: bool = False) -> Path:
    """Save *result* as the baseline *name* of its testbed, in place of an earlier one of the same study.

    The file is a StudyResult without its experiments. Each metric of a point is one line, so that versions can be
    compared line by line.

    Args:
        result: The result. Points without a result are left out.
        name: Name of the baseline.
        folder: Folder of the baselines.
        partial: Whether to save although results are missing.
        force: Whether to save although results are contended, replayed or invalid, have no value for a gate,
            or fail a comparison with the baseline that they replace.

    Returns:
        The saved file.

    Raises:
        BaselineError: *name* is not a valid name, or results are missing (:func:`missing_results`) or
            unsuitable (:func:`unsuitable_reason`).
        OSError: The file could not be written.

    Example:
        >>> save(StudyResult.load("results/quickstart_2026-01-31T12-00-00Z"), "main", Path(".llem/baselines"))
    """
    if not is_name(name) or not name.isprintable() or "\\" in name:
        raise BaselineError(f"the name of a baseline must be one without path separators (got {name!r})")
    if (missing := missing_results(result)) is not None and not partial:
        raise BaselineError(f"{missing}: a baseline needs the results of a whole run")
    if not force and (unsuitable := unsuitable_reason(result, name, folder)) is not None:
        raise BaselineError(unsuitable)
    measured = [point for point in result.points if point.cycles]
    if not measured:
        raise BaselineError("there is no result to save")
    testbed, without_testbed = testbed_of(result.points), folder / name / f"{result.name}.json"
    file = without_testbed if testbed is None else folder / name / testbed.key / without_testbed.name
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, "\n".join(_document(result, measured)) + "\n")
    if file != without_testbed and without_testbed.exists():
        _remove_if_of(testbed, without_testbed)
    return file


def _remove_if_of(testbed: Testbed | None, file: Path) -> None:
    """Remove a file that an earlier version saved without its testbed, if it is of this *testbed*."""
    with suppress(ValueError, OSError):  # it is kept if it cannot be read
        if testbed_of(StudyResult.load(file).points) == testbed:
            file.unlink()


def missing_results(result: StudyResult) -> str | None:
    """Return what is missing in a result compared with that of a whole run, as text; None if nothing is."""
    if result.status != "completed":
        return f"the run is {result.status}"
    count = {
        what: sum(entry.status in statuses for entry in result.experiments)
        for what, statuses in (("failed", ("failed",)), ("not run", ("pending", "running", "deselected")))
    }
    if any(count.values()):
        return "experiments " + " and ".join(f"{what}: {number}" for what, number in count.items() if number)
    if not result.experiments:  # a baseline has none
        wanted = result.min_cycles
        if short := [point.id for point in result.points if len(point.cycles) < wanted]:
            return f"{short[0]} has fewer cycles than {wanted}"
    return None


def unsuitable_reason(result: StudyResult, name: str, folder: Path) -> str | None:
    """Return why a result should not become a reference although nothing is missing; None if it may.

    Reasons are that it is contended, replayed or invalid, that a metric of ``gates.metrics`` has no value, so that
    no run can be judged by it, or that it fails the comparison with the baseline *name* in *folder*, which it
    would replace: the next run would then no longer find the regression.
    """
    reasons = []
    contended = {point.id: one.reasons for point in result.points if (one := point.contention) and one.contended}
    if contended:
        reasons.append(f"contended: {named([*contended])}: {next(iter(contended.values()))[0]}")
    if replayed := [entry for entry in result.experiments if entry.replayed_from is not None]:
        reasons.append(
            f"replayed from {replayed[0].replayed_from}: {named([one.experiment_id for one in replayed])}"
        )
    gated = (result.measurement_protocol.get("gates") or {}).get("metrics") or ()
    values = [(point, metric, summary) for point in result.points for metric, summary in point.metrics.items()]
    invalid = (
        f"{metric} of {point.id} is invalid: {reason}"
        for point, metric, summary in values
        if summary.mean is not None and (reason := ineligible_reason(point, metric))
    )
    no_value = (
        f"{metric} of {point.id}, which gates.metrics names, has no value: {summary.reason}"
        for point, metric, summary in values
        if point.cycles and metric in gated and summary.mean is None
    )
    reasons += [*islice(invalid, 1), *islice(no_value, 1)]
    if failed := _failed_against(result, name, folder):
        reasons.append(f"the run fails the comparison with this baseline: {named(failed)}")
    return "; ".join(reasons) or None


def _failed_against(result: StudyResult, name: str, folder: Path) -> list[str]:
    """Return the comparisons with the baseline *name* that a result fails, as text."""
    if result.comparison is None:
        return []
    given = result.comparison.reference
    path = Path(given).resolve()
    if given != name and (folder / name).resolve() not in (path, *path.parents):
        return []
    verdicts = (verdict for point in result.points for verdict in point.verdicts)
    failed = [one for one in verdicts if one.gate == "regression" and one.outcome == "failed"]
    missing = result.comparison.missing_points
    return [f"{one.verdict} {one.id}" for one in failed] + [f"missing {point}" for point in missing]


class _Table(dict[str, Any]):
    """A mapping whose entries are written on one line each, however short or long."""


def _document(result: StudyResult, points: list[PointResult]) -> Iterator[str]:
    data = result.model_dump(mode="json", exclude={*_LEFT_OUT, "points"})
    data["points"] = [_point(point) for point in points]
    return _lines(data)


def _point(point: PointResult) -> dict[str, Any]:
    data = point.model_dump(mode="json", exclude={"metrics", "verdicts"})
    data["metrics"] = _Table(
        (name, summary.model_dump(mode="json", exclude_none=True))
        for name, summary in point.metrics.items()
        if summary.mean is not None
    )
    return data


def _lines(value: Any, indent: str = "", key: str = "") -> Iterator[str]:
    """Yield the lines of *value* as JSON, the first beginning with *key*, without a comma after the last."""
    whole = f"{indent}{key}{_json(value)}"
    table = isinstance(value, _Table)
    if not isinstance(value, dict | list) or not value or (not table and len(whole) < WIDTH):
        yield whole
        return
    parts: list[tuple[str, Any]]
    if isinstance(value, dict):
        (first, last), parts = "{}", [(f"{_json(name)}: ", part) for name, part in value.items()]
    else:
        (first, last), parts = "[]", [("", part) for part in value]
    yield indent + key + first
    for number, (name, part) in enumerate(parts, start=1):
        *lines, end = [f"{indent} {name}{_json(part)}"] if table else _lines(part, f"{indent} ", name)
        yield from lines
        yield end + ("," if number < len(parts) else "")
    yield indent + last


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
