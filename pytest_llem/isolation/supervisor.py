"""Supervise an experiment's process: start it, wait for it, and kill it with all its descendants.

    python -I -S supervisor.py ATTEMPT PIDS COMMAND…

A process that a forkserver has forked calls :func:`supervise` directly.

The supervisor is the parent of the experiment's process and a subreaper: it adopts every descendant whose parent
ends, also one that has left the session, and so can kill them all. It runs no third-party code. So neither a
library that holds the interpreter's lock nor the death of the pytest process keeps it from killing.

Standard input carries orders: :data:`END`, or :data:`TIME_IS_UP`, which dumps the stacks of the process first. End
of file means that the pytest process has died: everything is killed and the folder ATTEMPT is removed. The same
happens when one of the processes PIDS (comma-separated ids, such as xdist's controller) ends.

If the experiment's process ends without an order, its descendants have :data:`REST_SECONDS` to end by themselves
before they are killed: Python's resource tracker removes shared memory and semaphores only after the last process
that uses it.

Files in shared memory that these processes had mapped, and that no other process has, are removed at the end: they
would use memory until the machine is restarted.

Standard output carries reports, one JSON object a line: ``{"pid": …, "supervisor": …}`` with the ids of the
started process and of the supervisor; ``{"refused": …}`` if the process could not be started; ``{"status": …}``,
as :func:`os.waitstatus_to_exitcode` returns it, once no descendant is left, or :data:`REAP_SECONDS` after the
kill: null if the process has not ended by then. Standard error becomes the experiment's standard output and
standard error.

The module imports only a small part of the standard library, as every experiment waits for these imports.
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
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

#: Orders, of one byte each.
END, TIME_IS_UP = b"e", b"t"

#: What is read instead of an order if the pytest process has died.
_ABANDONED = b""

#: Makes the worker dump the stacks of its threads. Sent when the time is up.
DUMP_STACKS = signal.SIGUSR1

#: Time for the dump, in s.
DUMP_SECONDS = 0.5

#: Time that the descendants of a process which has ended by itself may take to end, in s.
REST_SECONDS = 1.0

#: Time that killed processes may take to end, in s. Only a process stuck in the kernel takes this long.
REAP_SECONDS = 25.0

#: Signals that the supervisor ignores.
_SIGNALS = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def supervisor_command(command: Sequence[str], attempt: str = "", watch_pids: Iterable[int] = ()) -> list[str]:
    """Return the command line that runs *command* under a supervisor.

    Args:
        command: Path of the program, and its arguments.
        attempt: A folder that the supervisor removes if the pytest process has died.
        watch_pids: Processes, besides the one that holds the supervisor's standard input, whose end also ends it.
    """
    pids = ",".join(map(str, watch_pids))
    return [sys.executable, "-I", "-S", __file__, attempt, pids, *command]


def main(attempt: str, pids: str, command: list[str]) -> None:
    """Run *command* and return once it and all its descendants have ended."""
    report_fd = supervise(attempt, pids)
    if report_fd is not None:
        _execute(command, report_fd)


def supervise(attempt: str, pids: str) -> int | None:
    """Fork the experiment's process, which leads a session of its own and dies with the supervisor.

    Returns:
        In the forked process, a file descriptor for the report that it cannot be started. In the supervisor, None
        once the process and all its descendants have ended.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    blocked = signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the parent may have blocked SIGCHLD
    woken, wake = wake_on_child()
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # only standard input and the watched processes end it
    watched = _watch(pids)
    supervisor = os.getpid()
    worker = os.fork()  # safe: there is only one thread
    if not worker:
        return _begin(supervisor, {woken, wake, *watched}, blocked)
    _report(pid=worker, supervisor=supervisor)
    order = _wait(lambda: _has_ended(worker), woken, watched)
    shared = shared_files(descendants(os.getpid()))  # a process may leave them when it ends by itself
    if order is None:
        order = _wait(lambda: _is_alone(worker), woken, watched, REST_SECONDS)
        shared |= shared_files(descendants(os.getpid()))  # what the other descendants have made since
    elif order == TIME_IS_UP:
        os.kill(worker, DUMP_STACKS)
        time.sleep(DUMP_SECONDS)
    status = _end(worker, woken)
    remove_shared_files(shared)
    if order == _ABANDONED:
        shutil.rmtree(attempt, ignore_errors=True)
    _report(status=status)
    return None


def _begin(supervisor: int, supervisor_fds: Iterable[int], blocked: Iterable[int]) -> int:
    """Turn the forked process into the experiment's process."""
    try:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != supervisor:  # it ended before the call above
            os._exit(1)
        os.setsid()
        with suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:  # noqa: PTH123
            score.write("1000")  # if memory runs out, the kernel kills the experiment and not pytest
        signal.set_wakeup_fd(-1)
        for number in {*_SIGNALS, signal.SIGCHLD} - {signal.SIGINT}:  # Ctrl-C is handled by pytest
            signal.signal(number, signal.SIG_DFL)
        for fd in supervisor_fds:
            os.close(fd)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        report_fd = os.dup(1)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        os.dup2(2, 1)
    except BaseException:
        os._exit(127)
    return report_fd


def _execute(command: list[str], report_fd: int) -> None:
    try:
        os.execv(command[0], command)
    except OSError as error:
        _report(report_fd, refused=f"{command[0]}: {error.strerror}")
    finally:
        os._exit(127)


def _watch(pids: str) -> set[int]:
    """Return file descriptors that become readable when one of these processes ends."""
    watched = set()
    for pid in filter(None, pids.split(",")):
        with suppress(AttributeError, OSError):  # not Linux, or already ended: then standard input is closed soon
            watched.add(os.pidfd_open(int(pid)))
    return watched


def wake_on_child() -> tuple[int, int]:
    """Return the reading and the writing end of a pipe that becomes readable when a child ends."""
    woken, wake = os.pipe()
    for end in (woken, wake):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    return woken, wake


def _has_ended(worker: int) -> bool:
    """Return whether *worker* has ended. Orphans are reaped; *worker* is not, so that its id is not reused."""
    options = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while found := os.waitid(os.P_ALL, 0, options):
        if found.si_pid == worker:
            return True
        os.waitpid(found.si_pid, 0)
    return False


def _is_alone(worker: int) -> bool:
    """Return whether no descendant is left but *worker*, which has ended. Orphans that have ended are reaped."""
    return all(pid == worker or os.waitpid(pid, os.WNOHANG)[0] for pid in _children())


def _wait(ended: Callable[[], bool], woken: int, watched: set[int], seconds: float | None = None) -> bytes | None:
    """Wait until processes have *ended*. Return the order that came before that; None if none came.

    Args:
        ended: Returns whether they have. Called again after the end of each child.
        woken: Becomes readable when a child ends.
        watched: File descriptors that become readable when one of the watched processes ends.
        seconds: Time limit; None for none.
    """
    began = time.monotonic()
    while not ended():
        left = None if seconds is None else max(0.0, began + seconds - time.monotonic())
        ready, _, _ = select.select([0, woken, *watched], [], [], left)
        if not ready:
            break
        if woken in ready:
            os.read(woken, 512)
        if not watched.isdisjoint(ready):
            return _ABANDONED
        if 0 in ready:
            return os.read(0, 1)
    return None


def _end(worker: int, woken: int) -> int | None:
    """Kill *worker* and all its descendants, and return its status; None if it does not end."""
    status = None
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(worker, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.kill(worker, signal.SIGKILL)  # it may not lead a process group yet
    give_up = time.monotonic() + REAP_SECONDS
    while time.monotonic() < give_up:
        try:
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == worker:
                    status = os.waitstatus_to_exitcode(ended[1])
        except ChildProcessError:
            break  # no child is left
        for orphan in _children():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(orphan, signal.SIGKILL)
        select.select([woken], [], [], 0.05)
        with suppress(BlockingIOError):
            os.read(woken, 512)
    return status


def descendants(pid: int) -> list[int]:
    """Return the ids of all descendants of a process, itself not included."""
    found = [pid]
    parents = _parents()
    for one in found:  # the loop extends it
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def shared_files(pids: Iterable[int]) -> set[str]:
    """Return the paths of the files in shared memory that processes have mapped.

    The files are found by device and inode, as ``/proc/PID/maps`` may have another name: glibc creates a semaphore
    under a temporary name, which it deletes.
    """
    mapped: set[tuple[str, ...]] = set()
    for pid in pids:
        with suppress(OSError), open(f"/proc/{pid}/maps", errors="replace") as maps:  # noqa: PTH123
            mapped.update(tuple(line.split()[3:5]) for line in maps if " /dev/shm/" in line)
    found = set()
    for folder, _, names in os.walk("/dev/shm") if mapped else ():
        for path in (f"{folder}/{name}" for name in names):
            with suppress(OSError):
                file = os.lstat(path)
                device = f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}"
                if (device, str(file.st_ino)) in mapped:
                    found.add(path)
    return found


def remove_shared_files(paths: set[str]) -> None:
    """Remove files in shared memory, unless a process has mapped them."""
    for path in paths and paths - shared_files(_parents()):
        with suppress(OSError):
            os.unlink(path)  # noqa: PTH108


def _children() -> list[int]:
    """Return the ids of this process's children, adopted ones included."""
    own = os.getpid()
    return [pid for pid, parent in _parents().items() if parent == own]


def _parents() -> dict[int, int]:
    """Return the parent of each process, by its id."""
    found = {}
    with suppress(OSError):
        for entry in os.listdir("/proc"):  # noqa: PTH208
            if not entry.isdecimal():
                continue
            with suppress(OSError), open(f"/proc/{entry}/stat", errors="replace") as stat:  # noqa: PTH123
                found[int(entry)] = int(stat.read().rpartition(")")[2].split()[1])
    return found


def _prctl(option: int, value: int) -> None:
    with suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(option, value)


def _report(fd: int = 1, **fields: object) -> None:
    with suppress(OSError):  # the reader is gone
        os.write(fd, json.dumps(fields).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
