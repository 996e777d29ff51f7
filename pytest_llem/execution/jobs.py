"""Make the job of an experiment (all that its process needs), and keep preflights and forkservers for all jobs."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_llem._plugin.node_ids import file_of, is_reference
from pytest_llem._plugin.options import WORKTREE, Settings
from pytest_llem._plugin.stash import REMOTE, SHARED_STATE
from pytest_llem.collection.items import experiment_of, run_of, study_of_item
from pytest_llem.execution.idle_power import known_idle_power, no_context_fields
from pytest_llem.execution.replay import import_path_of
from pytest_llem.execution.session_facts import controller, hub_unreachable_reason
from pytest_llem.isolation.forkserver_client import ForkServers
from pytest_llem.isolation.launcher import Job
from pytest_llem.machine.device_request import Allocation
from pytest_llem.planning.preflight import Preflight, UnknownHostPreflight
from pytest_llem.results.experiment import GapRecord, Identity
from pytest_llem.study.design import Point, StudyConfig
from pytest_llem.study.execution import ExecutionConfig
from pytest_llem.study.server import SERVER, is_attached
from pytest_llem.study.server_command import server_hash

#: Preflights by run key.
_PREFLIGHTS = pytest.StashKey[dict[str, Preflight]]()

_FORKSERVERS = pytest.StashKey[ForkServers]()


def preflight_of(config: pytest.Config, run: str, study: StudyConfig) -> Preflight:
    """Return the preflight of a run of *study*; *run* is the run's key."""
    known = config.stash.setdefault(_PREFLIGHTS, {})
    if run not in known:
        kind = UnknownHostPreflight if config.stash.get(REMOTE, False) else Preflight
        known[run] = kind(
            study, Settings.from_config(config).model_path, import_path_of(config, reference=is_reference(run))
        )
    return known[run]


def preflight_of_item(item: pytest.Item) -> Preflight:
    """Return the preflight of an experiment's run."""
    return preflight_of(item.config, run_of(item), study_of_item(item))


def forkservers_of(config: pytest.Config, study: str, execution: ExecutionConfig) -> ForkServers | None:
    """Return the forkservers of a study; None if its experiments are spawned.

    They end with the session, or when another study runs.

    Args:
        config: The session's pytest configuration.
        study: A name that no other study of the session has.
        execution: The study's execution settings.
    """
    if _FORKSERVERS not in config.stash:
        if execution.start_method == "spawn":
            return None
        config.stash[_FORKSERVERS] = ForkServers()
        config.add_cleanup(config.stash[_FORKSERVERS].end)
    forkservers = config.stash[_FORKSERVERS].of(study)
    return forkservers if execution.start_method == "forkserver" else None


def forkservers_of_item(item: pytest.Item) -> ForkServers | None:
    """Return the forkservers of an experiment's study; None if its experiments are spawned."""
    return forkservers_of(item.config, file_of(run_of(item)), study_of_item(item).execution)


def complete_job(item: pytest.Item, allocation: Allocation, gap: GapRecord | None) -> Job:
    """Return the job of an item's experiment. Call it once the devices are idle.

    Args:
        item: The experiment's item.
        allocation: The leased devices.
        gap: Idle time before the experiment; None if it was not recorded.
    """
    study, experiment = study_of_item(item), experiment_of(item)
    point, shared_state = experiment.point, item.config.stash[SHARED_STATE]
    return replace(
        early_job(item, allocation),
        gap=gap.model_dump(mode="json") if gap else None,
        idle_power=known_idle_power(shared_state, *idle_power_key(study, point, allocation)),
        idle_power_no_context=no_context_fields(shared_state, point.config, allocation.devices),
        hub_unreachable_reason=hub_unreachable_reason(shared_state, preflight_of_item(item), point.config),
    )


def early_job(item: pytest.Item, allocation: Allocation) -> Job:
    """Return the job of an item's experiment, as far as it is known before its devices are idle."""
    study, experiment, run = study_of_item(item), experiment_of(item), run_of(item)
    point = experiment.point
    python = study.interpreter(point.config.backend)
    pytest_processes = [os.getpid(), *([pid] if (pid := controller(item.config)) else [])]
    # The client of a server is the same on both sides, and may be forked from one forkserver.
    has_own_code = is_reference(run) and point.config.backend != SERVER
    settings, worktree = Settings.from_config(item.config), item.config.stash.get(WORKTREE, None)
    identity = Identity(
        experiment_id=experiment.id,
        config_hash=point.config_hash,
        study_design_hash=study.design_hash,
        axes=point.axes,
        cycle=experiment.cycle,
    )
    return Job(
        identity=identity.model_dump(mode="json"),
        config=point.config.model_dump(mode="json"),
        directory=str(study.path.parent),
        root=str(_working_tree(item.config, _code_interpreter(study, point) if is_reference(run) else None)),
        model_path=[str(folder) for folder in settings.model_path],
        python_path=[str(folder) for folder in import_path_of(item.config, reference=has_own_code)],
        watch_pids=pytest_processes[1:],
        harness=pytest_processes,
        python=str(python) if python else None,
        carbon=settings.carbon,
        devices=allocation.devices if allocation.environment or is_attached(point.config) else (),
        variables=allocation.environment,
        import_trees=(str(worktree.repository), str(worktree.folder))
        if worktree is not None and has_own_code
        else None,
        max_load_seconds=preflight_of_item(item).max_load_seconds(point.config),
    )


def idle_power_key(study: StudyConfig, point: Point, allocation: Allocation) -> tuple[str, Path | None]:
    """Return what determines a point's idle power: devices, and its configuration or that of its server."""
    devices = " ".join(allocation.devices)
    if point.config.backend != SERVER:
        return f"{point.config_hash} {devices}", study.interpreter(point.config.backend)
    return f"server {server_hash(point.config)} {devices}", study.server_interpreter


def _code_interpreter(study: StudyConfig, point: Point) -> Path | None:
    """Return the interpreter that runs the measured code; None for this one."""
    is_server = point.config.backend == SERVER
    return study.server_interpreter if is_server else study.interpreter(point.config.backend)


def _working_tree(config: pytest.Config, reference_python: Path | None) -> Path:
    """Return the folder whose git commit is recorded: for the reference, the one around its interpreter.

    A reference interpreter inside the candidate's tree may have its code from anywhere, so the folder is ``/``,
    which is in no working tree.
    """
    if reference_python is None:
        return config.rootpath
    if (worktree := config.stash.get(WORKTREE, None)) is not None:
        return worktree.folder
    folder = reference_python.parent
    return Path("/") if folder.is_relative_to(config.rootpath) else folder
