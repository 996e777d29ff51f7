"""Hooks that pytest-llem calls. Implement them in a ``conftest.py`` or a plugin, as any pytest hook."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_llem.results.experiment import ExperimentResult
    from pytest_llem.results.models import StudyResult


def pytest_llem_environment(environment: dict[str, Any]) -> None:
    """A study is about to run: what is put into *environment*, as JSON has it, is in its manifest and its result.

    What is there already is what :func:`pytest_llem.results.environment.host_environment` tells. Called in the
    controller, once for each study, before anything is written. Any exception ends the session before it begins.
    """


def pytest_llem_experiment_finished(result: ExperimentResult) -> None:
    """An experiment has a result, and it is saved. One that failed has none, and is not told here.

    Called in the controller, never in an xdist worker. ``pytest.fail``, like any exception, fails the item.
    """


def pytest_llem_study_finished(study_result: StudyResult, directory: Path) -> None:
    """A study has ended, and ``study_result.json`` is in *directory*.

    Called in the controller. ``pytest.fail``, like any exception, makes pytest exit with 1.
    """
