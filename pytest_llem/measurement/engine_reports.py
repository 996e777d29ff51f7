"""Check an engine's request records against the clock and for consistency."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from pytest_llem.engines.protocol import RequestRecord
from pytest_llem.study.config import ExperimentConfig

#: Maximum number of requests, and of their output tokens, that a window keeps records of; two passes are always
#: kept. They limit memory to some hundred megabytes and accounting to some seconds, whatever engine and window.
MAX_REQUESTS = 50_000
MAX_TOKENS = 5_000_000

#: Largest accepted contradiction between times: an engine may round, or use another clock.
TOLERANCE_S, TOLERANCE = 0.001, 0.01

#: Shortest possible time between two tokens of a sequence, in s: launching one GPU kernel takes longer.
MIN_SECONDS_PER_TOKEN = 1e-6


def recorded_passes(config: ExperimentConfig) -> int:
    """Return the maximum number of passes of a window whose records are kept."""
    return max(2, min(MAX_REQUESTS // config.n, MAX_TOKENS // (config.n * config.max_output_tokens)))


def check_engine_reports(
    passes: Sequence[Sequence[RequestRecord]],
    prompts: Sequence[Sequence[int]],
    positions: float,
    pass_seconds: Sequence[float],
) -> None:
    """Raise if an engine's request records cannot be true.

    Args:
        passes: For each pass, a record for each prompt, in the prompts' order.
        prompts: Token ids of each prompt.
        positions: Input positions of a pass, padding included.
        pass_seconds: Duration of each pass, in s.

    Raises:
        ValueError: The records contradict each other or the clock: metrics computed from them would be wrong.
    """
    if positions < (tokens := sum(map(len, prompts))):
        raise ValueError(f"the engine contradicts its input: it reports {positions} positions for {tokens} tokens")
    for one, seconds in zip(passes, pass_seconds, strict=True):
        for place, (request, prompt) in enumerate(zip(one, prompts, strict=True), 1):
            if (problem := _problem(request, len(prompt), seconds)) is not None:
                raise ValueError(f"the engine contradicts {problem} (request {place} of {len(one)})")


def _problem(request: RequestRecord, input_tokens: int, pass_seconds: float) -> str | None:
    tokens, gaps, first, last = len(request.output_ids), request.itl_s, request.ttft_s, request.e2e_s
    if request.input_tokens != input_tokens:
        return f"its input: it reports {request.input_tokens} input tokens for a prompt of {input_tokens}"
    if gaps and len(gaps) != tokens - 1:
        wanted = max(tokens - 1, 0)
        return f"itself: it reports {len(gaps)} inter-token latencies for {tokens} tokens, and not {wanted}"
    until_last = None if first is None else first + sum(gaps)
    if until_last is not None and last is not None:
        is_whole = tokens > 0 and len(gaps) == tokens - 1
        apart = abs(last - until_last) if is_whole else until_last - last
        if not apart <= TOLERANCE_S + TOLERANCE * last:
            return f"itself: its E2E latency is {_ms(last)}, and its TTFT + ITLs are {_ms(until_last)}"
    for name, claimed in (("E2E latency", last), ("TTFT + ITLs", until_last)):
        if claimed is not None and not claimed <= pass_seconds + TOLERANCE_S + TOLERANCE * pass_seconds:
            return (
                f"the clock: its {name} of {_ms(claimed)} is longer than the pass, which took {_ms(pass_seconds)}"
            )
    return None


def too_fast(passes: Sequence[Sequence[Sequence[RequestRecord]]], pass_seconds: Sequence[float]) -> str | None:
    """Return why no engine can have generated *passes* in that time; None if one can.

    Args:
        passes: For each pass, the records of each batch.
        pass_seconds: Duration of each pass, in s.
    """
    lengths = [[max((len(request.output_ids) for request in batch), default=0) for batch in one] for one in passes]
    tokens, seconds = sum(chain.from_iterable(lengths)), sum(pass_seconds)
    if seconds >= tokens * MIN_SECONDS_PER_TOKEN:
        return None
    return (
        f"{seconds / tokens * 1e6:.2g} µs for each token of a sequence, which no hardware reaches: "
        "the engine returned before its work was done, or did none"
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.4g} ms"
