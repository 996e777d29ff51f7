"""Baselines: results that are saved under a name to compare with, and are meant to be committed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pytest_llem.gates.baseline_folder import BaselineError, result_file
from pytest_llem.gates.eligibility import ineligible_reason
from pytest_llem.gates.matching import named
from pytest_llem.results.manifest import write_atomically
from pytest_llem.results.models import PointResult
from pytest_llem.results.study_result import StudyResult
from pytest_llem.results.testbeds import Testbed, result_testbed
from pytest_llem.study.identity import axes_key
from pytest_llem.times import now, seconds_between

#: Seconds of a day.
DAY = 86400

#: In a saved file, a value that fits in this number of columns is written on one line.
WIDTH = 110

#: Fields of a StudyResult that a baseline leaves out: they do not affect metrics, and differ between runs.
_LEFT_OUT = {"comparison", "excluded", "experiments", "result_files"}


def load(
    given: str,
    folder: Path,
    study: str | None = None,
    *,
    testbeds: Sequence[str] = (),
    only_fitting: bool = False,
    max_age: float | None = None,
) -> StudyResult:
    """Return a saved result.

    Args:
        given: Name or path, as in :func:`~pytest_llem.gates.baseline_folder.resolve`.
        folder: Folder of the baselines.
        study: Name of the study; None for any study, if only one is saved.
        testbeds: Keys of the testbeds that fit, the best first.
        only_fitting: Refuse a result of another testbed even if it is the only one.
        max_age: Time in s since the start of its run after which a result is refused; None for no limit.

    Raises:
        BaselineError: There is no result, or it is another study's, or it cannot be read, or is too old.
    """
    try:
        path = result_file(given, folder, study, testbeds, only_fitting=only_fitting)
        result = StudyResult.load(path)
    except BaselineError:
        raise
    except ValueError as error:
        raise BaselineError(str(error), renew=True) from error
    except OSError as error:  # for example a name that is too long, or a folder without permission
        raise BaselineError(f"{error.filename or given}: {error.strerror or error}") from error
    invalid = next((one.id for one in result.points if not (one.id.isascii() and one.id.isprintable())), None)
    if invalid is not None:  # it would become part of an item's id, and be printed
        raise BaselineError(f"{path}: invalid point id {invalid!a}: it must be printable ASCII")
    seen: dict[object, PointResult] = {}
    for point in result.points:
        first = seen.setdefault(axes_key(point.axes), point)
        if first is not point:  # for example after a git merge
            raise BaselineError(f"{path}: {first.id} and {point.id} have the same axes", renew=True)
    if study is not None and result.name != study:
        raise BaselineError(f"{path}: holds results of the study {result.name!r}, not of {study!r}")
    if max_age is not None and (problem := _too_old(result, max_age)) is not None:
        raise BaselineError(f"{path}: {problem}", renew=True)
    return result


def _too_old(result: StudyResult, max_age: float) -> str | None:
    limit = f"at most {max_age / DAY:.3g} days are allowed"
    try:
        age = seconds_between(result.started_at or "", now())
    except (TypeError, ValueError):  # of a version that did not record it
        return f"it is not known when it was measured, and {limit}"
    if result.started_at is None or age <= max_age:
        return None
    return f"measured on {result.started_at[:10]}, {age / DAY:.3g} days ago, and {limit}"


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
    """
    if not name or Path(name).name != name or name == ".." or not name.isprintable() or "\\" in name:
        raise BaselineError(f"the name of a baseline must be one without path separators (got {name!r})")
    if (missing := missing_results(result)) is not None and not partial:
        raise BaselineError(f"{missing}: a baseline needs the results of a whole run")
    if not force and (unsuitable := unsuitable_reason(result, name, folder)) is not None:
        raise BaselineError(unsuitable)
    measured = [point for point in result.points if point.cycles]
    if not measured:
        raise BaselineError("there is no result to save")
    testbed, without_testbed = result_testbed(result), folder / name / f"{result.name}.json"
    file = without_testbed if testbed is None else folder / name / testbed.key / without_testbed.name
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, "\n".join(_document(result, measured)) + "\n")
    if file != without_testbed and without_testbed.exists():
        _remove_if_of(testbed, without_testbed)
    return file


def _remove_if_of(testbed: Testbed | None, file: Path) -> None:
    """Remove a file that an earlier version saved without its testbed, if it is of this *testbed*."""
    with suppress(ValueError, OSError):  # it is kept if it cannot be read
        if result_testbed(StudyResult.load(file)) == testbed:
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
        protocol = result.measurement_protocol
        wanted = protocol["min_cycles"] if protocol.get("n_cycles") == "auto" else protocol.get("n_cycles", 1)
        if short := [point.id for point in result.points if len(point.cycles) < wanted]:
            return f"{short[0]} has fewer cycles than {wanted}"
    return None


def unsuitable_reason(result: StudyResult, name: str, folder: Path) -> str | None:
    """Return why a result should not become a reference although nothing is missing; None if it may.

    Reasons are that it is contended, replayed or invalid, that a metric of ``gates.metrics`` has no value, so that
    no run can be judged by it, or that it fails the comparison with the baseline *name* in *folder*, which it
    would replace: the next run would then no longer find the regression.
    """
    contended = [point for point in result.points if point.contention is not None and point.contention.contended]
    replayed = [entry for entry in result.experiments if entry.replayed_from is not None]
    invalid = {
        point.id: f"{name} of {point.id} is invalid: {reason}"
        for point in result.points
        for name, summary in point.metrics.items()
        if summary.mean is not None and (reason := ineligible_reason(point, name))
    }
    gated = (result.measurement_protocol.get("gates") or {}).get("metrics") or ()
    no_value = [
        f"{name} of {point.id}, which gates.metrics names, has no value: {summary.reason}"
        for point in result.points
        for name, summary in point.metrics.items()
        if point.cycles and name in gated and summary.mean is None
    ]
    found = []
    if contended and contended[0].contention is not None:
        found.append(f"contended: {named([one.id for one in contended])}: {contended[0].contention.reasons[0]}")
    if replayed:
        found.append(
            f"replayed from {replayed[0].replayed_from}: {named([one.experiment_id for one in replayed])}"
        )
    if invalid:
        found.append(next(iter(invalid.values())))
    found += no_value[:1]
    if failed := _failed_against(result, name, folder):
        found.append(f"the run fails the comparison with this baseline: {named(failed)}")
    return "; ".join(found) or None


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
