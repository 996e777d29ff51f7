"""Declare ``llem merge``, which joins the results of a study's shards and judges its gates."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pytest_llem.cli.command import (
    DONE,
    FAILED,
    Commands,
    add_baseline_dir,
    add_command,
    add_fail_on,
    path,
    with_error_message,
    write,
)

if TYPE_CHECKING:
    from pytest_llem.gates.regression import Comparison
    from pytest_llem.results.manifest_records import ManifestEntry
    from pytest_llem.results.merge import Merged
    from pytest_llem.results.verdicts import GateVerdict

_DESCRIPTION = """\
Join the results of several runs of one study, such as its shards (pytest
--llem-shard I/N), and judge the study's gates on all of them.

Each DIR is a results directory. Runs of one shard that was interrupted and
resumed can all be given, in any order, and so can results that are merged
already. If an experiment was measured more than once, the newest result
counts, and a line says so.
"""

_EXAMPLES = """\
  llem merge results/llama_*_shard-* -o results/llama
  llem merge results/llama_*_shard-* -o results/llama --baseline main
"""

#: Name, in tables, of an interleaved reference whose results do not record its name.
_REFERENCE = "the reference"

#: Maximum number of lines about overlaps, about missing results, and about gates.
MAX_LINES = 20


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command to *commands*."""
    parser = add_command(
        commands,
        "merge",
        _run,
        summary="join the results of a study's shards, and judge its gates",
        description=_DESCRIPTION,
        statuses={
            DONE: "all results are there, and no gate failed",
            FAILED: "a result is missing, or a gate failed or could not be judged",
        },
        examples=_EXAMPLES,
    )
    parser.add_argument("directories", metavar="DIR", type=path, nargs="+", help="a results directory")
    parser.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        type=path,
        required=True,
        help="results directory to write; merged results of the same study are replaced",
    )
    parser.add_argument(
        "--baseline",
        metavar="NAME|FILE",
        help="compare with the baseline of the testbed of the results, or with a saved result",
    )
    add_baseline_dir(parser)
    add_fail_on(parser)
    parser.add_argument(
        "--allow-missing", action="store_true", help="exit with 0 although results are missing, if no gate failed"
    )


@with_error_message
def _run(options: argparse.Namespace) -> int:
    from pytest_llem._plugin.node_ids import REFERENCE
    from pytest_llem._plugin.terminal_width import fitted
    from pytest_llem.gates.baselines import load
    from pytest_llem.gates.merged import judge_budgets, judge_comparison
    from pytest_llem.reporting.terminal import comparison as tables
    from pytest_llem.reporting.terminal.summary import table_lines
    from pytest_llem.results.merge import merge
    from pytest_llem.results.points import testbed_of

    verdicts: list[GateVerdict] = []
    comparisons: list[Comparison] = []

    def judge(merged: Merged) -> None:
        result = merged.result
        reference = None if merged.reference is None else merged.reference.result
        verdicts.extend(judge_budgets(result))
        if reference is not None and options.baseline is not None:
            raise ValueError("--baseline: the runs have a reference of their own (--llem-against)")
        if options.baseline is not None:
            testbed = testbed_of(result.points)
            keys = [] if testbed is None else [testbed.key]
            reference = load(
                options.baseline, options.baseline_dir, result.name, testbeds=keys, only_fitting=bool(keys)
            )
        if reference is not None:
            name = options.baseline or reference.measurement_protocol.get("reference", _REFERENCE)
            paired = merged.reference is not None
            comparisons.append(
                judge_comparison(result, reference, name=name, paired=paired, fail_on=options.fail_on)
            )

    merged = merge(options.directories, options.output, REFERENCE, judge)
    width = shutil.get_terminal_size().columns
    lines = table_lines(merged.result, width)
    for comparison in comparisons:
        lines += ["", *tables.lines(comparison, width)]
    lines += _verdict_lines(verdicts)
    lines += _notes(merged)
    lines.append(f"results: {options.output}")
    verdicts += [verdict for comparison in comparisons for verdict in comparison.verdicts]
    failed = any(verdict.outcome == "failed" for verdict in verdicts)
    sides = [merged, merged.reference] if merged.reference is not None else [merged]
    is_missing = any(side.missing for side in sides)
    write("\n".join(fitted(lines)) + "\n")
    return FAILED if failed or (is_missing and not options.allow_missing) else DONE


def _verdict_lines(verdicts: Sequence[GateVerdict]) -> list[str]:
    from pytest_llem.gates.verdict_text import verdict_line

    failed = [f"FAILED {verdict_line(one)}" for one in verdicts if one.outcome == "failed"]
    count = [f"budgets: {len(verdicts) - len(failed)} passed, {len(failed)} failed"] if verdicts else []
    return [*_capped(failed), *count]


def _notes(merged: Merged) -> Iterator[str]:
    summary = merged.result.summary
    yield (
        f"{len(merged.result.experiments)} experiments: {summary.completed} completed, {summary.failed} failed, "
        f"{len(merged.missing)} without a result"
    )
    for side, what in ((merged, ""), (merged.reference, " of the reference")):
        if side is None:
            continue
        yield from _capped([f"missing{what}: {_missing(one)}" for one in side.missing])
        yield from _capped(
            [
                f"overlap{what}: {name} was measured in {', '.join(runs)}: the newest result counts"
                for name, runs in side.overlaps.items()
            ]
        )


def _missing(entry: ManifestEntry) -> str:
    if entry.error is not None:
        return f"{entry.experiment_id}: {entry.status}, {entry.error.kind}: {entry.error.message}"
    return f"{entry.experiment_id}: {'in no run' if entry.status == 'deselected' else 'not run'}"


def _capped(lines: list[str]) -> list[str]:
    more = len(lines) - MAX_LINES
    return lines if more <= 0 else [*lines[:MAX_LINES], f"and {more} more"]
