"""Declare ``llem report``, which writes the results of a study as an HTML report."""

from __future__ import annotations

import argparse
from pathlib import Path

from pytest_llem.cli.command import DONE, Commands, add_command, path, with_error_message, write

#: Default name of the report, in the results directory.
PAGE = "report.html"

_DESCRIPTION = f"""\
Write the results of a study as a report: one HTML file that needs no network.

DIR is a results directory. The run may still be going on, or may have been
killed. The report is written to DIR/{PAGE} or to FILE, and its path is
printed.

Needs: pip install 'pytest-llem[report]'
"""


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command to *commands*."""
    parser = add_command(
        commands,
        "report",
        _run,
        summary="write the results of a study as an HTML report",
        description=_DESCRIPTION,
        statuses={DONE: "done"},
        examples="  llem report results/llama_2026-11-24T09-12-41Z -o llama.html",
    )
    parser.add_argument("directory", metavar="DIR", type=path, help="a results directory")
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=path, help=f"where to write the report; default: DIR/{PAGE}"
    )


@with_error_message
def _run(options: argparse.Namespace) -> int:
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
