"""Compare estimates of the log ratio of two interleaved cycles, from their turns.

    python tests/benchmarks/turns.py [--cycles 20000]

The random numbers are seeded, so every run prints the same tables, in Markdown. The true log ratio is 0. Turns are
in the order A B B A A B B A …; a cell is the efficiency of an estimate: the smallest root mean square error of all
estimates in that row ÷ its own. The last table has the error that drift leaves, which is not random.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from pytest_llem.gates.pair_log_ratio import location

Logs = Any

#: Turns of each side.
TURNS = (4, 8, 16, 40)


def trimmed(ratios: Logs, share: float = 0.25) -> Logs:
    cut = int(share * ratios.shape[-1])
    return np.sort(ratios, axis=-1)[:, cut : ratios.shape[-1] - cut].mean(axis=-1)


def hodges_lehmann(ratios: Logs) -> Logs:
    one, other = np.triu_indices(ratios.shape[-1])
    return np.median((ratios[:, one] + ratios[:, other]) / 2, axis=-1)


ESTIMATES: dict[str, Callable[[Logs], Logs]] = {
    "mean": lambda ratios: ratios.mean(axis=-1),
    "median": lambda ratios: np.median(ratios, axis=-1),
    "Hodges–Lehmann": hodges_lehmann,
    "trimmed mean, 25 %": trimmed,
    "mean within 3 MAD": location,
}


class Machine:
    """Draws the logarithm of the time of each of *slots* consecutive turns, for *cycles* cycles."""

    def __init__(self, cycles: int, seed: int = 20261129) -> None:
        self.cycles, self.random = cycles, np.random.default_rng(seed)

    def white(self, slots: int, sd: float = 0.02) -> Logs:
        return sd * self.random.standard_normal((self.cycles, slots))

    def heavy_tailed(self, slots: int) -> Logs:
        return 0.02 * self.random.standard_t(3, (self.cycles, slots))

    def autocorrelated(self, slots: int, correlation: float = 0.9, sd: float = 0.05) -> Logs:
        found = self.white(slots, 1.0)
        for slot in range(1, slots):
            found[:, slot] = correlation * found[:, slot - 1] + np.sqrt(1 - correlation**2) * found[:, slot]
        return sd * found + self.white(slots, 0.01)

    def bursts(self, slots: int, begin: float = 0.1, turns: float = 1.0) -> Logs:
        """Add bursts that make *turns* turns on average 1.5 to 3 times as long."""
        found, burst = self.white(slots), np.zeros(self.cycles)
        for slot in range(slots):
            goes_on = (burst > 0) & (self.random.random(self.cycles) >= 1 / turns)
            begins = ~goes_on & (self.random.random(self.cycles) < begin)
            size = np.log(self.random.uniform(1.5, 3.0, self.cycles))
            burst = np.where(goes_on, burst, np.where(begins, size, 0.0))
            found[:, slot] += burst
        return found

    def drift(self, slots: int, power: int, total: float = 0.2) -> Logs:
        return self.white(slots) + total * np.linspace(0, 1, slots) ** power

    def step(self, slots: int) -> Logs:
        return self.white(slots) + 0.2 * (np.linspace(0, 1, slots) > self.random.random((self.cycles, 1)))


NOISE: dict[str, Callable[[Machine, int], Logs]] = {
    "white, 2 %": Machine.white,
    "Student's t, 3 degrees": Machine.heavy_tailed,
    "AR(1), 0.9 per turn": Machine.autocorrelated,
    "AR(1), 0.5 per turn": lambda machine, slots: machine.autocorrelated(slots, 0.5),
    "bursts of a turn, 10 %": Machine.bursts,
    "bursts of 3 turns, 5 %": lambda machine, slots: machine.bursts(slots, 0.05, 3.0),
    "bursts of 1.5 turns, 3 %": lambda machine, slots: machine.bursts(slots, 0.03, 1.5),
    "linear drift of 20 %": lambda machine, slots: machine.drift(slots, 1),
    "quadratic drift of 20 %": lambda machine, slots: machine.drift(slots, 2),
    "one step of 20 %": Machine.step,
}


def paired(logs: Logs) -> Logs:
    """Return the log ratios of neighbouring turns, whose order is A B, B A, A B, …"""
    ratios = logs[:, 0::2] - logs[:, 1::2]
    ratios[:, 1::2] *= -1
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=20_000, help="simulated in each row")
    machine = Machine(parser.parse_args().cycles)
    efficiency: dict[str, list[list[float]]] = {}
    drift: list[str] = []
    print(f"| noise | turns | error of the best | {' | '.join(ESTIMATES)} |\n|{'---|' * (3 + len(ESTIMATES))}")
    for noise, draw in NOISE.items():
        for turns in TURNS:
            ratios = paired(draw(machine, 2 * turns))
            found = [estimate(ratios) for estimate in ESTIMATES.values()]
            errors = [float(np.sqrt(np.mean(one**2))) for one in found]
            row = [min(errors) / error for error in errors]
            efficiency.setdefault(noise, []).append(row)
            print(f"| {noise} | {turns} | {min(errors):.2%} | {' | '.join(f'{cell:.2f}' for cell in row)} |")
            if "drift" in noise:
                drift.append(f"| {noise} | {turns} | {' | '.join(f'{one.mean():.2%}' for one in found)} |")
    print(f"\nWorst over {TURNS} turns\n\n| noise | {' | '.join(ESTIMATES)} |\n|{'---|' * (1 + len(ESTIMATES))}")
    for noise, rows in efficiency.items():
        print(f"| {noise} | {' | '.join(f'{cell:.2f}' for cell in np.min(rows, axis=0))} |")
    everything = np.array([row for rows in efficiency.values() for row in rows])
    print(f"| geometric mean | {' | '.join(f'{cell:.2f}' for cell in np.exp(np.log(everything).mean(axis=0)))} |")
    print(f"\nMean error\n\n| drift | turns | {' | '.join(ESTIMATES)} |\n|{'---|' * (2 + len(ESTIMATES))}")
    print("\n".join(drift))


if __name__ == "__main__":
    main()
