from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import pkgutil
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from xdist import workermanage

import pytest_llem
from pytest_llem.isolation.forkserver_client import ForkServers
from pytest_llem.isolation.launcher import Job, run_isolated
from pytest_llem.isolation.outcome import Outcome
from pytest_llem.results.experiment import ExperimentResult
from pytest_llem.study.config import ExperimentConfig
from tests.support import nvml, weights
from tests.support.hub import Hub

# huggingface_hub looks at it once, when it is imported, which a test module may do before any test runs.
os.environ["HF_HUB_OFFLINE"] = "1"

# A shell without job control has what it starts in the background ignore Ctrl-C, and nohup has it ignore that the
# terminal is gone: so would all that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

#: Runs pytest with options; ``files`` are what it collects.
RunPytest = Callable[..., pytest.RunResult]

#: Writes a study of the engine ``noop`` with changed fields, and returns its path.
WriteStudy = Callable[..., Path]

ROOT = Path(__file__).parent.parent
NOOP_ENGINE = Path(__file__).parent / "support" / "noop_engine"

#: Plugins of the test environment, by the names of their entry points. Hypothesis's alone takes a second, since it
#: imports all of Hypothesis at the end of each run.
OTHER_PLUGINS = ("randomly", "random_order", "rerunfailures", "timeout", "hypothesispytest", "anyio")

#: Forks the experiments of a run: at a fraction of the cost of a fresh start, which is the default.
FORKSERVER = "--llem-start-method=forkserver"

# What a test starts compiles each module once, also where PYTHONDONTWRITEBYTECODE is set for the tests themselves.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# pytester forgets what a run of pytest in this process imports, but an extension module cannot be imported twice.
# So whatever a controller may import is imported here.
for _name in (
    *(module.name for module in pkgutil.walk_packages(pytest_llem.__path__, "pytest_llem.")),
    "numpy",
    "scipy.stats",
    "pandas",
):
    if not re.search(r"pytest_llem\.(engines|measurement)\.|__main__", _name):
        with contextlib.suppress(ImportError):  # of an extra that is not installed
            importlib.import_module(_name)

# No file of a test has to survive a power failure, and waiting for the disk takes half the time of a run in this
# process: a manifest is flushed at each transition of an experiment.
os.fsync = lambda fd: None

NOOP_STUDY = {
    "name": "noop",
    "model": "none",
    "backend": "noop",
    "n": 2,
    "max_input_tokens": 4,
    "max_output_tokens": 3,
    "warmup": {"enabled": False},
    "measurement": {"min_window_seconds": 0},
    "energy": {"backend": "estimate"},
    "sweep": {"precision": ["bf16", "fp32"], "noop.size": [1, 2]},
    "execution": {"n_cycles": 2},
}


#: Variables of the outer run that the runs inside tests must not inherit.
_OUTER_VARIABLES = ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "GITHUB_ACTIONS")


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_xdist_auto_num_workers() -> Generator[None, int, int]:
    """Have three workers on two cores with ``-n auto``: half of its time, a test waits for a clock or process."""
    count = yield
    return count if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ else count * 3 // 2


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """End the runs of pytest that a failed test has left: they may hold device leases, for which others wait."""
    report = yield
    if report.failed:
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if "pytest" in child.cmdline():
                    child.kill()
    return report


@pytest.fixture(scope="session")
def temporary_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for temporary files of this run only, because device leases are kept in it."""
    return tmp_path_factory.mktemp("tmp")


@pytest.fixture(autouse=True)
def _own_devices(monkeypatch: pytest.MonkeyPatch, temporary_files: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(temporary_files))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary_files))


@pytest.fixture(scope="session")
def user_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for caches of this run only; pytester's HOME would be empty in each test."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, user_cache: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(user_cache))


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in _OUTER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def pytester(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """pytest's fixture without other plugins; tests/test_other_plugins.py enables them."""
    monkeypatch.setenv("PYTEST_ADDOPTS", " ".join(f"-p no:{name}" for name in OTHER_PLUGINS))
    return pytester


@pytest.fixture
def run_pytest(pytester: pytest.Pytester) -> RunPytest:
    """Run pytest with the plugin, on ``study.yaml`` unless *files* are given.

    It runs in this process, at a tenth of the cost of a subprocess, and its experiments are forked.
    """

    def run(*options: str | Path, files: Sequence[str | Path] = ("study.yaml",)) -> pytest.RunResult:
        return pytester.runpytest_inprocess(*files, "-p", "llem", FORKSERVER, *options)

    return run


@pytest.fixture(params=[(), pytest.param(("-n", "1"), marks=pytest.mark.slow)], ids=["serial", "xdist"])
def workers(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Options without and with xdist, for tests of the controller, for which one worker is enough."""
    options: tuple[str, ...] = request.param
    return options


@pytest.fixture
def noop_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the engine ``noop`` for this process and its children."""
    monkeypatch.syspath_prepend(NOOP_ENGINE)
    inherited = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(NOOP_ENGINE), inherited])))
    # The sys.path of workers, which xdist copies when it is imported.
    monkeypatch.setattr(workermanage, "_sys_path", list(sys.path))


@pytest.fixture
def job(noop_engine: None) -> Callable[..., Job]:
    """Return a function that makes a job for the engine ``noop`` with given options."""

    def make(python: str | None = None, **options: Any) -> Job:
        fields = {k: v for k, v in NOOP_STUDY.items() if k not in ("name", "sweep", "execution")}
        config = ExperimentConfig.model_validate({**fields, "noop": options})
        identity = {"experiment_id": "one", "config_hash": "0" * 16}
        return Job(identity, config.model_dump(mode="json"), directory=".", python=python)

    return make


#: Ways to start an experiment's process.
START_METHODS = ("spawn", "forkserver")


@pytest.fixture(params=START_METHODS)
def start_method(request: pytest.FixtureRequest) -> str:
    """Each start method of experiment processes, for tests that apply to all."""
    return str(request.param)


@pytest.fixture
def servers(start_method: str) -> Iterator[ForkServers | None]:
    """Forkservers; None if processes are spawned."""
    servers = ForkServers() if start_method == "forkserver" else None
    yield servers
    if servers is not None:
        servers.end()


@pytest.fixture
def run(servers: ForkServers | None) -> Callable[..., Outcome]:
    """Return a function that runs a job in a new process, with each start method."""
    return functools.partial(run_isolated, forkservers=servers)


@pytest.fixture
def write_study(pytester: pytest.Pytester, noop_engine: None) -> WriteStudy:
    """Return a function that writes a study of the engine ``noop`` with changed fields; None removes a field."""

    def write(name: str = "study.yaml", /, **changes: Any) -> Path:
        data = {key: value for key, value in {**NOOP_STUDY, **changes}.items() if value is not None}
        path = pytester.path / name
        path.write_text(yaml.safe_dump(data, sort_keys=False))
        return path

    return write


class Results:
    """Results of a run under ``results``."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def directory(self) -> Path:
        """The only results directory."""
        (directory,) = [path for path in self.root.iterdir() if path.is_dir()]
        return directory

    def read(self, name: str) -> dict[str, Any]:
        data = json.loads((self.directory / name).read_text())
        assert isinstance(data, dict)
        return data

    @property
    def manifest(self) -> dict[str, Any]:
        return self.read("manifest.json")

    @property
    def study_result(self) -> dict[str, Any]:
        return self.read("study_result.json")

    def experiments(self) -> list[ExperimentResult]:
        """Return the saved results of experiments, in run order."""
        files = [entry["result_file"] for entry in self.manifest["experiments"]]
        return [ExperimentResult.model_validate(self.read(file)) for file in files if file is not None]

    def statuses(self) -> Mapping[str, str]:
        return {entry["experiment_id"]: entry["status"] for entry in self.manifest["experiments"]}


@pytest.fixture
def results(pytester: pytest.Pytester) -> Results:
    return Results(pytester.path / "results")


@pytest.fixture(scope="session")
def finished_results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of a finished run of the study that ``write_study()`` writes, for tests to copy."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "study.yaml").write_text(yaml.safe_dump(NOOP_STUDY, sort_keys=False))
    plugins = [option for name in OTHER_PLUGINS for option in ("-p", f"no:{name}")]
    options = ["--rootdir=.", FORKSERVER, "--llem-run-id=finished"]
    environment = {name: value for name, value in os.environ.items() if name not in _OUTER_VARIABLES}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(NOOP_ENGINE), os.environ.get("PYTHONPATH")]))
    subprocess.run(
        [sys.executable, "-m", "pytest", "study.yaml", "-p", "llem", *plugins, *options],
        cwd=folder,
        env={**environment, "TMPDIR": str(folder)},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return folder / "results" / "noop_finished"


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an NVML library with scripted GPUs."""
    try:
        return nvml.build(tmp_path_factory.mktemp("nvml"))
    except nvml.BuildError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"scripted_nvml.c cannot be built: {error}")


@pytest.fixture
def cuda_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch look like a CUDA build in new processes."""
    metadata = tmp_path / "cuda" / "torch-2.11.0+cu128.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.11.0+cu128\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "cuda"), prepend=os.pathsep)


@pytest.fixture
def online(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Make processes use a module's ``hub`` and a cache of their own. Offline processes use the same cache."""
    environment = hub.environment(tmp_path / "hf")
    for name in [name for name in os.environ if name.startswith("HF_")]:
        monkeypatch.delenv(name)
    for name in ("HF_ENDPOINT", "HF_HOME", "NO_PROXY"):
        monkeypatch.setenv(name, environment[name])
    return hub


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """A folder for ``llem_model_path`` that holds real weights."""
    try:
        return weights.model_path()
    except weights.WeightsUnavailableError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"real weights are not available: {error}")
