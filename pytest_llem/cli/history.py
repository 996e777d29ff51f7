"""Declare ``llem history``, which shows metrics over commits and finds where they changed."""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_llem.cli.command import (
    DONE,
    Commands,
    add_command,
    add_metrics,
    path,
    print_error,
    with_error_message,
    write,
)

if TYPE_CHECKING:
    from pytest_llem.results.study_result import StudyResult

_DESCRIPTION = """\
Show each metric of each point over commits, and where it changed for good.

DIR is a results directory, a saved result, or a folder of these at any depth,
such as .llem/baselines. Runs are in the order of their commits if the current
folder is in a git repository that has them, else in the order of time.

Testbeds are kept apart. A change is marked once at least 3 runs have it.
With -o, a page with plots is written: pip install 'pytest-llem[report]'
"""

#: Maximum number of unreadable files that are named.
_MAX_NAMED = 5


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command to *commands*."""
    parser = add_command(
        commands,
        "history",
        _run,
        summary="show metrics over commits, and where they changed",
        description=_DESCRIPTION,
        statuses={DONE: "done"},
        examples="  llem history results\n  llem history history -o history.html --metric seconds",
    )
    parser.add_argument(
        "paths", metavar="DIR", nargs="+", type=path, help="folders with results, or saved results"
    )
    parser.add_argument("-o", "--output", metavar="FILE", type=path, help="HTML page to write")
    add_metrics(parser, "metric to show", "each study's newest run")
    parser.add_argument(
        "--alpha",
        metavar="ALPHA",
        type=_alpha,
        help="probability of a false rise over all series, and of a false fall; default: that of the newest run, "
        "else 0.01",
    )
    parser.add_argument(
        "--delta",
        metavar="DELTA",
        type=_delta,
        help="relative change that does not count; default: that of the study, else 0.02",
    )


@with_error_message
def _run(options: argparse.Namespace) -> int:
    from pytest_llem._plugin.overwriting import check_page
    from pytest_llem._plugin.terminal_width import fitted
    from pytest_llem.gates.history import history_of
    from pytest_llem.registry import missing_report_extra
    from pytest_llem.reporting.terminal.history import lines
    from pytest_llem.results.git import known_commits

    page: Path | None = options.output
    if page is not None and (problem := missing_report_extra() or check_page(page)) is not None:
        raise ValueError(problem)
    history = history_of(
        _results(options.paths),
        options.metric,
        commits_of=partial(known_commits, Path()),
        alpha=options.alpha,
        delta=options.delta,
    )
    if not history.series:
        raise ValueError(f"{options.paths[0]}: no run has a value of these metrics")
    if page is not None:
        from pytest_llem.reporting.html.history import write_history

        write_history(history, page)
    for line in fitted(lines(history, shutil.get_terminal_size().columns)):
        write(f"{line}\n")
    if page is not None:
        write(f"{page}\n")
    return DONE


def _results(paths: Sequence[Path]) -> Iterator[StudyResult]:
    """Yield the results in *paths*, and report unreadable files on standard error."""
    from pytest_llem.reporting.text import counted
    from pytest_llem.results.result_folders import read_results

    unread = 0
    for _, found in read_results(paths):
        if not isinstance(found, str):
            yield found
            continue
        unread += 1
        if unread <= _MAX_NAMED:
            print_error(f"left out: {found}")
    if unread > _MAX_NAMED:
        print_error(f"left out: {counted(unread - _MAX_NAMED, 'more file')}")


def _alpha(text: str) -> float:
    return _between(text, 0, 0.5)


def _delta(text: str) -> float:
    return 0.0 if text == "0" else _between(text, 0, 1)


def _between(text: str, low: float, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low < value < high:
        raise argparse.ArgumentTypeError(f"must be a number between {low:g} and {high:g} (got {text!r})")
    return value
