"""``llem schema``: print the JSON Schema of a study file."""

from __future__ import annotations

import argparse

from pytest_llem.cli.command import DONE, Commands, add_command, path, write, write_file

_DESCRIPTION = """\
Print the JSON Schema of a study file, or write it to FILE. Editors use it to
complete and check studies. It includes the options of the installed engines.

To use it in an editor, begin the study with this line:
  # yaml-language-server: $schema=FILE
"""


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command to *commands*."""
    parser = add_command(
        commands,
        "schema",
        _run,
        summary="print the JSON Schema of a study file, for editors",
        description=_DESCRIPTION,
        statuses={DONE: "done"},
        examples="  llem schema -o study.schema.json",
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=path, help="where to write the schema; default: standard output"
    )


def _run(options: argparse.Namespace) -> int:
    from pytest_llem.registry import ENGINE_GROUP, installed
    from pytest_llem.study.schema import schema_text

    text = schema_text(installed(ENGINE_GROUP))
    if options.output is not None:
        write_file(options.output, text)
    else:
        write(text)
    return DONE
