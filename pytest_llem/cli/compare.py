"""Declare ``llem compare``, which compares two saved results with the gates of a run."""

from __future__ import annotations

import argparse
import shutil

from pytest_llem.cli.command import (
    DONE,
    FAILED,
    Commands,
    add_baseline_dir,
    add_command,
    add_fail_on,
    add_format,
    add_metrics,
    with_error_message,
    write,
)

_DESCRIPTION = """\
Compare two saved results, point by point and metric by metric, as
pytest --llem-baseline does.

A is the reference and B the candidate. Each is the name of a baseline, a
saved file, a study_result.json or a results directory. If a baseline A was
saved on several testbeds, the one of the testbed of B is read. The study of B
sets the metrics, alpha and delta (gates:).
"""

_EXAMPLES = """\
  llem compare main results/llama_2026-11-24T09-12-41Z
  llem compare A B --metric seconds --format markdown
"""


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command to *commands*."""
    parser = add_command(
        commands,
        "compare",
        _run,
        summary="compare two saved results, and find regressions",
        description=_DESCRIPTION,
        statuses={DONE: "no gate failed", FAILED: "a gate failed, or could not be judged"},
        examples=_EXAMPLES,
    )
    parser.add_argument("reference", metavar="A", help="reference")
    parser.add_argument("candidate", metavar="B", help="candidate, which is judged")
    add_baseline_dir(parser)
    add_format(parser, "markdown", "json")
    add_metrics(parser, "metric to compare")
    parser.add_argument(
        "--alpha",
        metavar="ALPHA",
        type=float,
        help="false positive rate; default: that of the study of B, else 0.01 (1 %%)",
    )
    parser.add_argument(
        "--delta",
        metavar="DELTA",
        type=float,
        help="relative change that is tolerated; default: that of the study of B, else 0.02 (2 %%)",
    )
    add_fail_on(parser)
    parser.add_argument(
        "--allow-mismatch",
        action="store_true",
        help="compare even if the device, the data or the measurement settings differ",
    )


@with_error_message
def _run(options: argparse.Namespace) -> int:
    from pytest_llem._plugin.terminal_width import fitted
    from pytest_llem.gates.baselines import load
    from pytest_llem.gates.gate import gates_of
    from pytest_llem.gates.matching import shared_experiments_problem
    from pytest_llem.gates.regression import compare
    from pytest_llem.reporting.terminal import comparison as formats
    from pytest_llem.results.points import testbed_of

    candidate = load(options.candidate, options.baseline_dir)
    testbed = testbed_of(candidate.points)
    keys = [] if testbed is None else [testbed.key]
    reference = load(options.reference, options.baseline_dir, testbeds=keys)
    if dependent := shared_experiments_problem(candidate, reference):
        raise ValueError(f"{options.candidate} and {options.reference}: {dependent}")
    given = {"metrics": list(dict.fromkeys(options.metric)), "alpha": options.alpha, "delta": options.delta}
    given = {key: value for key, value in given.items() if value not in (None, [])}
    found = compare(
        candidate,
        reference,
        gates_of(candidate, options.candidate, given),
        name=options.reference,
        allow_mismatch=options.allow_mismatch,
        fail_on=options.fail_on,
    )
    if options.format == "json":
        write(formats.as_json(found))
    elif options.format == "markdown":
        write(formats.markdown(found))
    else:
        write("\n".join(fitted(formats.lines(found, shutil.get_terminal_size().columns))) + "\n")
    return FAILED if any(verdict.outcome == "failed" for verdict in found.verdicts) else DONE
