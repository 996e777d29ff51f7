"""An experiment leases as many GPUs of one kind as its engine needs, and its process sees only these."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_llem.doctor import software
from pytest_llem.engines.protocol import PreflightError
from pytest_llem.hardware import gpus as hardware
from pytest_llem.isolation.launcher import Job, run_isolated
from pytest_llem.machine import device_request
from pytest_llem.machine.device_locks import CPU
from pytest_llem.machine.device_request import Allocation, DeviceRequest, request_devices
from pytest_llem.measurement.orchestrator import ExperimentOrchestrator
from pytest_llem.planning.plan import Plan
from pytest_llem.planning.preflight import Preflight
from pytest_llem.registry import ENGINE_GROUP
from pytest_llem.reporting.terminal.plan import plan_lines
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.engine_options import Needs
from pytest_llem.study.loading import load_study
from tests.conftest import NOOP_STUDY
from tests.support import nvml

A, B, C, D = (f"GPU-{letter * 8}" for letter in "abcd")
MIG = "MIG-cccccccc"

#: Requesteds in a process that sees the scripted GPUs: (needs, GPU kinds, environment) to an allocation.
Requested = Callable[..., DeviceRequest]


def _request(fields: dict[str, object]) -> DeviceRequest:
    """Allocate with a GPU build of PyTorch."""
    device_request.package_versions = lambda python: {"torch": "2.13.0+cu130"}  # type: ignore[attr-defined]  # in a forked process
    return request_devices(Needs(**fields), None)  # type: ignore[arg-type]


def _first(request: DeviceRequest) -> Allocation:
    """Return the allocation if all devices are free."""
    return request.allocation(request.choose(request.pool))


@pytest.fixture
def requested(nvml_library: Path, tmp_path: Path) -> Requested:
    """Allocate GPUs of a host with the boards A, B, … of the given kinds."""

    def run(kinds: str, visible: str | None = None, **needs: object) -> DeviceRequest:
        uuids = (A, B, C, D)
        boards = [
            nvml.ScriptedGpu(uuids[at], [(0.0, 50.0)], {"name": kind}) for at, kind in enumerate(kinds.split())
        ]
        script = nvml.Script(tmp_path / "script", boards)
        script.write()
        env = nvml.environment(nvml_library, script)
        for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
            env.pop(name, None)
        if visible is not None:
            env["CUDA_VISIBLE_DEVICES"] = visible
        found: DeviceRequest = nvml.run(env, _request, needs)
        return found

    return run


@pytest.mark.parametrize(
    ("kinds", "visible", "needs", "leased", "numbers"),
    [
        ("H100 H100", None, {"gpus": 1}, [A], "0"),
        ("H100 H100", None, {"gpus": 2}, [A, B], "0,1"),
        ("H100 H100", None, {}, [A, B], "0,1"),
        ("L4 H100 H100 L4", None, {"gpus": 1}, [A], "0"),
        ("L4 H100 H100 H100", None, {"gpus": 2}, [B, C], "1,2"),
        ("L4 H100 H100 L4", None, {"gpus": 2}, [A, D], "0,3"),
        ("H100 H100 H100", "2,1", {"gpus": 2}, [C, B], "2,1"),
        ("H100 H100 H100", C, {"gpus": 1}, [C], "2"),
        ("H100 H100", B, {}, [B], "1"),
    ],
)
def test_first_gpus_of_one_kind_are_leased(
    requested: Requested, kinds: str, visible: str | None, needs: dict[str, int], leased: list[str], numbers: str
) -> None:
    request = requested(kinds, visible, **needs)
    assert request.problem is None
    found = _first(request)
    assert [*found.devices] == leased
    assert found.environment == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": numbers}


def test_engine_without_gpus_leases_the_cpu_and_sees_none(requested: Requested) -> None:
    found = _first(requested("H100 H100", gpus=0))
    assert found == Allocation((CPU,), {"CUDA_VISIBLE_DEVICES": ""})


def test_engine_that_needs_one_gpu_runs_on_a_cpu(requested: Requested) -> None:
    assert _first(requested("", gpus=1)) == Allocation((CPU,))
    assert _first(requested("H100", "", gpus=1)) == Allocation((CPU,))


@pytest.mark.parametrize("visible", [MIG, "1"])
def test_selection_that_is_not_identified_is_left_as_it_is(requested: Requested, visible: str) -> None:
    assert _first(requested("L4 H100", visible, gpus=1)) == Allocation((A, B)), (
        "an index among different GPUs is ambiguous"
    )


@pytest.mark.parametrize(
    ("kinds", "visible", "problem"),
    [
        ("H100 L4", None, "needs 2 GPUs of one kind, and there are 1 × H100, 1 × L4"),
        ("H100", None, "needs 2 GPUs of one kind, and there are 1 × H100"),
        ("", None, "needs 2 GPUs of one kind, and there are 0"),
        (
            "H100 H100",
            "0",
            "needs 2 GPUs of one kind, and there are 1 × H100; CUDA_VISIBLE_DEVICES may hide some",
        ),
    ],
)
def test_too_few_gpus_are_reported_with_both_numbers(
    requested: Requested, kinds: str, visible: str | None, problem: str
) -> None:
    assert requested(kinds, visible, gpus=2).problem == problem


def test_lost_gpu_makes_numbers_unknown_and_uuids_are_used(nvml_library: Path, tmp_path: Path) -> None:
    boards = [nvml.ScriptedGpu(A, [(0.0, 50.0)], {"lost_at": 0}), nvml.ScriptedGpu(B, [(0.0, 50.0)])]
    script = nvml.Script(tmp_path / "script", boards)
    script.write()
    env = nvml.environment(nvml_library, script)
    env.pop("CUDA_VISIBLE_DEVICES", None)
    found = _first(nvml.run(env, _request, {"gpus": 1}))
    assert found.environment["CUDA_VISIBLE_DEVICES"] == B


NEEDY = """
from noop_engine import NoopEngine, NoopOptions
from pytest_llem import Needs

class Options(NoopOptions):
    def needs(self, config, parameters):
        return Needs(gpus=2)

class Engine(NoopEngine):
    options = Options
"""


def test_preflight_refuses_an_engine_with_too_few_gpus(
    noop_engine: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needy_engine.py").write_text(NEEDY)
    one = hardware.VisibleGpus((hardware.Gpu(A, "H100", index=0),), hardware.Gpu(A, "H100", index=0))
    monkeypatch.setattr(device_request, "visible_gpus", lambda: one)
    study = {**NOOP_STUDY, "backend": "needy_engine:Engine", "sweep": {"n": [1]}}
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    loaded = load_study(tmp_path / "study.yaml")
    reason = Preflight(loaded, (), [tmp_path]).refusal(loaded.points[0])
    assert reason is not None
    assert reason.startswith("engine 'needy_engine:Engine' needs 2 GPUs of one kind, and there are 1 × H100")


def test_process_sees_the_leased_gpus_only(
    job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "seeing_engine.py").write_text(
        "import os\nfrom noop_engine import NoopEngine\n"
        "class Engine(NoopEngine):\n"
        "    def load(self):\n"
        "        print('sees', os.environ['CUDA_VISIBLE_DEVICES'], os.environ['CUDA_DEVICE_ORDER'])\n"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    made = job()
    config = {**made.config, "backend": "seeing_engine:Engine"}
    del config["noop"]
    variables = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "1,2"}
    started = Job(
        made.identity, config, directory=".", python_path=[str(tmp_path)], devices=[B, C], variables=variables
    )
    outcome = run_isolated(started)
    assert outcome.error is None
    assert "sees 1,2 PCI_BUS_ID" in outcome.output


@pytest.mark.parametrize("reported", [[B], [A, B]])
def test_engine_on_gpus_that_are_not_leased_fails(noop_engine: None, reported: list[str]) -> None:
    fields = {key: value for key, value in NOOP_STUDY.items() if key not in ("name", "sweep", "execution")}
    config = ExperimentConfig.model_validate({**fields, "energy": {"backend": None}, "noop": {"gpu": reported}})
    with pytest.raises(PreflightError) as refused:
        ExperimentOrchestrator(config, devices=[A]).run()
    assert str(refused.value) == (
        f"engine 'noop' reports GPUs that are not leased for it: {B} (leased: {A}): "
        "it has to use the GPUs of CUDA_VISIBLE_DEVICES only"
    )


def _refusal(folder: str) -> str:
    """Run an experiment that uses both scripted GPUs, and return why it is refused."""
    from noop_engine import NoopEngine

    from pytest_llem.measurement import engine_imports

    fields = {key: value for key, value in NOOP_STUDY.items() if key not in ("name", "sweep", "execution")}
    config = ExperimentConfig.model_validate({**fields, "energy": {"backend": None}, "noop": {"gpu": [A, B]}})
    setattr(engine_imports, "load_engine", lambda *_, **__: NoopEngine)  # noqa: B010  # in a forked process
    try:
        ExperimentOrchestrator(config).run()
    except PreflightError as error:
        return str(error)
    return "not refused"


@pytest.mark.slow
def test_gpus_of_different_kinds_together_are_refused(
    noop_engine: None, nvml_library: Path, tmp_path: Path
) -> None:
    for kinds, refused in (("H100 L4", True), ("H100 H100", False)):
        boards = [
            nvml.ScriptedGpu(uuid, [(0.0, 50.0)], {"name": kind})
            for uuid, kind in zip((A, B), kinds.split(), strict=True)
        ]
        script = nvml.Script(tmp_path / "script", boards)
        script.write()
        env = {**nvml.environment(nvml_library, script), "PYTHONPATH": os.environ["PYTHONPATH"]}
        expected = (
            "engine 'noop' runs on GPUs of different kinds together: H100, L4: "
            "select those of one kind with CUDA_VISIBLE_DEVICES"
        )
        assert nvml.run(env, _refusal, str(tmp_path)) == (expected if refused else "not refused")


def test_plan_shows_the_number_of_gpus(noop_engine: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needy_engine.py").write_text(NEEDY)
    two = tuple(hardware.Gpu(uuid, "H100", index=at) for at, uuid in enumerate((A, B)))
    monkeypatch.setattr(device_request, "visible_gpus", lambda: hardware.VisibleGpus(two, two[0]))
    study = {**NOOP_STUDY, "backend": "needy_engine:Engine", "sweep": {"n": [1, 2]}}
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    loaded = load_study(tmp_path / "study.yaml")
    plan = Plan(loaded, loaded.experiments, Preflight(loaded, (), [tmp_path]))
    assert " · 2 GPUs each" in plan_lines(plan, tmp_path)[0]
    assert [one["gpus"] for one in json.loads(plan.to_json())["experiments"]] == [2] * len(loaded.experiments)


def test_doctor_asks_for_the_number_of_gpus(noop_engine: None, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-c", software._IMPORT, ENGINE_GROUP, "noop"]
    script = "from noop_engine import NoopEngine\nfrom needy_engine import Options\nNoopEngine.options = Options\n"
    (tmp_path / "needy_engine.py").write_text(NEEDY)
    (tmp_path / "sitecustomize.py").write_text(script)
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    output = subprocess.check_output(command, env={**os.environ, "PYTHONPATH": path}, text=True)
    assert software._report(output) == {"error": None, "torch_cuda": None, "gpus": 2}
