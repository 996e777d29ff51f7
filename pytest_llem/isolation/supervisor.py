"""An experiment's supervisor: starts its process, waits with it, and leaves nothing of it behind.

    python -I -S supervisor.py ATTEMPT PIDS COMMAND…

A process of a forkserver becomes one by :func:`guard` alone, without this module being run.

It is the parent of the experiment's process and inherits whatever of its descendants lose their own parent, also
those that have left its session, so that in the end it can kill every one of them. It runs nobody else's code, so
nothing keeps it from doing so: no library that holds the interpreter's lock, and no death of the pytest process.

Standard input holds orders: :data:`END`, or :data:`TIME_IS_UP` to have the process say first where it is. The end
of the file is the pytest process's own: everything ends, and the folder ATTEMPT is removed. So it is when one of
the processes PIDS ends, ids with commas between them: xdist's controller. Standard output takes what there is to
tell, a JSON object a line: ``{"pid": …, "supervisor": …}`` of the started process and this one, ``{"refused": …}``
where it could not be started, ``{"status": …}``, as :func:`os.waitstatus_to_exitcode` gives it, once nobody is
left. Standard error becomes the experiment's standard output and error.

Nothing but the standard library is imported, and little of it: every experiment waits for this.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

END, TIME_IS_UP = b"e", b"t"

#: Sent when the time is up: the worker has it write down where each of its threads is.
ASK_WHERE = signal.SIGUSR1

#: How long it has for that, in seconds.
ANSWER_SECONDS = 0.5

#: How long killed processes may take to go, in seconds. Only one that is stuck in the kernel takes this long.
REAP_SECONDS = 25.0

#: All that it can be sent and does not need.
_SIGNALS = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def supervised(command: Sequence[str], attempt: str = "", watch_pids: Iterable[int] = ()) -> list[str]:
    """Return what starts *command* under a supervisor.

    Args:
        command: The program, by its path, and its arguments.
        attempt: A folder that is removed where nobody is left to do that.
        watch_pids: Processes whose end is its end, beside the one that holds the supervisor's standard input.
    """
    pids = ",".join(map(str, watch_pids))
    return [sys.executable, "-I", "-S", __file__, attempt, pids, *command]


def main(attempt: str, pids: str, command: list[str]) -> None:
    """Start *command*, and return when nothing of it is left."""
    told = guard(attempt, pids)
    if told is not None:
        _execute(command, told)


def guard(attempt: str, pids: str) -> int | None:
    """Fork the experiment's process, as the leader of a session of its own that dies with this one.

    Returns:
        In that process, a file descriptor that takes why it cannot be started. In this one None, once nothing of
        the other is left.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    blocked = signal.pthread_sigmask(signal.SIG_SETMASK, ())  # whoever blocks that a child has ended
    woken, wake = wake_on_child()
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # standard input tells
    watched = _watch(pids)
    supervisor = os.getpid()
    worker = os.fork()  # there is but one thread
    if not worker:
        return _begin(supervisor, {woken, wake, *watched}, blocked)
    _tell(pid=worker, supervisor=supervisor)
    abandoned = False
    while not _has_ended(worker):
        ready, _, _ = select.select([0, woken, *watched], [], [])
        if woken in ready:
            os.read(woken, 512)
        if not watched.isdisjoint(ready):
            abandoned = True
            break
        if 0 in ready:
            order = os.read(0, 1)
            abandoned = not order
            if order == TIME_IS_UP:
                os.kill(worker, ASK_WHERE)
                time.sleep(ANSWER_SECONDS)
            break
    status = _end(worker, woken)
    if abandoned:
        shutil.rmtree(attempt, ignore_errors=True)
    _tell(status=status)
    return None


def _begin(supervisor: int, not_its_own: Iterable[int], blocked: Iterable[int]) -> int:
    """Make this process, just forked, the experiment's."""
    try:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != supervisor:
            os._exit(1)
        os.setsid()
        with suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:  # noqa: PTH123
            score.write("1000")  # where memory runs out the experiment goes, and not pytest
        signal.set_wakeup_fd(-1)
        for number in {*_SIGNALS, signal.SIGCHLD} - {signal.SIGINT}:  # that one is pytest's
            signal.signal(number, signal.SIG_DFL)
        for fd in not_its_own:
            os.close(fd)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        told = os.dup(1)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        os.dup2(2, 1)
    except BaseException:
        os._exit(127)
    return told


def _execute(command: list[str], told: int) -> None:
    try:
        os.execv(command[0], command)
    except OSError as error:
        _tell(told, refused=f"{command[0]}: {error.strerror}")
    finally:
        os._exit(127)


def _watch(pids: str) -> set[int]:
    """Return what becomes readable when one of these processes ends."""
    watched = set()
    for pid in filter(None, pids.split(",")):
        with suppress(AttributeError, OSError):  # no Linux, or gone already: standard input ends soon
            watched.add(os.pidfd_open(int(pid)))
    return watched


def wake_on_child() -> tuple[int, int]:
    """Return both ends of a pipe that becomes readable when a child ends."""
    woken, wake = os.pipe()
    for end in (woken, wake):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    return woken, wake


def _has_ended(worker: int) -> bool:
    """Whether *worker* has ended; it is not reaped, so that its id stays its own. Orphans are."""
    look = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while found := os.waitid(os.P_ALL, 0, look):
        if found.si_pid == worker:
            return True
        os.waitpid(found.si_pid, 0)
    return False


def _end(worker: int, woken: int) -> int | None:
    """Kill *worker* and all its descendants, and return how it ended; None where it will not go."""
    status = None
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(worker, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.kill(worker, signal.SIGKILL)  # it may not lead a group yet
    give_up = time.monotonic() + REAP_SECONDS
    while time.monotonic() < give_up:
        try:
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == worker:
                    status = os.waitstatus_to_exitcode(ended[1])
        except ChildProcessError:
            break  # nobody is left
        for orphan in _children():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(orphan, signal.SIGKILL)
        select.select([woken], [], [], 0.05)
        with suppress(BlockingIOError):
            os.read(woken, 512)
    return status


def _children() -> Iterator[int]:
    """Yield the ids of this process's children: one that lost its parent is among them."""
    own = str(os.getpid())
    with suppress(OSError):
        for entry in os.listdir("/proc"):  # noqa: PTH208
            if not entry.isdecimal():
                continue
            with suppress(OSError), open(f"/proc/{entry}/stat", errors="replace") as stat:  # noqa: PTH123
                if stat.read().rpartition(")")[2].split()[1] == own:
                    yield int(entry)


def _prctl(option: int, value: int) -> None:
    with suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(option, value)


def _tell(fd: int = 1, **what: object) -> None:
    with suppress(OSError):  # nobody listens any more
        os.write(fd, json.dumps(what).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
