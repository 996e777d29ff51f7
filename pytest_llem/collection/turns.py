"""A study's items take turns: each alone on its devices, after an idle time. Before pytest times the item, and
before any limit on its time runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from pytest_llem.collection.baselines import measure_bare_once
from pytest_llem.collection.experiment import DEVICES, GAP, NEXT_GAP, NO_DEVICE, preflight_of, stopped
from pytest_llem.collection.items import experiment_of, is_experiment, run_of
from pytest_llem.collection.live import live_line, say
from pytest_llem.collection.resume import replayed
from pytest_llem.hardware.gpus import Boards, boards_for
from pytest_llem.isolation.bare import SECONDS as BARE_SECONDS
from pytest_llem.isolation.devices import CPU, DeviceError, Ownership, devices_of, owned
from pytest_llem.isolation.gaps import Gaps
from pytest_llem.isolation.interpreter import package_versions
from pytest_llem.isolation.memory import GpuMemory
from pytest_llem.isolation.owner import Owner
from pytest_llem.nodes import file_of
from pytest_llem.options import BOARD, STUDIES
from pytest_llem.results.experiment import GapRecord
from pytest_llem.study.config import AUTO, ExperimentConfig
from pytest_llem.study.design import StudyConfig


@dataclass
class _Session:
    """What is remembered from item to item.

    Attributes:
        gaps: Waits for time to pass, or for GPUs to cool.
        memory: Waits for GPUs' memory.
        cycle: File and cycle of the experiment before; None before the first one.
    """

    gaps: Gaps = field(default_factory=Gaps)
    memory: GpuMemory = field(default_factory=GpuMemory)
    cycle: tuple[str, int] | None = None

    _boards: dict[Path | None, Boards] = field(default_factory=dict)

    def devices(self, study: StudyConfig, config: ExperimentConfig) -> tuple[str, ...]:
        """Return the devices that an experiment runs on, as far as the torch of its interpreter tells."""
        python = study.interpreter(config.backend)
        if python not in self._boards:
            self._boards[python] = boards_for(package_versions(python).get("torch"))
        return devices_of(config, self._boards[python])


_SESSION = pytest.StashKey[_Session]()


@contextmanager
def turn(item: pytest.Item, *, is_last: bool) -> Iterator[None]:
    """Own the devices that *item* runs on, and idle before it as its study says; others start at once.

    What was done is left on the item, and so is why its devices cannot be had.

    Args:
        item: Any item that is about to run.
        is_last: No other item follows in this process.
    """
    if not _is_started(item):
        yield
        return
    run, experiment = run_of(item), experiment_of(item)
    study = item.config.stash[STUDIES][run]
    session = item.config.stash.setdefault(_SESSION, _Session())
    devices = session.devices(study, experiment.point.config)
    worker = getattr(item.config, "workerinput", {}).get("workerid")
    # NVML is left alone where nothing would come of it.
    studies = item.config.stash[STUDIES].values()
    looks = session.cycle is None and not is_last
    looks = looks and any(study.execution.experiment_gap_seconds == AUTO for study in studies)
    if looks:
        session.gaps.note_first()
    with ExitStack() as held:
        try:
            ownership = held.enter_context(
                owned(devices, Owner.here(study.name, experiment.id, worker), partial(say, item.config))
            )
        except DeviceError as error:
            item.stash[NO_DEVICE] = str(error)
        else:
            if looks and ownership.waited_seconds:  # somebody else was busy then
                session.gaps.note_first()
            with live_line(item.config) as show:
                tell = _of_ours(show) if show else None
                gap = _idle(session, study, (file_of(run), experiment.cycle), tell)
            waited = {"waited_seconds": ownership.waited_seconds, "waited_for": ownership.waited_for}
            item.stash[GAP] = _settle(session, ownership, gap.model_copy(update=waited))
            again = GapRecord(seconds=0.0, reason="skipped", note="run again at once", waited_seconds=0.0)
            item.stash[NEXT_GAP] = lambda: _settle(session, ownership, again)
            item.stash[DEVICES] = ownership.devices
            held.callback(item.stash.__delitem__, NEXT_GAP)  # items stay to the end of the session
            held.callback(item.stash.__delitem__, DEVICES)
            _measure_bare(item.config, experiment.point.config, ownership.devices)
        yield


def _of_ours(show: Callable[[str], None]) -> Callable[[str], None]:
    return lambda text: show(f"llem: {text}")


def _measure_bare(config: pytest.Config, experiment: ExperimentConfig, devices: Collection[str]) -> None:
    """Have the session know what the devices draw while nobody uses them, if it is to."""
    with live_line(config) as show:
        tell = _of_ours(show) if show else lambda text: None
        idle = partial(tell, f"measuring the idle machine, {BARE_SECONDS:.0f} s")
        measure_bare_once(config.stash[BOARD], experiment, devices, idle)


def _idle(
    session: _Session, study: StudyConfig, cycle: tuple[str, int], tell: Callable[[str], None] | None
) -> GapRecord:
    before, session.cycle = session.cycle, cycle
    if before is None:
        return GapRecord(seconds=0.0, reason="skipped", note="the first experiment of its session")
    at_least = study.execution.cycle_gap_seconds if cycle != before else 0.0
    return session.gaps.wait(study.execution.experiment_gap_seconds, at_least, tell)


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
