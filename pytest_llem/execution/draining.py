"""Track processes that have written their result and have not exited yet.

Their devices stay in use until they exit.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field

from pytest_llem.isolation.launcher import ExperimentProcess
from pytest_llem.machine.device_locks import Ownership
from pytest_llem.machine.device_request import DeviceRequest
from pytest_llem.machine.owner import Owner


@dataclass
class DrainingProcesses:
    """The processes of a session that are exiting.

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
        ownership, kept = handover
        stack.enter_context(kept)
        is_suitable = len(ownership.devices) == request.count and ownership.devices <= set(request.pool)
        if is_suitable and ownership.hand_over(owner, keep=keep):
            return ownership
        kept.close()
        return None

    def close(self) -> None:
        """Wait until every process has exited, and release the devices."""
        handover, self.handover = self.handover, None
        if handover is not None:
            handover[1].close()
