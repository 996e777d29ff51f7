"""``--llem-against``: a side that cannot run is known before anything is measured: half a comparison is none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pytest

from pytest_llem._plugin.node_ids import is_reference
from pytest_llem._plugin.options import Settings
from pytest_llem.execution.experiment import preflight_of
from pytest_llem.study.design import Experiment, StudyConfig


def check_sides(
    config: pytest.Config, studies: Mapping[str, StudyConfig], selected: Mapping[str, Iterable[Experiment]]
) -> None:
    """Check that both sides of a comparison have their engines; do nothing where no comparison was asked for.

    Args:
        config: The controller's.
        studies: By the key of their run.
        selected: The experiments that are to run, likewise.

    Raises:
        pytest.UsageError: An interpreter cannot be used, or an engine cannot be imported there or here.
    """
    if Settings.from_config(config).against is None:
        return
    problems: dict[str, None] = {}
    for key, study in studies.items():
        points = [one.point for one in selected[key]]
        wanted = {point.config.backend for point in points if point.skip is None and point.xfail is None}
        side = "the reference" if is_reference(key) else "this side"
        found = preflight_of(config, key, study).unusable_engines(sorted(wanted))
        problems |= dict.fromkeys(f"{side}: {problem}" for problem in found)
    if problems:
        raise pytest.UsageError(f"--llem-against: nothing is measured: {'; '.join(problems)}")
