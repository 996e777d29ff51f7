"""Format a comparison as a terminal table, as Markdown and as JSON."""

from __future__ import annotations

import json
import math
import textwrap
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

from pytest_llem.gates.associations import DIFFERENT
from pytest_llem.gates.matching import named
from pytest_llem.gates.regression import Comparison
from pytest_llem.gates.verdict_text import indirect_method, percent
from pytest_llem.reporting.terminal.tables import plain_table, render
from pytest_llem.reporting.text import counted, escaped, markdown_row, number, wrapped
from pytest_llem.results.document import SCHEMA_VERSION
from pytest_llem.results.verdicts import GateVerdict
from pytest_llem.study.problems import printable

#: Rows of a table. If there are more verdicts, the table has the worst.
MAX_ROWS = 60

#: Lines of one kind below the table.
MAX_LINES = 8

#: Verdicts, worst first.
_ORDER = ("REGRESSION", "NOT JUDGED", "INCONCLUSIVE", "IMPROVEMENT", "SAME")

_COLUMNS = ("reference", "candidate", "ratio", "interval", "n", "verdict")

#: Alignment of the columns in Markdown: point, metric, :data:`_COLUMNS`, and what moved.
_ALIGNMENT = (":--", ":--", *["--:"] * 5, ":--", ":--")

#: Headings for a terminal, where reference and candidate share a column.
_HEADINGS = ("metric", "reference\n→ candidate", "ratio", "interval", "n", "verdict")

#: Characters of the widest possible row.
_MAX_WIDTH = 120

#: Spaces before the lines below a point's id.
_INDENT = "  "


def lines(comparison: Comparison, width: int, counting: Collection[str] | None = None) -> list[str]:
    """Return the table of a comparison by point, worst verdicts first, with its notes and outcome below.

    Args:
        comparison: The comparison.
        width: Width of the terminal in characters.
        counting: Ids of the gates that can fail the run; None for all. Other gates only enlarge the Holm family.
    """
    rows, left_out = _rows(comparison)
    found = [*_workload(comparison)]
    if rows:
        found += _by_point(rows, width)
    if left_out:
        found.append(_more(left_out))
    found += [*([""] if found else []), *_notes(comparison), _outcome(comparison, counting)]
    return [*map(printable, found)]  # texts of a committed file could be commands of a terminal or of a CI


def _by_point(rows: Sequence[GateVerdict], width: int) -> Iterator[str]:
    """Yield the lines of one table of all *rows*, with each point's id before its first row."""
    table = plain_table()
    for heading in _HEADINGS:
        table.add_column(heading, justify="left" if heading in ("metric", "verdict") else "right", no_wrap=True)
    for verdict in rows:
        reference, candidate, *others = _cells(verdict)
        table.add_row(f"{_INDENT}{verdict.metric}", f"{reference} → {candidate}", *others)
    for padding in (2, 1, 0):
        table.padding = (0, padding, 0, 0)
        made = render(table, max(width, _MAX_WIDTH))  # no figure may lose digits
        if max(map(len, made)) <= width:
            break
    yield from made[: -len(rows)]
    for place, (line, verdict) in enumerate(zip(made[-len(rows) :], rows, strict=True)):
        if place == 0 or rows[place - 1].point != verdict.point:
            yield from wrapped(verdict.point, width)
        yield line
        remark = "; ".join(filter(None, (*indirect_method(verdict), _remark(verdict))))
        yield from textwrap.wrap(remark, width, initial_indent=2 * _INDENT, subsequent_indent=2 * _INDENT)


def _remark(verdict: GateVerdict) -> str:
    """Return what moved together with a metric, or how many cycles would decide; empty if neither is known."""
    if verdict.cycles_to_decide is not None:
        return f"about {verdict.cycles_to_decide} cycles on either side would decide it"
    return "; ".join(one for one in verdict.associated if not one.startswith(DIFFERENT))


def markdown(comparison: Comparison) -> str:
    """Return the comparison as Markdown for GitHub and GitLab, with a newline at the end."""
    rows, left_out = _rows(comparison)
    found = [f"**{escaped(line)}**  " for line in _workload(comparison)]
    found += [""] if found else []
    if rows:
        table = [("point", "metric", *_COLUMNS, "what moved")]
        for place, verdict in enumerate(rows):
            is_first = place == 0 or rows[place - 1].point != verdict.point
            metric = verdict.metric + "".join(f" ({method})" for method in indirect_method(verdict))
            table.append((verdict.point if is_first else "", metric, *_cells(verdict), _remark(verdict)))
        columns = len(table[0]) - (not any(map(_remark, rows)))
        body = [markdown_row(map(escaped, cells[:columns])) for cells in table]
        found += [body[0], markdown_row(_ALIGNMENT[:columns]), *body[1:], ""]
    if left_out:
        found += [_more(left_out), ""]
    found += [f"- {escaped(line)}" for line in _notes(comparison)]
    return "\n".join([*found, "", f"**{escaped(_outcome(comparison))}**", ""])


def as_json(comparison: Comparison) -> str:
    """Return the comparison as JSON with ``comparison``, a ComparisonRecord, and ``verdicts``, GateVerdicts."""
    data = {
        "schema_version": SCHEMA_VERSION,
        "comparison": comparison.record.model_dump(mode="json"),
        "verdicts": [verdict.model_dump(mode="json") for verdict in comparison.verdicts],
    }
    return json.dumps(data, indent=1) + "\n"  # ASCII only, so that every terminal encoding can write it


def _rows(comparison: Comparison) -> tuple[list[GateVerdict], Mapping[str, int]]:
    """Return the worst verdicts by point, the worst point first, and the number of each verdict that is left out.

    New and missing points, and verdicts NOT JUDGED that do not fail, have no row: they are listed below the table.
    """
    found = [one for one in _of_known_points(comparison) if one.verdict != "NOT JUDGED" or one.outcome == "failed"]
    found.sort(key=_badness)
    rows, left_out = found[:MAX_ROWS], found[MAX_ROWS:]
    places = {point: place for place, point in enumerate(dict.fromkeys(one.point for one in rows))}
    rows.sort(key=lambda one: places[one.point])
    return rows, Counter(str(one.verdict) for one in left_out)


def _of_known_points(comparison: Comparison) -> list[GateVerdict]:
    """Return the verdicts on points that both the candidate and the reference have."""
    new = {*comparison.record.new_points}
    return [one for one in comparison.verdicts if one.metric and one.point not in new]


def _badness(verdict: GateVerdict) -> tuple[int, float]:
    """Return a sort key: the verdict, then how far the ratio is from 1, rounded to the digits shown."""
    return _ORDER.index(verdict.verdict), -round(abs(math.log(verdict.ratio)), 3) if verdict.ratio else 0.0


def _cells(verdict: GateVerdict) -> tuple[str, str, str, str, str, str]:
    """Return the cells of :data:`_COLUMNS`."""
    ratio = "-" if verdict.ratio is None else _ratio(verdict.ratio)
    interval = "" if verdict.interval is None else "–".join(map(_ratio, verdict.interval))
    n = str(verdict.n) if verdict.n == verdict.reference_n else f"{verdict.reference_n}, {verdict.n}"
    return _mean(verdict.reference_mean), _mean(verdict.mean), ratio, interval, n, verdict.verdict


def _ratio(value: float) -> str:
    if value < 0.001:
        return "<0.001"
    return f"{value:.3f}" if value < 10 else number(value) if value < 1000 else ">1000"


def _mean(value: float | None) -> str:
    return "-" if value is None else number(value)


def _workload(comparison: Comparison) -> Iterator[str]:
    """Yield differences of the workload, which make every figure below misleading and so come first."""
    yield from _capped("workload differs", comparison.record.workload)


def _notes(comparison: Comparison) -> Iterator[str]:
    record = comparison.record
    day = f" on {record.reference_started_at[:10]}" if record.reference_started_at else ""
    version = f", measured{day} with pytest-llem {record.reference_version}" if record.reference_version else ""
    paired = "; interleaved, compared cycle by cycle" if record.paired else ""
    yield f"reference: {record.reference}{version}{paired}"
    if record.family:
        confidences = sorted({one.confidence for one in comparison.verdicts if one.confidence is not None})
        deltas = sorted({one.delta for one in comparison.verdicts if one.delta is not None})
        tolerated = f", delta {', '.join(f'{100 * delta:.3g} %' for delta in deltas)}" if deltas else ""
        share = " to ".join(dict.fromkeys(percent(one) for one in confidences[:1] + confidences[-1:]))
        interval = f"ratio: candidate / reference, with the {share} interval that decided; " if share else ""
        yield f"{interval}alpha {record.alpha:g} by Holm over {counted(record.family, 'gate')}{tolerated}"
    if any(one.associated for one in comparison.verdicts):
        yield "below a verdict: what moved together with the metric, which need not be the cause"
    notes = [
        one.note for one in _of_known_points(comparison) if one.note is not None and one.verdict != "NOT JUDGED"
    ]
    yield from _capped("judged", [*dict.fromkeys(notes)])
    shares = sorted({one.process_share for one in comparison.verdicts if one.process_share is not None})
    if shares:
        span = " to ".join(dict.fromkeys(f"{100 * share:.0f} %" for share in shares[:1] + shares[-1:]))
        yield f"process to process: {span} of the variance between pairs, which more turns do not reduce"
    if record.compared_despite_mismatch:  # otherwise they are the reasons of verdicts, which follow below
        yield from _capped("compared despite mismatch", record.testbed)
    yield from _reasons(_of_known_points(comparison))
    yield from _capped("warning", record.warnings)
    yield from _capped("new", record.new_points)
    yield from _capped("missing", record.missing_points)
    yield from _capped("system under test", record.sut)


def _reasons(verdicts: Sequence[GateVerdict]) -> Iterator[str]:
    """Yield each reason why gates were not judged or not decided, with the ids of those gates."""
    concerned: dict[tuple[str, str], list[str]] = {}
    for verdict in verdicts:
        if verdict.reason is not None and verdict.cycles_to_decide is None:
            concerned.setdefault((verdict.verdict.lower(), verdict.reason), []).append(verdict.id)
    reasons = list(concerned.items())
    for (what, reason), ids in reasons[:MAX_LINES]:
        yield f"{what}: {reason} [{named(ids)}]"
    if len(reasons) > MAX_LINES:
        yield f"{counted(len(reasons) - MAX_LINES, 'more reason')}"


def _capped(what: str, found: Sequence[str]) -> Iterator[str]:
    yield from (f"{what}: {one}" for one in found[:MAX_LINES])
    if len(found) > MAX_LINES:
        yield f"{what}: {len(found) - MAX_LINES} more"


def _more(left_out: Mapping[str, int]) -> str:
    return f"and {', '.join(f'{left_out[verdict]} {verdict}' for verdict in _ORDER if verdict in left_out)}"


def _outcome(comparison: Comparison, counting: Collection[str] | None = None) -> str:
    record = comparison.record
    count = Counter(str(one.verdict) for one in _of_known_points(comparison))
    found = [f"{count[verdict]} {verdict}" for verdict in _ORDER if count[verdict]]
    found += [counted(len(record.new_points), "new point")] if record.new_points else []
    found += [counted(len(record.missing_points), "missing point")] if record.missing_points else []
    bad = [one.id for one in comparison.verdicts if one.outcome == "failed"]
    failed = sum(counting is None or one in counting for one in bad)
    text = f"{', '.join(found) or 'nothing to compare'}: {counted(failed, 'gate') if failed else 'no gate'} failed"
    others = len(bad) - failed
    return f"{text} ({others} more not selected, or expected to fail)" if others else text
