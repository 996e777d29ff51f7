"""The environment in a result: what it contains, its sources, and what it must never contain."""

from __future__ import annotations

import getpass
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_llem.hardware import nvml
from pytest_llem.hardware.environment import environment
from pytest_llem.results import environment as host
from pytest_llem.results.environment import cpu_model, is_virtual, processor
from pytest_llem.results.git import working_tree
from tests.conftest import Results, WriteStudy


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A git repository with one commit, whose names must not be in results."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    folder = tmp_path / "repository"
    folder.mkdir()

    def git(*arguments: str) -> str:
        named = ("-c", "user.name=Ann Author", "-c", "user.email=ann@example.org")
        done = subprocess.run(["git", *named, *arguments], cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q", "-b", "secret-branch")
    git("remote", "add", "origin", "https://user:secret-token@example.org/secret-remote.git")
    (folder / "file").write_text("one")
    git("add", "file")
    git("commit", "-q", "-m", "secret message")
    return SimpleNamespace(folder=folder, git=git)


class TestGit:
    def test_clean_and_dirty_working_tree(self, repository: SimpleNamespace) -> None:
        commit = repository.git("rev-parse", "HEAD")
        assert working_tree(repository.folder) == {"commit": commit, "dirty": False}
        (repository.folder / "untracked").touch()
        assert working_tree(repository.folder) == {"commit": commit, "dirty": False}
        (repository.folder / "below").mkdir()
        (repository.folder / "file").write_text("two, and longer")
        assert working_tree(repository.folder / "below") == {"commit": commit, "dirty": True}
        repository.git("checkout", "-q", "--detach")
        repository.git("checkout", "-q", "file")
        assert working_tree(repository.folder) == {"commit": commit, "dirty": False}

    def test_repository_before_its_first_commit(self, repository: SimpleNamespace, tmp_path: Path) -> None:
        (tmp_path / "new").mkdir()
        subprocess.run(["git", "init", "-q"], cwd=tmp_path / "new", check=True)
        assert working_tree(tmp_path / "new") == {"commit": None, "dirty": False}

    def test_folder_outside_of_a_repository(
        self, repository: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
        (tmp_path / "elsewhere").mkdir()
        assert working_tree(tmp_path / "elsewhere") is None
        monkeypatch.setenv("GIT_DIR", str(repository.folder / ".git"))
        found = working_tree(tmp_path / "elsewhere")
        assert found is not None
        assert found["commit"] == repository.git("rev-parse", "HEAD")

    def test_without_git_there_is_no_working_tree(
        self, repository: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", "/nowhere")
        assert working_tree(repository.folder) is None
        assert host.host_environment(repository.folder)["git"] is None
        assert working_tree(repository.folder / "nowhere") is None

    def test_git_that_hangs_is_not_waited_for(
        self, repository: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        finished = tmp_path / "finished"
        (tmp_path / "git").write_text(f"#!/bin/sh\nsleep 30 >/dev/null 2>&1\ntouch {finished}\n")
        (tmp_path / "git").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        assert working_tree(repository.folder, seconds=0.3) is None
        assert not finished.exists()


class TestProcessor:
    @pytest.fixture
    def machine(self, tmp_path: Path) -> Callable[..., Path]:
        """Create a machine's file tree from the texts of its files."""

        def make(**texts: str) -> Path:
            for name, text in texts.items():
                file = tmp_path / name.replace("__", "/")
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text)
            return tmp_path

        return make

    def test_processor_facts_are_read(self, machine: Callable[..., Path]) -> None:
        cpus = "sys__devices__system__cpu__"
        root = machine(
            **{
                "proc__cpuinfo": "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu hypervisor sse\n",
                f"{cpus}cpufreq__policy0__scaling_governor": "performance\n",
                f"{cpus}cpufreq__policy1__scaling_governor": "powersave\n",
                f"{cpus}cpufreq__policy2__scaling_governor": "performance\n",
                f"{cpus}cpufreq__boost": "0\n",
                f"{cpus}cpu0__cpufreq__scaling_driver": "acpi-cpufreq\n",
                f"{cpus}cpu0__cpufreq__scaling_min_freq": "1500000\n",
                f"{cpus}cpu0__cpufreq__scaling_max_freq": "3700000\n",
                f"{cpus}smt__active": "1\n",
            }
        )
        found = processor(root)
        assert found.pop("cpu_count") == os.cpu_count()
        assert found.pop("cpus_allowed") == len(os.sched_getaffinity(0))
        assert found == {
            "cpu_model": "Some CPU",
            "cpu_governor": "performance, powersave",
            "cpu_frequency_driver": "acpi-cpufreq",
            "cpu_energy_preference": None,
            "cpu_min_mhz": 1500.0,
            "cpu_max_mhz": 3700.0,
            "cpu_boost": False,
            "smt": True,
        }
        assert is_virtual(root) is True

    def test_missing_processor_facts_are_none(self, machine: Callable[..., Path]) -> None:
        found = processor(machine(proc__cpuinfo="BogoMIPS : 50\n"))
        assert {name for name, value in found.items() if value is None} >= {"cpu_governor", "cpu_boost", "smt"}
        assert cpu_model(machine()) == (platform.processor() or None)
        assert is_virtual(machine()) is None
        assert processor(machine(sys__devices__system__cpu__intel_pstate__no_turbo="1"))["cpu_boost"] is False


class TestVariables:
    def test_only_listed_variables_without_paths_are_recorded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in host.VARIABLES:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True,max_split_size_mb:128")
        monkeypatch.setenv("OMP_PLACES", "/home/ann")
        monkeypatch.setenv("KMP_AFFINITY", "a" * 201)
        monkeypatch.setenv("HF_TOKEN", "secret")
        assert host.variables() == {
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            "PYTORCH_ALLOC_CONF": "expandable_segments:True,max_split_size_mb:128",
        }


class FakeNvml:
    """The part of pynvml that the environment uses; a missing function is one that the driver does not support."""

    class NVMLError(Exception):
        value: int

    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2
    NVML_ERROR_NOT_SUPPORTED, NVML_ERROR_FUNCTION_NOT_FOUND = 3, 13

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlShutdown(self) -> None:  # noqa: N802
        pass

    def __getattr__(self, name: str) -> Any:
        answers = {
            "nvmlSystemGetCudaDriverVersion": lambda: 13010,
            "nvmlSystemGetDriverVersion": lambda: "580.1",
            "nvmlDeviceGetHandleByUUID": lambda uuid: uuid if uuid == "GPU-1" else self.fail(),
            "nvmlDeviceGetName": lambda handle: "Some GPU",
            "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(total=80_000_000_000),
            "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 500_000,
            "nvmlDeviceGetPowerManagementDefaultLimit": lambda handle: 700_000,
            "nvmlDeviceGetPersistenceMode": lambda handle: 1,
            "nvmlDeviceGetEccMode": lambda handle: [1, 0],
            "nvmlDeviceGetMigMode": lambda handle: self.fail(),
            "nvmlDeviceGetClockInfo": lambda handle, kind: {1: 345, 2: 2619}[kind],
            "nvmlDeviceGetMaxClockInfo": lambda handle, kind: {1: 1980, 2: 2619}[kind],
            "nvmlDeviceGetCurrPcieLinkWidth": lambda handle: 16,
            "nvmlDeviceGetMaxPcieLinkGeneration": lambda handle: 5,
        }
        try:
            return answers[name]
        except KeyError:
            raise AttributeError(name) from None

    def fail(self) -> None:
        error = self.NVMLError("Not Supported")
        error.value = self.NVML_ERROR_NOT_SUPPORTED
        raise error


def test_gpu_facts_come_from_nvml(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    found = environment(["GPU-1", "GPU-2"], tmp_path)
    assert found["cuda_driver"] == "13.1"
    first, second = found["gpus"]
    assert first == {
        "uuid": "GPU-1",
        "name": "Some GPU",
        "driver": "580.1",
        "power_limit_w": 500.0,
        "default_power_limit_w": 700.0,
        "memory_mb": 80_000,
        "persistence_mode": True,
        "ecc_mode": True,
        "mig_mode": None,
        "sm_clock_mhz": 345,
        "memory_clock_mhz": 2619,
        "max_sm_clock_mhz": 1980,
        "max_memory_clock_mhz": 2619,
        "application_sm_clock_mhz": None,
        "application_memory_clock_mhz": None,
        "pcie_generation": 5,
        "pcie_width": 16,
    }
    assert second == {"uuid": "GPU-2", "nvml": "nvmlDeviceGetHandleByUUID: Not Supported"}
    assert nvml.Nvml().error is None


def test_error_still_says_why_nvml_could_not_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with nvml.Nvml() as opened:
        reason = opened.error
        assert opened.ask("nvmlDeviceGetCount") is None
    assert opened.error == reason
    assert "pynvml" in str(reason)


def test_nvml_is_not_loaded_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = environment([], tmp_path)
    assert (found["gpus"], found["cuda_driver"]) == ([], None)
    assert "GPU-1" in json.dumps(environment(["GPU-1"], tmp_path)["gpus"])


# ---- whole runs ----

SECRETS = {
    "HOSTNAME": "secret-host",
    "USER": "secret-user",
    "LOGNAME": "secret-user",
    "HF_TOKEN": "hf_secret-token",
    "GITHUB_TOKEN": "secret-token",
    "OMP_PLACES": "/home/secret-user/places",
}


RunStudy = Callable[..., pytest.RunResult]


@pytest.fixture
def run(
    pytester: pytest.Pytester,
    write_study: WriteStudy,
    repository: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    results: Results,
) -> RunStudy:
    """Run the study in a repository, with many variables set that no result may contain."""

    def inside(conftest: str = "", **changes: Any) -> pytest.RunResult:
        (repository.folder / ".git").rename(pytester.path / ".git")
        home = pytester.path / "secret-home"
        home.mkdir()
        monkeypatch.setenv("HOME", str(home))
        for name, value in SECRETS.items():
            monkeypatch.setenv(name, value)
        pytester.makeconftest(conftest)
        pytester.makeini("[pytest]\n")
        write_study(**{"sweep": None, "execution": {"n_cycles": 1}, **changes})
        return pytester.runpytest_inprocess("study.yaml", "-p", "llem")

    return inside


def test_results_hold_the_commit_and_no_name_path_or_token(
    run: RunStudy, results: Results, pytester: pytest.Pytester
) -> None:
    run().assert_outcomes(passed=1)
    secrets = {"secret", getpass.getuser(), platform.node(), str(pytester.path), str(Path.home())} - {"root", ""}
    written = [file for file in results.directory.rglob("*") if file.is_file()]
    assert {"manifest.json", "study_result.json", "study.yaml"} <= {file.name for file in written}
    for file in written:
        text = file.read_text()
        found = {secret for secret in secrets if re.search(rf"(?<!\w){re.escape(secret)}(?!\w)", text)}
        assert found == set(), file.name
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=pytester.path, capture_output=True, text=True, check=True
    ).stdout.strip()
    [experiment] = (results.directory / "experiments").glob("*.json")
    for data in (results.manifest, results.study_result, json.loads(experiment.read_text())):
        assert data["environment"]["git"] == {"commit": commit, "dirty": True}, "its one file is not there"


def test_hook_adds_to_the_environment(run: RunStudy, results: Results) -> None:
    hook = """
        def pytest_llem_environment(environment):
            assert environment["python"]
            environment["rack"] = {"inlet_c": 21.5}
    """
    run(hook).assert_outcomes(passed=1)
    assert results.manifest["environment"]["rack"] == {"inlet_c": 21.5}
    assert results.study_result["environment"]["rack"] == {"inlet_c": 21.5}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise ValueError('no thermometer')", "pytest_llem_environment: ValueError: no thermometer"),
        ("pytest.fail('no thermometer')", "pytest_llem_environment: no thermometer"),
        ("environment['x'] = object()", "pytest_llem_environment: TypeError: Object of type object is not JSON *"),
        ("environment['x'] = float('nan')", "pytest_llem_environment: ValueError: *JSON*"),
    ],
)
def test_failing_hook_ends_the_session_before_it_begins(
    run: RunStudy, pytester: pytest.Pytester, body: str, message: str
) -> None:
    result = run(f"import pytest\n\ndef pytest_llem_environment(environment):\n    {body}\n")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {message}"])
    assert not (pytester.path / "results").exists()
