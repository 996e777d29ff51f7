"""Lines of the plan, shown before a run: what regression gates will detect, and how many cycles they need."""

from __future__ import annotations

import math
import statistics

from pytest_llem.gates.eligibility import PER_TOKEN_TIME
from pytest_llem.gates.power_analysis import POWER, cycles_needed, detectable
from pytest_llem.gates.sequential import Schedule
from pytest_llem.results.study_result import StudyResult
from pytest_llem.study.design import StudyConfig

#: Larger minimum detectable effects, as relative changes, are reported as "no change": none can be detected.
MAX_REPORTED = 10.0

#: Typical coefficients of variation between cycles, if the device and if Python is the bottleneck; used until a
#: reference has been measured.
TYPICAL = (0.005, 0.02)

#: Added to figures that follow from :data:`TYPICAL`.
_NOT_MEASURED = "(typical, not measured)"

#: Relative changes for which an expected number of cycles is shown, unless delta tolerates them.
_SHOWN_CHANGES = (0.2, 0.1, 0.05)


def minimum_detectable_effects(study: StudyConfig, reference: StudyResult | None) -> list[str]:
    """Return the plan's lines on the smallest changes that the regression gates of *study* will detect.

    Args:
        study: The candidate's study.
        reference: The saved result; None if candidate and reference are interleaved.
    """
    gates, n = study.gates, study.n_cycles
    family = len(study.family)
    n_reference = n if reference is None else _median_cycles(reference)
    if min(n, n_reference) < 2:
        side, fewest = ("candidate", n) if n < 2 else ("reference", n_reference)
        return [
            f"gates: no comparison can be decided: that needs 2 cycles, and the {side} has {fewest} "
            "(execution.n_cycles, --llem-cycles)"
        ]
    schedule = Schedule(study.min_cycles, n) if study.execution.until_decided else None

    def effect(delta: float, cv: float, of_metric: str = "") -> str:
        change = detectable(
            cv,
            n,
            n_reference,
            delta=delta,
            # The power of the last look alone: that of all looks together is not less.
            alpha=gates.alpha if schedule is None else gates.alpha * schedule.share,
            power=POWER,
            family=family,
            paired=reference is None,
        )
        size = "no change" if change is None or change > MAX_REPORTED else f"{change:.1%}"
        return f"{size}{of_metric} if cycles vary by {cv:.1%}"

    spreads = _spreads(study, reference)
    if any(cv is not None for _, _, cv in spreads):
        effects = [
            f"unknown of {metric}: the reference has no spread of it"
            if cv is None
            else effect(delta, cv, f" of {metric}")
            for metric, delta, cv in spreads
        ]
    else:
        smallest = min(map(gates.delta_of, study.family))
        effects = [f"{effect(smallest, cv)} {_NOT_MEASURED}" for cv in TYPICAL]
    cycles = f"{n} interleaved cycles" if reference is None else f"{n} cycles against {n_reference}"
    if schedule is not None:
        cycles = f"up to {cycles}, judged {len(schedule.sizes)} times,"
    how = f"power {POWER:.0%}, α {gates.alpha:g}, Holm over {family}"
    return [f"gates: {cycles} detect a change of ({how}):", *(f"  {effect}" for effect in effects)]


def _spreads(study: StudyConfig, reference: StudyResult | None) -> list[tuple[str, float, float | None]]:
    """Return name, delta and largest coefficient of variation (None if unknown) of each compared metric."""
    gates = study.gates
    found = []
    for metric in dict.fromkeys(study.family):
        judged, cvs = metric, _variations(metric, reference)
        # A default gate judges TPOT in place of ITL if several tokens arrive at a time.
        if not cvs and gates.metrics is None and metric in PER_TOKEN_TIME:
            judged = PER_TOKEN_TIME[metric]
            cvs = _variations(judged, reference)
        found.append((judged, gates.delta_of(metric), max(cvs, default=None)))
    return found


def _variations(metric: str, reference: StudyResult | None) -> list[float]:
    """Return a metric's known coefficients of variation, one for each point; empty if it is missing in a point."""
    points = [] if reference is None else reference.points
    if not all(metric in point.metrics for point in points):
        return []
    return [cv for point in points if (cv := point.metrics[metric].cv) is not None]


def _median_cycles(reference: StudyResult) -> int:
    return int(statistics.median(len(point.cycles) for point in reference.points)) if reference.points else 0


def expected_cycles(study: StudyConfig, duration: str | None) -> list[str]:
    """Return the plan's lines on how many cycles an interleaved study with ``n_cycles: auto`` is expected to run.

    Args:
        study: The candidate's study.
        duration: Estimated time to measure one point once as candidate and once as reference, as text; None if
            unknown.
    """
    gates, execution = study.gates, study.execution
    schedule = Schedule(execution.min_cycles, execution.max_cycles)
    family, delta = len(study.family), min(map(gates.delta_of, study.family))
    each = "" if duration is None else f", about {duration} each"
    lines = [
        f"gates: {schedule.min_cycles} to {schedule.max_cycles} interleaved cycles{each}, until decided "
        f"(α {gates.alpha:g}, Holm over {family}):"
    ]
    for cv in TYPICAL:
        changes = {f"a change of {change:.0%}": change for change in _SHOWN_CHANGES if change > delta}
        if delta:
            changes["no change"] = 0.0
        parts = []
        for name, change in changes.items():
            needed = cycles_needed(
                math.sqrt(2) * cv,  # a pair's log ratio has the noise of two cycles
                delta=delta,
                change=change,
                alpha=gates.alpha,
                schedule=schedule,
                family=family,
            )
            too_many = needed.fixed is None or needed.fixed > schedule.max_cycles
            number = f"more than {schedule.max_cycles}" if too_many else f"{needed.sequential:.0f}"
            parts.append(f"{name}: {number}")
        lines.append(f"  {', '.join(parts)} cycles if cycles vary by {cv:.1%} {_NOT_MEASURED}")
    return lines
