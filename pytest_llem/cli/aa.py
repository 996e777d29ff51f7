"""``llem aa``: which delta a gate needs, of sessions that measured the same."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pytest_llem.cli.command import DONE, FAILED, Commands, gated_metric, need_output
from pytest_llem.cli.command import add as add_command

_DESCRIPTION = """\
Tell how far sessions differ that measured the same, and the delta that a gate
needs to compare sessions.

Each DIR holds the results of one run of the same study, unchanged, on the
same machine: a session. Five or more are advised, as far apart in time as
later comparisons will be. Give all the metrics that the study gates. A gate
that compares cycle by cycle (pytest --llem-against) needs none of this.
"""


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "aa",
        _run,
        summary="tell from repeated runs of the same which delta a gate needs",
        description=_DESCRIPTION,
        statuses={DONE: "a delta is recommended", FAILED: "none can be"},
        examples="  llem aa results/llama_*",
    )
    parser.add_argument("results", metavar="DIR", nargs="+", type=Path, help="a results directory of the study")
    parser.add_argument(
        "--metric",
        metavar="METRIC",
        action="append",
        default=[],
        type=gated_metric,
        help="look at this one; may be given several times; default: those that the study gates",
    )


def _run(options: argparse.Namespace) -> int:
    need_output()
    from pytest_llem.cli.session_effect import aa

    status = aa(options.results, options.metric)
    sys.stdout.flush()
    return status
