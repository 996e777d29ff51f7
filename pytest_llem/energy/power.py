"""Integrate sampled power to energy."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean
from typing import NamedTuple

#: Longest accepted time without a sample, in s: ten samples are missing by then.
MAX_GAP_S = 1.0


class Power(NamedTuple):
    """Power at an instant of the monotonic clock: in s, and in W."""

    at: float
    watts: float


class NoIntegralError(Exception):
    """The samples do not suffice for an integral."""


class Integral(NamedTuple):
    """Energy over a window, and its standard uncertainty (k = 1) from sampling, both in J."""

    energy_j: float
    uncertainty_j: float


def integrate(samples: Sequence[Power], began: float, ended: float) -> Integral:
    """Return the energy from *began* to *ended*, by the trapezoidal rule.

    Power is interpolated linearly between two samples, including the nearest ones outside of the window. It is
    constant before the first and after the last sample: a constant 70 W is 700 J in 10 s for any sample times.

    The uncertainty has two parts. Each edge is known only to the mean time Δ between samples, like a counter's
    tick. And drivers measure power in a part of each of their own periods (of an H100, 25 of 100 ms: arXiv
    2312.02741): a load that repeats in step with them is seen at the same phases again and again, so that more
    samples do not help. With 10 ms of work every 200 ms, the integral was 24 to 65 % above the counter of an H200.
    The largest error is therefore taken to be the fast part of the samples' standard deviation, √(mean(ΔP²)/2) of
    neighbours, for the whole time T. With the mean power P: u² = 2·(P·Δ)²/12 + (T/3)²·mean(ΔP²)/2.

    Args:
        samples: Samples in order of time.
        began: Start of the window on the monotonic clock, in s.
        ended: End of the window, in s.

    Raises:
        NoIntegralError: There are fewer than two samples, or none for :data:`MAX_GAP_S`.
    """
    first = max(bisect_right(samples, began, key=_at) - 1, 0)  # the last sample at or before the edge
    last = bisect_left(samples, ended, key=_at) + 1
    known = samples[first:last]
    if len(known) < 2:
        raise NoIntegralError(f"{len(known)} samples of power in {ended - began:.1f} s")
    gap = max(*(b.at - a.at for a, b in pairwise(known)), known[0].at - began, ended - known[-1].at)
    if gap > MAX_GAP_S:
        raise NoIntegralError(f"no sample of power for {gap:.1f} s")
    inside = [began, *(one.at for one in known if began < one.at < ended), ended]
    points = [Power(at, _watts(known, at)) for at in inside]
    energy_j = sum((b.at - a.at) * (a.watts + b.watts) / 2 for a, b in pairwise(points))
    interval = (known[-1].at - known[0].at) / (len(known) - 1)
    edges = 2 * (energy_j / (ended - began) * interval) ** 2 / 12
    spread = fmean((b.watts - a.watts) ** 2 for a, b in pairwise(known)) / 2
    return Integral(energy_j, math.sqrt(edges + spread * ((ended - began) / 3) ** 2))


def _at(sample: Power) -> float:
    return sample.at


def _watts(samples: Sequence[Power], at: float) -> float:
    """Return the power at an instant: interpolated between two samples, or that of the nearest one."""
    after = bisect_left(samples, at, key=_at)
    if after in (0, len(samples)):
        return samples[min(after, len(samples) - 1)].watts
    a, b = samples[after - 1], samples[after]
    return a.watts + (b.watts - a.watts) * (at - a.at) / (b.at - a.at)
