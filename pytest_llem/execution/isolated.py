"""The fixture ``isolated_experiment``: run one experiment for an ordinary test, in a process of its own.

This module imports nothing of pytest before an experiment runs, as tests import its public names for annotations.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_llem._plugin.shared_state import SharedState
from pytest_llem.execution.idle_power import (
    keep_idle_power,
    known_idle_power,
    measure_no_context_once,
    no_context_fields,
)
from pytest_llem.execution.session_facts import (
    controller,
    hub_unreachable_reason,
    import_path,
    session_name,
    worker_id,
)
from pytest_llem.isolation.launcher import Job, run_isolated
from pytest_llem.isolation.outcome import Outcome
from pytest_llem.machine.device_locks import DeviceError, owned
from pytest_llem.machine.device_request import Allocation
from pytest_llem.machine.gpu_memory import GpuMemory
from pytest_llem.machine.owner import Owner
from pytest_llem.planning.preflight import Preflight
from pytest_llem.results.experiment import ExperimentResult, GapRecord, Identity
from pytest_llem.results.manifest_records import ErrorRecord
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.design import Point, StudyConfig
from pytest_llem.study.execution import ExecutionConfig
from pytest_llem.study.identity import config_hash

if TYPE_CHECKING:
    import pytest

    from pytest_llem._plugin.options import Settings

#: Replaces the study's name in messages about who owns a device.
NAME = "isolated_experiment"


class ExperimentError(Exception):
    """Raised for an experiment that failed. The message's first line is the reason; the traceback follows.

    Attributes:
        error: The error record, with kind, type, message, phase and traceback, as in a study's manifest.
        output: Head and tail of what the process wrote to standard output and standard error.

    Example:
        >>> def test_missing_engine(isolated_experiment):
        ...     with pytest.raises(ExperimentError) as caught:
        ...         isolated_experiment({"model": "builtin:tiny-llama", "backend": "nothing"})
        ...     assert caught.value.error.kind == "preflight"
    """

    __module__ = "pytest_llem"  # the name under which users import it, also in tracebacks

    def __init__(self, message: str, error: ErrorRecord, output: str = "") -> None:
        super().__init__(message)
        self.error = error
        self.output = output


class IsolatedExperiment:
    """Runs experiments, each in a fresh process.

    Each experiment has exclusive use of its devices: experiments of other processes and of other pytest-xdist
    workers wait for it, and it waits for them. There is no idle time for cooling between two experiments. Idle
    power is measured once for each configuration.

    Args:
        config: The pytest configuration. The ini keys ``llem_model_path``, ``llem_carbon_intensity``, ``llem_pue``
            and ``pythonpath`` and the options ``--llem-timeout`` and ``--llem-start-method`` are used.

    Example:
        >>> def test_energy(isolated_experiment):
        ...     result = isolated_experiment({"model": "builtin:tiny-llama", "n": 8, "max_output_tokens": 16})
        ...     assert result.metrics["output_tokens_per_second"].value > 1
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._shared_state = SharedState()
        self._memory = GpuMemory()

    def __call__(
        self, config: ExperimentConfig | Mapping[str, Any], *, timeout: float | None = None
    ) -> ExperimentResult:
        """Run one experiment and return its result. No process of it is left afterwards, also after Ctrl-C.

        Args:
            config: The experiment, or its fields. Paths are relative to pytest's rootdir.
            timeout: Time limit in s, without downloads. None for ``--llem-timeout`` or, if that is not given, a
                deadline computed from the model's size, the prompts and the tokens.

        Raises:
            ExperimentError: The experiment failed, or its preflight did.
            pydantic.ValidationError: *config* is not a valid experiment, or *timeout* is not greater than 0.
        """
        __tracebackhide__ = True
        from pytest_llem._plugin.options import Settings

        if not isinstance(config, ExperimentConfig):
            config = ExperimentConfig.model_validate(dict(config))
        settings = Settings.from_config(self._config)
        limit = settings.timeout if timeout is None else timeout
        execution = ExecutionConfig(
            experiment_timeout_seconds=limit, start_method=settings.start_method or "spawn"
        )
        study = _study(config, execution, self._config.rootpath)
        preflight = Preflight(study, settings.model_path, import_path(self._config))
        if (refusal := preflight.refusal(study.points[0])) is not None:
            raise self._failure(Outcome.refused(refusal))
        try:
            outcome = self._run_alone(study, settings, preflight, preflight.deadline_seconds(config))
        except DeviceError as error:
            raise self._failure(Outcome.refused(str(error))) from None
        if outcome.result is None:
            raise self._failure(outcome)
        keep_idle_power(self._shared_state, study.design_hash, None, outcome.data)
        return ExperimentResult.model_validate_json(outcome.result)

    def _run_alone(self, study: StudyConfig, settings: Settings, preflight: Preflight, deadline: float) -> Outcome:
        from pytest_llem.execution.jobs import forkservers_of
        from pytest_llem.execution.terminal_output import output_forwarder, print_line, print_output
        from pytest_llem.machine.neighbours import with_neighbours

        config = study.points[0].config
        request = preflight.request(config)
        test = os.environ.get("PYTEST_CURRENT_TEST", study.design_hash)
        session = session_name(self._config)
        with owned(
            request.pool,
            Owner.of_this_process(NAME, test, worker_id(self._config), session),
            partial(print_line, self._config),
            count=request.count,
            choose=request.choose,
        ) as ownership:
            allocation = request.allocation(ownership.devices)
            gap = GapRecord(
                seconds=0.0,
                reason="skipped",
                note=f"{NAME} does not idle between experiments",
                waited_seconds=ownership.waited_seconds,
                waited_for=ownership.waited_for,
            )
            gap = self._memory.settle_owned(ownership, gap)
            measure_no_context_once(self._shared_state, config, ownership.devices, lambda: None)
            job = replace(
                self._job(study, settings, gap, allocation),
                hub_unreachable_reason=hub_unreachable_reason(self._shared_state, preflight, config),
                max_load_seconds=preflight.max_load_seconds(config),
            )
            forkservers = forkservers_of(self._config, NAME, study.execution)
            outcome = run_isolated(
                job, forkservers=forkservers, timeout=deadline, on_output=output_forwarder(self._config)
            )
            outcome = with_neighbours(outcome, allocation.devices, session)
        print_output(self._config, outcome.output)
        return outcome

    def _job(self, study: StudyConfig, settings: Settings, gap: GapRecord, allocation: Allocation) -> Job:
        config, digest, root = study.points[0].config, study.design_hash, str(self._config.rootpath)
        others = [pid] if (pid := controller(self._config)) else []
        return Job(
            identity=Identity(experiment_id=digest, config_hash=digest).model_dump(mode="json"),
            config=config.model_dump(mode="json"),
            directory=root,
            root=root,
            model_path=[str(folder) for folder in settings.model_path],
            python_path=[str(folder) for folder in import_path(self._config)],
            watch_pids=others,
            harness=[os.getpid(), *others],
            gap=gap.model_dump(mode="json"),
            carbon=settings.carbon,
            idle_power=known_idle_power(self._shared_state, digest, None),
            idle_power_no_context=no_context_fields(self._shared_state, config, allocation.devices),
            devices=allocation.devices if allocation.environment else (),
            variables=allocation.environment,
        )

    def _failure(self, outcome: Outcome) -> ExperimentError:
        from pytest_llem.execution.experiment import explain

        assert outcome.error is not None
        message = explain(outcome.error, self._config.getoption("tbstyle", "auto"))
        return ExperimentError(message, outcome.error, outcome.output)


def _study(config: ExperimentConfig, execution: ExecutionConfig, root: Path) -> StudyConfig:
    """Return a study of one point, as if a file in the folder *root* held it."""
    digest = config_hash(config)
    return StudyConfig(
        path=root / NAME,
        line=1,
        name=NAME,
        text="",
        base_text=None,
        points=(Point(digest, {}, config, digest),),
        excluded=(),
        execution=execution,
        runners={},
        design_hash=digest,
    )
