"""Devices of an experiment: those that the engine's runtime reports and, before that, all possible ones."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from pytest_llem import registry
from pytest_llem.doctor.gpu_findings import visibility_findings
from pytest_llem.doctor.records import GpuReport, Surroundings
from pytest_llem.energy import metering
from pytest_llem.energy.metering import EnergyMeter
from pytest_llem.energy.protocol import DeviceReading, Reading
from pytest_llem.engines.protocol import EngineContext
from pytest_llem.engines.shipped import shipped_needs
from pytest_llem.hardware import environment
from pytest_llem.hardware import gpus as hardware
from pytest_llem.hardware.gpus import Gpu, VisibleGpus, cuda_order, invalid_entry, visible_gpus
from pytest_llem.machine import device_request
from pytest_llem.machine.device_locks import CPU
from pytest_llem.machine.device_request import request_devices
from pytest_llem.measurement import orchestrator
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.engine_options import Needs
from tests.conftest import NOOP_STUDY
from tests.support import nvml

A, B = "GPU-aaaaaaaa-0000", "GPU-bbbbbbbb-1111"
TWO = VisibleGpus((Gpu(A), Gpu(B)), Gpu(A))


# ---- leased devices ----


@pytest.mark.parametrize(
    ("backend", "torch", "visible", "leased"),
    [
        ("tensorrt", None, TWO, {CPU, A, B}),
        ("tensorrt", "2.13.0+cpu", TWO, {CPU, A, B}),
        ("tensorrt", "2.13.0+cu130", TWO, {A, B}),
        ("tensorrt", None, VisibleGpus(), {CPU}),
        ("vllm", "2.13.0+cpu", TWO, {CPU}),
        ("vllm", "2.13.0+cu130", TWO, {A}),
        ("pytorch", "2.13.0+cpu", TWO, {CPU}),
        ("pytorch", "2.13.0+cu130", TWO, {A}),
    ],
)
def test_engine_with_unknown_devices_leases_all_possible_ones(
    monkeypatch: pytest.MonkeyPatch, backend: str, torch: str | None, visible: VisibleGpus, leased: set[str]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(device_request, "package_versions", lambda python: {"torch": torch} if torch else {})
    for module in (device_request, hardware):
        monkeypatch.setattr(module, "visible_gpus", lambda: visible)
    needs = shipped_needs(ExperimentConfig(model="m", backend=backend)) or Needs()
    request = request_devices(needs, None)
    assert set(request.choose(request.pool)) == leased


# ---- CUDA_VISIBLE_DEVICES ----


def test_number_among_different_gpus_is_ambiguous(nvml_library: Path, tmp_path: Path) -> None:
    gpus = [nvml.ScriptedGpu(uuid, [(0.0, 50.0)], {"name": name}) for uuid, name in ((A, "H100"), (B, "L4"))]
    script = nvml.Script(tmp_path / "script", gpus)
    script.write()
    env = nvml.environment(nvml_library, script) | {"CUDA_VISIBLE_DEVICES": "0"}
    env.pop("CUDA_DEVICE_ORDER", None)
    seen = nvml.run(env, visible_gpus)
    assert (len(seen.all), seen.first, seen.is_ambiguous) == (2, None, True)
    seen = nvml.run(env | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, visible_gpus)
    assert ([gpu.uuid for gpu in seen.all], seen.is_ambiguous) == ([A], False)


@pytest.mark.parametrize(
    ("visible", "entry"),
    [
        ("0,1", None),
        ("7", "7"),
        ("0,2,1", "2"),
        (f"{B},GPU-c", "GPU-c"),
        (f"{B},0", "0"),
        (f"0,{B}", B),
        ("", None),
        ("-1", None),
        ("1,-1,9", None),
    ],
)
def test_invalid_visible_devices_entry_ends_the_list(visible: str, entry: str | None) -> None:
    assert invalid_entry([A, B], visible) == entry


def test_unknown_gpu_number_leaves_no_gpu_in_any_order() -> None:
    assert cuda_order([A, B], "7", is_bus_order=False) == ([], True)


def _findings(visible: str | None, order: str | None = None, names: tuple[str, str] = ("H100", "L4")) -> Any:
    uuids = [A, B]
    is_bus_order = order is not None or len(set(names)) == 1
    found, ordered = cuda_order(uuids, visible, is_bus_order=is_bus_order)
    gpus = [
        GpuReport(index=index, uuid=uuid, name=name, visible=uuid in found, first=ordered and found[:1] == [uuid])
        for index, (uuid, name) in enumerate(zip(uuids, names, strict=True))
    ]
    around = Surroundings(os="Linux", kernel="6", cuda_visible_devices=visible, cuda_device_order=order)
    return [(one.severity, one.about, one.message) for one in visibility_findings(gpus, around)]


def test_doctor_reports_ambiguous_order_and_unknown_gpu_number() -> None:
    [(severity, about, what)] = _findings("0")
    assert (severity, about) == ("hinders", "CUDA_VISIBLE_DEVICES=0")
    assert what.endswith("in another order than nvidia-smi: which of them is meant is unknown")
    assert _findings("0", order="PCI_BUS_ID") == []
    assert _findings("0", names=("H100", "H100")) == []
    assert _findings(B) == []
    assert _findings(None) == [], "experiments get PCI_BUS_ID"
    [(severity, about, what)] = _findings("7")
    assert (severity, about) == ("blocks", "CUDA_VISIBLE_DEVICES")
    rest = "and uses only the entries before it, so engines run on the CPU"
    assert what == f"CUDA does not accept '7' in '7', {rest}"
    assert [severity for severity, *_ in _findings("1,2", order="PCI_BUS_ID")] == ["hinders"]


# ---- metered devices ----


class FakeMeter:
    """Reads 10 J for each GPU that it was opened for."""

    opened: ClassVar[list[list[str]]] = []

    def open(self, gpus: Sequence[str]) -> None:
        self._gpus = list(gpus)
        self.opened.append(self._gpus)

    def begin(self) -> None:
        """Do nothing."""

    def end(self) -> Reading:
        readings = (DeviceReading(gpu, "gpu_board", 10.0, "measured", "nvml_total_energy") for gpu in self._gpus)
        return Reading(tuple(readings), 1.0)

    def close(self) -> None:
        """Do nothing."""


@pytest.fixture
def fake_meter(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Use the fake meter for every name; return the GPUs that each was opened for."""
    opened: list[list[str]] = []
    monkeypatch.setattr(FakeMeter, "opened", opened)
    load = registry.load

    def load_fake(group: str, name: str) -> Any:
        return FakeMeter if group == registry.METER_GROUP else load(group, name)

    monkeypatch.setattr(registry, "load", load_fake)
    return opened


@pytest.mark.parametrize(("used", "load_j"), [([A], 10.0), ([A, B], 20.0), ([], None)])
def test_meters_read_the_devices_of_the_loaded_engine(
    noop_engine: None,
    monkeypatch: pytest.MonkeyPatch,
    fake_meter: list[list[str]],
    used: list[str],
    load_j: float | None,
) -> None:
    from noop_engine import NoopEngine

    class Spread(NoopEngine):
        """May run on both GPUs, and is loaded on some."""

        def __init__(self, config: ExperimentConfig, context: EngineContext) -> None:
            super().__init__(config, context)
            self.gpus = [A, B]

        def load(self) -> None:
            self.gpus = used

    monkeypatch.setattr(orchestrator, "create_engine", Spread)
    monkeypatch.setattr(environment, "gpu_settings", lambda nvml, uuid: {"uuid": uuid})
    fields = {key: value for key, value in NOOP_STUDY.items() if key not in ("name", "sweep", "execution")}
    config = ExperimentConfig.model_validate(
        fields | {"energy": {"backend": "nvml"}, "baseline": {"enabled": False}}
    )
    result = orchestrator.ExperimentOrchestrator(config).run().result
    assert fake_meter == [[A, B]] + ([used] if used != [A, B] else [])
    assert [device.device for device in result.devices] == used
    assert [gpu["uuid"] for gpu in result.environment["gpus"]] == used
    assert result.metrics["load_energy_j"].value == load_j


def test_fixture_meters_no_gpu_if_it_is_unknown_which(
    monkeypatch: pytest.MonkeyPatch, fake_meter: list[list[str]]
) -> None:
    monkeypatch.setattr(metering, "visible_gpus", lambda: VisibleGpus(TWO.all, None, is_ambiguous=True))
    monkeypatch.setitem(sys.modules, "torch", None)
    with EnergyMeter()() as reading:
        pass
    assert (reading.energy_j, fake_meter) == (None, [])
    assert reading.reason is not None
    assert reading.reason.endswith("set CUDA_DEVICE_ORDER=PCI_BUS_ID, or use the GPU's UUID")


def test_fixture_meters_the_gpus_that_pytorch_uses(
    monkeypatch: pytest.MonkeyPatch, fake_meter: list[list[str]]
) -> None:
    cuda = SimpleNamespace(
        is_initialized=lambda: True,
        device_count=lambda: 1,
        get_device_properties=lambda index: SimpleNamespace(uuid=B.removeprefix("GPU-")),
        current_device=lambda: 0,
        synchronize=lambda index: None,
    )
    monkeypatch.setattr(metering, "visible_gpus", lambda: VisibleGpus(TWO.all, None, is_ambiguous=True))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    with EnergyMeter()("nvml") as reading:
        pass
    assert (reading.energy_j, fake_meter) == (10.0, [[B]])
