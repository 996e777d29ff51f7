"""Run ``llem aa``: estimate how far sessions of an unchanged study differ, and recommend a delta."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pytest_llem.cli.command import DONE, FAILED, print_error, write
from pytest_llem.gates.decisions import UndecidableError
from pytest_llem.gates.eligibility import judged_metric
from pytest_llem.gates.gate import gates_of
from pytest_llem.gates.matching import pairs, shared_experiments_problem
from pytest_llem.gates.sessions import CONFIDENCE, SessionEffect, session_effect
from pytest_llem.results.facts import TESTBED
from pytest_llem.results.study_result import StudyResult
from pytest_llem.study.gates import DEFAULT_DELTA, GatesConfig
from pytest_llem.study.problems import printable

_UNUSABLE = "too few sessions, or sessions that differ too much, for a delta below 100%"


def aa(paths: Sequence[Path], metrics: Sequence[str]) -> int:
    """Print the session effect of each metric and the ``gates:`` lines for the study.

    Args:
        paths: Results of the same study, one per session: directories, or files with a StudyResult.
        metrics: Names of metrics in the catalogue; empty for the metrics that the study gates.

    Returns:
        The exit status: 0; 1 if no delta can be recommended.

    Raises:
        ValueError: A path has no suitable result.
        OSError: A result cannot be read.
    """
    results = _read(paths)
    gates = gates_of(results[-1], paths[-1], {"metrics": [*dict.fromkeys(metrics)]} if metrics else {})
    names = list(dict.fromkeys(_gated_metrics(results, gates)))
    effects = []
    for name in names:
        try:
            effects.append(session_effect(results, name, alpha=gates.alpha, metrics=len(names)))
        except UndecidableError as error:
            print_error(f"{name}: {error}")
    if not effects:
        return FAILED
    usable = {effect.metric: rounded for effect in effects if (rounded := _rounded(effect.delta)) < 1}
    for line in _lines(effects, usable, gates.alpha):
        write(f"{line}\n")
    for effect in effects:
        if effect.metric not in usable:
            print_error(f"{effect.metric}: {_UNUSABLE}")
    return DONE if usable else FAILED


def _read(paths: Sequence[Path]) -> list[StudyResult]:
    """Return the results, one per session, and warn about differences between systems under test.

    Raises:
        ValueError: A path has no results, or the results are not different sessions of one study on one testbed.
            The message starts with the path.
        OSError: A result cannot be read.
    """
    if missing := next((path for path in paths if not path.exists()), None):
        raise ValueError(f"{missing}: no such file or folder")
    results = [_with_points(path) for path in paths]
    if len(results) < 2:
        raise ValueError(f"{paths[0]}: is the only session: at least two are needed")
    measured: dict[tuple[str, str], int] = {}
    for index, (path, result) in enumerate(zip(paths, results, strict=True)):
        first = results[0]
        if result.study_design_hash != first.study_design_hash:
            raise ValueError(
                f"{path}: is of another study than {paths[0]}: its design is {result.study_design_hash}, "
                f"not {first.study_design_hash}"
            )
        if differ := _differing(first, result, "testbed"):
            raise ValueError(f"{path}: testbed differs from that of {paths[0]}: {', '.join(differ)}")
        if differ := _differing(first, result, "sut"):
            print_error(
                f"{path}: warning: differs from {paths[0]} in {', '.join(differ)}: "
                "the effect of that is counted as part of the session effect"
            )
        for other, earlier in zip(paths[:index], results[:index], strict=True):
            is_saved = not (result.experiments and earlier.experiments)  # a saved baseline has no experiments
            if is_saved and (dependent := shared_experiments_problem(result, earlier)):
                raise ValueError(f"{path} and {other}: {dependent}")
        for entry in result.experiments:
            if entry.replayed_from is not None:
                raise ValueError(f"{path}: {entry.experiment_id} is of another session: {entry.replayed_from}")
            if entry.status == "completed" and entry.completed_at is not None:
                seen = measured.setdefault((entry.experiment_id, entry.completed_at), index)
                if seen != index:
                    raise ValueError(f"{path}: is the same session as {paths[seen]}")
    return results


def _with_points(path: Path) -> StudyResult:
    result = StudyResult.load(path)
    if not result.points:
        raise ValueError(f"{path}: holds no points")
    return result


def _gated_metrics(results: Sequence[StudyResult], gates: GatesConfig) -> Iterator[str]:
    """Yield the metrics that gates judge when the last result is compared with each other one; some repeatedly."""
    for earlier in results[:-1]:
        for pair in pairs(results[-1].points, earlier):
            for metric in gates.family_of(pair.candidate.config.get("load")):
                if gates.metrics is None and pair.reference is not None:
                    metric, _ = judged_metric(metric, pair.candidate, pair.reference)
                yield metric


def _differing(one: StudyResult, other: StudyResult, facts: Literal["testbed", "sut"]) -> list[str]:
    """Return the names of the facts that differ at any point of two results."""
    by_hash = {point.config_hash: getattr(point, facts) for point in one.points}
    warning_only = {key for key, fact in TESTBED.items() if fact.concerns == "nothing"}
    differing: dict[str, None] = {}
    for point in other.points:
        second, first = getattr(point, facts), by_hash.get(point.config_hash)
        if second and first:  # earlier versions did not record facts
            keys = {**first, **second} if facts == "sut" else [key for key in TESTBED if key not in warning_only]
            differing |= {key: None for key in keys if first.get(key) != second.get(key)}
    return list(differing)


def _lines(effects: Sequence[SessionEffect], usable: Mapping[str, float], alpha: float) -> Iterator[str]:
    yield from _table(effects)
    yield ""
    yield "sigma_session: standard deviation of the effect that a session has on all its cycles"
    yield f"upper bound: of sigma_session at {CONFIDENCE:.0%} confidence; more sessions lower it, and delta too"
    exceeded = f"two sessions exceed in any metric in {100 * alpha:g}% of comparisons"
    yield f"delta: {DEFAULT_DELTA:.0%}, or the difference that {exceeded}"
    for effect in effects:
        for note in effect.notes:
            yield f"{effect.metric}: {printable(note)}"
    if usable:
        yield ""
        yield "gates:"
        yield "  delta: {" + ", ".join(f"{metric}: {delta:g}" for metric, delta in usable.items()) + "}"


def _table(effects: Sequence[SessionEffect]) -> Iterator[str]:
    rows = [("metric", "sessions", "points", "sigma_session", "upper bound", "delta")]
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
    """Return *delta* rounded up to a multiple of 0.1 %."""
    return math.ceil(round(delta * 1000, 6)) / 1000


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%" if share < 10 else "> 1000%"
