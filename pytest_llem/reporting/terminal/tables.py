"""Tables for the terminal, and their main columns."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

#: Columns of a table of points: metric, heading.
Columns = Sequence[tuple[str, str]]

#: Main columns of a table of points.
COLUMNS: Columns = (
    ("output_tokens_per_second", "out tok/s"),
    ("ttft_p50_ms", "TTFT p50\nms"),
    ("energy_per_output_token_j", "J/out token"),
)


def plain_table() -> Table:
    """Return a table without edges, and without lines if the encoding of standard output cannot draw them."""
    drawable = (sys.stdout.encoding or "").lower().startswith("utf")
    return Table(box=box.SIMPLE_HEAD if drawable else None, pad_edge=False, show_edge=False)


def render(table: Table, width: int) -> list[str]:
    """Return the lines of *table*, without colours, at most *width* characters wide."""
    console = table_console(width)
    with console.capture() as text:
        console.print(table)
    return [line.rstrip() for line in text.get().splitlines()]


def table_console(width: int) -> Console:
    """Return a console of *width* characters for laying out tables.

    It is not a terminal, because rich assumes a width of 80 for a terminal with ``TERM=dumb``.
    """
    return Console(
        file=io.StringIO(), width=width, force_terminal=False, color_system=None, emoji=False, markup=False
    )
