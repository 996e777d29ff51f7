"""Write the power samples of a window as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from pytest_llem.energy.protocol import PowerSample

#: Fields of a sample, in the file's order.
FIELDS = ("power_w", "temperature_c", "sm_clock_mhz", "memory_clock_mhz")
COLUMNS = ("seconds", "device", *FIELDS)


def to_csv(samples: Sequence[PowerSample], began: float) -> str:
    """Return the samples as CSV, one line each. A missing value is an empty cell.

    Args:
        samples: Samples in order of time.
        began: Start of the window on the monotonic clock, in s. The column ``seconds`` counts from there.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for sample in samples:
        figures = (getattr(sample, name) for name in FIELDS)
        writer.writerow(
            [f"{sample.at - began:.4f}", sample.device, *("" if one is None else f"{one:g}" for one in figures)]
        )
    return text.getvalue()
