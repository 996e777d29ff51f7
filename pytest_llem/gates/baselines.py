"""Read baselines: results that are saved under a name to compare with, and are meant to be committed.

They are in ``FOLDER/NAME/TESTBED/STUDY.json``; those of earlier versions, or without testbed facts, are in
``FOLDER/NAME/STUDY.json``, which is read if no testbed that fits has its own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pytest_llem.results.manifest import MANIFEST
from pytest_llem.results.points import PointResult
from pytest_llem.results.result_folders import is_result
from pytest_llem.results.study_result import StudyResult
from pytest_llem.study.identity import axes_key
from pytest_llem.study.problems import did_you_mean
from pytest_llem.times import now, seconds_between

#: Units of a baseline's age, in s, with their names.
_UNITS = ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))


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

    Example:
        >>> load("main", Path(".llem/baselines"), "quickstart")
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


def is_name(given: str) -> bool:
    """Return whether *given* can be the name of a baseline, which is a folder's name."""
    return bool(given) and Path(given).name == given and given != ".."


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
    if is_name(given) and (folder / given).is_dir():
        return folder / given
    if path.exists() and given:
        return path
    if not is_name(given) or path.suffix == ".json":
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
    """Return a message if *result* is older than *max_age* in s, or of unknown age; None if it is not."""
    unit, units = next(((unit, units) for unit, units in _UNITS if max_age >= unit), _UNITS[-1])
    limit = f"at most {max_age / unit:.3g} {units} are allowed"
    try:
        age = seconds_between(result.started_at or "", now())
    except (TypeError, ValueError):  # of a version that did not record it
        return f"it is not known when it was measured, and {limit}"
    if result.started_at is None or age <= max_age:
        return None
    return f"measured on {result.started_at[:10]}, {age / unit:.3g} {units} ago, and {limit}"
