"""The plan of each study of a session."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import pytest

from pytest_llem.collection.experiment import preflight_of
from pytest_llem.collection.items import StudyFile, experiment_of
from pytest_llem.collection.resume import replays_of
from pytest_llem.options import STUDIES, Settings
from pytest_llem.planning.plan import Plan
from pytest_llem.study.design import Experiment, StudyConfig


def make_plans(
    config: pytest.Config, studies: Mapping[str, StudyConfig], selected: Mapping[str, Iterable[Experiment]]
) -> list[Plan]:
    """Return the plan of each study, by the node id of its file, for the experiments of it that are *selected*."""
    in_order = {file: sorted(found, key=lambda experiment: experiment.index) for file, found in selected.items()}
    replays = replays_of(config, {file: studies[file] for file, experiments in in_order.items() if experiments})
    return [
        Plan(studies[file], experiments, preflight_of(config, file, studies[file]), replays.get(file))
        for file, experiments in in_order.items()
    ]


def plans_of(config: pytest.Config, items: Sequence[pytest.Item]) -> list[Plan]:
    """Return the plan of each study that was collected; *items* are those that were selected."""
    studies = config.stash.get(STUDIES, {})
    selected: dict[str, list[Experiment]] = {file: [] for file in studies}
    for item in items:
        if isinstance(item.parent, StudyFile):
            selected[item.parent.nodeid].append(experiment_of(item))
    return make_plans(config, studies, selected)


def write_plan(config: pytest.Config, plans: Sequence[Plan]) -> None:
    """Write the plan where ``--llem-plan`` says, if it says.

    Raises:
        pytest.UsageError: It cannot be written, or there is more than one.
    """
    path = Settings.from_config(config).plan
    if path is None:
        return
    if len(plans) != 1:
        raise pytest.UsageError(f"--llem-plan: takes one study ({len(plans) or 'none'} collected)")
    try:
        path.write_text(plans[0].to_json(), encoding="utf-8")
    except OSError as error:
        raise pytest.UsageError(f"--llem-plan: {error}") from error
