"""The measured window, and the detection of compilation within it."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pytest_llem.energy.account import Account
from pytest_llem.results.csv_files import to_csv

#: Fields of ``PowerSample`` that are columns of ``power.csv``, and all columns.
POWER_FIELDS = ("power_w", "temperature_c", "sm_clock_mhz", "memory_clock_mhz")
POWER_COLUMNS = ("seconds", "device", *POWER_FIELDS)


@dataclass(frozen=True)
class Window:
    """The measured time span of an experiment, from ``began`` to ``ended``.

    Attributes:
        seconds: Length in s; of several turns, the sum of theirs.
        account: The meters' readings.
        began: Start on the monotonic clock, in s.
        began_at: Start as Unix time, in s.
        compiled: Message about what was compiled in the window, which is then not in the steady state; None if
            no compilation was detected.
        restarts: Number of earlier windows that were discarded because something was compiled in them.
        turns: Windows of the experiment's turns, which this window joins, if candidate and reference are
            interleaved; else empty.
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
        """Number of passes; for a server, the number of answered requests ÷ ``n``."""
        raise NotImplementedError

    @property
    def pass_fields(self) -> dict[str, Any]:
        """Fields about passes in the window's record; ``passes`` is None if the window has no passes."""
        return {"passes": None}

    def power_csv(self) -> str | None:
        """Return the meters' power samples as CSV, one line for each; None if there are no samples.

        Times are in s from ``began``. A missing value is an empty cell.
        """
        if not self.account.samples:
            return None
        rows: list[Sequence[object]] = [POWER_COLUMNS]
        for sample in self.account.samples:
            values = (getattr(sample, name) for name in POWER_FIELDS)
            cells = ("" if value is None else f"{value:g}" for value in values)
            rows.append([f"{sample.at - self.began:.4f}", sample.device, *cells])
        return to_csv(rows)


#: The first run of a batch has compiled something if it takes this many times as long as later runs, and this many
#: seconds longer. Compilers take tenths of a second and more; delays by the operating system are shorter.
STALL_FACTOR, STALL_SECONDS = 3.0, 0.1


def compilations() -> int:
    """Return how many graphs ``torch.compile`` has compiled in this process.

    transformers calls ``torch.compile`` for static caches on GPUs, and so do some models and attention kernels.
    If the engine has not imported torch, nothing was compiled, and torch is not imported here.
    """
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])


def first_run_stands_out(first: float, later: Sequence[float]) -> bool:
    """Return whether the *first* run of a batch was so much slower than *later* runs that it compiled something.

    Args:
        first: Duration of the first run, in s.
        later: Durations of later runs of the same batch, in s; if empty, the result is False.
    """
    if not later:
        return False
    typical = statistics.median(later)
    return first > STALL_FACTOR * typical and first - typical > STALL_SECONDS
