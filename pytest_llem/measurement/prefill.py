"""Measure prefill's share of a pass, with passes over the same batches that stop after the first token."""

from __future__ import annotations

import math

from pytest_llem.catalogue import PREFILL_METRICS
from pytest_llem.measurement.accounting import INPUT_TOKENS_UNKNOWN, energy
from pytest_llem.measurement.window import Window
from pytest_llem.results.metrics import Metric, metric, weakest

NOT_REQUESTED = "not measured: set measurement.prefill_split: true"


def prefill_metrics(
    window: Window, prefill: Window | None, input_tokens: int | None, drift_w: float | None
) -> dict[str, Metric]:
    """Return energy and time of prefill and of decoding, per pass.

    Prefill is a pass with one new token for each prompt. Decoding is the rest: a difference of two windows, which
    noise may make negative: then no gate judges it. Its uncertainty is
    u² = u_pass² + u_prefill² + (t_prefill · drift)², because the machine's idle power drifts between the windows.

    Args:
        window: Window of whole passes.
        prefill: Window of passes with one new token for each prompt; None if it was not requested.
        input_tokens: Input tokens of a pass; None if unknown.
        drift_w: Standard uncertainty from the drift of idle power, in W; None if unknown: the uncertainty of
            decoding is then unknown too.
    """
    if prefill is None:
        return {name: metric(name, None, reason=NOT_REQUESTED) for name in PREFILL_METRICS}
    # This is the whole pass. It has the name of the difference, from which the unit follows.
    whole = energy("decode_energy_j", window.account.total, 1 / window.count)
    prefill_energy = _attributed(energy("prefill_energy_j", prefill.account.total, 1 / prefill.count))
    seconds, whole_seconds = prefill.seconds / prefill.count, window.seconds / window.count
    return {
        "prefill_energy_j": prefill_energy,
        "decode_energy_j": _difference(whole, prefill_energy, None if drift_w is None else seconds * drift_w),
        "energy_per_input_token_j": _per_token(prefill_energy, input_tokens),
        "prefill_seconds": metric("prefill_seconds", seconds),
        "decode_seconds": metric(
            "decode_seconds", whole_seconds - seconds, not_judged=_not_judged(whole_seconds, seconds, "s")
        ),
    }


def _attributed(energy: Metric) -> Metric:
    """Mark *energy* as a share of a measured total, at best."""
    return energy.model_copy(update={"method": weakest(("attributed", energy.method))})


def _difference(whole: Metric, prefill: Metric, drift_j: float | None) -> Metric:
    if whole.value is None or prefill.value is None or whole.boundary != prefill.boundary:
        boundaries_differ = (
            f"energy of the whole pass covers {whole.boundary}, but that of prefill covers {prefill.boundary}"
        )
        reason = whole.reason or prefill.reason or boundaries_differ
        return whole.model_copy(
            update={"value": None, "method": "unavailable", "reason": reason, "uncertainty": None}
        )
    uncertainties = (whole.uncertainty, prefill.uncertainty, drift_j)
    return whole.model_copy(
        update={
            "value": whole.value - prefill.value,
            "method": weakest((whole.method, prefill.method)),
            "invalid": whole.invalid or prefill.invalid,
            "not_judged": _not_judged(whole.value, prefill.value, "J"),
            "uncertainty": None
            if None in uncertainties
            else math.hypot(*(one for one in uncertainties if one is not None)),
        }
    )


def _not_judged(whole: float, prefill: float, unit: str) -> str | None:
    """Return why no gate may judge the difference of *whole* and *prefill*; None if it is above 0."""
    if whole > prefill:
        return None
    return f"prefill alone took {prefill:.4g} {unit}, but a whole pass took {whole:.4g} {unit}"


def _per_token(prefill: Metric, input_tokens: int | None) -> Metric:
    if input_tokens is None:
        return metric("energy_per_input_token_j", None, method="unavailable", reason=INPUT_TOKENS_UNKNOWN)
    per_token = {
        name: None if value is None else value / input_tokens
        for name, value in (("value", prefill.value), ("uncertainty", prefill.uncertainty))
    }
    return prefill.model_copy(update=per_token)
