"""One experiment for an ordinary test: in a process of its own, alone on its devices, as an item of a study runs.

Nothing of pytest is imported before an experiment is asked for: the names are public, and there to annotate with.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
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
from pytest_llem.execution.session_resources import controller, hub_unreachable_for, import_path
from pytest_llem.isolation.launcher import Job, run_isolated
from pytest_llem.isolation.outcome import Outcome
from pytest_llem.machine.devices import CPU, DeviceError, Ownership, owned, possible_devices
from pytest_llem.machine.gpu_memory import GpuMemory
from pytest_llem.machine.owner import Owner
from pytest_llem.planning.deadline import deadline_seconds
from pytest_llem.planning.preflight import Preflight
from pytest_llem.results.experiment import ExperimentResult, GapRecord, Identity
from pytest_llem.results.models import ErrorRecord
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.design import Point, StudyConfig
from pytest_llem.study.execution import ExecutionConfig
from pytest_llem.study.identity import config_hash

if TYPE_CHECKING:
    import pytest

    from pytest_llem._plugin.options import Settings

#: What stands for a study's name where a device's owner is told.
NAME = "isolated_experiment"


class ExperimentError(Exception):
    """An experiment that failed. The message's first line says why; its process's traceback follows.

    Attributes:
        error: The failure, as a study's manifest would have it: its kind, type, message, phase, traceback.
        output: What the process wrote to standard output and standard error, head and tail.
    """

    __module__ = "pytest_llem"  # as pytest shows it, and as it is imported

    def __init__(self, message: str, error: ErrorRecord, output: str = "") -> None:
        super().__init__(message)
        self.error = error
        self.output = output


class IsolatedExperiment:
    """Runs experiments, each in a fresh process: ``isolated_experiment({"model": …})``.

    One has its devices to itself: it waits for any other on this machine, in workers of pytest-xdist too, and has
    them wait. There is no idle time for cooling between two. What the idle machine draws is measured once for each
    configuration.

    Args:
        config: Of pytest: ini ``llem_model_path``, ``llem_carbon_intensity``, ``llem_pue`` and ``pythonpath``
            count, and ``--llem-timeout``.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._board = SharedState()
        self._memory = GpuMemory()

    def __call__(
        self, config: ExperimentConfig | Mapping[str, Any], *, timeout: float | None = None
    ) -> ExperimentResult:
        """Run one experiment and return its result. No process of it is left, also after Ctrl-C.

        Args:
            config: The experiment, or its fields. Paths are relative to pytest's rootdir.
            timeout: End it after this many seconds, downloads not counted; None for ``--llem-timeout``, or else a
                deadline from the model's size, prompts and tokens.

        Raises:
            ExperimentError: It failed, or is known not to run here.
            pydantic.ValidationError: *config* is no valid experiment, or *timeout* no number of seconds above 0.
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
        if (refusal := preflight.reason(study.points[0])) is not None:
            raise self._failure(_refused(refusal))
        deadline = deadline_seconds(
            config, study.execution, preflight.footprint(config), preflight.host_of(config)
        )
        try:
            outcome = self._run_alone(study, settings, preflight, deadline)
        except DeviceError as error:
            raise self._failure(_refused(str(error))) from None
        if outcome.result is None:
            assert outcome.error is not None
            raise self._failure(outcome.error, outcome.output)
        keep_idle_power(self._board, study.design_hash, None, outcome.result)
        return ExperimentResult.model_validate_json(outcome.result)

    def _run_alone(self, study: StudyConfig, settings: Settings, preflight: Preflight, deadline: float) -> Outcome:
        from pytest_llem.execution.live_line import say
        from pytest_llem.execution.output import output_forwarder, print_output
        from pytest_llem.execution.servers import servers_of

        config = study.points[0].config
        devices = possible_devices(config, None)
        worker = getattr(self._config, "workerinput", {}).get("workerid")
        test = os.environ.get("PYTEST_CURRENT_TEST", study.design_hash)
        with owned(devices, Owner.of_this_process(NAME, test, worker), partial(say, self._config)) as ownership:
            gap = self._settle(ownership)
            measure_no_context_once(self._board, config, ownership.devices, lambda: None)
            job = replace(
                self._job(study, settings, gap, ownership.devices),
                hub_unreachable=hub_unreachable_for(self._board, preflight, config),
            )
            servers = servers_of(self._config, NAME, study.execution)
            outcome = run_isolated(
                job, servers=servers, timeout=deadline, on_output=output_forwarder(self._config)
            )
        print_output(self._config, outcome.output)
        return outcome

    def _settle(self, ownership: Ownership) -> GapRecord:
        """Wait until the GPUs' memory is as it was before the experiment before, and note it for the next one."""
        settled = self._memory.settle(ownership.devices - {CPU}, ownership.used_before)
        ownership.note_used(settled.used)
        return GapRecord(
            seconds=0.0,
            reason="skipped",
            note=f"{NAME} keeps none",
            waited_seconds=ownership.waited_seconds,
            waited_for=ownership.waited_for,
            memory_waited_seconds=settled.seconds,
            memory_left_mb=settled.left_mb,
        )

    def _job(self, study: StudyConfig, settings: Settings, gap: GapRecord, devices: Collection[str]) -> Job:
        config, digest, root = study.points[0].config, study.design_hash, str(self._config.rootpath)
        others = [pid] if (pid := controller(self._config)) else []
        intensity = settings.carbon_intensity
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
            carbon=None if intensity is None else {"intensity": intensity, "pue": settings.pue},
            idle_power=known_idle_power(self._board, digest, None),
            no_context=no_context_fields(self._board, config, devices),
        )

    def _failure(self, error: ErrorRecord, output: str = "") -> ExperimentError:
        from pytest_llem.execution.experiment import explain

        return ExperimentError(explain(error, self._config.getoption("tbstyle", "auto")), error, output)


def _study(config: ExperimentConfig, execution: ExecutionConfig, root: Path) -> StudyConfig:
    """Return the study of one point that no file holds, in the folder *root*."""
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


def _refused(message: str) -> ErrorRecord:
    return ErrorRecord(kind="preflight", type="PreflightError", message=message)
