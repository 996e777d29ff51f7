"""Hooks that pytest-llem calls. Implement them in a ``conftest.py`` or a plugin, as any pytest hook."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_llem.results.experiment import ExperimentResult
    from pytest_llem.results.models import StudyResult


def pytest_llem_experiment_finished(result: ExperimentResult) -> None:
    """An experiment has a result, and it is saved. One that failed has none, and is not told here.

    Called in the controller, never in an xdist worker. ``pytest.fail``, like any exception, fails the item.
    """


def pytest_llem_study_finished(study_result: StudyResult, directory: Path) -> None:
    """A study has ended, and ``study_result.json`` is in *directory*.

    Called in the controller. ``pytest.fail``, like any exception, makes pytest exit with 1.
    """
