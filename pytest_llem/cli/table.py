"""Declare ``llem table``, which prints the points of a study as a table."""

from __future__ import annotations

import argparse
import shutil

from pytest_llem.cli.command import DONE, Commands, add_command, add_format, path, with_error_message, write

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
    parser.add_argument("path", metavar="DIR", type=path, help="a results directory, or a saved result")
    add_format(parser, "markdown", "csv")


@with_error_message
def _run(options: argparse.Namespace) -> int:
    from pytest_llem._plugin.terminal_width import fitted
    from pytest_llem.reporting.terminal.points import points_markdown
    from pytest_llem.reporting.terminal.summary import table_lines
    from pytest_llem.results.study_result import StudyResult, selected_points
    from pytest_llem.results.tabular import point_table, short_table

    result = StudyResult.load(options.path)
    if options.format == "csv":
        write(short_table(result, point_table(result)).to_csv())
        return DONE
    if options.format == "table":
        lines = [*fitted(table_lines(result, shutil.get_terminal_size().columns))]
    else:
        lines = [*points_markdown(*selected_points(result))]
    write("\n".join(lines).rstrip() + "\n")
    return DONE
