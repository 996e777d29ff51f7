"""Workers on other hosts, over a real sshd: files are compared, results travel, and hosts may disappear."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml
from execnet import XSpec

from pytest_llem import StudyResult
from pytest_llem._plugin.shared_state import DECIDED, REPEATED, STOPPED, RemoteSharedState, SharedState, answer
from pytest_llem.execution.remote_workers import RemoteWorkers
from pytest_llem.results.manifest import read_manifest
from pytest_llem.results.manifest_records import Manifest
from tests.conftest import FORKSERVER, NOOP_ENGINE, NOOP_STUDY, OTHER_PLUGINS
from tests.support.environments import ROOT, Environment
from tests.support.processes import gone, wait_until
from tests.support.ssh_server import SshServer, SshUnavailableError

WITHOUT_OTHER_PLUGINS = [option for name in OTHER_PLUGINS for option in ("-p", f"no:{name}")]
OPTIONS = ["-p", "llem", "--dist=load", FORKSERVER, *WITHOUT_OTHER_PLUGINS]


#: An engine of the user's own, beside the study.
ENGINE = "from noop_engine import NoopEngine\n\n\nclass Own(NoopEngine): ...\n"


class Cluster:
    """A controller's folder and hosts, each with an sshd, folders and device leases of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes = folder / "notes"
        self.controller = folder / "controller"
        for name in ("notes", "controller", "leases"):
            (folder / name).mkdir()
        self.servers: dict[str, SshServer] = {}
        self.started: list[subprocess.Popen[str]] = []
        self.ssh_options = ""
        self.change: Callable[[str], str] = str  # of the option for a worker

    def add(self, host: str) -> None:
        (self.folder / host / "keys").mkdir(parents=True, mode=0o700)
        (self.folder / host / "project").mkdir()
        (self.folder / host / "leases").mkdir()
        self.servers[host] = SshServer(self.folder / host / "keys", self.folder / host / "leases")

    def project(self, host: str) -> Path:
        return self.folder / host / "project"

    def write(self, **changes: Any) -> None:
        """Write the study, a dataset and an engine of one's own to the controller and to every host."""
        study = yaml.safe_dump({**NOOP_STUDY, **changes}, sort_keys=False)
        for folder in (self.controller, *map(self.project, self.servers)):
            (folder / "study.yaml").write_text(study)
            (folder / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
            (folder / "prompts.txt").write_text("one\ntwo\n")
            (folder / "own_engine.py").write_text(ENGINE)

    def give_up_soon(self) -> None:
        """Have the controller start a lost worker again at once and no more."""
        (self.controller / "conftest.py").write_text(
            "from pytest_llem.execution import remote_workers\n\nremote_workers.RETRIES_S = (0.0, 0.1)\n"
        )

    def command(self, *options: str, python: str = sys.executable) -> list[str]:
        workers = [one.worker(host, self.project(host), self.ssh_options) for host, one in self.servers.items()]
        return [python, "-m", "pytest", "study.yaml", *OPTIONS, *map(self.change, workers), *options]

    def start(self, *options: str, python: str = sys.executable) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(NOOP_ENGINE), str(ROOT)])
        environment = {**os.environ, "PYTHONPATH": path, "TMPDIR": str(self.folder / "leases")}
        run = subprocess.Popen(
            self.command(*options, python=python),
            cwd=self.controller,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.started.append(run)
        return run

    def finish(self, run: subprocess.Popen[str]) -> str:
        """Return the output of a run that ends by itself."""
        output, _ = run.communicate(timeout=300)
        assert "INTERNALERROR" not in output, output
        return output

    def experiment_on(self, host: str) -> int:
        """Wait for an experiment on a host, and return its process's id."""
        found: list[int] = []

        def look() -> bool:
            notes = {int(note.stem) for note in self.notes.iterdir()}
            found[:] = [pid for pid in notes & self.servers[host].below().keys() if not gone(pid)]
            return bool(found)

        wait_until(look)
        return found[0]

    def manifests(self) -> list[Manifest]:
        """Return the manifests of the runs, the oldest first."""
        found = (self.controller / "results").glob("*/manifest.json")
        return sorted((read_manifest(one.parent) for one in found), key=lambda one: one.started_at)

    def close(self) -> None:
        for run in self.started:
            if run.poll() is None:
                run.kill()
            run.communicate()
        for server in self.servers.values():
            server.stop()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A controller and the hosts ``a`` and ``b``."""
    cluster = Cluster(tmp_path)
    try:
        for host in ("a", "b"):
            try:
                cluster.add(host)
            except SshUnavailableError as error:
                if os.environ.get("CI"):
                    raise
                pytest.skip(str(error))
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def slow_study(cluster: Cluster) -> None:
    """A study of six experiments, each of which can be interrupted while it measures."""
    options = {"report": str(cluster.notes), "seconds": 0.5}
    cluster.write(n=1, noop=options, sweep={"noop.size": [1, 2, 3]})


@pytest.mark.slow
def test_two_hosts_run_a_study_and_only_the_controller_writes(cluster: Cluster) -> None:
    cluster.write(backend="own_engine:Own", dataset="prompts.txt", noop=None, sweep={"n": [1, 2]})
    before = {host: sorted(cluster.project(host).iterdir()) for host in cluster.servers}
    run = cluster.start("-v")
    output = cluster.finish(run)
    assert run.returncode == 0, output
    (manifest,) = cluster.manifests()
    workers = {(one.config_hash, one.worker) for one in manifest.experiments}
    assert len(workers) == len({worker for _, worker in workers}) == 2, "both cycles of a point are on one host"
    assert manifest.completed == 4
    assert "preflight, will fail" not in output
    for host, files in before.items():
        left = [one for one in sorted(cluster.project(host).iterdir()) if one.name != "__pycache__"]
        assert left == files, "neither pytest nor results are copied to a host"


@pytest.mark.slow
def test_controller_needs_no_torch(cluster: Cluster, tmp_path: Path) -> None:
    bare = Environment(tmp_path / "bare", ROOT, NOOP_ENGINE)
    bare.share("pytest-llem", "pytest-xdist")
    assert subprocess.run([bare.python, "-c", "import torch"], capture_output=True, check=False).returncode == 1
    cluster.servers.pop("b").stop()
    tiny = {"backend": "pytorch", "model": "builtin:tiny-llama", "noop": None, "sweep": {"n": [1]}}
    cluster.write(**tiny, execution={"n_cycles": 1})
    run = cluster.start(python=str(bare.python))
    output = cluster.finish(run)
    assert run.returncode == 0, output
    assert "will fail" not in output
    (manifest,) = cluster.manifests()
    assert manifest.completed == 1
    assert "torch" not in manifest.environment["packages"]
    (directory,) = (one for one in (cluster.controller / "results").iterdir() if one.is_dir())
    assert "torch" in StudyResult.load(directory).environment["packages"], "facts are those of the host"


@pytest.mark.slow
@pytest.mark.usefixtures("slow_study")
def test_cut_connection_fails_one_experiment_and_no_other(cluster: Cluster) -> None:
    run = cluster.start("--llem-start-method=spawn")  # the other host would be done before the worker is back
    pid = cluster.experiment_on("a")
    cluster.servers["a"].cut(pid)
    output = cluster.finish(run)
    assert run.returncode == 1
    (manifest,) = cluster.manifests()
    assert (manifest.status, manifest.completed, manifest.failed) == ("completed", 5, 1), output
    (failed,) = (one.error for one in manifest.experiments if one.error is not None)
    assert (failed.kind, failed.type) == ("crash", "WorkerCrash")
    wait_until(lambda: gone(pid))
    assert "gw2" in {one.worker for one in manifest.experiments}, "the worker is started again on its host"


@pytest.mark.slow
@pytest.mark.usefixtures("slow_study")
@pytest.mark.parametrize("returns", [False, True], ids=["for good", "for a second"])
def test_lost_host_does_not_end_the_run(cluster: Cluster, returns: bool) -> None:
    if not returns:
        cluster.give_up_soon()
    run = cluster.start()
    cluster.experiment_on("a")
    cluster.servers["a"].stop()
    if returns:
        cluster.servers["a"].start()
    output = cluster.finish(run)
    assert run.returncode == 1
    (manifest,) = cluster.manifests()
    assert (manifest.status, manifest.completed, manifest.failed) == ("completed", 5, 1), output
    replaced = "--tx ssh=a: the host cannot be reached by ssh: its worker is replaced by another one on --tx ssh=b"
    assert (f"llem: {replaced}" in output) is not returns


@pytest.mark.slow
@pytest.mark.usefixtures("slow_study")
def test_run_without_any_host_left_is_resumed(cluster: Cluster) -> None:
    cluster.give_up_soon()
    run = cluster.start()
    wait_until(lambda: any(one.completed >= 2 for one in cluster.manifests()))
    for server in cluster.servers.values():
        server.stop()
    output = cluster.finish(run)
    assert run.returncode == pytest.ExitCode.INTERRUPTED
    assert "no host is left: --tx ssh=" in output
    (first,) = cluster.manifests()
    assert first.status == "interrupted"
    for server in cluster.servers.values():
        server.start()
    run = cluster.start("--llem-resume")
    output = cluster.finish(run)
    assert run.returncode == 0, output
    manifest = cluster.manifests()[-1]
    assert manifest.completed == 6
    assert sum(one.replayed_from is not None for one in manifest.experiments) == first.completed


@pytest.mark.slow
@pytest.mark.usefixtures("slow_study")
def test_silent_host_is_given_up(cluster: Cluster) -> None:
    """A host without power closes no connection."""
    cluster.ssh_options = "-o ServerAliveInterval=1 -o ServerAliveCountMax=2 -o ConnectTimeout=1 "
    run = cluster.start()
    pid = cluster.experiment_on("a")
    cluster.servers["a"].cut(pid, signal.SIGSTOP)
    output = cluster.finish(run)
    (manifest,) = cluster.manifests()
    assert (manifest.completed, manifest.failed) == (5, 1), output


@pytest.mark.slow
@pytest.mark.usefixtures("slow_study")
def test_terminated_controller_leaves_nothing_on_hosts(cluster: Cluster) -> None:
    run = cluster.start()
    pid = cluster.experiment_on("b")
    workers = [psutil.Process(pid).ppid()]
    run.send_signal(signal.SIGTERM)
    cluster.finish(run)
    assert run.returncode == pytest.ExitCode.INTERRUPTED
    (manifest,) = cluster.manifests()
    assert manifest.status == "interrupted"
    wait_until(lambda: all(map(gone, [pid, *workers])))


def test_missing_and_differing_files_are_named_with_their_host(cluster: Cluster) -> None:
    cluster.write(backend="own_engine:Own", dataset="prompts.txt", noop=None, sweep={"n": [1, 2]})
    (cluster.project("a") / "prompts.txt").write_text("one\nthree\n")
    (cluster.project("b") / "own_engine.py").unlink()
    run = cluster.start()
    output = cluster.finish(run)
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    pytest.LineMatcher(output.splitlines()).fnmatch_lines_random(
        [
            "ERROR: --tx ssh=a: prompts.txt differs from the file here (SHA-256 * there, * here): copy it to *",
            "*--tx ssh=b: own_engine.py missing in */b/project: copy it there, or name the folder: *//chdir=*",
        ]
    )
    assert not (cluster.controller / "results").exists()


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("ssh_config=", "--tx ssh=?: the host cannot be reached by ssh"),
        ("python=", "--tx ssh=?: /none* cannot be started there*//python=PATH names another)"),
    ],
)
def test_unusable_host_is_one_line(cluster: Cluster, part: str, message: str) -> None:
    """Both hosts are unusable, and the first to be reported is named."""
    cluster.write()
    cluster.change = lambda worker: worker.replace(part, f"{part}/none")
    run = cluster.start()
    output = cluster.finish(run)
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    pytest.LineMatcher(output.splitlines()).fnmatch_lines([f"ERROR: {message}"])


def test_comparison_of_interpreters_is_refused(cluster: Cluster) -> None:
    cluster.write()
    run = cluster.start(f"--llem-against={sys.executable}")
    assert "ERROR: --llem-against: cannot be used with workers on other hosts" in cluster.finish(run)
    assert run.returncode == pytest.ExitCode.USAGE_ERROR


class Node:
    """xdist's view of a worker, as far as it is needed to replace it."""

    def __init__(self, host: str) -> None:
        self.gateway = SimpleNamespace(spec=XSpec(f"ssh={host}"))


def test_worker_that_never_was_ready_is_replaced_without_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its host may answer, so that a wait for the host would decide nothing."""
    workers: Any = object.__new__(RemoteWorkers)
    asked: list[str | None] = []
    slept: list[float] = []
    lost = Node("a")

    def problems(spec: XSpec) -> list[str]:
        asked.append(spec.ssh)
        return []

    monkeypatch.setattr(workers, "_problems", problems, raising=False)
    monkeypatch.setattr(time, "sleep", slept.append)
    workers._ready = {Node("b"): None}
    workers._config = SimpleNamespace(pluginmanager=SimpleNamespace(get_plugin=lambda name: None))
    workers.pytest_testnodedown(lost, "no pytest here")
    assert (asked, slept, lost.gateway.spec.ssh) == (["b"], [], "b")


class Connection:
    """A channel whose other end is the controller, in this process."""

    def __init__(self, controller: SharedState) -> None:
        self._controller = controller
        self._reply = ""
        self.asked = 0

    def send(self, request: str) -> None:
        self.asked += 1
        self._reply = answer(self._controller, request)

    def receive(self, timeout: float) -> str:
        return self._reply


def _workers(number: int) -> tuple[SharedState, list[Any]]:
    controller = SharedState()
    connections: list[Any] = [Connection(controller) for _ in range(number)]
    return controller, [RemoteSharedState(one) for one in connections]


def test_values_of_the_session_reach_every_host() -> None:
    controller, (one, other) = _workers(2)
    assert one.read("study", STOPPED) is None
    controller.put("study", STOPPED, "enough")
    assert one.read("study", STOPPED) == "enough"
    one.put("study", f"{DECIDED}-a", [5, "why"])
    assert other.read("study", f"{DECIDED}-a") == [5, "why"]
    assert [worker.claim("study", f"{REPEATED}-a-0") for worker in (one, other)] == [True, False]


@pytest.mark.parametrize("topic", ["idle-context", "used-cpu", "answer"])
def test_values_of_a_host_stay_there(topic: str) -> None:
    controller, (one, other) = _workers(2)
    one.put("key", topic, {"watts": 1})
    assert one.read("key", topic) == {"watts": 1}
    assert other.read("key", topic) is controller.read("key", topic) is None
    assert [worker.claim("", topic) for worker in (one, other)] == [True, True]
    assert one.take("key", topic) == {"watts": 1}
    assert one.read("key", topic) is None


def test_error_of_the_controller_is_an_error_of_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    controller, (one,) = _workers(1)

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(controller, "put", full)
    with pytest.raises(OSError, match="No space left"):
        one.put("study", STOPPED, "enough")
