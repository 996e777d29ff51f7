"""How far an axis goes: as far as its values, and no further than is legible with wide intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pytest_llem.results.statistics import Summary

#: The axis is logarithmic where values differ by more than this factor.
FAR_APART = 20

#: So many decades have room for labels between the powers of ten.
_DECADES = 3.5

#: How far beyond the means an interval is followed, as a share of their span.
_BEYOND = 0.35


@dataclass(frozen=True)
class Range:
    """An axis.

    Attributes:
        type: ``linear`` or ``log``.
        edges: As plotly wants them: logarithms where it is logarithmic.
        cut: Whether any interval goes further.
    """

    type: str
    edges: list[float]
    cut: bool

    def axis(self, title: str) -> dict[str, object]:
        found: dict[str, object] = {"type": self.type, "range": self.edges, "title": {"text": title}}
        if self.type == "log":  # 1, 2, 5, or powers of ten alone
            found["dtick"] = "D2" if self.edges[1] - self.edges[0] < _DECADES else 1
            found["tickformat"] = ",.6~g"  # or a 20 would be labelled 2
        return found


def range_of(summaries: Sequence[Summary]) -> Range:
    """Return the axis of some means, of which there is at least one, and their intervals."""
    means = [summary.mean for summary in summaries if summary.mean is not None]
    ends = [end for summary in summaries if summary.ci95 for end in summary.ci95]
    log = min(means) > 0 and max(means) > FAR_APART * min(means)
    if log:
        means = [math.log10(mean) for mean in means]
        ends = [math.log10(end) if end > 0 else -math.inf for end in ends]
    low, high = min(means), max(means)
    far = _BEYOND * ((high - low) or abs(high) or 1)
    reach = max(low - far, min([low, *ends])), min(high + far, max([high, *ends]))
    margin = 0.06 * ((reach[1] - reach[0]) or abs(high) or 1)
    least = reach[0] - margin if log or low < 0 else max(0.0, reach[0] - margin)
    edges = [float(f"{least:.5g}"), float(f"{reach[1] + margin:.5g}")]
    cut = any(end < edges[0] or end > edges[1] for end in ends)
    return Range("log" if log else "linear", edges, cut)


def bars(summaries: Sequence[Summary], axis: Range) -> dict[str, list[float | None]]:
    """Return how far the interval of each mean goes above and below it; None where there is none."""
    halves = [_halves(summary, axis) for summary in summaries]
    return {"array": [above for above, _ in halves], "arrayminus": [below for _, below in halves]}


def _halves(summary: Summary, axis: Range) -> tuple[float | None, float | None]:
    if summary.mean is None or summary.ci95 is None:
        return None, None
    low, high = summary.ci95
    if axis.type == "log" and low <= 0:  # it has no such place: far below what is shown
        low = summary.mean * 1e-9
    return float(f"{high - summary.mean:.6g}"), float(f"{summary.mean - low:.9g}")
