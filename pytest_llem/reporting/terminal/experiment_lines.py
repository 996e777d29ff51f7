"""Write a line for each experiment when it ends, for logs (which cannot be overwritten) and with ``-v``."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from typing import Any

import pytest

from pytest_llem._plugin.node_ids import PAYLOAD_ATTRIBUTE, file_of, is_reference, other_side
from pytest_llem._plugin.terminal_width import fitted
from pytest_llem.planning.estimate import duration_text
from pytest_llem.planning.forecast import Forecast
from pytest_llem.reporting.text import number
from pytest_llem.results.manifest_records import ErrorRecord
from pytest_llem.results.metrics import Metric
from pytest_llem.results.pareto import COST, SPEED
from pytest_llem.results.study_run import StudyRun
from pytest_llem.study.design import Experiment
from pytest_llem.study.problems import printable

#: Characters of a failure's message; the rest is cut.
MAX_CHARACTERS = 100


class Lines:
    """A pytest plugin that writes each experiment's line after pytest's dot, or below pytest's line with ``-v``.

    It runs in the controller, not in workers of pytest-xdist.

    Args:
        reporter: pytest's terminal reporter.
        runs: The study runs by key (``node_ids.run_key``).
        forecast_of: Returns the forecast of the selected experiments of a study file.
        clock: A monotonic clock in s.
    """

    def __init__(
        self,
        reporter: pytest.TerminalReporter,
        runs: Mapping[str, StudyRun],
        forecast_of: Callable[[str], Forecast],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._reporter = reporter
        self._runs = runs
        self._forecast_of = forecast_of
        self._clock = clock
        self._began = clock()
        self._by_node_id = {
            node_id: (key, experiment) for key, run in runs.items() for node_id, experiment in run.selected.items()
        }
        self._experiments = {(key, one.id): one for key, run in runs.items() for one in run.study.experiments}
        self._counts = Counter(file_of(key) for key, _ in self._by_node_id.values())
        self._ended: dict[str, set[tuple[str, str]]] = {}
        self._forecasts: dict[str, Forecast] = {}
        #: Total duration of the experiments that have ended, in s, by file.
        self._busy: dict[str, float] = {}
        #: The file of the last line that was written; None if pytest has written anything else since.
        self._open: str | None = None

    # The outermost wrapper: it begins before the recorder takes the outcome, and ends after pytest's dot.
    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> Generator[None, None, None]:
        payload: dict[str, Any] | None = vars(report).get(PAYLOAD_ATTRIBUTE)
        found = self._find(report, payload)
        if payload is not None:
            is_shown = found is not None and not payload["replayed_from"]
        else:  # an experiment that has ended already has its line
            is_shown = found is not None and report.failed and not self._runs[found[0]].has_ended(found[1])
        if is_shown and not self._is_long and self._open != file_of(found[0] if found else ""):
            self._write("\n")  # pytest has just written the file's name, or dots of other tests
        yield
        if found is None or not is_shown:
            if report.when == "call" or not report.passed:
                self._open = None
            if found is not None and (payload is not None or report.skipped):
                self._leave_out(*found)
            return
        text = self._line(*found, report, payload)
        letter = "" if self._is_long else ". "  # pytest has written a letter for the test, which takes a column
        line = "\n".join(fitted([f"{letter}llem: {text}"]))
        self._write(f"\n{line}" if self._is_long else f"{line[1:]}\n")
        self._open = file_of(found[0])

    @property
    def _is_long(self) -> bool:
        """Whether pytest writes one line per test."""
        return bool(self._reporter.showlongtestinfo)

    def _find(self, report: pytest.TestReport, payload: Mapping[str, Any] | None) -> tuple[str, Experiment] | None:
        """Return the run's key and the experiment of a report, by its payload or, without one, its node id."""
        if payload is None:
            return self._by_node_id.get(report.nodeid)
        key = payload["run"], payload["experiment_id"]
        return (key[0], self._experiments[key]) if key in self._experiments else None

    def _leave_out(self, key: str, experiment: Experiment) -> None:
        """Count an experiment that was skipped or replayed as ended, without a line."""
        self._ended.setdefault(file_of(key), set()).add((key, experiment.id))
        self._forecast(file_of(key)).remove((key, experiment.id))

    def _forecast(self, file: str) -> Forecast:
        if file not in self._forecasts:
            self._forecasts[file] = self._forecast_of(file)
        return self._forecasts[file]

    def _line(
        self, key: str, experiment: Experiment, report: pytest.TestReport, payload: Mapping[str, Any] | None
    ) -> str:
        file, entry = file_of(key), self._runs[key].writer.entry(experiment.id)
        ended = self._ended.setdefault(file, set())
        ended.add((key, experiment.id))
        completed = entry.status == "completed"
        latest = self._runs[key].latest if completed else None
        timed = [(key, experiment.id)]  # the experiments that took the duration together
        if latest is not None and latest.interleaving is not None:
            partner = other_side(key), experiment.id
            timed = [] if partner in ended else [*timed, partner]
        self._busy[file] = self._busy.get(file, 0.0) + report.duration
        forecast = self._forecast(file)
        for one in timed:
            forecast.end(one, report.duration / len(timed), completed=completed)
        name = f"reference {experiment.id}" if is_reference(key) else experiment.id
        if latest is not None:
            found = f": {_figures(latest.metrics)}"
        else:
            found = f" {'failed as expected' if entry.status == 'skipped' else 'failed'}: {_why(entry.error)}"
        text = f"{len(ended)}/{self._counts[file]} {name}{found}"
        if timed:
            text += f", {_duration(report.duration)}"
        left = self._seconds_left(file, forecast)
        return f"{text}; about {duration_text(left)} left" if left is not None and left >= 1 else text

    def _seconds_left(self, file: str, forecast: Forecast) -> float | None:
        """Return the remaining time of the study in s, or None if it cannot be forecast.

        The forecast is scaled by elapsed time ÷ total duration so far, because experiments may run in parallel and
        have idle time between them.
        """
        left, busy = forecast.left(), self._busy[file]
        return None if left is None else left * ((self._clock() - self._began) / busy if busy > 1 else 1.0)

    def _write(self, text: str) -> None:
        # write_line would make pytest repeat the file's name before the next dot.
        with suppress(OSError, ValueError):  # a closed terminal must not fail the measurement
            self._reporter.write(text, flush=True)


def _figures(metrics: Mapping[str, Metric]) -> str:
    """Return an experiment's main figures: ``122 tok/s, 0.160 J/output token (estimated)``.

    Without numbers of tokens, the energy is that of a pass.
    """
    rate, cost, unit = metrics[SPEED], metrics[COST], "J/output token"
    if cost.value is None:
        cost, unit = metrics["energy_j"], "J/pass"
    figures = [] if rate.value is None else [f"{number(rate.value)} tok/s"]
    if cost.value is None:
        figures.append("energy unavailable")
    else:
        how: str | None = "invalid" if cost.invalid else cost.method
        if cost.covers_engine is False:
            how = f"{how}, {cost.boundary}"
        figures.append(f"{number(cost.value)} {unit}{'' if how == 'measured' else f' ({how})'}")
    if rate.not_judged:
        figures.append(f"not judged: {rate.not_judged}")
    return ", ".join(figures)


def _why(error: ErrorRecord | None) -> str:
    if error is None:
        return "no result"
    text: str = error.kind
    if error.phase and error.kind != "preflight":
        text += f" while {error.phase}"
    message = " ".join(error.message.split())
    if error.kind in ("exception", "oom"):
        message = f"{error.type}: {message}"
    text = printable(f"{text}: {message}")
    return f"{text[:MAX_CHARACTERS]}…" if len(text) > MAX_CHARACTERS else text


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 90 else duration_text(seconds)
