"""The log ratio of two interleaved cycles, from the values of their turns.

Turn k of the candidate and turn k of the reference are next to each other in time. Either side is first in half
of these pairs (A B B A B A A B), so that a linear drift raises as many log ratios as it lowers. A pair of cycles
counts as one observation, however many turns it has: turns share the two processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from pytest_llem.gates.decisions import UndecidableError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pytest_llem.gates.ttests import Array

    #: Values of a metric by turn; None where a turn has no value.
    Values = Sequence[float | None]

#: Log ratios further than this from their median are left out. In standard deviations, estimated from the median
#: absolute deviation.
MAX_DISTANCE = 3.0

#: Median absolute deviation × this is the standard deviation of normal values.
_MAD_TO_SD = 1.4826

#: Leaving out far values takes a share of the variance of n normal values and makes their mean less efficient:
#: together a factor of 1 + this / √n, by simulation of 4 to 40 turns.
_VARIANCE_FACTOR = 0.9


def pair_log_ratio(candidate: Values, reference: Values) -> float:
    """Return ln(candidate / reference) of two interleaved cycles, from a metric's values by turn.

    It is the mean of the log ratios of neighbouring turns, without those that are far from their median because
    something else ran in one of the two. ``tests/benchmarks/turns.py`` compares it with other locations.

    Args:
        candidate: Values of the candidate's turns, in order.
        reference: Values of the reference's turns, in order.

    Raises:
        UndecidableError: The numbers of turns differ, there are no turns, or a value is missing or not above 0.

    Example:
        >>> round(pair_log_ratio([1.1, 1.1, 2.9, 1.1], [1.0, 1.0, 1.0, 1.0]), 4)
        0.0953
    """
    return float(location(_log_ratios(candidate, reference)))


def turn_spread(candidate: Values, reference: Values) -> float:
    """Return the standard deviation of the log ratios of neighbouring turns, apart from those that are left out.

    Divided by the square root of the number of turns, it is the standard error of :func:`pair_log_ratio` as far as
    that is due to turns.

    Args:
        candidate: Values of the candidate's turns, in order.
        reference: Values of the reference's turns, in order.

    Raises:
        UndecidableError: As :func:`pair_log_ratio`, or there are fewer than two turns.
    """
    import numpy as np

    ratios = _log_ratios(candidate, reference)
    if len(ratios) < 2:
        raise UndecidableError("needs at least 2 turns on either side (1 given)")
    variance = np.var(ratios[is_near(ratios)], ddof=1)
    return float(np.sqrt(variance * (1 + _VARIANCE_FACTOR / math.sqrt(len(ratios)))))


def process_share(pairs: Iterable[tuple[Values, Values]]) -> float:
    """Return the share of the variance between pairs of cycles that their turns do not explain, 0 to 1.

    Interleaving cannot reduce it, nor do more turns: it is the difference from process to process, such as the
    layout of memory. Only more cycles help against it. A drift within cycles makes the share too small.

    Args:
        pairs: Values by turn of candidate and reference, of two or more pairs of cycles.

    Raises:
        UndecidableError: As :func:`turn_spread`, or there are fewer than two pairs.

    Example:
        >>> process_share([([1.0, 1.01], [1.01, 1.0]), ([1.2, 1.21], [1.01, 1.0])]) > 0.9
        True
    """
    import numpy as np

    known = list(pairs)
    if len(known) < 2:
        raise UndecidableError(f"needs at least 2 pairs of cycles ({len(known)} given)")
    between = float(np.var([pair_log_ratio(*pair) for pair in known], ddof=1))
    of_turns = sum(turn_spread(*pair) ** 2 / len(pair[0]) for pair in known) / len(known)
    return max(0.0, 1 - of_turns / between) if between > 0 else 0.0


def location(log_ratios: Array) -> Array:
    """Return the mean over the last axis, of the values near the median."""
    import numpy as np

    near = is_near(log_ratios)
    return np.asarray(np.sum(np.where(near, log_ratios, 0.0), axis=-1) / near.sum(axis=-1))


def is_near(log_ratios: Array) -> NDArray[np.bool_]:
    """Return whether each value is near the median over the last axis."""
    import numpy as np

    distance = np.abs(log_ratios - np.median(log_ratios, axis=-1, keepdims=True))
    return np.asarray(distance <= MAX_DISTANCE * _MAD_TO_SD * np.median(distance, axis=-1, keepdims=True))


def _log_ratios(candidate: Values, reference: Values) -> Array:
    import numpy as np

    if len(candidate) != len(reference):
        raise UndecidableError(f"{len(candidate)} turns in the candidate, {len(reference)} in the reference")
    if not candidate:
        raise UndecidableError("no turns in the candidate and in the reference")
    return np.subtract(_logs(candidate, ""), _logs(reference, " of the reference"))


def _logs(values: Values, side: str) -> list[float]:
    logs = []
    for turn, value in enumerate(values, start=1):
        if value is None:
            raise UndecidableError(f"turn {turn}{side} has no value")
        if not (math.isfinite(value) and value > 0):
            raise UndecidableError(f"turn {turn}{side} is {value:g}, and ratios need values above 0")
        logs.append(math.log(value))
    return logs
