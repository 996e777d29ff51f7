"""Start an experiment's supervisor: the protocol of all ways to start one, and the start of a new interpreter."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from pytest_llem.isolation import supervisor, worker


class ChildPipes(NamedTuple):
    """The experiment's ends of the pipes to the pytest process, as file descriptors.

    Attributes:
        orders: The supervisor reads orders from it.
        reports: The supervisor reports the state of the process to it.
        output: Standard output and standard error of the process.
        events: The process announces its phases on it.
        start: The process begins its job when it reads a line from it. Each further line gives it a turn.
    """

    orders: int
    reports: int
    output: int
    events: int
    start: int


class SupervisorHandle(Protocol):
    """A started supervisor."""

    #: For error messages: the processes whose death ends the experiment.
    name: str

    def order(self, order: bytes) -> None:
        """Forward an order for a supervisor that has not reported its process id, and may never do so."""

    def give_up(self) -> tuple[int | None, str | None]:
        """End what is left of a supervisor that has not reported how its process ended. May be called again.

        Returns:
            Status of the process that should have become the supervisor, as ``Popen.returncode``, and why it could
            not be started; None for what is unknown.
        """

    def kill(self, supervisor: int | None) -> None:
        """Kill and reap the supervisor.

        Args:
            supervisor: Its process id if it still runs; None if it has ended by itself.
        """


#: Starts a supervisor, which starts the process of one experiment. It is called with the experiment's ends of the
#: pipes, of which the caller closes its copies afterwards; the folder that holds the job; and the processes,
#: besides this one, whose end also ends the experiment. It raises OSError if the system cannot start a process.
Starter = Callable[[ChildPipes, Path, Sequence[int]], SupervisorHandle]


def spawn_worker(
    python: str, environment: Mapping[str, str], pipes: ChildPipes, attempt: Path, watch_pids: Sequence[int]
) -> SupervisorHandle:
    """Start a new interpreter for an experiment. With the first two arguments bound, it is a :data:`Starter`.

    Args:
        python: The interpreter.
        environment: Its environment variables.
        pipes: The experiment's ends of the pipes.
        attempt: The folder that holds the job.
        watch_pids: Processes, besides this one, whose end also ends the experiment.

    Raises:
        OSError: The system cannot start a process.
    """
    # -P: files in the current folder do not shadow the standard library.
    command = [python, "-P", "-m", worker.__name__, str(attempt), str(pipes.events), str(pipes.start)]
    return Spawned(
        subprocess.Popen(
            supervisor.supervisor_command(command, str(attempt), watch_pids),
            stdin=pipes.orders,
            stdout=pipes.reports,
            stderr=pipes.output,
            pass_fds=[pipes.events, pipes.start],
            env=environment,
            start_new_session=True,  # Ctrl-C in the terminal must reach only pytest
        )
    )


class Spawned:
    """Handle of a supervisor that is this process's child."""

    name = "its supervisor"

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def order(self, order: bytes) -> None:
        """Do nothing: the supervisor reads its orders from its own pipe."""

    def give_up(self) -> tuple[int | None, str | None]:
        return None, None

    def kill(self, supervisor: int | None) -> None:
        self._process.kill()
        self._process.wait()
