"""Request records and windows from the figures that a test is about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from pytest_llem.energy.account import Account
from pytest_llem.engines.protocol import RequestRecord
from pytest_llem.measurement.pass_window import PassWindow
from pytest_llem.measurement.quality_warnings import energy_warnings, find_warnings
from pytest_llem.measurement.records import window_record
from pytest_llem.results.experiment import EngineRecord, ExperimentResult
from pytest_llem.results.metrics import Metric, metric
from pytest_llem.results.quality_warnings import QualityWarning


def record(
    input_tokens: int = 3,
    output_ids: Sequence[int] = (7,),
    *,
    ttft_s: float | None = None,
    itl_s: Sequence[float] = (),
    e2e_s: float | None = None,
    sent: float = 0.0,
    error: str | None = None,
) -> RequestRecord:
    """Return the record of a request that was sent at *sent*, from its latencies in s.

    The tokens' times are known if *ttft_s* is given and, for several tokens, *itl_s*.
    """
    first = None if ttft_s is None else sent + ttft_s
    times = [] if first is None or len(output_ids) != len(itl_s) + 1 else list(accumulate(itl_s, initial=first))
    last = None if e2e_s is None else sent + e2e_s
    return RequestRecord(input_tokens, output_ids, sent, times, first_token=first, last_token=last, error=error)


def output_ids(request: RequestRecord) -> list[int]:
    """Return the output ids of a request whose engine reports them."""
    assert request.output_ids is not None
    return list(request.output_ids)


def pass_window(
    passes: Sequence[Sequence[Any]],
    seconds: float,
    account: Account,
    pass_seconds: Sequence[float] = (),
    call_seconds: Sequence[Sequence[float]] = (),
    began: float = 0.0,
) -> PassWindow:
    """Return a window of *passes*."""
    return PassWindow(seconds, account, began, passes=passes, pass_seconds=pass_seconds, call_seconds=call_seconds)


def window_warnings(
    window: PassWindow,
    engine: EngineRecord,
    *,
    refusals: Mapping[str, str] | None = None,
    prefill: PassWindow | None = None,
    covers_engine: bool | None = None,
    roofline_slowdown: Metric | None = None,
    others: Iterable[QualityWarning] = (),
    **records: Any,
) -> list[QualityWarning]:
    """Return the quality warnings of an experiment with *window* and other *records*."""
    total = window.account.total
    energy = metric("energy_j", total.energy_j, boundary=total.boundary, covers_engine=covers_engine)
    unknown = metric("roofline_slowdown", None, reason="no peak is known")
    result = ExperimentResult.model_construct(
        window=window_record(window),
        prefill_window=None if prefill is None else window_record(prefill),
        engine=engine,
        metrics={"energy_j": energy, "roofline_slowdown": roofline_slowdown or unknown},
        **records,
    )
    before = None if prefill is None else prefill.account
    return find_warnings(result, [*others, *energy_warnings(window.account, refusals or {}, prefill=before)])
