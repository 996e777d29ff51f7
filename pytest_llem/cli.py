"""The command ``llem``: what helps with studies, and is no run of pytest.

Loading it imports nothing but the standard library, so that ``llem --help`` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

_SCHEMA = """\
Print the JSON Schema of a study file, or write it to FILE: editors complete and check studies with it.

It knows the engines that are installed here. In a study, its first line tells the editor:
  # yaml-language-server: $schema=FILE
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, or 1 where it failed.

    Raises:
        SystemExit: By argparse; with 2 where the arguments are wrong.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except BrokenPipeError:  # whoever read our output has seen enough
        _forget_output()
        return 1
    except OSError as error:
        if error.filename is None:
            _forget_output()
        print(f"llem: {error.filename or 'standard output'}: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llem",
        description="Helps with the studies of pytest-llem. To run one: pytest STUDY.yaml -p llem",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"llem {version('pytest-llem')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    schema = commands.add_parser(
        "schema",
        help="print the JSON Schema of a study file, for editors",
        description=_SCHEMA,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    schema.add_argument("-o", "--output", metavar="FILE", help="write it there instead of standard output")
    schema.set_defaults(run=_schema)
    return parser


def _schema(options: argparse.Namespace) -> None:
    from pytest_llem.registry import BACKENDS, installed
    from pytest_llem.study.schema import schema_text

    text = schema_text(installed(BACKENDS))
    if options.output is not None:
        Path(options.output).write_text(text, encoding="utf-8")
    elif sys.stdout is None:
        raise OSError("is closed")
    else:
        sys.stdout.write(text)
        sys.stdout.flush()


def _forget_output() -> None:
    """Drop what is still buffered: Python would try again as it exits, and tell of that."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (AttributeError, OSError, ValueError):  # closed, or no file at all
        return


if __name__ == "__main__":
    sys.exit(main())
