"""Lease devices to one item at a time, and idle before the item runs.

pytest starts to time the item after the wait for devices and the idle time: neither counts in its duration or
against its timeout.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, takewhile
from typing import Literal

import pytest

from pytest_llem._plugin.node_ids import file_of
from pytest_llem._plugin.shared_state import COOL, USED, SharedState
from pytest_llem._plugin.stash import SHARED_STATE, STUDIES
from pytest_llem.collection.items import experiment_of, is_experiment, is_skipped, run_of, study_of_item
from pytest_llem.execution.device_lease import LEASE, DeviceLease, DrainingProcesses
from pytest_llem.execution.experiment import start_early
from pytest_llem.execution.idle_power import measure_no_context_once, no_context_is_due
from pytest_llem.execution.interleaving import was_measured_with_partner
from pytest_llem.execution.jobs import preflight_of_item
from pytest_llem.execution.live_progress import LiveProgress, live_progress
from pytest_llem.execution.model_servers import ModelServers
from pytest_llem.execution.placement import accept, report_placed, request_of, take_assigned
from pytest_llem.execution.replay import replayed
from pytest_llem.execution.session_facts import session_name, worker_id
from pytest_llem.execution.stopping import not_started_reason
from pytest_llem.execution.terminal_output import print_line
from pytest_llem.machine.cool_down import CoolDown
from pytest_llem.machine.device_locks import DeviceError, Ownership, owned
from pytest_llem.machine.gpu_memory import GpuMemory
from pytest_llem.machine.idle_power_no_context import SECONDS as NO_CONTEXT_SECONDS
from pytest_llem.machine.owner import Owner
from pytest_llem.results.experiment import GapRecord
from pytest_llem.study.config import AUTO

#: Before an experiment whose server is already running: the machine would not be idle while the server runs.
_NO_GAP_ON_SERVER = GapRecord(seconds=0.0, reason="skipped", note="its server runs already", waited_seconds=0.0)

_NO_CONTEXT_STATUS = f"measuring the idle machine, {NO_CONTEXT_SECONDS:.0f} s"

#: Idle time as written in the study, and its minimum in s.
_Gap = tuple[float | Literal["auto"], float]


@dataclass
class _Session:
    """State that outlives one item.

    Attributes:
        cool_down: Idles for a fixed time, or until the GPUs have cooled.
        memory: Waits until GPU memory is free again.
        draining: Processes that have written their result and have not exited yet.
        previous_cycle: File and cycle of the previous experiment; None before the first one.
    """

    cool_down: CoolDown = field(default_factory=CoolDown)
    memory: GpuMemory = field(default_factory=GpuMemory)
    draining: DrainingProcesses = field(default_factory=DrainingProcesses)
    previous_cycle: tuple[str, int] | None = None

    @classmethod
    def of(cls, config: pytest.Config) -> _Session:
        """Return the state of a pytest session, made at the first call."""
        if _SESSION not in config.stash:
            config.stash[_SESSION] = session = cls()
            config.add_cleanup(session.draining.close)
        return config.stash[_SESSION]


_SESSION = pytest.StashKey[_Session]()


@contextmanager
def lease_devices(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Lease devices to *item*, and idle before it as its study asks. Items that start no process run at once.

    If the devices cannot be leased, the lease's ``refusal`` says why. The next experiment takes over the devices
    if it can use the item's server, or if it follows at once and the item's process has not exited.

    Args:
        item: Any item that is about to run.
        nextitem: The next item in this process; None if there is none.
    """
    session, servers = _Session.of(item.config), ModelServers.of(item.config)
    if not _starts_process(item):
        if not servers.are_needed_by(item):
            session.draining.close()
        yield
        if not servers.are_needed_by(nextitem):
            session.draining.close()
        return
    # NVML is read only if needed: an `auto` gap waits for the temperatures from before the first experiment, and
    # there is no gap if no item follows.
    studies = item.config.stash[STUDIES].values()
    has_auto_gaps = any(study.execution.experiment_gap_seconds == AUTO for study in studies)
    needs_target = session.previous_cycle is None and nextitem is not None and has_auto_gaps
    if needs_target:
        _record_target(session.cool_down, item.config.stash[SHARED_STATE])
    with ExitStack() as stack, _leased(item) as lease:
        ownership = None
        try:
            ownership = _own(item, stack, session.draining, keep=servers.are_needed_by(item))
        except DeviceError as error:
            lease.refusal = str(error)
        if ownership is None:
            yield
            return
        lease.allocation = request_of(item).allocation(ownership.devices)
        has_server = servers.are_needed_by(item)  # only now: _own() stops the server if other devices are needed
        if not has_server:
            stack.callback(session.draining.shut_down)
        if needs_target and ownership.waited_seconds:  # another process was heating the devices: record again
            session.cool_down.record_target()
        gap = _gap_before(session, item, ownership)
        if _can_overlap(session, item, ownership, gap):
            _start_early(session, item, lease, stack)
        session.draining.shut_down()
        with live_progress(item) as progress:
            lease.gap = _NO_GAP_ON_SERVER if has_server else _idle(session, item, ownership, gap, progress)
            lease.next_gap = partial(_prepare_repeat, session, servers, item, ownership)
            lease.hand_over_process, lease.progress = session.draining.take, progress
            lease.ends_server = has_server and not any(map(_starts_process, _rest_on_server(servers, nextitem)))
            lease.defer = stack.callback
            if progress is not None:
                progress.erase()  # pytest continues its own line there
            yield
        if servers.are_needed_by(nextitem) or (_follows_at_once(nextitem) and session.draining.is_any()):
            session.draining.hand_over(ownership, stack)


def _own(item: pytest.Item, stack: ExitStack, draining: DrainingProcesses, *, keep: bool) -> Ownership:
    """Take over the devices of the previous item, or wait for others, and own them until *stack* is closed.

    Args:
        item: The item that is about to run.
        stack: Releases the devices when it is closed.
        draining: Holds the devices that the previous item handed over.
        keep: Take them over even if another process waits for one of them.

    Raises:
        DeviceError: Devices cannot be locked.
    """
    study, experiment, config = study_of_item(item).name, experiment_of(item).id, item.config
    owner = Owner.of_this_process(study, experiment, worker_id(config), session_name(config))
    handed_over = draining.take_over(request_of(item), owner, stack, keep=keep)
    if handed_over is not None:
        accept(item, handed_over.devices)
        return handed_over
    preferred = take_assigned(item)
    while True:
        request = request_of(item)
        with ExitStack() as held:
            ownership = held.enter_context(
                owned(
                    request.pool,
                    owner,
                    partial(print_line, item.config),
                    count=request.count,
                    choose=partial(request.choose, preferred=preferred),
                )
            )
            # Refused if another worker has meanwhile bound the point to other devices: then request those.
            if accept(item, ownership.devices):
                stack.push(held.pop_all())
                if preferred and ownership.devices != set(preferred):
                    report_placed(item, ownership.devices)
                return ownership


def _record_target(cool_down: CoolDown, shared_state: SharedState) -> None:
    """Record the GPUs' state before the session's first experiment, or use what another worker has recorded."""
    known = shared_state.read("", COOL)
    if known is None:
        cool_down.record_target()
        known = cool_down.targets
        with suppress(OSError):
            known = shared_state.put_first("", COOL, known)
    cool_down.use_targets(known)


def _begin_use(shared_state: SharedState, devices: Collection[str]) -> bool:
    """Record that the session uses *devices*, and return whether it has used none of them before."""
    with suppress(OSError):
        claims = [shared_state.claim("", f"{USED}-{device}") for device in devices]
        return all(claims)
    return False


def _rest_on_server(servers: ModelServers, nextitem: pytest.Item | None) -> Iterator[pytest.Item]:
    """Yield *nextitem* and the items after it, up to the first that cannot share a running server."""
    if nextitem is not None:
        items = nextitem.session.items
        yield from takewhile(servers.are_needed_by, islice(items, items.index(nextitem), None))


@contextmanager
def _leased(item: pytest.Item) -> Iterator[DeviceLease]:
    """Give *item* a lease, and remove it afterwards: items stay in memory until the session ends."""
    item.stash[LEASE] = lease = DeviceLease()
    try:
        yield lease
    finally:
        del item.stash[LEASE]


def _can_overlap(session: _Session, item: pytest.Item, ownership: Ownership, gap: _Gap | None) -> bool:
    """Return whether the item's process can import its packages while this process waits without measuring."""
    config = experiment_of(item).point.config
    if no_context_is_due(item.config.stash[SHARED_STATE], config, ownership.devices):
        return False
    return session.draining.is_any() or (gap is not None and session.cool_down.will_wait(*gap, ownership.devices))


def _start_early(session: _Session, item: pytest.Item, lease: DeviceLease, stack: ExitStack) -> None:
    """Start the item's process before its idle time. Closing *stack* ends the process if no run has taken it."""
    started = lease.process = start_early(item, lease.allocation)

    def end() -> None:
        lease.process = None
        if started not in session.draining:
            started.end()

    stack.callback(end)
    try:
        started.start()
    except OSError:  # the start after the idle time reports it
        end()


def _follows_at_once(item: pytest.Item | None) -> bool:
    """Return whether *item* is an experiment that need not wait for xdist's controller."""
    return item is not None and is_experiment(item) and not hasattr(item.config, "workerinput")


def _gap_before(session: _Session, item: pytest.Item, ownership: Ownership) -> _Gap | None:
    """Return the idle time before *item*; None before this process's first one, if its devices are unused so far.

    Records that the session uses the devices, and the item's cycle for the next call.
    """
    execution = study_of_item(item).execution
    before, session.previous_cycle = session.previous_cycle, (file_of(run_of(item)), experiment_of(item).cycle)
    is_unused = _begin_use(item.config.stash[SHARED_STATE], ownership.devices)
    if before is None and is_unused:
        return None
    is_new_cycle = before not in (None, session.previous_cycle)
    return execution.experiment_gap_seconds, execution.cycle_gap_seconds if is_new_cycle else 0.0


def _idle(
    session: _Session, item: pytest.Item, ownership: Ownership, gap: _Gap | None, progress: LiveProgress | None
) -> GapRecord:
    """Idle, wait for GPU memory, measure idle power without a CUDA context if due, and return the idle time."""
    if gap is None:
        idled = GapRecord(seconds=0.0, reason="skipped", note="the first experiment of its run")
    else:
        idled = session.cool_down.wait(*gap, progress.show if progress else None, ownership.devices)
    waited = {"waited_seconds": ownership.waited_seconds, "waited_for": ownership.waited_for}
    settled = session.memory.settle_owned(ownership, idled.model_copy(update=waited))
    on_idle = partial(progress.show, _NO_CONTEXT_STATUS) if progress else lambda: None
    config, shared_state = experiment_of(item).point.config, item.config.stash[SHARED_STATE]
    measure_no_context_once(shared_state, config, ownership.devices, on_idle)
    return settled


def _prepare_repeat(
    session: _Session, servers: ModelServers, item: pytest.Item, ownership: Ownership
) -> GapRecord:
    """Get the devices ready for another run of *item*, and return the idle time before that run."""
    session.draining.shut_down()
    if servers.are_needed_by(item):
        return _NO_GAP_ON_SERVER
    gap = GapRecord(seconds=0.0, reason="skipped", note="run again at once", waited_seconds=0.0)
    return session.memory.settle_owned(ownership, gap)


def _starts_process(item: pytest.Item) -> bool:
    """Return whether *item* is an experiment that will start a process: not skipped, replayed or refused."""
    if not is_experiment(item) or is_skipped(item):
        return False
    experiment = experiment_of(item)
    if (
        replayed(item, experiment) is not None
        or not_started_reason(item) is not None
        or was_measured_with_partner(item)
    ):
        return False
    return preflight_of_item(item).refusal(experiment.point) is None
