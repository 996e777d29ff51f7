"""Declare ``llem import``, which makes results of the files of other load generators."""

from __future__ import annotations

import argparse
from pathlib import Path

from pytest_llem.cli.command import DONE, Commands, add_command, path, with_error_message, write

#: Names of the formats.
FORMATS = ("vllm", "aiperf", "guidellm", "sglang", "llama-bench", "own")

_DESCRIPTION = """\
Make results of the files of another load generator, so that llem compare,
budgets, baselines and reports work on them.

FILE is a result of vllm bench serve, AIPerf (its export, its records, or both),
guidellm, SGLang's bench_serving or llama-bench, or the JSON of a script of
your own. Rates are taken from the times of requests, over the steady state;
the tool's own figures are kept beside them.

Files of one configuration are runs of one server, and so one cycle, unless
they say otherwise or --cycle-per is given: a server's start varies more than
its runs, so that several runs of one server are no repetitions.
"""

_EXAMPLES = """\
  llem import result.json -o imported
  llem import starts/*.json --cycle-per file -o main
  llem compare main changed
"""


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command to *commands*."""
    parser = add_command(
        commands,
        "import",
        _run,
        summary="make results of the files of vllm bench, AIPerf, guidellm and others",
        description=_DESCRIPTION,
        statuses={DONE: "done"},
        examples=_EXAMPLES,
    )
    parser.add_argument("files", metavar="FILE", nargs="+", type=path, help="a result file")
    parser.add_argument(
        "-o", "--output", metavar="DIR", type=path, required=True, help="results directory to create"
    )
    parser.add_argument(
        "--from",
        metavar="FORMAT",
        dest="format",
        choices=FORMATS,
        help=f"format of the files: {', '.join(FORMATS)}; default: found out from the content",
    )
    parser.add_argument(
        "--axis",
        metavar="NAME=PATH",
        action="append",
        default=[],
        help="axis NAME, whose value is at PATH in each file (config.strategy.streams); may be given several "
        "times; default: the settings that differ between the files",
    )
    parser.add_argument(
        "--cycle-per",
        metavar="WHAT",
        choices=("file", "folder"),
        help="file or folder: each has results of a server that was started for it; default: all files are of "
        "one server, unless they name its start",
    )
    parser.add_argument("--name", metavar="NAME", help="name of the study; default: the name of DIR")


@with_error_message
def _run(options: argparse.Namespace) -> int:
    from pytest_llem.importers.formats import read_runs
    from pytest_llem.importers.reading import ImportFileError
    from pytest_llem.measurement.imported_study import parse_axes, points_of, write_study
    from pytest_llem.reporting.text import counted
    from pytest_llem.study.loading import name_problem

    directory: Path = options.output
    name = directory.resolve().name if options.name is None else options.name
    if message := name_problem(name):
        raise ImportFileError(f"{'--name' if options.name is not None else f'{directory}: --name'}: {message}")
    points = points_of(read_runs(options.files, options.format), parse_axes(options.axis), options.cycle_per)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ImportFileError(f"{directory}: exists already: give the name of a new folder")
    result = write_study(directory, name, points)
    lines = [f"{directory}: {counted(len(result.points), 'point')}"]
    lines += [f"  {point.id}: {counted(len(point.cycles), 'cycle')}" for point in result.points]
    lines += [f"warning: {warning}" for warning in result.warnings]
    write("\n".join(lines) + "\n")
    return DONE
