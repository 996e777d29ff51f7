"""Check what an engine reports: its request records against the clock, and its settings against the study's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, pairwise
from typing import Any

from pytest_llem.engines.protocol import RequestRecord
from pytest_llem.measurement.requests import Requests
from pytest_llem.measurement.window import Window
from pytest_llem.results.experiment import AdjustedSetting, EngineRecord
from pytest_llem.study.config import DATA_TYPES, ExperimentConfig
from pytest_llem.study.effects import given_value, without_effect

#: Maximum number of requests, and of their output tokens, that a window keeps records of; two passes are always
#: kept. They limit memory to some hundred megabytes and accounting to some seconds, whatever engine and window.
MAX_REQUESTS = 50_000
MAX_TOKENS = 5_000_000

#: Largest accepted contradiction between times, in s: an engine may round.
TOLERANCE_S = 0.001

#: Shortest possible time between two tokens of a sequence, in s: launching one GPU kernel takes longer.
MIN_SECONDS_PER_TOKEN = 1e-6


def recorded_passes(config: ExperimentConfig) -> int:
    """Return the maximum number of passes whose records are kept, of a window or of each turn."""
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


#: Sections that a study may switch off: their settings then have no effect, which is reported only if the
#: setting is an axis.
SWITCHES = ("warmup", "baseline")

#: Values of ``precision`` by the names of data types that engines report.
_PRECISIONS = {"half": "fp16"} | {name: precision for precision, name in DATA_TYPES.items()}


def adjusted_settings(
    config: ExperimentConfig, axes: Mapping[str, Any], engine: EngineRecord, requests: Requests, graphs: int
) -> list[AdjustedSetting]:
    """Return the settings of an experiment that did not run as they were given.

    Args:
        config: The experiment.
        axes: The point's values by axis. A token limit that was not reached is reported only if it is an axis.
        engine: The engine's record, with the settings that it adjusted itself.
        requests: Requests of the window.
        graphs: Number of graphs that ``torch.compile`` has compiled in this process.
    """
    ineffective = [
        AdjustedSetting(
            setting=setting,
            given=given_value(config, path),
            reason=message.removeprefix("has no effect").lstrip(": "),
        )
        for path, message in without_effect(config)
        if (setting := ".".join(map(str, path))) in axes or path[0] not in SWITCHES
    ]
    return [
        *ineffective,
        *engine.adjusted,
        *_data_type(config, engine),
        *_compilation(config, engine, graphs),
        *_batches(config, requests),
        *_limits(config, axes, requests),
    ]


def _data_type(config: ExperimentConfig, engine: EngineRecord) -> Iterator[AdjustedSetting]:
    """Yield ``precision`` if the engine's settings contain a ``dtype`` of another precision."""
    effective = _PRECISIONS.get(str(engine.settings.get("dtype")).removeprefix("torch."))
    known = {one.setting for one in engine.adjusted}
    if effective not in (None, config.precision) and "precision" not in known:
        yield AdjustedSetting(
            setting="precision",
            given=config.precision,
            effective=effective,
            reason="the engine reports this dtype",
        )


def _compilation(config: ExperimentConfig, engine: EngineRecord, graphs: int) -> Iterator[AdjustedSetting]:
    """Yield ``torch_compile`` if nothing was compiled: torch then runs the model uncompiled without a warning."""
    if engine.settings.get("torch_compile") and not graphs:
        yield AdjustedSetting(
            setting=f"{config.backend}.torch_compile",
            given=True,
            reason="torch.compile compiled nothing; unset TORCH_COMPILE_DISABLE and TORCHDYNAMO_DISABLE",
        )


def _batches(config: ExperimentConfig, requests: Requests) -> Iterator[AdjustedSetting]:
    """Yield the batch size if the largest batch had another."""
    given, largest = config.engine_section.get("batch_size"), max(requests.sizes, default=None)
    if isinstance(given, int) and largest is not None and largest != given:
        yield AdjustedSetting(
            setting=f"{config.backend}.batch_size",
            given=given,
            effective=largest,
            reason="this is the largest batch of a pass",
        )


def _limits(config: ExperimentConfig, axes: Mapping[str, Any], requests: Requests) -> Iterator[AdjustedSetting]:
    """Yield the token limits that are an axis and were not reached."""
    longest = {
        "max_input_tokens": ([one.input_tokens for one in requests.all()], "no prompt is longer"),
        "max_output_tokens": ([one.output_tokens for one in requests.all()], "every answer ended before"),
    }
    for name, (counts, reason) in longest.items():
        tokens = max((count for count in counts if count is not None), default=None)
        if name in axes and tokens is not None and tokens < (given := getattr(config, name)):
            yield AdjustedSetting(setting=name, given=given, effective=tokens, reason=reason)
