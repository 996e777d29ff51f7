"""The energy of whatever runs while a block of code does: the meters of an experiment, for any code."""

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

_OPEN = "the block has not ended yet"

_AMBIGUOUS = (
    "CUDA_VISIBLE_DEVICES names different GPUs by number, or a part of one, and which GPU that is is unknown: "
    "set CUDA_DEVICE_ORDER=PCI_BUS_ID, or name it by its UUID"
)


class EnergyReading:
    """What a block of code took. The energy is known once the block has ended.

    Attributes:
        energy_j: In J, over ``boundary``; None where it could not be had, never 0 in its place.
        method: How it was obtained: ``measured``, ``sampled``, ``estimated``, ``unavailable``.
        source: What it was read from: ``nvml_total_energy``, ``rapl_package``, ``cpu_time_model``, …
        boundary: What it covers: ``gpu_board`` where there are GPUs that can be read, else ``cpu_package``.
        covers_gpus: Whether it covers GPUs, where this process uses some through PyTorch; None where it uses none.
        invalid: Reason code where ``energy_j`` cannot be right: ``counter_disagrees``; None where nothing is known
            against it.
        reason: Why ``energy_j`` is None.
        uncertainty_j: Standard uncertainty (k = 1) of reading the meter at both edges, in J.
        devices: Each device of every meter; ``energy_j`` is the sum over those of ``boundary``.
        ticks: How many ticks of the meter's counter, or samples of power, the energy covers; None where neither is
            known.
    """

    def __init__(self) -> None:
        self.energy_j: float | None = None
        self.method: Method = "unavailable"
        self.source: str | None = None
        self.boundary: str | None = None
        self.covers_gpus: bool | None = None
        self.invalid: str | None = None
        self.reason: str | None = _OPEN
        self.uncertainty_j: float | None = None
        self.devices: tuple[DeviceReading, ...] = ()
        self.ticks: float | None = None
        self._began = time.monotonic()
        self._ended: float | None = None

    @property
    def seconds(self) -> float:
        """How long the block took, in s on a clock that never goes back; so far, where it has not ended."""
        return (time.monotonic() if self._ended is None else self._ended) - self._began

    def _stop(self) -> None:
        self._ended = time.monotonic()

    def _take(self, account: Account) -> None:
        total = account.total
        self.energy_j, self.method = total.energy_j, total.method
        self.source, self.boundary = total.source, total.boundary
        self.reason, self.uncertainty_j, self.invalid = total.reason, total.uncertainty_j, total.invalid
        if _cuda() is not None and total.energy_j is not None:
            self.covers_gpus = bool({"gpu_board", "module"} & {*(total.boundary or "").split("+")})
        self.devices = account.devices
        if account.tick_seconds and account.seconds:
            self.ticks = account.seconds / account.tick_seconds

    def __repr__(self) -> str:
        energy = (
            f"energy_j=None, reason={self.reason!r}" if self.energy_j is None else f"energy_j={self.energy_j!r}"
        )
        return f"EnergyReading({energy}, method={self.method!r}, source={self.source!r}, seconds={self.seconds!r})"


class EnergyMeter:
    """Measures blocks of code: ``with energy_meter() as m: …``, then ``m.energy_j``, ``m.seconds``, ``m.method``.

    What is read are whole devices, all GPUs that PyTorch sees where this process uses it on GPUs, otherwise those
    that ``CUDA_VISIBLE_DEVICES`` leaves, or else the CPU packages: whatever runs on them meanwhile counts, in this
    process or any other. (An estimate knows this process and its descendants alone.) Where neither says which GPUs
    those are, there is no energy. Blocks may lie in each other, and run in several threads: each has meters of its
    own.

    A GPU works on after a call has returned. Where this process uses CUDA through PyTorch, that is waited for at
    both ends of the block; with any other library, and for other processes, it is the caller's to do.
    """

    @contextmanager
    def __call__(self, backend: str = AUTO) -> Iterator[EnergyReading]:
        """Measure a block; what it raises comes through, and the figures are there all the same.

        No CUDA context is made. NVML's meter takes most of a second to open, outside of the block, and waits for a
        tick of its counter at either end, so that its energy covers up to a tick more than the block.

        Args:
            backend: The meter: ``auto`` (all that can measure, an estimate only where none can), ``nvml``,
                ``rapl``, ``estimate``, or the name of an installed one. One that cannot be used gives no energy,
                and the reason.

        Raises:
            ValueError: There is no meter of that name.
        """
        if backend not in (names := (AUTO, *installed(METER_GROUP))):
            raise ValueError(f"no meter of the name {backend!r} is installed (there are: {', '.join(names)})")
        boards = visible_gpus()
        # PyTorch keeps the GPUs that it has begun with, whatever CUDA_VISIBLE_DEVICES says by now.
        gpus = _own_gpus()
        if gpus is None and not boards.is_ambiguous:
            gpus = [board.uuid for board in boards.all]
        if gpus is None and backend in (AUTO, "nvml"):
            meters = Meters(refusals={"nvml": _AMBIGUOUS})
        else:
            meters = Meters.open(backend, gpus or [])
        try:
            _synchronize()
            meters.begin()
            reading = EnergyReading()
            try:
                yield reading
            except BaseException:
                with suppress(Exception):  # what the block raised says more
                    _synchronize()
                raise
            else:
                _synchronize()
            finally:
                reading._stop()
                reading._take(meters.end())
        finally:
            meters.close()


def _cuda() -> Any:
    """Return PyTorch's CUDA runtime where this process uses it, else None: nothing is initialised by that."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    return cuda if cuda is not None and cuda.is_initialized() else None


def _own_gpus() -> list[str] | None:
    """Return the UUIDs of the GPUs that PyTorch sees in this process; None where it does not use CUDA yet."""
    if (cuda := _cuda()) is None:
        return None
    return [f"GPU-{cuda.get_device_properties(index).uuid}" for index in range(cuda.device_count())]


def _synchronize() -> None:
    """Wait for the GPUs that this process uses through PyTorch. None gets a context by that."""
    if (cuda := _cuda()) is None:
        return
    for index in range(cuda.device_count()):
        if index == cuda.current_device() or cuda.memory_reserved(index):
            cuda.synchronize(index)
