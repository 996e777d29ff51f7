"""Baselines: results that are kept under a name, to compare with. They are meant to be committed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pytest_llem.gates.eligibility import ineligible_reason, names_boundary
from pytest_llem.gates.matching import named
from pytest_llem.results.manifest import MANIFEST, write_atomically
from pytest_llem.results.models import PointResult, StudyResult
from pytest_llem.study.identity import axes_key
from pytest_llem.study.problems import did_you_mean

#: Where they are, below the root of the run.
BASELINES = Path(".llem", "baselines")

#: In a saved file, what fits in so many columns is one line.
WIDTH = 110

#: Of a StudyResult, what a baseline leaves out: it says nothing of the figures, and differs from run to run.
_LEFT_OUT = {"comparison", "excluded", "experiments", "result_files"}


class BaselineError(ValueError):
    """A baseline cannot be read or saved; the message, a line, says why."""


def resolve(given: str, root: Path) -> Path:
    """Return the file or folder that *given* means.

    Args:
        given: Name of a baseline, or path of a saved file, a study_result.json, a results directory or a folder of
            saved files. Where there is a baseline of that name, it is meant.
        root: The folder that baselines are below.

    Raises:
        BaselineError: There is no such thing.
    """
    baselines, path = root / BASELINES, Path(given)
    is_name = bool(given) and path.name == given and given != ".."
    if is_name and (baselines / given).is_dir():
        return baselines / given
    if path.exists() and given:
        return path
    if not is_name or path.suffix == ".json":
        raise BaselineError(f"{given or repr(given)}: no such file or folder")
    there = sorted(one.name for one in baselines.glob("*") if one.is_dir())
    known = f"there are: {', '.join(there)}" if there else f"there are none in {BASELINES}"
    raise BaselineError(f"no baseline {given!r}{did_you_mean(given, tuple(there))}; {known}")


def load(given: str, root: Path, study: str | None = None) -> StudyResult:
    """Return a saved result.

    Args:
        given: As in :func:`resolve`.
        root: Likewise.
        study: Name of the study whose result is wanted; None for whichever it is, where there is one.

    Raises:
        BaselineError: There is none, or it is another study's, or cannot be read.
    """
    try:
        path = resolve(given, root)
        if path.is_dir() and not any((path / name).exists() for name in (MANIFEST, "study_result.json")):
            path = _of_study(path, study)
        result = StudyResult.load(path)
    except ValueError as error:
        raise BaselineError(str(error)) from error
    except OSError as error:  # a name may be too long, and a folder closed to us
        raise BaselineError(f"{error.filename or given}: {error.strerror or error}") from error
    odd = next((point.id for point in result.points if not (point.id.isascii() and point.id.isprintable())), None)
    if odd is not None:  # it becomes an item's, and is printed
        raise BaselineError(f"{path}: no point has an id like {odd!a}")
    seen: dict[object, PointResult] = {}
    for point in result.points:
        if (twin := seen.setdefault(axes_key(point.axes), point)) is not point:  # a merge of two, say
            raise BaselineError(f"{path}: {twin.id} and {point.id} have the same axes")
    if study is not None and result.name != study:
        raise BaselineError(f"{path}: is of the study {result.name!r}, not of {study!r}")
    return result


def _of_study(folder: Path, study: str | None) -> Path:
    files = sorted(folder.glob("*.json"))
    names = [file.stem for file in files]
    if not files:
        raise BaselineError(f"{folder}: holds no results")
    if study is None:
        if len(files) > 1:
            raise BaselineError(f"{folder}: holds several results, name one of them: {', '.join(names)}")
        return files[0]
    if study not in names:
        raise BaselineError(
            f"{folder}: holds none of the study {study!r}{did_you_mean(study, tuple(names))}; "
            f"there are: {', '.join(names)}"
        )
    return files[names.index(study)]


def save(result: StudyResult, name: str, root: Path, *, partial: bool = False, anyway: bool = False) -> Path:
    """Keep *result* as the baseline *name*, in place of what that was for its study.

    The file is a StudyResult without its experiments, laid out for comparing versions line by line: one metric of
    one point a line.

    Args:
        result: What to keep. Points without a result are left out.
        name: Of the baseline.
        root: The folder that baselines are below.
        partial: Also where results are lacking.
        anyway: Also where results are contended, replayed or invalid, or fail a comparison with the baseline that
            they replace.

    Returns:
        The file.

    Raises:
        BaselineError: *name* is none, or results are lacking or unfit: :func:`what_lacks`, :func:`what_is_unfit`.
        OSError: It could not be written.
    """
    if not name or Path(name).name != name or name == ".." or not name.isprintable() or "\\" in name:
        raise BaselineError(f"the name of a baseline must be one without path separators (got {name!r})")
    if (lacking := missing_results(result)) is not None and not partial:
        raise BaselineError(f"{lacking}, and a baseline is saved of a whole run only")
    if not anyway and (unfit := unfit_results(result, name, root)) is not None:
        raise BaselineError(unfit)
    measured = [point for point in result.points if point.cycles]
    if not measured:
        raise BaselineError("there is no result to save")
    file = root / BASELINES / name / f"{result.name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, "\n".join(_document(result, measured)) + "\n")
    return file


def missing_results(result: StudyResult) -> str | None:
    """Return in words what a result lacks of a whole run's; None where it lacks nothing."""
    if result.status != "completed":
        return f"the run is {result.status}"
    count = {
        what: sum(entry.status in statuses for entry in result.experiments)
        for what, statuses in (("failed", ("failed",)), ("not run", ("pending", "running", "deselected")))
    }
    if any(count.values()):
        return "experiments " + " and ".join(f"{what}: {number}" for what, number in count.items() if number)
    if not result.experiments:  # a saved file keeps none
        wanted = result.measurement_protocol.get("n_cycles", 1)
        if short := [point.id for point in result.points if len(point.cycles) < wanted]:
            return f"{short[0]} has fewer cycles than {wanted}"
    return None


def unfit_results(result: StudyResult, name: str, root: Path) -> str | None:
    """Return why a result is no good reference, though nothing is missing; None where it is.

    It is contended, replayed or invalid, or it fails a comparison with the baseline *name* below *root*, which it
    would replace: the next run would then find nothing.
    """
    contended = [point for point in result.points if point.contention is not None and point.contention.contended]
    replayed = [entry for entry in result.experiments if entry.replayed_from is not None]
    invalid = {
        point.id: f"{name} of {point.id} is invalid: {reason}"
        for point in result.points
        for name, summary in point.metrics.items()
        if summary.mean is not None
        and (reason := ineligible_reason(point, name, any_boundary=names_boundary(point, name)))
    }
    found = []
    if contended and contended[0].contention is not None:
        found.append(f"contended: {named([one.id for one in contended])}: {contended[0].contention.reasons[0]}")
    if replayed:
        found.append(
            f"replayed from {replayed[0].replayed_from}: {named([one.experiment_id for one in replayed])}"
        )
    if invalid:
        found.append(next(iter(invalid.values())))
    if failed := _failed_against(result, name, root):
        found.append(f"the run fails the comparison with this baseline: {named(failed)}")
    return "; ".join(found) or None


def _failed_against(result: StudyResult, name: str, root: Path) -> list[str]:
    """Return which comparisons with the baseline *name* a result fails."""
    if result.comparison is None:
        return []
    given = result.comparison.reference
    path = Path(given).resolve()
    if given != name and (root / BASELINES / name).resolve() not in (path, *path.parents):
        return []
    verdicts = (verdict for point in result.points for verdict in point.verdicts)
    failed = [one for one in verdicts if one.gate == "regression" and one.outcome == "failed"]
    missing = result.comparison.missing_points
    return [f"{one.verdict} {one.id}" for one in failed] + [f"missing {point}" for point in missing]


class _Table(dict[str, Any]):
    """A mapping whose entries are a line each, however short or long."""


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
    """Yield the lines of *value* as JSON, without the comma that may follow. *key* begins the first."""
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
