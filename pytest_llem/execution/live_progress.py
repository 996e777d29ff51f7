"""What the live line says of an experiment: which it is, what it is doing, for how long yet, and what it draws."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import StringIO
from itertools import dropwhile

from rich.console import Console
from rich.text import Text

from pytest_llem.execution.live_line import Line
from pytest_llem.measurement.progress import GpuStatus, Progress
from pytest_llem.study.problems import printable

#: A glance older than this, in s, is not what the boards are like.
STALE_S = 5.0

#: A phase of which only its beginning is known says how long it has lasted from here on, in s.
WORTH_TELLING_S = 3

#: Columns that an experiment's name is cut to before anything else goes.
SHORTEST_NAME = 12

_GAP = "  "


@dataclass(frozen=True)
class Place:
    """Where in its study an experiment is.

    Attributes:
        number: Its number among those of the session, from 1.
        count: How many they are.
        name: Its id.
        short: The same, without the names of axes.
        expected_s: How long it is expected to take, in s; None where nothing tells.
        study_began: When the first of them began, on the monotonic clock in s.
        study_left_s: What all that come after it are expected to take, in s; None where nothing tells.
    """

    number: int
    count: int
    name: str
    short: str
    expected_s: float | None
    study_began: float
    study_left_s: float | None


class LiveProgress:
    """Keeps the live line true while an experiment has its turn. A Watcher of its process.

    Args:
        line: The line.
        place: The experiment's.
        colours: The terminal has them, and they are wanted.
        clock: Never goes back; in s.

    Attributes:
        completed: Whether the experiment was completed; None while it has not come to an end.
    """

    every_s = 1.0

    def __init__(
        self, line: Line, place: Place, *, colours: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._line = line
        self._place = place
        self._clock = clock
        self.completed: bool | None = None
        self._began = self._since = clock()
        self._phase: Progress | str = Progress("waiting")
        self._glance: tuple[float, GpuStatus] | None = None
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
        """How long the experiment has had its turn, in s."""
        return self._clock() - self._began

    def say(self, what: str) -> None:
        """Show *what* is done before the experiment's process is there."""
        self._phase = what
        self.tick()

    def see(self, seen: Progress | GpuStatus) -> None:
        if isinstance(seen, GpuStatus):
            self._glance = self._clock(), seen
            return
        if not isinstance(self._phase, Progress) or seen.phase != self._phase.phase:
            self._since = self._clock()
        self._phase = seen

    def tick(self) -> None:
        self._line.show(self._compose)

    def erase(self) -> None:
        """Leave the line empty: somebody else is about to write."""
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
        """Yield what may be shown, the longest first."""
        place = self._place
        head, doing, boards = self._head(), self._doing(), self._boards()
        long, short = self._times(short=False), self._times(short=True)

        def joined(*parts: Text) -> Text:
            return Text(_GAP).join([part for part in parts if part])

        name = Text(place.name, "bold")
        yield joined(head, name, doing, boards, long)
        yield joined(head, name, doing, boards, short)
        name = Text(place.short, "bold")
        yield joined(head, name, doing, boards, short)
        for others in ((boards, short), (short,)):
            room = width - joined(head, doing, *others).cell_len - len(_GAP)
            cut = name.copy()
            cut.truncate(max(room, SHORTEST_NAME), overflow="ellipsis")
            yield joined(head, cut, doing, *others)
        yield joined(head, doing, short)
        yield joined(head, doing, self._times(short=True, study=False))
        yield joined(head, doing)

    def _head(self) -> Text:
        return Text(f"llem: {self._place.number}/{self._place.count}")

    def _doing(self) -> Text:
        now = self._phase
        if isinstance(now, str):
            return Text(printable(now), "cyan")
        lasted = int(self._clock() - self._since)
        text = printable(now.phase)
        if now.unit == "s":
            text += f" {lasted}/{now.total:.0f} s" if now.total and lasted <= now.total else f" {lasted} s"
        elif now.done is not None:
            text += f" {now.done}" if now.total is None else f" {now.done}/{now.total:.0f}"
        elif lasted >= WORTH_TELLING_S:
            text += f" {lasted} s"
        return Text(text, "cyan")

    def _boards(self) -> Text:
        if self._glance is None or self._clock() - self._glance[0] > STALE_S:
            return Text()
        glance = self._glance[1]
        watts = "" if glance.power_w is None else f"{glance.power_w:.0f} W"
        celsius = "" if glance.temperature_c is None else f"{glance.temperature_c:.0f} °C"
        return Text(" ".join(filter(None, (watts, celsius))), "magenta")

    def _times(self, *, short: bool, study: bool = True) -> Text:
        place, here = self._place, self.elapsed_s
        left = None if place.expected_s is None else max(0.0, place.expected_s - here)
        parts = [_span(here, left, short=short)]
        if study:
            whole = None if left is None or place.study_left_s is None else left + place.study_left_s
            parts.append(f"study {_span(self._clock() - place.study_began, whole, short=short)}")
        return Text(_GAP.join(parts), "dim")


def _span(elapsed: float, left: float | None, *, short: bool) -> str:
    """Return what has passed and what is left: ``0:12, about 0:09 left``, or as players of music have it."""
    passed = clock_text(elapsed)
    if left is None or left < 1:
        return passed
    return f"{passed} -{clock_text(left)}" if short else f"{passed}, about {clock_text(left)} left"


def clock_text(seconds: float) -> str:
    """Return *seconds* as a clock shows them: ``0:09``, ``1:02:03``."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
