"""The command ``llem``: what helps with studies, and is no run of pytest.

Loading it imports nothing but the standard library, so that ``llem --help`` answers at once.
"""

from __future__ import annotations

import argparse
import io
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


_FETCH = """\
Bring the models and datasets of studies to this machine ahead of a run, which may then have no network.

Tells of each in a line. Models are looked for as pytest does, in the folders of its ini option
llem_model_path too; what comes from the Hugging Face hub goes into its cache (HF_HOME). With
HF_HUB_OFFLINE=1 nothing is downloaded.
"""

_AA = """\
Tell how far sessions differ that measured the same, and the delta that a gate needs to compare sessions.

Each DIR holds the results of one run of the same study, unchanged, on the same machine: a session. Five or
more are advised, as far apart in time as later comparisons will be. Give all the metrics that the study gates.
A gate that compares cycle by cycle (--llem-against) needs none of this.
"""


_COMPARE = """\
Compare two saved results, point by point and metric by metric, as pytest --llem-baseline does.

A is the reference, B what is judged: each the name of a baseline below the current folder, a saved file, a
study_result.json or a results directory. Which metrics are compared, and how finely, B's study says (gates:).

Exit status: 0 where no gate failed, 1 where one did or could not be judged, 2 where a result cannot be read.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 where it failed, 2 where it could not begin, or 130 after
    Ctrl-C.

    Raises:
        SystemExit: By argparse; with 2 where the arguments are wrong.
    """
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except BrokenPipeError:  # whoever read our output has seen enough
        _forget_output()
        return 1
    except OSError as error:
        if error.filename is None:
            _forget_output()
        print(f"llem: {error.filename or 'standard output'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("llem: interrupted", file=sys.stderr)
        return 130
    return status


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
    fetch = commands.add_parser(
        "fetch",
        help="download the models and datasets of studies",
        description=_FETCH,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    fetch.add_argument("studies", metavar="STUDY", nargs="+", type=Path, help="a study file")
    fetch.add_argument(
        "--model-path",
        metavar="DIR",
        action="append",
        default=[],
        type=Path,
        help="a folder that holds models by name, which need no download; may be given several times",
    )
    fetch.set_defaults(run=_fetch)
    _add_compare(commands)
    _add_aa(commands)
    return parser


def _add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    compare = commands.add_parser(
        "compare",
        help="tell regressions from noise between two saved results",
        description=_COMPARE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    compare.add_argument("reference", metavar="A", help="what is compared with")
    compare.add_argument("candidate", metavar="B", help="what is judged")
    compare.add_argument("--format", choices=("table", "markdown", "json"), default="table", help="default: table")
    compare.add_argument(
        "--metric", action="append", default=[], help="compare this one; may be given several times"
    )
    compare.add_argument("--alpha", type=float, help="share of false alarms")
    compare.add_argument("--delta", type=float, help="relative change that does not count (0.02 is 2 %%)")
    compare.add_argument(
        "--fail-on",
        choices=("regression", "inconclusive"),
        default="regression",
        help="inconclusive: fail where it cannot be decided, too; default: regression",
    )
    compare.add_argument(
        "--anyway",
        action="store_true",
        help="compare where the device, the data or the way of measuring differ, too",
    )
    compare.set_defaults(run=_compare)


def _add_aa(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    aa = commands.add_parser(
        "aa",
        help="tell from repeated runs of the same which delta a gate needs",
        description=_AA,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    aa.add_argument("results", metavar="DIR", nargs="+", type=Path, help="a results directory of the study")
    aa.add_argument(
        "--metric",
        metavar="NAME",
        action="append",
        default=[],
        type=_gated,
        help="a metric to look at; may be given several times; default: those gated by default",
    )
    aa.set_defaults(run=_aa)


def _gated(name: str) -> str:
    """Return the name of a metric that a gate can look at.

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


def _aa(options: argparse.Namespace) -> int:
    from pytest_llem.aa import aa

    _need_output()
    status = aa(options.results, options.metric)
    sys.stdout.flush()
    return status


def _fetch(options: argparse.Namespace) -> int:
    from pytest_llem.fetch import fetch

    _need_output()
    return fetch(options.studies, options.model_path)


def _compare(options: argparse.Namespace) -> int:
    from pytest_llem.compare import compare_saved

    _need_output()
    if isinstance(sys.stdout, io.TextIOWrapper):  # it has dashes, and names that are anybody's
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        text, failed = compare_saved(
            options.reference,
            options.candidate,
            form=options.format,
            metrics=options.metric,
            alpha=options.alpha,
            delta=options.delta,
            fail_on=options.fail_on,
            anyway=options.anyway,
        )
    except ValueError as error:
        print(f"llem: {error}", file=sys.stderr)
        return 2
    sys.stdout.write(text)
    sys.stdout.flush()
    return int(failed)


def _schema(options: argparse.Namespace) -> int:
    from pytest_llem.registry import BACKENDS, installed
    from pytest_llem.study.schema import schema_text

    text = schema_text(installed(BACKENDS))
    if options.output is not None:
        Path(options.output).write_text(text, encoding="utf-8")
    else:
        _need_output()
        sys.stdout.write(text)
        sys.stdout.flush()
    return 0


def _need_output() -> None:
    """Raise OSError where there is no standard output."""
    if sys.stdout is None:
        raise OSError("is closed")


def _forget_output() -> None:
    """Drop what is still buffered: Python would try again as it exits, and tell of that."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (AttributeError, OSError, ValueError):  # closed, or no file at all
        return


if __name__ == "__main__":
    sys.exit(main())
