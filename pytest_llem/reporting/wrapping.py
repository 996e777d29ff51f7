"""Break identifiers and paths between their words only, so that a reader can still search for each word."""

from __future__ import annotations

import re

#: Before a word: after ``/``, ``_``, ``=`` or ``,``, and after ``.`` or ``-`` if no digit follows, as in numbers.
_BREAKS = re.compile(r"(?<=[/_=,])(?=\w)|(?<=[.-])(?=[^\W\d])")


def pieces(text: str) -> list[str]:
    """Return the pieces of *text* between which a line may be broken.

    Example:
        >>> pieces("batch_size=0.5-model=a/b")
        ['batch_', 'size=', '0.5-', 'model=', 'a/', 'b']
    """
    return _BREAKS.split(text)


def wrapped(text: str, width: int) -> list[str]:
    """Return *text* in lines of at most *width* characters. A single longer word is a line of its own."""
    lines = [""]
    for piece in pieces(text):
        if lines[-1] and len(lines[-1]) + len(piece) > width:
            lines.append("")
        lines[-1] += piece
    return lines
