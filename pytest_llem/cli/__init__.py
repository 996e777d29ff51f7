"""Run the command ``llem``, which does everything with studies that is not a pytest run.

Importing this package imports only the standard library, so that ``llem --help`` is fast. Each command has a
function in :data:`COMMANDS` that adds it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from pytest_llem.cli import aa, compare, doctor, fetch, history, import_, init, merge, results, schema
from pytest_llem.cli.command import (
    DONE,
    INTERRUPTED,
    NOT_RUN,
    STANDARD_OUTPUT,
    discard_output,
    prepare_output,
    print_error,
    write,
)

#: Functions that add the commands, by name, in the order in which ``llem --help`` lists them.
COMMANDS = {
    "init": init.add,
    "doctor": doctor.add,
    "fetch": fetch.add,
    "import": import_.add,
    "merge": merge.add,
    "compare": compare.add,
    "table": results.add_table,
    "summary": results.add_summary,
    "report": results.add_report,
    "history": history.add,
    "aa": aa.add,
    "schema": schema.add,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Args:
        arguments: The command line without ``llem``; None for that of the process.

    Returns:
        0; 1 if the command reports a failure; 2 if it could not run; 130 after Ctrl-C.

    Raises:
        SystemExit: By argparse: with 2 if the arguments are wrong, with 0 after ``--help`` and ``--version``.
    """
    parser = _parser()
    try:
        prepare_output()
        if not (sys.argv[1:] if arguments is None else arguments):
            write(parser.format_help())
            return DONE
        options = parser.parse_args(arguments)
        status: int = options.run(options)
    except BrokenPipeError:  # the reader of the output has closed it, as head does
        discard_output()
        return NOT_RUN
    except OSError as error:
        if error.filename == STANDARD_OUTPUT:
            discard_output()
        missing = isinstance(error, FileNotFoundError)
        reason = "no such file or folder" if missing else error.strerror or error
        print_error(f"{error.filename}: {reason}" if error.filename else str(reason))
        return NOT_RUN
    except KeyboardInterrupt:
        print_error("interrupted")
        return INTERRUPTED
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llem",
        description="Tools for the studies of pytest-llem. To run one: pytest STUDY.yaml -p llem",
        epilog="llem COMMAND --help describes a command, its options and its exit status.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    for add in COMMANDS.values():
        add(commands)
    return parser


class _Version(argparse.Action):
    """Look up the version only if it is asked for, because importlib.metadata takes time to import."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        write(f"llem {version('pytest-llem')}\n")
        parser.exit()
