"""Verdicts as text, one line each."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pytest_llem.gates.decisions import MAX_CYCLES
from pytest_llem.results.verdicts import GateVerdict
from pytest_llem.study.problems import printable

#: Numbers of significant digits to try. 17 distinguish all floats.
_DIGITS = range(3, 18)


def verdict_line(verdict: GateVerdict) -> str:
    """Return point, metric, value and limit or ratio of *verdict* on one line, in this order."""
    about = f"{verdict.point}: {verdict.metric}" if verdict.metric else verdict.point
    return printable(f"{about}: {verdict_text(verdict)}")  # its reason may be from another machine's result


def verdict_text(verdict: GateVerdict) -> str:
    """Return :func:`verdict_line` without point and metric, for use after the id of the gate."""
    if verdict.verdict == "NOT JUDGED":
        text = f"cannot be judged{_after(': ', verdict.reason)}"
    else:
        text = _budget(verdict) if verdict.gate == "budget" else _regression(verdict)
        # The reason of an INCONCLUSIVE comparison may contain it already.
        if verdict.contended is not None and verdict.contended not in text:
            text = f"{text}; {verdict.contended}"
    associated = _after("; associated, which need not be the cause: ", "; ".join(verdict.associated))
    return f"{text}{_after('; ', verdict.note)}{associated}"


def rounded(value: float, digits: int = 3) -> str:
    """Return *value* with at least *digits* significant digits.

    From a million on, and below 0.0001, it has at most *digits* significant digits.
    """
    if not value:
        return "0"
    if not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits}g}"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def percent(share: float) -> str:
    """Return a share in percent, with up to three digits, or with more so that only 1 is 100 %."""
    texts = (f"{100 * share:.{digits}g}" for digits in _DIGITS)
    return f"{next((text for text in texts if float(text) < 100), '100')} %"


def _budget(verdict: GateVerdict) -> str:
    unit = "" if verdict.unit == "ratio" else f" {verdict.unit}"
    low, high = verdict.minimum, verdict.maximum
    limits = [limit for limit in (low, high) if limit is not None]
    assert verdict.mean is not None
    mean = _apart(verdict.mean, limits)
    if verdict.verdict == "BEYOND":
        side, limit = ("below", low) if low is not None and verdict.mean < low else ("beyond", high)
        text = f"is {side} {_exact(limit)}"
    elif high is None:
        text = f"is not below {_exact(low)}"
    else:
        text = f"is within {_exact(high) if low is None else _span(_exact(low), _exact(high))}"
    basis = indirect_method(verdict)
    if verdict.ci95 is not None:
        basis.append(_span(*(rounded(edge) for edge in verdict.ci95)))
    basis.append(f"n = {verdict.n}")
    return f"{mean}{unit} {text}{unit} ({', '.join(basis)}){_after('; ', verdict.reason)}"


def _regression(verdict: GateVerdict) -> str:
    if verdict.ratio is None or verdict.interval is None:
        return f"{verdict.verdict}{_after(': ', verdict.reason)}"
    share = "" if verdict.confidence is None else f"{percent(verdict.confidence)} "
    basis = [] if verdict.delta is None else [f"δ = {100 * verdict.delta:.3g} %"]
    basis += [*indirect_method(verdict), f"{share}interval {_span(*map(ratio_text, verdict.interval))}"]
    basis.append(f"n = {verdict.n} against {verdict.reference_n}{', paired' if verdict.paired else ''}")
    if verdict.judged_after is not None:
        basis.append(f"judged after {verdict.judged_after} cycles")
    if verdict.p is not None:
        basis.append(f"p = {verdict.p:.2g}" if verdict.p >= 1e-4 else "p < 0.0001")
    text = f"{ratio_text(verdict.ratio)} × the reference: {verdict.verdict} ({', '.join(basis)})"
    if verdict.verdict != "INCONCLUSIVE":
        return f"{text}{_after('; ', verdict.reason)}"
    if verdict.cycles_to_decide is None:
        return f"{text}; no number of cycles up to {MAX_CYCLES:,} would decide"
    return f"{text}; about {verdict.cycles_to_decide} cycles would decide"


def indirect_method(verdict: GateVerdict) -> list[str]:
    """Return how an energy was obtained, such as ``estimated``; empty if it was measured directly."""
    return [] if verdict.method in (None, "measured") else [verdict.method]


def _after(mark: str, text: str | None) -> str:
    return f"{mark}{text}" if text else ""


def _apart(value: float, limits: Sequence[float]) -> str:
    """Return *value* as text with enough digits that rounding does not move it across or onto a limit."""
    texts = (rounded(value, digits) for digits in _DIGITS)
    exact = (text for text in texts if _sides(float(text.replace(",", "")), limits) == _sides(value, limits))
    return next(exact)


def _sides(value: float, limits: Sequence[float]) -> list[int]:
    """Return for each limit 1 if *value* is above it, -1 if it is below, and 0 if it is equal."""
    return [(value > limit) - (value < limit) for limit in limits]


def _exact(limit: float | None) -> str:
    """Return a limit with all its digits, up to 15."""
    assert limit is not None
    return f"{limit:,.15g}"


def ratio_text(value: float) -> str:
    """Return a ratio as text, with three decimals unless it is far from 1."""
    return f"{value:.3f}" if 0.1 <= value < 10 else rounded(value)


def _span(low: str, high: str) -> str:
    # A sign or an exponent beside a dash would be misread.
    return f"{low} to {high}" if "-" in low + high else f"{low}–{high}"
