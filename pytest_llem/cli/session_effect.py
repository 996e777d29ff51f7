"""How far sessions differ that measured the same, and the delta that leaves room for that: ``llem aa`` tells."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pytest_llem.cli.command import DONE, FAILED, NOT_RUN, complain
from pytest_llem.gates.matching import shared_experiments
from pytest_llem.gates.sessions import CONFIDENCE, SessionEffect, session_effect
from pytest_llem.gates.statistics import UndecidableError
from pytest_llem.results.facts import TESTBED
from pytest_llem.results.models import StudyResult
from pytest_llem.study.gates import DEFAULT_DELTA, DEFAULT_FAMILY, GatesConfig
from pytest_llem.study.problems import printable

_USELESS = "too few sessions, or too much between them, for a delta below 100%"


def aa(paths: Sequence[Path], metrics: Sequence[str]) -> int:
    """Print the session effect of each metric and the lines for the study, and return the exit status.

    Args:
        paths: Results of the same study, a session each: directories, or files with a StudyResult.
        metrics: By their names in the catalogue; empty for those that the study gates.

    Returns:
        0, 1 where there is nothing to recommend, or 2 where a path holds no such result.

    Raises:
        OSError: A result cannot be read.
    """
    try:
        results = _read(paths)
    except ValueError as error:
        complain(str(error))
        return NOT_RUN
    said = results[-1].measurement_protocol.get("gates") or {}
    alpha = said.get("alpha") or GatesConfig().alpha
    names = list(dict.fromkeys(metrics or said.get("metrics") or DEFAULT_FAMILY))
    effects = []
    for name in names:
        try:
            effects.append(session_effect(results, name, alpha=alpha, metrics=len(names)))
        except UndecidableError as error:
            complain(f"{name}: {error}")
    if not effects:
        return FAILED
    usable = {effect.metric: rounded for effect in effects if (rounded := _rounded(effect.delta)) < 1}
    for line in _told(effects, usable, alpha):
        print(line)
    for effect in effects:
        if effect.metric not in usable:
            complain(f"{effect.metric}: {_USELESS}")
    return DONE if usable else FAILED


def _read(paths: Sequence[Path]) -> list[StudyResult]:
    """Return the results, a session each, and warn of what is not the same in all.

    Raises:
        ValueError: They are no results, or no sessions of one study; the message starts with the path at fault.
        OSError: They cannot be read.
    """
    results = [StudyResult.load(path) for path in paths]
    if len(results) < 2:
        raise ValueError(f"{paths[0]}: is one session, and at least two are needed")
    measured: dict[tuple[str, str], int] = {}
    for at, (path, result) in enumerate(zip(paths, results, strict=True)):
        first = results[0]
        if result.study_design_hash != first.study_design_hash:
            raise ValueError(
                f"{path}: is of another study than {paths[0]}: its design is {result.study_design_hash}, "
                f"and not {first.study_design_hash}"
            )
        if differ := _differing(first, result, "testbed"):
            raise ValueError(f"{path}: was measured otherwise than {paths[0]}: {', '.join(differ)}")
        if differ := _differing(first, result, "sut"):
            complain(
                f"{path}: warning: {', '.join(differ)} not as in {paths[0]}: "
                "what that changes is counted as the session's"
            )
        for other, there in zip(paths[:at], results[:at], strict=True):
            if not result.experiments and (dependent := shared_experiments(result, there)):  # as of a baseline
                raise ValueError(f"{path} and {other}: {dependent}")
        for entry in result.experiments:
            if entry.replayed_from is not None:
                raise ValueError(f"{path}: {entry.experiment_id} is of another session: {entry.replayed_from}")
            if entry.status == "completed" and entry.completed_at is not None:
                seen = measured.setdefault((entry.experiment_id, entry.completed_at), at)
                if seen != at:
                    raise ValueError(f"{path}: is the same session as {paths[seen]}")
    return results


def _differing(one: StudyResult, other: StudyResult, facts: Literal["testbed", "sut"]) -> list[str]:
    """Return the names of the facts in which points of two results differ."""
    there = {point.config_hash: getattr(point, facts) for point in one.points}
    minor = {key for key, fact in TESTBED.items() if fact.concerns == "nothing"}
    differing: dict[str, None] = {}
    for point in other.points:
        here, known = getattr(point, facts), there.get(point.config_hash)
        if here and known:  # an earlier version wrote none down
            keys = {**known, **here} if facts == "sut" else [key for key in TESTBED if key not in minor]
            differing |= {key: None for key in keys if known.get(key) != here.get(key)}
    return list(differing)


def _told(effects: Sequence[SessionEffect], usable: Mapping[str, float], alpha: float) -> Iterator[str]:
    yield from _table(effects)
    yield ""
    yield "sigma_session: standard deviation of what a session does to all its cycles alike"
    yield f"at most: its upper bound at {CONFIDENCE:.0%} confidence; more sessions bring it down, and delta too"
    yield f"delta: {DEFAULT_DELTA:.0%}, or what two sessions differ by in any metric in {alpha:.0%} of comparisons"
    for effect in effects:
        for note in effect.notes:
            yield f"{effect.metric}: {printable(note)}"
    if usable:
        yield ""
        yield "gates:"
        yield "  delta: {" + ", ".join(f"{metric}: {delta:g}" for metric, delta in usable.items()) + "}"


def _table(effects: Sequence[SessionEffect]) -> Iterator[str]:
    rows = [("metric", "sessions", "points", "sigma_session", "at most", "delta")]
    rows += [
        (
            effect.metric,
            str(effect.sessions),
            str(effect.points),
            _percent(effect.spread.sigma),
            _percent(effect.spread.upper),
            _percent(_rounded(effect.delta)),
        )
        for effect in effects
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *figures in rows:
        yield "  ".join(
            [name.ljust(widths[0]), *(one.rjust(width) for one, width in zip(figures, widths[1:], strict=True))]
        )


def _rounded(delta: float) -> float:
    """Return it in steps of 0.1 %, and no less than it is."""
    return math.ceil(round(delta * 1000, 6)) / 1000


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%" if share < 10 else "> 1000%"
