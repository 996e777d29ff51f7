"""Where baselines are: ``FOLDER/NAME/TESTBED/STUDY.json``.

Earlier versions wrote ``FOLDER/NAME/STUDY.json``, which is read if no testbed has its own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pytest_llem.results.manifest import MANIFEST
from pytest_llem.results.study_result import is_result
from pytest_llem.study.problems import did_you_mean

#: Default folder of the baselines, relative to pytest's rootdir; for ``llem``'s commands, to the current folder.
BASELINES = Path(".llem", "baselines")


class BaselineError(ValueError):
    """A baseline cannot be read or saved; the message is one line.

    Attributes:
        renew: Whether saving the baseline again would help.
    """

    def __init__(self, message: str, *, renew: bool = False) -> None:
        super().__init__(message)
        self.renew = renew


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


def result_file(
    given: str, folder: Path, study: str | None, testbeds: Sequence[str], *, only_fitting: bool
) -> Path:
    """Return the file or results directory of one study that *given* names.

    Args:
        given: Name or path, as in :func:`resolve`.
        folder: Folder of the baselines.
        study: Name of the study; None for any study, if only one is saved.
        testbeds: Keys of the testbeds that fit, the best first.
        only_fitting: Refuse a result of another testbed even if it is the only one.

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
