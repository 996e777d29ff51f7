"""Format the history of studies for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from rich.table import Table

from pytest_llem.gates.history import History, MetricChange, MetricHistory, Run
from pytest_llem.gates.series import MIN_SIDE
from pytest_llem.reporting.terminal.tables import plain_table, render
from pytest_llem.reporting.text import counted, mean_text
from pytest_llem.study.problems import printable

#: Series without a change that are shown; of others, only their number is.
MAX_UNCHANGED = 20


def lines(history: History, width: int) -> Iterator[str]:
    """Yield a table for each study and testbed, series with changes first, and then how false alarms are limited.

    Args:
        history: The history.
        width: Width of the terminal in characters.
    """
    for (study, testbed), group in history.groups().items():
        own = {id(value.run) for one in group for value in one.values}
        yield f"{printable(study)}: {span([run for run in history.runs if id(run) in own])}"
        yield f"testbed {testbed}"
        yield ""
        yield from _table(group, width)
        yield ""
        if found := by_commit(group):
            yield from (f"{place}: {verdicts}" for place, verdicts in found)
            yield ""
    yield f"changes of {MIN_SIDE} runs or more, with {rule(history)}"
    if history.copies:
        yield f"left out as copies of others: {counted(history.copies, 'result')}"


def rule(history: History) -> str:
    """Return how false alarms are limited, as text."""
    return f"alpha {history.alpha:g} over {len(history.series)} series of any length"


def span(runs: Sequence[Run]) -> str:
    """Return numbers of runs and commits, and the first and the last day, as text."""
    commits = counted(len({run.commit for run in runs if run.commit}), "commit")
    first, last = (printable(run.time[:10]) for run in (runs[0], runs[-1]))
    days = first if first == last else f"{first} to {last}"
    return f"{counted(len(runs), 'run')} of {commits}" + (f", {days}" if first else "")


def place_of(run: Run) -> str:
    """Return commit and day of a run."""
    return printable(f"{run.label} {run.time[:10]}".strip())


def by_commit(series: Sequence[MetricHistory]) -> list[tuple[str, str]]:
    """Return each commit with changes, in order, and their numbers by verdict, as text."""
    found: dict[str, Counter[str]] = {}
    for one in sorted((one for each in series for one in each.changes), key=lambda one: one.first.run.time):
        found.setdefault(place_of(one.first.run), Counter())[verdict_of(one)] += 1
    return [(place, ", ".join(f"{n} {word}" for word, n in words.items())) for place, words in found.items()]


def verdict_of(one: MetricChange) -> str:
    """Return the verdict on a change, as text."""
    return f"{one.verdict} (drift)" if one.change.is_drift else one.verdict


def extent_of(one: MetricChange) -> str:
    """Return where a change is, as text."""
    place = place_of(one.first.run)
    return f"{place} to {place_of(one.last.run)}" if one.change.is_drift else place


def size_of(one: MetricChange) -> tuple[str, str]:
    """Return the size of a change and its interval, as text."""
    low, high = (f"{100 * (bound - 1):+.1f}" for bound in one.change.interval)
    return f"{100 * (one.change.ratio - 1):+.1f}%", f"({low} to {high})"


def _table(histories: Sequence[MetricHistory], width: int) -> Iterator[str]:
    table = plain_table()
    table.add_column("metric\npoint", overflow="fold")
    table.add_column("runs", justify="right")
    table.add_column("first\nlast", justify="right")
    table.add_column("change\n95% interval", justify="right")
    shown = histories[: sum(bool(one.changes) for one in histories) + MAX_UNCHANGED]
    for one in shown:
        _add(table, one)
    yield from render(table, width)
    if left_out := len(histories) - len(shown):
        yield f"… no change in {left_out} more series"
    # Most series share a reason, such as too few runs.
    for why, number in Counter(one.not_judged_reason for one in shown).items():
        if why is not None:
            yield f"not judged: {printable(why)}" + (f" ({number} series)" if number > 1 else "")


def _add(table: Table, one: MetricHistory) -> None:
    first, last = (mean_text(value.summary) for value in (one.values[0], one.values[-1]))
    name = f"{one.metric}\n{printable(one.point)}" + (f"\n({printable(one.differs)})" if one.differs else "")
    judged = len(one.judged)
    runs = str(judged) if judged == len(one.values) else f"{judged} of\n{len(one.values)}"
    change = "" if one.changes else "none" if one.not_judged_reason is None else "not judged"
    table.add_row(name, runs, f"{first}\n{last}", change)
    for found in one.changes:
        what = [f"{verdict_of(found)} at {extent_of(found)}", ", ".join(map(printable, found.facts))]
        table.add_row("\n".join(f"  {line}" for line in what if line), "", "", "\n".join(size_of(found)))
