"""The measured window, and the detection of compilation within it."""

from __future__ import annotations

import csv
import io
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pytest_llem.energy.account import Account

#: Fields of a power sample in its CSV file, and the file's columns.
POWER_FIELDS = ("power_w", "temperature_c", "sm_clock_mhz", "memory_clock_mhz")
POWER_COLUMNS = ("seconds", "device", *POWER_FIELDS)


@dataclass(frozen=True)
class Window:
    """A time in which requests are measured: from ``began`` to ``ended``, with the devices synchronised at both.

    Attributes:
        seconds: Length in s.
        account: The meters' readings.
        began: Start on the monotonic clock, in s.
        began_at: Start on the system's clock, in s since 1970.
        compiled: Message about what was compiled in the window, which is then no steady state; None if nothing.
        restarts: Number of earlier windows that were discarded because something was compiled in them.
        turns: The windows that this one was joined from, if it was measured alternately with another experiment.
    """

    seconds: float
    account: Account
    began: float = 0.0
    began_at: float = 0.0
    compiled: str | None = None
    restarts: int = 0
    turns: Sequence[Window] = ()

    @property
    def ended(self) -> float:
        """End on the monotonic clock, in s."""
        return self.turns[-1].ended if self.turns else self.began + self.seconds

    @property
    def count(self) -> float:
        """Number of passes; of a server, answered requests ÷ ``n``."""
        raise NotImplementedError

    @property
    def pass_fields(self) -> dict[str, Any]:
        """Fields of the window's record about passes, if it consists of passes."""
        return {"passes": None}

    def power_csv(self) -> str | None:
        """Return the meters' power samples as CSV, one line each, in s from ``began``; None if there are none.

        A missing value is an empty cell.
        """
        if not self.account.samples:
            return None
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(POWER_COLUMNS)
        for sample in self.account.samples:
            values = (getattr(sample, name) for name in POWER_FIELDS)
            cells = ("" if value is None else f"{value:g}" for value in values)
            writer.writerow([f"{sample.at - self.began:.4f}", sample.device, *cells])
        return text.getvalue()


#: A first run has compiled something if it takes this many times as long as later ones, and this many seconds
#: longer. Compilers take tenths of a second and more; delays by the operating system are shorter.
STALL_FACTOR, STALL_SECONDS = 3.0, 0.1


def compilations() -> int:
    """Return how many graphs ``torch.compile`` has compiled in this process.

    transformers calls it for static caches on GPUs, and so do some models and attention kernels. torch is not
    imported here.
    """
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])


def first_run_stands_out(first: float, later: Sequence[float]) -> bool:
    """Return whether the *first* run of a batch was so much slower than *later* ones that it compiled something.

    Args:
        first: Duration of the first run, in s.
        later: Durations of later runs of the same batch, in s; if empty, the result is False.
    """
    if not later:
        return False
    typical = statistics.median(later)
    return first > STALL_FACTOR * typical and first - typical > STALL_SECONDS
