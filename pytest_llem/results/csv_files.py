"""Write and read CSV text whose cells may hold anything, such as the answer of a model."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Iterator
from types import SimpleNamespace

# An answer is one cell, and csv refuses to read cells of more than 131,072 characters otherwise.
csv.field_size_limit(sys.maxsize)


def to_csv(rows: Iterable[Iterable[object]]) -> str:
    r"""Return *rows* as CSV text, a line each; a cell that is None is empty.

    Example:
        >>> to_csv([("request", "output_text"), (0, "one\rtwo"), (1, None)])
        'request,output_text\n0,"one\rtwo"\n1,\n'
    """
    lines: list[str] = []
    # csv quotes the characters of its line end only. Until Python 3.13, others that end a line are left unquoted.
    csv.writer(SimpleNamespace(write=lines.append), lineterminator="\r\n").writerows(rows)
    return "".join(f"{line[:-2]}\n" for line in lines)


def read_csv(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    r"""Yield the rows of CSV text by column.

    Args:
        lines: A file that was opened with ``newline=""``, or lines with their ends.

    Raises:
        csv.Error: It is not CSV.

    Example:
        >>> [*read_csv(["request,output_text\n", '0,"one\rtwo"\n'])]
        [{'request': '0', 'output_text': 'one\rtwo'}]
    """
    return csv.DictReader(lines)
