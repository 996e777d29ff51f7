"""The studies that node ids are of. Under xdist the controller collects nothing: it reads them again itself."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from pytest_llem._plugin.declarations import YAML_SUFFIXES
from pytest_llem._plugin.node_ids import EXPERIMENTS, GATES, Node, file_of, is_reference, match_id, parse
from pytest_llem._plugin.options import Settings
from pytest_llem._plugin.stash import STUDIES
from pytest_llem.study.design import Experiment, StudyConfig
from pytest_llem.study.loading import load_study


def experiments_by_run(config: pytest.Config, node_ids: Iterable[str]) -> dict[str, list[str]]:
    """Return the node ids of experiments by the key of their run; that of a reference follows its study's own."""
    found: dict[str, list[str]] = {}
    for node_id in node_ids:
        if (node := _ours(config, node_id)) is not None and node.function in EXPERIMENTS:
            found.setdefault(node.file, [])
            found.setdefault(node.run, []).append(node_id)
    return dict(sorted(found.items(), key=lambda one: is_reference(one[0])))


def gates_by_file(config: pytest.Config, node_ids: Iterable[str]) -> dict[str, dict[str, Node]]:
    """Return the gates among *node_ids*, by node id, by the node id of their file."""
    found: dict[str, dict[str, Node]] = {}
    for node_id in node_ids:
        if (node := _ours(config, node_id)) is not None and node.function in GATES:
            found.setdefault(node.file, {})[node_id] = node
    return found


def _ours(config: pytest.Config, node_id: str) -> Node | None:
    collected, node = config.stash.get(STUDIES, {}), parse(node_id)
    if node is None:
        return None
    is_ours = node.file in collected or (not collected and (not node.file or node.file.endswith(YAML_SUFFIXES)))
    return node if is_ours else None


def selected_experiments(study: StudyConfig, node_ids: Iterable[str]) -> dict[str, Experiment]:
    """Return the experiment of each node id."""
    by_id = {experiment.id: experiment for experiment in study.experiments}
    found: dict[str, Experiment] = {}
    for node_id in node_ids:
        node = parse(node_id)
        if node is not None and (name := match_id(node.name, by_id)) is not None:
            found[node_id] = by_id[name]
    return found


def study_of(config: pytest.Config, run: str) -> StudyConfig:
    """Return the study that was collected for *run*; read it where an xdist worker collected it.

    Raises:
        StudyError: The file is not what the worker read.
        pytest.UsageError: Its place cannot be told from *run*.
    """
    studies, file, settings = config.stash.setdefault(STUDIES, {}), file_of(run), Settings.from_config(config)
    if run in studies:
        return studies[run]
    if not file:  # pytest's ids of items outside rootdir have no path
        raise pytest.UsageError(
            f"under xdist a study has to be below rootdir ({config.rootpath}): use --rootdir, or run without -n"
        )
    study = load_study(config.rootpath / file, settings.overrides)
    if is_reference(run):
        assert settings.against is not None
        return study.with_interpreter(settings.against)
    return study
