"""What the cycles of a point show together: statistics, contention, turns and GPUs."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pytest_llem.catalogue import CATALOGUE
from pytest_llem.results.carbon import emission_factors
from pytest_llem.results.contention import PointContention
from pytest_llem.results.experiment import ExperimentResult
from pytest_llem.results.metrics import weakest
from pytest_llem.results.points import CycleTurns, PointResult
from pytest_llem.results.statistics import Summary, mean_interval

_NO_CYCLE = "no completed cycle"
_UNKNOWN_METRIC = "the version that measured it did not know this metric"

#: The statistics of a point without a result, one object for all such points: there may be 10,000.
_NO_METRICS = {
    name: Summary(mean=None, n=0, unit=definition.unit, reason=_NO_CYCLE) for name, definition in CATALOGUE.items()
}


def summarise(cycles: Sequence[ExperimentResult], *, confidence: float = 0.95) -> dict[str, Summary]:
    """Return the statistics of every metric over a point's *cycles*.

    Args:
        cycles: Results of the completed cycles.
        confidence: Nominal confidence of the intervals.
    """
    if not cycles:
        return _NO_METRICS
    return {name: _summarise_metric(cycles, name, confidence) for name in CATALOGUE}


def _summarise_metric(cycles: Sequence[ExperimentResult], name: str, confidence: float) -> Summary:
    unit = CATALOGUE[name].unit
    by_cycle = [cycle.metrics.get(name) for cycle in cycles]
    figures = [figure for figure in by_cycle if figure is not None]
    known = [figure for figure in figures if figure.value is not None]
    not_judged = next((figure.not_judged for figure in figures if figure.not_judged is not None), None)
    if not known:
        reason = next((figure.reason for figure in figures if figure.reason), _UNKNOWN_METRIC)
        return Summary(mean=None, n=0, unit=unit, reason=reason, not_judged=not_judged)
    boundaries = {figure.boundary for figure in known}
    covered = {figure.covers_engine for figure in known}
    methods = {figure.method for figure in known}
    if len(methods) > 1 and "estimated" in methods:
        not_judged = "energy was estimated in some of its cycles and not in others"
    factors = dict.fromkeys(filter(None, map(emission_factors, known))) if name == "gco2e_g" else {}
    if len(factors) > 1:  # possible with replayed cycles; their mean has no carbon intensity
        not_judged = f"its cycles differ in carbon intensity or PUE: {'; '.join(factors)}"
    values = [None if figure is None else figure.value for figure in by_cycle]
    mean, sd, interval = mean_interval([value for value in values if value is not None], confidence)
    return Summary(
        mean=mean,
        sd=sd,
        cv=sd / abs(mean) if sd is not None and mean else None,
        ci95=interval,
        n=len(known),
        unit=unit,
        method=weakest(methods),
        boundary=boundaries.pop() if len(boundaries) == 1 else None,
        not_judged=not_judged,
        covers_engine=False if False in covered else None if None in covered else True,
        shared=any(figure.shared for figure in known),
        invalid=next((figure.invalid for figure in known if figure.invalid), None),
        values=values,
    )


def summarise_contention(cycles: Sequence[ExperimentResult]) -> PointContention | None:
    """Return which of a point's *cycles* are contended; None if no cycle records contention."""
    if all(one.contention is None for one in cycles):
        return None
    states = {one.identity.cycle: one.contention.state if one.contention else "unknown" for one in cycles}
    reasons: dict[str, list[str]] = {"contended": [], "unknown": []}
    for one in cycles:
        if one.contention and one.contention.state != "uncontended":
            reasons[one.contention.state] += one.contention.reasons
    return PointContention(
        contended=[cycle for cycle, state in states.items() if state == "contended"],
        unknown=[cycle for cycle, state in states.items() if state == "unknown"],
        reasons=list(dict.fromkeys(reasons["contended"])),
        unknown_reasons=list(dict.fromkeys(reason.partition(":")[0] for reason in reasons["unknown"])),
    )


def cycle_turns(cycles: Sequence[ExperimentResult]) -> Iterator[CycleTurns]:
    """Yield the turns of each of a point's *cycles* that was interleaved with the other side of a comparison."""
    for result in cycles:
        if (found := result.interleaving) is not None:
            shared = set.intersection(*(set(turn.metrics) for turn in found.turns))
            metrics = {name: [turn.metrics[name] for turn in found.turns] for name in sorted(shared)}
            yield CycleTurns(cycle=result.identity.cycle, pair=found.pair, metrics=metrics)


def gpus_of_cycles(cycles: Sequence[ExperimentResult]) -> list[list[str]]:
    """Return the UUIDs of the GPUs of each cycle; empty if no cycle ran on GPUs."""
    found = [sorted(gpu["uuid"] for gpu in one.environment.get("gpus") or []) for one in cycles]
    return found if any(found) else []


def not_repeated_reason(cycles: Sequence[ExperimentResult]) -> str | None:
    """Return why the load generator's runs in a point's *cycles* are no repetitions; None if they are."""
    imported = [one.imported for one in cycles if one.imported is not None]
    runs = sum(one.runs for one in imported)
    starts = {one.server_start for one in imported}
    one_server = len(imported) == 1 or (len(starts) == 1 and None not in starts)
    return one_server_reason(runs) if one_server and runs > 1 else None


def one_server_reason(runs: int) -> str:
    """Return why several *runs* of one start of a server are no repetitions."""
    return (
        f"{runs} runs of one server are one cycle and no repetitions, since servers differ from start to start: "
        "start it again for each run (and say so: llem import --cycle-per file, command.fresh_server: true)"
    )


#: Fewest GPUs for an interval: with two, it would reach from 0.4 to 32 times the value.
MIN_INTERVAL_GPUS = 3


@dataclass(frozen=True)
class GpuSpread:
    """Variation of a metric over the GPUs of a point's cycles.

    Attributes:
        gpus: Number of GPUs, or of sets of them.
        between: Standard deviation of their means / mean.
        interval: 95 % interval of ``between``, for normally distributed GPUs; None with two of them.
        within: Standard deviation of the cycles on one of them / mean, pooled; None with one cycle on each.
    """

    gpus: int
    between: float
    interval: tuple[float, float] | None = None
    within: float | None = None


def gpu_spread(point: PointResult, metric: str) -> GpuSpread | None:
    """Return how far a metric of *point* differs between GPUs; None if all its cycles ran on the same GPUs.

    Example:
        Of a study with ``execution.devices: spread``::

            for point in result.points:
                if (spread := gpu_spread(point, "energy_per_output_token_j")) is not None:
                    print(f"{point.id}: {spread.between:.1%} between {spread.gpus} GPUs")
    """
    summary = point.summary_of(metric)
    if len(summary.values) != len(point.gpus):
        return None
    groups: dict[tuple[str, ...], list[float]] = {}
    for gpus, value in zip(point.gpus, summary.values, strict=True):
        if value is not None:
            groups.setdefault(tuple(gpus), []).append(value)
    mean = statistics.fmean(map(statistics.fmean, groups.values())) if groups else 0.0
    if len(groups) < 2 or not mean:
        return None
    between = statistics.stdev(map(statistics.fmean, groups.values())) / abs(mean)
    degrees_of_freedom = sum(len(values) - 1 for values in groups.values())
    squares = sum((value - statistics.fmean(values)) ** 2 for values in groups.values() for value in values)
    return GpuSpread(
        len(groups),
        between,
        _interval(between, len(groups)),
        (squares / degrees_of_freedom) ** 0.5 / abs(mean) if degrees_of_freedom else None,
    )


def _interval(deviation: float, number: int) -> tuple[float, float] | None:
    """Return the 95 % interval of a standard deviation of *number* values: s · √((n − 1) / χ²)."""
    if number < MIN_INTERVAL_GPUS:
        return None
    from scipy.special import chdtri  # takes 0.1 s to import

    freedom = number - 1
    low, high = (deviation * (freedom / float(chdtri(freedom, share))) ** 0.5 for share in (0.025, 0.975))
    return low, high
