"""Fixtures for ordinary tests.

This module is loaded in every pytest run, so each fixture imports what it needs when it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_llem.energy.metering import EnergyMeter
    from pytest_llem.execution.isolated import IsolatedExperiment


@pytest.fixture(scope="session")
def energy_meter() -> EnergyMeter:
    """Measure the energy of a block: ``with energy_meter() as m: …``, then ``m.energy_j`` in J and ``m.seconds``.

    ``m.method`` is how the energy was read. ``m.energy_j`` is None if no meter can be read; ``m.reason`` says why.
    ``energy_meter(backend="nvml")`` chooses a meter.

    Example:
        def test_energy_of_summary(energy_meter):
            with energy_meter() as m:
                summarize(TEXT)
            assert m.energy_j < 50
    """
    from pytest_llem.energy.metering import EnergyMeter

    return EnergyMeter()


@pytest.fixture(scope="session")
def isolated_experiment(pytestconfig: pytest.Config) -> IsolatedExperiment:
    """Run an experiment in a new process: ``isolated_experiment({"model": …})`` returns an ExperimentResult.

    A failed experiment raises ``pytest_llem.ExperimentError``. Paths are relative to rootdir; ``timeout=`` is in
    seconds.

    Example:
        def test_throughput(isolated_experiment):
            result = isolated_experiment({"model": "builtin:tiny-llama", "n": 8})
            assert result.metrics["output_tokens_per_second"].value > 100
    """
    from pytest_llem.execution.isolated import IsolatedExperiment

    return IsolatedExperiment(pytestconfig)
