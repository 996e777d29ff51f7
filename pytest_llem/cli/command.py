"""What the commands of ``llem`` share: how they are declared, their exit statuses, how they tell of errors.

Nothing but the standard library is imported here, nor by a module of a command as it is loaded.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress

#: Exit statuses that mean the same in every command. What 1 means each says itself.
DONE, FAILED, NOT_RUN, INTERRUPTED = 0, 1, 2, 130

Commands = argparse._SubParsersAction  # argparse has no public name for it


def add(
    commands: Commands[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    summary: str,
    description: str,
    statuses: Mapping[int, str],
    examples: str = "",
) -> argparse.ArgumentParser:
    """Add a command, and return its parser.

    Args:
        commands: Of ``llem``.
        name: Its name.
        run: Runs it and returns its exit status. May raise OSError where something cannot be read or written.
        summary: A line for the list of commands.
        description: What it does, in lines of 78 characters at most.
        statuses: What its exit statuses mean, those that all share left out.
        examples: Command lines, indented by two.
    """
    told = {
        **statuses,
        NOT_RUN: "wrong arguments, or a file that cannot be read or written",
        INTERRUPTED: "interrupted by Ctrl-C",
    }
    epilog = "exit status:\n" + "".join(f"  {status:<3}  {meaning}\n" for status, meaning in told.items())
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


def gated_metric(name: str) -> str:
    """Return the name of a metric that a gate can look at: the type of an argument.

    Raises:
        argparse.ArgumentTypeError: It is none.
    """
    from pytest_llem.catalogue import CATALOGUE
    from pytest_llem.study.problems import did_you_mean

    if name not in CATALOGUE:
        raise argparse.ArgumentTypeError(f"there is no metric {name!r}{did_you_mean(name, tuple(CATALOGUE))}")
    if CATALOGUE[name].better is None:
        raise argparse.ArgumentTypeError(f"{name} is not gated: neither more nor less of it is better")
    return name


def complain(text: str) -> None:
    """Tell of an error, in a line on standard error."""
    if sys.stderr is None:  # print would take standard output instead
        return
    line = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
    with suppress(OSError, ValueError):  # closed: nobody reads it
        print(f"llem: {line}", file=sys.stderr)


def need_output() -> None:
    """See to it that standard output can be written to, whatever encoding it has.

    Raises:
        OSError: There is none.
    """
    if sys.stdout is None:
        raise OSError("is closed")
    if isinstance(sys.stdout, io.TextIOWrapper):  # names are anybody's, and not every terminal has a dash
        sys.stdout.reconfigure(errors="backslashreplace")


def write(text: str) -> None:
    """Write *text* to standard output, to the last byte.

    Raises:
        OSError: It cannot be written.
    """
    sys.stdout.write(text)
    sys.stdout.flush()


def forget_output() -> None:
    """Drop what is still buffered: Python would try again as it exits, and tell of that."""
    with suppress(AttributeError, OSError, ValueError):  # closed, or no file at all
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
