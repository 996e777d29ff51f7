"""``llem compare``: two saved results, held against each other as a run would hold them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from pytest_llem.catalogue import CATALOGUE
from pytest_llem.gates.regression import FailOn, compare
from pytest_llem.gates.saved import load
from pytest_llem.reporting import comparison as shown
from pytest_llem.results.models import StudyResult
from pytest_llem.study.gates import GatesConfig
from pytest_llem.study.problems import did_you_mean

Format = Literal["table", "markdown", "json"]


def compare_saved(
    reference: str,
    candidate: str,
    *,
    form: Format = "table",
    metrics: Sequence[str] = (),
    alpha: float | None = None,
    delta: float | None = None,
    fail_on: FailOn = "regression",
    anyway: bool = False,
) -> tuple[str, bool]:
    """Compare two saved results.

    Args:
        reference: What is compared with: as in :func:`pytest_llem.gates.saved.resolve`, below the current folder.
        candidate: What is judged.
        form: Of what is returned.
        metrics: The metrics to compare; none for those of the candidate's study.
        alpha: Share of false alarms; None for that of the candidate's study.
        delta: Relative change that does not count; None likewise.
        fail_on: The least that fails.
        anyway: Compare where bench facts differ, too.

    Returns:
        The comparison as text, and whether any gate failed.

    Raises:
        ValueError: A result cannot be read, or the rest makes no sense.
    """
    there, here = load(reference, Path()), load(candidate, Path())
    settings = _settings(here, metrics, alpha, delta)
    found = compare(here, there, settings, name=reference, anyway=anyway, fail_on=fail_on)
    failed = any(verdict.outcome == "failed" for verdict in found.verdicts)
    if form == "json":
        return shown.as_json(found), failed
    if form == "markdown":
        return shown.markdown(found), failed
    return "\n".join(shown.lines(found, shutil.get_terminal_size().columns)) + "\n", failed


def _settings(
    result: StudyResult, metrics: Sequence[str], alpha: float | None, delta: float | None
) -> GatesConfig:
    """Return what the study of *result* says of its gates, with what is given in its place."""
    for name in metrics:
        if name not in CATALOGUE:
            raise ValueError(f"--metric: no metric {name!r}{did_you_mean(name, tuple(CATALOGUE))}")
        if CATALOGUE[name].better is None:
            raise ValueError(f"--metric: {name}: neither way is better, so that it cannot get worse")
    given: dict[str, Any] = {"metrics": list(dict.fromkeys(metrics)) or None, "alpha": alpha, "delta": delta}
    said = dict(result.measurement_protocol.get("gates") or {})
    said |= {key: value for key, value in given.items() if value is not None}
    try:
        return GatesConfig.model_validate(said)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"gates: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
