"""Simulate gates whose cycles run until they are decided, and compare rules for that.

    python tests/benchmarks/sequential.py [--families 10000]

The random numbers are seeded, so every run prints the same tables, in Markdown. Alpha is 1 % and delta 2 %. A
family has 12 gates: 3 metrics at 4 points; a point runs cycles until its three gates are decided, 4 to 40. A cycle
has 8 turns of each side, and its log ratio is that of ``pytest_llem.gates.pair_log_ratio``. A rate is above alpha
if its lower confidence bound of 99 % (Clopper and Pearson) is. The exit status is 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from scipy.special import stdtr

sys.path.insert(0, str(Path(__file__).parents[2]))

from pytest_llem.gates.pair_log_ratio import location
from pytest_llem.gates.power_analysis import cycles_needed
from pytest_llem.gates.sequential import Schedule
from pytest_llem.gates.ttests import p_beyond, welch
from pytest_llem.results.statistics import STOPPED_CONFIDENCE
from pytest_llem.study.gates import DEFAULT_DELTA as DELTA
from tests.support.pairs import ALPHA, FAMILY, METRICS
from tests.support.sequential import Run, until_decided

SCHEDULE = Schedule(4, 40)
TURNS = 8

#: Coefficients of variation of the cycles of baselines.
BASELINE_CVS = (0.01, 0.02, 0.03, 0.04)

#: Families in memory at the same time.
CHUNK = 250

#: Standard deviation of the logarithm of a turn's time, and of the difference from process to process.
TURN, PROCESS = 0.02, 0.01

Logs = Any


@dataclass
class Machine:
    """Draws logarithms of the times of turns: families × gates × turns of both sides, in the order A B B A."""

    random: np.random.Generator

    def white(self, shape: tuple[int, int, int]) -> Logs:
        return TURN * self.random.standard_normal(shape)

    def autocorrelated(self, shape: tuple[int, int, int], correlation: float = 0.95, sd: float = 0.1) -> Logs:
        """Add noise that goes on through all cycles: half of it is left after 13 turns."""
        found = self.random.standard_normal(shape)
        for slot in range(1, shape[-1]):
            found[..., slot] = (
                correlation * found[..., slot - 1] + math.sqrt(1 - correlation**2) * found[..., slot]
            )
        return sd * found + self.white(shape)

    def bursts(self, shape: tuple[int, int, int]) -> Logs:
        """Make 5 % of the turns, and half of those that follow a slow one, 1.5 to 3 times as long."""
        begins = self.random.random(shape) < 0.05
        size = np.log(self.random.uniform(1.5, 3.0, shape))
        found = np.where(begins, size, 0.0)
        goes_on = self.random.random(shape) < 0.5
        for slot in range(1, shape[-1]):
            found[..., slot] = np.maximum(found[..., slot], goes_on[..., slot] * found[..., slot - 1])
        return found + self.white(shape)

    def drift(self, shape: tuple[int, int, int]) -> Logs:
        """Let each cycle begin 10 % slower, and the machine become 30 % slower over all cycles."""
        slots = np.arange(shape[-1])
        warming = 0.1 * np.exp(-(slots % (2 * TURNS)) / 4)
        return self.white(shape) + 0.3 * slots / shape[-1] + warming

    def log_ratios(self, noise: Callable[[Machine, tuple[int, int, int]], Logs], correlation: float = 0.0) -> Logs:
        """Return the log ratios of pairs of cycles, families × gates × pairs, whose true value is 0.

        The difference of two processes may depend on that of the pair before, by *correlation*.
        """
        cycles = SCHEDULE.max_cycles
        slots = noise(self, (CHUNK, FAMILY, 2 * TURNS * cycles)).reshape(CHUNK, FAMILY, cycles, TURNS, 2)
        ratios = slots[..., 0] - slots[..., 1]
        ratios[..., 1::2] *= -1
        ratios[..., 1::2, :] *= -1  # the side that has the first turn alternates from cycle to cycle
        processes = self.random.standard_normal((CHUNK, FAMILY, cycles))
        for cycle in range(1, cycles):
            processes[..., cycle] = (
                correlation * processes[..., cycle - 1] + math.sqrt(1 - correlation**2) * processes[..., cycle]
            )
        return location(ratios) + math.sqrt(2) * PROCESS * processes


NOISE: dict[str, tuple[Callable[[Machine, tuple[int, int, int]], Logs], float]] = {
    "white": (Machine.white, 0.0),
    "autocorrelated from turn to turn": (Machine.autocorrelated, 0.0),
    "bursts": (Machine.bursts, 0.0),
    "drift": (Machine.drift, 0.0),
}

#: Shown and not checked: a t-test needs independent pairs.
DEPENDENT = {"differences of processes correlated by 0.3": (Machine.white, 0.3)}


class Report:
    """Prints tables and keeps what is wrong in them."""

    def __init__(self) -> None:
        self.wrong: list[str] = []

    def table(self, title: str, *heads: str) -> None:
        print(f"\n{title}\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)

    def row(self, *cells: str) -> None:
        print(f"| {' | '.join(cells)} |", flush=True)

    def rate(self, found: np.ndarray, where: str, level: float = ALPHA) -> str:
        count = int(found.sum())
        lower = float(stats.beta.ppf(0.01, count, found.size - count + 1)) if count else 0.0
        if lower > level:
            self.wrong.append(f"{where}: {found.mean():.2%}, at least {lower:.2%}")
        return f"{found.mean():.2%}"


def false_alarms(report: Report, families: int) -> None:
    report.table(
        f"False verdicts, per gate · per family of {FAMILY}, and mean number of pairs",
        *("noise", "REGRESSION, ratio 1", f"REGRESSION, ratio {1 + DELTA}", f"SAME of a gate, ratio {1 + DELTA}"),
        *("right SAME, ratio 1", "pairs, ratio 1"),
    )
    for noise, (draw, correlation) in {**NOISE, **DEPENDENT}.items():
        checked = report if noise in NOISE else Report()
        unchanged, at_delta = Verdicts(), Verdicts()
        machine = Machine(np.random.default_rng(20261129))
        for _ in range(max(1, families // CHUNK)):
            log_ratios = machine.log_ratios(draw, correlation)
            unchanged.add(log_ratios)
            at_delta.add(log_ratios + math.log1p(DELTA))
        report.row(
            noise,
            unchanged.rates("worse", checked, f"{noise}, ratio 1"),
            at_delta.rates("worse", checked, f"{noise}, ratio at delta"),
            checked.rate(np.concatenate([run.same for run in at_delta.alone]), f"{noise}, SAME"),
            f"{np.mean([run.same.mean() for run in unchanged.alone]):.1%}",
            f"{np.mean([run.cycles.mean() for run in unchanged.alone]):.1f}",
        )


@dataclass
class Verdicts:
    """Verdicts on gates judged alone, and on families of them."""

    alone: list[Run] = field(default_factory=list)
    of_family: list[Run] = field(default_factory=list)

    def add(self, log_ratios: Logs) -> None:
        one = log_ratios.reshape(-1, 1, SCHEDULE.max_cycles)
        self.alone.append(until_decided(one, SCHEDULE, delta=DELTA, alpha=ALPHA, metrics=1))
        self.of_family.append(until_decided(log_ratios, SCHEDULE, delta=DELTA, alpha=ALPHA, metrics=METRICS))

    def rates(self, verdict: str, report: Report, where: str) -> str:
        """Return the share of gates with a verdict, and of families with any."""
        gates, families = (
            np.concatenate([getattr(run, verdict) for run in runs]) for runs in (self.alone, self.of_family)
        )
        of_families = np.asarray(families.any(axis=-1))
        return f"{report.rate(gates, where)} · {report.rate(of_families, f'{where}, family')}"


def rules(report: Report, paths: int) -> None:
    """Compare rules by the mean number of pairs until a change is found, ÷ the number fixed in advance."""
    distances = (0.8, 1.0, 1.5, 2.0, 3.0, 5.0)
    random = np.random.default_rng(20261129)
    noise = random.standard_normal((paths, SCHEDULE.max_cycles))
    null = _t(random.standard_normal((10 * paths, SCHEDULE.max_cycles)))
    for level in (ALPHA, ALPHA / FAMILY):
        report.table(
            f"Mean number of pairs ÷ number fixed in advance for a power of 90 %, at a level of {level:.2%}",
            *("rule", "false alarms ÷ level", *(f"{distance:g} sd beyond delta" for distance in distances)),
        )
        fixed = [
            cycles_needed(1.0, delta=0.0, change=math.expm1(distance), alpha=level, schedule=SCHEDULE).fixed or 0
            for distance in distances
        ]
        report.row("*number fixed in advance*", "", *map(str, fixed))
        for name, rule in _rules(null, level).items():
            cells = [_stopped(rule(_t(noise + distance))).mean() for distance in distances]
            alarms = rule(null).any(axis=1).mean() / level
            ratios = [cell / number for cell, number in zip(cells, fixed, strict=True)]
            report.row(name, f"{alarms:.2f}", *(f"{ratio:.2f}" for ratio in ratios))
            if name.startswith("**") and max(ratios) > 1.5:
                report.wrong.append(f"{name} at {level:.2%}: {max(ratios):.2f} × theory")


def _t(values: Logs) -> Logs:
    """Return t of the first n values, for each n of 2 or more and NaN for 1."""
    n = np.arange(1, values.shape[1] + 1)
    mean = np.cumsum(values, axis=1) / n
    squares = np.cumsum(values**2, axis=1) - n * mean**2
    with np.errstate(divide="ignore", invalid="ignore"):
        return mean * np.sqrt(n * (n - 1) / squares)


def _rules(null: Logs, level: float) -> dict[str, Callable[[Logs], Logs]]:
    """Return for each rule whether it has found a change at each number of pairs."""

    def spending(sizes: tuple[int, ...], factor: float = 1.0) -> Callable[[Logs], Logs]:
        def found(t: Logs) -> Logs:
            decided = np.zeros(t.shape, dtype=bool)
            at = np.array(sizes) - 1
            decided[:, at] = stdtr(at, -t[:, at]) <= factor * level / len(sizes)
            return decided

        return found

    def mixture(t: Logs, variance: float = 1.0) -> Logs:
        """Decide by a normal mixture over effect sizes, with the right Haar prior of the spread."""
        n = np.arange(1, t.shape[1] + 1)
        widened, degrees = 1 + n * variance, np.maximum(n - 1, 1)
        with np.errstate(invalid="ignore"):
            log_e = -0.5 * np.log(widened) + n / 2 * (
                np.log1p(t**2 / degrees) - np.log1p(t**2 / degrees / widened)
            )
            return (log_e >= -math.log(2 * level)) & (t > 0) & (n >= SCHEDULE.min_cycles)

    at = np.array(SCHEDULE.sizes) - 1
    smallest = np.min(stdtr(at, -null[:, at]), axis=1) * len(SCHEDULE.sizes)
    factor = float(np.quantile(smallest, level)) / level
    return {
        "**equal shares, looks grow by a quarter**": spending(SCHEDULE.sizes),
        "equal shares, looks double": spending((4, 8, 16, 32, 40)),
        "equal shares, a look after each pair": spending(tuple(range(4, 41))),
        f"calibrated: level × {factor:.2f}, looks grow by a quarter": spending(SCHEDULE.sizes, factor),
        "anytime-valid t, mixture of variance 1": mixture,
    }


def _stopped(found: Logs) -> Logs:
    return np.where(found.any(axis=1), found.argmax(axis=1) + 1, found.shape[1])


def precision(report: Report, paths: int) -> None:
    """Show how often an interval whose width ended the cycles covers the mean."""
    ratios = (0.3, 0.5, 0.7, 1.0, 1.4, 2.0, 2.5)
    report.table(
        f"Intervals that cover the mean, stopped at a half-width of 2 % ({STOPPED_CONFIDENCE:.0%} nominal)",
        *("at least", *(f"CV {ratio * 0.02:.1%}" for ratio in ratios)),
    )
    for minimum in (3, 5):
        cells = []
        for ratio in ratios:
            mean, variance, stopped = _stopped_by_width(0.02 * ratio, minimum, paths)
            half = stats.t.isf((1 - STOPPED_CONFIDENCE) / 2, stopped - 1) * np.sqrt(variance / stopped)
            missed = np.abs(mean - 1) > half
            cells.append(f"{1 - missed.mean():.1%} ({stopped.mean():.1f})")
            report.rate(missed, f"coverage, CV {ratio * 0.02:.1%}, at least {minimum}", 0.05)
        report.row(f"{minimum} cycles", *cells)


def _stopped_by_width(cv: float, minimum: int, paths: int) -> tuple[Logs, Logs, Logs]:
    """Return means, variances and numbers of cycles, stopped at a half-width of 2 %. The true mean is 1."""
    values = 1 + cv * np.random.default_rng(20261129).standard_normal((paths, SCHEDULE.max_cycles))
    n = np.arange(1, values.shape[1] + 1)
    mean = np.cumsum(values, axis=1) / n
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = (np.cumsum((values - 1) ** 2, axis=1) - n * (mean - 1) ** 2) / (n - 1)
        half = stats.t.isf((1 - STOPPED_CONFIDENCE) / 2, n - 1) * np.sqrt(variance / n)
    stopped = _stopped((half <= 0.02 * mean) & (n >= minimum))
    at = np.arange(paths), stopped - 1
    return mean[at], variance[at], stopped


def baselines(report: Report, paths: int) -> None:
    """Show false alarms of comparisons with a baseline whose cycles ended by their half-width."""
    report.table(
        "False REGRESSION of a gate at delta = 0, compared with a baseline stopped at a half-width of 2 %",
        *("cycles of the candidate", *(f"CV {cv:.1%}" for cv in BASELINE_CVS)),
    )
    random = np.random.default_rng(20261130)
    for n in (5, 10, 20):
        cells = []
        for cv in BASELINE_CVS:
            mean, variance, stopped = _stopped_by_width(cv, SCHEDULE.min_cycles, paths)
            values = 1 + cv * random.standard_normal((paths, n))
            error, degrees = welch(values.var(axis=1, ddof=1), n, variance, stopped)
            found = p_beyond(values.mean(axis=1) - mean, error, degrees, 0.0) <= ALPHA
            cells.append(report.rate(found, f"baseline, CV {cv:.1%}, n {n}"))
        report.row(str(n), *cells)


def theory(report: Report) -> None:
    """Print numbers of pairs by spread and change."""
    report.table(
        "Pairs: fixed in advance, power 90 % · mean of the rule, for one gate and the first of 12",
        *("spread of a pair", "delta", "true change", "one gate", "first of 12"),
    )
    for spread, delta, change in _cases():
        cells = []
        for family in (1, FAMILY):
            found = cycles_needed(
                spread, delta=delta, change=change, alpha=ALPHA, schedule=SCHEDULE, family=family
            )
            cells.append(f"{found.fixed} · {found.sequential:.1f}")
            if found.fixed is not None and found.sequential > 1.5 * found.fixed:
                report.wrong.append(f"{spread}, {delta}, {change}: {cells[-1]}")
        report.row(f"{spread:.1%}", f"{delta:.0%}", f"{change:.0%}", *cells)


def _cases() -> Iterator[tuple[float, float, float]]:
    for spread in (0.005, 0.01, 0.02, 0.05):
        yield from ((spread, 0.01, 0.03), (spread, 0.01, 0.05), (spread, 0.02, 0.1), (spread, 0.02, 0.2))
        yield spread, 0.05, 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", type=int, default=10_000, help="simulated in each row")
    families = parser.parse_args().families
    begun = time.perf_counter()
    report = Report()
    rules(report, families)
    theory(report)
    precision(report, 4 * families)
    false_alarms(report, families)
    baselines(report, 4 * families)
    print(f"\n{families} families a row, {time.perf_counter() - begun:.0f} s")
    for what in report.wrong:
        print(f"WRONG: {what}")
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
