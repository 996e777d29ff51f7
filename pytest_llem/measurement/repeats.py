"""Whether an engine answers a prompt that it has seen before from a cache."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from pytest_llem.measurement.requests import Requests
from pytest_llem.measurement.window import Window
from pytest_llem.results.statistics import percentile

#: First runs are slower than later ones if most take so many times as long, and so many seconds longer. Of fewer
#: than ``FEW``, one that is held up by chance may decide: then it has to be more.
FACTOR, SECONDS = 1.5, 0.001
FEW, FACTOR_OF_FEW, SECONDS_OF_FEW = 5, 3.0, 0.010

#: The slowest tenth of later runs may have been held up.
_LATER = 90


def repeats_are_faster(window: Window, requests: Requests) -> str | None:
    """Return how much faster batches or first tokens are in later passes than in the first; None if they are not.

    The first pass has prompts that the engine has not seen before, and every later one repeats them: an engine
    that keeps answers, or what it has computed of prompts, is measured at looking them up.

    Args:
        window: What was measured.
        requests: Of it.
    """
    pass_seconds = [[seconds] for seconds in window.pass_seconds]
    # One for each batch: of its requests, all are held up if one is.
    first_tokens = [
        statistics.median([request.ttft_s or 0.0 for request in batch]) for batch in requests.batches()
    ]
    number = len(first_tokens) // len(requests.passes)
    ttft = [first_tokens[start : start + number] for start in range(0, len(first_tokens), number)]
    for what, runs in (("a batch", window.call_seconds), ("a pass", pass_seconds), ("a first token", ttft)):
        if (found := _typical(runs)) is not None:
            first, later = found
            return (
                f"{what} took {first * 1000:.4g} ms in the first pass and {later * 1000:.4g} ms in later ones, "
                "which repeat its prompts: the engine may answer them from a cache"
            )
    return None


def _typical(runs: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """Return how long the typical run takes in the first pass, and in later ones, in s; None where that is alike.

    Args:
        runs: For each pass, how long each run took, in s.
    """
    if len(runs) < 2:
        return None
    first, *others = runs
    few = len(first) < FEW
    factor, seconds = (FACTOR_OF_FEW, SECONDS_OF_FEW) if few else (FACTOR, SECONDS)
    later = [percentile([one[place] for one in others], _LATER) for place in range(len(first))]
    slower = [one > factor * again and one - again > seconds for one, again in zip(first, later, strict=True)]
    if 2 * sum(slower) <= len(slower):
        return None
    return statistics.median(first), statistics.median(later)
