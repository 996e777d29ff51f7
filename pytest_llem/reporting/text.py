"""Texts of figures, numbers, identifiers and paths, for the terminal, pages and Markdown."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pytest_llem.results.manifest_records import ErrorRecord, ManifestEntry
from pytest_llem.results.statistics import Summary
from pytest_llem.results.study_result import StudyResult

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
    """Return the half-width of a mean's interval in percent, ``±24%``; an empty text if it has none."""
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


@dataclass(frozen=True)
class Failure:
    """Experiments that failed with the same error.

    Attributes:
        ids: Ids of the experiments.
        error: The error of the first experiment.
        expected: Why the experiments were expected to fail; None if they were not.
    """

    ids: list[str]
    error: ErrorRecord
    expected: str | None


def failures(entries: Iterable[ManifestEntry]) -> list[Failure]:
    """Return the distinct errors, each with the experiments that it occurred in."""
    found: dict[tuple[Any, ...], Failure] = {}
    for entry in entries:
        if entry.error is None or entry.status not in ("failed", "skipped"):
            continue
        error, expected = entry.error, entry.reason if entry.status == "skipped" else None
        key = (error.kind, error.type, error.phase, error.message, expected)
        found.setdefault(key, Failure([], error, expected)).ids.append(entry.experiment_id)
    return list(found.values())


def not_completed(result: StudyResult) -> dict[str, int]:
    """Return how many experiments failed, were skipped and did not run, by these words and without zeros."""
    statuses = Counter(entry.status for entry in result.experiments)
    left = statuses["pending"] + statuses["running"]
    numbers = {"failed": result.summary.failed, "skipped": statuses["skipped"], "not run": left}
    return {what: number for what, number in numbers.items() if number}
