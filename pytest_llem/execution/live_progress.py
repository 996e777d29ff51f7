"""Compose the live line of an experiment: its name, phase, remaining time, power and temperature."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from itertools import dropwhile

import pytest
from rich.console import Console
from rich.text import Text

from pytest_llem._plugin.node_ids import file_of, is_reference
from pytest_llem._plugin.stash import STUDIES
from pytest_llem.collection.items import experiment_of, is_experiment, run_of
from pytest_llem.execution.interleaving import partner_of
from pytest_llem.execution.plans import make_forecast
from pytest_llem.execution.terminal_output import Line, live_line
from pytest_llem.measurement.progress import GpuStatus, Progress
from pytest_llem.planning.forecast import Forecast
from pytest_llem.study.design import Experiment
from pytest_llem.study.identity import CYCLE, value_text
from pytest_llem.study.problems import printable

#: A GPU status older than this, in s, is not shown.
STALE_S = 5.0

#: A phase that reports no amount done shows its duration from this many s on.
MIN_SHOWN_S = 3

#: Columns to which an experiment's name is cut before other parts are left out.
MIN_NAME_COLUMNS = 12

_GAP = "  "


@dataclass(frozen=True)
class StudyPosition:
    """Position of an experiment in its study.

    Attributes:
        number: Its number among the study's experiments in this run, from 1.
        count: Number of these experiments.
        name: Its id.
        short: Its id without the names of axes.
        expected_s: Its expected duration in s; None if unknown.
        study_began: Start of the first experiment, on the monotonic clock in s.
        study_left_s: Expected duration of all later experiments in s; None if unknown.
    """

    number: int
    count: int
    name: str
    short: str
    expected_s: float | None
    study_began: float
    study_left_s: float | None


class LiveProgress:
    """Keeps the live line up to date while an experiment runs.

    Implements :class:`pytest_llem.measurement.progress.Watcher`.

    Args:
        line: The live line.
        position: The experiment's position in its study.
        colours: Whether to use colours.
        clock: Monotonic clock in s.

    Attributes:
        completed: Whether the experiment completed; None while it runs.
    """

    refresh_every_s = 1.0

    def __init__(
        self,
        line: Line,
        position: StudyPosition,
        *,
        colours: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._line = line
        self._position = position
        self._clock = clock
        self.completed: bool | None = None
        self._began = self._phase_began = clock()
        self._phase: Progress | str = Progress("starting")
        self._gpu_status: tuple[float, GpuStatus] | None = None
        self._served = _ServedSoFar(self._began)
        self._console = Console(
            file=StringIO(),
            force_terminal=colours,
            color_system="auto" if colours else None,
            highlight=False,
            markup=False,
            emoji=False,
        )

    @property
    def elapsed_s(self) -> float:
        """Time since the experiment's devices were leased, in s."""
        return self._clock() - self._began

    def show(self, what: str) -> None:
        """Show a phase *what* that precedes the experiment's process."""
        self._phase = what
        self.refresh()

    def see(self, seen: Progress | GpuStatus) -> None:
        if isinstance(seen, GpuStatus):
            self._gpu_status = self._clock(), seen
            return
        now = self._clock()
        if not isinstance(self._phase, Progress) or seen.phase != self._phase.phase:
            self._phase_began, self._served = now, _ServedSoFar(now)
        self._phase = seen
        if seen.tokens_per_second is not None:
            status = self._current_gpu_status()
            self._served.add(now, seen.tokens_per_second, None if status is None else status.power_w)

    def refresh(self) -> None:
        self._line.show(self._compose)

    def erase(self) -> None:
        """Clear the line before something else writes to the terminal."""
        self._line.erase()

    def _compose(self, width: int) -> str:
        text = next(dropwhile(lambda one: one.cell_len > width, self._layouts(width)), None)
        if text is None:
            text = Text(_GAP).join([self._head(), self._doing()])
            text.truncate(width, overflow="ellipsis")
        with self._console.capture() as shown:
            self._console.print(text, end="", soft_wrap=True)
        return shown.get()

    def _layouts(self, width: int) -> Iterator[Text]:
        """Yield the possible texts, the longest first."""
        position = self._position
        head, doing, gpus = self._head(), self._doing(), self._gpu_text()
        load = self._load_text()
        long, short = self._times(short=False), self._times(short=True)
        own_time = self._times(short=True, study=False)

        def joined(*parts: Text) -> Text:
            return Text(_GAP).join([part for part in parts if part])

        name = Text(position.name, "bold")
        yield joined(head, name, doing, load, gpus, long)
        yield joined(head, name, doing, load, gpus, short)
        name = Text(position.short, "bold")
        yield joined(head, name, doing, load, gpus, short)
        # The load of a server says more than the time that the study still takes.
        with_load = [(load, own_time), (load,)] if load else []
        for others in ((load, gpus, short), (load, short), *with_load, (short,)):
            room = width - joined(head, doing, *others).cell_len - len(_GAP)
            shortened = name.copy()
            shortened.truncate(max(room, MIN_NAME_COLUMNS), overflow="ellipsis")
            yield joined(head, shortened, doing, *others)
        if load:
            yield joined(head, doing, load)
        yield joined(head, doing, short)
        yield joined(head, doing, own_time)
        yield joined(head, doing)

    def _head(self) -> Text:
        return Text(f"llem: {self._position.number}/{self._position.count}")

    def _doing(self) -> Text:
        now = self._phase
        if isinstance(now, str):
            return Text(printable(now), "cyan")
        lasted = int(self._clock() - self._phase_began)
        text = printable(now.phase)
        if now.in_flight is not None:  # the window of a load; whether it was steady is judged later
            text = text.replace("measuring", "steady")
        if now.unit == "s":
            text += f" {lasted}/{now.total:.0f} s" if now.total and lasted <= now.total else f" {lasted} s"
        elif now.done is not None:
            text += f" {now.done}" if now.total is None else f" {now.done}/{now.total:.0f}"
        elif lasted >= MIN_SHOWN_S:
            text += f" {lasted} s"
        return Text(text, "cyan")

    def _load_text(self) -> Text:
        """Return the load on a server: requests in flight, tokens/s, and energy per token of the phase so far."""
        now = self._phase
        if not isinstance(now, Progress) or now.in_flight is None or now.tokens_per_second is None:
            return Text()
        rate = now.tokens_per_second
        parts = [f"{now.in_flight} in flight", f"{rate:,.0f} tok/s" if rate >= 100 else f"{rate:.3g} tok/s"]
        if (cost := self._served.energy_per_token_j) is not None:
            parts.append(f"~{cost:.2g} J/tok")
        return Text(" ".join(parts), "green")

    def _current_gpu_status(self) -> GpuStatus | None:
        if self._gpu_status is None or self._clock() - self._gpu_status[0] > STALE_S:
            return None
        return self._gpu_status[1]

    def _gpu_text(self) -> Text:
        if (status := self._current_gpu_status()) is None:
            return Text()
        watts = "" if status.power_w is None else f"{status.power_w:.0f} W"
        celsius = "" if status.temperature_c is None else f"{status.temperature_c:.0f} °C"
        return Text(" ".join(filter(None, (watts, celsius))), "magenta")

    def _times(self, *, short: bool, study: bool = True) -> Text:
        position, elapsed = self._position, self.elapsed_s
        left = None if position.expected_s is None else max(0.0, position.expected_s - elapsed)
        parts = [_span(elapsed, left, short=short)]
        if study:
            study_left = None if left is None or position.study_left_s is None else left + position.study_left_s
            parts.append(f"study {_span(self._clock() - position.study_began, study_left, short=short)}")
        return Text(_GAP.join(parts), "dim")


class _ServedSoFar:
    """Tokens and energy of a server since a phase began, by the rate and the power at each report.

    Args:
        began: Begin of the phase, on the monotonic clock in s.
    """

    def __init__(self, began: float) -> None:
        self._last_report = began
        self._tokens = 0.0
        self._energy_j: float | None = 0.0

    def add(self, now: float, tokens_per_second: float, power_w: float | None) -> None:
        """Add the time since the last report. If *power_w* is None, the energy of the phase stays unknown."""
        seconds, self._last_report = now - self._last_report, now
        self._tokens += tokens_per_second * seconds
        if power_w is None or self._energy_j is None:
            self._energy_j = None
        else:
            self._energy_j += power_w * seconds

    @property
    def energy_per_token_j(self) -> float | None:
        """Energy of the GPUs per output token, in J; None if it is not known."""
        return self._energy_j / self._tokens if self._energy_j is not None and self._tokens else None


def _span(elapsed: float, left: float | None, *, short: bool) -> str:
    """Return elapsed and remaining time: ``0:12, about 0:09 left``, or ``0:12 -0:09`` if *short*."""
    text = clock_text(elapsed)
    if left is None or left < 1:
        return text
    return f"{text} -{clock_text(left)}" if short else f"{text}, about {clock_text(left)} left"


def clock_text(seconds: float) -> str:
    """Return *seconds* as ``0:09`` or ``1:02:03``."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class _StudyProgress:
    """Progress of one study in a session, its reference included.

    Args:
        items: The study's items in run order.
    """

    def __init__(self, items: list[pytest.Item]) -> None:
        self.count = len(items)
        self.began = time.monotonic()
        self._number = {item.nodeid: number for number, item in enumerate(items, 1)}
        self._forecast = _forecast(items)
        self._reached = 0  # number of the last item that has begun
        self._items = items

    def position(self, item: pytest.Item) -> StudyPosition:
        """Return the position of *item*. Earlier items no longer count as remaining, whatever their outcome."""
        number = self._number[item.nodeid]
        for one in self._items[self._reached : number - 1]:
            self._forecast.remove(_key(one))
        self._reached = max(self._reached, number)
        expected = []
        for key in _measured_with(item):
            expected.append(self._forecast.seconds(key))
            self._forecast.start(key)
        experiment, reference = experiment_of(item), "reference " if is_reference(run_of(item)) else ""
        return StudyPosition(
            number=number,
            count=self.count,
            name=f"{reference}{experiment.id}",
            short=f"{reference}{_short(experiment)}",
            expected_s=None if None in expected else sum(filter(None, expected)),
            study_began=self.began,
            study_left_s=self._forecast.left(),
        )

    def record_duration(self, item: pytest.Item, seconds: float, *, completed: bool) -> None:
        """Record in the forecast that *item* has ended, and the one that was measured alternately with it."""
        keys = _measured_with(item)
        for key in keys:
            self._forecast.end(key, seconds / len(keys), completed=completed)


_STUDY_PROGRESS = pytest.StashKey[dict[str, _StudyProgress]]()


@contextmanager
def live_progress(item: pytest.Item) -> Iterator[LiveProgress | None]:
    """Show an experiment's progress while its devices are leased; yield None without a terminal."""
    with live_line(item.config) as line:
        if line is None:
            yield None
            return
        study = _study_progress(item)
        reporter = item.config.pluginmanager.get_plugin("terminalreporter")
        progress = LiveProgress(line, study.position(item), colours=bool(reporter and reporter.hasmarkup))
        try:
            yield progress
        finally:
            if progress.completed is not None:
                study.record_duration(item, progress.elapsed_s, completed=progress.completed)


def _study_progress(item: pytest.Item) -> _StudyProgress:
    by_file, file = item.config.stash.setdefault(_STUDY_PROGRESS, {}), file_of(run_of(item))
    if file not in by_file:
        items = [one for one in item.session.items if is_experiment(one) and file_of(run_of(one)) == file]
        by_file[file] = _StudyProgress(items)
    return by_file[file]


def _forecast(items: list[pytest.Item]) -> Forecast:
    by_run: dict[str, list[Experiment]] = {}
    for item in items:
        by_run.setdefault(run_of(item), []).append(experiment_of(item))
    studies = items[0].config.stash[STUDIES]
    return make_forecast(items[0].config, studies, by_run)


def _key(item: pytest.Item) -> tuple[str, str]:
    return run_of(item), experiment_of(item).id


def _measured_with(item: pytest.Item) -> list[tuple[str, str]]:
    """Return the keys of *item* and, if there is one, of the item that is measured alternately with it."""
    return [_key(one) for one in (item, partner_of(item)) if one is not None]


def _short(experiment: Experiment) -> str:
    """Return an experiment's id without the names of axes."""
    values = [value_text(value) for value in experiment.point.axes.values()]
    cycle = experiment.id.removeprefix(experiment.point.id).rpartition("=")[2]
    return ", ".join([*values, *([f"{CYCLE} {cycle}"] if cycle else [])]) or experiment.id
