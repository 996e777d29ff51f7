"""Declare ``llem summary``, which summarises the results of several jobs as Markdown."""

from __future__ import annotations

import argparse
import os

from pytest_llem.cli.command import DONE, Commands, add_command, path, with_error_message, write

_DESCRIPTION = """\
Summarise results as Markdown for a comment of a pull request: gates, points
and warnings, failed studies first. Of several results, such as those of the
jobs of a matrix, an overview comes first.

DIR is a results directory, a saved result, or a folder of these at any depth.
The text is at most 60,000 bytes long, which fits into a comment on GitHub.
"""


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command to *commands*."""
    parser = add_command(
        commands,
        "summary",
        _run,
        summary="summarise the results of one or several jobs as Markdown",
        description=_DESCRIPTION,
        statuses={DONE: "done"},
        examples="  llem summary results > summary.md\n  llem summary energy-a100 energy-h100",
    )
    parser.add_argument("paths", metavar="DIR", nargs="+", type=path, help="folder with results, or a result")


@with_error_message
def _run(options: argparse.Namespace) -> int:
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
