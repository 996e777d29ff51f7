"""Hold the requests of a window: their checks, latencies and token counts, and their CSV file."""

from __future__ import annotations

import csv
import hashlib
import io
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from pytest_llem.catalogue import PERCENTILES
from pytest_llem.engines.protocol import Engine, RequestRecord
from pytest_llem.measurement.engine_reports import too_fast
from pytest_llem.measurement.window import Window
from pytest_llem.results.metrics import Metric, metric
from pytest_llem.results.quality_warnings import QualityWarning
from pytest_llem.results.statistics import percentile
from pytest_llem.study.config import ExperimentConfig

#: Metrics that are measured before the window.
BEFORE_WINDOW = {"load_seconds", "load_energy_j", "idle_power_w", "model_memory_mb"}

COLUMNS = ("pass", "request", "input_tokens", "output_tokens", "ttft_ms", "itl_mean_ms", "e2e_ms")

#: Reasons for a missing latency of an engine that reports latencies.
_MISSING = {
    "ttft": "the engine reported the first token's time for no request",
    "itl": "no request has a second token",
    "e2e": "the engine reported the last token's time for no request",
}


@dataclass(frozen=True)
class Requests:
    """The requests of a window.

    Attributes:
        passes: For each pass, a record for each prompt, in the prompts' order.
        no_latency: Reason why the engine reports no latencies; None if it does.
        sizes: Number of prompts of each batch of a pass, in order; empty if a pass is one batch.
        stride: Every how many passes of the window one is in ``passes``.
        too_fast: Reason why no engine can have generated them in that time; None if one can.
    """

    passes: Sequence[Sequence[RequestRecord]]
    no_latency: str | None = None
    sizes: Sequence[int] = ()
    stride: int = 1
    too_fast: str | None = None

    @classmethod
    def of(cls, engine: Engine, batches: Sequence[Any], window: Window) -> Requests:
        """Return the requests of every recorded pass of *window*.

        Args:
            engine: The engine that generated them.
            batches: Batches of a pass.
            window: A window of calls of ``engine.generate``.
        """
        records = [
            [engine.requests(batch, generated) for batch, generated in zip(batches, one, strict=True)]
            for one in window.passes
        ]
        sizes = [len(batch) for batch in records[0]]
        passes = [list(chain.from_iterable(one)) for one in records]
        return cls(passes, engine.no_latency, sizes, window.stride, too_fast(records, window.pass_seconds))

    def batches(self) -> Iterator[Sequence[RequestRecord]]:
        """Yield the requests of each batch of each pass."""
        for one in self.passes:
            rest = iter(one)
            for size in self.sizes or [len(one)]:
                yield list(islice(rest, size))

    def check(self, config: ExperimentConfig) -> None:
        """Raise if the engine did not answer every prompt with the configured lengths.

        Raises:
            ValueError: Metrics per token or request would be wrong.
        """
        asked = config.max_output_tokens
        fixed = config.measurement.length_mode == "fixed"
        for one in self.passes:
            if len(one) != config.n:
                raise ValueError(f"the engine returned records for {len(one)} of {config.n} prompts")
            for request in one:
                if min(request.input_tokens, *request.itl_s, request.ttft_s or 0, request.e2e_s or 0) < 0:
                    raise ValueError(f"the engine reported a negative value: {request}")
                given = len(request.output_ids)
                if given > asked or (fixed and given != asked and request.error is None):
                    wanted = f"{'exactly' if fixed else 'at most'} {asked}"
                    raise ValueError(f"the engine generated {given} tokens where {wanted} were asked for")

    @property
    def input_tokens(self) -> int:
        """Input tokens of a pass."""
        return sum(request.input_tokens for request in self.passes[0])

    @property
    def output_tokens(self) -> float:
        """Output tokens of a pass; the mean if passes differ."""
        return statistics.fmean(sum(len(request.output_ids) for request in one) for one in self.passes)

    @property
    def total(self) -> int:
        """Number of requests of all passes."""
        return sum(map(len, self.passes))

    @property
    def failed(self) -> int:
        """Number of requests of all passes that failed or returned no token."""
        return sum(not request.is_served for one in self.passes for request in one)

    @property
    def served(self) -> float:
        """Number of answered requests of a pass; the mean if passes differ."""
        return (self.total - self.failed) / len(self.passes)

    @property
    def not_judged(self) -> str | None:
        """Reason why no gate may judge what was measured over these requests; None if one may."""
        if not self.failed:
            return self.too_fast
        errors = (request.error for one in self.passes for request in one if request.error)
        first = next((f": {' '.join(error.split())}" for error in errors), "")
        return f"{self.failed} of {self.total} requests failed or returned no token{first}"

    def warnings(self) -> Iterator[QualityWarning]:
        """Yield the quality warnings about the requests."""
        if (reason := self.not_judged) is not None:
            code = "requests_failed" if self.failed else "impossibly_fast"
            yield QualityWarning.of(code, f"{reason}; no gate judges what was measured over them")
        if self.deterministic is False:
            text = (
                "outputs differ between passes with the same seed: kernels are not deterministic, or the engine "
                "ignores the seed"
            )
            yield QualityWarning.of("outputs_differ", text)

    @property
    def deterministic(self) -> bool | None:
        """Whether every pass gave the same output ids; None if there is one pass."""
        first, *others = ([list(request.output_ids) for request in one] for one in self.passes)
        return all(one == first for one in others) if others else None

    def output_digest(self) -> str:
        """Return the SHA-256 of the first pass's output ids."""
        text = ";".join(",".join(map(str, request.output_ids)) for request in self.passes[0])
        return hashlib.sha256(text.encode()).hexdigest()

    def latency_metrics(self) -> dict[str, Metric]:
        """Return TTFT, ITL and E2E percentiles over all answered requests of the window, in ms."""
        served = [request for one in self.passes for request in one if request.is_served]
        samples = {
            "ttft": [request.ttft_s for request in served if request.ttft_s is not None],
            "itl": [gap for request in served for gap in request.itl_s],
            "e2e": [request.e2e_s for request in served if request.e2e_s is not None],
        }
        tokens = sum(len(request.output_ids) for request in served)
        expected = {"ttft": len(served), "itl": tokens - len(served), "e2e": len(served)}
        return {
            (name := f"{kind}_p{p}_ms"): _latency(name, values, p)
            if len(values) == expected[kind] > 0
            else metric(name, None, reason=self._no_latency_reason(kind, len(values), expected[kind]))
            for kind, values in samples.items()
            for p in PERCENTILES
        }

    def _no_latency_reason(self, kind: str, given: int, expected: int) -> str:
        """Return why there is no latency of a *kind*, if the engine gave only some of the values or none."""
        if self.no_latency or not given:
            return self.no_latency or _MISSING[kind]
        return f"the engine reported only {given} of {expected} values, too few for a percentile of all"

    def to_csv(self) -> str:
        """Return the requests as CSV, one line each. A missing value is an empty cell."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(self._rows())
        return text.getvalue()

    def _rows(self) -> Iterator[Sequence[object]]:
        for place, one in enumerate(self.passes):
            number = 1 + place * self.stride
            for index, request in enumerate(one):
                itl = statistics.fmean(request.itl_s) if request.itl_s else None
                yield (
                    number,
                    index,
                    request.input_tokens,
                    len(request.output_ids),
                    *("" if s is None else f"{s * 1000:.4f}" for s in (request.ttft_s, itl, request.e2e_s)),
                )


def _latency(name: str, values: Sequence[float], p: int) -> Metric:
    """Return the *p*-th percentile in ms of latencies in s. Gates judge a tail only if a value lies beyond it."""
    not_judged = None
    if p > 50 and len(values) < (wanted := 100 // (100 - p)):
        not_judged = (
            f"percentile {p} of {len(values)} values, and a gate needs {wanted}: "
            "raise n or measurement.min_window_seconds"
        )
    return metric(name, percentile(values, p) * 1000, not_judged=not_judged)
