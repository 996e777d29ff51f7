"""``llem schema``: the JSON Schema of a study file."""

from __future__ import annotations

import argparse
from pathlib import Path

from pytest_llem.cli.command import DONE, Commands, need_output, write
from pytest_llem.cli.command import add as add_command

_DESCRIPTION = """\
Print the JSON Schema of a study file, or write it to FILE: editors complete
and check studies with it. It knows the engines that are installed here.

In a study, its first line tells the editor:
  # yaml-language-server: $schema=FILE
"""


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "schema",
        _run,
        summary="print the JSON Schema of a study file, for editors",
        description=_DESCRIPTION,
        statuses={DONE: "done"},
        examples="  llem schema -o study.schema.json",
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="write it there instead of standard output")


def _run(options: argparse.Namespace) -> int:
    from pytest_llem.registry import ENGINE_GROUP, installed
    from pytest_llem.study.schema import schema_text

    text = schema_text(installed(ENGINE_GROUP))
    if options.output is not None:
        Path(options.output).write_text(text, encoding="utf-8")
    else:
        need_output()
        write(text)
    return DONE
