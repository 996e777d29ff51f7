"""xdist's workers on other hosts (``--tx ssh=HOST``): what they need, what they share, and hosts that disappear.

xdist copies pytest and the folders of ``--rsyncdir`` to such hosts, which is deprecated. Here nothing is copied:
the files that studies need must be there, and are compared by their SHA-256 before anything runs. Results travel
on pytest's reports, so that only the controller writes the results directory.
"""

from __future__ import annotations

import copy
import fnmatch
import hashlib
import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from importlib.machinery import PathFinder
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import execnet
import pytest

from pytest_llem._plugin.declarations import YAML_SUFFIXES
from pytest_llem._plugin.options import Settings
from pytest_llem._plugin.shared_state import answer
from pytest_llem._plugin.stash import REMOTE, SHARED_STATE
from pytest_llem.execution import remote_facts
from pytest_llem.execution.session_facts import import_path
from pytest_llem.gates.baselines import BaselineError, resolve
from pytest_llem.planning.inputs import listed
from pytest_llem.results.environment import package_version
from pytest_llem.study.dataset import FILE_TYPES
from pytest_llem.study.design import StudyConfig
from pytest_llem.study.document import load_document
from pytest_llem.study.loading import load_study, with_base
from pytest_llem.study.problems import StudyError
from pytest_llem.workload.prompts import hub_dataset

if TYPE_CHECKING:
    from xdist.workermanage import WorkerController

#: Options of ssh, behind those of ``--tx``, which take precedence; they override ``ssh_config``. Without them, a
#: host that has lost its power leaves the connection open for hours.
_SSH_OPTIONS = " -o ConnectTimeout=10 -o ServerAliveInterval=15 -o ServerAliveCountMax=3"

#: Pauses before the attempts to reach the host of a lost worker, in s.
RETRIES_S = (0.0, 1.0, 3.0, 6.0)

#: Longest time to wait for a host's answer, in s.
ANSWER_S = 60.0


def is_remote(spec: execnet.XSpec) -> bool:
    """Return whether a worker runs on another host than the controller, or may."""
    return not spec.popen or bool(spec.via)


class RemoteWorkers:
    """Checks hosts that ssh reaches before a run, connects workers to the shared state, and replaces lost ones.

    A plugin of xdist's controller, registered if studies run on other hosts.

    Args:
        config: The controller's configuration.
        specs: The ``--tx`` of each worker.
        studies: Paths of the study files.

    Raises:
        pytest.UsageError: An option cannot be used with workers on other hosts, or a host cannot be reached, or
            does not have what the studies need.
    """

    def __init__(self, config: pytest.Config, specs: Sequence[execnet.XSpec], studies: Sequence[Path]) -> None:
        self._config = config
        self._ready: dict[WorkerController, None] = {}  # an ordered set: all values are None
        if Settings.from_config(config).against is not None:
            raise pytest.UsageError("--llem-against: cannot be used with workers on other hosts (--tx ssh=…)")
        if config.option.rsyncdir or config.getini("rsyncdirs"):
            raise pytest.UsageError("--rsyncdir: studies do not use it: copy the files to each host yourself")
        directory = config.invocation_params.dir
        self._digests = {_path_on_host(path, directory): _digest(path) for path in needed_files(config, studies)}
        config.stash[REMOTE] = True
        by_ssh = [spec for spec in specs if spec.ssh]
        for spec in by_ssh:
            spec.ssh = f"{spec.ssh}{_SSH_OPTIONS}"
        with ThreadPoolExecutor(len(by_ssh) or 1) as pool:
            found = dict.fromkeys(chain.from_iterable(pool.map(self._problems, by_ssh)))
        if found:
            raise pytest.UsageError(*found)
        self._pass_arguments(specs)

    def _pass_arguments(self, specs: Sequence[execnet.XSpec]) -> None:
        """Pass pytest's arguments to the workers in their environment.

        xdist would refuse arguments that are files, unless it has copied them.
        """
        config, directory = self._config, self._config.invocation_params.dir
        arguments = shlex.split(os.environ.get("PYTEST_ADDOPTS", ""))  # which workers here would inherit
        for argument in map(str, config.invocation_params.args):
            path, *rest = argument.split("::")
            is_inside = Path(path).is_absolute() and Path(path).is_relative_to(directory)
            arguments.append("::".join([_path_on_host(Path(path), directory) if is_inside else path, *rest]))
        if not all(spec.popen for spec in specs):
            for spec in specs:
                spec.env["PYTEST_ADDOPTS"] = shlex.join(arguments)
            config.invocation_params = replace(config.invocation_params, args=())
            xdist_session: Any = config.pluginmanager.get_plugin("dsession")
            xdist_session.nodemanager.roots.clear()  # it would copy pytest into the workers' folders

    def _problems(self, spec: execnet.XSpec) -> list[str]:
        """Return why a worker cannot run on a host, one line for each reason; empty if it can."""
        group = execnet.Group(execmodel="main_thread_only")
        fresh = copy.copy(spec)
        fresh.id, fresh.env = None, {}
        try:
            channel = group.makegateway(fresh).remote_exec(remote_facts)
            channel.send([*self._digests])
            facts: Mapping[str, Any] = channel.receive(ANSWER_S)
        except execnet.HostNotFound:
            return [f"{_name(spec)}: the host cannot be reached by ssh"]
        except (EOFError, OSError, execnet.RemoteError) as error:
            python = spec.python or "python"
            what = f"{python} cannot be started there, or does not answer{_reason(error)}"
            return [f"{_name(spec)}: {what} (…//python=PATH names another)"]
        finally:
            group.terminate(timeout=1.0)
        return [f"{_name(spec)}: {problem}" for problem in _differences(self._digests, facts)]

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: WorkerController) -> None:
        if not is_remote(node.gateway.spec):
            return
        channel = node.gateway.newchannel()
        channel.setcallback(lambda request: channel.send(answer(self._config.stash[SHARED_STATE], request)))
        node.workerinput["llem_channel"] = channel

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodeready(self, node: WorkerController) -> None:
        self._ready[node] = None

    @pytest.hookimpl(optionalhook=True, tryfirst=True)
    def pytest_testnodedown(self, node: WorkerController, error: object) -> None:
        """Have xdist replace a lost worker on a ready one's host, if it never was ready or its host is lost."""
        was_ready = self._ready.pop(node, False) is None
        spec = node.gateway.spec
        if not error or not spec.ssh or error == "keyboard-interrupt":
            return
        if not was_ready and not self._ready:
            raise pytest.UsageError(f"{_name(spec)}: the worker did not start{_reason(error)}")
        problems: list[str] = []
        for seconds in RETRIES_S if was_ready else ():
            time.sleep(seconds)
            if not (problems := self._problems(spec)):
                return
        reason = "; ".join(problems) or f"{_name(spec)}: the worker did not start{_reason(error)}"
        others = {one.gateway.spec.ssh: one.gateway.spec for one in self._ready}
        found = next((one for host, one in others.items() if host != spec.ssh and not self._problems(one)), None)
        if found is None:
            pytest.exit(f"no host is left: {reason} (--llem-resume continues the run)")
        node.gateway.spec = copy.copy(found)
        reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            replaced = f"its worker is replaced by another one on {_name(node.gateway.spec)}"
            reporter.write_line(f"\nllem: {reason}: {replaced}", yellow=True)


def _differences(files: Mapping[str, str], facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a host does not have, given the digests of *files* here and the *facts* of the host."""
    for package, version in facts["packages"].items():
        if version is None:
            yield f"{package} is not installed for {facts['python']}"
    there, here = facts["packages"]["pytest-llem"], package_version("pytest-llem")
    if there is not None and there != here:
        yield f"pytest-llem {there} is installed there, and {here} here: install the same version"
    digests = facts["digests"]
    if missing := [name for name in files if digests[name] is None]:
        where = f"missing in {facts['folder']}"
        yield f"{listed(missing)} {where}: copy it there, or name the folder: …//chdir=FOLDER"
    if different := [name for name in files if digests[name] not in (None, files[name])]:
        first = different[0]
        yield (
            f"{listed(different)} differs from the file here (SHA-256 {digests[first][:12]} there, "
            f"{files[first][:12]} here): copy it to {facts['folder']}"
        )


def _reason(error: object) -> str:
    """Return the last line of an error with a colon before it; nothing if it has no text."""
    line = str(error).strip().rpartition("\n")[2]
    return f": {line}" if line else ""


def _name(spec: execnet.XSpec) -> str:
    """Return a worker's ``--tx`` up to the host, for messages."""
    if not spec.ssh:
        return "this host"
    return f"--tx ssh={spec.ssh.removesuffix(_SSH_OPTIONS)}"


def _path_on_host(path: Path, directory: Path) -> str:
    """Return *path* on a worker's host: relative to the worker's folder if it is below *directory* here."""
    return str(path.relative_to(directory)) if path.is_relative_to(directory) else str(path)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def study_files(config: pytest.Config) -> list[Path]:
    """Return the study files that pytest's arguments name, or that are in folders which they name."""
    patterns, excluded = config.getini("llem_files"), config.getini("norecursedirs")
    found: dict[Path, None] = {}
    for argument in config.args:
        path = config.invocation_params.dir / argument.partition("::")[0]
        if path.suffix in YAML_SUFFIXES:
            found[path] = None
        for folder, folders, names in os.walk(path):
            folders[:] = [one for one in folders if not _matches(one, excluded)]
            found |= {Path(folder, name): None for name in sorted(names) if _matches(name, patterns)}
    return list(found)


def needed_files(config: pytest.Config, studies: Sequence[Path]) -> list[Path]:
    """Return the *studies* and the existing files that they read.

    These are the file of ``base``, datasets, traces, engines and the baseline.
    """
    found: dict[Path, None] = {}
    for path in studies:
        found[path] = None
        with suppress(StudyError, OSError):  # which the workers report
            found |= dict.fromkeys(_files_of(config, path))
    found |= dict.fromkeys(_baseline_files(config))
    return [path for path in found if path.is_file()]


def _files_of(config: pytest.Config, path: Path) -> Iterator[Path]:
    document = load_document(path)
    if isinstance(document.data, dict) and (base := with_base(document)[0].base) is not None:
        yield base.path
    study = load_study(path, Settings.from_config(config).overrides)
    for dataset in {str(point.config.dataset) for point in study.points if point.config.has_texts}:
        if hub_dataset(dataset, path.parent) is None and Path(dataset).suffix in FILE_TYPES:
            yield path.parent / Path(dataset).expanduser()
    for load in (point.config.load for point in study.points):
        if load is not None and load.trace is not None:
            yield path.parent / load.trace
    yield from _engine_files(config, study)


def _engine_files(config: pytest.Config, study: StudyConfig) -> Iterator[Path]:
    """Yield the files of engines in the user's own modules. Results record the versions of packages."""
    folders = [str(folder) for folder in import_path(config)]
    for backend in {point.config.backend for point in study.points if ":" in point.config.backend}:
        spec = PathFinder.find_spec(backend.partition(":")[0].partition(".")[0], folders)
        if spec is None:
            continue
        for folder in spec.submodule_search_locations or ():
            yield from sorted(Path(folder).rglob("*.py"))
        if not spec.submodule_search_locations and spec.origin is not None:
            yield Path(spec.origin)


def _baseline_files(config: pytest.Config) -> list[Path]:
    settings = Settings.from_config(config)
    if settings.baseline is None:
        return []
    with suppress(BaselineError):  # which the workers report
        path = resolve(settings.baseline, settings.baseline_dir)
        return sorted(path.rglob("*.json")) if path.is_dir() else [path]
    return []


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
