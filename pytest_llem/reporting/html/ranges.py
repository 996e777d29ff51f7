"""Choose the range of a plot's axis, so that wide intervals do not squeeze the means together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pytest_llem.results.statistics import Summary

#: The axis is logarithmic where values differ by more than this factor.
FAR_APART = 20

#: Up to so many decades, labels between the powers of ten fit.
_MAX_LABELLED_DECADES = 3.5

#: How far beyond the means the axis extends for intervals at most, as a share of the means' span.
_MAX_EXTENSION = 0.35


@dataclass(frozen=True)
class Range:
    """The range of an axis.

    Attributes:
        type: ``linear`` or ``log``.
        edges: Both ends, in plotly's form: logarithms to base 10 if the type is ``log``.
        cut: Whether any interval extends beyond the edges.
    """

    type: str
    edges: list[float]
    cut: bool

    def axis(self, title: str) -> dict[str, object]:
        """Return plotly's layout of the axis."""
        found: dict[str, object] = {"type": self.type, "range": self.edges, "title": {"text": title}}
        if self.type == "log":
            # D2 labels 1, 2 and 5 in each decade; 1 labels powers of ten only.
            found["dtick"] = "D2" if self.edges[1] - self.edges[0] < _MAX_LABELLED_DECADES else 1
            found["tickformat"] = ",.6~g"  # without a format, plotly labels 20 as 2
        return found


def range_of(summaries: Sequence[Summary]) -> Range:
    """Return the axis range for the means, of which there must be at least one, and their intervals."""
    means = [summary.mean for summary in summaries if summary.mean is not None]
    ends = [end for summary in summaries if summary.ci95 for end in summary.ci95]
    log = min(means) > 0 and max(means) > FAR_APART * min(means)
    if log:
        means = [math.log10(mean) for mean in means]
        ends = [math.log10(end) if end > 0 else -math.inf for end in ends]
    low, high = min(means), max(means)
    extension = _MAX_EXTENSION * ((high - low) or abs(high) or 1)
    bottom, top = max(low - extension, min([low, *ends])), min(high + extension, max([high, *ends]))
    margin = 0.06 * ((top - bottom) or abs(high) or 1)
    bottom = bottom - margin if log or low < 0 else max(0.0, bottom - margin)
    edges = [float(f"{bottom:.5g}"), float(f"{top + margin:.5g}")]
    cut = any(end < edges[0] or end > edges[1] for end in ends)
    return Range("log" if log else "linear", edges, cut)


def bars(summaries: Sequence[Summary], axis: Range) -> dict[str, list[float | None]]:
    """Return plotly's error bars: how far each mean's interval extends above and below it, None if unknown."""
    halves = [_halves(summary, axis) for summary in summaries]
    return {"array": [above for above, _ in halves], "arrayminus": [below for _, below in halves]}


def _halves(summary: Summary, axis: Range) -> tuple[float | None, float | None]:
    if summary.mean is None or summary.ci95 is None:
        return None, None
    low, high = summary.ci95
    if axis.type == "log" and low <= 0:  # a log axis has no such value: end the bar far below the plot
        low = summary.mean * 1e-9
    return float(f"{high - summary.mean:.6g}"), float(f"{summary.mean - low:.9g}")
