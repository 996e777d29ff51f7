"""A study's items take turns: each alone on its devices, after an idle time. Before pytest times the item, and
before any limit on its time runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import pytest

from pytest_llem._plugin.node_ids import file_of
from pytest_llem._plugin.stash import SHARED_STATE, STUDIES
from pytest_llem.collection.items import experiment_of, is_experiment, run_of
from pytest_llem.execution.draining import DrainingProcesses
from pytest_llem.execution.experiment import LEASE, DeviceLease, preflight_of, start_early, stopped
from pytest_llem.execution.idle_power import measure_no_context_once, no_context_is_due
from pytest_llem.execution.live_line import say
from pytest_llem.execution.replay import replayed
from pytest_llem.execution.study_progress import live_progress
from pytest_llem.machine.cool_down import Gaps
from pytest_llem.machine.devices import CPU, DeviceError, Ownership, owned, possible_devices
from pytest_llem.machine.gpu_memory import GpuMemory
from pytest_llem.machine.idle_power import SECONDS as BARE_SECONDS
from pytest_llem.machine.owner import Owner
from pytest_llem.results.experiment import GapRecord
from pytest_llem.study.config import AUTO, ExperimentConfig
from pytest_llem.study.design import StudyConfig

_BARE = f"measuring the idle machine, {BARE_SECONDS:.0f} s"


@dataclass
class _Session:
    """What is remembered from item to item.

    Attributes:
        gaps: Waits for time to pass, or for GPUs to cool.
        memory: Waits for GPUs' memory.
        exiting: Processes of items whose turn is over, or nearly.
        cycle: File and cycle of the experiment before; None before the first one.
    """

    gaps: Gaps = field(default_factory=Gaps)
    memory: GpuMemory = field(default_factory=GpuMemory)
    exiting: DrainingProcesses = field(default_factory=DrainingProcesses)
    cycle: tuple[str, int] | None = None

    _devices: dict[tuple[Path | None, str, bool], tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, config: pytest.Config) -> _Session:
        """Return that of a session of pytest."""
        if _SESSION not in config.stash:
            config.stash[_SESSION] = session = cls()
            config.add_cleanup(session.exiting.close)
        return config.stash[_SESSION]

    def devices(self, study: StudyConfig, config: ExperimentConfig) -> tuple[str, ...]:
        """Return the devices that an experiment may run on. NVML is asked once for all that may use the same."""
        spread = config.pytorch is not None and config.pytorch.device_map is not None
        key = study.interpreter(config.backend), config.backend, spread
        if key not in self._devices:
            self._devices[key] = possible_devices(config, key[0])
        return self._devices[key]


_SESSION = pytest.StashKey[_Session]()


@contextmanager
def lease_devices(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Own the devices that *item* runs on, and idle before it as its study says; others start at once.

    The item has a lease meanwhile, which says why where it cannot have its devices. Where its process is still
    exiting at the end, and the next experiment follows at once, that one's turn begins meanwhile.

    Args:
        item: Any item that is about to run.
        nextitem: The one that follows in this process; None for none.
    """
    session = _Session.of(item.config)
    if not _is_started(item):
        session.exiting.close()
        yield
        return
    run, experiment = run_of(item), experiment_of(item)
    study = item.config.stash[STUDIES][run]
    devices = session.devices(study, experiment.point.config)
    worker = getattr(item.config, "workerinput", {}).get("workerid")
    # NVML is left alone where nothing would come of it.
    studies = item.config.stash[STUDIES].values()
    looks = session.cycle is None and nextitem is not None
    looks = looks and any(study.execution.experiment_gap_seconds == AUTO for study in studies)
    if looks:
        session.gaps.note_first()
    with ExitStack() as held, _leased(item) as lease:
        owner = Owner.of_this_process(study.name, experiment.id, worker)
        ownership = session.exiting.pass_on(devices, owner, held)
        if ownership is None:
            try:
                ownership = held.enter_context(owned(devices, owner, partial(say, item.config)))
            except DeviceError as error:
                lease.refusal = str(error)
        if ownership is None:
            yield
            return
        held.callback(session.exiting.shut_down)
        if looks and ownership.waited_seconds:  # somebody else was busy then
            session.gaps.note_first()
        before, session.cycle = session.cycle, (file_of(run), experiment.cycle)
        gap = None if before is None else _gap(study, is_new_cycle=session.cycle != before)
        if _is_worthwhile(session, item, ownership, gap):
            _start_early(session, item, lease, held)
        session.exiting.shut_down()
        with live_progress(item) as watcher:
            idled = _idle(session, gap, watcher.say if watcher else None)
            waited = {"waited_seconds": ownership.waited_seconds, "waited_for": ownership.waited_for}
            lease.gap = _settle(session, ownership, idled.model_copy(update=waited))
            lease.next_gap = partial(_again, session, ownership)
            lease.devices, lease.drain, lease.progress = ownership.devices, session.exiting.take, watcher
            idle = partial(watcher.say, _BARE) if watcher else lambda: None
            measure_no_context_once(
                item.config.stash[SHARED_STATE], experiment.point.config, ownership.devices, idle
            )
            if watcher is not None:
                watcher.erase()  # pytest goes on with its own line
            yield
        if nextitem is not None and _follows_at_once(nextitem) and session.exiting.is_any():
            session.exiting.keep(ownership, held)


@contextmanager
def _leased(item: pytest.Item) -> Iterator[DeviceLease]:
    """Give *item* a lease, and take it back: items stay to the end of the session."""
    item.stash[LEASE] = lease = DeviceLease()
    try:
        yield lease
    finally:
        del item.stash[LEASE]


def _is_worthwhile(session: _Session, item: pytest.Item, ownership: Ownership, gap: _Gap | None) -> bool:
    """Whether there is something to wait for while the item's process imports, and nothing is measured."""
    config = experiment_of(item).point.config
    if no_context_is_due(item.config.stash[SHARED_STATE], config, ownership.devices):
        return False
    return session.exiting.is_any() or (gap is not None and session.gaps.will_wait(*gap))


def _start_early(session: _Session, item: pytest.Item, lease: DeviceLease, held: ExitStack) -> None:
    """Start the item's process, which is gone at the end of *held* where it was not needed."""
    started = lease.process = start_early(item, experiment_of(item))

    def end() -> None:
        lease.process = None
        if started not in session.exiting:
            started.end()

    held.callback(end)
    try:
        started.start()
    except OSError:  # then it is started when it is needed, and that is told
        end()


def _follows_at_once(item: pytest.Item) -> bool:
    """Whether *item* is an experiment, and one that runs without being asked for by another process."""
    return is_experiment(item) and not hasattr(item.config, "workerinput")


#: Idle time as a study has it, and the least that it is.
_Gap = tuple[float | Literal["auto"], float]


def _gap(study: StudyConfig, *, is_new_cycle: bool) -> _Gap:
    execution = study.execution
    return execution.experiment_gap_seconds, execution.cycle_gap_seconds if is_new_cycle else 0.0


def _idle(session: _Session, gap: _Gap | None, tell: Callable[[str], None] | None) -> GapRecord:
    if gap is None:
        return GapRecord(seconds=0.0, reason="skipped", note="the first experiment of its session")
    return session.gaps.wait(*gap, tell)


def _again(session: _Session, ownership: Ownership) -> GapRecord:
    """Have the item's devices ready for a further run of it."""
    session.exiting.shut_down()
    gap = GapRecord(seconds=0.0, reason="skipped", note="run again at once", waited_seconds=0.0)
    return _settle(session, ownership, gap)


def _settle(session: _Session, ownership: Ownership, gap: GapRecord) -> GapRecord:
    """Wait until the GPUs' memory is as it was before the experiment before, and note it for the next one."""
    gpus = ownership.devices - {CPU}
    settled = session.memory.settle(gpus, ownership.used_before)
    ownership.note_used(settled.used)
    return gap.model_copy(update={"memory_waited_seconds": settled.seconds, "memory_left_mb": settled.left_mb})


def _is_started(item: pytest.Item) -> bool:
    """Whether *item* is an experiment, and one for which a process will be started."""
    if not is_experiment(item) or _is_skipped(item):
        return False
    experiment, run = experiment_of(item), run_of(item)
    if replayed(item, experiment) is not None or stopped(item) is not None:
        return False
    return preflight_of(item.config, run, item.config.stash[STUDIES][run]).reason(experiment.point) is None


def _is_skipped(item: pytest.Item) -> bool:
    """Whether *item* is marked to be skipped. A condition that pytest has yet to evaluate is not."""
    conditions = (one for mark in item.iter_markers("skipif") for one in mark.args)
    return item.get_closest_marker("skip") is not None or any(one is True for one in conditions)
