"""An item's lease of devices, and the processes of earlier items that still use theirs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from pytest_llem.isolation.launcher import ExperimentProcess
from pytest_llem.machine.device_locks import Ownership
from pytest_llem.machine.device_request import Allocation, DeviceRequest
from pytest_llem.machine.owner import Owner
from pytest_llem.results.experiment import GapRecord

if TYPE_CHECKING:
    from pytest_llem.execution.live_progress import LiveProgress


@dataclass
class DeviceLease:
    """Exclusive use of devices by one item, and what is prepared for its runs.

    An item runs again if its experiment was contended, or if a plugin reruns it.

    Attributes:
        allocation: The devices; none if they could not be leased.
        refusal: Why they could not be leased; None if they were.
        gap: Idle time before the item's first run; None once that run has taken it.
        next_gap: Gets the devices ready for another run, and returns the idle time before it.
        process: The item's process if it was started early and no run has taken it.
        hand_over_process: Takes over a process that has written its result and has not exited yet; None to wait
            for its exit.
        progress: Shows the live progress; None without a terminal.
        ends_server: Whether the item's experiment is the last of several on one server.
        defer: Registers what to call before the devices are released, which may be after later items.
    """

    allocation: Allocation = field(default_factory=Allocation)
    refusal: str | None = None
    gap: GapRecord | None = None
    next_gap: Callable[[], GapRecord | None] = lambda: None
    process: ExperimentProcess | None = None
    hand_over_process: Callable[[ExperimentProcess], None] | None = None
    progress: LiveProgress | None = None
    ends_server: bool = False
    defer: Callable[[Callable[[], None]], object] = lambda callback: None

    def take_gap(self) -> GapRecord | None:
        """Return the idle time before this run of the item."""
        gap, self.gap = self.gap, None
        return gap or self.next_gap()

    def take_process(self) -> ExperimentProcess | None:
        """Return the process that was started early; None after the item's first run."""
        process, self.process = self.process, None
        return process


#: An item's lease while it runs.
LEASE = pytest.StashKey[DeviceLease]()


@dataclass
class DrainingProcesses:
    """The processes of a session that have written their result and have not exited yet.

    Their devices stay in use until they exit.

    Attributes:
        handover: Devices kept between two items, and the stack that releases them; None if none are kept.
    """

    handover: tuple[Ownership, ExitStack] | None = None
    _processes: list[ExperimentProcess] = field(default_factory=list)

    def take(self, process: ExperimentProcess) -> None:
        """Add a process that has written its result."""
        self._processes.append(process)

    def __contains__(self, process: ExperimentProcess) -> bool:
        return process in self._processes

    def is_any(self) -> bool:
        """Return whether any process has not exited yet."""
        return any(not process.has_exited for process in self._processes)

    def shut_down(self) -> None:
        """Wait until every process has exited. May be called again."""
        while self._processes:
            self._processes[-1].shut_down()
            self._processes.pop()

    def hand_over(self, ownership: Ownership, stack: ExitStack) -> None:
        """Keep the devices for the next item.

        Args:
            ownership: Ownership of the devices.
            stack: Releases the devices when it is closed, once no process is left.
        """
        self.handover = ownership, stack.pop_all()

    def take_over(
        self, request: DeviceRequest, owner: Owner, stack: ExitStack, *, keep: bool = False
    ) -> Ownership | None:
        """Return the ownership of devices that the previous item handed over.

        Args:
            request: The devices that the next item may have.
            owner: The new owner.
            stack: Releases the devices from now on.
            keep: Take them over even if another process waits for one of them.

        Returns:
            None if none or unsuitable devices were handed over, or if another process waits for one of them.
        """
        handover, self.handover = self.handover, None
        if handover is None:
            return None
        ownership, earlier_stack = handover
        stack.enter_context(earlier_stack)
        is_suitable = len(ownership.devices) == request.count and ownership.devices <= set(request.pool)
        if is_suitable and ownership.hand_over(owner, keep=keep):
            return ownership
        earlier_stack.close()
        return None

    def close(self) -> None:
        """Wait until every process has exited, and release the devices."""
        handover, self.handover = self.handover, None
        if handover is not None:
            handover[1].close()
