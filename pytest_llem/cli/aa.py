"""Declare ``llem aa``, which recommends a gate's delta from repeated runs of an unchanged study."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pytest_llem.cli.command import DONE, FAILED, Commands, gated_metric, prepare_output
from pytest_llem.cli.command import add as add_command

_DESCRIPTION = """\
Measure how far repeated runs of an unchanged study differ, and recommend the
delta that a gate needs to compare runs.

Each DIR holds the results of one run (a session) of the same study on the
same machine. Use five or more, as far apart in time as later comparisons will
be. Name all metrics that the study gates. Gates that compare interleaved runs
(pytest --llem-against) do not need this.
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
    parser.add_argument("results", metavar="DIR", nargs="+", type=Path, help="a results directory of the study")
    parser.add_argument(
        "--metric",
        metavar="METRIC",
        action="append",
        default=[],
        type=gated_metric,
        help="metric to look at; may be given several times; default: the metrics that the study gates",
    )


def _run(options: argparse.Namespace) -> int:
    prepare_output()
    from pytest_llem.cli.session_effect import aa

    status = aa(options.results, options.metric)
    sys.stdout.flush()
    return status
