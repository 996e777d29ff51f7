"""Baselines: results that are saved under a name to compare with, and are meant to be committed.

They are in ``FOLDER/NAME/TESTBED/STUDY.json``. Earlier versions wrote ``FOLDER/NAME/STUDY.json``, which is read if
no testbed has its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pytest_llem.gates.eligibility import ineligible_reason
from pytest_llem.gates.matching import named
from pytest_llem.results.manifest import MANIFEST, write_atomically
from pytest_llem.results.models import PointResult
from pytest_llem.results.study_result import StudyResult, is_result
from pytest_llem.results.testbeds import Testbed, testbed_of
from pytest_llem.study.identity import axes_key
from pytest_llem.study.problems import did_you_mean
from pytest_llem.times import now, seconds_between

#: Units of a baseline's age, in s, with their names.
_UNITS = ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))

#: In a saved file, a value that fits in this number of columns is written on one line.
WIDTH = 110

#: Fields of a StudyResult that a baseline leaves out: they do not affect metrics, and differ between runs.
_LEFT_OUT = {"comparison", "excluded", "experiments", "result_files"}


class BaselineError(ValueError):
    """A baseline cannot be read or saved; the message is one line.

    Attributes:
        renew: Whether saving the baseline again would help.
    """

    def __init__(self, message: str, *, renew: bool = False) -> None:
        super().__init__(message)
        self.renew = renew


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
        given: Name or path, as in :func:`resolve`.
        folder: Folder of the baselines.
        study: Name of the study; None for any study, if only one is saved.
        testbeds: Keys of the testbeds that fit, the best first.
        only_fitting: Refuse a result of another testbed even if it is the only one.
        max_age: Time in s since the start of its run after which a result is refused; None for no limit.

    Raises:
        BaselineError: There is no result, or it is another study's, or it cannot be read, or is too old.
    """
    try:
        path = _result_file(given, folder, study, testbeds, only_fitting=only_fitting)
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


def resolve(given: str, folder: Path) -> Path:
    """Return the file or folder that *given* names.

    Args:
        given: Name of a baseline, or path of a saved file, a study_result.json, a results directory or a folder of
            saved files. A baseline takes precedence over a path.
        folder: Folder of the baselines.

    Raises:
        BaselineError: The baseline or path does not exist.
    """
    path = Path(given)
    is_name = bool(given) and path.name == given and given != ".."
    if is_name and (folder / given).is_dir():
        return folder / given
    if path.exists() and given:
        return path
    if not is_name or path.suffix == ".json":
        raise BaselineError(f"{given or repr(given)}: no such file or folder")
    names = sorted(one.name for one in folder.glob("*") if one.is_dir())
    known = f"baselines: {', '.join(names)}" if names else f"there are no baselines in {_shown(folder)}"
    raise BaselineError(
        f"{given}: no such baseline, file or folder{did_you_mean(given, tuple(names))}; {known}", renew=not names
    )


def _result_file(
    given: str, folder: Path, study: str | None, testbeds: Sequence[str], *, only_fitting: bool
) -> Path:
    """Return the file or results directory that the arguments of :func:`load` select.

    Raises:
        BaselineError: The result does not exist, or none is of a testbed that fits.
    """
    path = resolve(given, folder)
    if is_result(path):
        return path
    if any(path.glob(f"*/{MANIFEST}")):
        raise BaselineError(f"{path}: holds results directories: give one of them")
    files = sorted([*path.glob("*.json"), *path.glob("*/*.json")])
    names = sorted({file.stem for file in files})
    if not files:
        raise BaselineError(f"{path}: holds no results", renew=True)
    if study is None and len(names) == 1:
        study = names[0]
    if study is None:
        raise BaselineError(f"{path}: holds several results: give one of them: {', '.join(names)}")
    if study not in names:
        raise BaselineError(
            f"{path}: holds no results of the study {study!r}{did_you_mean(study, tuple(names))}; "
            f"there are: {', '.join(names)}",
            renew=True,
        )
    by_testbed = {("" if file.parent == path else file.parent.name): file for file in files if file.stem == study}
    fitting = [by_testbed[key] for key in [*testbeds, ""] if key in by_testbed]
    if fitting:
        return fitting[0]
    if not only_fitting and len(by_testbed) == 1:
        return by_testbed.popitem()[1]
    if not only_fitting:
        raise BaselineError(
            f"{path}: holds results of {study!r} on several testbeds: give one of them: "
            f"{', '.join(str(file) for file in by_testbed.values())}"
        )
    raise BaselineError(
        f"{given}: no baseline of {study!r} fits this testbed ({testbeds[0]}); there are: {', '.join(by_testbed)}",
        renew=True,
    )


def _shown(folder: Path) -> str:
    """Return a folder relative to the current one if it is inside it."""
    shown = os.path.relpath(folder)
    return str(folder) if shown.startswith("..") else shown


def _too_old(result: StudyResult, max_age: float) -> str | None:
    unit, units = next(((unit, units) for unit, units in _UNITS if max_age >= unit), _UNITS[-1])
    limit = f"at most {max_age / unit:.3g} {units} are allowed"
    try:
        age = seconds_between(result.started_at or "", now())
    except (TypeError, ValueError):  # of a version that did not record it
        return f"it is not known when it was measured, and {limit}"
    if result.started_at is None or age <= max_age:
        return None
    return f"measured on {result.started_at[:10]}, {age / unit:.3g} {units} ago, and {limit}"


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
