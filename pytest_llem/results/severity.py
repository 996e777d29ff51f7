"""How bad what a reader is warned of is: a terminal shows the worst, and not all."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

#: How sentences begin, worst first. What is not among them comes where the empty one is.
_WORST_FIRST = [
    re.compile(beginning)
    for beginning in (
        r"\d+ of \d+ requests failed",
        r"\S+ µs for each token",
        "energy counter and sampled power disagree",
        "no energy",
        "the engine ran on",
        "setting ",
        "contended",
        "code was edited",
        "throttled",
        "the (prefill )?window holds",
        "times_floor",
        "warm-up stopped",
        "drift",
        "host-bound",
        "temperature",
        "the gap ended",
        "outputs differ",
        "energy counter of",
        "$",
        "meter ",
        "energy is estimated",
        r"\d+ of \d+ prompts were cut",
        "random weights",
    )
]
_OTHERS = next(place for place, beginning in enumerate(_WORST_FIRST) if beginning.match(""))


def severity(warning: str) -> int:
    """Return the place of *warning* among others: 0 is the worst."""
    places = (place for place, beginning in enumerate(_WORST_FIRST) if beginning.match(warning))
    return next(places, _OTHERS)


def worst(warnings: Sequence[str], most: int) -> list[str]:
    """Return *most* of *warnings*, in their order: the worst, and a second one of a kind only where there are no
    more kinds. Forty experiments that were each throttled for another time must not hide a warm-up that did not
    settle.
    """
    seen: defaultdict[int | str, int] = defaultdict(int)
    ranks = []
    for place, warning in enumerate(warnings):
        kind = severity(warning)
        alike = warning if kind == _OTHERS else kind
        ranks.append((seen[alike], kind, place))
        seen[alike] += 1
    return [warnings[place] for place in sorted(place for _, _, place in sorted(ranks)[:most])]
