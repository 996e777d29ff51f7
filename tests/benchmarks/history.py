"""Simulate the changes that ``llem history`` marks: false alarms, and what is found.

    python tests/benchmarks/history.py [--families 1000] [--series 300]

The random numbers are seeded, so every run prints the same tables, in Markdown. Alpha is 1 %. A family has 12
series of 200 runs, which differ by 1 % from run to run. A rate is above alpha if its lower confidence bound of
99 % (Clopper and Pearson) is; the exit status is 1 if that happens to noise for which the rule promises alpha.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[2]))

from pytest_llem.gates.series import Change, Series, find_changes

ALPHA, FAMILY, RUNS, SD = 0.01, 12, 200, 0.01

Logs = Any
Noise = Callable[[np.random.Generator, int], Logs]


def normal(random: np.random.Generator, n: int) -> Logs:
    return SD * random.standard_normal(n)


def heavy(random: np.random.Generator, n: int) -> Logs:
    return SD * random.standard_t(3, n) / np.sqrt(3)


def outliers(random: np.random.Generator, n: int) -> Logs:
    """Make 3 % of the runs 1.1 to 1.5 times as long."""
    return normal(random, n) + np.where(random.random(n) < 0.03, np.log(random.uniform(1.1, 1.5, n)), 0.0)


def noisier(random: np.random.Generator, n: int) -> Logs:
    """Make the second half of the runs differ four times as much."""
    return normal(random, n) * np.where(np.arange(n) < n // 2, 1.0, 4.0)


def correlated(by: float) -> Noise:
    """Return noise in which each run is correlated with the one before."""

    def noise(random: np.random.Generator, n: int) -> Logs:
        found = random.standard_normal(n)
        for at in range(1, n):
            found[at] = by * found[at - 1] + np.sqrt(1 - by**2) * found[at]
        return SD * found

    return noise


#: Noise, and whether the rule promises alpha for it at any delta.
NOISES: dict[str, tuple[Noise, bool]] = {
    "independent, normal": (normal, True),
    "Student's t, 3 degrees of freedom": (heavy, False),
    "3 % of runs 1.1 to 1.5 × as long": (outliers, False),
    "4 × as much noise from the middle on": (noisier, False),
    "correlated by 0.3 from run to run": (correlated(0.3), False),
    "correlated by 0.6 from run to run": (correlated(0.6), False),
}

SAME_CODE = np.zeros(RUNS, dtype=bool)


def changes(logs: Logs, delta: float, alpha: float) -> list[Change]:
    """Return the changes of one series that has *alpha* for itself."""
    (found,) = find_changes([Series(logs, np.log1p(delta), SAME_CODE[: len(logs)])], alpha)
    return found


def false_alarms(families: int) -> bool:
    """Print how many families without a change have one marked, and return whether a promise was broken."""
    broken = False
    print("| noise of runs | delta 0: rise · fall | delta 2 %: rise · fall |\n|---|---|---|")
    for name, (noise, promised) in NOISES.items():
        cells = []
        for delta in (0.0, 0.02):
            random = np.random.default_rng(20261129)
            counts = {True: 0, False: 0}
            for _ in range(families):
                family = [Series(noise(random, RUNS), np.log1p(delta), SAME_CODE) for _ in range(FAMILY)]
                marked = {one.ratio > 1 for found in find_changes(family, ALPHA) for one in found}
                for rise in marked:
                    counts[rise] += 1
            cells.append(" · ".join(f"{counts[rise] / families:.1%}" for rise in (True, False)))
            worst = max(counts.values())
            lower = float(stats.beta.ppf(0.01, worst, families - worst + 1)) if worst else 0.0
            broken |= promised and lower > ALPHA
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return broken


def steps(series: int) -> None:
    """Print after how many runs a step is found, and where, in series with 60 runs before it."""
    before, reads = 60, (3, 4, 5, 6, 8, 10, 13, 16, 21, 26, 34, 50, 70, 100)
    print("\n| step beyond delta | found after 3 | 5 | 10 | 21 | 100 runs | median | at its run | within one |")
    print("|---|---|---|---|---|---|---|---|---|")
    for size in (1.0, 2.0, 3.0, 5.0, 8.0, 12.0):
        random = np.random.default_rng(20261130)
        after, places = [], []
        for _ in range(series):
            logs = normal(random, before + reads[-1])
            logs[before:] += size * SD + np.log1p(0.02)
            seen = next((m for m in reads if changes(logs[: before + m], 0.02, ALPHA / FAMILY)), None)
            after.append(np.inf if seen is None else seen)
            places += [one.first for one in changes(logs, 0.02, ALPHA / FAMILY)]
        shares = [f"{np.mean([one <= m for one in after]):.0%}" for m in (3, 5, 10, 21, 100)]
        at = [f"{np.mean([abs(one - before) <= off for one in places]):.0%}" if places else "–" for off in (0, 1)]
        print(f"| {size:g} sd | {' | '.join(shares)} | {np.median(after):g} | {' | '.join(at)} |", flush=True)


def drifts(series: int) -> None:
    """Print how drifts over all runs are marked."""
    print(
        "\n| drift over 200 runs | marked as a drift | as steps | not marked | mean size |\n|---|---|---|---|---|"
    )
    for total in (0.02, 0.05, 0.1, 0.2, 0.4):
        random = np.random.default_rng(20261201)
        found = [
            changes(normal(random, RUNS) + np.linspace(0, np.log1p(total), RUNS), 0.02, ALPHA / FAMILY)
            for _ in range(series)
        ]
        drift = [one for one in found if len(one) == 1 and one[0].is_drift]
        shares = len(drift), sum(bool(one) for one in found) - len(drift), sum(not one for one in found)
        mean = f"{np.mean([one[0].ratio for one in drift]) - 1:.1%}" if drift else "–"
        print(f"| {total:.0%} | {' | '.join(f'{one / series:.0%}' for one in shares)} | {mean} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", type=int, default=1000)
    parser.add_argument("--series", type=int, default=300)
    options = parser.parse_args()
    began = time.perf_counter()
    broken = false_alarms(options.families)
    steps(options.series)
    drifts(options.series)
    print(f"\n{time.perf_counter() - began:.0f} s")
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
