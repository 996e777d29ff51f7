"""How figures and tables are written, wherever they are shown."""

from __future__ import annotations

import io
import sys

from rich import box
from rich.console import Console
from rich.table import Table

from pytest_llem.results.statistics import Summary

#: Metric, heading.
COLUMNS = (
    ("output_tokens_per_second", "out tok/s"),
    ("ttft_p50_ms", "TTFT p50\nms"),
    ("energy_per_output_token_j", "J/out token"),
)


def figure(summary: Summary) -> str:
    """Return a mean to three digits, with the half-width of its interval in percent where there is one."""
    if summary.mean is None:
        return "-"
    text = number(summary.mean)
    if summary.ci95 is None or not summary.mean:
        return text
    half = (summary.ci95[1] - summary.ci95[0]) / 2 / abs(summary.mean)
    return f"{text} ±{half:.0%}" if half >= 0.1 else f"{text} ±{half:.1%}"


def number(value: float) -> str:
    """Return *value* to three digits, or to the unit where it has more."""
    return f"{value:#.3g}".rstrip(".") if abs(value) < 1000 else f"{value:,.0f}"


def plain_table() -> Table:
    """Return a table without edges; without lines, too, where the terminal could not draw them."""
    drawable = (sys.stdout.encoding or "").lower().startswith("utf")
    return Table(box=box.SIMPLE_HEAD if drawable else None, pad_edge=False, show_edge=False)


def render(table: Table, width: int) -> list[str]:
    """Return the lines of *table*, without colours, at most *width* characters wide."""
    console = paper(width)
    with console.capture() as text:
        console.print(table)
    return [line.rstrip() for line in text.get().splitlines()]


def paper(width: int) -> Console:
    """Return what tables are laid out on: no terminal, since rich takes one of ``TERM=dumb`` for 80 wide."""
    return Console(
        file=io.StringIO(), width=width, force_terminal=False, color_system=None, emoji=False, markup=False
    )
