"""Measure prefill's share of a pass, with passes over the same batches that stop after the first token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

from pytest_llem.energy.account import Meters
from pytest_llem.engines.protocol import Engine, SupportsPrefillOnly
from pytest_llem.measurement.accounting import energy
from pytest_llem.measurement.window import Window, measure
from pytest_llem.results.metrics import Metric, metric, weakest

NAMES = ("prefill_energy_j", "decode_energy_j", "energy_per_input_token_j", "prefill_seconds", "decode_seconds")
NOT_REQUESTED = "not requested: measurement.prefill_split"


def measure_prefill(
    engine: Engine, batches: Sequence[Any], meters: Meters, *, min_seconds: float, seed: int, keep: int
) -> Window:
    """Measure passes over the same batches, with the same seed, that generate one token for each prompt.

    Call it right after the window, while the machine is equally warm. The first batch runs once before, in case
    stopping after one token compiles anything. Any other compilation restarts the window.

    Raises:
        ValueError: The engine generates another number of tokens, or a request fails.
    """
    assert isinstance(engine, SupportsPrefillOnly)
    engine.generate_first(batches[0])
    first = engine.generate_first
    window = measure(engine, batches, meters, min_seconds=min_seconds, seed=seed, generate=first, keep=keep)
    for batch, generated in chain.from_iterable(zip(batches, one, strict=True) for one in window.passes):
        for request in engine.requests(batch, generated):
            if request.error is not None:
                raise ValueError(f"a request for its first token alone failed: {request.error}")
            if len(request.output_ids) != 1:
                given = len(request.output_ids)
                raise ValueError(f"the engine generated {given} tokens where the first one was asked for")
    return window


def prefill_metrics(
    window: Window, prefill: Window | None, input_tokens: int, drift_w: float | None
) -> dict[str, Metric]:
    """Return energy and time of prefill and of decoding, per pass.

    Prefill is a pass with one new token for each prompt. Decoding is the rest: a difference of two windows, which
    noise may make negative. Its uncertainty is u² = u_pass² + u_prefill² + (t_prefill · drift)², because the
    machine's idle power drifts between the windows.

    Args:
        window: Window of whole passes.
        prefill: Window of passes with one new token for each prompt; None if it was not requested.
        input_tokens: Input tokens of a pass.
        drift_w: Standard uncertainty from the drift of idle power, in W; None if unknown, which makes that of
            decoding unknown too.
    """
    if prefill is None:
        return {name: metric(name, None, reason=NOT_REQUESTED) for name in NAMES}
    whole = energy("decode_energy_j", window.account.total, 1 / window.count)
    first = _attributed(energy("prefill_energy_j", prefill.account.total, 1 / prefill.count))
    seconds, whole_seconds = prefill.seconds / prefill.count, window.seconds / window.count
    not_judged = None
    if whole_seconds <= seconds:
        not_judged = f"prefill alone took {seconds:.4g} s, but a whole pass took {whole_seconds:.4g} s"
    return {
        "prefill_energy_j": first,
        "decode_energy_j": _difference(whole, first, None if drift_w is None else seconds * drift_w),
        "energy_per_input_token_j": _divided(first, input_tokens),
        "prefill_seconds": metric("prefill_seconds", seconds),
        "decode_seconds": metric("decode_seconds", whole_seconds - seconds, not_judged=not_judged),
    }


def _attributed(figure: Metric) -> Metric:
    return figure.model_copy(update={"method": weakest(("attributed", figure.method))})


def _difference(whole: Metric, first: Metric, drift_j: float | None) -> Metric:
    if whole.value is None or first.value is None or whole.boundary != first.boundary:
        boundaries_differ = f"the window covers {whole.boundary}, and that of prefill {first.boundary}"
        reason = whole.reason or first.reason or boundaries_differ
        return whole.model_copy(
            update={"value": None, "method": "unavailable", "reason": reason, "uncertainty": None}
        )
    edges = (whole.uncertainty, first.uncertainty, drift_j)
    return whole.model_copy(
        update={
            "value": whole.value - first.value,
            "method": weakest((whole.method, first.method)),
            "invalid": whole.invalid or first.invalid,
            "uncertainty": None if None in edges else math.hypot(*(edge for edge in edges if edge is not None)),
        }
    )


def _divided(first: Metric, input_tokens: int) -> Metric:
    per_token = {
        name: None if figure is None else figure / input_tokens
        for name, figure in (("value", first.value), ("uncertainty", first.uncertainty))
    }
    return first.model_copy(update=per_token)
