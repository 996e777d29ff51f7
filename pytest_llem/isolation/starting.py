"""How an experiment's process comes to be: what a start is given, what it gives, and the start by exec."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from pytest_llem.isolation import supervisor, worker


class ChildPipes(NamedTuple):
    """The process's ends of the pipes between it and pytest's: file descriptors.

    Attributes:
        orders: The supervisor reads its orders there.
        reports: It tells there what becomes of the process.
        output: What the process writes to standard output and standard error.
        events: The process announces its phases there.
        cue: It begins when it reads a byte there.
    """

    orders: int
    reports: int
    output: int
    events: int
    cue: int


class SupervisorHandle(Protocol):
    """What has been asked to start a supervisor, and is answerable for it."""

    #: Whose death is the experiment's, in words.
    name: str

    def order(self, order: bytes) -> None:
        """Pass on an order to a supervisor that has not told of itself yet, and may never."""

    def give_up(self) -> tuple[int | None, str | None]:
        """End what is left of a supervisor that has not told how its process ended.

        Returns:
            How what should have become that supervisor ended, as subprocess has it, and why it was refused; None
            where neither is known. May be called again.
        """

    def kill(self, supervisor: int | None) -> None:
        """Be done with the supervisor. It is killed where it has not gone by itself: then its id is told."""


class Starter(Protocol):
    """Starts supervisors, which start an experiment's process each."""

    def start(self, ends: ChildPipes, attempt: Path, watch_pids: Sequence[int]) -> SupervisorHandle:
        """Start one.

        Args:
            ends: Its ends of the pipes, to be inherited or passed on; the caller closes them here.
            attempt: The folder that holds the job.
            watch_pids: Processes, beside this one, whose end is its end.

        Raises:
            OSError: The system has no process for it.
        """


class Spawn:
    """Starts a fresh interpreter for every experiment.

    Args:
        python: The interpreter.
        environment: Its environment variables.
    """

    def __init__(self, python: str, environment: Mapping[str, str]) -> None:
        self._python = python
        self._environment = environment

    def start(self, ends: ChildPipes, attempt: Path, watch_pids: Sequence[int]) -> SupervisorHandle:
        # -P: what lies in the current folder is not in the way of the standard library.
        command = [self._python, "-P", "-m", worker.__name__, str(attempt), str(ends.events), str(ends.cue)]
        return _Spawned(
            subprocess.Popen(
                supervisor.supervised(command, str(attempt), watch_pids),
                stdin=ends.orders,
                stdout=ends.reports,
                stderr=ends.output,
                pass_fds=[ends.events, ends.cue],
                env=self._environment,
                start_new_session=True,  # a terminal's Ctrl-C is for pytest
            )
        )


class _Spawned:
    """A supervisor that is this process's child."""

    name = "its supervisor"

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def order(self, order: bytes) -> None:
        """It reads its orders itself, sooner or later."""

    def give_up(self) -> tuple[int | None, str | None]:
        return None, None

    def kill(self, supervisor: int | None) -> None:
        self._process.kill()
        self._process.wait()
