"""Determine the known engines and read ``runners``, the environments that they run in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pytest_llem.registry import ENGINE_GROUP, installed
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.document import Document
from pytest_llem.study.engines import ENGINES
from pytest_llem.study.grid import STUDY_KEYS
from pytest_llem.study.problems import Problem, did_you_mean

#: The runner that stands for this environment.
LOCAL = "local"

#: A container as a runner, as in LLenergyMeasure 2.0: ``docker`` or ``docker:IMAGE``.
_CONTAINER = re.compile(r"docker(:.*)?", re.DOTALL)

#: A user-defined engine: a class or a function, as ``package.module:name``.
ENGINE_CLASS = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*")


def is_class(name: str) -> bool:
    """Return whether *name* has the form ``package.module:name``, of a class or a function."""
    return ENGINE_CLASS.fullmatch(name) is not None


def is_container(runner: str) -> bool:
    """Return whether *runner* is a container and not a Python interpreter."""
    return _CONTAINER.fullmatch(runner) is not None


def interpreter_path(runner: str, directory: Path) -> Path:
    """Return the absolute path of the interpreter *runner*.

    Links are not followed, because the interpreter of a virtual environment is a link.

    Args:
        runner: Path in the study file.
        directory: Folder that a relative path is relative to.
    """
    path = Path(runner)
    with suppress(RuntimeError):  # an unknown user, as in ~nobody; preflight reports the missing file
        path = path.expanduser()
    return directory.absolute() / path


def known_backends(document: Document, shared: Mapping[str, Any]) -> list[str]:
    """Return the names that are valid engines in this file.

    These are the engines of the grammar, installed engines, user-defined classes and functions, and engines that
    the file runs in another interpreter, which may have them installed.
    """
    named = [name for name in _named_backends(document.data, shared) if isinstance(name, str)]
    own = [name for name in named if is_class(name) or _has_other_interpreter(name, document.data)]
    return list(dict.fromkeys([*ENGINES, *installed(ENGINE_GROUP), *own]))


def _has_other_interpreter(name: str, data: Mapping[str, Any]) -> bool:
    """Return whether the file names another interpreter for *name*, which may be an engine installed there."""
    runners = data.get("runners")
    runner = runners.get(name) if isinstance(runners, dict) else None
    if not isinstance(runner, str) or runner in ("", LOCAL) or is_container(runner):
        return False
    return bool(name) and name not in ExperimentConfig.model_fields and name not in STUDY_KEYS


def _named_backends(data: Mapping[str, Any], shared: Mapping[str, Any]) -> Iterator[Any]:
    """Yield what a file gives as ``backend``, for the whole study, in its sweep and in its experiments."""
    experiments = data.get("experiments")
    for section in (shared, data.get("sweep"), *(experiments if isinstance(experiments, list) else ())):
        given = section.get("backend") if isinstance(section, Mapping) else None
        yield from given if isinstance(given, list) else [given]


def read_runners(document: Document, backends: Sequence[str]) -> tuple[dict[str, str], list[Problem]]:
    """Return the runner of each engine that does not run in this environment, and problems with the section."""
    given = document.data.get("runners")
    if given is None:
        return {}, []
    if not isinstance(given, dict):
        message = f"must be a mapping of engines to runners {document.given(('runners',), given)}"
        return {}, [document.problem(("runners",), message)]
    problems = []
    for name, runner in given.items():
        at = ("runners", name)
        if name not in backends:
            hint = did_you_mean(name, tuple(backends)) or f" (there are: {', '.join(backends)})"
            problems.append(document.problem(at, f"no engine of that name{hint}"))
        elif not isinstance(runner, str) or not runner:
            problems.append(
                document.problem(
                    at, f"must be 'local' or the path of a Python interpreter {document.given(at, runner)}"
                )
            )
    return {name: runner for name, runner in given.items() if runner != LOCAL}, problems
