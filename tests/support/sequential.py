"""Simulate families of gates whose cycles run until they are decided."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pytest_llem.gates.sequential import Schedule
from pytest_llem.gates.ttests import judge_looks, paired_estimate

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Run:
    """What was found in families × gates.

    Attributes:
        worse: Whether a gate found a change for the worse.
        better: Whether it found a change for the better.
        same: Whether it found no change.
        cycles: Number of pairs of cycles that its point took.
    """

    worse: Flags
    better: Flags
    same: Flags
    cycles: NDArray[np.int_]


def until_decided(log_ratios: Array, schedule: Schedule, *, delta: float, alpha: float, metrics: int = 3) -> Run:
    """Run the cycles of each point until all of its gates are decided, given the Holm levels of that moment.

    Args:
        log_ratios: Log ratios of families × gates × pairs, as many as the schedule's maximum. Neighbouring gates
            are the *metrics* of one point.
        schedule: When gates are judged.
        delta: Relative change that does not count.
        alpha: Probability of a false alarm.
        metrics: Number of metrics of a point.
    """
    families, gates, _ = log_ratios.shape
    runs_on = np.ones((families, gates), dtype=bool)
    cycles = np.zeros((families, gates), dtype=int)
    looks: list[tuple[Array, ...]] = []
    for size in schedule.sizes:
        estimate = paired_estimate(log_ratios[..., :size])
        # A point that has stopped repeats its last look.
        looks.append(
            tuple(
                np.where(runs_on, new, old) for new, old in zip(estimate, (looks or [estimate])[-1], strict=True)
            )
        )
        cycles[runs_on] = size
        change, error, degrees = (np.stack(one) for one in zip(*looks, strict=True))
        judged = judge_looks(change, error, degrees, math.log1p(delta), alpha, shares=schedule.share)
        is_decided = judged.worse | judged.better | judged.same
        by_point = is_decided.reshape(families, -1, metrics).all(axis=-1)
        runs_on &= ~np.repeat(by_point, metrics, axis=-1)
    return Run(judged.worse, judged.better, judged.same & ~judged.worse & ~judged.better, cycles)
