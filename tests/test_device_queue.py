"""Any free devices of a pool are leased, in the order in which experiments began to wait."""

from __future__ import annotations

import os
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest

from pytest_llem.machine import device_locks, lock_files
from pytest_llem.machine.device_locks import free_devices, owned
from pytest_llem.machine.device_request import DeviceRequest
from pytest_llem.machine.lock_files import QueuePosition, Ticket
from pytest_llem.machine.neighbours import neighbours
from pytest_llem.machine.owner import MAX_EARLIER, Owner
from tests.support.processes import wait_until

GPUS = [f"GPU-{number}" for number in range(8)]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of locks that no other test uses, and short waits."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(device_locks, "POLL_S", 0.01)


def owner(experiment: str = "e", session: str | None = None) -> Owner:
    return Owner.of_this_process("s", experiment, session=session)


def own(pool: list[str], count: int, name: str = "e") -> ExitStack:
    """Own devices until the stack is closed."""
    stack = ExitStack()
    stack.enter_context(owned(pool, owner(name), print, count=count))
    return stack


class Waiter(threading.Thread):
    """Waits for devices in a thread of its own, and owns them until it is released."""

    def __init__(self, pool: list[str], count: int, name: str = "e") -> None:
        super().__init__(daemon=True)
        self._pool, self._count, self._experiment = pool, count, name
        self.got: set[str] = set()
        self.reports: list[str] = []
        self.waited_for: str | None = None
        self._release = threading.Event()

    def run(self) -> None:
        with owned(self._pool, owner(self._experiment), self.reports.append, count=self._count) as ownership:
            self.waited_for = ownership.waited_for
            self.got = ownership.devices
            self._release.wait(60)

    def wait(self) -> Waiter:
        """Start, and return once it waits or has its devices."""
        before = len(list(lock_files.waiting_tickets(_locks())))
        self.start()
        wait_until(lambda: self.got or len(list(lock_files.waiting_tickets(_locks()))) > before)
        return self

    def release(self) -> None:
        self._release.set()
        self.join()


def _locks() -> Path:
    return Path(tempfile.gettempdir(), "pytest-llem-locks")


def test_any_free_devices_of_a_pool_are_taken() -> None:
    with own(GPUS[:2], 2), own(GPUS, 3) as three:
        with owned(GPUS, owner(), print, count=2) as ownership:
            assert ownership.devices <= set(GPUS[5:])
            assert free_devices(GPUS) == set(GPUS[5:]) - ownership.devices
        assert three


def test_preferred_devices_are_taken_if_they_are_free() -> None:
    request = DeviceRequest(tuple(GPUS), 2)
    assert request.choose(GPUS, ["GPU-5", "GPU-6"]) == ("GPU-5", "GPU-6")
    assert request.choose(GPUS[:6], ["GPU-5", "GPU-6"]) == ("GPU-0", "GPU-1")
    choose = partial(request.choose, preferred=["GPU-5", "GPU-6"])
    with owned(GPUS, owner(), print, count=2, choose=choose) as ownership:
        assert ownership.devices == {"GPU-5", "GPU-6"}


def test_one_that_needs_four_comes_before_later_ones_that_need_one() -> None:
    first = [own(GPUS, 1, f"first {at}") for at in range(6)]
    large = Waiter(GPUS, 4, "large").wait()
    small = Waiter(GPUS, 1, "small").wait()
    first[0].close()
    time.sleep(0.1)
    assert not large.got
    assert not small.got, "three GPUs are free, and they are kept for the large one"
    first[1].close()
    wait_until(lambda: large.got)
    assert not small.got
    first[2].close()
    wait_until(lambda: small.got)
    assert not large.got & small.got
    assert large.waited_for is not None
    assert "experiment first" in large.waited_for
    for one in (large, small):
        one.release()
    for stack in first:
        stack.close()


def test_reason_of_a_wait_for_the_queue_names_the_one_before() -> None:
    with own(GPUS[:1], 1):
        large = Waiter(GPUS[:2], 2).wait()
        small = Waiter(GPUS[1:2], 1).wait()
        wait_until(lambda: small.reports)
        assert small.reports == [f"waiting for GPU-1: pid {os.getpid()}, which runs study s, is next"]
    wait_until(lambda: large.got)
    large.release()
    wait_until(lambda: small.got)
    small.release()


def test_waiting_for_one_device_does_not_block_others() -> None:
    with own(GPUS[:1], 1):
        blocked = Waiter(GPUS[:1], 1).wait()
        with owned(GPUS, owner(), print, count=7) as ownership:
            assert ownership.waited_seconds == 0
    wait_until(lambda: blocked.got)
    blocked.release()


@pytest.mark.parametrize("spoil", [lambda file: None, lambda file: os.utime(file, (0, 0)), Path.unlink])
def test_ticket_of_a_dead_or_stopped_process_is_ignored(spoil: Callable[[Path], object]) -> None:
    with own(GPUS[:1], 1):
        pass  # makes the folder
    pid = os.fork()
    if pid == 0:
        try:
            QueuePosition.take(_locks(), Ticket(owner=owner(), pool=GPUS))
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    (file,) = _locks().glob("ticket-*")
    spoil(file)
    assert list(lock_files.waiting_tickets(_locks())) == []
    with owned(GPUS, owner(), print) as ownership:
        assert ownership.waited_seconds == 0


def test_untouched_ticket_is_overtaken() -> None:
    with own(GPUS[:1], 1):
        pass
    place = QueuePosition.take(_locks(), Ticket(owner=owner(), pool=GPUS))
    assert len(list(lock_files.waiting_tickets(_locks()))) == 1
    past = time.time() - lock_files.MAX_UNTOUCHED_S - 1
    os.utime(place.path, (past, past))
    assert list(lock_files.waiting_tickets(_locks())) == []
    place.touch()
    assert len(list(lock_files.waiting_tickets(_locks()))) == 1
    place.leave()
    assert list(_locks().glob("*ticket*")) == []


def test_each_of_many_gets_its_own_devices_in_bounded_time() -> None:
    """Threads stand for the workers of two runs, which ask again as soon as they have released."""
    rng = random.Random(1)
    in_use: Counter[str] = Counter()
    counts, lock, waits = [1, 1, 2, 4] * 4, threading.Lock(), []
    wrong: list[str] = []

    def work(count: int, lengths: list[float]) -> None:
        for length in lengths:
            with owned(GPUS, owner(), lambda line: None, count=count) as ownership:
                with lock:
                    in_use.update(ownership.devices)
                    wrong.extend(name for name, number in in_use.items() if number > 1)
                    waits.append(ownership.waited_seconds)
                time.sleep(length)
                with lock:
                    in_use.subtract(ownership.devices)

    threads = [
        threading.Thread(target=work, args=(count, [rng.uniform(0, 0.02) for _ in range(5)])) for count in counts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert len(waits) == 5 * len(counts)


@pytest.fixture
def span() -> tuple[datetime, datetime]:
    """An hour around the test."""
    return datetime.now(UTC) - timedelta(hours=1), datetime.now(UTC) + timedelta(hours=1)


def test_neighbours_are_leases_of_other_devices_at_the_same_time(span: tuple[datetime, datetime]) -> None:
    with owned(GPUS[:1], owner("ours", "run"), print):
        with owned(GPUS[1:3], owner("pair", "run"), print):
            pass
        with owned(GPUS[1:2], owner("other", "another"), print):
            found = neighbours(GPUS[:1], "run", *span)
    assert [(one.experiment, one.devices, one.same_run) for one in found] == [
        ("other", ["GPU-1"], False),
        ("pair", ["GPU-1", "GPU-2"], True),
    ]
    assert all(one.seconds >= 0 for one in found)
    before = span[0] - timedelta(hours=1)
    assert neighbours(GPUS[:1], "run", before, span[0]) == []


def test_note_keeps_a_limited_number_of_earlier_owners(span: tuple[datetime, datetime]) -> None:
    for number in range(MAX_EARLIER + 5):
        with owned(GPUS[:1], owner(f"e{number:02}"), print):
            time.sleep(0.001)
    found = [one.experiment for one in neighbours([], None, *span)]
    assert found == [f"e{number:02}" for number in range(4, MAX_EARLIER + 5)]
