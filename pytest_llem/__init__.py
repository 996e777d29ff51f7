"""Measure the energy, latency and memory of LLM inference as pytest tests.

The public names are imported when they are first used, so that loading the plugin adds no import time to an
ordinary pytest run.

PYTEST_DONT_REWRITE (``run_study`` and ``llem fetch`` import this module before they start pytest, which would
warn that it cannot rewrite the module's assertions; there are none)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_llem.api import StudyRunError as StudyRunError
    from pytest_llem.api import run_experiment as run_experiment
    from pytest_llem.api import run_study as run_study
    from pytest_llem.energy.metering import EnergyMeter as EnergyMeter
    from pytest_llem.energy.metering import EnergyReading as EnergyReading
    from pytest_llem.execution.isolated import ExperimentError as ExperimentError
    from pytest_llem.execution.isolated import IsolatedExperiment as IsolatedExperiment
    from pytest_llem.measurement.orchestrator import ExperimentOrchestrator as ExperimentOrchestrator
    from pytest_llem.results.experiment import ExperimentResult as ExperimentResult
    from pytest_llem.results.study_result import StudyResult as StudyResult
    from pytest_llem.study.config import ExperimentConfig as ExperimentConfig
    from pytest_llem.study.design import StudyConfig as StudyConfig
    from pytest_llem.study.engine_options import EngineOptions as EngineOptions
    from pytest_llem.study.engine_options import Needs as Needs
    from pytest_llem.study.loading import load_study as load_study
    from pytest_llem.study.problems import StudyError as StudyError

#: The module of each public name.
_MODULES = {
    "EnergyMeter": "pytest_llem.energy.metering",
    "EnergyReading": "pytest_llem.energy.metering",
    "EngineOptions": "pytest_llem.study.engine_options",
    "ExperimentConfig": "pytest_llem.study.config",
    "ExperimentError": "pytest_llem.execution.isolated",
    "ExperimentOrchestrator": "pytest_llem.measurement.orchestrator",
    "ExperimentResult": "pytest_llem.results.experiment",
    "IsolatedExperiment": "pytest_llem.execution.isolated",
    "Needs": "pytest_llem.study.engine_options",
    "StudyConfig": "pytest_llem.study.design",
    "StudyError": "pytest_llem.study.problems",
    "StudyResult": "pytest_llem.results.study_result",
    "StudyRunError": "pytest_llem.api",
    "load_study": "pytest_llem.study.loading",
    "run_experiment": "pytest_llem.api",
    "run_study": "pytest_llem.api",
}

__all__ = [*_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("pytest-llem")
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
