"""Differences between two compared points, as text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pytest_llem.catalogue import CATALOGUE
from pytest_llem.gates.matching import is_measured, named
from pytest_llem.results.facts import CODE, TESTBED, TestbedFact, flat
from pytest_llem.results.points import PointResult
from pytest_llem.study.problems import printable

#: Settings that are testbed facts, or that change no measurement.
_NO_SUT = {"energy.allow_estimated", "measurement.length_mode", "output_dir"}

#: Facts of the checkout, which need not be the one that the code was imported from.
ORIGIN = {"commit", "uncommitted_changes"}

_DIGEST = re.compile("[0-9a-f]{40,}")


@dataclass(frozen=True)
class TestbedDifferences:
    """Differences in the testbed facts of two points, one per line.

    Attributes:
        blocking: Differences that stop the comparison of a metric.
        warnings: The other differences.
        binding: Those of ``blocking`` that no option overrides.
    """

    blocking: tuple[str, ...]
    warnings: tuple[str, ...]
    binding: tuple[str, ...] = ()


def testbed_differences(candidate: PointResult, reference: PointResult, metric: str) -> TestbedDifferences:
    """Return the differences in the testbed facts of *metric* in two points that both have a value of it."""
    blocking: list[str] = []
    warnings: list[str] = []
    binding: list[str] = []
    for fact, values, blocks in _different_testbed(candidate, reference, metric):
        text = _difference(fact.name, *values) + (f" ({fact.note})" if fact.note else "")
        (blocking if blocks else warnings).append(text)
        if fact.binding:
            binding.append(text)
    return TestbedDifferences(tuple(blocking), tuple(warnings), tuple(binding))


def blocking_fact(candidate: PointResult, reference: PointResult, metric: str) -> str | None:
    """Return the first testbed fact that stops the comparison of *metric*, and its value in the candidate.

    None if the points may be compared.
    """
    found = _different_testbed(candidate, reference, metric)
    return next((f"{fact.name}: {value}" for fact, (value, _), blocks in found if blocks), None)


def _different_testbed(
    candidate: PointResult, reference: PointResult, metric: str
) -> Iterator[tuple[TestbedFact, tuple[str, str], bool]]:
    """Yield each differing testbed fact of *metric*, both values as text, and whether it stops the comparison."""
    facts, reference_facts = _testbed(candidate, metric), _testbed(reference, metric)
    is_energy = candidate.metrics[metric].method is not None or reference.metrics[metric].method is not None
    for key, fact in TESTBED.items():
        value, reference_value = facts.get(key), reference_facts.get(key)
        if value == reference_value or (fact.concerns == "energy" and not is_energy):
            continue
        if fact.concerns in CATALOGUE and metric != fact.concerns:
            continue
        unknown = value is None or reference_value is None
        if fact.concerns == "nothing" and unknown:
            continue
        absent = "unknown" if fact.optional else "none"
        blocks = fact.concerns != "nothing" and not (unknown and fact.optional)
        yield fact, (_shown(value, absent), _shown(reference_value, absent)), blocks


def _testbed(point: PointResult, metric: str) -> dict[str, Any]:
    """Return a point's testbed facts, with the method and boundary of *metric* instead of those of energy_j."""
    summary = point.metrics[metric]
    own = {"energy_method": summary.method, "energy_boundary": summary.boundary}
    return {**point.testbed, **{key: value for key, value in own.items() if value is not None}}


def sut_differences(candidate: PointResult, reference: PointResult) -> Iterator[str]:
    """Yield the differences in the system-under-test facts of two points, one per line.

    Yields nothing if a point has no result.
    """
    if not (is_measured(candidate) and is_measured(reference)):
        return
    for key, value, reference_value in _different_sut(candidate, reference):
        yield _difference(key, _shown(value, "none"), _shown(reference_value, "none"))


def different_facts(candidate: PointResult, reference: PointResult) -> list[str]:
    """Return the names of the facts that differ between two measured points.

    A testbed fact that only one of them has is left out.
    """
    both = candidate.testbed.keys() & reference.testbed.keys()
    testbed = [key for key in TESTBED if key in both and candidate.testbed[key] != reference.testbed[key]]
    return [*(key for key, *_ in _different_sut(candidate, reference)), *(TESTBED[key].name for key in testbed)]


def _different_sut(candidate: PointResult, reference: PointResult) -> Iterator[tuple[str, Any, Any]]:
    """Yield key and both values of each system-under-test fact that differs."""
    facts, reference_facts = _sut(candidate), _sut(reference)
    for key in dict.fromkeys([*facts, *reference_facts]):
        if facts.get(key) != reference_facts.get(key) and key not in {*_NO_SUT, CODE}:
            yield key, facts.get(key), reference_facts.get(key)


def same_sut(candidate: PointResult, reference: PointResult) -> bool:
    """Whether two points of one run have the same code, packages, weights and settings.

    This cannot be determined for points of two runs: the digest of the code depends on the start method. Of a
    server, only the packages are known, and not the code that it runs.
    """
    if candidate.config.get("load"):
        return False
    facts, reference_facts = ({**_sut(point), **dict.fromkeys(ORIGIN)} for point in (candidate, reference))
    return facts.get(CODE) is not None and facts == reference_facts


def _sut(point: PointResult) -> dict[str, Any]:
    return {**flat(point.config), **point.sut}


def over_points(found: Iterable[tuple[str, Iterable[str]]], points: int) -> list[str]:
    """Return each line once, with the points that it concerns unless it concerns all.

    Args:
        found: Id and lines of each point.
        points: Number of points.
    """
    concerned: dict[str, dict[str, None]] = {}
    for point, lines in found:
        for line in lines:
            concerned.setdefault(line, {})[point] = None
    return [line if len(ids) == points else f"{line} [{named([*ids])}]" for line, ids in concerned.items()]


def _difference(name: str, candidate: str, reference: str) -> str:
    return f"{name}: {candidate} in the candidate, {reference} in the reference"


def _shown(value: Any, absent: str) -> str:
    if value is None:
        return absent
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(_shown(one, absent) for one in value)
    text = printable(str(value))
    return text[:12] if _DIGEST.fullmatch(text) else text
