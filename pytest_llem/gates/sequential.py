"""When to judge gates whose cycles run until they are decided, without more false alarms from several looks.

Gates are judged after some numbers of cycles, which are fixed before the first one. Each look spends an equal
share of the gate's level, so that the probability of a false verdict at any of them is at most the level,
whatever the looks have in common (Bonferroni). This holds for each level, and therefore for those of Holm's
procedure over gates that stopped after different numbers of cycles. Each look is after about a quarter more cycles
than the one before: fewer looks would leave larger shares, and more would find a clear result earlier.

``tests/benchmarks/sequential.py`` compares this rule with others, and simulates its false alarms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from pytest_llem.gates.decisions import Look, UndecidableError, contrast, paired_contrast
from pytest_llem.results.statistics import STOPPED_CONFIDENCE, mean_interval

#: Factor between the numbers of cycles of neighbouring looks.
_GROWTH = 1.25


@dataclass(frozen=True)
class Schedule:
    """The numbers of cycles after which gates are judged.

    Attributes:
        min_cycles: The first of them, 2 or more.
        max_cycles: The last of them.

    Example:
        >>> Schedule(4, 20).sizes
        (4, 5, 6, 8, 10, 12, 15, 19, 20)
    """

    min_cycles: int
    max_cycles: int

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The numbers of cycles, ascending."""
        return tuple(self._sizes())

    def _sizes(self) -> Iterator[int]:
        size = self.min_cycles
        while size < self.max_cycles:
            yield size
            size = max(size + 1, round(_GROWTH * size))
        yield self.max_cycles

    @property
    def share(self) -> float:
        """Part of a gate's level that is spent on each look."""
        return 1 / len(self.sizes)


def paired_looks(log_ratios: Sequence[float], schedule: Schedule) -> tuple[Look, ...]:
    """Return the looks at interleaved cycles so far, for :class:`~pytest_llem.gates.decisions.Question`.

    Args:
        log_ratios: ln(candidate / reference) of each pair of cycles, in the order of measurement.
        schedule: When gates are judged, fixed before the first cycle.

    Raises:
        UndecidableError: There are fewer pairs than at the first look.

    Example:
        >>> looks = paired_looks([0.01, 0.02, 0.01, 0.03, 0.02], Schedule(4, 8))
        >>> [look.contrast.n for look in looks]
        [4, 5]
    """
    sizes = _reached(len(log_ratios), schedule)
    return tuple(Look(paired_contrast(log_ratios[:size]), schedule.share) for size in sizes)


def unpaired_looks(candidate: Sequence[float], reference: Sequence[float], schedule: Schedule) -> tuple[Look, ...]:
    """Return the looks at a candidate's cycles so far, compared with all cycles of a saved reference.

    Args:
        candidate: Values of the candidate's cycles, in the order of measurement.
        reference: Values of the reference's cycles.
        schedule: When gates are judged, fixed before the first cycle.

    Raises:
        UndecidableError: There are fewer cycles than at the first look or fewer than two in the reference, or a
            value is not above 0.
    """
    values, reference_values = (dict(enumerate(side, start=1)) for side in (candidate, reference))
    sizes = _reached(len(candidate), schedule)
    return tuple(
        Look(
            contrast({cycle: values[cycle] for cycle in range(1, size + 1)}, reference_values, paired=False),
            schedule.share,
        )
        for size in sizes
    )


def _reached(cycles: int, schedule: Schedule) -> list[int]:
    sizes = [size for size in schedule.sizes if size <= cycles]
    if not sizes:
        raise UndecidableError(f"needs at least {schedule.min_cycles} cycles ({cycles} so far)")
    return sizes


def is_precise(values: Sequence[float], relative_half_width: float) -> bool:
    """Return whether the mean of *values* is known to *relative_half_width*, so that no more cycles are needed.

    It may be asked after each cycle: of the interval's nominal confidence of 98 %, about 95 % are left then.

    Args:
        values: Values of the cycles so far.
        relative_half_width: Largest half-width of the mean's interval that is precise enough, as a part of the
            mean's absolute value; above 0.

    Example:
        >>> is_precise([1.0, 1.01, 0.99, 1.0], 0.05)
        True
    """
    mean, _, interval = mean_interval(values, STOPPED_CONFIDENCE)
    return interval is not None and interval[1] - mean <= relative_half_width * abs(mean)
