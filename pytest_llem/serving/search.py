"""Search for the largest load within the SLO by bisection."""

from __future__ import annotations

import math

from pytest_llem.study.load import SearchConfig


def next_load(search: SearchConfig, within: float | None, beyond: float | None, *, is_whole: bool) -> float | None:
    """Return the next load to try; None if the search has ended.

    The load is doubled from the lowest until one is not within the SLO; then the interval is halved.

    Args:
        search: Limits and precision.
        within: Largest load so far that is within the SLO; None if there is none.
        beyond: Smallest load so far that is not; None if there is none.
        is_whole: Whether loads are whole numbers.

    Example:
        >>> next_load(SearchConfig(low=1, high=256), within=8, beyond=16, is_whole=True)
        12.0
    """
    if within is None:
        return search.low if beyond is None else None
    if beyond is None:
        return min(2 * within, search.high) if within < search.high else None
    if beyond - within <= max(search.precision * within, 1.0 if is_whole else 0.0):
        return None
    middle = (within + beyond) / 2
    return float(int(middle)) if is_whole else middle


def max_probes(search: SearchConfig) -> int:
    """Return the number of loads that a search tries at most.

    Example:
        >>> max_probes(SearchConfig(low=1, high=256, precision=0.05))
        14
    """
    doubled = math.ceil(math.log2(search.high / search.low)) + 1
    return doubled + math.ceil(math.log2(1 / search.precision))
