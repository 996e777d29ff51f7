"""Provide what the commands of ``llem`` share: declaration, exit statuses, output and error messages.

This module, and each command's module, imports only the standard library when it is loaded.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import wraps
from pathlib import Path

#: Exit statuses of all commands. Each command defines what 1 means.
DONE, FAILED, NOT_RUN, INTERRUPTED = 0, 1, 2, 130

#: Name of standard output in error messages.
STANDARD_OUTPUT = "standard output"

Commands = argparse._SubParsersAction  # argparse has no public name for it


def add_command(
    commands: Commands[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    summary: str,
    description: str,
    statuses: Mapping[int, str],
    examples: str = "",
) -> argparse.ArgumentParser:
    """Add a command and return its parser.

    Args:
        commands: The subparsers of ``llem``.
        name: Name of the command.
        run: Runs the command and returns its exit status. May raise OSError if a file cannot be read or written.
        summary: One line for the list of commands.
        description: What the command does, in lines of at most 78 characters.
        statuses: Meaning of each exit status, without those that all commands share.
        examples: Command lines, indented by two spaces.
    """
    meanings = {
        **statuses,
        NOT_RUN: "wrong arguments, or a file that cannot be read or written",
        INTERRUPTED: "interrupted by Ctrl-C",
    }
    epilog = "exit status:\n" + "".join(f"  {status:<3}  {meaning}\n" for status, meaning in meanings.items())
    if examples:
        epilog = f"examples:\n{examples.rstrip()}\n\n{epilog}"
    parser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


def not_empty(text: str) -> str:
    """Return *text*. Used as the type of an argument, which an unset variable of a shell may leave empty.

    Raises:
        argparse.ArgumentTypeError: *text* is empty.
    """
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def path(text: str) -> Path:
    """Return *text* as a path. Used as the type of an argument.

    Raises:
        argparse.ArgumentTypeError: *text* is empty.
    """
    return Path(not_empty(text))


def add_baseline_dir(parser: argparse.ArgumentParser) -> None:
    """Add the option that names the folder of the baselines."""
    parser.add_argument(
        "--baseline-dir",
        metavar="DIR",
        type=path,
        default=Path(".llem", "baselines"),
        help="folder of the baselines; default: .llem/baselines",
    )


def add_format(parser: argparse.ArgumentParser, *others: str, note: str = "") -> None:
    """Add the option that chooses the format of the output: a table, or one of *others*."""
    *first, last = ("table (default)", *others)
    parser.add_argument(
        "--format",
        metavar="FORMAT",
        choices=("table", *others),
        default="table",
        help=f"{', '.join(first)} or {last}{note}",
    )


def add_metrics(parser: argparse.ArgumentParser, purpose: str, study: str = "the study") -> None:
    """Add the option that selects metrics, instead of those that *study* gates; *purpose* begins its help text."""
    parser.add_argument(
        "--metric",
        metavar="METRIC",
        action="append",
        default=[],
        type=_gated_metric,
        help=f"{purpose}; may be given several times; default: the metrics that {study} gates",
    )


def add_fail_on(parser: argparse.ArgumentParser) -> None:
    """Add the option that says which verdicts fail the command."""
    parser.add_argument(
        "--fail-on",
        metavar="VERDICT",
        choices=("regression", "inconclusive"),
        default="regression",
        help="regression (default), or inconclusive: also fail if a gate cannot be decided",
    )


def _gated_metric(name: str) -> str:
    """Return *name* if it is a metric that a gate can compare. Used as the type of an argument.

    Raises:
        argparse.ArgumentTypeError: There is no such metric, or a gate cannot compare it.
    """
    from pytest_llem.catalogue import CATALOGUE
    from pytest_llem.study.problems import did_you_mean

    if name not in CATALOGUE:
        raise argparse.ArgumentTypeError(f"there is no metric {name!r}{did_you_mean(name, tuple(CATALOGUE))}")
    if CATALOGUE[name].better is None:
        raise argparse.ArgumentTypeError(f"{name} cannot be gated: neither higher nor lower values are better")
    return name


def with_error_message(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Return *run*, changed to print the message of a ValueError, such as for an invalid result, and return 2."""

    @wraps(run)
    def wrapped(options: argparse.Namespace) -> int:
        try:
            return run(options)
        except ValueError as error:
            print_error(str(error))
            return NOT_RUN

    return wrapped


def print_error(text: str) -> None:
    """Print an error message as one line on standard error."""
    if sys.stderr is None:  # print() would write to standard output instead
        return
    line = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
    with suppress(OSError, ValueError):  # standard error is closed
        print(f"llem: {line}", file=sys.stderr)


def prepare_output() -> None:
    """Check that there is a standard output, and make it escape characters that its encoding does not have.

    Raises:
        OSError: Standard output is closed.
    """
    if sys.stdout is None:
        raise OSError(errno.EBADF, "is closed", STANDARD_OUTPUT)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of studies may have any character
        sys.stdout.reconfigure(errors="backslashreplace")


def write(text: str) -> None:
    """Write *text* to standard output and flush it.

    Raises:
        OSError: Standard output cannot be written to.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        error.filename = STANDARD_OUTPUT
        raise


def write_file(file: Path, text: str) -> None:
    """Write *text* to *file*, which may be a device or a pipe.

    Raises:
        OSError: *file* cannot be written to; the error names it.
    """
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        error.filename = str(file)
        raise


def discard_output() -> None:
    """Discard buffered output, which Python would otherwise try to write again, with an error, at exit."""
    with suppress(AttributeError, OSError, ValueError):  # standard output is closed or not a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
