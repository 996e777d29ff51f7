"""Whether something was compiled, as far as that can be seen from outside of an engine."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence

#: A first run has compiled something if it takes so many times as long as later ones, and so many seconds longer:
#: compilers take tenths of a second and more, hiccups of an operating system less.
STALL_FACTOR, STALL_SECONDS = 3.0, 0.1


def compilations() -> int:
    """Return how many graphs ``torch.compile`` has compiled in this process, whoever called it.

    transformers calls it for static caches on GPUs, and some models and attention kernels do. torch is not
    imported for it.
    """
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])


def first_run_stands_out(first: float, later: Sequence[float]) -> bool:
    """Return whether the *first* run of a batch took so much longer than *later* ones that it did something else.

    Args:
        first: In s.
        later: Runs of the same batch, in s; where there are none, nothing is known.
    """
    if not later:
        return False
    typical = statistics.median(later)
    return first > STALL_FACTOR * typical and first - typical > STALL_SECONDS
