"""The command ``llem``: what helps with studies, and is no run of pytest.

Loading it imports nothing but the standard library, so that ``llem --help`` answers at once. A command is a module
with a function ``add``, which declares it, and is named in :data:`COMMANDS`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from pytest_llem.cli import aa, compare, doctor, fetch, init, report, schema
from pytest_llem.cli.command import DONE, INTERRUPTED, NOT_RUN, complain, forget_output

#: In the order in which help lists them.
COMMANDS = (init, report, compare, aa, schema, fetch, doctor)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 where it failed, 2 where it could not do its work, or 130
    after Ctrl-C.

    Raises:
        SystemExit: By argparse; with 2 where the arguments are wrong.
    """
    parser = _parser()
    try:
        if not (sys.argv[1:] if arguments is None else arguments):
            parser.print_help()
            return DONE
        options = parser.parse_args(arguments)
        status: int = options.run(options)
    except BrokenPipeError:  # whoever read our output has seen enough
        forget_output()
        return NOT_RUN
    except OSError as error:
        if error.filename is None:
            forget_output()
        complain(f"{error.filename or 'standard output'}: {error.strerror or error}")
        return NOT_RUN
    except KeyboardInterrupt:
        complain("interrupted")
        return INTERRUPTED
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llem",
        description="Helps with the studies of pytest-llem. To run one: pytest STUDY.yaml -p llem",
        epilog="llem COMMAND --help tells more of each, its exit status included.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    for command in COMMANDS:
        command.add(commands)
    return parser


class _Version(argparse.Action):
    """Looks the version up only where it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        print(f"llem {version('pytest-llem')}")
        parser.exit()
