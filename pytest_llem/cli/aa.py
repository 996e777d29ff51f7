"""Declare ``llem aa``, which recommends a gate's delta from repeated runs of an unchanged study."""

from __future__ import annotations

import argparse

from pytest_llem.cli.command import DONE, FAILED, Commands, add_command, add_metrics, path, with_error_message

_DESCRIPTION = """\
Measure how far repeated runs of an unchanged study differ, and recommend the
delta that a gate needs to compare runs.

Each DIR holds the results of one run (a session) of the same study on the
same machine. Use five or more, as far apart in time as later comparisons will
be. Without --metric, the metrics are those that the study gates; with it, name
all of them. Gates that compare interleaved runs (pytest --llem-against) do not
need this.
"""


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command to *commands*."""
    parser = add_command(
        commands,
        "aa",
        _run,
        summary="recommend a gate's delta from repeated runs of a study",
        description=_DESCRIPTION,
        statuses={DONE: "a delta is recommended", FAILED: "no delta can be recommended"},
        examples="  llem aa results/llama_*",
    )
    parser.add_argument("results", metavar="DIR", nargs="+", type=path, help="a results directory of the study")
    add_metrics(parser, "metric to look at")


@with_error_message
def _run(options: argparse.Namespace) -> int:
    from pytest_llem.cli.session_effect import aa

    return aa(options.results, options.metric)
