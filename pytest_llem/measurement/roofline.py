"""What a pass computes and reads, and the least time that a device's peaks allow for it: the roofline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from pytest_llem.engines.protocol import Engine, ModelShape, ShapeUnknownError, SupportsModelShape
from pytest_llem.hardware.peaks import Peaks, peaks_of
from pytest_llem.measurement.requests import Requests
from pytest_llem.results.environment import cpu_model
from pytest_llem.results.experiment import EngineRecord
from pytest_llem.results.metrics import Metric, metric

NAMES = ("flops", "mfu", "mbu", "roofline_slowdown")


@dataclass(frozen=True)
class Step:
    """One forward pass over a batch.

    Attributes:
        flops: As :class:`torch.utils.flop_counter.FlopCounterMode` counts them: in attention, all of a prompt's
            tokens with all of them.
        least_flops: Those that cannot be left out: a token attends to itself and what is before it.
        bytes: What has to be read: all weights, and in decoding keys and values of the context.
    """

    flops: float
    least_flops: float
    bytes: float


def steps(shape: ModelShape, batch: Sequence[tuple[int, int]]) -> Iterator[Step]:
    """Yield what a batch takes: prefill, which gives the first tokens, then a step for each further token.

    With a prompt of p tokens, P weights in linear layers, H in the head, A query heads · head size over layers:

    - prefill: 2·P·p + 2·H + 4·A·p², summed over the prompts; the head is computed for the last position only
    - the step in which a sequence of c tokens, its newest included, gets the next: 2·P + 2·H + 4·A·c

    Padding is none of it, nor is anything after a sequence's end.

    Args:
        shape: The model's.
        batch: Tokens of each prompt, and of its answer.
    """
    token = 2 * (shape.parameters + shape.head_parameters)
    pair = 4 * shape.attention_width
    kept = shape.kv_values_per_token * shape.kv_bytes_per_value
    prompts = [tokens for tokens, _ in batch]
    linear = sum(2 * shape.parameters * tokens + 2 * shape.head_parameters for tokens in prompts)
    yield Step(
        flops=linear + pair * sum(tokens * tokens for tokens in prompts),
        least_flops=linear + pair * sum(tokens * (tokens + 1) / 2 for tokens in prompts),
        bytes=shape.weight_bytes,
    )
    ending: dict[int, list[int]] = {}
    for tokens, generated in batch:
        ending.setdefault(max(1, generated), []).append(tokens)
    active, prompt_tokens = len(prompts), sum(prompts)
    for number in range(1, max(ending, default=1)):
        gone = ending.get(number, [])  # they have their last token
        active, prompt_tokens = active - len(gone), prompt_tokens - sum(gone)
        context = prompt_tokens + number * active
        flops = token * active + pair * context
        yield Step(flops, flops, shape.weight_bytes + kept * context)


def seconds_at_least(step: Step, peaks: Peaks, flops: float) -> float:
    """Return the least time of *step*, in s, on a device of *peaks*, with *flops* operations a second."""
    return max(step.bytes / peaks.bandwidth, step.least_flops / flops)


def work_metrics(engine: Engine, record: EngineRecord, requests: Requests, seconds: float) -> dict[str, Metric]:
    """Return what a pass takes, and how near to the device's limits it came.

    Args:
        engine: What ran; it may tell its model's shape.
        record: What it is, and on which devices.
        requests: Of the window.
        seconds: Of a pass.
    """
    shape = _shape(engine, requests)
    if isinstance(shape, str):
        return {name: metric(name, None, reason=shape) for name in NAMES}
    alike = Counter(
        tuple((one.input_tokens, len(one.output_ids)) for one in batch) for batch in requests.batches()
    )
    work = [(count / len(requests.passes), list(steps(shape, batch))) for batch, count in alike.items()]

    def of_a_pass(part: Callable[[Step], float]) -> float:
        return sum(share * sum(map(part, one)) for share, one in work)

    flops = of_a_pass(lambda step: step.flops)
    found = {"flops": metric("flops", flops)}

    peaks = _peaks(record)
    if isinstance(peaks, str):
        return found | {name: metric(name, None, reason=peaks) for name in NAMES[1:]}
    rate = peaks.flops.get(shape.precision)
    unknown = f"no peak of {shape.precision} is known of {record.device_names[0]}" if rate is None else None
    cached = None
    if shape.weight_bytes <= peaks.cache_bytes:
        cached = (
            f"the weights ({shape.weight_bytes / 1e6:.0f} MB) fit the cache of {record.device_names[0]} "
            f"({peaks.cache_bytes / 1e6:.0f} MB)"
        )
    floor = None
    if rate is not None and cached is None:
        floor = of_a_pass(partial(seconds_at_least, peaks=peaks, flops=rate))
    moved = of_a_pass(lambda step: step.bytes)
    return found | {
        "mfu": metric("mfu", flops / seconds / rate if rate else None, reason=unknown),
        "mbu": metric("mbu", None if cached else moved / seconds / peaks.bandwidth, reason=cached),
        "roofline_slowdown": metric(
            "roofline_slowdown", seconds / floor if floor else None, reason=unknown or cached
        ),
    }


def _shape(engine: Engine, requests: Requests) -> ModelShape | str:
    """Return the shape of the engine's model, or why nothing can be said."""
    if not isinstance(engine, SupportsModelShape):
        return "the engine does not tell the shape of its model"
    try:
        shape = engine.shape()
    except ShapeUnknownError as error:
        return str(error)
    except Exception as error:  # an engine is anyone's code, and the measurement is done
        return f"the engine cannot tell the shape of its model: {type(error).__name__}: {error}"
    longest = max(one.input_tokens + len(one.output_ids) for batch in requests.passes for one in batch)
    if shape.window is not None and longest > shape.window:
        return f"a context of {longest} tokens is longer than the model's sliding window of {shape.window}"
    return shape


def _peaks(record: EngineRecord) -> Peaks | str:
    if record.device == "cpu":
        return f"no peak is known of {cpu_model() or 'this processor'}"
    if len(record.device_names) != 1:
        return f"the model ran on {len(record.device_names)} devices"
    return peaks_of(record.device_names[0]) or f"no peak is known of {record.device_names[0]}"
