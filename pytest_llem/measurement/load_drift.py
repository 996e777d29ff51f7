"""Measure the first load on a server again, as the last one: a diagnostic of how far the server has changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pytest_llem.engines.protocol import EngineCrashError, RequestRecord
from pytest_llem.measurement.load_metrics import load_metrics, requests_of
from pytest_llem.measurement.load_window import LoadWindow
from pytest_llem.results.serving import DriftRecord
from pytest_llem.serving.errors import LoadError
from pytest_llem.study.load import LoadConfig


def measure_again(
    drift: DriftRecord, measure: Callable[[LoadConfig], LoadWindow]
) -> tuple[DriftRecord, Sequence[RequestRecord]]:
    """Return *drift* with the metrics of its load measured again, and the requests that this took.

    An error is a reason in the record: a diagnostic fails no experiment.

    Args:
        drift: The first load, and its metrics.
        measure: Measures a load.
    """
    try:
        window = measure(LoadConfig.model_validate(drift.load))
    except (LoadError, EngineCrashError, ValueError) as error:
        return drift.model_copy(update={"reason": str(error)}), ()
    metrics = load_metrics(window, requests_of(window))
    after = {name: value for name in drift.before if (value := metrics[name].value) is not None}
    return drift.model_copy(update={"after": after, "window_seconds": window.seconds}), window.records
