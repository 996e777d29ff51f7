"""What determines the numbers that would be measured here and now."""

from __future__ import annotations

from collections.abc import Callable

from pytest_llem.hardware.gpus import visible_gpus
from pytest_llem.isolation.interpreter import package_versions
from pytest_llem.planning.inputs import CurrentInputs
from pytest_llem.planning.resume import CurrentEnvironment
from pytest_llem.results.environment import cpu_model, package_version
from pytest_llem.study.design import StudyConfig


def current_environment(study: StudyConfig, inputs: CurrentInputs) -> CurrentEnvironment:
    """Return what determines the numbers of *study* here: this machine, what each runner has, and *inputs*."""

    def version(backend: str) -> Callable[[str], str | None]:
        python = study.interpreter(backend)
        return package_version if python is None else package_versions(python).get

    boards = visible_gpus().all
    return CurrentEnvironment(
        cpu=cpu_model(),
        gpus=frozenset(board.name for board in boards if board.name),
        driver=next((board.driver for board in boards if board.driver), None),
        version=version,
        changes=inputs.changes,
    )
