"""The file that keeps what was sampled during the window."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from pytest_llem.energy.protocol import PowerSample

#: Figures of a sample, in the file's order.
FIGURES = ("power_w", "temperature_c", "sm_clock_mhz", "memory_clock_mhz")
COLUMNS = ("seconds", "device", *FIGURES)


def to_csv(samples: Sequence[PowerSample], began: float) -> str:
    """Return one line a sample; an absent figure is an empty cell.

    Args:
        samples: In order of time.
        began: When the window began, on the monotonic clock in s; ``seconds`` count from there.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for sample in samples:
        figures = (getattr(sample, name) for name in FIGURES)
        writer.writerow(
            [f"{sample.at - began:.4f}", sample.device, *("" if one is None else f"{one:g}" for one in figures)]
        )
    return text.getvalue()
