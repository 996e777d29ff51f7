"""Measure the energy of a block of code, with the meters of an experiment."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from pytest_llem.energy.account import Account, Meters
from pytest_llem.energy.protocol import DeviceReading
from pytest_llem.hardware.gpus import visible_gpus
from pytest_llem.registry import METER_GROUP, installed
from pytest_llem.results.metrics import Method
from pytest_llem.study.config import AUTO

_NOT_ENDED = "the block has not ended yet"

#: Meters that read no GPU: GPUs that this process may use, and does not use, do not concern them.
_CPU_METERS = ("rapl", "estimate")

_AMBIGUOUS = (
    "CUDA_VISIBLE_DEVICES contains a number on a host with different GPUs, or a MIG instance, so that the GPU is "
    "unknown: set CUDA_DEVICE_ORDER=PCI_BUS_ID, or use the GPU's UUID"
)


class EnergyReading:
    """Energy and time of a block of code. The energy is known once the block has ended.

    Example:
        with energy_meter() as reading:
            model.generate(inputs)
        print(reading.energy_j, reading.seconds, reading.method)

    Attributes:
        energy_j: Energy in J, over ``boundary``; None if it is not available, never 0 instead.
        method: How the energy was obtained: ``measured``, ``sampled``, ``estimated``, ``unavailable``.
        source: Source of the energy: ``nvml_total_energy``, ``rapl_package``, ``cpu_time_model``, …
        boundary: What the energy covers: with ``auto``, ``gpu_board`` or ``module`` if there are readable GPUs,
            else ``cpu_package``, or ``cpu_package+dram``.
        covers_gpus: Whether the energy covers GPUs; None if this process uses none through PyTorch, or if there is
            no energy.
        invalid: Reason code if ``energy_j`` cannot be right: ``counter_disagrees``; otherwise None.
        reason: Why ``energy_j`` is None.
        uncertainty_j: Standard uncertainty (k = 1) of reading the meter at both edges, and of sampling, in J.
        devices: Readings of each device of every meter; ``energy_j`` is the sum over those of ``boundary``.
        ticks: Number of ticks of the meter's counter, or of power samples, in ``energy_j``; None if unknown.
        tick_seconds: Time between two of them, in s; None if unknown.
    """

    def __init__(self) -> None:
        self.energy_j: float | None = None
        self.method: Method = "unavailable"
        self.source: str | None = None
        self.boundary: str | None = None
        self.covers_gpus: bool | None = None
        self.invalid: str | None = None
        self.reason: str | None = _NOT_ENDED
        self.uncertainty_j: float | None = None
        self.devices: tuple[DeviceReading, ...] = ()
        self.ticks: float | None = None
        self.tick_seconds: float | None = None
        self._began = time.monotonic()
        self._ended: float | None = None

    @property
    def seconds(self) -> float:
        """Duration of the block on a monotonic clock, in s; the time so far if it has not ended."""
        return (time.monotonic() if self._ended is None else self._ended) - self._began

    def _complete(self, account: Account) -> None:
        total = account.total
        self.energy_j, self.method = total.energy_j, total.method
        self.source, self.boundary = total.source, total.boundary
        self.reason, self.uncertainty_j, self.invalid = total.reason, total.uncertainty_j, total.invalid
        if _cuda() is not None and total.energy_j is not None:
            self.covers_gpus = bool({"gpu_board", "module"} & {*(total.boundary or "").split("+")})
        self.devices = account.devices
        self.ticks, self.tick_seconds = account.ticks, account.tick_seconds

    def __repr__(self) -> str:
        energy = (
            f"energy_j=None, reason={self.reason!r}" if self.energy_j is None else f"energy_j={self.energy_j!r}"
        )
        return f"EnergyReading({energy}, method={self.method!r}, source={self.source!r}, seconds={self.seconds!r})"


class EnergyMeter:
    """Measures the energy of blocks of code.

    Example:
        def test_generation(energy_meter):
            with energy_meter() as reading:
                model.generate(inputs)
            assert reading.energy_j < 100

    Whole devices are metered, with everything that runs on them, in any process. The devices are the GPUs that
    PyTorch sees if this process uses it on GPUs, else those that ``CUDA_VISIBLE_DEVICES`` selects, else the CPU
    packages. If these GPUs cannot be identified, the energy is not available. An estimate covers only this process
    and its descendants. Blocks may be nested and run in several threads: each has its own meters.

    A GPU works on after a call has returned. If this process uses CUDA through PyTorch, the GPUs are synchronized
    at both ends of the block. With other libraries and other processes, synchronize them yourself.
    """

    @contextmanager
    def __call__(self, backend: str = AUTO) -> Iterator[EnergyReading]:
        """Measure a block. If the block raises, the reading is complete all the same.

        No CUDA context is created. The NVML meter takes most of a second to open, before the block. It waits for a
        tick of its counter at both ends, so that the energy covers up to a tick more than the block.

        Args:
            backend: The meter: ``auto`` (all that can measure, an estimate only if none can), ``nvml``, ``rapl``,
                ``estimate``, or the name of an installed one. A meter that cannot be used reports no energy, and
                the reason.

        Raises:
            ValueError: There is no meter of that name.
        """
        if backend not in (names := (AUTO, *installed(METER_GROUP))):
            raise ValueError(f"meter {backend!r} is not installed (installed: {', '.join(names)})")
        meters = _open_meters(backend)
        try:
            _synchronize()
            meters.begin()
            reading = EnergyReading()
            try:
                yield reading
            except BaseException:
                with suppress(Exception):  # the block's own exception is raised below
                    _synchronize()
                raise
            else:
                _synchronize()
            finally:
                reading._ended = time.monotonic()
                reading._complete(meters.end())
        finally:
            meters.close()


def _open_meters(backend: str) -> Meters:
    """Open the meters of a block, for the GPUs that this process uses through PyTorch, or else may use."""
    gpus = _own_gpus()  # PyTorch keeps them even if CUDA_VISIBLE_DEVICES has changed since it was initialised
    if gpus is None and backend not in _CPU_METERS:
        visible = visible_gpus()
        if not visible.is_ambiguous:
            gpus = [gpu.uuid for gpu in visible.all]
        elif backend in (AUTO, "nvml"):
            return Meters(refusals={"nvml": _AMBIGUOUS})
    return Meters.open(backend, gpus or [])


def _cuda() -> Any:
    """Return PyTorch's CUDA module if this process uses CUDA, else None. Nothing is initialised."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    return cuda if cuda is not None and cuda.is_initialized() else None


def _own_gpus() -> list[str] | None:
    """Return the UUIDs of the GPUs that PyTorch sees in this process; None if it uses none, or has no UUIDs."""
    if (cuda := _cuda()) is None:
        return None
    gpus = [cuda.get_device_properties(index) for index in range(cuda.device_count())]
    # The tests may use an older PyTorch than our engine, without this property.
    return [f"GPU-{gpu.uuid}" for gpu in gpus] if all(hasattr(gpu, "uuid") for gpu in gpus) else None


def _synchronize() -> None:
    """Wait for the GPUs that this process uses through PyTorch. No CUDA context is created."""
    if (cuda := _cuda()) is None:
        return
    for index in range(cuda.device_count()):
        if index == cuda.current_device() or cuda.memory_reserved(index):
            cuda.synchronize(index)
