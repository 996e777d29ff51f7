"""Declare ``llem table``, which prints the points of a study as a table."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_llem.cli.command import DONE, NOT_RUN, Commands, prepare_output, print_error, write
from pytest_llem.cli.command import add as add_command

if TYPE_CHECKING:
    from pytest_llem.results.study_result import StudyResult

_DESCRIPTION = """\
Print the points of a study as a table: as at the end of its run, as Markdown
for a pull request, or as CSV.

DIR is a results directory, or a saved result. The run may still be going on,
or may have been killed. The table has the main metrics; summary.csv in DIR
has all of them.
"""


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command to *commands*."""
    parser = add_command(
        commands,
        "table",
        _run,
        summary="print the points of a study as a table, Markdown or CSV",
        description=_DESCRIPTION,
        statuses={DONE: "done"},
        examples="  llem table results/llama_2026-11-24T09-12-41Z --format markdown",
    )
    parser.add_argument("path", metavar="DIR", type=Path, help="a results directory, or a saved result")
    parser.add_argument(
        "--format",
        metavar="FORMAT",
        choices=("table", "markdown", "csv"),
        default="table",
        help="table (default), markdown or csv",
    )


def _run(options: argparse.Namespace) -> int:
    prepare_output()
    from pytest_llem.results.study_result import StudyResult

    try:
        result = StudyResult.load(options.path)
    except ValueError as error:
        print_error(str(error))
        return NOT_RUN
    write(_text(result, options.format))
    return DONE


def _text(result: StudyResult, form: str) -> str:
    from pytest_llem.reporting.terminal.points import points_markdown
    from pytest_llem.reporting.terminal.summary import table_lines
    from pytest_llem.results.study_result import selected_points
    from pytest_llem.results.tabular import point_table, short_table

    if form == "csv":
        return short_table(result, point_table(result)).to_csv()
    if form == "table":
        lines = table_lines(result, shutil.get_terminal_size().columns)
    else:
        points, planned = selected_points(result)
        lines = [*points_markdown(points, planned)]
    return "\n".join(lines).rstrip() + "\n"
