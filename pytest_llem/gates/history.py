"""The history of studies: each metric of each point over the runs of one testbed, and its lasting changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise

from pytest_llem.catalogue import CATALOGUE
from pytest_llem.gates.differences import ORIGIN, blocking_fact, different_facts
from pytest_llem.gates.eligibility import (
    ESTIMATED,
    PER_REQUEST,
    PER_TOKEN_TIME,
    allows_estimates,
    contention_reason,
    ineligible_reason,
    replay_ineligible_reason,
)
from pytest_llem.gates.gate import gates_of
from pytest_llem.gates.series import MIN_RUNS, Change, Series, find_changes
from pytest_llem.results.points import PointResult, testbed_of
from pytest_llem.results.statistics import Summary
from pytest_llem.results.study_result import StudyResult
from pytest_llem.study.gates import DEFAULT_FAMILY, OPEN_LOOP_FAMILY, GatesConfig
from pytest_llem.study.identity import axes_key

#: Metrics in place of default ones, for engines that do not count tokens, and servers that send several at a time.
_INSTEAD = PER_REQUEST | PER_TOKEN_TIME


@dataclass(frozen=True)
class Run:
    """One run of a study.

    Attributes:
        result: Its result; only points with results, without what a history does not need.
        commit: Commit of the checkout; None if it was not recorded.
        dirty: Whether tracked files differed from the commit.
        time: When the commit was made, or else when the run started, in ISO 8601; empty if neither is known.
        subject: First line of the commit's message; None if it is not known.
    """

    result: StudyResult
    commit: str | None
    dirty: bool
    time: str
    subject: str | None = None

    @property
    def label(self) -> str:
        """The commit's short id, with ``+`` after it for uncommitted changes; ``–`` if it is not known."""
        return f"{self.commit[:10]}{'+' if self.dirty else ''}" if self.commit else "–"


@dataclass(frozen=True)
class Value:
    """A metric of one point in one run.

    Attributes:
        run: The run.
        point: The point's result, with this metric only.
        summary: The metric's statistics.
        not_judged: Why the value is not judged; None if it is.
    """

    run: Run
    point: PointResult
    summary: Summary
    not_judged: str | None


@dataclass(frozen=True)
class MetricChange:
    """A lasting change of a metric.

    Attributes:
        verdict: ``REGRESSION`` or ``IMPROVEMENT``.
        change: The change; its indices count judged values.
        first: First value after the change, or of the drift.
        last: The same value, or the last value of the drift.
        before: The judged value before ``first``; None for a drift from the first run on.
        facts: System-under-test and testbed facts that differ between ``before`` and ``first``, except those of
            the checkout; empty for a drift.
    """

    verdict: str
    change: Change
    first: Value
    last: Value
    before: Value | None
    facts: tuple[str, ...]


@dataclass
class MetricHistory:
    """A metric of one point of a study over the runs on one testbed.

    Attributes:
        study: Name of the study.
        metric: Name of the metric in the catalogue.
        testbed: Key of the testbed; ``unknown`` if results did not record it.
        differs: If an earlier series of the same point has the same testbed key: the testbed fact that differs,
            with its value in this series. None otherwise.
        values: Values in order.
        changes: Lasting changes in order.
    """

    study: str
    metric: str
    testbed: str
    differs: str | None
    values: list[Value]
    changes: list[MetricChange] = field(default_factory=list)

    @property
    def point(self) -> str:
        """Id of the point, in the newest run."""
        return self.values[-1].point.id

    @property
    def judged(self) -> list[Value]:
        """The values that are judged."""
        return [one for one in self.values if one.not_judged is None]

    @property
    def not_judged_reason(self) -> str | None:
        """Why no change could be found; None if one could."""
        judged = self.judged
        if len(judged) >= MIN_RUNS:
            return None
        reason = next((one.not_judged for one in self.values if one.not_judged is not None), None)
        return f"needs {MIN_RUNS} runs, has {len(judged)}" + (f": {reason}" if reason else "")


@dataclass(frozen=True)
class History:
    """The history of one or several studies.

    Attributes:
        runs: All runs, in order.
        series: Each metric of each point on each testbed.
        alpha: Probability of a false rise over all series, and the same for falls.
        copies: Number of results that were left out as copies of others.
    """

    runs: list[Run]
    series: list[MetricHistory]
    alpha: float
    copies: int = 0

    def groups(self) -> dict[tuple[str, str], list[MetricHistory]]:
        """Return the series by study and testbed, those with changes first."""
        found: dict[tuple[str, str], list[MetricHistory]] = {}
        for one in self.series:
            found.setdefault((one.study, one.testbed), []).append(one)
        for group in found.values():
            group.sort(key=lambda one: not one.changes)
        return found


def history_of(
    results: Iterable[StudyResult],
    metrics: Sequence[str] = (),
    *,
    commits_of: Callable[[Iterable[str]], Mapping[str, tuple[str, str]]] = lambda _: {},
    alpha: float | None = None,
    delta: float | None = None,
) -> History:
    """Return each metric of each point over runs, with its changes.

    Results that may not be compared, by their testbed facts, are in different series.

    Args:
        results: Results of the runs, in any order. Copies of one are left out.
        metrics: Names of metrics in the catalogue; empty for those that each study gates in its newest run, as far
            as the other runs gated them too.
        commits_of: Returns time in ISO 8601, and subject, of those commits that are known, by their ids.
        alpha: Probability of a false rise over all series, and the same for falls; None for that of the newest
            run's study.
        delta: Relative change that does not count; None for that of each study.

    Raises:
        ValueError: The ``gates`` of a study's newest run are invalid.

    Example:
        >>> history = history_of([StudyResult.load(folder) for folder in Path("results").iterdir()])
        >>> [(one.point, one.metric) for one in history.series if one.changes]
    """
    runs, copies = _unique_runs(results, metrics)
    runs = _in_order(runs, commits_of([run.commit for run in runs if run.commit]))
    newest = {run.result.name: run.result for run in runs}
    given = {"metrics": metrics} if metrics else {}
    settings = {study: gates_of(result, f"{study}, newest run", given) for study, result in newest.items()}
    series: list[MetricHistory] = []
    family: list[Series] = []
    for study, gates in settings.items():
        for one in _histories([run for run in runs if run.result.name == study], metrics, gates):
            margin = gates.delta_of(one.metric) if delta is None else delta
            series.append(one)
            family.append(_series(one.judged, math.log1p(margin)))
    newest_gates = settings[runs[-1].result.name] if runs else GatesConfig()
    level = newest_gates.alpha if alpha is None else alpha
    for one, changes in zip(series, find_changes(family, level), strict=True):
        one.changes = [_change(one, change) for change in changes]
    return History(runs, series, level, copies)


def _unique_runs(results: Iterable[StudyResult], metrics: Sequence[str]) -> tuple[list[Run], int]:
    """Return the run of each result, and how many results were left out as copies of others."""
    runs: dict[object, Run] = {}
    copies = 0
    for result in results:
        digests = tuple(sorted(digest for point in result.points for digest in point.result_digests))
        is_identifiable = result.started_at is not None or digests
        key = (result.name, result.started_at, digests) if is_identifiable else object()
        copies += key in runs
        if key not in runs:
            runs[key] = _run_of(result, metrics)
    return [*runs.values()], copies


def _in_order(runs: Sequence[Run], commits: Mapping[str, tuple[str, str]]) -> list[Run]:
    """Return *runs* by time: that of their commits if all of these are known, else that of the runs.

    Args:
        runs: The runs.
        commits: Time in ISO 8601, and subject, of commits.
    """
    known = [commits.get(run.commit) if run.commit else None for run in runs]
    if any(one is None and run.commit for one, run in zip(known, runs, strict=True)):
        known = [None for _ in runs]
    dated = [
        run if one is None else replace(run, time=one[0], subject=one[1])
        for run, one in zip(runs, known, strict=True)
    ]
    return sorted(dated, key=lambda one: (one.time, one.result.started_at or ""))


def _run_of(result: StudyResult, metrics: Sequence[str]) -> Run:
    """Return the run of a result, without what a history does not need, so that 200 fit into memory."""
    with suppress(ValueError):  # reported if it is the newest run
        metrics = metrics or gates_of(result, result.name).metrics or ()
    needed = {*metrics} or {*DEFAULT_FAMILY, *OPEN_LOOP_FAMILY, *_INSTEAD.values()}
    recorded = result.environment.get("git")  # null without a repository
    git = recorded if isinstance(recorded, dict) else {}
    facts = next((point.sut for point in result.points if point.sut.get("commit")), {})
    commit = git.get("commit") or facts.get("commit")
    points = [
        point.model_copy(
            update={
                "metrics": {name: one for name, one in point.metrics.items() if name in needed},
                "turns": [],
                "loads": [],
                "verdicts": [],
            }
        )
        for point in result.points
        if point.cycles
    ]
    return Run(
        result=result.model_copy(update={"points": points, "experiments": [], "warnings": [], "excluded": []}),
        commit=commit if isinstance(commit, str) else None,
        dirty=bool(git.get("dirty") or facts.get("uncommitted_changes")),
        time=result.started_at or "",
    )


def _histories(runs: Sequence[Run], metrics: Sequence[str], gates: GatesConfig) -> Iterator[MetricHistory]:
    """Yield the series of one study, without changes."""
    by_key: dict[tuple[object, str], list[tuple[PointResult, MetricHistory]]] = {}
    digests: dict[object, set[str]] = {}
    for run in runs:
        for point in run.result.points:
            axes = axes_key(point.axes)
            seen = digests.setdefault(axes, set())
            if not seen.isdisjoint(point.result_digests):  # this run replayed cycles of an earlier one
                continue
            seen.update(point.result_digests)
            for metric in metrics or _gated_metrics(point, gates):
                summary = point.summary_of(metric)
                if summary.mean is not None:
                    one = point.model_copy(update={"metrics": {metric: summary}})
                    value = Value(run, one, summary, _not_judged(one, metric, summary))
                    _append(by_key.setdefault((axes, metric), []), value, run.result.name, metric)
    for groups in by_key.values():
        yield from (history for _, history in groups)


def _gated_metrics(point: PointResult, gates: GatesConfig) -> Iterator[str]:
    """Yield the gated metrics; a default one without a value is replaced by its substitute, if there is one."""
    for metric in gates.family_of(point.config.get("load")):
        has_value = point.summary_of(metric).mean is not None
        yield metric if has_value or gates.metrics is not None else _INSTEAD.get(metric, metric)


def _append(groups: list[tuple[PointResult, MetricHistory]], value: Value, study: str, metric: str) -> None:
    """Append a value to the series of its testbed, and make that series if it is the first one.

    Each of *groups* is the newest point of a series, with all testbed facts known so far, and the series.
    """
    point, differences = value.point, {}
    for index, (newest, history) in enumerate(groups):
        difference = blocking_fact(point, newest, metric)
        if difference is None:
            history.values.append(value)
            # A fact that was unknown so far counts from here on.
            groups[index] = point.model_copy(update={"testbed": newest.testbed | point.testbed}), history
            return
        differences[history.testbed] = difference
    testbed = testbed_of([point])
    key = testbed.key if testbed else "unknown"
    groups.append((point, MetricHistory(study, metric, key, differences.get(key), [value])))


def _not_judged(point: PointResult, metric: str, summary: Summary) -> str | None:
    """Return why a value is shown and not judged; None if it is judged."""
    if summary.method == "estimated" and not allows_estimates(point):
        return ESTIMATED
    reason = summary.not_judged or point.not_repeated or replay_ineligible_reason(point)
    reason = reason or ineligible_reason(point, metric) or contention_reason(point, metric)
    if reason is None and not all(value > 0 for value in _values(summary)):
        return "a value is not above 0"
    return reason


def _values(summary: Summary) -> list[float]:
    """Return the values of the cycles; of versions that did not keep them, the mean."""
    assert summary.mean is not None
    return [value for value in summary.values if value is not None] or [summary.mean]


def _series(values: Sequence[Value], margin: float) -> Series:
    """Return the logs of *values*, and which of them are of the same commit as the one before."""
    import numpy as np

    logs = [math.fsum(map(math.log, found)) / len(found) for found in (_values(one.summary) for one in values)]
    commits = [None if one.run.dirty else one.run.commit for one in values]
    same_commit = [False, *(one is not None and one == before for before, one in pairwise(commits))]
    return Series(np.array(logs), margin, np.array(same_commit[: len(logs)], dtype=bool))


def _change(history: MetricHistory, change: Change) -> MetricChange:
    judged = history.judged
    first, last = judged[change.first], judged[change.last]
    before = judged[change.first - 1] if change.first else None
    worse = (change.ratio > 1) == (CATALOGUE[history.metric].better == "lower")
    facts = different_facts(first.point, before.point) if before is not None and not change.is_drift else []
    return MetricChange(
        verdict="REGRESSION" if worse else "IMPROVEMENT",
        change=change,
        first=first,
        last=last,
        before=before,
        facts=tuple(one for one in facts if one not in ORIGIN),
    )
