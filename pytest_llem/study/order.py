"""The order in which the experiments of a study run."""

from __future__ import annotations

import random

from pytest_llem.study.execution import CycleOrder


def run_order(n_points: int, n_cycles: int, order: CycleOrder, seed: int | str) -> list[tuple[int, int]]:
    """Return ``(point, cycle)`` pairs in run order; points count from 0, cycles from 1.

    Every order but ``sequential`` holds each point once per cycle, so that a machine that drifts over the
    study drifts under all points alike.
    """
    if order == "sequential":
        return [(point, cycle) for point in range(n_points) for cycle in range(1, n_cycles + 1)]
    pairs = []
    for cycle in range(1, n_cycles + 1):
        points = list(range(n_points))
        if order == "shuffled":
            random.Random(f"{seed}:{cycle}").shuffle(points)
        pairs += [(point, cycle) for point in points]
    return pairs
