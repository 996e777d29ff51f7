"""Commands that show results of a study: ``llem table``, ``llem summary`` and ``llem report``."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from pytest_llem.cli.command import DONE, Commands, add_command, add_format, path, with_error_message, write

_TABLE = """\
Print the points of a study as a table: as at the end of its run, as Markdown
for a pull request, or as CSV.

DIR is a results directory, or a saved result. The run may still be going on,
or may have been killed. The table has the main metrics; summary.csv in DIR
has all of them.
"""


def add_table(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add ``llem table`` to *commands*."""
    parser = add_command(
        commands,
        "table",
        _table,
        summary="print the points of a study as a table, Markdown or CSV",
        description=_TABLE,
        statuses={DONE: "done"},
        examples="  llem table results/llama_2026-11-24T09-12-41Z --format markdown",
    )
    parser.add_argument("path", metavar="DIR", type=path, help="a results directory, or a saved result")
    add_format(parser, "markdown", "csv")


@with_error_message
def _table(options: argparse.Namespace) -> int:
    from pytest_llem._plugin.terminal_width import fitted
    from pytest_llem.reporting.terminal.points import points_markdown
    from pytest_llem.reporting.terminal.summary import table_lines
    from pytest_llem.results.study_result import StudyResult, selected_points
    from pytest_llem.results.tabular import point_table, short_table

    result = StudyResult.load(options.path)
    if not result.points:
        raise ValueError(f"{options.path}: holds no points")
    if options.format == "csv":
        write(short_table(result, point_table(result)).to_csv())
        return DONE
    if options.format == "table":
        lines = [*fitted(table_lines(result, shutil.get_terminal_size().columns))]
    else:
        lines = [*points_markdown(*selected_points(result))]
    write("\n".join(lines).rstrip() + "\n")
    return DONE


_SUMMARY = """\
Summarise results as Markdown for a comment of a pull request: gates, points
and warnings, failed studies first. Of several results, such as those of the
jobs of a matrix, an overview comes first.

DIR is a results directory, a saved result, or a folder of these at any depth.
The text is at most 60,000 bytes long, which fits into a comment on GitHub.
"""


def add_summary(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add ``llem summary`` to *commands*."""
    parser = add_command(
        commands,
        "summary",
        _summary,
        summary="summarise the results of one or several jobs as Markdown",
        description=_SUMMARY,
        statuses={DONE: "done"},
        examples="  llem summary results > summary.md\n  llem summary energy-a100 energy-h100",
    )
    parser.add_argument("paths", metavar="DIR", nargs="+", type=path, help="folder with results, or a result")


@with_error_message
def _summary(options: argparse.Namespace) -> int:
    from pytest_llem.reporting.github import summary_markdown
    from pytest_llem.results.result_folders import read_results

    results, unread = {}, []
    for place, found in read_results(options.paths):
        if isinstance(found, str):
            unread.append(found)
        else:
            results[os.path.relpath(place)] = found
    if not results:
        raise ValueError(unread[0])
    write(summary_markdown(results, unread))
    return DONE


#: Default name of the report, in the results directory.
PAGE = "report.html"

_REPORT = f"""\
Write the results of a study as a report: one HTML file that needs no network.

DIR is a results directory. The run may still be going on, or may have been
killed. The report is written to DIR/{PAGE} or to FILE, and its path is
printed.

Needs: pip install 'pytest-llem[report]'
"""


def add_report(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add ``llem report`` to *commands*."""
    parser = add_command(
        commands,
        "report",
        _report,
        summary="write the results of a study as an HTML report",
        description=_REPORT,
        statuses={DONE: "done"},
        examples="  llem report results/llama_2026-11-24T09-12-41Z -o llama.html",
    )
    parser.add_argument("directory", metavar="DIR", type=path, help="a results directory")
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=path, help=f"where to write the report; default: DIR/{PAGE}"
    )


@with_error_message
def _report(options: argparse.Namespace) -> int:
    from pytest_llem.registry import missing_report_extra

    directory: Path = options.directory
    file: Path = options.output or directory / PAGE
    if (missing := missing_report_extra()) is not None:
        raise ValueError(missing)
    if not directory.is_dir():
        raise ValueError(f"{directory}: {'is not a folder' if directory.exists() else 'no such file or folder'}")
    from pytest_llem.reporting.html import write_report

    write_report(directory, file)
    write(f"{file}\n")
    return DONE
