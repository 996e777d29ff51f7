"""Texts of figures, numbers, identifiers and paths, for the terminal, pages and Markdown."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

from pytest_llem.results.statistics import Summary

#: Characters of a value of an axis in a label.
MAX_VALUE_CHARACTERS = 24

#: Where a line may be broken, before a word: after ``/``, ``_``, ``=`` or ``,``, and after ``.`` or ``-`` if no
#: digit follows, as in numbers.
_BREAKS = re.compile(r"(?<=[/_=,])(?=\w)|(?<=[.-])(?=[^\W\d])")

#: Characters that Markdown may read as markup.
_SPECIAL = re.compile(r"([\\`*_\[\]~|#])")


def number(value: float) -> str:
    """Return *value* to three significant digits, or as a whole number from 1000 on."""
    return f"{value:#.3g}".rstrip(".") if abs(value) < 999.5 else f"{value:,.0f}"


def mean_text(summary: Summary) -> str:
    """Return a mean to three significant digits, with the half-width of its interval in percent if it has one."""
    if summary.mean is None:
        return "-"
    return " ".join(filter(None, (number(summary.mean), interval_text(summary))))


def interval_text(summary: Summary) -> str:
    """Return the half-width of a mean's interval in percent, ``±24%``; empty if it has none or is 0."""
    if summary.ci95 is None or not summary.mean:
        return ""
    half = (summary.ci95[1] - summary.ci95[0]) / 2 / abs(summary.mean)
    return f"±{half:.0%}" if half >= 0.1 else f"±{half:.1%}"


def counted(n: int, noun: str) -> str:
    """Return ``1 point`` or ``2 points``."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


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


def short_texts(texts: Iterable[str]) -> dict[str, str]:
    """Return a short text for each of *texts*, without folders that all share and without its middle.

    The middle is kept if two short texts would be equal without it.

    Example:
        >>> short_texts(["/srv/models/llama-8b-instruct-int4", "/srv/models/qwen-7b"])
        {'/srv/models/llama-8b-instruct-int4': '…/llama-8b-instruct-int4', '/srv/models/qwen-7b': '…/qwen-7b'}
    """
    given = list(dict.fromkeys(texts))
    shared = 0
    if len(given) > 1 and max(map(len, given)) > MAX_VALUE_CHARACTERS:
        first, last = min(given), max(given)
        differing = (n for n, (one, other) in enumerate(zip(first, last, strict=False)) if one != other)
        shared = first[: next(differing, len(first))].rfind("/")
    found = {text: f"…{text[shared:]}" if shared > 0 else text for text in given}
    half = MAX_VALUE_CHARACTERS // 2
    short = {
        text: one if len(one) <= MAX_VALUE_CHARACTERS else f"{one[: half - 1]}…{one[-half:]}"
        for text, one in found.items()
    }
    return short if len({*short.values()}) == len(given) else found


def escaped(text: str) -> str:
    """Return *text* escaped, so that Markdown shows it literally, also in a table cell."""
    return _SPECIAL.sub(r"\\\1", html.escape(" ".join(text.split()), quote=False))


def markdown_row(cells: Iterable[str]) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"
