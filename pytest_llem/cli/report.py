"""``llem report``: the results of a study as a page."""

from __future__ import annotations

import argparse
from pathlib import Path

from pytest_llem.cli.command import DONE, NOT_RUN, Commands, complain, need_output, write
from pytest_llem.cli.command import add as add_command

#: Where the page goes unless somebody says otherwise.
PAGE = "report.html"

_DESCRIPTION = f"""\
Write the results of a study as a page: one HTML file that opens without a
network.

DIR is a results directory, also of a run that goes on or was killed. The page
goes to {PAGE} in there, or to FILE; where it went is printed.

Needs: pip install 'pytest-llem[report]'
"""


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "report",
        _run,
        summary="write the results of a study as a page",
        description=_DESCRIPTION,
        statuses={DONE: "done"},
        examples="  llem report results/llama_2026-11-24T09-12-41Z -o llama.html",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="a results directory")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help=f"write it there instead of DIR/{PAGE}")


def _run(options: argparse.Namespace) -> int:
    need_output()
    from pytest_llem.registry import missing_extra

    directory: Path = options.directory
    file: Path = options.output or directory / PAGE
    if (problem := missing_extra("report")) is None and not directory.is_dir():
        problem = f"{directory}: is no results directory"
    if problem is not None:
        complain(problem)
        return NOT_RUN
    from pytest_llem.reporting.html import write_report

    try:
        write_report(directory, file)
    except ValueError as error:
        complain(str(error))
        return NOT_RUN
    write(f"{file}\n")
    return DONE
