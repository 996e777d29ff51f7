"""Lines that fit the terminal."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator


def fitted(lines: Iterable[str]) -> Iterator[str]:
    """Yield *lines*; if standard output is a terminal, those that are too long for it are broken between words.

    Elsewhere, as in the log of a CI job, a line stays whole, so that it can be searched.
    """
    width = shutil.get_terminal_size().columns
    for line in lines:
        if len(line) <= width or not sys.stdout.isatty():
            yield line
        else:
            indent = " " * (len(line) - len(line.lstrip()) + 2)
            yield from textwrap.wrap(
                line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
            )
