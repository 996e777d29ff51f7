"""Run the conformance suite's experiments in this process, at a fraction of the cost of a process each."""

from __future__ import annotations

import pytest

from pytest_llem.execution.isolated import ExperimentError
from pytest_llem.isolation.engine_probe import EngineAnswer
from pytest_llem.isolation.worker import describe
from pytest_llem.measurement import cpu_counters, observed_engine, orchestrator
from pytest_llem.measurement.engine_imports import answer
from pytest_llem.measurement.orchestrator import ExperimentOrchestrator
from pytest_llem.measurement.progress import Progress
from pytest_llem.results import code_state
from pytest_llem.results.experiment import ExperimentResult
from pytest_llem.results.manifest_records import ErrorRecord
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.testing import EngineConformance, experiments
from pytest_llem.testing.experiments import Experiments


def run(config: ExperimentConfig) -> ExperimentResult:
    """Run an experiment as ``isolated_experiment`` does, without a process of its own."""
    phases = ["importing"]

    def note(progress: Progress) -> None:
        phases.append(progress.phase)

    try:
        return ExperimentOrchestrator(config, on_progress=note).run().result
    except Exception as error:
        record = ErrorRecord.model_validate(describe(error, phases[-1]))
        raise ExperimentError(record.message, record) from None


class InProcess(EngineConformance):
    """The suite without the check that kills the process."""

    batch_invariant = True
    #: Whether the engine starts processes.
    has_processes = False

    @pytest.fixture
    def isolated_experiment(self, monkeypatch: pytest.MonkeyPatch) -> object:
        """Run without looking at the machine and the code, which takes most of the time."""
        monkeypatch.setattr(orchestrator, "environment", lambda gpus, root: {})
        monkeypatch.setattr(cpu_counters, "_processes", lambda proc: ())
        monkeypatch.setattr(code_state, "imported", lambda: {"modules": {}, "distributions": {}})
        children = observed_engine._children
        before = {child.pid for child in children()}
        new = (lambda: [one for one in children() if one.pid not in before]) if self.has_processes else list
        monkeypatch.setattr(observed_engine, "_children", new)
        monkeypatch.setattr(observed_engine, "END_SECONDS", 0.2)
        monkeypatch.setattr(experiments, "_GONE_SECONDS", 0.2)
        return run

    @pytest.fixture
    def engine_answer(self, experiments: Experiments) -> EngineAnswer:
        fields = answer({experiments.backend: []})[experiments.backend]
        return EngineAnswer.model_validate({**fields, "configs": {}})

    def test_no_process_is_left_after_sigkill(self, experiments: Experiments) -> None:
        pytest.skip("would kill this process")
