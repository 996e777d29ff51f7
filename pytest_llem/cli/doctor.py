"""Declare ``llem doctor``, which checks what this machine can measure."""

from __future__ import annotations

import argparse
import shutil

from pytest_llem.cli.command import DONE, FAILED, Commands, add_command, add_format, path, write

_DESCRIPTION = """\
Check what this machine can measure: its GPUs and their energy counters, RAPL,
the installed engines, and everything else that makes figures differ from run
to run. Each finding names the commands that help.

It changes no setting and creates no CUDA context. If a driver does not
answer, it stops waiting after --timeout. A finding has one of three
severities:
  blocks   the energy of the devices that the engines run on is not
           measured, or no experiment can run
  hinders  figures vary more, or are incomplete
  note     for information
"""

_EXAMPLES = """\
  llem doctor
  llem doctor --python ~/envs/vllm/bin/python   # an engine's own environment
  llem doctor --format json | jq .energy
"""


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command to *commands*."""
    parser = add_command(
        commands,
        "doctor",
        _run,
        summary="check what this machine can measure",
        description=_DESCRIPTION,
        statuses={
            DONE: "energy is measured by a counter; no finding has the severity blocks",
            FAILED: "a finding has the severity blocks",
        },
        examples=_EXAMPLES,
    )
    add_format(parser, "json", note=" (docs/reference/doctor.md lists its keys)")
    parser.add_argument(
        "--python",
        metavar="PYTHON",
        type=path,
        help="check the engines of this interpreter, such as one that runners: of a study names",
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=_seconds,
        default=60.0,
        help="time limit of the driver, and of the import of each engine; default: 60",
    )


def _seconds(text: str) -> float:
    """Return *text* as a number of seconds. Used as the type of an argument.

    Raises:
        argparse.ArgumentTypeError: It is not a number, or not positive, or 1e6 or more.
    """
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e6:
        raise argparse.ArgumentTypeError(f"must be a number of seconds greater than 0 (got {text!r})")
    return seconds


def _run(options: argparse.Namespace) -> int:
    from pytest_llem.doctor.examine import examine

    python = options.python.expanduser().absolute() if options.python is not None else None
    examination = examine(python, options.timeout)
    if options.format == "json":
        write(examination.model_dump_json(indent=2) + "\n")
    else:
        from pytest_llem.reporting.terminal.doctor import lines

        write("\n".join(lines(examination, shutil.get_terminal_size().columns)) + "\n")
    return FAILED if examination.blocked else DONE
