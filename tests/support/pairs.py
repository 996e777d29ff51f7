"""Simulate results of gates: families of pairs, judged by the code that judges measured ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from pytest_llem.gates.sessions import session_delta, session_spread
from pytest_llem.gates.ttests import Estimate, judge, paired_estimate, unpaired_estimate

ALPHA = 0.01
#: A family: every metric of every point.
METRICS, POINTS = 3, 4
FAMILY = METRICS * POINTS


@dataclass(frozen=True)
class Noise:
    """Variation between cycles.

    Attributes:
        cv: Coefficient of variation of a cycle's value, which is lognormal.
        session: Standard deviation of a session's effect on a metric's logarithms, equal at all points.
    """

    cv: float
    session: float = 0.0

    @property
    def sd(self) -> float:
        """Standard deviation of a cycle's logarithm."""
        return float(np.sqrt(np.log1p(self.cv**2)))


@dataclass(frozen=True)
class Rates:
    """Shares of gates and of families with a finding, and the number of each."""

    gate: float
    family: float
    gates: int
    families: int

    def beyond(self, rate: float) -> list[str]:
        """Return the shares that are above *rate* by more than three standard errors of the simulation."""
        tried = {"gate": (self.gate, self.gates), "family": (self.family, self.families)}
        return [
            f"{found:.2%} per {what}"
            for what, (found, number) in tried.items()
            if found > rate + 3 * np.sqrt(rate * (1 - rate) / number)
        ]


@dataclass
class Simulation:
    """Draws pairs of candidates and references, each as *families* × gates × cycles logarithms."""

    families: int
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(20261123))

    def side(
        self, noise: Noise, n: int, session: np.ndarray | None = None, *, outliers: float = 0.0
    ) -> np.ndarray:
        """Return the logarithms of a candidate or reference, with the session effect *session* or a new one.

        The share *outliers* of its cycles is 10 % slower.
        """
        logs = noise.sd * self.random.standard_normal((self.families, METRICS, POINTS, n))
        logs += self.session(noise) if session is None else session
        if outliers:
            logs += np.log(1.1) * (self.random.random(logs.shape) < outliers)
        return logs.reshape(self.families, FAMILY, n)

    def session(self, noise: Noise) -> np.ndarray:
        return noise.session * self.random.standard_normal((self.families, METRICS, 1, 1))

    def unpaired(self, noise: Noise, n: int, n_reference: int | None = None) -> Estimate:
        """Return the estimates of candidates and references from separate sessions."""
        return unpaired_estimate(self.side(noise, n), self.side(noise, n_reference or n))

    def paired(self, noise: Noise, n: int) -> Estimate:
        """Return the estimates of pairs of cycles from one session."""
        session = self.session(noise)
        return paired_estimate(self.side(noise, n, session) - self.side(noise, n, session))

    def deltas(self, noise: Noise, n: int, sessions: int) -> np.ndarray:
        """Return, for each gate of each family, the delta that ``llem aa`` recommends after that many sessions."""
        runs = np.stack([self.side(noise, n) for _ in range(sessions)], axis=2)
        by_metric = runs.reshape(self.families, METRICS, POINTS, sessions, n).tolist()
        found = [
            [session_delta(session_spread(points), alpha=ALPHA, metrics=METRICS) for points in metrics]
            for metrics in by_metric
        ]
        return np.repeat(found, POINTS, axis=1)


def regressions(estimate: Estimate, delta: float | np.ndarray) -> Rates:
    """Return the rates of REGRESSION: of gates judged alone, and of families with any, under Holm."""
    margin = np.broadcast_to(np.log1p(delta), estimate.log_ratio.shape)
    alone = judge(
        estimate.log_ratio[..., None],
        estimate.standard_error[..., None],
        estimate.degrees[..., None],
        margin[..., None],
        ALPHA,
    ).worse
    family = judge(*estimate, margin, ALPHA).worse.any(axis=-1)
    return Rates(float(alone.mean()), float(family.mean()), alone.size, family.size)


def found(estimate: Estimate, change: float, delta: float, alpha: float) -> float:
    """Return the share of gates that find *change*, a relative worsening, at *alpha*."""
    shifted = estimate.log_ratio + np.log1p(change)
    one = (shifted[..., None], estimate.standard_error[..., None], estimate.degrees[..., None])
    return float(judge(*one, np.log1p(delta), alpha).worse.mean())


def grid() -> Iterator[tuple[float, int]]:
    """Yield coefficients of variation and numbers of cycles."""
    for cv in (0.005, 0.01, 0.02, 0.05):
        for n in (3, 5, 10):
            yield cv, n
