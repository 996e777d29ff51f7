"""Which engines there are, and where each one's experiments run."""

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

#: The runner of an engine that runs in this environment.
LOCAL = "local"

#: What a runner's text is where it names a container, as LLenergyMeasure 2.0 has it: ``docker``, ``docker:IMAGE``.
_CONTAINER = re.compile(r"docker(:.*)?", re.DOTALL)

#: ``package.module:Class``, an engine of the user's own.
ENGINE_CLASS = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*")


def is_class(name: str) -> bool:
    """Whether *name* is an engine's ``package.module:Class``."""
    return ENGINE_CLASS.fullmatch(name) is not None


def is_container(runner: str) -> bool:
    """Whether *runner* names a container, and not a Python interpreter."""
    return _CONTAINER.fullmatch(runner) is not None


def interpreter_path(runner: str, directory: Path) -> Path:
    """Return the interpreter that *runner* names, as an absolute path.

    Links are not followed: the interpreter of a virtual environment is one.

    Args:
        runner: As the study has it.
        directory: What a relative one is relative to.
    """
    path = Path(runner)
    with suppress(RuntimeError):  # ~nobody: it will not be found
        path = path.expanduser()
    return directory.absolute() / path


def known_backends(document: Document, shared: Mapping[str, Any]) -> list[str]:
    """Return the names that stand for engines in this file.

    They are those of the grammar, installed ones, classes of the user's own, and those that this file runs in
    another interpreter, where they may be installed.
    """
    named = [name for name in _named(document.data, shared) if isinstance(name, str)]
    own = [name for name in named if is_class(name) or _runs_elsewhere(name, document.data)]
    return list(dict.fromkeys([*ENGINES, *installed(ENGINE_GROUP), *own]))


def _runs_elsewhere(name: str, data: Mapping[str, Any]) -> bool:
    runners = data.get("runners")
    runner = runners.get(name) if isinstance(runners, dict) else None
    if not isinstance(runner, str) or runner in ("", LOCAL) or is_container(runner):
        return False
    return bool(name) and name not in ExperimentConfig.model_fields and name not in STUDY_KEYS


def _named(data: Mapping[str, Any], shared: Mapping[str, Any]) -> Iterator[Any]:
    sweep, experiments = data.get("sweep"), data.get("experiments")
    swept = sweep.get("backend") if isinstance(sweep, dict) else None
    listed = (
        [one.get("backend") for one in experiments if isinstance(one, dict)]
        if isinstance(experiments, list)
        else []
    )
    for given in (shared.get("backend"), swept, listed):
        yield from given if isinstance(given, list) else [given]


def read_runners(document: Document, backends: Sequence[str]) -> tuple[dict[str, str], list[Problem]]:
    """Return where each engine runs, and what is wrong with the section."""
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
