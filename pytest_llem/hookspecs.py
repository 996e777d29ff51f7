"""Hooks that pytest-llem calls; implement them in a ``conftest.py`` or a plugin, like any pytest hook."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_llem.results.experiment import ExperimentResult
    from pytest_llem.results.study_result import StudyResult


def pytest_llem_environment(environment: dict[str, Any]) -> None:
    """Add JSON-compatible facts to the *environment* of a study's manifest and result.

    *environment* already holds the facts of :func:`pytest_llem.results.environment.host_environment`. Called in
    the controller once per study, before anything is written. An exception ends the run before it begins.

    Example:
        def pytest_llem_environment(environment):
            environment["rack"] = os.environ.get("RACK")
    """


def pytest_llem_experiment_finished(result: ExperimentResult) -> None:
    """Handle the result of a completed experiment, after it is saved.

    Not called for failed experiments, which have no result, nor for those of the reference of ``--llem-against``.
    Called in the controller, never in an xdist worker. An exception, such as that of ``pytest.fail``, fails the
    item.

    Example:
        def pytest_llem_experiment_finished(result):
            upload(result.model_dump_json())
    """


def pytest_llem_study_finished(study_result: StudyResult, directory: Path) -> None:
    """Handle the result of a study, whose ``study_result.json`` is in *directory*, at the session's end.

    Called in the controller, also if the study was interrupted. An exception, such as that of ``pytest.fail``,
    makes pytest exit with 1 instead of 0.

    Example:
        def pytest_llem_study_finished(study_result, directory):
            shutil.copy(directory / "study_result.json", "artifacts")
    """
