"""What :mod:`~pytest_llem.execution.leasing` passes to the function that runs an item."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from pytest_llem.isolation.launcher import ExperimentProcess
from pytest_llem.machine.device_request import Allocation
from pytest_llem.results.experiment import GapRecord

if TYPE_CHECKING:
    from pytest_llem.execution.live_progress import LiveProgress


@dataclass
class DeviceLease:
    """Exclusive use of devices by one item, and what is prepared with them for its runs.

    Attributes:
        allocation: The devices; none if they could not be leased.
        refusal: Why they could not be leased; None if they were.
        gap: Idle time before the item's first run; None once that run has taken it.
        next_gap: Gets the devices ready for another run, and returns the idle time before it.
        process: The item's process if it was started early and no run has taken it.
        drain: Takes over a process that has written its result and has not exited yet; None to wait for its exit.
        progress: Shows the live progress; None without a terminal.
        ends_server: Whether no later item of this session will use the server that the item's experiment shares.
        defer: Registers what to call before the devices are released, which may be after later items.
    """

    allocation: Allocation = field(default_factory=Allocation)
    refusal: str | None = None
    gap: GapRecord | None = None
    next_gap: Callable[[], GapRecord | None] = lambda: None
    process: ExperimentProcess | None = None
    drain: Callable[[ExperimentProcess], None] | None = None
    progress: LiveProgress | None = None
    ends_server: bool = False
    defer: Callable[[Callable[[], None]], object] = lambda callback: None

    def take_gap(self) -> GapRecord | None:
        """Return the idle time before this run. A plugin may run the item again under the same lease."""
        gap, self.gap = self.gap, None
        return gap or self.next_gap()

    def take_process(self) -> ExperimentProcess | None:
        """Return the process that was started early; None after the item's first run."""
        process, self.process = self.process, None
        return process


#: An item's lease while it runs.
LEASE = pytest.StashKey[DeviceLease]()
