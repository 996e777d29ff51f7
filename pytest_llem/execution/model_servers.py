"""Start the servers of a session's experiments, and keep one for the load points that share it."""

from __future__ import annotations

import os
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest

from pytest_llem._plugin.node_ids import is_reference
from pytest_llem._plugin.options import WORKTREE, Settings
from pytest_llem.collection.items import experiment_of, is_experiment, run_of, study_of_item
from pytest_llem.engines.models import local_file, resolve_model
from pytest_llem.engines.protocol import ModelNotFoundError
from pytest_llem.execution.device_lease import DeviceLease
from pytest_llem.execution.session_facts import controller, python_path
from pytest_llem.execution.terminal_output import add_server_section
from pytest_llem.isolation.interpreter import ask
from pytest_llem.isolation.launcher import PYTHON_VARIABLES, Job
from pytest_llem.isolation.model_server import PORT_TAKEN, ModelServer, answers, free_port
from pytest_llem.isolation.outcome import Outcome
from pytest_llem.machine.attached_server import is_this_host, listening_process, other_gpu_user
from pytest_llem.machine.device_request import Allocation
from pytest_llem.results.drift import first_load
from pytest_llem.results.serving import DriftRecord, LoadRecord, ServerRecord
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.server import SERVER, ServerConfig, is_attached
from pytest_llem.study.server_command import runs_python, server_command, server_env
from pytest_llem.times import now

#: Text in the output of a server whose port is taken.
_PORT_TAKEN_TEXT = "address already in use"

#: Maximum number of starts of a server whose port another process took meanwhile.
_MAX_STARTS = 3

Key = tuple[object, ...]


@dataclass
class RunningServer:
    """A server that is ready.

    Attributes:
        key: Which experiments may share it.
        record: Its record in results.
        process: Its process; None if it is attached.
        config: Its section of the study.
        prompts: Number of prompts that it has had.
        experiments: Number of experiments that it has had.
        first: The first of these: its configuration, and its load and metrics; None before it has ended.
    """

    key: Key
    record: ServerRecord
    process: ModelServer | None
    config: ServerConfig
    prompts: int = 0
    experiments: int = 0
    first: tuple[ExperimentConfig, DriftRecord] | None = None

    def job(self, job: Job, drift: DriftRecord | None = None) -> Job:
        """Return *job* as the next experiment on this server.

        Args:
            job: The job.
            drift: The first load, which the experiment measures again; None if it does not.
        """
        next_one = {"position": self.experiments + 1, "first_prompt": self.prompts, "drift": drift}
        return replace(job, server=self.record.model_copy(update=next_one).model_dump(mode="json"))

    def first_before(self, item: pytest.Item) -> tuple[ExperimentConfig, DriftRecord] | None:
        """Return the first of the server's experiments, if that is another one than *item*'s, else None."""
        is_other = self.first is not None and self.first[1].first != experiment_of(item).id
        return self.first if is_other else None

    def conclude(self, item: pytest.Item, outcome: Outcome) -> Outcome:
        """Count an experiment and return its outcome. If it failed, put the server's output on *item*'s report."""
        self.experiments += 1
        if load := outcome.data.get("load"):
            self.prompts += LoadRecord.model_validate(load).prompts
            if self.first_before(item) is None:  # a contended run is repeated, and the last run counts
                experiment = experiment_of(item)
                config = experiment.point.config
                section = config.load.model_dump(mode="json") if config.load is not None else {}
                self.first = config, first_load(experiment.id, section, outcome.data)
        if outcome.error is None or self.process is None:
            return outcome
        output = self.process.output()
        add_server_section(item, output)
        error = outcome.error
        if error.kind == "crash" and self.process.ended_within():
            error = self.process.error().model_copy(update={"phase": error.phase})
        return replace(outcome, error=error, files=_kept(output))

    def is_usable(self) -> bool:
        """Return whether it still runs. True if it is attached."""
        return self.process is None or not self.process.has_ended

    def stop(self) -> None:
        """Stop it, unless it ran before the session."""
        if self.process is not None:
            self.process.stop(self.config.stop.grace_seconds)


class ModelServers:
    """The servers that run in this process's session: one, or one for each side of a comparison."""

    def __init__(self) -> None:
        self._running: dict[Key, RunningServer] = {}

    @classmethod
    def of(cls, config: pytest.Config) -> ModelServers:
        """Return the servers of a pytest session."""
        if _SERVERS not in config.stash:
            config.stash[_SERVERS] = servers = cls()
            config.add_cleanup(servers.stop)
        return config.stash[_SERVERS]

    def are_needed_by(self, item: pytest.Item | None) -> bool:
        """Return whether one of these servers runs that *item*'s experiment can share."""
        if item is None or not needs_server(item):
            return False
        found = self._running.get(key_of(item))
        return found is not None and found.is_usable()

    def get(self, item: pytest.Item, lease: DeviceLease) -> RunningServer | Outcome:
        """Return a server for *item*'s experiment; an outcome with the error if it does not become ready."""
        key = key_of(item)
        found = self._running.get(key)
        if found is not None and found.is_usable():
            return found
        self.stop(key)
        config = experiment_of(item).point.config
        assert config.server is not None
        started = _attach(key, config) if is_attached(config) else self._start(item, key, config, lease)
        if isinstance(started, RunningServer):
            self._running[key] = started
            lease.defer(partial(self.stop, key))
            return started
        add_server_section(item, started.output)
        return replace(started, output="", files=_kept(started.output))

    def get_all(self, items: Sequence[pytest.Item], lease: DeviceLease) -> list[RunningServer] | Outcome:
        """Return a server for each of *items*, which are measured alternately, or the first error."""
        found: list[RunningServer] = []
        for item in items:
            server = self.get(item, lease)
            if isinstance(server, Outcome):
                self.stop()
                return server
            found.append(server)
        return found

    def stop(self, key: Key | None = None) -> None:
        """Stop the server with that *key*; without a key, all."""
        for one in [one for one in self._running if key in (None, one)]:
            self._running.pop(one).stop()

    def _start(
        self, item: pytest.Item, key: Key, config: ExperimentConfig, lease: DeviceLease
    ) -> RunningServer | Outcome:
        for _ in range(_MAX_STARTS):
            started = _start_once(item, key, config, lease, free_port())
            if not _is_port_taken(started):
                break
        return started


def _kept(output: str) -> dict[str, str]:
    """Return the file in which a server's output is kept beside the results, by its suffix."""
    return {"server.txt": output} if output.strip() else {}


def _is_port_taken(started: RunningServer | Outcome) -> bool:
    if isinstance(started, RunningServer) or started.error is None:
        return False
    return started.error.type == PORT_TAKEN or _PORT_TAKEN_TEXT in started.output.lower()


_SERVERS = pytest.StashKey[ModelServers]()


def key_of(item: pytest.Item) -> Key:
    """Return a key that is equal for the experiments that share a server."""
    run = run_of(item)
    return run, study_of_item(item).server_group(experiment_of(item))


def needs_server(item: pytest.Item) -> bool:
    """Return whether *item* is an experiment on a server."""
    return is_experiment(item) and experiment_of(item).point.config.backend == SERVER


def _start_once(
    item: pytest.Item, key: Key, config: ExperimentConfig, lease: DeviceLease, port: int
) -> RunningServer | Outcome:
    server, study = config.server, study_of_item(item)
    assert server is not None
    python = study.server_interpreter
    command = server_command(
        config, port=port, python=str(python or sys.executable), model=_model_location(item, config)
    )
    pytest_pids = [pid] if (pid := controller(item.config)) else []
    environment = _environment(item, config, python, lease.allocation)
    process = ModelServer(command, environment, pytest_pids, _directory(item))
    began, started_at, url = time.monotonic(), now(), f"http://127.0.0.1:{port}"
    if lease.progress is not None:
        lease.progress.show("starting the server")
    ready = server.ready
    try:
        try:
            process.start()
        except OSError as error:
            return Outcome.of_failed_start(error, "server")
        refresh = lease.progress.refresh if lease.progress is not None else lambda: None
        if (problem := process.wait_until_ready(url, ready.path, ready.timeout_seconds, refresh)) is not None:
            output = process.output()
            process.end()
            return Outcome(error=problem, output=output)
    except BaseException:
        process.end()
        raise
    ready_seconds = time.monotonic() - began  # before the packages are asked for
    record = ServerRecord(
        id=uuid.uuid4().hex[:16],
        url=url,
        pid=process.pid,
        supervisor_pid=process.supervisor_pid,
        command=command,
        packages=_packages(python) if runs_python(server) else {},
        started_at=started_at,
        ready_seconds=ready_seconds,
    )
    return RunningServer(key, record, process, server)


def _packages(python: Path | None) -> dict[str, str]:
    """Return versions of the packages that a server may use, found in one way for both sides of a comparison."""
    found = ask(python or Path(sys.executable))
    return {} if isinstance(found, str) else found.packages


def _environment(
    item: pytest.Item, config: ExperimentConfig, python: Path | None, allocation: Allocation
) -> dict[str, str]:
    """Return the environment variables of a server. Its interpreter's folder comes first in ``PATH``."""
    assert config.server is not None
    inherited = {name: value for name, value in os.environ.items() if not (python and name in PYTHON_VARIABLES)}
    folder = (python or Path(sys.executable)).parent
    path = os.pathsep.join([str(folder), inherited.get("PATH", os.defpath)])
    if python is None:  # as pytest imports; the interpreter of a git revision has these folders' counterparts
        found = [*map(str, python_path(item.config)), *filter(None, [inherited.get("PYTHONPATH")])]
        inherited |= {"PYTHONPATH": os.pathsep.join(found)} if found else {}
    # ``python -m`` would import the working tree's code for a reference that has its own.
    safe = {"PYTHONSAFEPATH": "1"} if is_reference(run_of(item)) and _directory(item) is None else {}
    return {**inherited, "PATH": path, **safe, **allocation.environment, **server_env(config.server)}


def _directory(item: pytest.Item) -> Path | None:
    """Return the working directory of a server of a git revision; None for that of pytest.

    ``python -m`` and scripts that are given by relative paths import from there.
    """
    worktree = item.config.stash.get(WORKTREE, None)
    return worktree.counterpart(Path.cwd()) if worktree is not None and is_reference(run_of(item)) else None


def _model_location(item: pytest.Item, config: ExperimentConfig) -> str | None:
    """Return where the server finds its model: a local file or folder, or else the name."""
    if config.model is None:
        return None
    model_path = Settings.from_config(item.config).model_path
    if (file := local_file(config.model, model_path)) is not None:
        return str(file.absolute())
    try:
        source = resolve_model(config.model, model_path, None, download=False)
    except ModelNotFoundError:  # the server may find it
        return config.model
    return source.location


def _attach(key: Key, config: ExperimentConfig) -> RunningServer | Outcome:
    """Return the server that runs already, or why it cannot be measured."""
    server = config.server
    assert server is not None
    assert server.url is not None

    if not is_this_host(server.url):
        why = "is on another host, and energy is measured on this one: run pytest there"
        return Outcome.refused(f"server.url: {server.url} {why}")
    path = server.ready.path
    if not answers(server.url, path):
        what_to_do = "start the server, or correct server.url or server.ready.path"
        return Outcome.refused(f"server.url: {server.url}{path} does not answer with status 200: {what_to_do}")
    pid = listening_process(server.url)
    if (others := other_gpu_user(server, pid)) is not None:
        return Outcome.refused(others)
    return RunningServer(
        key, ServerRecord(id=f"{server.url} {pid}", url=server.url, pid=pid, attached=True), None, server
    )
