"""Write GitHub Actions annotations and a step summary for the results of studies.

Annotations are workflow commands: lines on standard output, one per failed or inconclusive gate. The summary is
Markdown, appended to the file that ``GITHUB_STEP_SUMMARY`` names. Outside GitHub Actions nothing is written.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from pytest_llem.gates.matching import named
from pytest_llem.gates.verdict_text import verdict_line, verdict_text
from pytest_llem.reporting.failures import failures, not_completed
from pytest_llem.reporting.terminal.points import points_markdown
from pytest_llem.reporting.text import counted, markdown_row
from pytest_llem.results.points import testbed_of
from pytest_llem.results.study_result import StudyResult, selected_points
from pytest_llem.results.verdicts import ComparisonRecord, GateVerdict
from pytest_llem.study.problems import printable

#: GitHub drops a step summary of more than 1 MiB. Other programs may write to the file before and after this one,
#: so this one writes at most a quarter of that, and leaves some space free.
MAX_BYTES, MAX_OWN_BYTES, SPARE_BYTES = 1 << 20, 1 << 18, 1 << 16

#: GitHub refuses a comment of more than 65,536 characters; a heading and a mark are added to this one.
MAX_COMMENT_BYTES = 60_000

#: Rows of a table, entries of a list, characters of a cell.
MAX_ROWS, MAX_ENTRIES, MAX_CHARACTERS = 200, 20, 300

#: Characters that GitHub's Markdown may read as markup, HTML, mathematics or a link. An underscore within a word
#: and a colon before a space are safe. An address with an @ is linked even if it is escaped, which does no harm.
_MARKUP = re.compile(r"[\\`*{}\[\]<>#|~$&!^]|(?<![^\W_])_|_(?![^\W_])|:(?! )|(?<=\bwww)\.", re.IGNORECASE)


def workflow_commands(verdicts: Iterable[GateVerdict], root: Path, environ: Mapping[str, str]) -> list[str]:
    """Return a workflow command for each failed or inconclusive gate, with the file and line of the gate.

    Text is escaped as ``@actions/core`` does: ``%``, CR and LF everywhere, and ``:`` and ``,`` in properties.

    Args:
        verdicts: The verdicts of all gates.
        root: The directory that the verdicts' file names are relative to.
        environ: The environment variables.
    """
    if environ.get("GITHUB_ACTIONS") != "true":
        return []
    lines = []
    for verdict in verdicts:
        if (level := _level(verdict)) is not None:
            properties = {**_place(verdict, root, environ), "title": f"{verdict.gate}[{verdict.id}]"}
            listed = ",".join(f"{name}={_property(value)}" for name, value in properties.items())
            lines.append(f"::{level} {listed}::{_data(verdict_line(verdict))}")
    return lines


def write_summary(results: Sequence[StudyResult], environ: Mapping[str, str]) -> str | None:
    """Append *results* to the step summary, and return an error message, or None if there was no error.

    Args:
        results: The result of each study.
        environ: The environment variables.
    """
    file = environ.get("GITHUB_STEP_SUMMARY")
    if environ.get("GITHUB_ACTIONS") != "true" or not file or not results:
        return None
    try:
        with Path(file).open("ab") as summary:
            available = min(MAX_OWN_BYTES, MAX_BYTES - SPARE_BYTES - summary.seek(0, os.SEEK_END))
            summary.write(_truncated(_page(results), available))
    except OSError as error:
        return f"the GitHub step summary could not be written: {error}"
    return None


def summary_markdown(results: Mapping[str, StudyResult], unread: Sequence[str] = ()) -> str:
    """Return the summary of several results as Markdown for a comment, the failed ones first.

    Args:
        results: The results, by a name such as their folder.
        unread: Messages on results that could not be read.
    """
    ordered = sorted(results.items(), key=lambda one: not _has_failed(one[1]))
    found = [f"- not read: {escaped(one)}" for one in unread[:MAX_ENTRIES]]
    if len(ordered) > 1:
        rows = [
            (escaped(name), escaped(one.name), _testbed(one), _done(one), _verdicts(one)) for name, one in ordered
        ]
        found += ["", *_table(("results", "study", "testbed", "experiments", "gates"), rows, "result")]
    return _truncated([*found, *_page([one for _, one in ordered])], MAX_COMMENT_BYTES).decode().lstrip("\n")


def _has_failed(result: StudyResult) -> bool:
    missing = result.comparison is not None and bool(result.comparison.missing_points)
    outcomes = {one.outcome for point in result.points for one in point.verdicts}
    return missing or result.summary.failed > 0 or "failed" in outcomes or result.status != "completed"


def _testbed(result: StudyResult) -> str:
    testbed = testbed_of(result.points)
    return "-" if testbed is None else escaped(testbed.key)


def _done(result: StudyResult) -> str:
    summary, status = result.summary, "" if result.status == "completed" else f", {result.status}"
    failed = f", **{summary.failed} failed**" if summary.failed else ""
    return f"{summary.completed} of {summary.total}{failed}{status}"


def _verdicts(result: StudyResult) -> str:
    """Return the numbers of verdicts, failed ones first and in bold."""
    count: Counter[tuple[bool, str]] = Counter(
        (one.outcome != "failed", one.verdict) for point in result.points for one in point.verdicts
    )
    if result.comparison is not None and (missing := result.comparison.missing_points):
        count[False, "missing points"] = len(missing)
    texts = [f"{n} {word}" if passed else f"**{n} {word}**" for (passed, word), n in sorted(count.items())]
    return ", ".join(texts) or "-"


def escaped(text: str) -> str:
    """Return *text* on one line, escaped so that GitHub's Markdown shows it literally, also in a table cell."""
    text = printable(" ".join(text.split()))
    if len(text) > MAX_CHARACTERS:
        text = f"{text[:MAX_CHARACTERS]}…"
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", text)


def _level(verdict: GateVerdict) -> str | None:
    """Return the level of a gate's annotation; None for no annotation."""
    if verdict.outcome == "failed":
        return "error"
    return "warning" if verdict.verdict == "INCONCLUSIVE" else None


def _place(verdict: GateVerdict, root: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the file and line of a gate as annotation properties; empty if the file is outside the checkout."""
    if verdict.file is None:
        return {}
    workspace = Path(environ.get("GITHUB_WORKSPACE") or root)
    path = Path(os.path.realpath(root / verdict.file))
    try:
        inside = path.relative_to(os.path.realpath(workspace))
    except ValueError:  # GitHub resolves the name in the checkout, where this file is not
        return {}
    return {"file": inside.as_posix(), **({"line": str(verdict.line)} if verdict.line else {})}


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def _truncated(lines: Iterable[str], available: int) -> bytes:
    """Return the first *lines* that fit into *available* bytes, and a note at the end if some did not fit."""
    last = "\n… more in study_result.json\n".encode()
    fitting: list[bytes] = []
    size = 0
    for line in lines:
        encoded = f"{line}\n".encode(errors="replace")
        size += len(encoded)
        if size + len(last) > available:
            return b"".join([*fitting, last]) if len(last) <= available else b""
        fitting.append(encoded)
    return b"".join(fitting)


def _page(results: Sequence[StudyResult]) -> Iterator[str]:
    for result in results:
        yield f"\n### llem: {escaped(result.name)}\n"
        summary = result.summary
        others = "".join(f", {number} {what}" for what, number in not_completed(result).items())
        yield f"{summary.completed} of {counted(summary.total, 'experiment')} completed{others}\n"
        if result.comparison is not None:
            yield from _comparison(result.comparison)
        yield from _gates([verdict for point in result.points for verdict in point.verdicts])
        yield from _points(result)
        yield from _list("warning", [str(one) for one in result.warnings if one.severity != "note"])
        yield from _list("note", [str(one) for one in result.warnings if one.severity == "note"])
        errors = [one for one in failures(result.experiments) if one.expected is None]
        yield from _list("failed", [f"{named(one.ids)}: {one.error.kind}: {one.error.message}" for one in errors])


def _comparison(record: ComparisonRecord) -> Iterator[str]:
    yield from _list("workload differs", record.workload)
    paired = ", interleaved" if record.paired else ""
    family = counted(record.family, "gate")
    yield f"Compared with {escaped(record.reference)}{paired}; alpha {record.alpha:g}, Holm over {family}.\n"
    mismatch = "differs, compared despite mismatch" if record.compared_despite_mismatch else "differs"
    yield from _list(mismatch, record.testbed)
    yield from _list("note", record.warnings)
    yield from _list("missing", record.missing_points)
    yield from _list("new", record.new_points)


def _gates(verdicts: Sequence[GateVerdict]) -> Iterator[str]:
    """Yield the table of gates, failed gates first."""
    order = {"error": 0, "warning": 1, None: 2}
    rows = [
        (
            f"**{verdict.verdict}**" if _level(verdict) == "error" else verdict.verdict,
            escaped(f"{verdict.gate} {verdict.metric}"),
            escaped(verdict.point),
            escaped(verdict_text(verdict)),
            verdict.method or "-",
        )
        for verdict in sorted(verdicts, key=lambda one: order[_level(one)])
    ]
    if rows:
        yield from _table(("verdict", "gate", "point", "result", "energy method"), rows, "gate")


def _points(result: StudyResult) -> Iterator[str]:
    points, planned = selected_points(result)
    if points:
        yield from points_markdown(points, planned, escaped, MAX_ROWS)
        yield from _left_out(len(points) - MAX_ROWS, "point")
        yield ""


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], what: str) -> Iterator[str]:
    for row in (headings, ["---"] * len(headings), *rows[:MAX_ROWS]):
        yield markdown_row(row)
    yield from _left_out(len(rows) - MAX_ROWS, what)
    yield ""


def _list(what: str, texts: Sequence[str]) -> Iterator[str]:
    for text in texts[:MAX_ENTRIES]:
        yield f"- {what}: {escaped(text)}"
    yield from _left_out(len(texts) - MAX_ENTRIES, what)
    if texts:
        yield ""


def _left_out(count: int, what: str) -> Iterator[str]:
    if count > 0:
        yield f"\n… {count:,} more ({what}) in study_result.json"
