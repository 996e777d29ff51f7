"""Test ``llem doctor``: its findings on all kinds of machines, its output, and that it never hangs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import psutil
import pytest

from pytest_llem import cli
from pytest_llem.doctor import gpus, host, software
from pytest_llem.doctor.examine import used_gpus
from pytest_llem.doctor.findings import findings
from pytest_llem.doctor.records import Driver, Examination, GpuReport
from pytest_llem.hardware.cgroups import cpu_limit, memory_limit_bytes
from pytest_llem.machine.owner import FOLDER, Owner, note_file
from pytest_llem.reporting.terminal.doctor import lines as table_of
from pytest_llem.results.environment import processor as processor_facts
from tests.conftest import ROOT
from tests.support import nvml
from tests.support.marks import slow
from tests.support.powercap import Powercap, add
from tests.support.processes import gone, wait_until

A, B = "GPU-aaaaaaaa-0000-0000-0000-000000000001", "GPU-bbbbbbbb-0000-0000-0000-000000000002"
H100 = {
    "name": "NVIDIA H100 80GB HBM3",
    "memory_mb": 81_559,
    "power_limit_w": 650,
    "default_limit_w": 700,
    "tick_ms": 10,
    "max_sm_clock": 1980,
    "clocks": "345 1980 15",
    "reasons": 1,
    "persistence": 1,
}
SENSORS = ["sm_clock 0 345", "temperature 0 34"]

#: The command that queries NVML.
COMMAND = (sys.executable, "-P", "-m", "pytest_llem.doctor.gpus")

#: What is missing for the engine vllm, which the environment of the tests does not have.
VLLM_NEEDS = f"needs vllm: {sys.executable} -m pip install 'pytest-llem[vllm]'"

#: Imports an engine; tests replace it by default.
IMPORT = software._IMPORT

#: Reports what an engine's import would, without the time that importing torch takes.
_QUICK = "import json; print('\\n' + {!r} + json.dumps({}))"


#: Adds scripted GPUs to this machine, and returns their script.
AddGpus = Callable[..., nvml.Script]

#: Runs ``llem doctor`` with arguments, and returns its exit status and what it found.
Doctor = Callable[..., tuple[int, Any]]


def scripted_gpu(uuid: Any = A, *, used_mb: int = 500, rules: Any = (), **more: Any) -> Any:
    lines = {key: value for key, value in {**H100, **more}.items() if value is not None}
    return nvml.ScriptedGpu(uuid, [(0.0, 70.0)], lines, [(0.0, used_mb)], [*SENSORS, *rules])


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle machine with one engine and a CUDA build of torch; no driver, no RAPL, no container."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LLEM_POWERCAP_ROOT", str(tmp_path / "powercap"))
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(host, "is_virtual", lambda: False)
    monkeypatch.setattr("pytest_llem.doctor.host.container", lambda: None)
    monkeypatch.setattr(gpus, "_NVIDIA_PATHS", ("no/sign",))
    # The versions of all packages would take half the time of an examination.
    monkeypatch.setattr("pytest_llem.isolation.interpreter.PACKAGES", ("pytest-llem",))
    # The GPUs of this machine, if it has any, must not be found.
    monkeypatch.setattr(gpus, "COMMAND", (sys.executable, "-c", 'print(\'{"driver": {"error": "no NVML"}}\')'))
    imports(monkeypatch, torch_cuda="12.8")
    torch(tmp_path, monkeypatch, "2.11.0+cu128")


def torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: Any) -> None:
    """Install metadata of torch in that version."""
    install(tmp_path, monkeypatch, "torch", version)


def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, version: str) -> None:
    """Install metadata of a distribution."""
    metadata = tmp_path / f"site-{name}-{version}" / f"{name}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(metadata.parents[1])


def imports(monkeypatch: pytest.MonkeyPatch, **report: Any) -> None:
    """Replace the import of each engine by a report."""
    monkeypatch.setattr(software, "_IMPORT", _QUICK.format(software._MARKER, {"error": None} | report))


@pytest.fixture
def add_gpus(nvml_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AddGpus:
    """Return a function that adds scripted GPUs to this machine."""

    def put(*scripted: Any, **more: Any) -> Any:
        monkeypatch.setattr(gpus, "COMMAND", COMMAND)
        return nvml.install(monkeypatch, nvml_library, nvml.Script(tmp_path / "script", list(scripted), **more))

    return put


@pytest.fixture(scope="module")
def answer_of_one_gpu(nvml_library: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The output of the NVML query with one idle GPU."""
    script = nvml.Script(tmp_path_factory.mktemp("gpu") / "script", [scripted_gpu()])
    script.write()
    env = nvml.environment(nvml_library, script)
    return subprocess.run(COMMAND, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout


@pytest.fixture
def one_gpu(answer_of_one_gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One idle GPU with a recorded answer, for tests that are not about GPUs."""
    command = (sys.executable, "-I", "-S", "-c", f"print({answer_of_one_gpu!r})")
    monkeypatch.setattr(gpus, "COMMAND", command)


@pytest.fixture
def powercap(tmp_path: Path) -> Powercap:
    return Powercap(tmp_path / "powercap")


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str]) -> Doctor:
    """Return a function that runs ``llem doctor --format json`` and returns its exit status and Examination."""

    def run(*arguments: Any) -> Any:
        status = cli.main(["doctor", "--format", "json", *arguments])
        out, err = capsys.readouterr()
        assert err == ""
        return status, Examination.model_validate_json(out)

    return run


def about(found: Any, severity: Any, about: Any = None) -> Any:
    return [one for one in found.findings if one.severity == severity and about in (None, one.about)]


class TestGpus:
    def test_all_values_of_a_measured_gpu_are_reported(self, add_gpus: AddGpus, doctor: Doctor) -> None:
        script = add_gpus(scripted_gpu(tick_ms=40), call_ms=0.2)
        status, found = doctor()
        assert status == 0
        energy = {"method": "measured", "source": "nvml_total_energy", "boundary": "gpu_board", "meter": "nvml"}
        assert found.energy.model_dump() == energy | {"device": A, "reason": None}
        (gpu,) = found.gpus
        assert 20 < gpu.tick_ms < 80
        assert 0.2 <= gpu.call_ms < 20
        expected = {
            "index": 0,
            "uuid": A,
            "name": "NVIDIA H100 80GB HBM3",
            "visible": True,
            "first": True,
            "driver": "580.159.04",
            "capability": "9.0",
            "memory_mb": 81_559,
            "used_mb": 500,
            "energy_counter": True,
            "energy_counter_error": None,
            "power_sources": ["nvml_power_instant", "nvml_power_average", "nvml_power_usage"],
            "refusal": None,
            "power_w": 70.0,
            "temperature_c": 34.0,
            "power_limit_w": 650.0,
            "default_power_limit_w": 700.0,
            "persistence_mode": True,
            "mig_mode": False,
            "compute_mode": "default",
            "sm_clock_mhz": 345.0,
            "max_sm_clock_mhz": 1980.0,
            "sustained_clock_mhz": 1485,
            "clock_reasons": ["idle"],
            "users": [],
            "held_by": None,
        }
        assert gpu.model_dump(include=set(expected)) == expected
        assert (found.driver.version, found.driver.cuda, found.driver.error) == ("580.159.04", "13.0", None)
        assert [(one.name, one.auto) for one in found.meters if one.auto] == [("nvml", True)]
        assert script.users() == 0, "NVML must be shut down"
        assert about(found, "blocks") == []

    def test_persistence_mode_and_clock_findings_have_commands(self, add_gpus: AddGpus, doctor: Doctor) -> None:
        add_gpus(scripted_gpu(persistence=0), scripted_gpu(B, persistence=0))
        status, found = doctor()
        assert status == 0, "findings that hinder do not fail"
        persistence, clocks = about(found, "hinders", "GPUs 0, 1")
        assert persistence.message.startswith("persistence mode is off")
        assert persistence.commands == ["sudo nvidia-smi -i 0,1 -pm 1"]
        assert clocks.message.startswith("clocks are not locked")
        assert clocks.commands == ["sudo nvidia-smi -i 0,1 -lgc 1485,1485"]
        assert "nvidia-smi -i 0,1 -rgc" in clocks.advice

    def test_clock_locking_is_unknown_if_nvml_does_not_show_it(self, add_gpus: AddGpus, doctor: Doctor) -> None:
        unknown, unlocked = "clocks may not be locked (NVML does not report it)", "clocks are not locked"
        cases: list[tuple[dict[str, Any], bool | None, str | None]] = [
            ({"reasons": 2}, True, None),
            ({"reasons": None}, None, unknown),
            ({"reasons": 1}, False, unlocked),
            # An idle GPU with a high clock: locked, or held by the driver.
            ({"reasons": 1, "max_sm_clock": 400}, None, unknown),
        ]
        add_gpus(*(scripted_gpu(f"GPU-{index}", **changes) for index, (changes, _, _) in enumerate(cases)))
        _, found = doctor()
        assert [gpu.clocks_held for gpu in found.gpus] == [held for _, held, _ in cases]
        texts = {
            one.message.partition(":")[0]: one.about for one in about(found, "hinders") if "clocks" in one.message
        }
        assert texts == {unknown: "GPUs 1, 3", unlocked: "GPU 2"}

    def test_advice_is_to_lock_clocks_at_a_sustainable_one(self, add_gpus: AddGpus, doctor: Doctor) -> None:
        cases: list[tuple[dict[str, Any], int | None]] = [
            ({"default_sm_clock": 1095}, 1095),
            ({"default_sm_clock": 1980}, 1485),  # the default is the maximum, which is not sustainable
            ({"default_sm_clock": 1980, "clocks": "345 1980 100"}, 1445),
            ({"clocks": None}, None),
        ]
        add_gpus(*(scripted_gpu(f"GPU-{index}", **changes) for index, (changes, _) in enumerate(cases)))
        _, found = doctor()
        assert [gpu.sustained_clock_mhz for gpu in found.gpus] == [mhz for _, mhz in cases]
        commands = [command for one in about(found, "hinders") for command in one.commands]
        assert commands == [
            f"sudo nvidia-smi -i {index} -lgc {mhz},{mhz}" for index, (_, mhz) in enumerate(cases[:3])
        ]

    def test_current_throttling_hinders(self, add_gpus: AddGpus, doctor: Doctor) -> None:
        add_gpus(scripted_gpu(reasons=0x2 | 0x4 | 0x40 | 0x200 | 0x400))
        _, found = doctor()
        (finding,) = about(found, "hinders", "GPU 0")
        assert finding.message == "its clocks are throttled now: power, hw_thermal, board_limit, reliability"

    def test_mig_blocks_and_has_a_command(self, add_gpus: AddGpus, doctor: Doctor) -> None:
        add_gpus(scripted_gpu(mig=1))
        status, found = doctor()
        assert status == 1
        assert (found.energy.method, found.energy.meter) == ("unavailable", None)
        (finding,) = about(found, "blocks")
        assert (finding.about, finding.commands) == ("GPU 0", ["sudo nvidia-smi -i 0 -mig 0"])
        refusals = {one.name: one.error for one in found.meters}
        assert "MIG is on" in refusals["nvml"]
        assert refusals["estimate"] is not None

    def test_gpu_without_energy_counter_is_sampled(self, add_gpus: AddGpus, doctor: Doctor) -> None:
        add_gpus(scripted_gpu(no_counter=1))
        status, found = doctor()
        assert (status, found.energy.method, found.energy.source) == (1, "sampled", "nvml_power_instant")
        assert found.gpus[0].energy_counter is False
        assert "Not Supported" in found.gpus[0].energy_counter_error
        assert "from Volta on" in about(found, "blocks")[0].message

    def test_gpu_without_counter_and_power_reading_is_unavailable(self, add_gpus: AddGpus, doctor: Doctor) -> None:
        add_gpus(scripted_gpu(no_counter=1, no_power_reading=1))
        status, found = doctor()
        assert (status, found.energy.method, found.gpus[0].power_sources) == (1, "unavailable", [])
        assert "power cannot be read" in about(found, "blocks")[0].message

    def test_energy_counter_that_does_not_advance_is_sampled(self, add_gpus: AddGpus, doctor: Doctor) -> None:
        add_gpus(scripted_gpu(tick_ms=1_000_000))
        status, found = doctor()
        assert (status, found.energy.method, found.gpus[0].tick_ms) == (1, "sampled", None)
        assert "stood still" in found.energy.reason
        assert "stood still" in found.gpus[0].energy_counter_error
        assert "stood still" in about(found, "blocks")[0].message

    def test_gpu_that_fell_off_the_bus_blocks_if_visible(
        self, add_gpus: AddGpus, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        add_gpus(scripted_gpu(lost_at=0), scripted_gpu(B))
        status, found = doctor()
        assert [(gpu.index, gpu.uuid, "lost" in (gpu.error or "")) for gpu in found.gpus] == [
            (0, None, True),
            (1, B, False),
        ]
        assert (status, found.gpus[1].energy_counter) == (1, True)
        assert about(found, "blocks", "GPU 0")[0].message.startswith("it does not answer: ")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", B)
        status, found = doctor()
        assert (status, [gpu.visible for gpu in found.gpus]) == (0, [False, True])

    def test_prohibited_compute_mode_blocks(self, add_gpus: AddGpus, doctor: Doctor) -> None:
        add_gpus(scripted_gpu(compute_mode=2))
        status, found = doctor()
        assert (status, found.energy.method) == (1, "measured")
        assert about(found, "blocks")[0].commands == ["sudo nvidia-smi -i 0 -c 0"]

    def test_other_users_of_a_gpu_hinder(self, add_gpus: AddGpus, doctor: Doctor) -> None:
        add_gpus(scripted_gpu(user="4242 900 /usr/bin/python3", used_mb=1400))
        _, found = doctor()
        assert [one.model_dump() for one in found.gpus[0].users] == [
            {"pid": 4242, "name": "python3", "used_mb": 900}
        ]
        assert "other processes use it: python3 (pid 4242)" in [
            one.message for one in about(found, "hinders", "GPU 0")
        ]

    def test_used_memory_without_visible_processes_hinders(
        self, add_gpus: AddGpus, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pytest_llem.doctor.host.container", lambda: "docker")
        add_gpus(scripted_gpu(used_mb=20_000))
        _, found = doctor()
        what = [one.message for one in about(found, "hinders", "GPU 0")]
        assert any(one.startswith("20,000 MB of its memory are in use") and "container" in one for one in what)

    def test_experiment_that_holds_the_gpu_lease_hinders(
        self, one_gpu: None, doctor: Doctor, tmp_path: Path
    ) -> None:
        (tmp_path / FOLDER).mkdir()
        owner = Owner.of_this_process("llama", "precision=bf16-cycle=1")
        note_file(tmp_path / FOLDER, A).write_text(owner.model_dump_json())
        _, found = doctor()
        assert found.gpus[0].held_by.startswith(f"pid {os.getpid()} runs study llama")
        assert any("an experiment holds its lease" in one.message for one in about(found, "hinders", "GPU 0"))
        ended = owner.model_copy(update={"ended": datetime.now(UTC)})
        note_file(tmp_path / FOLDER, A).write_text(ended.model_dump_json())
        assert doctor()[1].gpus[0].held_by is None

    def test_hidden_gpus_are_listed_without_findings(
        self, add_gpus: AddGpus, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        add_gpus(scripted_gpu(mig=1), scripted_gpu(B))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", B)
        status, found = doctor()
        assert (status, found.energy.device) == (0, B)
        assert [(gpu.visible, gpu.first) for gpu in found.gpus] == [(False, False), (True, True)]
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        status, found = doctor()
        assert (status, found.energy.device) == (1, "cpu")
        assert about(found, "note", "GPUs")

    def test_index_among_different_gpus_is_unknown(
        self, add_gpus: AddGpus, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        add_gpus(scripted_gpu(), scripted_gpu(B, name="NVIDIA L4", mig=1))
        status, found = doctor()
        assert (status, found.energy.device) == (0, A), "experiments get PCI_BUS_ID"
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        status, found = doctor()
        assert (status, found.energy.device) == (1, f"{A}, {B}")
        commands = ["export CUDA_DEVICE_ORDER=PCI_BUS_ID", f"export CUDA_VISIBLE_DEVICES={A}"]
        assert about(found, "hinders", "CUDA_VISIBLE_DEVICES=0")[0].commands == commands

    def test_advice_on_different_gpus_names_one_that_answers(
        self, add_gpus: AddGpus, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        add_gpus(scripted_gpu(lost_at=0), scripted_gpu(B, name="NVIDIA L4"))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
        _, found = doctor()
        (finding,) = about(found, "hinders", "CUDA_VISIBLE_DEVICES=1")
        assert finding.commands[-1] == f"export CUDA_VISIBLE_DEVICES={B}"

    def test_entry_that_names_several_gpus_is_found(
        self, one_gpu: None, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-")
        _, found = doctor()
        found.gpus.append(GpuReport(index=1, uuid=B))
        (finding,) = [one for one in findings(found, []) if one.about == "CUDA_VISIBLE_DEVICES"]
        assert finding.message == "CUDA does not accept 'GPU-' in 'GPU-', and uses only the entries before it"

    def test_mig_instance_among_different_gpus_is_not_an_index(
        self, one_gpu: None, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1")
        _, found = doctor()
        found.gpus[0].first = False
        found.gpus.append(GpuReport(index=1, uuid=B, name="NVIDIA L4"))
        assert [one.message for one in findings(found, []) if one.about.startswith("CUDA_")] == []

    def test_cpu_build_of_torch_blocks_on_a_gpu_machine(
        self,
        one_gpu: None,
        doctor: Doctor,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        torch(tmp_path, monkeypatch, "2.12.0+cpu")
        imports(monkeypatch, torch_cuda=None)
        status, found = doctor()
        assert (status, found.energy.method, found.energy.device) == (1, "estimated", "cpu")
        assert "CPU-only build" in about(found, "blocks", "torch")[0].message

    @pytest.mark.parametrize(("cuda", "severity"), [("14.1", "blocks"), ("13.2", "note"), ("13.0", None)])
    def test_torch_for_newer_cuda_than_driver_supports_is_found(
        self,
        one_gpu: None,
        doctor: Doctor,
        monkeypatch: pytest.MonkeyPatch,
        cuda: str,
        severity: str | None,
    ) -> None:
        imports(monkeypatch, torch_cuda=cuda)
        status, found = doctor()
        assert status == (1 if severity == "blocks" else 0)
        assert [one.severity for one in found.findings if one.about == "torch"] == [severity] * (
            severity is not None
        )

    def test_torch_for_newer_cuda_does_not_matter_without_a_visible_gpu(
        self, one_gpu: None, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        imports(monkeypatch, torch_cuda="14.1")
        _, found = doctor()
        found.gpus[0].visible = False
        assert [one for one in findings(found, []) if one.about == "torch"] == []

    def test_torch_without_a_package_has_no_version_in_its_finding(
        self, one_gpu: None, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        imports(monkeypatch, torch_cuda="14.1")
        _, found = doctor()
        found.software.packages.clear()
        (message,) = [one.message for one in findings(found, []) if one.about == "torch"]
        assert message.startswith("torch is built for CUDA 14.1, but driver ")

    def test_engines_run_on_first_visible_gpu_or_on_all_candidates(self) -> None:
        first, second = GpuReport(index=0, uuid=A), GpuReport(index=1, uuid=B, first=True)
        assert used_gpus([first, second], "2.13.0+cu128") == [second]
        assert used_gpus([first], "2.13.0") == [first]
        assert used_gpus([first.model_copy(update={"visible": False})], "2.13.0") == []
        assert used_gpus([first], "2.13.0+cpu") == used_gpus([first], None) == []


class TestDriver:
    @pytest.mark.parametrize(
        ("function", "step"), [slow("nvmlInit", "nvmlInit"), ("nvmlDeviceGetFieldValues", "GPU 0")]
    )
    @pytest.mark.slow
    def test_hanging_driver_is_abandoned(
        self, add_gpus: AddGpus, doctor: Doctor, function: str, step: str
    ) -> None:
        script = add_gpus(scripted_gpu(), rules=[f"takes {function} 600000"])
        status, found = doctor("--timeout", "3")
        assert (status, found.driver.stuck, found.energy.method) == (1, True, "unavailable")
        assert found.driver.error == f"no answer within 3 s; last step: {step}"
        finding = about(found, "blocks", "NVML")[0]
        assert finding.commands == ["sudo dmesg | grep -i nvrm"]
        probes = {call.pid for call in script.calls()} if script._trace.exists() else set()
        assert all(map(gone, probes))

    def test_driver_that_fails_blocks(
        self, add_gpus: AddGpus, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gpus, "_NVIDIA_PATHS", ("proc",))
        add_gpus(scripted_gpu(), rules=["fail nvmlInit 9"])
        status, found = doctor()
        assert (status, found.driver.present, found.gpus) == (1, True, [])
        assert found.driver.error.startswith("nvmlInit: Driver Not Loaded")
        assert about(found, "blocks", "NVML")[0].commands == ["nvidia-smi"]
        monkeypatch.setattr("pytest_llem.doctor.host.container", lambda: "docker")
        assert "--gpus all" in about(doctor()[1], "blocks", "NVML")[0].advice

    def test_missing_driver_alone_is_not_a_finding(self, doctor: Doctor) -> None:
        _, found = doctor()
        assert (found.driver, found.gpus) == (Driver(error="no NVML"), [])
        assert [one.about for one in about(found, "blocks")] == ["RAPL"]

    def test_crash_of_the_driver_library_is_reported(
        self, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        crash = 'import os; print(\'{"driver": {"version": "1"}}\', flush=True); os.kill(os.getpid(), 11)'
        monkeypatch.setattr(gpus, "COMMAND", (sys.executable, "-c", crash))
        monkeypatch.setattr(gpus, "_NVIDIA_PATHS", ("proc",))
        status, found = doctor()
        assert (status, found.driver.version) == (1, "1")
        assert found.driver.error == "the process crashed (SIGSEGV); last step: start"

    def test_foreign_output_of_the_probe_is_ignored(self, doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
        code = 'print(\'warning: x\'); print(3); print(\'{"driver": {"version": "2"}}\'); print(\'{"gpu":\')'
        monkeypatch.setattr(gpus, "COMMAND", (sys.executable, "-c", code))
        assert doctor()[1].driver.version == "2"


class TestCpu:
    @pytest.fixture
    def counting(self, powercap: Powercap, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
        """RAPL counters of a package and its memory, which advance while they are watched."""
        counters = [powercap.zone("intel-rapl:0", "package-0"), powercap.zone("intel-rapl:0:0", "dram")]

        def sleep(_: float) -> None:
            for counter in counters:
                add(counter, 1.0)

        monkeypatch.setattr(host, "time", SimpleNamespace(sleep=sleep))
        return counters

    def test_readable_rapl_measures_energy(self, doctor: Doctor, counting: list[Path]) -> None:
        status, found = doctor()
        energy = {"method": "measured", "meter": "rapl", "device": "cpu", "reason": None}
        assert (status, found.rapl.error) == (0, None)
        assert found.energy.model_dump() == energy | {
            "source": "rapl_package+rapl_dram",
            "boundary": "cpu_package+dram",
        }
        assert [(one.device, one.error) for one in found.rapl.domains] == [("package-0", None), ("dram-0", None)]
        assert about(found, "blocks") == []

    def test_measured_cpu_beside_a_gpu_without_energy_is_not_called_the_gpus(
        self, add_gpus: AddGpus, doctor: Doctor, counting: list[Path]
    ) -> None:
        add_gpus(scripted_gpu(mig=1))
        status, found = doctor()
        assert (status, found.energy.method, found.energy.meter) == (1, "measured", "rapl")
        text = " ".join(" ".join(table_of(found, 400)).split())
        assert f"by rapl_package+rapl_dram (meter rapl); that of {A} will not: NVML: {A}: MIG is on" in text

    def test_unreadable_rapl_blocks_and_has_commands(
        self, doctor: Doctor, counting: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read = Path.read_text

        def refuse(path: Any, *arguments: Any, **options: Any) -> Any:
            if path.name == "energy_uj":
                raise PermissionError(13, "Permission denied", str(path))
            return read(path, *arguments, **options)

        monkeypatch.setattr(Path, "read_text", refuse)
        status, found = doctor()
        assert (status, found.energy.method, found.rapl.denied) == (1, "estimated", True)
        assert {one.error for one in found.rapl.domains} == {"Permission denied"}
        (finding,) = about(found, "blocks", "RAPL")
        assert finding.message.startswith("permission denied for ")
        page = (ROOT / "docs" / "how-to" / "doctor.md").read_text()
        assert len(finding.commands) == 2
        assert all(command in page for command in finding.commands)

    @pytest.mark.parametrize(
        ("virtual", "container", "advice"),
        [
            (True, None, "virtual machines rarely have RAPL"),
            (False, "docker", "systempaths=unconfined"),
            (False, None, "kernel module is not loaded"),
        ],
    )
    def test_advice_without_rapl_depends_on_the_kind_of_machine(
        self,
        doctor: Doctor,
        monkeypatch: pytest.MonkeyPatch,
        virtual: bool,
        container: str | None,
        advice: str,
    ) -> None:
        monkeypatch.setattr(host, "is_virtual", lambda: virtual)
        monkeypatch.setattr("pytest_llem.doctor.host.container", lambda: container)
        status, found = doctor()
        assert (status, found.energy.method, found.energy.meter) == (1, "estimated", "estimate")
        assert found.energy.reason == f"RAPL: {found.rapl.error}"
        assert advice in about(found, "blocks", "RAPL")[0].advice

    @pytest.mark.parametrize(("content", "error"), [("0", "did not rise"), ("many", "many")])
    def test_rapl_counter_that_is_stuck_or_no_number_blocks(
        self, doctor: Doctor, powercap: Powercap, content: str, error: str
    ) -> None:
        powercap.zone("intel-rapl:0", "package-0").write_text(f"{content}\n")
        status, found = doctor()
        assert (status, found.energy.method) == (1, "estimated")
        assert error in found.rapl.domains[0].error

    def test_missing_rapl_on_a_gpu_machine_is_a_note(self, one_gpu: None, doctor: Doctor) -> None:
        _, found = doctor()
        assert about(found, "note", "RAPL")[0].message.startswith("CPU energy is not measured in addition")

    def test_load_cpu_limit_and_governor_hinder(
        self, doctor: Doctor, counting: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        known = processor_facts() | {"cpu_governor": "powersave", "cpu_count": 8}
        monkeypatch.setattr(host, "processor", lambda: known)
        monkeypatch.setattr(host, "cpu_limit", lambda: 2.5)
        monkeypatch.setattr(os, "getloadavg", lambda: (3.0, 0.0, 0.0))
        status, found = doctor()
        assert status == 0
        load, limit, governor = about(found, "hinders", "CPU")
        assert "the load average of the last minute is 3 on 8 CPUs" in load.message
        assert ("2.5 of 8 CPUs" in limit.message, "OMP_NUM_THREADS=2" in limit.advice) == (True, True)
        assert governor.commands == ["sudo cpupower frequency-set -g performance"]

    @pytest.mark.parametrize(
        ("governor", "follows"),
        [("userspace", False), ("performance, userspace", False), ("performance, powersave", True)],
    )
    def test_governor_of_a_fixed_clock_does_not_hinder(
        self,
        doctor: Doctor,
        counting: list[Path],
        monkeypatch: pytest.MonkeyPatch,
        governor: str,
        follows: bool,
    ) -> None:
        monkeypatch.setattr(host, "processor", lambda: processor_facts() | {"cpu_governor": governor})
        _, found = doctor()
        assert any("governor" in one.message for one in about(found, "hinders", "CPU")) == follows


class TestSoftware:
    def test_only_engine_that_cannot_be_imported_blocks(
        self, one_gpu: None, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        imports(monkeypatch, error="ImportError: libcudart.so.12", torch_cuda=None)
        status, found = doctor()
        assert (status, found.energy.method) == (1, "measured")
        assert [(one.name, one.error) for one in found.software.engines] == [
            ("pytorch", "ImportError: libcudart.so.12"),
            ("server", "ImportError: libcudart.so.12"),
            ("vllm", VLLM_NEEDS),
        ]
        assert about(found, "blocks", "engine pytorch")
        assert about(found, "blocks", "engine vllm")

    def test_shipped_engine_that_is_not_installed_is_only_noted(self, one_gpu: None, doctor: Doctor) -> None:
        status, found = doctor()
        assert (status, about(found, "hinders", "engine vllm")) == (0, [])
        assert {one.name: one.installed for one in found.software.engines} == {
            "pytorch": True,
            "server": True,
            "vllm": False,
        }
        (finding,) = about(found, "note", "engine vllm")
        assert finding.message == f"is not installed: it {VLLM_NEEDS}"
        (line,) = [one for one in table_of(found, 100) if re.match(r"^  vllm +pytest-llem", one)]
        assert "not installed" in line

    def test_package_of_an_engine_that_is_too_old_hinders(
        self, one_gpu: None, doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        install(tmp_path, monkeypatch, "vllm", "0.7.0")
        _, found = doctor()
        assert "needs vllm>=0.20 (found 0.7.0): " in about(found, "hinders", "engine vllm")[0].message

    def test_one_of_several_engines_that_cannot_be_imported_hinders(
        self,
        one_gpu: None,
        doctor: Doctor,
        monkeypatch: pytest.MonkeyPatch,
        noop_engine: None,
    ) -> None:
        code = "import sys; sys.argv[2] == 'noop' or sys.exit(3); " + software._IMPORT
        monkeypatch.setattr(software, "_IMPORT", code)
        status, found = doctor()
        assert {one.name: one.error for one in found.software.engines} == {
            "noop": None,
            "pytorch": "the process ended with status 3",
            "server": "the process ended with status 3",
            "vllm": VLLM_NEEDS,
        }
        assert status == 0
        assert about(found, "hinders", "engine pytorch")

    @pytest.mark.parametrize(
        ("code", "seconds", "error"),
        [
            ("import os; os.kill(os.getpid(), 11)", "60", "the process crashed (SIGSEGV)"),
            ("import time; time.sleep(600)", "1", "no answer within 1 s"),
            ("print('nothing')", "60", "the process reported nothing"),
        ],
    )
    def test_import_that_crashes_hangs_or_reports_nothing_blocks(
        self,
        one_gpu: None,
        doctor: Doctor,
        monkeypatch: pytest.MonkeyPatch,
        code: str,
        seconds: str,
        error: str,
    ) -> None:
        monkeypatch.setattr(software, "_IMPORT", code)
        status, found = doctor("--timeout", seconds)
        assert (status, found.software.engines[0].error) == (1, error)

    @pytest.mark.parametrize(("default_gpus", "gpus"), [("lambda *_: None", "all"), ("lambda *_: 1 / 0", None)])
    def test_unknown_number_of_gpus_of_an_engine_is_not_shown_as_all(
        self,
        one_gpu: None,
        doctor: Doctor,
        monkeypatch: pytest.MonkeyPatch,
        noop_engine: None,
        default_gpus: str,
        gpus: str | None,
    ) -> None:
        code = (
            "import sys; sys.argv[2] == 'noop' or sys.exit(3)\n"
            "from pytest_llem.measurement import engine_imports\n"
            f"engine_imports.default_gpus = {default_gpus}\n"
        )
        monkeypatch.setattr(software, "_IMPORT", code + IMPORT)
        _, found = doctor()
        (noop,) = [one for one in found.software.engines if one.name == "noop"]
        assert (noop.error, noop.gpus) == (None, gpus)
        (line,) = [one for one in table_of(found, 100) if one.startswith("  noop ")]
        assert line.endswith(gpus or "-")

    def test_engines_of_another_interpreter_are_examined(self, doctor: Doctor) -> None:
        _, found = doctor("--python", sys.executable)
        assert found.software.executable == sys.executable
        assert [one.name for one in found.software.engines] == ["pytorch", "server", "vllm"]

    def test_interpreter_without_pytest_llem_blocks(self, doctor: Doctor, tmp_path: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "empty"], check=True)
        python = str(tmp_path / "empty" / "bin" / "python")
        status, found = doctor("--python", python)
        assert (status, found.software.engines) == (1, [])
        (finding,) = about(found, "blocks", "python")
        assert finding.message.startswith(
            f"{python} has no pytest-llem: install it there: {python} -m pip install"
        )

    def test_missing_interpreter_blocks(self, doctor: Doctor) -> None:
        status, found = doctor("--python", "no/python")
        assert status == 1
        assert "does not exist" in about(found, "blocks", "python")[0].message

    @pytest.mark.slow
    def test_real_engine_is_imported_in_another_process(self) -> None:
        code = (
            "import sys\n"
            "from pytest_llem.cli import main\n"
            "status = main(['doctor', '--format', 'json'])\n"
            "assert status in (0, 1)\n"
            "assert not {'torch', 'transformers', 'pynvml', 'pytest'} & set(sys.modules)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        found = Examination.model_validate_json(done.stdout)
        (engine,) = [one for one in found.software.engines if one.name == "pytorch"]
        assert (engine.error, engine.distribution) == (None, "pytest-llem")


class TestSurroundings:
    def test_folder_of_locks_that_is_a_file_blocks(self, one_gpu: None, doctor: Doctor, tmp_path: Path) -> None:
        (tmp_path / FOLDER).write_text("no folder")
        status, found = doctor()
        assert (status, found.energy.method) == (1, "measured")
        assert "is not a folder; remove it" in about(found, "blocks", "locks")[0].message

    def test_missing_temporary_folder_blocks(
        self, one_gpu: None, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
    ) -> None:

        def none() -> None:
            raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

        monkeypatch.setattr(tempfile, "gettempdir", none)
        status, found = doctor()
        assert status == 1
        assert {one.about for one in about(found, "blocks")} == {"temporary files", "locks"}

    def test_an_examination_leaves_no_files(self, doctor: Doctor, tmp_path: Path) -> None:
        doctor()
        before = {*tmp_path.rglob("*")}
        doctor()
        assert {*tmp_path.rglob("*")} == before

    def test_little_free_disk_space_is_a_note(self, doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = SimpleNamespace(free=500_000_000)
        monkeypatch.setattr("pytest_llem.doctor.host.shutil.disk_usage", lambda _: usage)
        _, found = doctor()
        of_folders = [one.about for one in about(found, "note") if not one.about.startswith("engine ")]
        assert of_folders == ["temporary files", "results", "the hub's cache"]

    def test_hub_cache_is_found_by_environment_variable(
        self, doctor: Doctor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        _, found = doctor()
        assert found.surroundings.hf_hub_offline is True
        assert found.surroundings.folders[-1].path == str(tmp_path / "hub")

    def test_memory_limit_of_a_container_is_a_note(self, doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("pytest_llem.doctor.host.memory_limit_bytes", lambda: 512_000_000)
        _, found = doctor()
        assert found.surroundings.memory_limit_mb == 512
        assert about(found, "note", "memory")[0].message.startswith(
            "this process is limited to 512 MB of the machine's "
        )

    def test_unknown_home_directory_is_reported(self, doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
        def unknown(path: Any) -> None:
            raise RuntimeError("Could not determine home directory.")

        for name in ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(Path, "expanduser", unknown)
        _, found = doctor()
        assert found.surroundings.folders[-1].error == "Could not determine home directory."


class TestControlGroups:
    def test_limits_of_control_groups_of_version_2(self, tmp_path: Path) -> None:
        self._group(tmp_path, "0::/slice/job\n")
        self._write(tmp_path / "slice" / "job", **{"memory.max": "max", "cpu.max": "max 100000"})
        assert self._limits(tmp_path) == (None, None)
        self._write(tmp_path / "slice", **{"memory.max": "8000000000", "cpu.max": "250000 100000"})
        assert self._limits(tmp_path) == (8_000_000_000, 2.5), "the limit of an outer group"
        self._write(tmp_path / "slice" / "job", **{"memory.max": "4000000000"})
        assert self._limits(tmp_path) == (4_000_000_000, 2.5)

    def test_limits_of_control_groups_of_version_1(self, tmp_path: Path) -> None:
        self._group(tmp_path, "4:memory:/docker/1\n3:cpu,cpuacct:/docker/1\n")
        self._write(tmp_path / "memory", **{"memory.limit_in_bytes": "9223372036854771712"})
        self._write(tmp_path / "cpu", **{"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"})
        assert self._limits(tmp_path) == (None, None)
        self._write(tmp_path / "memory", **{"memory.limit_in_bytes": "1000000000"})
        self._write(tmp_path / "cpu", **{"cpu.cfs_quota_us": "50000"})
        assert self._limits(tmp_path) == (1_000_000_000, 0.5)

    def test_without_control_groups_there_are_no_limits(self, tmp_path: Path) -> None:
        assert self._limits(tmp_path) == (None, None)

    def _group(self, root: Any, text: Any) -> None:
        (root / "proc" / "self").mkdir(parents=True)
        (root / "proc" / "self" / "cgroup").write_text(text)

    def _write(self, folder: Any, **files: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(f"{text}\n")

    def _limits(self, root: Any) -> Any:
        return memory_limit_bytes(root / "proc", root), cpu_limit(root / "proc", root)


class TestOutput:
    def run(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: Any) -> Any:
        monkeypatch.setenv("COLUMNS", str(width))
        status = cli.main(["doctor"])
        return status, capsys.readouterr().out.splitlines()

    @pytest.mark.parametrize("width", [80, 200])
    def test_output_fits_the_terminal(
        self,
        add_gpus: AddGpus,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        width: int,
    ) -> None:
        long = "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition"
        users = [f"user {4000 + one} 900 /usr/bin/python3.11-with-a-long-name" for one in range(5)]
        add_gpus(
            scripted_gpu(name=long, persistence=0, mig=1, used_mb=70_000, rules=users),
            scripted_gpu(B, reasons=0xFF),
            scripted_gpu("GPU-c", mig=1),
        )
        status, lines = self.run(capsys, monkeypatch, width)
        assert status == 1
        assert [line for line in lines if len(line) > width and not line.lstrip().startswith("$ ")] == []
        text = "\n".join(lines)
        assert A in text
        assert "sudo nvidia-smi -i 0 -pm 1" in text

    def test_energy_comes_first_then_findings_worst_first(
        self, add_gpus: AddGpus, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        add_gpus(scripted_gpu(persistence=0, compute_mode=2))
        status, lines = self.run(capsys, monkeypatch, 100)
        assert status == 1
        assert lines[0] == "energy will be measured on this machine: gpu_board by nvml_total_energy (meter nvml)"
        assert lines[2] == "Findings"
        severities = re.findall(r"^  (blocks|hinders|note) ", "\n".join(lines), re.M)
        assert severities == sorted(severities)
        assert severities[0] == "blocks"
        for title in ("GPUs (driver 580.159.04, CUDA up to 13.0)", "Energy of GPUs", "State of GPUs", "CPU"):
            assert title in lines
        for title in ("Meters", "Packages", "Surroundings"):
            assert title in lines

    def test_control_characters_in_names_are_not_printed(
        self, add_gpus: AddGpus, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        add_gpus(scripted_gpu(name="H100 \x1b[31m[red]", user="42 1 \x1b]0;x"))
        _, lines = self.run(capsys, monkeypatch, 120)
        text = "\n".join(lines)
        assert "\x1b" not in text
        assert "[red]" in text

    def test_narrow_terminal_hides_no_cell(self, one_gpu: None, doctor: Doctor) -> None:
        _, found = doctor()
        assert any(re.fullmatch(rf"  0   NVIDIA H100 +{A}   first", line) for line in table_of(found, 20))

    def test_unknown_is_distinct_from_none_and_from_empty(
        self, one_gpu: None, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        _, found = doctor()
        (gpu,) = found.gpus
        cells = {}
        for reasons in (None, [], ["idle"]):
            gpu.clock_reasons = reasons
            lines = [*table_of(found, 120)]
            cells[str(reasons)] = lines[lines.index("State of GPUs") + 4].split()[-2]
        assert cells == {"None": "-", "[]": "none", "['idle']": "idle"}
        assert any(re.fullmatch(r"  CUDA_VISIBLE_DEVICES +empty", line) for line in lines)

    def test_unknown_sizes_have_no_unit(self, one_gpu: None, doctor: Doctor) -> None:
        _, found = doctor()
        around = found.surroundings
        around.memory_mb = around.swap_used_mb = around.folders[0].free_mb = None
        assert " - MB" not in "\n".join(table_of(found, 100))

    def test_output_is_ascii_in_a_terminal_without_unicode(
        self, capfdbinary: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "pytest_llem.cli", "doctor", "--timeout", "0.1"],
            capture_output=True,
            check=False,
            env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        )
        assert (done.returncode in (0, 1), done.stderr) == (True, b"")
        assert done.stdout.isascii()

    def test_json_is_valid_against_its_schema(self, add_gpus: AddGpus, capsys: pytest.CaptureFixture[str]) -> None:
        add_gpus(scripted_gpu(user="42 1 x"), scripted_gpu(B, lost_at=0))
        cli.main(["doctor", "--format", "json"])
        printed = json.loads(capsys.readouterr().out)
        jsonschema.validate(printed, Examination.model_json_schema(mode="serialization"))
        assert printed["schema_version"] == "1.0"
        assert {*printed} == {*Examination.model_fields}, "unknown values are null, not missing"

    def test_closed_output_pipe_exits_with_2_silently(self) -> None:
        reader, writer = os.pipe()
        os.close(reader)
        command = [sys.executable, "-m", "pytest_llem.cli", "doctor", "--timeout", "0.1"]
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
        os.close(writer)
        assert (done.returncode, done.stderr) == (2, "")

    def test_ctrl_c_leaves_no_process_behind(self, add_gpus: AddGpus, tmp_path: Path) -> None:
        script = add_gpus(scripted_gpu(), rules=["takes nvmlDeviceGetName 600000"])
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest_llem.cli", "doctor"],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        wait_until(lambda: script._trace.exists() and len(psutil.Process(process.pid).children()) >= 2)
        children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
        assert (out, err) == ("", "llem: interrupted\n")
        # CPython ends by the signal if that came while an extension was imported: for a shell, it is 130 as well.
        assert process.returncode in (130, -signal.SIGINT)
        wait_until(lambda: all(map(gone, children)))
