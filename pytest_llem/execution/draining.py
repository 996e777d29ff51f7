"""Processes that have left their result and have yet to exit: the devices that they had are theirs up to then."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass, field

from pytest_llem.isolation.launcher import ExperimentProcess
from pytest_llem.machine.devices import Ownership
from pytest_llem.machine.owner import Owner


@dataclass
class DrainingProcesses:
    """The processes of a session that are exiting, while other things are done.

    Attributes:
        kept: What owns their devices where no item's turn does, and the stack that lets go of these in the end.
    """

    kept: tuple[Ownership, ExitStack] | None = None
    _processes: list[ExperimentProcess] = field(default_factory=list)

    def take(self, process: ExperimentProcess) -> None:
        """See to a process that has left its result."""
        self._processes.append(process)

    def __contains__(self, process: ExperimentProcess) -> bool:
        return process in self._processes

    def is_any(self) -> bool:
        """Whether one is still there."""
        return any(not process.has_exited for process in self._processes)

    def shut_down(self) -> None:
        """Return once none is left. May be called again."""
        while self._processes:
            self._processes[-1].shut_down()
            self._processes.pop()

    def keep(self, ownership: Ownership, held: ExitStack) -> None:
        """Keep the devices from one item's turn to the next.

        Args:
            ownership: Of these.
            held: Lets go of them on being closed, once no process is left.
        """
        self.kept = ownership, held.pop_all()

    def pass_on(self, devices: Collection[str], owner: Owner, held: ExitStack) -> Ownership | None:
        """Return the ownership of *devices* that was kept; None where others, or none, were, or somebody waits.

        Args:
            devices: Their names.
            owner: Who is to own them.
            held: What lets go of them from now on.
        """
        kept, self.kept = self.kept, None
        if kept is None:
            return None
        ownership, stack = kept
        held.enter_context(stack)
        if ownership.devices == set(devices) and ownership.hand_over(owner):
            return ownership
        stack.close()
        return None

    def close(self) -> None:
        """Wind up all, and let go of the devices."""
        kept, self.kept = self.kept, None
        if kept is not None:
            kept[1].close()
