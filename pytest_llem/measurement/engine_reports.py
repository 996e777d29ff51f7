"""Check an engine's request records against the clock and for consistency."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise

from pytest_llem.engines.protocol import RequestRecord
from pytest_llem.measurement.window import Window
from pytest_llem.study.config import ExperimentConfig

#: Maximum number of requests, and of their output tokens, that a window keeps records of; two passes are always
#: kept. They limit memory to some hundred megabytes and accounting to some seconds, whatever engine and window.
MAX_REQUESTS = 50_000
MAX_TOKENS = 5_000_000

#: Largest accepted contradiction between times, in s: an engine may round.
TOLERANCE_S = 0.001

#: Shortest possible time between two tokens of a sequence, in s: launching one GPU kernel takes longer.
MIN_SECONDS_PER_TOKEN = 1e-6


def recorded_passes(config: ExperimentConfig) -> int:
    """Return the maximum number of passes of a window whose records are kept."""
    return max(2, min(MAX_REQUESTS // config.n, MAX_TOKENS // (config.n * config.max_output_tokens)))


def check_engine_reports(
    passes: Sequence[Sequence[RequestRecord]],
    prompts: Sequence[Sequence[int] | str],
    positions: float | None,
    pass_seconds: Sequence[float],
    window: Window,
) -> None:
    """Raise if an engine's request records cannot be true.

    Args:
        passes: For each pass, a record for each prompt, in the prompts' order.
        prompts: Each prompt.
        positions: Input positions of a pass, padding included; None if unknown.
        pass_seconds: Duration of each pass, in s.
        window: The window that they were measured in.

    Raises:
        ValueError: The records contradict each other or the clock: metrics computed from them would be wrong.
    """
    lengths = [None if isinstance(prompt, str) else len(prompt) for prompt in prompts]
    tokens = sum(length or 0 for length in lengths)
    if positions is not None and positions < tokens:
        raise ValueError(f"the engine contradicts its input: it reports {positions} positions for {tokens} tokens")
    for one, seconds in zip(passes, pass_seconds, strict=True):
        for place, (request, length) in enumerate(zip(one, lengths, strict=True), 1):
            if (problem := _problem(request, length, seconds, window)) is not None:
                raise ValueError(f"the engine contradicts {problem} (request {place} of {len(one)})")


def _problem(request: RequestRecord, input_tokens: int | None, pass_seconds: float, window: Window) -> str | None:
    tokens, times = request.output_tokens, request.token_times
    if input_tokens is not None and request.input_tokens != input_tokens:
        return f"its input: it reports {request.input_tokens} input tokens for a prompt of {input_tokens}"
    if len(times) and len(times) != tokens:
        return f"itself: it reports the times of {len(times)} tokens, and {tokens} tokens"
    for name, reported, place in (("first_token", request.first_token, 0), ("last_token", request.last_token, -1)):
        if len(times) and reported is not None and not (gap := abs(reported - times[place])) <= TOLERANCE_S:
            return f"itself: {name} differs from token_times[{place}] by {_ms(gap)}"
    in_order = (request.sent, request.admitted, request.first_token, *times, request.last_token)
    known = [time for time in in_order if time is not None]
    if not all(after - before >= -TOLERANCE_S for before, after in pairwise(known)):
        return "itself: its times are not in the order sent, admitted, first token, …, last token"
    if known and not (known[0] >= window.began - TOLERANCE_S and known[-1] <= window.ended + TOLERANCE_S):
        first, last = (_ms(time - window.began) for time in (known[0], known[-1]))
        return (
            f"the clock: its times are {first} to {last} after the start of the window, "
            f"which took {_ms(window.seconds)} (they have to be from time.monotonic)"
        )
    if known and not known[-1] - known[0] <= pass_seconds + TOLERANCE_S:
        return f"the clock: its times span {_ms(known[-1] - known[0])}, and the pass took {_ms(pass_seconds)}"
    return None


def too_fast_reason(
    passes: Sequence[Sequence[Sequence[RequestRecord]]], pass_seconds: Sequence[float]
) -> str | None:
    """Return why no engine can have generated *passes* in *pass_seconds*; None if one can.

    Args:
        passes: For each pass, the records of each batch.
        pass_seconds: Duration of each pass, in s.
    """
    lengths = [
        [max((request.output_tokens or 0 for request in batch), default=0) for batch in one] for one in passes
    ]
    tokens, seconds = sum(chain.from_iterable(lengths)), sum(pass_seconds)
    if seconds >= tokens * MIN_SECONDS_PER_TOKEN:
        return None
    return (
        f"{seconds / tokens * 1e6:.2g} µs for each token of a sequence, which no hardware reaches: "
        "the engine returned before its work was done, or did none"
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.4g} ms"
