"""Compute metrics and records of the runs of a load generator that were read from its files."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

from pytest_llem.catalogue import CATALOGUE
from pytest_llem.engines.protocol import RequestRecord
from pytest_llem.importers.formats import digest
from pytest_llem.importers.reading import fail
from pytest_llem.importers.run import ToolRun
from pytest_llem.importers.steady import NotSteadyError, Rates, rates_between, steady_rates, timed_requests
from pytest_llem.measurement.accounting import mark_not_judged
from pytest_llem.measurement.requests import Requests
from pytest_llem.results.cycles import one_server_reason
from pytest_llem.results.experiment import ImportedFile, ImportRecord, TokenRecord, WindowRecord
from pytest_llem.results.metrics import Metric, metric
from pytest_llem.results.quality_warnings import QualityWarning
from pytest_llem.results.statistics import total_of
from pytest_llem.times import utc

#: Formats whose runs have no ramp-up, so that rates over the whole run are right.
_WITHOUT_RAMP = ("llama-bench",)


@dataclass(frozen=True)
class ImportedRuns:
    """Runs of one load generator, with one configuration, on one start of the server.

    Attributes:
        runs: The runs, in order.
    """

    runs: Sequence[ToolRun]

    @property
    def first(self) -> ToolRun:
        """The first run, from which the tool's version and the configuration are taken."""
        return self.runs[0]

    @cached_property
    def requests(self) -> Requests | None:
        """The requests, with a pass for each run; None if a run has none."""
        passes = [run.requests for run in self.runs]
        return Requests(passes) if all(passes) else None

    @cached_property
    def steady(self) -> list[Rates] | str:
        """What was generated in the steady state of each run; if a run has no steady state, the reason."""
        try:
            return [steady_rates(run) for run in self.runs]
        except NotSteadyError as error:
            return str(error)

    def metrics(self) -> dict[str, Metric]:
        """Return every metric of the catalogue. What the files do not hold is null, with the reason."""
        missing = f"not in {self.first.source}"
        found = {name: metric(name, None, reason=missing) for name in CATALOGUE}
        found |= {name: metric(name, value) for name, value in self._reported().items()}
        if (requests := self.requests) is not None:
            for name, one in requests.latency_metrics().items():
                if one.value is not None:
                    found[name] = one
                elif found[name].value is None:
                    found[name] = one.model_copy(update={"reason": f"{missing}: {self._why_missing(name)}"})
            found |= self._from_requests(requests)
        found |= self._rates()
        rate = found["requests_per_second"].value
        if found["seconds"].value is None and rate and self.completed:
            found["seconds"] = metric("seconds", self.completed / rate)
        return mark_not_judged(found, None if requests is None else requests.not_judged)

    def _why_missing(self, name: str) -> str:
        kind = name.partition("_")[0]
        if kind == "itl":
            return "a chunk of the stream may hold several tokens, so that the time between tokens is unknown"
        return "no request has these times, or not every one"

    def _reported(self) -> dict[str, float]:
        """Return the figures that the tool itself reports: their means over the runs."""
        shared = set.intersection(*(set(run.figures) for run in self.runs))
        return {name: statistics.fmean(run.figures[name] for run in self.runs) for name in sorted(shared)}

    def _from_requests(self, requests: Requests) -> dict[str, Metric]:
        if self._has_cut_records:
            return {}  # the tool's own figures are of all requests
        served = [one for one in requests.all() if one.is_served]
        values = {
            "input_tokens": total_of(one.input_tokens for one in served),
            "output_tokens": total_of(one.output_tokens for one in served),
        }
        found = {name: value / len(self.runs) for name, value in values.items() if value is not None}
        found["error_rate"] = requests.failed / requests.total
        if isinstance(self.steady, list):
            found["concurrency_mean"] = sum(map(_request_seconds, self.runs, self.steady)) / self._steady_seconds
        return {name: metric(name, value) for name, value in found.items()}

    @property
    def _has_cut_records(self) -> bool:
        """Whether the records of a run have only its first requests."""
        return any(run.cut is not None for run in self.runs)

    @property
    def _has_times(self) -> bool:
        """Whether the times of all requests are on one clock."""
        return all(run.times_unknown_reason is None for run in self.runs)

    @property
    def _steady_seconds(self) -> float:
        assert isinstance(self.steady, list)
        return sum(rates.seconds for rates in self.steady)

    def _rates(self) -> dict[str, Metric]:
        """Return the rates that follow from the times of requests."""
        spans = self.steady if isinstance(self.steady, list) else [*self._whole_runs()]
        seconds = sum(span.seconds for span in spans)
        if not seconds:  # no times, too coarse ones, or a rate of the tool's own
            return {}
        tokens = total_of(span.output_tokens for span in spans)
        found = {
            "requests_per_second": metric("requests_per_second", sum(span.requests for span in spans) / seconds)
        }
        if tokens is not None:
            found["output_tokens_per_second"] = metric("output_tokens_per_second", tokens / seconds)
        return found

    def _whole_runs(self) -> Iterator[Rates]:
        """Yield what was generated in each whole run, if there are times of requests and no figure of the tool."""
        if "requests_per_second" in self._reported() or not self._has_times:
            return
        for run in self.runs:
            served = timed_requests(run)
            if served:
                began, ended = _span(served)
                # From before the start: what happened exactly at the start of a span is not counted.
                yield replace(rates_between(served, began - 1, ended), began=began)

    def record(self) -> ImportRecord:
        """Return the tool and its files."""
        files = dict.fromkeys(chain.from_iterable(run.files for run in self.runs))
        return ImportRecord(
            tool=self.first.tool,
            version=self.first.version,
            files=[ImportedFile(name=file.name, sha256=digest(file)) for file in files],
            rates="steady state" if isinstance(self.steady, list) else "whole run",
            note=None if isinstance(self.steady, list) else self.steady,
            runs=len(self.runs),
            server_start=self.first.server_start,
            reported=self._reported(),
        )

    def window(self) -> WindowRecord:
        """Return the steady state, or the whole run, as a window."""
        seconds = self._steady_seconds if isinstance(self.steady, list) else sum(map(_duration, self.runs))
        began = None
        if isinstance(self.steady, list) and self.first.clock == "unix":
            began = utc(self.steady[0].began, "microseconds")
        return WindowRecord(passes=len(self.runs), window_seconds=seconds, began_at=began)

    def tokens(self) -> TokenRecord:
        """Return the token counts of a run, the mean if there are several."""
        metrics = self.metrics()
        inputs, outputs = (metrics[name].value for name in ("input_tokens", "output_tokens"))
        return TokenRecord(
            prompts=self.completed,
            input_tokens=None if inputs is None else round(inputs),
            output_tokens=None if outputs is None else round(outputs),
            requests=None if self.requests is None else self.requests.total,
            failed_requests=None if self.requests is None else self.requests.failed,
        )

    @property
    def completed(self) -> int | None:
        """Answered requests of a run, the mean if there are several; None if unknown."""
        if self.requests is not None and not self._has_cut_records:
            return round(self.requests.served)
        known = total_of(run.completed for run in self.runs)
        return None if known is None else round(known / len(self.runs))

    def warnings(self) -> Iterator[QualityWarning]:
        """Yield what may be wrong with the metrics."""
        if self.requests is not None:
            yield from (one for one in self.requests.warnings() if one.code == "requests_failed")
        if isinstance(self.steady, str) and self.first.format not in _WITHOUT_RAMP and self._reported():
            text = f"rates are over the whole run, with ramp-up and the time when requests run out: {self.steady}"
            yield QualityWarning.of("whole_run_rates", text)
        if self._has_cut_records:
            recorded = sum(len(run.requests) for run in self.runs)
            total = sum(len(run.requests) if run.cut is None else run.cut.requests for run in self.runs)
            text = (
                f"the records have {recorded} of {total} requests: latencies are of these, and the rates include "
                "the time when requests run out"
            )
            yield QualityWarning.of("records_cut", text)
        if len(self.runs) > 1:
            yield QualityWarning.of("runs_of_one_server", one_server_reason(len(self.runs)))

    def to_csv(self) -> str | None:
        """Return the requests as CSV; None if there are none. Times on no common clock are left out."""
        if self.requests is None:
            return None
        starts = [one.sent for one in self.requests.all() if one.sent is not None and self._has_times]
        return self.requests.to_csv(min(starts, default=None))


def _request_seconds(run: ToolRun, span: Rates) -> float:
    """Return the time that the requests of *run* spent in flight within *span*, in s."""
    times = ((one.sent, one.last_token) for one in run.requests if one.is_served)
    return sum(
        max(0.0, min(last, span.ended) - max(sent, span.began))
        for sent, last in times
        if sent is not None and last is not None
    )


def _duration(run: ToolRun) -> float:
    """Return the duration of a run, in s: as the tool says, or from other figures.

    Raises:
        ImportFileError: It does not follow from the file.
    """
    if run.seconds:
        return run.seconds
    tokens, rate = (run.figures.get(name) for name in ("output_tokens", "output_tokens_per_second"))
    if tokens and rate:
        return tokens / rate
    served = timed_requests(run)
    if run.times_unknown_reason is not None or not served:
        fail(run.files[0], "has neither the duration of the run nor the times of its requests")
    began, ended = _span(served)
    return ended - began


def _span(served: Sequence[RequestRecord]) -> tuple[float, float]:
    """Return when the first of *served* was sent, and when the last one ended, in s."""
    began = min(one.sent for one in served if one.sent is not None)
    return began, max(one.last_token for one in served if one.last_token is not None)
