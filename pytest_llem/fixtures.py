"""Fixtures for ordinary tests. Loaded with the plugin: what they stand on is imported when they are used."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_llem.energy.metering import EnergyMeter
    from pytest_llem.execution.isolated import IsolatedExperiment


@pytest.fixture(scope="session")
def energy_meter() -> EnergyMeter:
    """Energy of a block: ``with energy_meter() as m: …``, then ``m.energy_j``, ``m.seconds``, ``m.method``.

    ``energy_j`` is None where nothing can be read, and ``m.reason`` says why. ``energy_meter(backend="nvml")``
    chooses a meter.
    """
    from pytest_llem.energy.metering import EnergyMeter

    return EnergyMeter()


@pytest.fixture(scope="session")
def isolated_experiment(pytestconfig: pytest.Config) -> IsolatedExperiment:
    """Run an experiment in a fresh process: ``isolated_experiment({"model": …})`` returns an ExperimentResult.

    One that fails raises ``pytest_llem.ExperimentError``. Paths in it are relative to rootdir; ``timeout=`` is in
    seconds.
    """
    from pytest_llem.execution.isolated import IsolatedExperiment

    return IsolatedExperiment(pytestconfig)
