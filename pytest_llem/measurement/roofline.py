"""Compute the FLOPs and bytes of a pass, and compare its duration with the roofline of the device."""

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

#: Metrics that need the peaks of the device.
_NEED_PEAKS = ("mfu", "mbu", "roofline_slowdown")

NAMES = ("flops", *_NEED_PEAKS)


@dataclass(frozen=True)
class Step:
    """One forward pass over a batch.

    Attributes:
        flops: FLOPs as :class:`torch.utils.flop_counter.FlopCounterMode` counts them: each token of a prompt
            attends to all tokens of the prompt.
        min_flops: FLOPs that causal attention needs: each token attends to itself and those before it.
        bytes: Bytes to read: all weights, and in decoding the keys and values of the context.
    """

    flops: float
    min_flops: float
    bytes: float


def steps(shape: ModelShape, batch: Sequence[tuple[int, int]]) -> Iterator[Step]:
    """Yield the steps of a batch: prefill, which gives the first tokens, then one step for each further token.

    With a prompt of p tokens, P weights in linear layers, H weights in the head, and A = query heads · head size,
    summed over all layers:

    - prefill: 2·P·p + 2·H + 4·A·p², summed over the prompts; the head is computed for the last position only
    - the step in which a sequence of c tokens, its newest included, gets the next: 2·P + 2·H + 4·A·c

    Padding does not count, nor does any token after a sequence's end.

    Args:
        shape: Sizes of the model from which FLOPs and bytes follow.
        batch: Number of tokens of each prompt, and of its answer.
    """
    flops_per_token = 2 * (shape.parameters + shape.head_parameters)
    flops_per_pair = 4 * shape.attention_width
    kv_bytes = shape.kv_values_per_token * shape.kv_bytes_per_value
    prompts = [tokens for tokens, _ in batch]
    linear = sum(2 * shape.parameters * tokens + 2 * shape.head_parameters for tokens in prompts)
    yield Step(
        flops=linear + flops_per_pair * sum(tokens * tokens for tokens in prompts),
        min_flops=linear + flops_per_pair * sum(tokens * (tokens + 1) / 2 for tokens in prompts),
        bytes=shape.weight_bytes,
    )
    ending: dict[int, list[int]] = {}  # the prompts' lengths, by the number of tokens of their answers
    for tokens, generated in batch:
        ending.setdefault(max(1, generated), []).append(tokens)
    active, prompt_tokens = len(prompts), sum(prompts)
    for generated in range(1, max(ending, default=1)):
        finished = ending.get(generated, [])
        active, prompt_tokens = active - len(finished), prompt_tokens - sum(finished)
        context = prompt_tokens + generated * active
        flops = flops_per_token * active + flops_per_pair * context
        yield Step(flops, flops, shape.weight_bytes + kv_bytes * context)


def roofline_seconds(step: Step, peaks: Peaks, peak_flops: float) -> float:
    """Return the roofline time of *step*, in s: the shortest that a device of *peaks* allows.

    Args:
        step: The forward pass.
        peaks: Peaks of the device.
        peak_flops: The device's peak in the precision in which the model computes, in FLOP/s.
    """
    return max(step.bytes / peaks.bandwidth, step.min_flops / peak_flops)


def work_metrics(engine: Engine, record: EngineRecord, requests: Requests, seconds: float) -> dict[str, Metric]:
    """Return the FLOPs of a pass, its MFU and MBU, and its slowdown against the roofline.

    Args:
        engine: The engine; the metrics need its model's shape.
        record: The engine's record, with its devices.
        requests: Requests of the window.
        seconds: Duration of a pass, in s.
    """
    is_counted = requests.input_tokens is not None and requests.output_tokens is not None
    shape = _shape(engine, requests) if is_counted else "the engine does not report the number of tokens"
    if isinstance(shape, str):
        return {name: metric(name, None, reason=shape) for name in NAMES}
    batches = Counter(
        tuple((one.input_tokens or 0, one.output_tokens or 0) for one in batch) for batch in requests.batches()
    )
    work = [(count / len(requests.passes), list(steps(shape, batch))) for batch, count in batches.items()]

    def of_a_pass(part: Callable[[Step], float]) -> float:
        return sum(share * sum(map(part, one)) for share, one in work)

    flops = of_a_pass(lambda step: step.flops)
    found = {"flops": metric("flops", flops)}

    peaks = _peaks(record)
    if isinstance(peaks, str):
        return found | {name: metric(name, None, reason=peaks) for name in _NEED_PEAKS}
    device, number = record.device_names[0], len(record.device_names)
    peak_flops = peaks.flops.get(shape.precision)
    unknown = f"the {shape.precision} peak of {device} is not known" if peak_flops is None else None
    cached = None
    if shape.weight_bytes <= peaks.cache_bytes:  # then they need not be read from memory in each step
        cached = (
            f"the weights ({shape.weight_bytes / 1e6:.0f} MB) fit the cache of "
            f"{device if number == 1 else f'{number} × {device}'} ({peaks.cache_bytes / 1e6:.0f} MB)"
        )
    fastest = None
    if peak_flops is not None and cached is None:
        fastest = of_a_pass(partial(roofline_seconds, peaks=peaks, peak_flops=peak_flops))
    moved = of_a_pass(lambda step: step.bytes)
    return found | {
        "mfu": metric("mfu", flops / seconds / peak_flops if peak_flops else None, reason=unknown),
        "mbu": metric("mbu", None if cached else moved / seconds / peaks.bandwidth, reason=cached),
        "roofline_slowdown": metric(
            "roofline_slowdown", seconds / fastest if fastest else None, reason=unknown or cached
        ),
    }


def _shape(engine: Engine, requests: Requests) -> ModelShape | str:
    """Return the shape of the engine's model, or why there is none."""
    if not isinstance(engine, SupportsModelShape):
        return "the engine does not report the shape of its model"
    try:
        shape = engine.shape()
    except ShapeUnknownError as error:
        return str(error)
    except Exception as error:  # a third-party engine's bug must not cost the finished measurement
        return f"the engine's shape() failed: {type(error).__name__}: {error}"
    longest = max((one.input_tokens or 0) + (one.output_tokens or 0) for one in requests.all())
    if shape.sliding_window is not None and longest > shape.sliding_window:
        return f"a context of {longest} tokens is longer than the model's sliding window of {shape.sliding_window}"
    return shape


def _peaks(record: EngineRecord) -> Peaks | str:
    if record.device == "cpu":
        return f"the peaks of {cpu_model() or 'this processor'} are not known"
    kinds = sorted(set(record.device_names))
    if len(kinds) != 1:
        return f"the model ran on {' and '.join(kinds) or 'unknown devices'}, whose peaks cannot be added"
    one = peaks_of(kinds[0])
    return f"the peaks of {kinds[0]} are not known" if one is None else one * len(record.device_names)
