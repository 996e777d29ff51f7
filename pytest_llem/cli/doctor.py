"""``llem doctor``: what this machine can measure, and what stands in the way."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from pytest_llem.cli.command import DONE, FAILED, Commands, need_output, write
from pytest_llem.cli.command import add as add_command

_DESCRIPTION = """\
Tell what this machine can measure, and what stands in the way: its GPUs and
their energy counters, RAPL, the engines that are installed, and whatever else
makes figures differ from run to run, with the commands that help.

It changes no setting, makes no CUDA context, and gives up on a driver that
does not answer. What it finds is of one of three kinds:
  blocks   the energy of what engines run on is not measured, or no experiment
           can run
  hinders  figures are less steady, or leave something out
  note     good to know
"""

_EXAMPLES = """\
  llem doctor
  llem doctor --python ~/envs/vllm/bin/python   # an engine's own environment
  llem doctor --format json | jq .verdict
"""


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "doctor",
        _run,
        summary="tell what this machine can measure, and what stands in the way",
        description=_DESCRIPTION,
        statuses={
            DONE: "energy is measured by a hardware counter, and nothing blocks",
            FAILED: "something blocks (what only hinders is no failure)",
        },
        examples=_EXAMPLES,
    )
    parser.add_argument(
        "--format",
        metavar="FORMAT",
        choices=("table", "json"),
        default="table",
        help="table (default) or json, whose keys docs/doctor.md lists",
    )
    parser.add_argument(
        "--python", metavar="PYTHON", type=Path, help="look at the engines of this interpreter, as runners has it"
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=_seconds,
        default=60.0,
        help="how long the driver, and the import of an engine, may take; default: 60",
    )


def _seconds(text: str) -> float:
    """Return a time in seconds.

    Raises:
        argparse.ArgumentTypeError: It is none.
    """
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e6:
        raise argparse.ArgumentTypeError(f"a number of seconds is needed, more than 0 (got {text!r})")
    return seconds


def _run(options: argparse.Namespace) -> int:
    need_output()
    from pytest_llem.doctor.examine import examine

    python = options.python.expanduser().absolute() if options.python is not None else None
    found = examine(python, options.timeout)
    if options.format == "json":
        write(found.model_dump_json(indent=2) + "\n")
    else:
        from pytest_llem.reporting.terminal.doctor import lines

        write("\n".join(lines(found, shutil.get_terminal_size().columns)) + "\n")
    return FAILED if found.blocked else DONE
