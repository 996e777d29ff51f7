"""Hold the requests of a window: their checks, latencies and token counts, and their CSV file."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from pytest_llem.catalogue import PERCENTILES
from pytest_llem.engines.protocol import RequestRecord
from pytest_llem.results.csv_files import to_csv
from pytest_llem.results.metrics import Metric, metric
from pytest_llem.results.quality_warnings import QualityWarning
from pytest_llem.results.statistics import percentile, total_of
from pytest_llem.study.config import ExperimentConfig

#: Maximum number of output tokens (characters if that is unknown) in the file for comparisons between engines.
MAX_OUTPUT_TOKENS = 100_000

#: Maximum number of characters of a request's error that are written or reported. A server's may be a whole page.
MAX_ERROR = 1_000

#: Metrics that are measured before the window.
BEFORE_WINDOW = {"load_seconds", "load_energy_j", "idle_power_w", "model_memory_mb"}

COLUMNS = (
    *("pass", "request", "input_tokens", "output_tokens"),
    *("ttft_ms", "itl_mean_ms", "tpot_ms", "e2e_ms", "queue_ms"),
    *("due_s", "sent_s", "admitted_s", "first_token_s", "last_token_s"),
    "error",
)

#: Reasons for a missing latency of an engine that reports latencies.
_MISSING = {
    "ttft": "the engine reported the first token's time for no request",
    "itl": "no request has a second token with a time",
    "tpot": "no request has a second token with a time",
    "e2e": "the engine reported the last token's time for no request",
    "queue": "the engine does not report when it began to process a request",
}


@dataclass(frozen=True)
class Requests:
    """The requests of a window.

    Attributes:
        passes: For each pass, a record for each prompt, in the prompts' order.
        latency_unknown_reason: Reason why the engine reports no latencies; None if it does.
        sizes: Number of prompts of each batch of a pass, in order; empty if unknown, and a pass then counts as
            one batch.
        numbers: Number of each pass in the window, from 1; empty if all are in ``passes``. In a server's
            ``requests.csv``, passes are phases, and these are their names: ``ramp``, ``window``, …
        too_fast_reason: Reason why no engine can generate these tokens in the time of the passes; None if one can.
        tokens_unknown_reason: Reason why the numbers of output tokens are unknown; None if they are known.
        prompts: Number of prompts of a pass; None if any number of requests is right.
    """

    passes: Sequence[Sequence[RequestRecord]]
    latency_unknown_reason: str | None = None
    sizes: Sequence[int] = ()
    numbers: Sequence[object] = ()
    too_fast_reason: str | None = None
    tokens_unknown_reason: str | None = None
    prompts: int | None = None

    def all(self) -> Iterator[RequestRecord]:
        """Yield every request of every pass."""
        return chain.from_iterable(self.passes)

    def batches(self) -> Iterator[Sequence[RequestRecord]]:
        """Yield the requests of each batch of each pass."""
        for one in self.passes:
            rest = iter(one)
            for size in self.sizes or [len(one)]:
                yield list(islice(rest, size))

    def check(self, config: ExperimentConfig, *, has_limit: bool = True) -> None:
        """Raise if a prompt has no record, or an answer does not have the configured length.

        Args:
            config: The experiment.
            has_limit: Whether ``max_output_tokens`` reaches the engine.

        Raises:
            ValueError: Metrics per token or request would be wrong.
        """
        asked = config.max_output_tokens
        fixed = config.measurement.length_mode == "fixed"
        for one in self.passes:
            if self.prompts is not None and len(one) != self.prompts:
                raise ValueError(f"the engine returned records for {len(one)} of {self.prompts} prompts")
            for request in one:
                given = request.output_tokens
                if (request.input_tokens or 0) < 0 or (given or 0) < 0:
                    raise ValueError(f"the engine reported a negative value: {request}")
                if given is None or not has_limit:
                    continue
                if given > asked or (fixed and given != asked and request.error is None):
                    wanted = f"{'exactly' if fixed else 'at most'} {asked}"
                    hint = " (measurement.length_mode: natural lets it end earlier)" if given < asked else ""
                    raise ValueError(f"the engine generated {given} tokens where {wanted} were asked for{hint}")

    @property
    def input_tokens(self) -> int | None:
        """Input tokens of a pass; None if unknown."""
        return total_of(request.input_tokens for request in self.passes[0])

    @property
    def output_tokens(self) -> float | None:
        """Output tokens of a pass, the mean if passes differ; None if unknown."""
        total = total_of(request.output_tokens for request in self.all())
        return None if total is None else total / len(self.passes)

    @property
    def total(self) -> int:
        """Number of requests of all passes."""
        return sum(map(len, self.passes))

    @property
    def failed(self) -> int:
        """Number of requests of all passes that failed or returned no token."""
        return sum(not request.is_served for request in self.all())

    @property
    def served(self) -> float:
        """Number of answered requests of a pass; the mean if passes differ."""
        return (self.total - self.failed) / len(self.passes)

    @property
    def not_judged(self) -> str | None:
        """Reason why no gate may judge what was measured over these requests; None if one may."""
        return self._failures or self.too_fast_reason

    @property
    def _failures(self) -> str | None:
        """How many requests failed, with the first error; None if none did."""
        if not self.failed:
            return None
        errors = (request.error for request in self.all() if request.error)
        first = next((f": {_one_line(error)}" for error in errors), "")
        return f"{self.failed} of {self.total} requests failed or returned no token{first}"

    def warnings(self) -> Iterator[QualityWarning]:
        """Yield the quality warnings about the requests."""
        for code, reason in (("requests_failed", self._failures), ("impossibly_fast", self.too_fast_reason)):
            if reason is not None:
                yield QualityWarning.of(code, f"{reason}; no gate judges what was measured over them")
        if self.deterministic is False:
            text = (
                "outputs differ between passes with the same seed: kernels are not deterministic, or the engine "
                "ignores the seed"
            )
            yield QualityWarning.of("outputs_differ", text)

    @property
    def deterministic(self) -> bool | None:
        """Whether every pass gave the same outputs; None if that is unknown, as after one pass."""
        by_prompt = [{_output(request) for request in same} for same in zip(*self.passes, strict=False)]
        if any(len(outputs - {None}) > 1 for outputs in by_prompt):
            return False
        return None if len(self.passes) == 1 or any(None in outputs for outputs in by_prompt) else True

    def output_digest(self) -> str | None:
        """Return the SHA-256 of the first pass's output ids, or of its texts; None if one is unknown."""
        outputs = [_output(request) for request in self.passes[0]]
        if None in outputs:
            return None
        text = ";".join(output for output in outputs if output is not None)
        return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()

    def latency_metrics(self) -> dict[str, Metric]:
        """Return TTFT, ITL, TPOT, E2E and queue percentiles over all answered requests of the window, in ms."""
        served = [request for request in self.all() if request.is_served]
        tokens = [request.output_tokens for request in served]
        longer = sum(count is not None and count > 1 for count in tokens)
        gaps: list[float | None] = [gap for request in served for gap in request.itl_s]
        total = total_of(tokens)
        samples: dict[str, tuple[list[float | None], int | None]] = {
            "ttft": ([request.ttft_s for request in served], len(served)),
            "itl": (gaps, None if total is None else total - len(served)),
            "tpot": ([request.tpot_s for request in served], None if total is None else longer),
            "e2e": ([request.e2e_s for request in served], len(served)),
            "queue": ([request.queue_s for request in served], len(served)),
        }
        found = {}
        for kind, (values, expected) in samples.items():
            known = [value for value in values if value is not None]
            is_complete = known and len(known) == expected
            reason = None if is_complete else self._latency_unknown_reason(kind, len(known), expected)
            for p in PERCENTILES:
                name = f"{kind}_p{p}_ms"
                found[name] = _latency(name, known, p) if reason is None else metric(name, None, reason=reason)
        return found

    def _latency_unknown_reason(self, kind: str, given: int, expected: int | None) -> str:
        """Return why there is no latency of a *kind*, if the engine gave only some of the values or none.

        *expected* is None if the number of output tokens is unknown.
        """
        if self.tokens_unknown_reason and kind in ("itl", "tpot"):
            return self.tokens_unknown_reason
        if kind == "queue" and not given:
            return _MISSING[kind]
        if kind == "itl" and any(request.has_joint_tokens for request in self.all()):
            return (
                "several tokens of a request arrived together, so that the time between them is unknown: see tpot"
            )
        if self.latency_unknown_reason or not given:
            return self.latency_unknown_reason or _MISSING[kind]
        if expected is None:
            return "the number of output tokens is unknown"
        return f"the engine reported only {given} of {expected} values, too few for a percentile of all"

    def to_csv(self, began: float | None) -> str:
        """Return the requests as CSV, one line each. A missing value is an empty cell.

        Args:
            began: The time from which times are counted, such as the start of the window, on the clock of the
                requests, in s; None if they are on no common clock.
        """
        return to_csv([COLUMNS, *self._rows(began)])

    def outputs_to_csv(self) -> str:
        """Return the known outputs of the first pass as CSV, up to :data:`MAX_OUTPUT_TOKENS`."""
        rows: list[Sequence[object]] = [("request", "output_ids", "output_text")]
        tokens = 0
        for index, request in enumerate(self.passes[0]):
            if _output(request) is None:
                continue
            tokens += request.output_tokens or len(request.output_text or "")
            if tokens > MAX_OUTPUT_TOKENS:
                break
            rows.append((index, " ".join(map(str, request.output_ids or ())), request.output_text))
        return to_csv(rows)

    def _rows(self, began: float | None) -> Iterator[Sequence[object]]:
        numbers = self.numbers or range(1, 1 + len(self.passes))
        for number, one in zip(numbers, self.passes, strict=True):
            for index, request in enumerate(one):
                itl = statistics.fmean(request.itl_s) if request.itl_s else None
                times = (request.due, request.sent, request.admitted, request.first_token, request.last_token)
                latencies = (request.ttft_s, itl, request.tpot_s, request.e2e_s, request.queue_s)
                yield (
                    number,
                    index,
                    request.input_tokens,
                    request.output_tokens,
                    *(None if s is None else f"{s * 1000:.4f}" for s in latencies),
                    *(None if at is None or began is None else f"{at - began:.6f}" for at in times),
                    None if request.error is None else _one_line(request.error),
                )


def _output(request: RequestRecord) -> str | None:
    """Return a request's output as text: its token ids, separated by commas, or its text; None if unknown.

    That of a failed request is unknown: it may have ended early.
    """
    if not request.is_served:
        return None
    return request.output_text if request.output_ids is None else ",".join(map(str, request.output_ids))


def _one_line(error: str) -> str:
    """Return the beginning of an error, as one line that any file can hold."""
    return " ".join(error[:MAX_ERROR].split()).encode(errors="backslashreplace").decode()


def _latency(name: str, values: Sequence[float], p: int) -> Metric:
    """Return the *p*-th percentile in ms of latencies in s. Gates judge a tail only if a value lies beyond it."""
    not_judged = None
    if p > 50 and len(values) < (wanted := 100 // (100 - p)):
        not_judged = (
            f"percentile {p} of {len(values)} values, and a gate needs {wanted}: "
            "raise n or measurement.min_window_seconds"
        )
    return metric(name, percentile(values, p) * 1000, not_judged=not_judged)
