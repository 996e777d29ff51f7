"""Simulate false alarms and power of regression gates.

    python tests/benchmarks/gates.py [--families 10000]

The random numbers are seeded, so every run prints the same tables, in Markdown. Each family has 12 gates: 3
metrics at 4 points. Alpha is 1 %. A rate is above alpha if it is so by more than three standard errors of the
simulation. A power is wrong if it is not 90 % ± 3. The exit status is 1 if anything is wrong.

The true change of A/A pairs is zero. Delta 0 is the hardest case: its rate equals that of a true change of exactly
delta, for any delta.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from pytest_llem.gates.power_analysis import detectable
from pytest_llem.gates.ttests import unpaired_estimate
from pytest_llem.study.gates import DEFAULT_DELTA
from tests.support.pairs import ALPHA, FAMILY, Noise, Rates, Simulation, found, grid, regressions

#: Standard deviation of a session, and how many of them ``llem aa`` is given.
SESSION, SESSIONS = 0.01, 5

#: Sizes of the family whose first step of Holm's procedure a change has to pass.
STEPS = (1, FAMILY, 50)


class Report:
    """Prints tables and keeps what is wrong in them."""

    def __init__(self) -> None:
        self.wrong: list[str] = []

    def table(self, title: str, *heads: str) -> None:
        print(f"\n{title}\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)

    def row(self, *cells: str) -> None:
        print(f"| {' | '.join(cells)} |", flush=True)

    def alarms(self, rates: Rates, where: str) -> str:
        self.wrong += [f"{where}: {what}" for what in rates.beyond(ALPHA)]
        return f"{rates.gate:.2%} · {rates.family:.2%}"


def false_alarms(report: Report, families: int) -> None:
    simulation = Simulation(families)
    deltas = (DEFAULT_DELTA, 0.0)
    heads = [f"{how}, δ = {delta:.0%}" for how in ("unpaired", "paired") for delta in deltas]
    report.table("False REGRESSION in A/A pairs, per gate · per family of 12", "CV", "n", *heads)
    for cv, n in grid():
        estimates = simulation.unpaired(Noise(cv), n), simulation.paired(Noise(cv), n)
        rates = [regressions(estimate, delta) for estimate in estimates for delta in deltas]
        where = [f"A/A, CV {cv}, n {n}, {head}" for head in heads]
        report.row(f"{cv:.1%}", str(n), *map(report.alarms, rates, where))


def unequal(report: Report, families: int) -> None:
    simulation = Simulation(families)
    report.table(
        "The same, unpaired, where the sides have different numbers of cycles (CV 2 %, δ = 0)",
        *("n", "n of the reference", "false REGRESSION"),
    )
    for n, n_reference in ((2, 10), (3, 5), (3, 10), (3, 20), (5, 10), (10, 3)):
        rates = regressions(simulation.unpaired(Noise(0.02), n, n_reference), 0.0)
        report.row(str(n), str(n_reference), report.alarms(rates, f"n {n}, reference {n_reference}"))


def other_noise(report: Report, families: int) -> None:
    """Show the rates under noise of other kinds than assumed. They are not checked."""
    simulation = Simulation(families)
    report.table(
        "The same, unpaired, where noise is not as a t-test has it (CV 2 %, δ = 0)",
        *("n", "one cycle in ten is 10 % slower", "the candidate is three times as noisy"),
    )
    noise = Noise(0.02)
    for n in (3, 5, 10):
        late = [simulation.side(noise, n, outliers=0.1) for _ in range(2)]
        uneven = simulation.side(Noise(3 * noise.cv), n), simulation.side(noise, n)
        rates = [regressions(unpaired_estimate(*sides), 0.0) for sides in (late, uneven)]
        report.row(str(n), *(f"{rate.gate:.2%} · {rate.family:.2%}" for rate in rates))


def sessions(report: Report, families: int) -> None:
    simulation = Simulation(families)
    report.table(
        f"The same with a session effect of {SESSION:.0%} (standard deviation)",
        *("CV", "n", f"unpaired, δ = 2 · σ = {2 * SESSION:.0%}", f"unpaired, δ by `llem aa` of {SESSIONS}"),
        *(f"median δ of `llem aa`, of {SESSIONS} · 10 · 20", f"paired, δ = {DEFAULT_DELTA:.0%}"),
    )
    for cv, n in grid():
        noise, where = Noise(cv, SESSION), f"session effect, CV {cv}, n {n}"
        estimate = simulation.unpaired(noise, n)
        plain = regressions(estimate, 2 * SESSION)  # shown, not checked
        deltas = simulation.deltas(noise, n, SESSIONS)
        few = Simulation(min(families, 300))
        medians = [np.median(deltas), *(np.median(few.deltas(noise, n, number)) for number in (10, 20))]
        report.row(
            *(f"{cv:.1%}", str(n), f"{plain.gate:.2%} · {plain.family:.2%}"),
            report.alarms(regressions(estimate, deltas), f"{where}, delta of llem aa"),
            " · ".join(f"{median:.1%}" for median in medians),
            report.alarms(regressions(simulation.paired(noise, n), DEFAULT_DELTA), f"{where}, paired"),
        )


def power(report: Report, families: int) -> None:
    simulation = Simulation(families)
    heads = [f"{how}, {step}" for how in ("unpaired", "paired") for step in ("one gate", "of 12", "of 50")]
    report.table(
        f"Change that a gate finds with a power of 90 % (δ = {DEFAULT_DELTA:.0%}): predicted, and share found",
        *("CV", "n", *heads),
    )
    for cv, n in grid():
        cells = []
        for paired, draw in ((False, simulation.unpaired), (True, simulation.paired)):
            estimate = draw(Noise(cv), n)
            for family in STEPS:
                change = detectable(cv, n, n, delta=DEFAULT_DELTA, alpha=ALPHA, family=family, paired=paired)
                if change is None:
                    cells.append("none")
                    continue
                share = found(estimate, change, DEFAULT_DELTA, ALPHA / family)
                cells.append(f"{change:.1%} ({share:.1%})")
                if abs(share - 0.9) > 0.03:
                    report.wrong.append(f"power, CV {cv}, n {n}, paired {paired}, of {family}: {share:.1%}")
        report.row(f"{cv:.1%}", str(n), *cells)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", type=int, default=10_000, help="simulated in each row")
    options = parser.parse_args()
    begun = time.perf_counter()
    report = Report()
    for part in (false_alarms, unequal, other_noise, sessions, power):
        part(report, options.families)
    print(f"\n{options.families} families a row, {time.perf_counter() - begun:.0f} s")
    for what in report.wrong:
        print(f"WRONG: {what}")
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
