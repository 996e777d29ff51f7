"""Describe the environment in which a study would be measured now."""

from __future__ import annotations

from collections.abc import Callable

from pytest_llem.hardware.gpus import visible_gpus
from pytest_llem.isolation.interpreter import package_versions
from pytest_llem.planning.inputs import CurrentInputs
from pytest_llem.planning.resume import CurrentEnvironment
from pytest_llem.results.environment import cpu_model, package_version
from pytest_llem.study.design import StudyConfig


def current_environment(study: StudyConfig, inputs: CurrentInputs) -> CurrentEnvironment:
    """Return this machine, the package versions of each runner of *study*, and the state of *inputs*."""

    def version(backend: str) -> Callable[[str], str | None]:
        python = study.interpreter(backend)
        return package_version if python is None else package_versions(python).get

    gpus = visible_gpus().all
    return CurrentEnvironment(
        cpu=cpu_model(),
        gpus=frozenset(gpu.name for gpu in gpus if gpu.name),
        driver=next((gpu.driver for gpu in gpus if gpu.driver), None),
        version=version,
        changes=inputs.changes,
    )


def unknown_environment(inputs: CurrentInputs) -> CurrentEnvironment:
    """Return the environment of hosts of which nothing is known, and the state of *inputs*."""
    return CurrentEnvironment(
        cpu=None, gpus=None, driver=None, version=lambda backend: lambda package: None, changes=inputs.changes
    )
