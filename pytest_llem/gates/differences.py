"""What two points that are compared do not have in common, in words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pytest_llem.catalogue import CATALOGUE
from pytest_llem.gates.matching import is_measured, named
from pytest_llem.results.facts import CODE, TESTBED, flat
from pytest_llem.results.models import PointResult
from pytest_llem.study.problems import printable

#: Of a configuration, what is a bench fact, and what changes no measurement.
_NO_SUT = {"energy.allow_estimated", "measurement.length_mode", "output_dir"}

#: Of the system under test, where it came from: the interpreter's folder need not be that of the code.
_ORIGIN = {"commit", "uncommitted_changes"}

_DIGEST = re.compile("[0-9a-f]{40,}")


@dataclass(frozen=True)
class TestbedDifferences:
    """Testbed facts of two points that differ, a line each.

    Attributes:
        stops: Those that a metric cannot be compared with, *bars* included.
        warns: The others.
        bars: Those that no option overrides.
    """

    stops: tuple[str, ...]
    warns: tuple[str, ...]
    bars: tuple[str, ...] = ()


def testbed_differences(candidate: PointResult, reference: PointResult, metric: str) -> TestbedDifferences:
    """Return what *metric* of two points was measured on that differs; both have values of it."""
    here, there = _testbed(candidate, metric), _testbed(reference, metric)
    is_energy = candidate.metrics[metric].method is not None or reference.metrics[metric].method is not None
    stops: list[str] = []
    warns: list[str] = []
    bars: list[str] = []
    for key, fact in TESTBED.items():
        one, other = here.get(key), there.get(key)
        if one == other or (fact.concerns == "energy" and not is_energy):
            continue
        if fact.concerns in CATALOGUE and metric != fact.concerns:
            continue
        unknown = one is None or other is None
        if fact.concerns == "nothing" and unknown:
            continue
        text = _difference(fact.name, one, other, "unknown" if fact.optional else "none")
        text += f" ({fact.note})" if fact.note else ""
        (warns if fact.concerns == "nothing" or (unknown and fact.optional) else stops).append(text)
        if fact.binding:
            bars.append(text)
    return TestbedDifferences(tuple(stops), tuple(warns), tuple(bars))


def _testbed(point: PointResult, metric: str) -> dict[str, Any]:
    """Return a point's testbed facts: with the method and boundary of *metric*, which need not be energy_j's."""
    summary = point.metrics[metric]
    own = {"energy_method": summary.method, "energy_boundary": summary.boundary}
    return {**point.testbed, **{key: value for key, value in own.items() if value is not None}}


def sut_differences(candidate: PointResult, reference: PointResult) -> Iterator[str]:
    """Yield what was measured in two points that differs, a line each; nothing where one has no result."""
    if not (is_measured(candidate) and is_measured(reference)):
        return
    here, there = _sut(candidate), _sut(reference)
    for key in dict.fromkeys([*here, *there]):
        if here.get(key) != there.get(key) and key not in {*_NO_SUT, CODE}:
            yield _difference(key, here.get(key), there.get(key), "none")


def same_sut(candidate: PointResult, reference: PointResult) -> bool:
    """Whether two points, measured in one session, are of the same code, packages, weights and settings.

    Another start method imports other modules of the same code, so that results of two sessions cannot tell.
    """
    here, there = ({**_sut(point), **dict.fromkeys(_ORIGIN)} for point in (candidate, reference))
    return here.get(CODE) is not None and here == there


def _sut(point: PointResult) -> dict[str, Any]:
    return {**flat(point.config), **point.sut}


def over_points(found: Iterable[tuple[str, Iterable[str]]], points: int) -> list[str]:
    """Return lines once each, with the points that each concerns unless it concerns all.

    Args:
        found: Ids of points, and the lines of each.
        points: How many points there are.
    """
    concerned: dict[str, dict[str, None]] = {}
    for point, lines in found:
        for line in lines:
            concerned.setdefault(line, {})[point] = None
    return [line if len(ids) == points else f"{line} [{named([*ids])}]" for line, ids in concerned.items()]


def _difference(name: str, here: Any, there: Any, absent: str) -> str:
    return f"{name}: {_shown(here, absent)} here, {_shown(there, absent)} in the reference"


def _shown(value: Any, absent: str) -> str:
    if value is None:
        return absent
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(_shown(one, absent) for one in value)
    text = printable(str(value))
    return text[:12] if _DIGEST.fullmatch(text) else text
