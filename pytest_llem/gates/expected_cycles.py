"""Estimate, before anything is measured, how many cycles gates need until they are decided."""

from __future__ import annotations

from pytest_llem.gates.minimum_detectable_effect import TYPICAL
from pytest_llem.gates.sequential import Schedule, cycles_needed
from pytest_llem.study.design import StudyConfig

#: Relative changes for which the number of cycles is shown, as far as they exceed delta.
_CHANGES = (0.2, 0.1, 0.05)


def expected_cycles(study: StudyConfig, duration: str | None) -> list[str]:
    """Return lines with the expected numbers of cycles of an interleaved study whose cycles run until decided.

    Args:
        study: The candidate's study.
        duration: Estimated time of a cycle of one point on both sides, as text; None if unknown.
    """
    gates, execution = study.gates, study.execution
    schedule = Schedule(execution.min_cycles, execution.max_cycles)
    family, delta = len(study.family), min(map(gates.delta_of, study.family))
    each = "" if duration is None else f", about {duration} each"
    lines = [
        f"gates: {schedule.min_cycles} to {schedule.max_cycles} interleaved cycles{each}, until decided "
        f"(α {gates.alpha:g}, Holm over {family}):"
    ]
    for spread in TYPICAL:
        changes = {f"a change of {change:.0%}": change for change in _CHANGES if change > delta}
        if delta:
            changes["no change"] = 0.0
        parts = []
        for name, change in changes.items():
            wanted = cycles_needed(
                spread, delta=delta, change=change, alpha=gates.alpha, schedule=schedule, family=family
            )
            many = wanted.fixed is None or wanted.fixed > schedule.max_cycles
            parts.append(f"{name}: {f'more than {schedule.max_cycles}' if many else f'{wanted.sequential:.0f}'}")
        lines.append(f"  {', '.join(parts)} cycles if pairs vary by {spread:.1%}")
    return lines
