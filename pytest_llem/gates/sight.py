"""What a comparison will be able to tell, said before anything is measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from pytest_llem.gates.statistics import detectable
from pytest_llem.results.models import StudyResult
from pytest_llem.study.design import StudyConfig

POWER = 0.9

#: A gate that finds only larger changes than this finds nothing worth telling.
MOST = 10.0

#: Coefficients of variation, from cycle to cycle, of a load that the device bounds and of one that Python does:
#: what is said where nothing has been measured yet.
TYPICAL = (0.005, 0.02)


def sight(study: StudyConfig, reference: StudyResult | None) -> list[str]:
    """Return what the regression gates of *study* will find, a line each.

    Args:
        study: What is compared, with its number of cycles.
        reference: With what; None where that is measured in turns with it.
    """
    gates, n = study.gates, study.n_cycles
    family = len(gates.family) * len(study.points)
    n_reference = n if reference is None else _cycles(reference)
    if min(n, n_reference) < 2:
        side = "here" if n < 2 else "in the reference"
        return [
            f"gates: one cycle {side} decides nothing: every comparison will be INCONCLUSIVE "
            "(execution.n_cycles, --llem-cycles)"
        ]
    told = []
    for metric, delta, cv in _spreads(study, reference):
        change = detectable(
            cv,
            n,
            n_reference,
            delta=delta,
            alpha=gates.alpha,
            power=POWER,
            family=family,
            paired=reference is None,
        )
        size = "nothing" if change is None or change > MOST else f"{change:.1%}"
        told.append(f"{size}{metric} where cycles vary by {cv:.1%}")
    cycles = f"{n} cycles in turns" if reference is None else f"{n} cycles against {n_reference}"
    how = f"power {POWER:.0%}, α {gates.alpha:g}, Holm over {family}"
    return [f"gates: {cycles} find a change of ({how}):", *(f"  {one}" for one in told)]


def _spreads(study: StudyConfig, reference: StudyResult | None) -> Iterator[tuple[str, float, float]]:
    """Yield a metric's name, the change of it that does not count, and how far cycles vary; the widest point's."""
    gates = study.gates
    known = {
        metric: [cv for point in reference.points if (cv := point.metrics[metric].cv) is not None]
        for metric in gates.family
        if reference is not None and all(metric in point.metrics for point in reference.points)
    }
    if not any(known.values()):
        delta = min(map(gates.delta_of, gates.family))
        yield from (("", delta, cv) for cv in TYPICAL)
        return
    for metric, found in known.items():
        if found:
            yield f" of {metric}", gates.delta_of(metric), max(found)


def _cycles(reference: StudyResult) -> int:
    return int(statistics.median(len(point.cycles) for point in reference.points)) if reference.points else 0
