"""What pytest knows of the items of studies: the studies of node ids, and what reports say about experiments.

Under xdist the controller collects nothing, and reads the studies again.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from pytest_llem._plugin.declarations import YAML_SUFFIXES
from pytest_llem._plugin.node_ids import EXPERIMENTS, GATES, Node, file_of, is_reference, match_id, parse
from pytest_llem._plugin.options import Settings
from pytest_llem._plugin.stash import STUDIES
from pytest_llem.results.manifest_records import ErrorRecord
from pytest_llem.study.design import Experiment, StudyConfig
from pytest_llem.study.loading import load_study


def experiments_by_run(config: pytest.Config, node_ids: Iterable[str]) -> dict[str, list[str]]:
    """Return the node ids of experiments by the key of their run; references' runs follow all studies'."""
    found: dict[str, list[str]] = {}
    for node_id in node_ids:
        if (node := _study_node(config, node_id)) is not None and node.function in EXPERIMENTS:
            found.setdefault(node.file, [])
            found.setdefault(node.run, []).append(node_id)
    return dict(sorted(found.items(), key=lambda one: is_reference(one[0])))


def gates_by_file(config: pytest.Config, node_ids: Iterable[str]) -> dict[str, dict[str, Node]]:
    """Return the nodes of the gates among *node_ids*, by file and node id."""
    found: dict[str, dict[str, Node]] = {}
    for node_id in node_ids:
        if (node := _study_node(config, node_id)) is not None and node.function in GATES:
            found.setdefault(node.file, {})[node_id] = node
    return found


def _study_node(config: pytest.Config, node_id: str) -> Node | None:
    """Return the node of an item of a study; None if the item is another test."""
    collected, node = config.stash.get(STUDIES, {}), parse(node_id)
    if node is None:
        return None
    may_be_study = not node.file or node.file.endswith(YAML_SUFFIXES)
    return node if node.file in collected or (not collected and may_be_study) else None


def selected_experiments(study: StudyConfig, node_ids: Iterable[str]) -> dict[str, Experiment]:
    """Return the experiments of *study* among *node_ids*, by node id."""
    by_id = {experiment.id: experiment for experiment in study.experiments}
    found: dict[str, Experiment] = {}
    for node_id in node_ids:
        node = parse(node_id)
        if node is not None and (name := match_id(node.name, by_id)) is not None:
            found[node_id] = by_id[name]
    return found


def study_of(config: pytest.Config, key: str) -> StudyConfig:
    """Return the study of the run with *key*, and read it if an xdist worker collected it.

    Raises:
        StudyError: The file is no longer the one that the worker read.
        pytest.UsageError: *key* does not include the path of the file.
    """
    studies, file, settings = config.stash.setdefault(STUDIES, {}), file_of(key), Settings.from_config(config)
    if key in studies:
        return studies[key]
    if not file:  # pytest's ids of items outside rootdir have no path
        raise pytest.UsageError(
            f"with pytest-xdist, studies must be inside rootdir ({config.rootpath}): set --rootdir, or omit -n"
        )
    study = load_study(config.rootpath / file, settings.overrides)
    if is_reference(key):
        assert settings.against is not None
        return study.of_reference(settings.against, str(settings.against_name))
    return study


#: What a user's hook may raise. pytest.fail and pytest.skip do not derive from Exception; pytest.exit does.
HOOK_ERRORS = (Exception, SystemExit, pytest.fail.Exception, pytest.skip.Exception)


def fail_item(report: pytest.TestReport, why: str) -> None:
    """Make an item fail, whatever its outcome was."""
    report.outcome = "failed"
    report.longrepr = why
    vars(report).pop("wasxfail", None)  # with it, pytest would not count the failure


def message_of(error: BaseException) -> str:
    """Return the message of an error, with the name of its type unless the user wrote it for pytest."""
    return (
        str(error)
        if isinstance(error, pytest.fail.Exception | pytest.exit.Exception)
        else f"{type(error).__name__}: {error}"
    )


def skip_reason(report: pytest.TestReport) -> str:
    """Return why an item was skipped or expected to fail."""
    if hasattr(report, "wasxfail"):
        return f"xfail: {report.wasxfail.removeprefix('reason: ')}"
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return reason.removeprefix("Skipped: ")


def outside_error(report: pytest.TestReport) -> ErrorRecord:
    """Return the record of an error outside the experiment's own process."""
    when: str = report.when  # xdist sets "???" for the item that a dead worker was running
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (crash.message if crash else report.longreprtext).strip().splitlines() or ["no reason was given"]
    message = lines[0] if crash else lines[-1]
    if "from pytest-timeout" in message:
        return ErrorRecord(kind="timeout", type="Timeout", message=message.removeprefix("Failed: "), phase=when)
    if when == "???":
        return ErrorRecord(kind="crash", type="WorkerCrash", message=message)
    return ErrorRecord(kind="exception", type="Error", message=message, phase=when)
