"""The runs of a history: one for each result, without copies, in the order of commits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from pydantic import ValidationError

from pytest_llem.gates.eligibility import PER_REQUEST, PER_TOKEN_TIME
from pytest_llem.results.study_result import StudyResult
from pytest_llem.study.gates import DEFAULT_FAMILY, OPEN_LOOP_FAMILY, GatesConfig

#: Metrics in place of default ones, for engines and servers whose tokens are not known one by one.
INSTEAD = PER_REQUEST | PER_TOKEN_TIME


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


def gates_of(result: StudyResult) -> GatesConfig:
    """Return the settings of gates of a result's study.

    Raises:
        ValueError: They are invalid.
    """
    try:
        return GatesConfig.model_validate(result.measurement_protocol.get("gates") or {})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ["gates", *first["loc"]]))
        raise ValueError(f"{result.name}, newest run: {where}: {first['msg']}") from error


def unique_runs(results: Iterable[StudyResult], metrics: Sequence[str]) -> tuple[list[Run], int]:
    """Return the run of each result, and how many results were left out as copies of others."""
    runs: dict[object, Run] = {}
    copies = 0
    for result in results:
        digests = tuple(sorted(digest for point in result.points for digest in point.result_digests))
        is_known = result.started_at is not None or digests
        key = (result.name, result.started_at, digests) if is_known else object()
        copies += key in runs
        if key not in runs:
            runs[key] = _run_of(result, metrics)
    return [*runs.values()], copies


def in_order(runs: Sequence[Run], commits: Mapping[str, tuple[str, str]]) -> list[Run]:
    """Return *runs* by time: that of their commits if all of these are known, else that of the runs.

    Args:
        runs: The runs.
        commits: Time in ISO 8601, and subject, of commits.
    """
    known = [commits.get(run.commit) if run.commit else None for run in runs]
    if any(one is None and run.commit for one, run in zip(known, runs, strict=True)):
        known = [None for _ in runs]
    placed = [
        Run(run.result, run.commit, run.dirty, *(one or (run.time, None)))
        for run, one in zip(runs, known, strict=True)
    ]
    return sorted(placed, key=lambda one: (one.time, one.result.started_at or ""))


def _run_of(result: StudyResult, metrics: Sequence[str]) -> Run:
    """Return the run of a result, which is stripped of what a history does not need: 200 fit into memory."""
    with suppress(ValueError):  # reported if it is the newest run
        metrics = metrics or gates_of(result).metrics or ()
    kept_metrics = {*metrics} or {*DEFAULT_FAMILY, *OPEN_LOOP_FAMILY, *INSTEAD.values()}
    recorded = result.environment.get("git")  # null without a repository
    git = recorded if isinstance(recorded, dict) else {}
    facts = next((point.sut for point in result.points if point.sut.get("commit")), {})
    commit = git.get("commit") or facts.get("commit")
    kept = [
        point.model_copy(
            update={
                "metrics": {name: one for name, one in point.metrics.items() if name in kept_metrics},
                "turns": [],
                "loads": [],
                "verdicts": [],
            }
        )
        for point in result.points
        if point.cycles
    ]
    return Run(
        result=result.model_copy(update={"points": kept, "experiments": [], "warnings": [], "excluded": []}),
        commit=commit if isinstance(commit, str) else None,
        dirty=bool(git.get("dirty") or facts.get("uncommitted_changes")),
        time=result.started_at or "",
    )
