"""Break identifiers and paths between their words only, and shorten those that are too long."""

from __future__ import annotations

import re
from collections.abc import Iterable

#: Characters of a value of an axis in a label.
MAX_VALUE = 24

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


def short_texts(texts: Iterable[str], max_characters: int = MAX_VALUE) -> dict[str, str]:
    """Return a short text for each of *texts*, without folders that all share and without its middle.

    The short texts differ. If they would not, they are longer.

    Example:
        >>> short_texts(["/srv/models/llama-8b-instruct-int4", "/srv/models/qwen-7b"])
        {'/srv/models/llama-8b-instruct-int4': '…/llama-8b-instruct-int4', '/srv/models/qwen-7b': '…/qwen-7b'}
    """
    given = list(dict.fromkeys(texts))
    shared = 0
    if len(given) > 1 and max(map(len, given)) > max_characters:
        first, last = min(given), max(given)
        same = (n for n, (one, other) in enumerate(zip(first, last, strict=False)) if one != other)
        shared = first[: next(same, len(first))].rfind("/")
    found = {text: f"…{text[shared:]}" if shared > 0 else text for text in given}
    half = max_characters // 2
    short = {
        text: one if len(one) <= max_characters else f"{one[: half - 1]}…{one[-half:]}"
        for text, one in found.items()
    }
    return short if len({*short.values()}) == len(given) else found
